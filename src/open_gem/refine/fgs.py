"""Maps that follow the edges of the image: fast global smoothing (FGS).

D. Min, S. Choi, J. Lu, B. Ham, K. Sohn and M. N. Do, "Fast Global Image Smoothing Based on Weighted Least Squares",
IEEE Transactions on Image Processing 23(12), 2014. Neither model nor training: values spread along rows and columns
until an edge of the image stops them, however far that is.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from open_gem.checks import is_count, is_positive
from open_gem.errors import InputError
from open_gem.refine.guided import Guided, check_channels, check_size
from open_gem.types import Size

(_factorise,) = get_lapack_funcs(("pttrf",), dtype=np.float64)
(_solve,) = get_lapack_funcs(("pttrs",), dtype=np.float32)


class _Factors(NamedTuple):
    """L D Lᵀ of a symmetric tridiagonal matrix, all rows of a map behind one another: D, and L below its diagonal."""

    diagonal: np.ndarray
    below: np.ndarray


class FgsWeights(NamedTuple):
    """The linear systems of an image of this `size`: along rows, along columns, along rows again …"""

    size: Size
    systems: tuple[_Factors, ...]


@dataclass(frozen=True)
class Fgs(Guided):
    """Fast global smoothing.

    Every row of a map m becomes the u that minimises, along the row,

        Σ_i (u_i − m_i)² + λ_t Σ_i w_i (u_i − u_i+1)²,    w_i = exp(−‖I_i − I_i+1‖ / σ)

    then every column, for t = 1 to T `iterations`, with λ_t = 3/2 · 4^(T−t) / (4^T − 1) · λ. Here λ = (reach · longer
    side)² and σ = contrast · the root mean square of ‖I_i − I_i+1‖ over the image, where the paper leaves both to the
    user: the same image at another size, brightness or contrast is smoothed alike. Each pixel becomes a mean of all, so
    values stay in their range and a constant map stays as it is.

    reach       above 0: about how far values spread where the image has no edge, as a share of its longer side
    contrast    above 0: smaller stops at weaker edges
    iterations  T, 1 or more; 3 in the paper

    Raises:
        InputError: for settings outside these, and images or maps of other shapes.

    Time and memory are linear in pixels. Weights take 16 bytes per pixel and iteration, 48 MB per megapixel with three:
    see `Guided`. Systems are factorised in float64 and solved in float32, on the CPU.
    """

    reach: float = 0.7
    contrast: float = 0.25
    iterations: int = 3

    def __post_init__(self) -> None:
        for name in ("reach", "contrast"):
            if not is_positive(getattr(self, name)):
                raise InputError(f"{name} is {getattr(self, name)!r}, expected a number above 0")
        if not is_count(self.iterations, 1):
            raise InputError(f"iterations is {self.iterations!r}, expected a whole number, 1 or more")

    def weights(self, image: Tensor) -> FgsWeights:
        """Return the factorised systems of an image `(3, y, x)`, floats in [0, 1] say."""
        check_channels(image)
        pixels = image.detach().to("cpu", torch.float64).numpy()
        right, down = (np.linalg.norm(np.diff(pixels, axis=axis), axis=0) for axis in (2, 1))
        deviation = np.sqrt((np.sum(right**2) + np.sum(down**2)) / max(1, right.size + down.size))
        sigma = max(self.contrast * deviation, np.finfo(np.float64).tiny)
        # A weight of 0 at the end of a row parts it from the next.
        joined = [np.pad(np.exp(-steps / sigma), ((0, 0), (0, 1))).ravel() for steps in (right, down.T)]
        size = Size(*image.shape[-2:])
        strength = 1.5 * (self.reach * max(size)) ** 2 / (4**self.iterations - 1)
        times = self.iterations if size != (1, 1) else 0  # a single pixel has no neighbours
        return FgsWeights(
            size,
            tuple(
                _factors(strength * 4 ** (self.iterations - t) * weights)
                for t in range(1, times + 1)
                for weights in joined
            ),
        )

    def __call__(self, weights: FgsWeights, heatmap: Tensor) -> Tensor:
        """Refine a map `(y, x)`: the same shape, in float32 at least, computed in float32.

        `weights` of an image of the map's size, from `weights`.
        """
        if heatmap.ndim != 2:
            raise InputError(f"heatmap is {tuple(heatmap.shape)}, expected (y, x)")
        check_size(heatmap, tuple(weights.size))
        values = heatmap.detach().to("cpu", torch.float32).numpy()
        for index, (diagonal, below) in enumerate(weights.systems):
            lines = np.array(values.T if index % 2 else values, order="C")
            solved, _ = _solve(diagonal, below, lines.ravel(), overwrite_b=True)
            values = solved.reshape(lines.shape).T if index % 2 else solved.reshape(lines.shape)
        refined = torch.from_numpy(np.ascontiguousarray(values))
        return refined.to(heatmap.device, torch.promote_types(heatmap.dtype, torch.float32))


def _factors(weights: np.ndarray) -> _Factors:
    """Factorise the system of neighbours joined with `weights` `(n,)`, the last of them 0."""
    diagonal = 1 + weights
    diagonal[1:] += weights[:-1]
    diagonal, below, info = _factorise(diagonal, -weights[:-1])
    assert info == 0, "the matrix is diagonally dominant"
    return _Factors(diagonal.astype(np.float32), below.astype(np.float32))
