"""Scores of summed counts: pure functions `(..., c, k)` → `(...)`, classes × counts, float64.

Regions have (hits, false, missed) a class: elements (pixels, points) of the class that are predicted so, others that
are predicted so, and those of the class that are not. A class with nothing to divide by has no value (NaN) and is left
out of means over classes; a mean over no class is NaN.
"""

from collections.abc import Callable

import numpy as np

from open_gem.errors import InputError

Score = Callable[[np.ndarray], np.ndarray]
"""Summed counts `(..., c, k)` → values `(...)`."""


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class, in [0, 1]: `(..., c)`; NaN for a class neither true nor
    predicted."""
    hits, false, missed = _columns(counts, 3)
    return _over(hits, hits + false + missed)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Return the mean IoU over the classes that occur, as torchmetrics' MulticlassJaccardIndex, macro.

    Of points it is the class-pooled IoU, the primary one of OpenImages V7.
    """
    return _mean(class_iou(counts))


def micro_iou(counts: np.ndarray) -> np.ndarray:
    """Return the IoU of all classes pooled: Σ hits / Σ (hits + false + missed)."""
    hits, false, missed = _columns(counts, 3)
    return _over(hits.sum(-1), (hits + false + missed).sum(-1))


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the share of the counted pixels whose predicted class is right."""
    hits, _, missed = _columns(counts, 3)
    return _over(hits.sum(-1), (hits + missed).sum(-1))


def mean_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the share of each class's pixels that are predicted right, as a mean over the classes that are true
    somewhere."""
    hits, _, missed = _columns(counts, 3)
    return _mean(_over(hits, hits + missed))


def frequency_weighted_iou(counts: np.ndarray) -> np.ndarray:
    """Return the mean IoU, each class weighted by its true pixels (Long et al., 2015)."""
    hits, _, missed = _columns(counts, 3)
    weights = hits + missed
    return _over((weights * np.nan_to_num(class_iou(counts))).sum(-1), weights.sum(-1))


def point_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the share of labelled points on the right side of the mask, from (hits, false, missed, rejected)."""
    hits, false, missed, rejected = _columns(counts, 4)
    return _over((hits + rejected).sum(-1), (hits + false + missed + rejected).sum(-1))


def ratio(counts: np.ndarray) -> np.ndarray:
    """Return a mean, from (sum, count): Σ sum / Σ count, over all classes together."""
    if counts.shape[-1] != 2:
        raise InputError(f"{counts.shape[-1]} counts a class given, expected 2: sum and count")
    return _over(counts[..., 0].sum(-1), counts[..., 1].sum(-1))


def _columns(counts: np.ndarray, least: int) -> list[np.ndarray]:
    if counts.shape[-1] < least:
        expected = ["hits", "false", "missed", "rejected"][:least]
        raise InputError(f"{counts.shape[-1]} counts a class given, expected {least}: {', '.join(expected)}")
    return [counts[..., column] for column in range(least)]


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) != 0)


def _mean(values: np.ndarray) -> np.ndarray:
    return _over(np.nan_to_num(values).sum(-1), (~np.isnan(values)).sum(-1))
