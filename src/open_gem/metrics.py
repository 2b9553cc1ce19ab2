"""Scores as counts that add: `a + b` of two halves of a data set is exactly the count of the whole."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean as its sum and count: of hits (the pointing game, top-1), whose sum is a whole number, or of IoUs."""

    sum: float = 0
    count: int = 0

    def __add__(self, other: Self) -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)

    @property
    def value(self) -> float:
        """Sum over count, here always in [0, 1]; NaN before anything was counted."""
        return self.sum / self.count if self.count else float("nan")


def pointing_game(points: Tensor, masks: Tensor) -> Mean:
    """Does each point `(p, 2)` `xy` fall into its bool mask `(p, y, x)`?"""
    inside = [bool(mask[y, x]) for (x, y), mask in zip(points.tolist(), masks, strict=True)]
    return Mean(sum(inside), len(inside))


def mask_overlap(predicted: Tensor, true: Tensor) -> Mean:
    """IoU of each pair of bool masks `(p, y, x)`; two empty masks agree fully."""
    intersection = (predicted & true).flatten(1).sum(1).double()
    union = (predicted | true).flatten(1).sum(1).double()
    iou = torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
    return Mean(iou.sum().item(), len(iou))


@dataclass(frozen=True, eq=False)
class Confusion:
    """Pixels by true class (rows) and predicted class (columns), `(c, c)` int64, over a whole data set."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))

    def __add__(self, other: Self) -> "Confusion":
        return Confusion(self.counts + other.counts)

    @property
    def class_iou(self) -> Tensor:
        """IoU of each class `(c,)` float64; NaN for a class neither true nor predicted anywhere."""
        hits = self.counts.diagonal().double()
        return hits / (self.counts.sum(0) + self.counts.sum(1) - hits)

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that occur (as torchmetrics' MulticlassJaccardIndex, macro), in [0, 1]."""
        return self.class_iou.nanmean().item()


def confusion(predicted: Tensor, true: Tensor, classes: int, ignore: int = 255) -> Confusion:
    """Count label maps of one shape, values in [0, classes); pixels whose true label is `ignore` do not count."""
    counted = true != ignore
    pairs = true[counted].long() * classes + predicted[counted].long()
    return Confusion(torch.bincount(pairs, minlength=classes**2).reshape(classes, classes))
