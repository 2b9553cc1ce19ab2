"""Counts that add up: what each image adds to the scores of a data set."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np

from open_gem.errors import InputError
from open_gem.evaluation.metrics.scores import Score

ImageCounts = Mapping[int, tuple[float, ...]] | Mapping[str, tuple[float, ...]]
"""The counts of one image: class (a number, or a name) → its counts, for classes that have any. Means, which have no
classes, are class 0 with (sum, count)."""


def mean_counts(values: Iterable[float]) -> dict[int, tuple[float, ...]]:
    """Return the counts of a mean over `values`, for the score `ratio`: their sum, rounded once, and their number.

    NaN, a value that is not defined, does not count; nothing is added if all are. Raises InputError for infinite ones.
    """
    defined = [float(value) for value in values if not math.isnan(value)]
    if not all(map(math.isfinite, defined)):
        raise InputError(f"a mean of {defined} given, expected finite numbers")
    total = math.fsum(defined)
    return {0: (int(total) if total.is_integer() else total, len(defined))} if defined else {}


@dataclass(frozen=True)
class Records:
    """Small counts for each image, over any part of a data set: scores and their intervals are computed from them.

    rows  image → what it adds. An image with an empty row was measured and had nothing to count: it is drawn like any
          other when images are resampled.

    All rows have the same number of counts a class: (hits, false, missed) of regions, (hits, false, missed, rejected)
    of points, (sum, count) of means. Raises InputError if they have not, if counts are not finite numbers of
    Python, or if some classes are numbers and others names.
    """

    rows: Mapping[str, ImageCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {type(label) for row in self.rows.values() for label in row}
        if not (kinds <= {int} or kinds <= {str}):
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise InputError(f"classes of type {names} given, expected all int or all str")
        widths = {len(counts) for row in self.rows.values() for counts in row.values()}
        if len(widths) > 1:
            raise InputError(f"rows of {sorted(widths)} counts a class given, expected the same number in all")
        for image, row in self.rows.items():
            if not all(_is_plain(count) for counts in row.values() for count in counts):
                raise InputError(f"image {image!r} with counts {dict(row)} given, expected finite int or float")

    @cached_property
    def images(self) -> list[str]:
        """Every image, sorted: the order in which they are resampled."""
        return sorted(self.rows)

    @cached_property
    def classes(self) -> list[Any]:
        """Every class that has counts in some image, sorted."""
        return sorted({label for row in self.rows.values() for label in row})

    @cached_property
    def total(self) -> np.ndarray:
        """Sum the counts over images, one row for each of `classes`: `(c, k)`, int64 or, for means, float64.

        Sums of floats are rounded once, from the exact sum: the same in any order.
        """
        by_class = defaultdict(list)
        for row in self.rows.values():
            for label, counts in row.items():
                by_class[label].append(counts)
        total = [[_exact_sum(column) for column in zip(*by_class[label], strict=True)] for label in self.classes]
        return np.array(total) if total else np.zeros((0, 0), dtype=np.int64)

    def value(self, score: Score) -> float:
        """Return a score of the summed counts; NaN if nothing was counted."""
        return float(score(self.total)) if self.classes else math.nan

    def to_json(self) -> dict[str, list[list[Any]]]:
        """Return `{image: [[class, count, …], …]}`, images and classes sorted; floats are restored exactly."""
        return {
            image: [[label, *counts] for label, counts in sorted(self.rows[image].items())] for image in self.images
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Restore records from the result of `to_json`. Raises InputError for anything else."""
        try:
            return cls({i: {label: tuple(counts) for label, *counts in row} for i, row in stored.items()})
        except InputError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"no stored records ({error}), expected {{image: [[class, count, …], …]}}") from None


def _is_plain(count: float) -> bool:
    return isinstance(count, int | float) and math.isfinite(count)


def _exact_sum(values: tuple[float, ...]) -> float:
    return sum(values) if all(isinstance(value, int) for value in values) else math.fsum(values)
