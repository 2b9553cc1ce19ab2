"""Uploaded images as the model sees them, the most recently used ones, in a bounded number of bytes."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from open_gem.locate import Prepared
from open_gem.serve.errors import RequestError
from open_gem.types import Grid, Size


@dataclass(frozen=True, eq=False)
class CachedImage:
    """An uploaded image: `prepared`, and `encoded` by method, on the CPU."""

    id: str
    prepared: Prepared
    encoded: Mapping[str, Any]

    @property
    def size(self) -> Size:
        """The size of the image itself, upright."""
        return self.prepared.original

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of its maps; None if they depend on the prompts."""
        return next(iter(self.encoded.values())).grid

    @property
    def nbytes(self) -> int:
        return self.prepared.nbytes + sum(encoded.nbytes for encoded in self.encoded.values())

    def with_encoded(self, more: Mapping[str, Any]) -> "CachedImage":
        return replace(self, encoded={**self.encoded, **more})


class Cache:
    """Images of at most `capacity` bytes; the least recently used goes first. For one thread, the event loop's."""

    def __init__(self, capacity: int):
        self.capacity, self.nbytes = capacity, 0
        self._images: OrderedDict[str, CachedImage] = OrderedDict()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, id: str) -> CachedImage | None:
        if id in self._images:
            self._images.move_to_end(id)
        return self._images.get(id)

    def put(self, image: CachedImage) -> None:
        """Keep an image, in place of one with the same id. Raises RequestError for one that is larger than the
        capacity."""
        if image.nbytes > self.capacity:
            raise RequestError(413, f"the image takes {image.nbytes} bytes, the cache holds {self.capacity}")
        self.drop(image.id)
        self._images[image.id] = image
        self.nbytes += image.nbytes
        while self.nbytes > self.capacity:
            self.drop(next(iter(self._images)))

    def drop(self, id: str) -> bool:
        """Forget an image. Return True if it was in the cache."""
        image = self._images.pop(id, None)
        self.nbytes -= 0 if image is None else image.nbytes
        return image is not None
