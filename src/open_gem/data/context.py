"""Label maps of Pascal Context from `trainval_merged.json` ("PASCAL in Detail"), without its API.

The document lists `images` (image_id, file_name, height, width, phase) and `annos_segmentation` (image_id, category_id,
segmentation); a segmentation is COCO's run-length encoding, {"size": [height, width], "counts": text}. An image's map
is painted in the order of the document, later segments over earlier ones and 0 elsewhere, as `Detail.getMask` does. Of
the 459 classes, 59 and the background are kept, as in mmsegmentation's conversion.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from open_gem.data.base import first_few
from open_gem.errors import DatasetError
from open_gem.rle import mask_of, run_lengths
from open_gem.types import Size

# fmt: off
KEPT = (  # the id among the 459 of each label, 0 for background
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
)
# fmt: on
_LABEL = {id: label for label, id in enumerate(KEPT)}
_READ = {  # everything else, most of the file, is dropped while it is parsed: parts, boundaries, joints
    *("images", "annos_segmentation", "image_id", "file_name", "height", "width", "phase"),
    *("category_id", "segmentation", "size", "counts"),
}


@dataclass(frozen=True, eq=False)
class ContextImage:
    """One image's annotations: its `id` in lists, its `phase` ("train" or "val"), and each segment as (category,
    run-length encoding), in the order in which they are painted."""

    id: str
    phase: str
    height: int
    width: int
    segments: tuple[tuple[int, Mapping[str, Any]], ...]

    def labels(self) -> NDArray[np.uint8]:
        """Return the map `(y, x)`: 0 background, 1 to 59. Raises DatasetError that names the image if a segment is
        malformed."""
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
            raise DatasetError(
                f"image {self.id}: category {unknown[0]} is not one of the {len(KEPT)} of Pascal Context"
            )
        return np.searchsorted(np.array(KEPT), painted).astype(np.uint8)


def read_context(path: Path) -> tuple[ContextImage, ...]:
    """Read the images of `trainval_merged.json`, in its order. Raises DatasetError that names any other file.

    The whole file is in memory while it is read.
    """

    def kept(members: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in members.items() if key in _READ}

    try:
        with path.open(encoding="utf-8") as file:
            document = json.load(file, object_hook=kept)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"cannot read {str(path)!r}: {reason}") from error
    if not isinstance(document, dict) or not {"images", "annos_segmentation"} <= document.keys():
        raise DatasetError(f"{str(path)!r} has no images and annos_segmentation, expected trainval_merged.json")
    try:
        segments: dict[int, list[tuple[int, Mapping[str, Any]]]] = {
            image["image_id"]: [] for image in document["images"]
        }
        for segment in document["annos_segmentation"]:
            segments[segment["image_id"]].append((int(segment["category_id"]), segment["segmentation"]))
        images = tuple(
            ContextImage(
                Path(image["file_name"]).stem,
                image["phase"],
                int(image["height"]),
                int(image["width"]),
                tuple(segments[image["image_id"]]),
            )
            for image in document["images"]
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DatasetError(f"{str(path)!r} is not as trainval_merged.json should be: {what}") from error
    repeated = [id for id, times in Counter(image.id for image in images).items() if times > 1]
    if repeated:
        raise DatasetError(f"{str(path)!r} holds {first_few(repeated)} more than once, expected each image once")
    return images


_TEXT = re.compile("(?:[P-o]{0,6}[0-O])+")  # numbers of at most 7 letters, 5 bits each; the last letter is below "P"


def decode_runs(encoded: Any) -> NDArray[np.bool_]:
    """Decode a mask `(y, x)` from COCO's run-length encoding: compressed text, or a list of lengths.

    Raises DatasetError for anything else, also for runs that do not cover the mask, which pycocotools does not notice.
    """
    if not isinstance(encoded, Mapping) or not {"size", "counts"} <= encoded.keys():
        raise DatasetError("a segment is not a run-length encoding, expected its size and counts")
    counts = encoded["counts"]
    try:
        height, width = map(int, encoded["size"])
        if not isinstance(counts, str):
            flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
            covers = len(flat) == height * width
            mask = flat.reshape(width, height).T if covers else flat
        elif _TEXT.fullmatch(counts):
            mask = mask_of({"size": [height, width], "counts": counts})
            covers = run_lengths(mask, (slice(0, height), slice(0, width)), Size(height, width))["counts"] == counts
        else:
            raise ValueError(f"{counts[:20]!r} is not a text of counts")
    except (TypeError, ValueError) as error:
        raise DatasetError(f"a segment's run-length encoding is broken: {error}") from error
    if not covers:
        raise DatasetError(f"a segment's runs do not cover {height}x{width} pixels")
    return mask
