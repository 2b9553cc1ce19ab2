"""path | bytes | PIL | array | tensor -> pixels: the only place that decides sizes. Reading itself is in `images`.

Three steps, each a pure function:

    image  = read_image("cats.jpg")                               # any source -> 8-bit RGB, upright, decoded
    size   = target_size("short:448", size_of(image), (16, 16))   # how large the backbone shall see it
    pixels = to_pixels(image, size, preprocess)                   # float32 (3, y, x), as the checkpoint was trained

Everything becomes 8-bit RGB first because that is what every checkpoint's own preprocessing resized; a 16-bit or float
image therefore gives the pixels that its 8-bit copy gives. Height before width everywhere; PIL's (width, height)
appears only in calls to PIL.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import floor, inf, isqrt
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from open_gem.errors import ImageError, InputError
from open_gem.images.read import MAX_PIXELS
from open_gem.images.read import Header as Header
from open_gem.images.read import ImageLike as ImageLike
from open_gem.images.read import height_x_width as _by
from open_gem.images.read import read_header as read_header
from open_gem.images.read import read_image as read_image
from open_gem.images.read import size_of as size_of
from open_gem.types import Grid, Size

MAX_PATCHES = 65_536
"""Default maximum number of patches, e.g. 256×256: the cost of self-self attention is quadratic in this."""

INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
"""Names that `Preprocess.interpolation` may have -> PIL's filters."""


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing that a checkpoint's own configuration says; never hard-coded elsewhere.

    `mean` and `std` are per channel (R, G, B) for values in [0, 1]; `interpolation` is a key of `INTERPOLATIONS`;
    `image_size` is the size the checkpoint was trained at.

    Raises:
        InputError: for an interpolation that does not exist.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    image_size: Size

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation {self.interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}")


# ---------------------------------------------------------------------------------------------------------- sizes


class _Sides(NamedTuple):
    """A wanted size before rounding to patches, exact so that a tie is a tie on every machine."""

    height: Fraction
    width: Fraction


def _scaled(size: Size, factor: Fraction) -> _Sides:
    return _Sides(size.height * factor, size.width * factor)


SIZE_RULES: dict[str, Callable[[Size, int], _Sides]] = {
    "short:N": lambda size, n: _scaled(size, Fraction(n, min(size))),  # shorter side N, aspect kept
    "long:N": lambda size, n: _scaled(size, Fraction(n, max(size))),  # longer side N, aspect kept
    "square:N": lambda size, n: _Sides(Fraction(n), Fraction(n)),  # squashed to N×N: what the published GEM code does
    "native": lambda size, n: _scaled(size, Fraction(1)),  # the image's own size
}
"""Size rules, N a positive whole number of pixels -> the wanted sides of an image."""


def _parse(rule: str) -> tuple[Callable[[Size, int], _Sides], int]:
    """Parse a rule: return its row of `SIZE_RULES`, and its N (0 if it has none)."""
    name, colon, number = rule.partition(":") if isinstance(rule, str) else ("", "", "")
    n = int(number) if re.fullmatch("[0-9]{1,9}", number) else 0
    row = SIZE_RULES.get(f"{name}:N" if colon else name)
    if row is None or (colon and n == 0):
        rules = ", ".join(SIZE_RULES)
        raise InputError(f"size rule {rule!r}: expected one of {rules}, where N is a positive whole number of pixels")
    return row, n


def check_size_rule(rule: str) -> str:
    """Return the rule itself. Raises InputError unless it is one of `SIZE_RULES`."""
    _parse(rule)
    return rule


