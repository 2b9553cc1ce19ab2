"""Bootstrap intervals of scores: images are drawn with replacement."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import sparse

from open_gem.errors import InputError
from open_gem.evaluation.metrics.counts import Records
from open_gem.evaluation.metrics.scores import Score

CELLS = 4_000_000
"""Maximum number of values in an array of `resample`, unless one sample needs more."""


class Interval(NamedTuple):
    """An interval from `low` to `high`, both included."""

    low: float
    high: float


def bootstrap(records: Records, score: Score, samples: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the interval that contains the score of data sets of as many images with probability `level` (Efron,
    1979).

    `score` is a function of summed counts, one of `scores`. The units of resampling are images. The percentiles are
    shifted so that the median of the draws is the score: a draw lacks some of the rare classes, and pixels given to a
    missing class count as errors, so that draws of mIoU are biased downwards. The result does not depend on the order
    in which records were merged.

    Raises InputError if there are no counts, or for impossible settings.
    """
    return _about(records.value(score), resample(records, score, samples, seed), level)


def bootstrap_difference(
    records: Records, other: Records, score: Score, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return the interval of a score of `records` minus that of `other`, two methods on the same images; see
    `bootstrap`.

    Both are drawn alike (paired), so that variation between images that affects both cancels out. It is much narrower
    than the intervals of the two alone suggest.

    Raises InputError if their images are not the same.
    """
    if records.images != other.images:
        alone = len(set(records.images) ^ set(other.images))
        raise InputError(f"counts of other images given ({alone} are in one of the two), expected the same")
    values = resample(records, score, samples, seed) - resample(other, score, samples, seed)
    return _about(records.value(score) - other.value(score), values, level)


def _about(score: float, draws: np.ndarray, level: float) -> Interval:
    """Return the interval of draws, moved so that their median is the score itself."""
    defined = draws[~np.isnan(draws)]
    return interval(draws + (score - np.median(defined)) if len(defined) else draws, level)


def interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Return the middle `level` of values `(s,)` of `resample`, or of differences between two of them; NaN does not
    count."""
    if not 0 < level < 1:
        raise InputError(f"level {level} given, expected above 0 and below 1")
    defined = values[~np.isnan(values)]
    if not len(defined):
        return Interval(math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def resample(records: Records, score: Score, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """Draw as many images as there are, `samples` times, and return the score of each draw: `(s,)` float64.

    Two records of the same images with the same seed are drawn alike.
    Sample s has the images `numpy.random.default_rng(seed).integers(n, size=n)`, at the s-th call, of `records.images`.
    """
    if not records.classes:
        raise InputError(f"records of {len(records.rows)} images without counts given, expected counts")
    if samples < 1:
        raise InputError(f"{samples} samples given, expected 1 or more")
    matrix, shape = _matrix(records), records.total.shape
    return np.concatenate(
        [score((weights @ matrix).reshape(-1, *shape)) for weights in _weights(len(records.rows), shape, samples, seed)]
    )


def _weights(images: int, shape: tuple[int, ...], samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each sample has each image, `(at most step, images)`."""
    random = np.random.default_rng(seed)
    step = max(1, CELLS // max(images, math.prod(shape)))
    for start in range(0, samples, step):
        draws = (random.integers(images, size=images) for _ in range(min(step, samples - start)))
        yield np.stack([np.bincount(drawn, minlength=images) for drawn in draws]).astype(np.float64)


def _matrix(records: Records) -> sparse.csr_array:
    """Return the counts of each image as a matrix `(images, c · k)`, sparse: with thousands of classes an image has a
    few."""
    classes, k = records.total.shape
    place = {label: index * k for index, label in enumerate(records.classes)}
    values, columns, ends = [], [], [0]
    for image in records.images:
        for label, counts in records.rows[image].items():
            values.extend(counts)
            columns.extend(range(place[label], place[label] + k))
        ends.append(len(values))
    return sparse.csr_array((np.array(values, dtype=np.float64), columns, ends), shape=(len(records.rows), classes * k))
