"""One object for each label: do the predicted points, masks and boxes agree with the true ones? Each returns the counts
of a mean, for the score `ratio`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from open_gem.errors import InputError
from open_gem.evaluation.metrics.counts import ImageCounts, mean_counts
from open_gem.evaluation.metrics.segmentation import boundary


def pointing_game(points: Tensor, masks: Tensor) -> ImageCounts:
    """Count points `(p, 2)` `xy` that fall into their bool mask `(p, y, x)`. Raises InputError for points off the
    masks, or masks that are not bool."""
    _check_bool(masks)
    height, width = masks.shape[-2:]
    points = (points.floor() if points.is_floating_point() else points).long()  # −0.5 is off the masks
    x, y = points.unbind(-1)
    if bool(((x < 0) | (x >= width) | (y < 0) | (y >= height)).any()):
        raise InputError(f"points {points.tolist()} given, expected x below {width} and y below {height}")
    inside = [bool(mask[y, x]) for (x, y), mask in zip(points.tolist(), masks, strict=True)]
    return mean_counts(inside)


def mask_overlap(predicted: Tensor, true: Tensor) -> ImageCounts:
    """Return the IoU of each pair of bool masks `(p, y, x)`; two empty masks have 1. Raises InputError if shapes
    differ, or masks are not bool."""
    _check_bool(predicted, true)
    if predicted.shape != true.shape:
        raise InputError(f"masks {tuple(predicted.shape)} and {tuple(true.shape)} given, expected one shape")
    intersection = (predicted & true).flatten(1).sum(1).double()
    union = (predicted | true).flatten(1).sum(1).double()
    return mean_counts(torch.where(union > 0, intersection / union.clamp(min=1), 1.0).tolist())


def boundary_overlap(predicted: Tensor, true: Tensor, *, width: float = 0.02) -> ImageCounts:
    """Return the Boundary IoU (Cheng et al., CVPR 2021) of each pair of bool masks `(p, y, x)`: the IoU of their
    bands, see `segmentation.boundary`. Errors as `mask_overlap`."""
    _check_bool(predicted, true)
    bands = (torch.stack([boundary(mask, width) for mask in masks]) for masks in (predicted, true))
    return mask_overlap(*bands)


def box_overlap(predicted: Sequence[Tensor], true: Tensor) -> ImageCounts:
    """Return the IoU of the best box of each label with the true box.

    predicted  for each label its boxes `(m, 4)` `xyxy`, the best first (as `Boxes.xyxy`); IoU is 0 if m = 0
    true       `(p, 4)` `xyxy`, right and bottom exclusive

    Two boxes without area have IoU 1. Raises InputError if their numbers differ.
    """
    if len(predicted) != len(true):
        raise InputError(f"boxes of {len(predicted)} labels and {len(true)} true ones given, expected as many")
    nothing = [0.0, 0.0, 0.0, 0.0]
    best = [boxes[0].tolist() if len(boxes) else nothing for boxes in predicted]
    return mean_counts([_box_iou(*pair) for pair in zip(best, true.tolist(), strict=True)])


def _check_bool(*masks: Tensor) -> None:
    for mask in masks:
        if mask.dtype != torch.bool:
            kind = str(mask.dtype).removeprefix("torch.")
            raise InputError(f"masks of type {kind} given, expected bool: compare them with a threshold first")


def _box_iou(box: list[float], other: list[float]) -> float:
    shared = [*map(max, box[:2], other[:2]), *map(min, box[2:], other[2:])]
    intersection = _area(shared)
    union = _area(box) + _area(other) - intersection
    return intersection / union if union else 1.0


def _area(box: list[float]) -> float:
    left, top, right, bottom = box
    return max(0.0, right - left) * max(0.0, bottom - top)
