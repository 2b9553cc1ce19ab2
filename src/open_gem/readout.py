"""From patch features to heatmaps, masks, boxes, points and label maps: pure functions, no state.

Maps are `(p, r, k)` on the patch grid and `(p, y, x)` at pixel size; everything that grows with pixels × prompts is
made one prompt at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate

from open_gem.errors import InputError
from open_gem.tensors import at_least_float32
from open_gem.types import Size

CELLS = 1 << 18
"""Maximum number of values that `grid_softmax_argmax` works on at a time: 1 MiB in float32, which stays in a core's
cache."""


BAND = 1 << 20
"""Pixels of a map that are worked on at a time, if that needs more maps."""


class Boxes(NamedTuple):
    """Boxes of one label, best first: left, top, right, bottom in pixels, right and bottom exclusive; `scores` are the
    highest cosine inside each."""

    xyxy: Int[Tensor, "m 4"]
    scores: Float[Tensor, " m"]


def upsample(grid_map: Float[Tensor, "*p r k"], size: Size) -> Float[Tensor, "*p y x"]:
    """Upsample bilinearly (corners not aligned), as the published code: `(r, k)` → `(y, x)`, or `(p, r, k)` → `(p, y,
    x)`.

    In float32 at least: half precision would make steps of what should be slopes.
    """
    maps = at_least_float32(grid_map.reshape(1, -1, *grid_map.shape[-2:]))
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False).reshape(
        *grid_map.shape[:-2], *size
    )


def min_max(heatmap: Float[Tensor, "y x"]) -> Float[Tensor, "y x"]:
    """Stretch one map `(y, x)` to [0, 1]; a constant map, where nothing stands out, becomes 0."""
    return min_max_of(heatmap)(heatmap)


def min_max_of(heatmap: Float[Tensor, "y x"]) -> Callable[[Tensor], Tensor]:
    """Return what `min_max` does to a map, as a function for any part of it."""
    low, high = heatmap.aminmax()
    # Interpolation weights add up to 1 only nearly, so a constant patch map comes here with noise in its last digits.
    noise = 8 * torch.finfo(heatmap.dtype).eps * torch.maximum(low.abs(), high.abs())
    if high - low <= noise:
        return torch.zeros_like
    return lambda part: (part - low).div_(high - low)  # NaN stays NaN


def above(heatmap: Float[Tensor, "y x"], threshold: float) -> Bool[Tensor, "y x"]:
    """Return where a map is above a threshold: on a CPU by numpy, which takes a tenth of torch's time."""
    if heatmap.device.type != "cpu":
        return heatmap > threshold
    return torch.from_numpy(at_least_float32(heatmap.detach()).numpy() > float(threshold))


def peak(heatmap: Float[Tensor, "y x"]) -> tuple[int, int]:
    """Return where a map `(y, x)` is highest, as `(x, y)` in pixels; the first in reading order among equals."""
    y, x = divmod(int(heatmap.argmax()), heatmap.shape[-1])
    return x, y


def peak_inside(values: Float[np.ndarray, "y x"], region: Bool[np.ndarray, "y x"]) -> tuple[int, int]:
    """Return where values `(y, x)` are highest inside a region that is not empty, as `(x, y)` in pixels; the first in
    reading order among equals."""
    best = None
    for band in bands(*region.shape):
        inside = np.where(region[band], values[band], -np.inf)
        y, x = divmod(int(inside.argmax()), region.shape[1])
        if best is None or inside[y, x] > values[best]:
            best = (band.start + y, x)
    assert best is not None
    return best[1], best[0]


def extent(flags: Bool[np.ndarray, " n"]) -> slice:
    """Return the range from the first true flag to the last; at least one is true."""
    at = np.flatnonzero(flags)
    return slice(int(at[0]), int(at[-1]) + 1)


