"""How a picture is looked at: at once or through sliding windows, at one or several scales, mirrored too.

    canvases = plan(views, "short:448", original, patch)       # the picture at each scale, upright and mirrored
    encoded  = [[encode(some) for some in batches(pixels_of(canvas), canvas, 16)] for canvas in canvases]
    tiles    = Tiles(canvases, encoded)
    features = tiles.merged()                                  # before any prompt: one `Features`, as of one view
    maps     = Mosaic(canvases, tiles.maps(text))              # or after: a map `(y, x)` a prompt, made on demand

Merging features is one pass for any number of prompts and gives a value to cache. Merging maps (`merge="logits"`) is
what the evaluators of the field do, among them SCLIP, ClearCLIP and NACLIP, after mmsegmentation's slide inference.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from open_gem import readout
from open_gem.checks import is_count, is_positive
from open_gem.errors import InputError
from open_gem.images.pixels import target_size
from open_gem.method.attention import wide
from open_gem.method.run import Features
from open_gem.types import Grid, Size

MERGES = ("features", "logits")
"""What `Views.merge` may be."""


@dataclass(frozen=True)
class Views:
    """How a picture is looked at.

    window  side of the square windows that slide over it, in pixels, whole patches; None: the whole picture at once
    stride  pixels from one window to the next, at most `window`; by default half of it (in whole patches where features
            are merged). The last window of a row or column moves back to end where the picture ends
    scales  multiples of the size that the size rule gives; results come at the first
    flip    each view mirrored left-right as well, results averaged
    merge   "features": what the views show is averaged before any prompt. "logits": the similarity map that each view
            gives a prompt is upsampled to pixels, and these are averaged

    Raises:
        InputError: for settings that make no sense.
    """

    window: int | None = None
    stride: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    merge: str = "features"

    def __post_init__(self) -> None:
        if self.window is not None and not is_count(self.window):
            raise InputError(f"window is {self.window!r}, expected a whole number of pixels or None")
        if self.stride is not None and not is_count(self.stride):
            raise InputError(f"stride is {self.stride!r}, expected a whole number of pixels or None")
        if self.stride is not None and self.window is None:
            raise InputError(f"stride is {self.stride} without a window, expected None or a window as well")
        if self.stride is not None and self.window is not None and self.stride > self.window:
            raise InputError(
                f"stride is {self.stride}, expected at most the window's {self.window}, else there are gaps"
            )
        if not isinstance(self.scales, list | tuple) or not self.scales or not all(map(is_positive, self.scales)):
            raise InputError(f"scales are {self.scales!r}, expected one or several numbers above 0")
        if not isinstance(self.flip, bool):
            raise InputError(f"flip is {self.flip!r}, expected True or False")
        if self.merge not in MERGES:
            raise InputError(f"merge is {self.merge!r}, expected one of {', '.join(MERGES)}")
        object.__setattr__(self, "scales", tuple(map(float, self.scales)))  # a list, as JSON has it, would not hash

    @property
    def is_plain(self) -> bool:
        """True where there is one view, the whole picture at the size that the size rule gives."""
        return self.window is None and self.scales == (1.0,) and not self.flip


WHOLE = Views()
"""The whole picture at once."""


@dataclass(frozen=True)
class Window:
    """A rectangle of a canvas, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Canvas:
    """The picture at one scale: `size` in pixels, whether `mirrored` left-right, and the `windows` through which it is
    seen, all of one size, row by row. Where it is mirrored, so are the places: windows lie on what is seen."""

    size: Size
    windows: tuple[Window, ...]
    mirrored: bool = False


# ------------------------------------------------------------------------------------------------------- planning


def check_views(views: Views, patch: tuple[int, int]) -> None:
    """Raises InputError, with the numbers nearest, where window or stride do not fit patches of (height, width)."""
    numbers = {"window": views.window, "stride": views.stride if views.merge == "features" else None}
    step = math.lcm(*patch)
    for name, number in numbers.items():
        if number is not None and number % step:
            below = number // step * step
            nearest = f"{below} or {below + step}" if below else f"{step}"
            patches = f"{patch[0]}x{patch[1]} patches"
            raise InputError(f"{name} is {number} pixels, expected a whole number of {patches}: {nearest}")


def plan(views: Views, rule: str, original: Size, patch: tuple[int, int]) -> tuple[Canvas, ...]:
    """The canvases on which a picture of `original` pixels is seen; the first, upright and of the first scale, is the
    base, at whose size results come.

    `rule` and `patch` as in `imaging.target_size`, which gives each canvas its size. Sides are whole patches, except
    where maps of windows are merged: there a side longer than the window is whole pixels, as a window has whole patches
    wherever it lies. Along a side that is not longer than the window, the window is that side: nothing is padded.

    Raises:
        InputError: for windows that do not fit the patches (see `check_views`), or a malformed rule.
        ImageError: for a picture that is too small or too large (see `imaging.target_size`).
    """
    check_views(views, patch)
    pixelwise = views.merge == "logits"
    sizes = [
        target_size(rule, original, patch, scale=scale, window=views.window, whole_pixels=pixelwise)
        for scale in views.scales
    ]
    stride = _stride(views, 1 if pixelwise else math.lcm(*patch))
    mirrors = (False, True) if views.flip else (False,)
    return tuple(Canvas(size, _windows(size, views.window, stride), mirrored) for size in sizes for mirrored in mirrors)


