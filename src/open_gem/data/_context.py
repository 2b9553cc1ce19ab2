"""Label maps of Pascal Context from `trainval_merged.json` ("PASCAL in Detail"), without its API.

The document lists `images` (image_id, file_name, height, width, phase) and `annos_segmentation` (image_id, category_id,
segmentation); a segmentation is COCO's run-length encoding, {"size": [height, width], "counts": text}. An image's map
is painted in the order of the document, later over earlier, what nothing covers being 0, as `Detail.getMask` does; of
the ids of the 459 classes the 59 and background are kept, as mmsegmentation's conversion does.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_gem.data._base import some
from open_gem.errors import DatasetError

# fmt: off
KEPT = (  # the id among the 459 of each label, 0 for background
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
)
# fmt: on
_LABEL = {one: label for label, one in enumerate(KEPT)}
_READ = {  # the rest, most of the file, is dropped while it is parsed: parts, boundaries, joints
    *("images", "annos_segmentation", "image_id", "file_name", "height", "width", "phase"),
    *("category_id", "segmentation", "size", "counts"),
}


@dataclass(frozen=True, eq=False)
class ContextImage:
    """One image's annotations: `id` as lists have it, `phase` train or val, and (category, run-length encoding) of each
    segment in the order in which they are painted."""

    id: str
    phase: str
    height: int
    width: int
    segments: tuple[tuple[int, Mapping[str, Any]], ...]

    def labels(self) -> NDArray[np.uint8]:
        """`(y, x)`: 0 background, 1 to 59. Raises DatasetError, naming the image, for what cannot be painted."""
        painted = np.zeros((self.height, self.width), dtype=np.int32)
        for category, encoded in self.segments:
            try:
                mask = decode_runs(encoded)
            except DatasetError as error:
                raise DatasetError(f"image {self.id}: {error}") from error
            if mask.shape != painted.shape:
                sizes = [f"{height}x{width}" for height, width in (mask.shape, painted.shape)]
                raise DatasetError(f"image {self.id}: a segment is {sizes[0]}, the image {sizes[1]}")
            painted[mask] = category
        unknown = sorted(set(np.unique(painted).tolist()) - _LABEL.keys())
        if unknown:
            raise DatasetError(f"image {self.id}: category {unknown[0]} is none of the {len(KEPT)} of Pascal Context")
        return np.searchsorted(np.array(KEPT), painted).astype(np.uint8)


def read_context(path: Path) -> tuple[ContextImage, ...]:
    """The images of `trainval_merged.json`, in its order. Raises DatasetError, naming the file, for another document.

    All of the file is in memory while it is read.
    """

    def kept(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key in _READ}

    try:
        with path.open(encoding="utf-8") as file:
            document = json.load(file, object_hook=kept)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"cannot read {str(path)!r}: {reason}") from error
    if not isinstance(document, dict) or not {"images", "annos_segmentation"} <= document.keys():
        raise DatasetError(f"{str(path)!r} has no images and annos_segmentation, expected trainval_merged.json")
    try:
        segments: dict[int, list[tuple[int, Mapping[str, Any]]]] = {one["image_id"]: [] for one in document["images"]}
        for one in document["annos_segmentation"]:
            segments[one["image_id"]].append((int(one["category_id"]), one["segmentation"]))
        images = tuple(
            ContextImage(
                Path(one["file_name"]).stem,
                one["phase"],
                int(one["height"]),
                int(one["width"]),
                tuple(segments[one["image_id"]]),
            )
            for one in document["images"]
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DatasetError(f"{str(path)!r} is not as trainval_merged.json should be: {what}") from error
    twice = [one for one, times in Counter(image.id for image in images).items() if times > 1]
    if twice:
        raise DatasetError(f"{str(path)!r} holds {some(twice)} more than once, expected each image once")
    return images


def decode_runs(encoded: Any) -> NDArray[np.bool_]:
    """COCO's run-length encoding -> mask `(y, x)`. Runs of 0 and 1 alternate down the columns, 0 first; `counts` are
    their lengths, or text of them: 5 bits a letter from "0" on, lowest first, where the sixth bit says that more
    follow, and from the fourth number on the difference to the last but one. Raises DatasetError for anything else.
    """
    if not isinstance(encoded, Mapping) or not {"size", "counts"} <= encoded.keys():
        raise DatasetError("a segment is no run-length encoding, expected its size and counts")
    counts = encoded["counts"]
    try:
        height, width = map(int, encoded["size"])
        lengths = _numbers(counts) if isinstance(counts, str) else np.array(counts, dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"a segment's run-length encoding is broken: {error}") from error
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != height * width:
        raise DatasetError(f"a segment's runs cover {lengths.sum()} pixels, expected {height}x{width}")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def _numbers(text: str) -> NDArray[np.int64]:
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - ord("0")
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError(f"{text[:20]!r} is no text of counts")
    ends = np.flatnonzero(codes & 32 == 0)  # the last letter of each number
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 11:
        raise ValueError("a count is too long")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    negative = codes[ends] & 16 != 0  # the sign goes on to the left of the last letter
    numbers -= np.where(negative, 1 << (shifts[ends] + 5), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers
