"""Label maps against label maps."""

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from open_gem.errors import InputError

_NO_CLASS, _VOID, _OUTSIDE = -1, -2, -3


def region_counts(predicted: Tensor, true: Tensor, classes: int, ignore: int = 255) -> dict[int, tuple[int, ...]]:
    """Count the pixels of label maps of one shape: a row of `Records`, class → (hits, false, missed) for classes that
    occur.

    predicted  in [0, classes), or −1 for no class: such a pixel is missed, and no class is blamed for it
    true       in [0, classes), or `ignore`: such a pixel does not count

    Labels are whole numbers of any type. Raises InputError for other labels, or shapes that differ.
    """
    predicted, true, counted = _labels(predicted, true, classes, ignore)
    return _row(predicted[counted].cpu().numpy(), true[counted].cpu().numpy(), classes)


def boundary_counts(
    predicted: Tensor, true: Tensor, classes: int, ignore: int = 255, *, width: float = 0.02
) -> dict[int, tuple[int, ...]]:
    """Count the boundary pixels of the masks of one image, for Boundary IoU (Cheng et al., CVPR 2021): a row of
    `Records`.

    predicted, true, ignore  label maps `(y, x)` as in `region_counts`
    width                    of the band, see `boundary`

    Returns class → (hits, false, missed) of the bands of all masks; summed over images, `mean_iou` makes Boundary IoU
    of them: per class over the data set, while the publication takes the mean over objects. Ignored pixels belong to no
    mask, true or predicted, so that a right prediction has 1, however it labels them.

    Raises InputError as `region_counts`, or for maps that are not one image.
    """
    predicted, true, counted = _labels(predicted, true, classes, ignore)
    if true.ndim != 2:
        raise InputError(f"label maps of shape {tuple(true.shape)} given, expected those of one image (y, x)")
    predicted_band, true_band = (_band(torch.where(counted, labels, _VOID), width) for labels in (predicted, true))
    return _row(predicted_band, true_band, classes)


def boundary(mask: Tensor, width: float = 0.02) -> Tensor:
    """Return the band of a bool mask `(y, x)` along its boundary, bool on the CPU.

    width  as part of the image's diagonal: d = round(width · diagonal), at least 1 pixel

    A pixel of the mask counts if the square of 2d + 1 pixels around it is not all mask; outside the image there is no
    mask. This is the published code of Boundary IoU (d erosions with a 3 × 3 square).
    """
    return torch.from_numpy(_band(torch.where(mask, 0, _VOID), width) == 0)


def _row(predicted: np.ndarray, true: np.ndarray, classes: int) -> dict[int, tuple[int, ...]]:
    """Return (hits, false, missed) of each class that occurs; negative labels are no class."""
    hits, all_predicted, all_true = (
        np.bincount(labels[labels >= 0], minlength=classes)
        for labels in (predicted[predicted == true], predicted, true)
    )
    counts = np.stack([hits, all_predicted - hits, all_true - hits], axis=-1).tolist()
    return {label: tuple(row) for label, row in enumerate(counts) if any(row)}


def _band(labels: Tensor, width: float) -> np.ndarray:
    """Return the labels of the pixels near another label or the image's edge, `_NO_CLASS` elsewhere: all masks at
    once."""
    values = labels.to(torch.int32).cpu().numpy()
    pixels = max(1, round(width * math.hypot(*values.shape)))
    low, high = (
        extreme(values, size=2 * pixels + 1, mode="constant", cval=_OUTSIDE)
        for extreme in (ndimage.minimum_filter, ndimage.maximum_filter)
    )
    return np.where(low == high, _NO_CLASS, values)


def _labels(predicted: Tensor, true: Tensor, classes: int, ignore: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return both maps, int64, and which pixels count."""
    for name, labels in (("predicted", predicted), ("true", true)):
        if labels.is_floating_point() or labels.is_complex():
            kind = str(labels.dtype).removeprefix("torch.")
            raise InputError(f"{name} labels of type {kind} given, expected whole numbers: round them, or take argmax")
    predicted, true = predicted.to(torch.int64), true.to(torch.int64)  # torch lacks operations on uint16, for one
    if predicted.shape != true.shape:
        raise InputError(f"predicted {tuple(predicted.shape)} and true {tuple(true.shape)} given, expected one shape")
    counted = true != ignore
    for name, labels, least in (("predicted", predicted, _NO_CLASS), ("true", true, 0)):
        if counted.any():
            low, high = (extreme.item() for extreme in labels[counted].aminmax())
            if low < least or high >= classes:
                raise InputError(f"{name} labels from {low} to {high} given, expected {least} to {classes - 1}")
    return predicted, true, counted
