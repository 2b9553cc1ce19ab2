"""Labelled points of OpenImages V7 (Benenson & Ferrari, 2022): IoU over points that people said yes or no to.

A pair is an image and a class with at least one positive point in it; its negative points are those of the same class
in the same image. There are four ways to average, and the paper does not say which is meant:

class_pooled  counts of a class summed over images, IoU, mean over classes; the primary one
pair_mean     IoU of each pair, mean over all pairs
image_mean    mean over the pairs of an image, mean over images
micro         counts of all pairs summed, one IoU

`Records` of them have class → (hits, false, missed, rejected): positive points in the mask, negative ones in it,
positive ones outside, negative ones outside. The last only `point_accuracy` looks at.
"""

import math

import torch
from torch import Tensor

from open_gem.errors import InputError
from open_gem.evaluation.metrics.counts import ImageCounts, Records


def point_counts(mask: Tensor, points: Tensor, positive: Tensor) -> tuple[int, int, int, int]:
    """Return (hits, false, missed, rejected) of the points of one pair.

    mask      `(y, x)` bool, of any size: it covers the image
    points    `(q, 2)` `xy` in [0, 1], as the annotations have them; 1 is in the last pixel
    positive  `(q,)` bool

    Raises InputError where points are outside the image, numbers differ, or no point is positive: such a class is not
    asked for.
    """
    if points.shape != (len(positive), 2):
        raise InputError(f"points {tuple(points.shape)} with {len(positive)} answers given, expected (q, 2) and (q,)")
    if not bool(positive.any()):
        raise InputError("no positive point given, expected at least one: leave out classes without")
    if not bool(((points >= 0) & (points <= 1)).all()):
        raise InputError(f"points from {points.min()} to {points.max()} given, expected parts of the image, 0 to 1")
    height, width = mask.shape
    sides = torch.tensor([width, height], dtype=torch.float64, device="cpu")
    x, y = torch.minimum((points.cpu().double() * sides).long(), sides.long() - 1).unbind(-1)
    inside, positive = mask.cpu()[y, x].bool(), positive.cpu().bool()
    hits, false, missed = (int(group.sum()) for group in (inside & positive, inside & ~positive, ~inside & positive))
    return hits, false, missed, len(positive) - hits - false - missed


def pair_means(records: Records) -> Records:
    """Return (sum, count) of the IoUs of each image's pairs: `ratio` makes pair_mean of it."""
    return Records({image: _mean(row, each_pair=True) for image, row in records.rows.items()})


def image_means(records: Records) -> Records:
    """Return (mean, 1) of the IoUs of each image's pairs: `ratio` makes image_mean of it."""
    return Records({image: _mean(row, each_pair=False) for image, row in records.rows.items()})


def _mean(row: ImageCounts, *, each_pair: bool) -> dict[int, tuple[float, ...]]:
    ious = [hits / (hits + false + missed) for hits, false, missed, *_ in row.values() if hits + false + missed]
    total = math.fsum(ious)
    return {0: (total, len(ious)) if each_pair else (total / len(ious), 1)} if ious else {}
