"""Times, operations and ratios."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_gem.bench.cases import CEILING, PLAIN, Case, methods_pass
from open_gem.bench.subject import Setting, Subject
from open_gem.method.kernels import are_on
from open_gem.method.kernels.attention import load, processor

LARGE = 1e9
"""Operations above which a matrix product shows what the machine can do."""

Turn = Callable[[], float]
"""A function that does the work once and returns its seconds."""


@dataclass(frozen=True)
class Cost:
    """The cost of one case.

    seconds      of each turn, for the whole batch
    time_ratio   their median over that of the plain forward pass
    flops        multiplications and additions of matrix products, for the whole batch; None if they are not counted
    flops_ratio  the same over that of the plain forward pass
    ceiling      the rate, in FLOPs a second, as a share of that of one large matrix product; None for small models
    rest         MiB of memory of a process that does nothing else, with the model loaded; None if not measured
    peak         the most MiB of that process; None if not measured
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
    """Count operations in matrix products and convolutions, including attention; no other work."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not all counted
        work()
    return counter.get_total_flops()


def turn_of(work: Callable[[], object]) -> Turn:
    """Return the work as a turn, which waits for the device to finish."""

    def turn() -> float:
        start = perf_counter()
        work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return perf_counter() - start

    return turn


def interleave(turns: Mapping[str, Turn], repeats: int) -> dict[str, tuple[float, ...]]:
    """Return the seconds of each repeat of each case. Cases take turns; the first turn of each is a warm-up and
    dropped."""
    rounds = [{name: turn() for name, turn in turns.items()} for _ in range(repeats + 1)]
    return {name: tuple(seconds[name] for seconds in rounds[1:]) for name in turns}


@torch.no_grad()
def measure(
    setting: Setting, cases: Mapping[str, Case], repeats: int = 5, others: Mapping[str, Turn] | None = None
) -> list[Cost]:
    """Measure the cost of each case, and of `others`: turns that are made elsewhere.

    Operations are counted on one image; those of the plain forward pass in this package's loop, since some of the
    library's kernels cannot be counted. Raises what making a case raises.
    """
    subject = Subject(setting)
    turns = {name: turn_of(case.make(subject)) for name, case in cases.items()} | dict(others or {})
    seconds = interleave(turns, repeats)
    single = Subject(replace(setting, batch=1))
    works = {name: case.make(single) for name, case in cases.items() if case.counts}
    if PLAIN in works:
        works[PLAIN] = methods_pass("clip", pooled=True)(single)
    flops = {name: count_flops(work) * setting.batch for name, work in works.items()}
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
    """Return the machine and the versions of its software, for people."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    library = load().reason if are_on() else "off"
    return (
        f"{processor('model name') or platform.machine()}, {torch.get_num_threads()} threads{gpu}; "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}; own kernels: {library}"
    )
