"""Masks as polygons: what YOLO, LabelMe, Label Studio and CVAT have in place of pixels."""

import numpy as np

from open_gem.objects import supervision


def polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Return one polygon `(n, 2)` int, `xy`, for each 8-connected part of a mask `(y, x)`: n ≥ 3 vertices.

    Vertices are the outermost pixels themselves, as OpenCV's are and as readers of the formats fill them: filled with
    its border, a polygon gives back every pixel of its part. A hole is joined to the outside by a seam. A part too thin
    to have three corners (a pixel, a straight line) has no polygon.
    """
    supervision()
    from supervision.dataset.utils import approximate_mask_with_polygons

    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return []
    corner = np.array([columns[0], rows[0]])
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    try:
        parts = approximate_mask_with_polygons(crop, bridge_holes=True)
    except ValueError:  # no straight seam leads to a hole through foreground alone: it is filled
        parts = approximate_mask_with_polygons(_filled(crop))
    return [polygon + corner for polygon in parts]


def _filled(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return ndimage.binary_fill_holes(mask).astype(bool)  # pyright: ignore[reportOptionalMemberAccess]
