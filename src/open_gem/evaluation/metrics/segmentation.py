"""Label maps against label maps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from open_gem.errors import InputError
from open_gem.evaluation.metrics import scores

_NOBODY, _VOID, _OUTSIDE = -1, -2, -3


@dataclass(frozen=True, eq=False)
class Confusion:
    """Pixels by true class (rows) and predicted class (columns), over a whole data set.

    counts  `(c, c + 1)` int64; the last column has the pixels that were given to no class (−1)

    `Confusion()` adds to one of any number of classes. Scores are in [0, 1], NaN where nothing was counted.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.int64, device="cpu"))

    def __add__(self, other: Self) -> "Confusion":
        mine, theirs = len(self.counts), len(other.counts)
        if mine and theirs and mine != theirs:
            raise InputError(f"confusions of {mine} and of {theirs} classes given, expected the same classes")
        return Confusion(self.counts + other.counts if mine and theirs else self.counts if mine else other.counts)

    @property
    def tally(self) -> np.ndarray:
        """(hits, false, missed) of each class, `(c, 3)` int64: what all scores are made of."""
        counts = self.counts.cpu().numpy()
        hits = counts.diagonal()
        return np.stack([hits, counts[:, :-1].sum(0) - hits, counts.sum(1) - hits], axis=-1)

    @property
    def row(self) -> dict[int, tuple[int, ...]]:
        """What this adds to `Records`, where it is of one image: (hits, false, missed) of the classes that occur."""
        return {label: tuple(counts) for label, counts in enumerate(self.tally.tolist()) if any(counts)}

    @property
    def class_iou(self) -> Tensor:
        """IoU of each class `(c,)` float64; NaN for a class neither true nor predicted anywhere."""
        return torch.from_numpy(scores.class_iou(self.tally))

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that occur (as torchmetrics' MulticlassJaccardIndex, macro)."""
        return float(scores.mean_iou(self.tally))

    @property
    def pixel_accuracy(self) -> float:
        """Share of pixels that were given their class."""
        return float(scores.pixel_accuracy(self.tally))

    @property
    def mean_accuracy(self) -> float:
        """Mean over the classes that are true somewhere of the share of their pixels that were found."""
        return float(scores.mean_accuracy(self.tally))

    @property
    def frequency_weighted_iou(self) -> float:
        """Mean IoU where each class weighs as many as its true pixels."""
        return float(scores.frequency_weighted_iou(self.tally))

    def to_json(self) -> dict[str, list[list[int]]]:
        """`{"counts": [[…], …]}`, `(c, c + 1)`."""
        return {"counts": self.counts.tolist()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """What `to_json` gave; raises InputError where it is something else."""
        try:
            counts = torch.tensor(stored["counts"], dtype=torch.int64, device="cpu")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f'no stored confusion ({error}), expected {{"counts": [[…], …]}}') from None
        if not counts.numel():
            return cls()
        if counts.tolist() != stored["counts"]:
            raise InputError("a stored confusion has counts that are no whole numbers, expected whole numbers")
        if counts.ndim != 2 or counts.shape[1] != len(counts) + 1:
            raise InputError(f"a confusion of shape {tuple(counts.shape)} given, expected (c, c + 1)")
        return cls(counts)


def confusion(predicted: Tensor, true: Tensor, classes: int, ignore: int = 255) -> Confusion:
    """Count label maps of one shape; pixels whose true label is `ignore` do not count.

    predicted  in [0, classes), or −1 for no class: such a pixel is missed, and no class is blamed for it
    true       in [0, classes), or `ignore`

    Labels are whole numbers of any type. Raises InputError for other labels, or shapes that differ.
    """
    predicted, true, counted = _labels(predicted, true, classes, ignore)
    given = predicted[counted]
    pairs = true[counted] * (classes + 1) + torch.where(given == _NOBODY, classes, given)
    return Confusion(torch.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1))


def boundary(
    predicted: Tensor, true: Tensor, classes: int, ignore: int = 255, *, width: float = 0.02
) -> dict[int, tuple[int, ...]]:
    """Boundary pixels of the masks of one image, for Boundary IoU (Cheng et al., CVPR 2021): a row of `Records`.

    predicted, true, ignore  label maps `(y, x)` as in `confusion`
    width                    as part of the picture's diagonal: d = round(width · diagonal), at least 1 pixel

    Of each mask those pixels count whose square of 2d + 1 pixels is not all mask, the outside of the picture being no
    mask, as in the published code (d erosions with a 3 × 3 square). Returns class → (hits, false, missed) of these
    bands; summed over images, `mean_iou` makes Boundary IoU of them: of each class over the data set, where the
    publication has the mean over objects. Ignored pixels belong to no mask, true or predicted, so that a right
    prediction has 1 whatever it says there.

    Raises InputError as `confusion`, or for maps that are not one image.
    """
    predicted, true, counted = _labels(predicted, true, classes, ignore)
    if true.ndim != 2:
        raise InputError(f"label maps of shape {tuple(true.shape)} given, expected those of one image (y, x)")
    pixels = max(1, round(width * math.hypot(*true.shape)))
    given, wanted = (_band(torch.where(counted, labels, _VOID), pixels) for labels in (predicted, true))
    hits, all_given, all_wanted = (
        np.bincount(labels[labels >= 0], minlength=classes) for labels in (given[given == wanted], given, wanted)
    )
    tally = np.stack([hits, all_given - hits, all_wanted - hits], axis=-1).tolist()
    return {label: tuple(counts) for label, counts in enumerate(tally) if any(counts)}


def _band(labels: Tensor, pixels: int) -> np.ndarray:
    """The labels of the pixels near another label or the picture's edge, `_NOBODY` elsewhere: all masks at once."""
    values = labels.to(torch.int32).cpu().numpy()
    low, high = (
        extreme(values, size=2 * pixels + 1, mode="constant", cval=_OUTSIDE)
        for extreme in (ndimage.minimum_filter, ndimage.maximum_filter)
    )
    return np.where(low == high, _NOBODY, values)


def _labels(predicted: Tensor, true: Tensor, classes: int, ignore: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both maps, int64, and which pixels count."""
    for name, labels in (("predicted", predicted), ("true", true)):
        if labels.is_floating_point() or labels.is_complex():
            kind = str(labels.dtype).removeprefix("torch.")
            raise InputError(f"{name} labels of type {kind} given, expected whole numbers: round them, or take argmax")
    predicted, true = predicted.to(torch.int64), true.to(torch.int64)  # of uint16, say, torch knows little
    if predicted.shape != true.shape:
        raise InputError(f"predicted {tuple(predicted.shape)} and true {tuple(true.shape)} given, expected one shape")
    counted = true != ignore
    for name, labels, least in (("predicted", predicted, _NOBODY), ("true", true, 0)):
        if counted.any():
            low, high = (extreme.item() for extreme in labels[counted].aminmax())
            if low < least or high >= classes:
                raise InputError(f"{name} labels from {low} to {high} given, expected {least} to {classes - 1}")
    return predicted, true, counted
