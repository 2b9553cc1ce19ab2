"""The input of exporters: images and their objects, from the Parquet parts that labelling writes, one at a time."""

import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from open_gem.checks import did_you_mean, listed
from open_gem.errors import InputError
from open_gem.label.parts import Parts
from open_gem.objects import Object
from open_gem.types import Size

FEW = 16  # rows as Python objects at a time
DIGITS = 6  # digits of scores: single precision has no more
COLUMNS = ("id", "source", "status", "height", "width", "objects")


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One image that was labelled without an error.

    id          of a folder's image, its posix path relative to the folder
    source      path or URL of the image
    size        height and width in pixels
    objects     those that were asked for, most confident first
    labelmap    `(y, x)`: 0 background, otherwise 1 + index into `Labelled.labels`; None if none was written
    similarity  raw cosine of each patch with a label, `(rows, cols)` by label, if it was kept
    """

    id: str
    source: str
    size: Size
    objects: tuple[Object, ...]
    labelmap: Callable[[], np.ndarray | None] = field(repr=False)
    similarity: Callable[[], Mapping[str, np.ndarray]] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Parts, and which of their objects are exported. Iterating reads them from the start, a few rows at a time.

    parts         what labelling wrote, up to when it was opened
    labels        that are exported, in the order of the manifest: their positions are the class indices
    min_score     leave out objects below this
    min_presence  leave out objects whose label is less probable in the image than this; those without it stay
    images        folder where the images are now, by their ids; None: the place they were read from
    progress      called with the number of images that went by
    """

    parts: Parts
    labels: tuple[str, ...]
    min_score: float | None = None
    min_presence: float | None = None
    images: Path | None = None
    progress: Callable[[int], None] = field(default=lambda images: None, repr=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], labels: Sequence[str] | None = None, **settings: Any) -> "Labelled":
        """Open the parts. Raises InputError if there are none, for no label, an unknown label, or a limit that is not a
        number."""
        for name in ("min_score", "min_presence"):
            if (least := settings.get(name)) is not None and not math.isfinite(least):
                raise InputError(f"{name} is {least}, expected a number")
        parts = Parts.open(folder).snapshot()
        known = parts.manifest.labels
        if labels is not None and not labels:
            raise InputError(f"no label is chosen; known: {listed(known)}")
        for label in labels or ():
            if label not in known:
                raise InputError(f"unknown label {label!r}{did_you_mean(label, known)}; known: {listed(known)}")
        if not parts.paths():
            raise InputError(f"no parts in {str(folder)!r}: no image is labelled there yet")
        return cls(parts, tuple(label for label in known if labels is None or label in labels), **settings)

    def count(self) -> Counter[str]:
        """Count images that are "ok" and images that are an "error"."""
        statuses: Counter[str] = Counter()
        for batch in self.parts.columns("status"):
            statuses.update(batch.column(0).to_pylist())
        return statuses

    def ids(self) -> Iterator[str]:
        """Yield the ids of the images without an error."""
        for batch in self.parts.columns("id", "status"):
            yield from (row["id"] for row in batch.to_pylist() if row["status"] == "ok")

    def __iter__(self) -> Iterator[LabelledImage]:
        return self.each()

    def each(self, *more: str) -> Iterator[LabelledImage]:
        """Yield images without an error, with the large values that are requested: labelmap, similarity. Raises
        OutputError for a part that cannot be read."""
        kept = self._kept() if "similarity" in more else repeat({})
        for batch in self.parts.columns(*COLUMNS, *(name for name in more if name != "similarity")):
            for start in range(0, len(batch), FEW):
                few = batch.slice(start, FEW).to_pylist()
                yield from (self._image(raw, next(kept)) for raw in few if raw["status"] == "ok")
                self.progress(len(few))

    def _kept(self) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield the cosines of each image without an error, by label, as far as they were kept."""
        if self.parts.manifest.settings.get("keep") is None:
            yield from repeat({})
        from open_gem.label.kept import kept_images, kept_vocabulary

        vocabulary = kept_vocabulary(self.parts)
        for _, result in kept_images(self.parts):
            grids = [
                np.max([values.numpy() for values in own], axis=0) for own in vocabulary.by_label(list(result.maps))
            ]
            kept = [(label, grid) for label, grid in zip(vocabulary.labels, grids, strict=True) if label in self._index]
            yield {label: grid for label, grid in kept if not np.isnan(grid).any()}

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.labels)}

    def _image(self, raw: dict[str, Any], similarity: Mapping[str, np.ndarray]) -> LabelledImage:
        objects = [
            object_of(stored, self._index[stored["label"]]) for stored in raw["objects"] or () if self._wanted(stored)
        ]
        objects.sort(key=lambda obj: -obj.confidence)
        size = Size(raw["height"], raw["width"])
        return LabelledImage(
            raw["id"],
            raw["source"] if self.images is None else str(self.images / raw["id"]),
            size,
            tuple(objects),
            lambda: self._labelmap(raw.get("labelmap")),
            lambda: similarity,
        )

    def _wanted(self, raw: dict[str, Any]) -> bool:
        return (
            raw["label"] in self._index
            and _reaches(raw["score"], self.min_score)
            and _reaches(raw["presence"], self.min_presence)
        )

    def _labelmap(self, png: bytes | None) -> np.ndarray | None:
        """Return the label map; None if objects are left out by their scores: a map has none, so it cannot follow."""
        if png is None or self.min_score is not None or self.min_presence is not None:
            return None
        with Image.open(io.BytesIO(png)) as image:
            stored = np.asarray(image)
        renumbered = np.array([0, *(self._index.get(label, -1) + 1 for label in self.parts.manifest.labels)])
        return renumbered[stored]


def _reaches(value: float | None, least: float | None) -> bool:
    return value is None or least is None or round(value, DIGITS) >= least


def object_of(stored: dict[str, Any], index: int) -> Object:
    """Return an object from a row; `label` is the name at its label's position."""
    return Object(
        stored["label"],
        index,
        stored["prompt"],
        round(stored["score"], DIGITS),
        stored["image_score"],
        stored["presence"],
        cast(tuple[int, int, int, int], tuple(stored["xyxy"])),
        cast(tuple[int, int], tuple(stored["point"])) if stored["point"] else None,
        stored["rle"],
        stored.get("peak"),
        stored.get("probability"),
        stored.get("mask_quality"),
    )
