"""Time and peak memory of each step: `python benchmarks/steps.py`, see docs/reference/methods.md.

Features are random, 512 a patch, and the last block's values 768; so are q and k of CorrCLIP's guide, for 40 regions.
CASS has 100 prompts; LPOSS+ an image of 448 × 448 pixels and a single map. The process's peak so far is printed.
"""

import resource
from collections.abc import Callable
from time import perf_counter

import torch

from open_gem.method.attention import Heads
from open_gem.method.guided import Correlated
from open_gem.method.steps import STEPS, VALUES, StepContext
from open_gem.method.table import BlockContext
from open_gem.method.text_steps import Cass
from open_gem.refine.lposs import LpossPlus
from open_gem.types import Grid


class Guide:
    def __init__(self, grid: Grid):
        self.grid, self.seen = grid, torch.randn(1, grid.patches, 768)

    def grid_for(self, size: object) -> Grid:
        return self.grid

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.seen

    def projections(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.seen, self.seen, self.seen


def measured(name: str, patches: int, work: Callable[..., object], *arguments: object) -> None:
    start = perf_counter()
    work(*arguments)
    seconds = perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{patches:6} patches  {name:9} {seconds:6.2f} s  {peak:5.0f} MiB")


for side in (28, 32, 100):
    grid, count = Grid(side, side), side**2
    features, values = torch.randn(count, 512), torch.randn(count, 768) + 2
    for name, make in STEPS.items():
        measured(name, count, make(), features, StepContext(grid, {VALUES: values}))
    text, cosines = torch.randn(100, 512), torch.randn(100)
    measured("cass", count, Cass().adapt, text, features, cosines)
    pixels, regions = torch.zeros(1, 3, 16 * side, 16 * side), torch.randint(1, 41, (1, 16 * side, 16 * side))
    context = BlockContext(values, pixels, grid, 0, 12, {}, regions=regions)
    heads = Heads(*[values.unflatten(-1, (12, 64)).transpose(0, 1)[None]] * 3)
    measured("corrclip", count, Correlated(Guide(grid)), heads, context)

refine = LpossPlus()
pairs = refine.weights(torch.rand(3, 448, 448))
measured("lposs+", 0, refine, pairs, torch.rand(448, 448))
