"""What adds: means with exact sums, and small counts image by image."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Self

import numpy as np

from open_gem.errors import InputError
from open_gem.evaluation.metrics.scores import Score

ImageCounts = Mapping[int, tuple[float, ...]] | Mapping[str, tuple[float, ...]]
"""What one image adds: class (a number, or a name) → its counts, only the classes that have any. Means, which have no
classes, are class 0 with (sum, count)."""


@dataclass(frozen=True)
class Mean:
    """A mean as its sum and count: of hits (the pointing game, top-1), whose sum is a whole number, or of IoUs.

    The sum of floats is kept as a fraction, so that it is the same in any order. Raises InputError where it is not
    finite.
    """

    sum: Fraction | float = 0
    count: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sum", _exact(self.sum))

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """The mean of `values`; NaN, a value that is not defined, does not count."""
        defined = [_exact(value) for value in values if not math.isnan(value)]
        return cls(sum(defined, Fraction()), len(defined))

    def __add__(self, other: Self) -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)

    @property
    def value(self) -> float:
        """Sum over count, rounded once; NaN before anything was counted."""
        return float(Fraction(self.sum) / self.count) if self.count else math.nan

    @property
    def row(self) -> dict[int, tuple[float, ...]]:
        """The same as what one image adds to `Records`: (sum, count), for the score `ratio`."""
        total = Fraction(self.sum)
        return {0: (int(total) if total.denominator == 1 else float(total), self.count)} if self.count else {}

    def to_json(self) -> dict[str, Any]:
        """`{"sum": "7/8", "count": 2}`: the fraction as text, since its parts may have more digits than a float."""
        return {"sum": str(self.sum), "count": self.count}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """What `to_json` gave; raises InputError where it is something else."""
        try:
            return cls(Fraction(stored["sum"]), int(stored["count"]))
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            raise InputError(f'{stored!r} is no stored mean, expected {{"sum": "7/8", "count": 2}}') from None


@dataclass(frozen=True)
class Records:
    """Small counts image by image, over any part of a data set: what scores and their intervals are made of.

    rows  image → what it adds. An image with an empty row was seen and had nothing to count: it is drawn like any other
          when images are resampled.

    All rows have the same number of counts a class: (hits, false, missed) of regions, (hits, false, missed, rejected)
    of points, (sum, count) of means. Raises InputError where they have not, where counts are not finite numbers of
    Python, or where some classes are numbers and others names.
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

    def __add__(self, other: "Records") -> "Records":
        return Records.merge([self, other])

    @classmethod
    def merge(cls, parts: Iterable["Records"]) -> "Records":
        """All parts as one; raises InputError where two of them have the same image, which would count twice."""
        rows: dict[str, ImageCounts] = {}
        for part in parts:
            if twice := rows.keys() & part.rows.keys():
                raise InputError(f"{len(twice)} images are in two parts, {min(twice)!r} for one, expected each once")
            rows.update(part.rows)
        return cls(rows)

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
        """Counts summed over images, one row for each of `classes`: `(c, k)`, int64 or, of means, float64.

        Sums of floats are rounded once, from the exact sum: the same in any order.
        """
        found = defaultdict(list)
        for row in self.rows.values():
            for label, counts in row.items():
                found[label].append(counts)
        total = [[_exact_sum(column) for column in zip(*found[label], strict=True)] for label in self.classes]
        return np.array(total) if total else np.zeros((0, 0), dtype=np.int64)

    def value(self, score: Score) -> float:
        """A score of the summed counts; NaN where nothing was counted."""
        return float(score(self.total)) if self.classes else math.nan

    def to_json(self) -> dict[str, list[list[Any]]]:
        """`{image: [[class, count, …], …]}`, images and classes sorted; floats come back as they were."""
        return {
            image: [[label, *counts] for label, counts in sorted(self.rows[image].items())] for image in self.images
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """What `to_json` gave; raises InputError where it is something else."""
        try:
            return cls({i: {label: tuple(counts) for label, *counts in row} for i, row in stored.items()})
        except InputError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"no stored records ({error}), expected {{image: [[class, count, …], …]}}") from None


def _exact(value: Fraction | float) -> Fraction:
    try:
        return Fraction(value)
    except (ValueError, OverflowError):
        raise InputError(f"a mean with {value} given, expected finite numbers") from None


def _is_plain(count: float) -> bool:
    return isinstance(count, int | float) and math.isfinite(count)


def _exact_sum(values: tuple[float, ...]) -> float:
    return sum(values) if all(isinstance(value, int) for value in values) else math.fsum(values)
