"""Around a run: estimates before it, and signals that end it in order."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from threading import Event
from typing import Any, NoReturn

from open_gem.label.done import WHOLE, HashedIdSet, Shard, Tally
from open_gem.label.labeling import Labeling
from open_gem.label.local import label, pending
from open_gem.label.parts import encode, encode_kept
from open_gem.label.sources import Source

# Before a run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """An estimate of a run: the number of images, and, extrapolated from `sampled` images, its duration and size.

    seconds  for all remaining images; None if there are none
    size     bytes of their rows
    """

    tally: Tally
    sampled: int
    seconds: float | None
    size: float | None


def estimate(
    labeling: Labeling,
    source: Source,
    done: HashedIdSet,
    *,
    shard: Shard = WHOLE,
    limit: int | None = None,
    sample: int = 32,
    **settings: Any,
) -> Estimate:
    """List all images and label the first that are left; nothing is written. `settings` as of `local.label`."""
    tally = Tally()
    items = pending(source.items(tally.passed_over), done, shard, tally, limit)
    first = list(islice(items, sample))
    left = len(first) + sum(1 for _ in items)
    if not first:
        return Estimate(tally, 0, None, None)
    next(label(labeling, first[:1], **settings))  # the first time is slow: memory, caches, embeddings of prompts
    start = time.perf_counter()
    rows = list(label(labeling, first, **settings))
    seconds = (time.perf_counter() - start) / len(rows)
    size = len(encode(rows)) + len(encode_kept(rows))
    return Estimate(tally, len(rows), seconds * left, size / len(rows) * left)


# Signals --------------------------------------------------------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class Stop:
    """Set by the first signal; `signal` is its number."""

    event: Event = field(default_factory=Event)
    signal: int | None = None


@contextmanager
def stopping(say: Callable[[str], None]) -> Iterator[Stop]:
    """Shut a run down cleanly on Ctrl-C, SIGTERM and SIGHUP; a second signal raises KeyboardInterrupt.

    Signals that the process ignores (nohup) stay ignored.
    """
    stop, before = Stop(), {}

    def ask(number: int, frame: Any) -> None:
        if stop.event.is_set():
            for asked, handler in before.items():
                signal.signal(asked, handler)
            raise KeyboardInterrupt
        stop.signal = number
        stop.event.set()
        try:
            say(f"{signal.Signals(number).name}: writing finished rows; a second signal ends it at once")
        except OSError:  # the terminal is closed: nobody can read the rest
            _be_quiet()

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _be_quiet() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())


def leave(number: int) -> NoReturn:
    """End the process at once, as after a second signal, even if threads of other libraries still wait.

    Call it when everything is written: nothing else of the process is cleaned up.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(128 + number)
