"""Turns, operations and ratios."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_gem.bench.cases import CEILING, PLAIN, Case, read
from open_gem.bench.subject import Setting, Subject
from open_gem.method.kernels import are_on
from open_gem.method.kernels.attention import load, processor

LARGE = 1e9
"""Operations from which on a product of matrices shows what the machine can do."""

Turn = Callable[[], float]
"""Does the work once and tells how many seconds that took."""


@dataclass(frozen=True)
class Cost:
    """What one case costs.

    seconds       of each turn, for the whole batch
    time_ratio    the median of them, over that of the plain forward pass
    flops         multiplications and additions of matrix products, for the whole batch; None where they are not told
    flops_ratio   the same over that of the plain forward pass
    ceiling       share of the rate, in FLOPs a second, of one large product of matrices; None for small models
    rest, peak    MiB of memory of a process that does nothing else: with the model loaded, and at most; None where they
                  were not asked for
    """

    case: str
    seconds: tuple[float, ...]
    time_ratio: float
    flops: int | None = None
    flops_ratio: float | None = None
    ceiling: float | None = None
    rest: float | None = None
    peak: float | None = None


def count_flops(work: Callable[[], object]) -> int:
    """Operations in matrix products and convolutions, attention included; other work does not count."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not all counted
        work()
    return counter.get_total_flops()


def turn_of(work: Callable[[], object]) -> Turn:
    """Its seconds, when the device has done it too."""

    def turn() -> float:
        start = perf_counter()
        work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return perf_counter() - start

    return turn


def interleave(turns: Mapping[str, Turn], repeats: int) -> dict[str, tuple[float, ...]]:
    """Seconds of each repeat of each case, the cases taking turns, after one turn that does not count."""
    rounds = [{name: turn() for name, turn in turns.items()} for _ in range(repeats + 1)]
    return {name: tuple(one[name] for one in rounds[1:]) for name in turns}


@torch.no_grad()
def measure(
    setting: Setting, cases: Mapping[str, Case], repeats: int = 5, others: Mapping[str, Turn] | None = None
) -> list[Cost]:
    """The cost of each case, and of `others` that are measured elsewhere but take their turns here.

    Operations are counted on one picture; those of the plain forward pass through this package's loop, for some of the
    library's kernels are not counted. Raises what making a case raises.
    """
    subject = Subject(setting)
    turns = {name: turn_of(case.make(subject)) for name, case in cases.items()} | dict(others or {})
    seconds = interleave(turns, repeats)
    one = Subject(replace(setting, batch=1))
    work = {name: case.make(one) for name, case in cases.items() if case.counts}
    if PLAIN in work:
        work[PLAIN] = read("clip", pooled=True)(one)
    flops = {name: count_flops(do) * setting.batch for name, do in work.items()}
    rate = max(flops[CEILING] / min(seconds[CEILING]), 1.0)
    return [_cost(name, times, flops, seconds, rate) for name, times in seconds.items()]


def _cost(
    name: str, times: tuple[float, ...], flops: Mapping[str, int], seconds: Mapping[str, tuple[float, ...]], rate: float
) -> Cost:
    ratio = median(times) / median(seconds[PLAIN])
    if name not in flops:
        return Cost(name, times, ratio)
    share = None if flops[CEILING] < LARGE else flops[name] / median(times) / rate
    return Cost(name, times, ratio, flops[name], flops[name] / flops[PLAIN], share)


def machine() -> str:
    """This machine and what runs on it, in words."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    library = load().reason if are_on() else "off"
    return (
        f"{processor('model name') or platform.machine()}, {torch.get_num_threads()} threads{gpu}; "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}; own kernels: {library}"
    )