def _stride(views: Views, step: int) -> int:
    """Half the window, in whole steps, unless it is given; 1 where there is no window to move."""
    if views.window is None:
        return 1
    return views.stride or max(1, views.window // 2 // step) * step


def _windows(size: Size, window: int | None, stride: int) -> tuple[Window, ...]:
    height, width = size if window is None else (min(window, size.height), min(window, size.width))
    return tuple(
        Window(top, left, height, width)
        for top in _starts(size.height, height, stride)
        for left in _starts(size.width, width, stride)
    )


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows along one side start: every `stride`, the last moved back so that it ends with the side."""
    last = side - window
    return [min(start, last) for start in range(0, last + stride, stride)]


# -------------------------------------------------------------------------------------------------------- looking


def batches(pixels: Tensor, canvas: Canvas, count: int) -> Iterator[Tensor]:
    """What the windows of a canvas show, up to `count` at a time: `(≤ count, 3, wy, wx)`, in the order of the windows.

    `pixels` `(3, y, x)` of the canvas's size, upright also for a mirrored canvas. Raises InputError for another size.
    """
    if tuple(pixels.shape) != (3, *canvas.size):
        raise InputError(f"pixels are {tuple(pixels.shape)}, expected the canvas's {(3, *canvas.size)}")
    seen = pixels.flip(-1) if canvas.mirrored else pixels
    for start in range(0, len(canvas.windows), count):
        windows = canvas.windows[start : start + count]
        yield torch.stack([seen[:, w.top : w.top + w.height, w.left : w.left + w.width] for w in windows])


@dataclass(frozen=True, eq=False)
class Tiles:
    """What a method shows of one picture, view by view: a value to cache and ask again, as `Features` is.

    canvases  as `plan` gives them
    features  for each canvas, what its windows gave, in batches, in the order of the windows
    original  the size of the picture itself, where it is known
    """

    canvases: tuple[Canvas, ...]
    features: Sequence[Sequence[Features]]
    original: Size | None = None

    @property
    def size(self) -> Size:
        """Pixels of the base canvas."""
        return self.canvases[0].size

    @property
    def pooled(self) -> Tensor | None:
        """One image-level embedding `(1, e)`, see `merge_pooled`."""
        return merge_pooled(self.features)

    def merged(self) -> Features:
        """One `Features` of the whole picture, see `merge_features`."""
        return replace(merge_features(self.canvases, self.features), original=self.original)

    def maps(self, text: Tensor) -> list[Tensor]:
        """Cosines `(w, p, r, k)` of each canvas's windows with `text` `(p, e)`."""

        def of(part: Features) -> Tensor:
            return readout.similarity(part.patches, text).unflatten(-1, tuple(part.grid))

        return [torch.cat([of(part) for part in parts]) for parts in self.features]


def merge_features(canvases: Sequence[Canvas], features: Sequence[Sequence[Features]]) -> Features:
    """One `Features` of the whole picture, as if it had been seen at once: one image, no prefix tokens.

    features  for each canvas, what its windows gave, in batches, in the order of the windows

    Patch features are averaged where windows overlap, mirrored ones turned back, those of other canvases resampled
    (bilinear, corners not aligned) to the grid of the first, and all canvases averaged. Sums are made in float32 at
    least, the result has the type it came in. The grid may be finer than the model's patches. `pooled` is
    `merge_pooled`.

    Raises:
        InputError: where windows do not lie on one grid, as `plan` for "logits" gives them.
    """
    merged = None
    for canvas, parts in zip(canvases, features, strict=True):
        cells = _unmirror(_join_features(canvas, parts), canvas)
        if merged is None:
            merged = cells
        else:
            fits = cells.shape == merged.shape
            merged += cells if fits else interpolate(cells[None], merged.shape[-2:], mode="bilinear")[0]
    if merged is None:
        raise InputError("no canvas to merge, expected at least one")
    tokens = (merged / len(canvases)).flatten(1).T[None].to(features[0][0].tokens.dtype)
    return Features(tokens, Grid(*merged.shape[-2:]), canvases[0].size, 0, merge_pooled(features))


def _join_features(canvas: Canvas, parts: Sequence[Features]) -> Tensor:
    """Patch features of all windows side by side on the canvas's own grid, averaged where they overlap: `(e, r, k)`."""
    grid, window = parts[0].grid, canvas.windows[0]

    def in_cells(pixels: tuple[int, int]) -> tuple[int, int]:
        y, x = pixels[0] * grid.rows, pixels[1] * grid.cols
        if y % window.height or x % window.width:
            raise InputError(
                f"windows of a {canvas.size.height}x{canvas.size.width} canvas do not lie on one grid of "
                f"{grid.rows}x{grid.cols} features a window: merge their maps instead (merge='logits')"
            )
        return y // window.height, x // window.width

    places = [in_cells((window.top, window.left)) for window in canvas.windows]
    cells = (cells.T.unflatten(-1, tuple(grid)) for part in parts for cells in part.patches)
    return _average(cells, places, Size(*in_cells(canvas.size)))


def merge_pooled(features: Sequence[Sequence[Features]]) -> Tensor | None:
    """The mean `(1, e)` of all views' image-level embeddings, each of unit norm first; that of a single view as it is;
    None where a view has none."""
    pooled = [part.pooled for parts in features for part in parts]
    known = [embedding for embedding in pooled if embedding is not None]
    if len(known) < len(pooled) or not known:
        return None
    if sum(map(len, known)) == 1:
        return known[0]
    views = torch.cat([normalize(wide(embedding), dim=-1) for embedding in known])
    return views.mean(dim=0, keepdim=True).to(known[0].dtype)


class Mosaic(Sequence[Tensor]):
    """The similarity maps `(y, x)` of several views together, at the base canvas's size, each made when asked for.

    canvases  as `plan` gives them
    maps      for each canvas the small maps of its windows, `(w, p, r, k)`

    Each window's map is upsampled (`readout.upsample`) to the window's pixels; the canvas has their mean where they
    overlap. Mirrored canvases are turned back, those of other sizes resampled (bilinear, corners not aligned) to the
    size of the first, and all averaged. Nothing of the size prompts × pixels is ever held: index it, iterate, or
    `stack()` where there is room. Raises InputError where maps and windows are not equally many.
    """

    def __init__(self, canvases: Sequence[Canvas], maps: Sequence[Tensor]):
        self.canvases, self.maps = tuple(canvases), tuple(maps)
        windows, given = [len(canvas.windows) for canvas in self.canvases], [len(some) for some in self.maps]
        if windows != given or not windows:
            raise InputError(f"maps are of {given} windows, expected those of the canvases: {windows}")

    def __len__(self) -> int:
        return self.maps[0].shape[1]

    @overload
    def __getitem__(self, which: int) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice) -> "Mosaic": ...
    def __getitem__(self, which: int | slice) -> "Tensor | Mosaic":
        if isinstance(which, slice):
            chosen = list(range(len(self))[which])  # tensors know no steps backwards
            return Mosaic(self.canvases, [maps[:, chosen] for maps in self.maps])
        index, size = range(len(self))[which], self.canvases[0].size
        merged = None
        for canvas, maps in zip(self.canvases, self.maps, strict=True):
            seen = _unmirror(_join_maps(canvas, maps[:, index]), canvas)
            seen = seen if canvas.size == size else readout.upsample(seen, size)
            merged = seen if merged is None else merged.add_(seen)
        assert merged is not None
        return merged.div_(len(self.canvases))

    def __repr__(self) -> str:
        return f"Mosaic({'x'.join(map(str, self.shape))})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(p, y, x), the shape of `stack()`."""
        size = self.canvases[0].size
        return len(self), size.height, size.width

    @property
    def device(self) -> torch.device:
        """Where maps are made."""
        return self.maps[0].device

    def to(self, device: torch.device | str) -> "Mosaic":
        """The same on another device."""
        return Mosaic(self.canvases, [maps.to(device) for maps in self.maps])

    def stack(self) -> Tensor:
        """All maps at once, `(p, y, x)`."""
        return torch.stack(list(self))


def _join_maps(canvas: Canvas, maps: Tensor) -> Tensor:
    """Maps `(w, r, k)` of the windows, upsampled, on the canvas `(y, x)`, averaged where they overlap."""
    window = Size(canvas.windows[0].height, canvas.windows[0].width)
    return _average(
        (readout.upsample(one, window) for one in maps), [(w.top, w.left) for w in canvas.windows], canvas.size
    )


def _average(pieces: Iterable[Tensor], places: Sequence[tuple[int, int]], size: Size) -> Tensor:
    """Pieces `(..., wy, wx)` laid on one `(..., y, x)` at their (top, left), their mean where they overlap."""
    total = count = None
    for piece, (top, left) in zip(pieces, places, strict=True):
        if total is None or count is None:
            total = wide(piece).new_zeros(*piece.shape[:-2], *size)
            count = total.new_zeros(*size)
        height, width = piece.shape[-2:]
        total[..., top : top + height, left : left + width] += piece
        count[top : top + height, left : left + width] += 1
    assert total is not None and count is not None, "a canvas has windows"
    return total.div_(count)


def _unmirror(seen: Tensor, canvas: Canvas) -> Tensor:
    return seen.flip(-1) if canvas.mirrored else seen
