"""What dense features cost, beside the plain forward pass of the same model in the same run.

Compute does not depend on the values of weights, so random ones do. Times are of one machine at one moment: cases take
turns, so that what else the machine does falls on all of them alike, and ratios of medians are what to read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_gem.backbones import Tower
from open_gem.backbones.check import pictures
from open_gem.methods import PATHWAYS, Pathway
from open_gem.pathway import run
from open_gem.types import Size

PLAIN = "plain forward"
TOGETHER = "all together"


@dataclass(frozen=True)
class Cost:
    """What one case costs: `flops` multiply-adds count two; `seconds` of each repeat; and both beside the plain forward
    pass, `flops_ratio` and `time_ratio` (of medians)."""

    case: str
    flops: int
    seconds: tuple[float, ...]
    flops_ratio: float
    time_ratio: float


def count_flops(work: Callable[[], object]) -> int:
    """Operations in matrix products and convolutions, attention included; other work does not count."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not all counted
        work()
    return counter.get_total_flops()


def interleave(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, ...]]:
    """Seconds of each repeat of each case, the cases taking turns, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, work in cases.items():
            start = perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(perf_counter() - start)
    return {name: tuple(times) for name, times in seconds.items()}


def bench(tower: Tower, pathways: Mapping[str, Pathway], size: Size, count: int = 1, repeats: int = 5) -> list[Cost]:
    """The cost of each pathway by itself, and of all together, on `count` random pictures of `size` pixels.

    The plain forward pass is the library's own, to the pooled embedding, in seconds; in FLOPs, the same through this
    package's loop, as some of the library's kernels are not counted.
    """
    pixels = pictures(size, count).to(tower.stem.device, tower.stem.dtype)
    read = {name: partial(run, tower, pixels, {name: pathway}) for name, pathway in pathways.items()}
    read |= {TOGETHER: partial(run, tower, pixels, pathways)} if len(pathways) > 1 else {}
    with torch.no_grad():
        seconds = interleave({PLAIN: lambda: tower.library_forward(pixels), **read}, repeats)
        plain = partial(run, tower, pixels, {"clip": PATHWAYS["clip"]}, pooled=True)
        flops = {name: count_flops(work) for name, work in {PLAIN: plain, **read}.items()}
    return [
        Cost(name, flops[name], times, flops[name] / flops[PLAIN], median(times) / median(seconds[PLAIN]))
        for name, times in seconds.items()
    ]
