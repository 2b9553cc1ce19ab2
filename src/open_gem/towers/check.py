"""Checks that a tower is read exactly: its tokens and pooled embedding against the library's own forward."""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from open_gem.method.run import run
from open_gem.method.table import METHODS
from open_gem.method.tower import Block, VisionTower
from open_gem.towers.base import ModuleTower
from open_gem.types import Grid, Size

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Tolerances of fused kernels against the library's own, as `Difference` measures."""


class Difference(NamedTuple):
    """The distance of one way of running the host from the library's forward, on images of `size`.

    `exact`: through the library's own modules, else through fused kernels. `tokens` after the last block and `pooled`:
    largest absolute difference, as a share of the library's largest value.
    """

    size: Size
    exact: bool
    tokens: float
    pooled: float

    def fits(self, dtype: torch.dtype) -> bool:
        """Return True if it is 0 through modules, or within `TOLERANCES` through fused kernels."""
        return max(self.tokens, self.pooled) <= (0 if self.exact else TOLERANCES[dtype])


class _Bare(VisionTower):
    """A tower whose tokens stay as the last block leaves them: what is compared, through the method's own loop."""

    def __init__(self, tower: ModuleTower):
        self.tower, self.patch, self.layers, self.prefix = tower, tower.patch, tower.layers, tower.prefix

    def embed(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        return self.tower.embed(pixels)

    def blocks(self, grid: Grid) -> Sequence[Block]:
        return self.tower.blocks(grid)

    def project(self, tokens: Tensor) -> Tensor:
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        return self.tower.pool(tokens)


def sizes_of(tower: ModuleTower) -> tuple[Size, Size]:
    """Return the sizes that are checked: the size the tower was trained at, and one that is not square."""
    (rows, cols), (height, width) = tower.patch, tower.trained
    return Size(height, width), Size(height + rows, max(width // 2 // cols, 1) * cols)


def random_images(size: Size, count: int = 2) -> Tensor:
    """Return random pixels `(count, 3, y, x)`, the same each time."""
    noise = torch.Generator("cpu").manual_seed(0)
    return torch.randn(count, 3, *size, dtype=torch.float32, device="cpu", generator=noise)


@torch.no_grad()
def check(tower: ModuleTower, sizes: Sequence[Size] | None = None, count: int = 2) -> list[Difference]:
    """Return the differences on `count` random images of each size (by default `sizes_of` the tower), exact and
    fused."""
    differences = []
    for size in sizes_of(tower) if sizes is None else sizes:
        pixels = random_images(size, count).to(tower.patch_weight.device, tower.patch_weight.dtype)
        tokens, pooled = tower.library_forward(pixels)
        for exact in (True, False):
            ours = run(_Bare(tower), pixels, {"host": METHODS["clip"]}, pooled=True, exact=exact)["host"]
            assert ours.pooled is not None
            differences.append(Difference(size, exact, _share(ours.tokens, tokens), _share(ours.pooled, pooled)))
    return differences


class Rounding(NamedTuple):
    """The cost of a type for one method: 1 − cosine of its features with those in float32, `mean` and `worst` over
    patches, and of the `pooled` embedding (mean over images)."""

    method: str
    mean: float
    worst: float
    pooled: float


def rounding(tower: ModuleTower, dtype: torch.dtype, pixels: Tensor) -> list[Rounding]:
    """Return what computing in `dtype`, weights included, costs every method on `pixels` `(b, 3, y, x)`."""
    methods = {name: method.fitted(tower.layers) for name, method in METHODS.items()}
    cast = type(tower)(deepcopy(tower.module).to(dtype))
    exact, rounded = run(tower, pixels, methods, pooled=True), run(cast, pixels, methods, pooled=True)
    costs = []
    for name in methods:
        patches = _away(rounded[name].patches, exact[name].patches)
        pooled = _away(rounded[name].pooled, exact[name].pooled)
        costs.append(Rounding(name, patches.mean().item(), patches.max().item(), pooled.mean().item()))
    return costs


def _away(ours: Tensor | None, theirs: Tensor | None) -> Tensor:
    assert ours is not None and theirs is not None
    return 1 - cosine_similarity(ours.double(), theirs.double(), dim=-1)


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Add noise to every constant parameter (zero biases, unit norms, tiny layer scales): otherwise a check could not
    tell whether it is read."""
    noise = torch.Generator("cpu").manual_seed(0)
    for parameter in module.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float32, device="cpu", generator=noise)


def _share(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
