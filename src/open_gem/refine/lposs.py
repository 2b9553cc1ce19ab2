"""Labels that spread over pixels of one colour: LPOSS+.

V. Stojnić et al., "LPOSS: Label Propagation Over Patches and Pixels for Open-vocabulary Semantic Segmentation", CVPR
2025. The same equations as `method.steps.lposs`, over pixels and their neighbours in the image.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from open_gem.checks import is_count, is_positive
from open_gem.errors import InputError
from open_gem.method.steps import conjugate_gradients
from open_gem.refine.guided import Guided
from open_gem.tensors import at_least_float32
from open_gem.types import Size

LAB = (100.0, 128.0, 128.0)
"""What the channels of CIELAB are divided by."""

_NOTHING = 1e-12  # of weights, which add up to about 1: smaller ones make numbers that processors are slow with


class Pairs(NamedTuple):
    """α W over the pixels of an image: for half of the neighbours, their (rows, columns) and the weights of all pixels
    that have them, with the size of the image and what becomes of a map of ones."""

    offsets: tuple[tuple[int, int], ...]
    weights: tuple[Tensor, ...]
    size: Size
    ones: Tensor


@dataclass(frozen=True)
class LpossPlus(Guided):
    """Label propagation over pixels: (I − α W) P = the maps, by conjugate gradients from 0, each map by itself.

    W is symmetric and normalised, D^-½ A D^-½, and A holds exp(−‖ΔLab‖ / τ) for the pixels of a square around each,
    with the channels of CIELAB over (100, 128, 128). P is divided by what a map of ones becomes: that leaves the best
    label of a pixel as it is, a constant map constant, and values about in their range.

    alpha       share of the neighbours' labels, in (0, 1)
    tau         τ, above 0: smaller follows colours more sharply
    window      side of the square of neighbours in pixels, 3 or more, odd
    iterations  most steps of conjugate gradients, 1 or more
    short       shorter side in pixels to which larger images are shrunk first: the published code works at the size
                that the model sees. Memory is 340 bytes for each of these pixels. None: at full size

    Raises:
        InputError: for settings outside these, and images or maps of other shapes.
    """

    alpha: float = 0.95
    tau: float = 0.01
    window: int = 13
    iterations: int = 10
    short: int | None = 448

    def __post_init__(self) -> None:
        if not is_positive(self.alpha) or self.alpha >= 1:
            raise InputError(f"alpha is {self.alpha!r}, expected a number above 0 and below 1")
        if not is_positive(self.tau):
            raise InputError(f"tau is {self.tau!r}, expected a number above 0")
        if not is_count(self.window, 3) or self.window % 2 == 0:
            raise InputError(f"window is {self.window!r}, expected an odd whole number of pixels, 3 or more")
        if not is_count(self.iterations, 1):
            raise InputError(f"iterations is {self.iterations!r}, expected a whole number, 1 or more")
        if self.short is not None and not is_count(self.short, 1):
            raise InputError(f"short is {self.short!r}, expected a whole number of pixels, or None")

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "refinement": "lposs+"}

    def weights(self, image: Float[Tensor, "3 y x"]) -> Pairs:
        """Return α W of an RGB image in [0, 1], shrunk to `short`."""
        if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
            raise InputError(f"image is {image.dtype} of shape {tuple(image.shape)}, expected floats (3, y, x)")
        height, width = image.shape[-2:]
        factor = 1.0 if self.short is None else min(1.0, self.short / min(height, width))
        size = Size(max(1, round(height * factor)), max(1, round(width * factor)))
        lab = to_lab(_resized(at_least_float32(image), size).clamp(0, 1))
        lab = lab / lab.new_tensor(LAB)[:, None, None]
        reach = self.window // 2
        offsets = tuple(
            (down, right)
            for down, right in product(range(reach + 1), range(-reach, reach + 1))
            if (down, right) > (0, 0) and down < size.height and abs(right) < size.width
        )
        weights, degree = [], lab.new_zeros(*size)
        for offset in offsets:
            here, beside = _overlap(offset)
            squares = (lab[:, *here] - lab[:, *beside]).square_()
            weight = squares.sum(dim=0).sqrt_().div_(-self.tau).exp_()
            degree[here] += weight
            degree[beside] += weight
            weights.append(weight)
        scale = torch.where(degree > 0, degree, 1).rsqrt()
        for offset, weight in zip(offsets, weights, strict=True):
            here, beside = _overlap(offset)
            weight.mul_(scale[here]).mul_(scale[beside]).mul_(self.alpha)
            weight[weight < _NOTHING] = 0
        pairs = Pairs(offsets, tuple(weights), size, degree)
        return pairs._replace(ones=self.propagate(pairs, torch.ones_like(degree)))

    def propagate(self, pairs: Pairs, heatmap: Float[Tensor, "*p y x"]) -> Float[Tensor, "*p y x"]:
        """Solve (I − α W) P = `heatmap`, of the size of the pairs, as LPOSS+ does."""

        def operator(columns: Tensor) -> Tensor:
            maps = columns.T.unflatten(-1, tuple(pairs.size))
            result = maps.clone()
            for offset, weight in zip(pairs.offsets, pairs.weights, strict=True):
                here, beside = _overlap(offset)
                result[:, *here].addcmul_(weight, maps[:, *beside], value=-1)
                result[:, *beside].addcmul_(weight, maps[:, *here], value=-1)
            return result.flatten(1).T

        columns = heatmap.reshape(-1, heatmap.shape[-2] * heatmap.shape[-1]).T
        return conjugate_gradients(operator, columns, self.iterations, 1e-6).T.reshape(heatmap.shape)

    def __call__(self, weights: Pairs, heatmap: Float[Tensor, "*p y x"]) -> Float[Tensor, "*p y x"]:
        """Refine a map `(y, x)`, or several `(p, y, x)`: the same shape, float32 at least."""
        if heatmap.ndim not in (2, 3):
            raise InputError(f"heatmap has shape {tuple(heatmap.shape)}, expected (y, x) or (p, y, x)")
        maps = _resized(at_least_float32(heatmap).reshape(-1, *heatmap.shape[-2:]), weights.size)
        refined = self.propagate(weights, maps) / weights.ones.clamp(min=torch.finfo(maps.dtype).tiny)
        return _resized(refined, Size(*heatmap.shape[-2:])).view(heatmap.shape)


def _overlap(offset: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the pixels that have a neighbour at this offset, and these neighbours, as rows and columns."""
    down, right = offset
    here = slice(0, -down or None), slice(max(0, -right), -right if right > 0 else None)
    beside = slice(down, None), slice(max(0, right), right if right < 0 else None)
    return here, beside


def _resized(maps: Float[Tensor, "p y x"], size: Size) -> Float[Tensor, "p y x"]:
    if maps.shape[-2:] == size:
        return maps
    return interpolate(maps[None], tuple(size), mode="bilinear", antialias=True)[0]


def to_lab(image: Float[Tensor, "3 y x"]) -> Float[Tensor, "3 y x"]:
    """Return CIELAB (D65) of an sRGB image in [0, 1]: L in [0, 100]."""
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    xyz = torch.einsum("ic,cyx->iyx", image.new_tensor(_XYZ), linear) / image.new_tensor(_WHITE)[:, None, None]
    x, y, z = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)
