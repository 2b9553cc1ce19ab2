"""The views of an image: whole or through sliding windows, at one or several scales, mirrored too.

    for canvas in plan(views, "short:448", original, patch):   # the image at each scale, upright and mirrored
        for crop in crops(pixels_of(canvas), canvas): …

How the results of the windows are merged: `windows`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from jaxtyping import Float
from torch import Tensor

from open_gem.checks import is_count, is_positive
from open_gem.errors import InputError
from open_gem.images.pixels import target_size
from open_gem.types import Size

MERGES = ("features", "logits")
"""Values of `Views.merge`."""


@dataclass(frozen=True)
class Views:
    """The views of an image that the model sees.

    window  side of the square windows that slide over it, in pixels, whole patches; None: the whole image at once
    stride  pixels from one window to the next, at most `window`; by default half of it (in whole patches if features
            are merged). The last window of a row or column moves back to end where the image ends
    scales  multiples of the size that the size rule gives; results come at the first
    flip    also average over each view mirrored left-right
    merge   "features": patch features of all views are averaged before any prompt. "logits": each view's similarity map
            is upsampled to pixels, and these are averaged

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
    def sees_whole(self) -> bool:
        """True if there is one view, the whole image at the size that the size rule gives."""
        return self.window is None and self.scales == (1.0,) and not self.flip


WHOLE = Views()
"""The whole image at once."""


@dataclass(frozen=True)
class Window:
    """A rectangle of a canvas, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Canvas:
    """The image at one scale: `size` in pixels, whether it is `mirrored` left-right, and the `windows` through which it
    is seen, all of one size, row by row. On a mirrored canvas, windows lie on the mirrored image."""

    size: Size
    windows: tuple[Window, ...]
    mirrored: bool = False


# ------------------------------------------------------------------------------------------------------- planning


def check_views(views: Views, patch: tuple[int, int]) -> None:
    """Raise InputError, with the nearest numbers, if window or stride do not fit patches of (height, width)."""
    numbers = {"window": views.window, "stride": views.stride if views.merge == "features" else None}
    step = math.lcm(*patch)
    for name, number in numbers.items():
        if number is not None and number % step:
            below = number // step * step
            nearest = f"{below} or {below + step}" if below else f"{step}"
            patches = f"{patch[0]}x{patch[1]} patches"
            raise InputError(f"{name} is {number} pixels, expected a whole number of {patches}: {nearest}")


def plan(views: Views, rule: str, original: Size, patch: tuple[int, int]) -> tuple[Canvas, ...]:
    """Plan the canvases on which an image of `original` pixels is seen; the first, upright and of the first scale, is
    the base: results come at its size.

    `rule` and `patch` as in `pixels.target_size`, which gives each canvas its size. Sides are whole patches, except
    if maps of windows are merged: then a side longer than the window is whole pixels, as a window has whole patches
    wherever it lies. Along a side that is not longer than the window, the window is that side: nothing is padded.

    Raises:
        InputError: for windows that do not fit the patches (see `check_views`), or a malformed rule.
        ImageError: for an image that is too small or too large (see `pixels.target_size`).
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
    """Return the stride of the views, by default half the window in whole steps; 1 without a window."""
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
    """Return the starts of windows along one side: every `stride`, the last moved back so that it ends with the
    side."""
    last = side - window
    return [min(start, last) for start in range(0, last + stride, stride)]


# -------------------------------------------------------------------------------------------------------- looking


def crops(pixels: Float[Tensor, "c y x"], canvas: Canvas) -> Iterator[Float[Tensor, "c wy wx"]]:
    """Yield the pixels of each window of a canvas, `(c, wy, wx)`, in the order of the windows.

    `pixels` `(c, y, x)` of the canvas's size, upright also for a mirrored canvas. Raises InputError for another size.
    """
    if pixels.ndim != 3 or tuple(pixels.shape[-2:]) != tuple(canvas.size):
        raise InputError(f"pixels are {tuple(pixels.shape)}, expected the canvas's {(3, *canvas.size)}")
    seen = pixels.flip(-1) if canvas.mirrored else pixels
    for window in canvas.windows:
        yield seen[:, window.top : window.top + window.height, window.left : window.left + window.width]


def stacked(windows: Iterable[Float[Tensor, "_ _ _"]], limit: int) -> Iterator[Float[Tensor, "_ _ _ _"]]:
    """Yield windows `(c, wy, wx)` as batches `(≤ limit, c, wy, wx)`: neighbours of one shape together, in order."""
    for _, same in groupby(windows, key=lambda window: window.shape):
        while batch := list(islice(same, limit)):
            yield torch.stack(batch)