def bands(height: int, width: int) -> Iterator[slice]:
    """Yield bands of rows with about `BAND` pixels each."""
    step = max(1, BAND // width)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))


class Components(NamedTuple):
    """The 8-connected components of a mask: `labels` `(y, x)` int32, 0 outside and n in the n-th, from 1; and the rows
    and columns that each spans."""

    labels: np.ndarray
    spans: list[tuple[slice, slice]]


def components(mask: Bool[Tensor, "y x"]) -> Components:
    """Return the components of `mask` `(y, x)`, in reading order of their first pixels."""
    labels = np.empty(tuple(mask.shape), dtype=np.int32)
    ndimage.label(mask.cpu().numpy(), structure=np.ones((3, 3)), output=labels)
    return Components(labels, ndimage.find_objects(labels))


def whole(mask: Bool[Tensor, "y x"]) -> Components:
    """Return all of `mask` `(y, x)` as one component, connected or not; none if it is empty."""
    labels = mask.cpu().numpy().astype(np.int32)
    return Components(labels, ndimage.find_objects(labels))


def boxes_of(edges: Sequence[tuple[int, int, int, int]], scores: Sequence[float]) -> Boxes:
    """Return `Boxes` of corners and scores, in the order they come in."""
    xyxy = torch.tensor(edges, dtype=torch.int64, device="cpu").reshape(-1, 4)
    return Boxes(xyxy, torch.tensor(scores, dtype=torch.float32, device="cpu"))


def merge_boxes(by_prompt: Sequence[Boxes]) -> Boxes:
    """Merge the boxes of all prompts of a label, best first."""
    xyxy, scores = (torch.cat(parts) for parts in zip(*by_prompt, strict=True))
    order = scores.argsort(descending=True, stable=True)
    return Boxes(xyxy[order], scores[order])


class SoftmaxArgmax(NamedTuple):
    """Several prompts against each other at each pixel: the highest logit `best`, the `winner` that has it, and
    `sum_exp`, Σ exp(logit − best) over all."""

    best: Float[Tensor, "y x"]
    winner: Int[Tensor, "y x"]
    sum_exp: Float[Tensor, "y x"]

    @property
    def log_sum_exp(self) -> Float[Tensor, "y x"]:
        """log Σ exp(logit): subtract it from a logit to get its log-softmax."""
        return self.best + self.sum_exp.log()


def softmax_argmax(logits: Iterable[Float[Tensor, "y x"]]) -> SoftmaxArgmax:
    """Compare logits, one map per prompt, at least one: a pass that keeps three maps, float32 at least."""
    maps = map(at_least_float32, logits)
    best = next(maps)
    winner, sum_exp = torch.zeros_like(best, dtype=torch.int64), torch.ones_like(best)
    for index, logit in enumerate(maps, start=1):
        higher = torch.maximum(best, logit)
        sum_exp = sum_exp * (best - higher).exp() + (logit - higher).exp()
        winner.masked_fill_(logit > best, index)
        best = higher
    return SoftmaxArgmax(best, winner, sum_exp)


def grid_softmax_argmax(logits: Float[Tensor, "p r k"], size: Size) -> SoftmaxArgmax:
    """Compute `softmax_argmax` of logits on the patch grid, upsampled to `size` as `upsample` does.

    Band by band of pixels between two rows of the grid, all prompts side by side in memory: several times faster than
    map by map. A band has at most `CELLS` numbers (or one row of pixels), for any number of prompts.
    """
    corners = at_least_float32(logits).permute(1, 2, 0).contiguous()
    result = SoftmaxArgmax(
        *(corners.new_empty(size, dtype=kind) for kind in (corners.dtype, torch.int64, corners.dtype))
    )
    for (band, _), here, _ in _upsampled(corners, size):
        best, _ = torch.max(here, dim=-1, out=(result.best[band], result.winner[band]))
        torch.sum(here.sub_(best[..., None]).exp_(), dim=-1, out=result.sum_exp[band])
    return result


def grid_argmax(logits: Float[Tensor, "p r k"], size: Size) -> tuple[Float[Tensor, "y x"], Int[Tensor, "y x"]]:
    """Return `best` and `winner` of `grid_softmax_argmax`, in far less time for many prompts.

    Between four patches each prompt stays between its lowest and its highest value there. A prompt whose highest is
    below the lowest of another wins no pixel, and is left out: most are.
    """
    corners = at_least_float32(logits).permute(1, 2, 0).contiguous()
    best, winner = (corners.new_empty(size, dtype=kind) for kind in (corners.dtype, torch.int64))
    for place, here, prompts in _upsampled(corners, size, candidates=True):
        best[place], at = here.max(dim=-1)
        winner[place] = prompts.expand(len(at), -1, -1).gather(-1, at[..., None])[..., 0]
    return best, winner


def _upsampled(
    corners: Float[Tensor, "r k p"], size: Size, candidates: bool = False
) -> Iterator[tuple[tuple[slice, slice], Float[Tensor, "rows x m"], Int[Tensor, "x m"]]]:
    """Yield rows and columns of pixels, their values, and the prompts that these are of: all of them, or of each
    column's `candidates` alone."""
    (low_rows, high_rows, down), (low, high, along) = (
        _taps(cells, pixels, corners) for cells, pixels in zip(corners.shape[:2], size, strict=True)
    )
    every = torch.arange(corners.shape[2], dtype=torch.int64, device=corners.device).expand(size.width, -1)
    for start, end in _runs(low_rows.tolist()):
        pair = corners[low_rows[start]], corners[high_rows[start]]
        spans = _candidates(*pair, low) if candidates else [(slice(0, size.width), every)]
        for columns, prompts in spans:
            left, right, across = low[columns, None], high[columns, None], along[columns, None]
            above, below = (torch.lerp(row[left, prompts], row[right, prompts], across) for row in pair)
            step = max(1, CELLS // above.numel())
            for first in range(start, end, step):
                rows = slice(first, min(first + step, end))
                yield (rows, columns), torch.lerp(above, below, down[rows, None, None]), prompts


def _candidates(
    above: Float[Tensor, "k p"], below: Float[Tensor, "k p"], low: Int[Tensor, " x"]
) -> Iterator[tuple[slice, Int[Tensor, "columns m"]]]:
    """Yield ranges of columns of pixels between two rows of patches, and the prompts that can be highest in each
    column, or more where another column of the range needs more; `low` is the patch to the left of each column."""
    square = torch.stack([corner for row in (above, below) for corner in (row, torch.cat([row[1:], row[-1:]]))])
    highest, bound = square.amax(dim=0), square.amin(dim=0).amax(dim=1, keepdim=True)
    bound -= 8 * torch.finfo(bound.dtype).eps * bound.abs()  # what interpolation rounds
    counts = (~(highest < bound)).sum(dim=1).tolist()  # NaN is kept
    patches = low.tolist()

    def span(first: int, last: int, most: int) -> tuple[slice, Tensor]:
        own = highest[patches[first] : patches[last - 1] + 1].topk(most, dim=1).indices.sort(dim=1).values
        return slice(first, last), own[low[first:last] - patches[first]]  # sorted: the first of equals wins

    first = most = 0
    for start, end in _runs(patches):
        wider = max(most, counts[patches[start]])
        if start > first and (end - first) * wider > CELLS:
            yield span(first, start, most)
            first, wider = start, counts[patches[start]]
        most = wider
    yield span(first, len(patches), most)


def _taps(cells: int, pixels: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return between which two cells each pixel lies along one side, and how far towards the second: bilinear, corners
    not aligned, in float32 as torch's own."""
    at = (torch.arange(pixels, dtype=torch.float32, device="cpu") + 0.5) * (cells / pixels) - 0.5
    at = at.clamp(min=0)
    low = at.long().clamp(max=cells - 1)
    high = (low + 1).clamp(max=cells - 1)
    return low.to(like.device), high.to(like.device), (at - low).to(like)


def _runs(values: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where each run of equal values starts and ends."""
    start = 0
    for _, run in groupby(values):
        yield start, (start := start + len(list(run)))


def segment(best: SoftmaxArgmax, groups: Sequence[int], background: float | None) -> Int[Tensor, "y x"]:
    """Return the label of the best prompt of each pixel: `(y, x)` int64, −1 for background.

    `groups` has the label of each prompt, −1 for those of the background. A pixel whose best softmax probability is
    below `background` is background too (PascalVOC protocol of the paper): over all prompts; only the best counts
    for its label, as in the evaluators of the field.
    """
    label = label_of(best.winner, groups)
    return label if background is None else label.masked_fill_(1 / best.sum_exp < background, -1)


def label_of(winner: Int[Tensor, "y x"], groups: Sequence[int]) -> Int[Tensor, "y x"]:
    """Return the label of each pixel's best prompt; `groups` as in `segment`."""
    return torch.tensor(groups, dtype=torch.int64, device=winner.device)[winner]


def majority(labels: Int[Tensor, "y x"], regions: Int[Tensor, "y x"]) -> Int[Tensor, "y x"]:
    """Return the label map with each region, by its number from 1, of the label that most of its pixels have; the
    lowest of several.

    Raises InputError for other sizes.
    """
    if regions.shape != labels.shape:
        sizes = (tuple(values.shape) for values in (regions, labels))
        raise InputError("regions are {} pixels, labels {}: expected the same".format(*sizes))
    numbers, region = regions.unique(return_inverse=True)
    kinds, label = labels.unique(return_inverse=True)
    counts = torch.bincount((region * len(kinds) + label).flatten(), minlength=len(numbers) * len(kinds))
    best = kinds[counts.view(len(numbers), -1).argmax(dim=1)]
    return torch.where(regions > 0, best[region], labels)


def remove_redundancy(maps: Float[Tensor, "*w p r k"], scores: Float[Tensor, " p"]) -> Float[Tensor, "*w p r k"]:
    """Subtract from cosines what all prompts share: CLIP Surgery's "feature surgery".

    maps    `(..., p, r, k)` cosines F_i · T_c of patches with p prompts
    scores  `(p,)` cosines of the image-level embedding with them

    S_ic = w_c F_i·T_c − mean_c'(w_c' F_i·T_c'), with w = p · softmax(2 scores): the published code multiplies features
    and texts element by element and sums at the end; this is the same in closed form, without the p × n × e tensor.
    With one prompt nothing is left: CLIP Surgery subtracts the empty prompt then, F_i · (T − T_∅).
    """
    weights = len(scores) * (2 * scores).softmax(dim=0)
    weighted = weights.to(maps)[:, None, None] * maps
    return weighted - weighted.mean(dim=-3, keepdim=True)
