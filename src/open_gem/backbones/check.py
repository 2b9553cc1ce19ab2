"""Is a tower read exactly? Its tokens and pooled embedding against the library's own forward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from open_gem.backbones._base import Tower
from open_gem.pathway import PATHWAYS, Block, run
from open_gem.types import Grid, Size


class Difference(NamedTuple):
    """How far one way of running the host is from the library's forward on pictures of `size`.

    `exact`: through the library's own modules, else through fused kernels. `tokens` after the last block and `pooled`:
    largest absolute difference, as a share of the library's largest value.
    """

    size: Size
    exact: bool
    tokens: float
    pooled: float


class _Bare:
    """A tower whose tokens stay as the last block leaves them: what is compared, through the method's own loop."""

    def __init__(self, tower: Tower):
        self.tower, self.layers, self.prefix = tower, tower.layers, tower.prefix

    def embed(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        return self.tower.embed(pixels)

    def blocks(self, grid: Grid) -> Sequence[Block]:
        return self.tower.blocks(grid)

    def project(self, tokens: Tensor) -> Tensor:
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        return self.tower.pool(tokens)


def sizes_of(tower: Tower) -> tuple[Size, Size]:
    """What is checked: the size the tower was trained at, and one of another shape, not square."""
    (rows, cols), (height, width) = tower.patch, tower.trained
    return Size(height, width), Size(height + rows, max(width // 2 // cols, 1) * cols)


@torch.no_grad()
def check(tower: Tower, sizes: Sequence[Size] | None = None, count: int = 2) -> list[Difference]:
    """The differences on `count` random pictures of each size (by default `sizes_of` the tower), exact and fused."""
    found = []
    for size in sizes_of(tower) if sizes is None else sizes:
        pixels = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(tower.stem.device, tower.stem.dtype)
        tokens, pooled = tower.library_forward(pixels)
        for exact in (True, False):
            ours = run(_Bare(tower), pixels, {"host": PATHWAYS["clip"]}, pooled=True, exact=exact)["host"]
            assert ours.pooled is not None
            found.append(Difference(size, exact, _share(ours.tokens, tokens), _share(ours.pooled, pooled)))
    return found


def _share(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
