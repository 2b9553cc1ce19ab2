"""Scores as counts that add: `a + b` of two halves of a data set is exactly the count of the whole."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hits:
    """How often something held: the pointing game, or top-1 accuracy."""

    hits: int = 0
    total: int = 0

    def __add__(self, other: Self) -> "Hits":
        return Hits(self.hits + other.hits, self.total + other.total)

    @property
    def share(self) -> float:
        """Hits of all, in [0, 1]; NaN before anything was counted."""
        return self.hits / self.total if self.total else float("nan")


def pointing_game(points: Tensor, masks: Tensor) -> Hits:
    """Does each point `(p, 2)` `xy` fall into its bool mask `(p, y, x)`?"""
    inside = [bool(mask[y, x]) for (x, y), mask in zip(points.tolist(), masks, strict=True)]
    return Hits(sum(inside), len(inside))


@dataclass(frozen=True)
class MaskOverlap:
    """Sum of the IoU of single masks, and their number."""

    iou: float = 0.0
    total: int = 0

    def __add__(self, other: Self) -> "MaskOverlap":
        return MaskOverlap(self.iou + other.iou, self.total + other.total)

    @property
    def mean(self) -> float:
        """Mean IoU over masks, in [0, 1]; NaN before anything was counted."""
        return self.iou / self.total if self.total else float("nan")


def mask_overlap(predicted: Tensor, true: Tensor) -> MaskOverlap:
    """IoU of each pair of bool masks `(p, y, x)`; two empty masks agree fully."""
    intersection = (predicted & true).flatten(1).sum(1).double()
    union = (predicted | true).flatten(1).sum(1).double()
    iou = torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
    return MaskOverlap(iou.sum().item(), len(iou))


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
