"""Masks in COCO's compressed run-length encoding, by pycocotools."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from open_gem.types import Size

if TYPE_CHECKING:
    import numpy as np

Span = tuple[slice, slice]  # rows and columns of an image


def run_lengths(mask: "np.ndarray", span: Span, size: Size) -> dict[str, Any]:
    """Encode a mask `(y, x)` of some rows and columns of an image of `size`, in COCO's compressed run-length
    encoding."""
    import numpy as np
    from pycocotools.mask import frPyObjects

    (height, width), (rows, columns) = size, span
    turned = np.zeros((mask.shape[1], height), dtype=bool)  # COCO goes down columns
    turned[:, rows] = mask.T
    edges = np.flatnonzero(np.diff(turned.ravel(), prepend=False, append=False)) + columns.start * height
    counts = np.diff(edges, prepend=0, append=height * width)
    counts = counts[:-1] if counts[-1] == 0 else counts
    runs: Any = {"size": [height, width], "counts": counts.tolist()}
    packed: Any = frPyObjects(runs, height, width)
    return {"size": [height, width], "counts": str(packed["counts"], "ascii")}


def mask_of(rle: Mapping[str, Any]) -> "np.ndarray":
    """Decode COCO's compressed run-length encoding to a mask `(y, x)` bool."""
    import warnings

    from pycocotools import mask

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # pycocotools with NumPy 2
        return mask.decode({"size": rle["size"], "counts": rle["counts"].encode()}).astype(bool)  # pyright: ignore[reportArgumentType]
