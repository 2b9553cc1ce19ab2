"""A guide for tests: another model's opinion of an image that is a plain function of its colours."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from open_gem.types import Grid, Size


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Colours:
    """Its patches, of `patch` pixels, are random projections of their mean colours."""

    patch: int

    def grid_for(self, size: Size) -> Grid:
        return Grid(size.height // self.patch, size.width // self.patch)

    def tokens(self, pixels: Tensor) -> Tensor:
        return avg_pool2d(pixels, self.patch).flatten(2).mT @ random(3, 7)

    def projections(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.tokens(pixels)
        return tokens * 2, tokens.roll(1, -1), tokens @ random(7, 5)
