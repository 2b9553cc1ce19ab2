"""Uploaded images as the model sees them, the most recently used ones, in a bounded number of bytes."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from open_gem.method.run import Encoded
from open_gem.serve.errors import RequestError
from open_gem.types import Grid, Size


@dataclass(frozen=True, eq=False)
class Seen:
    """One image: `size` upright, `pixels` `(3, y, x)` as the model wants them, and its `features` by method, a batch
    of one each. On the CPU."""

    id: str
    size: Size
    grid: Grid
    pixels: Tensor
    features: Mapping[str, Encoded]

    @property
    def nbytes(self) -> int:
        tensors = [self.pixels, *(one.tokens for one in self.features.values())]
        return sum(tensor.nbytes for tensor in tensors)

    def with_features(self, more: Mapping[str, Encoded]) -> "Seen":
        return replace(self, features={**self.features, **more})


class Cache:
    """The images of at most `capacity` bytes; the longest unused goes first. For one thread, the event loop's."""

    def __init__(self, capacity: int):
        self.capacity, self.nbytes = capacity, 0
        self._kept: OrderedDict[str, Seen] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, id: str) -> Seen | None:
        if id in self._kept:
            self._kept.move_to_end(id)
        return self._kept.get(id)

    def put(self, seen: Seen) -> None:
        """Keep it, in place of what has its id. Raises RequestError for one that is larger than all there is room."""
        if seen.nbytes > self.capacity:
            raise RequestError(
                413, f"the image takes {seen.nbytes} bytes, more than the {self.capacity} there is room for"
            )
        self.drop(seen.id)
        self._kept[seen.id] = seen
        self.nbytes += seen.nbytes
        while self.nbytes > self.capacity:
            self.drop(next(iter(self._kept)))

    def drop(self, id: str) -> bool:
        """Forget it; whether it was there."""
        seen = self._kept.pop(id, None)
        self.nbytes -= 0 if seen is None else seen.nbytes
        return seen is not None