def target_size(
    rule: str,
    size: Size,
    patch: tuple[int, int],
    *,
    scale: float = 1,
    window: int | None = None,
    whole_pixels: bool = False,
    max_patches: int = MAX_PATCHES,
    max_aspect: float = inf,
) -> Size:
    """Return the size at which a backbone sees an image of `size` pixels: a whole number of patches each way.

    `rule` is one of `SIZE_RULES`, e.g. "short:448"; `patch` is (height, width) in pixels. Each side is rounded to the
    nearest whole number of patches (a tie rounds up; at least one) and reached by resizing, neither cropping nor
    padding, so that every pixel lies under a patch and a map covers exactly the image: short:448 makes 480×640 into
    448×592 with 16×16 patches.

    scale         multiplies what the rule gives, before rounding; above 0
    window        side of the square windows, in whole patches, through which the image is encoded; None: all at once
    whole_pixels  with windows: a side longer than one is rounded to whole pixels (a tie rounds up) instead of patches,
                  as by evaluators that slide windows over pixels: short:448 makes 480×640 into 448×597 then
    max_patches   maximum number of patches at once; their cost is quadratic
    max_aspect    maximum ratio of the longer to the shorter side: "short:N" makes a strip a huge image

    Raises:
        InputError: for an unknown or malformed rule.
        ImageError: for an image smaller than one patch, one that would need more than `max_patches` patches at once,
            one that would have more than `MAX_PIXELS` pixels, or a strip of more than `max_aspect`.
    """
    row, n = _parse(rule)
    size = Size(*size)
    if size.height < patch[0] or size.width < patch[1]:
        raise ImageError(f"image is {_by(size)} pixels, smaller than one {_by(patch)} patch: nothing to localize")
    if max(size) > max_aspect * min(size):
        raise ImageError(
            f"image of {_by(size)} pixels is {max(size) / min(size):.3g} times as long as it is short, "
            f"the limit is {max_aspect:g}: crop it"
        )
    factor = Fraction(str(scale))  # 1.1 is eleven tenths, not the float next to it
    free_above = window if whole_pixels else None
    target = Size(*(_rounded(side * factor, step, free_above) for side, step in zip(row(size, n), patch, strict=True)))
    at_once = target if window is None else Size(*(min(side, window) for side in target))
    grid = Grid(at_once.height // patch[0], at_once.width // patch[1])
    by = f"with size rule {rule!r}" if factor == 1 else f"with size rule {rule!r} at scale {scale:g}"
    if grid.patches > max_patches:
        safe = isqrt(max_patches) * min(patch)  # an image or window of this size fits even when square
        what = "image" if window is None else "window"
        advice = f"'long:N' with N up to {floor(safe / factor)}" if window is None else f"windows of up to {safe}"
        raise ImageError(
            f"{what} of {_by(size if window is None else at_once)} pixels needs a grid of {_by(grid)} = {grid.patches} "
            f"patches {by}, the limit is {max_patches}: use {advice}"
        )
    if target.height * target.width > MAX_PIXELS:
        safe = min(isqrt(MAX_PIXELS) // step * step for step in patch)
        raise ImageError(
            f"image of {_by(size)} pixels becomes {_by(target)} {by}, the limit is {MAX_PIXELS} pixels: "
            f"use 'long:N' with N up to {floor(safe / factor)}"
        )
    return target


def _rounded(side: Fraction, step: int, free_above: int | None) -> int:
    """Round to the nearest multiple of `step`, at least one; to the nearest whole number above `free_above`."""
    pixels = floor(side + Fraction(1, 2))
    if free_above is not None and pixels > free_above:
        return pixels
    return max(1, floor(side / step + Fraction(1, 2))) * step


# --------------------------------------------------------------------------------------------------------- pixels


def to_pixels(image: Image.Image, size: Size, preprocess: Preprocess) -> Float[torch.Tensor, "3 y x"]:
    """Resize and normalise an RGB image: float32 (3, y, x), contiguous, on the CPU.

    Bit for bit what torchvision's Resize (on a PIL image), ToTensor and Normalize give: the resizing happens on 8-bit
    values with PIL's antialiased filters, as in training, which tensor resizing does not reproduce.

    Raises:
        ImageError: for an image that is not 8-bit RGB (`read_image` makes it so).
    """
    if image.mode != "RGB":
        raise ImageError(f"PIL image of mode {image.mode}: expected RGB, as read_image gives it")
    height, width = size
    resized = image.resize((width, height), INTERPOLATIONS[preprocess.interpolation])
    values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    mean = torch.tensor(preprocess.mean, dtype=torch.float32, device="cpu").view(3, 1, 1)
    std = torch.tensor(preprocess.std, dtype=torch.float32, device="cpu").view(3, 1, 1)
    return values.sub_(mean).div_(std)
