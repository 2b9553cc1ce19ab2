"""Masks that a segmenter draws in place of the regions of a map."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from open_gem import readout
from open_gem.rle import Span


class Region(NamedTuple):
    """A part of a label's mask that is not empty.

    span   its rows and columns
    mask   `(y, x)` of these rows and columns alone
    point  the most confident pixel of the map's own region, `xy`
    """

    span: Span
    mask: Bool[np.ndarray, "y x"]
    point: tuple[int, int]


class CrispMask(NamedTuple):
    """A mask `(y, x)` of a whole image, and the IoU with the object that its segmenter predicts, about [0, 1]."""

    mask: Bool[Tensor, "y x"]
    quality: float


@runtime_checkable
class Segmenter(Protocol):
    """Draws masks of one image."""

    def __call__(self, regions: Sequence[Region], confidence: Float[Tensor, "y x"]) -> Iterator[CrispMask | None]:
        """Yield a mask for each region of one label, or None to keep the region.

        confidence  the label's map in [0, 1], of which the regions are parts
        """
        ...


class Drawn(NamedTuple):
    """A region as it is reported: the segmenter's, with its quality, or the map's own, with None."""

    region: Region
    quality: float | None


def regions_of(
    mask: Bool[Tensor, "y x"], values: Float[np.ndarray, "y x"], fewest: float = 0, *, whole: bool = False
) -> Iterator[Region]:
    """Yield the connected components of a mask that have `fewest` pixels or more; with `whole`, all of it as one.

    values  the map, whose highest value is a region's point
    """
    flags = mask.numpy()  # numpy's `any` takes a tenth of the time of torch's
    if not flags.any():
        return
    top, left = (readout.extent(np.any(flags, axis=axis)) for axis in (1, 0))  # most pixels belong to no object
    numbered, spans = (readout.whole if whole else readout.components)(mask[top, left])
    for number, inner in enumerate(spans, start=1):
        region = numbered[inner] == number
        if np.count_nonzero(region) < fewest:
            continue
        rows, columns = (
            slice(part.start + start, part.stop + start)
            for part, start in zip(inner, (top.start, left.start), strict=True)
        )
        x, y = readout.peak_inside(values[rows, columns], region)
        yield Region((rows, columns), region, (columns.start + x, rows.start + y))


def draw(regions: Iterable[Region], segmenter: Segmenter | None, confidence: Tensor | None) -> Iterator[Drawn]:
    """Yield each region as the segmenter draws it. Without a segmenter, or where that keeps it or draws nothing, it
    stays as it is."""
    if segmenter is None or confidence is None:
        yield from (Drawn(region, None) for region in regions)
        return
    listed = list(regions)
    for region, crisp in zip(listed, segmenter(listed, confidence), strict=True):
        if crisp is None or not crisp.mask.any():
            yield Drawn(region, None)
            continue
        yield Drawn(_region_of(crisp.mask, region.point), crisp.quality)


def claimed(drawn: Iterable[Drawn], owners: Int[np.ndarray, "y x"], index: int) -> Iterator[Drawn]:
    """Yield what is left of regions of label `index` without pixels of others, if anything is.

    owners  which label each pixel belongs to, −1 for none; those of the regions are written there
    """
    for region, quality in drawn:
        inside = owners[region.span]
        mask = region.mask & ((inside == index) | (inside == -1))
        if mask.any():
            inside[mask] = index
            yield Drawn(_trimmed(region, mask), quality)


def _region_of(mask: Tensor, point: tuple[int, int]) -> Region:
    """Return all of a mask `(y, x)` that is not empty."""
    flags = mask.cpu().numpy()
    rows, columns = (slice(0, side) for side in flags.shape)
    return _trimmed(Region((rows, columns), flags, point), flags)


def _trimmed(region: Region, mask: Bool[np.ndarray, "y x"]) -> Region:
    """Return a region with another mask of its span, cut to the rows and columns that have pixels; at least one has."""
    inner = (readout.extent(np.any(mask, axis=1)), readout.extent(np.any(mask, axis=0)))
    rows, columns = (
        slice(outer.start + part.start, outer.start + part.stop) for outer, part in zip(region.span, inner, strict=True)
    )
    return Region((rows, columns), mask[inner], region.point)


def united(drawn: Sequence[Drawn], values: Float[np.ndarray, "y x"]) -> Drawn:
    """Return several regions of one label as one, at least one: its point is the highest of theirs in the map
    `values`, its quality the lowest."""
    mask = paint(drawn, torch.from_numpy(values))
    point = max((region.point for region, _ in drawn), key=lambda point: values[point[1], point[0]])
    qualities = [quality for _, quality in drawn if quality is not None]
    return Drawn(_region_of(mask, point), min(qualities, default=None))


def paint(drawn: Iterable[Drawn], like: Tensor) -> Bool[Tensor, "y x"]:
    """Return all pixels of some regions, on the device and of the shape `(y, x)` of a map."""
    mask = np.zeros(tuple(like.shape), dtype=bool)
    for region, _ in drawn:
        mask[region.span] |= region.mask
    return torch.from_numpy(mask).to(like.device)
