"""Watches sources that grow: labels new files repeatedly, once they are no longer being written.

A file is labelled once its size and time of change were the same at the previous look, and the last change is some
seconds ago; at the first look only the seconds count, since most existing files are complete. An image with an error is
retried when its file has changed since. Labelled images are not looked at again.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from open_gem.label.done import HashedIdSet, Tally, done_in
from open_gem.label.parts import Parts, errors_in
from open_gem.label.paths import PassedOver
from open_gem.label.reading import Item, local_file
from open_gem.label.sources import Source

SETTLE = 2.0  # seconds
NAP = 0.2  # seconds between checks of the stop event
WRITTEN = 120.0  # seconds before a part was written that its images may have been read

State = tuple[int, float]  # bytes, and when they changed
MISSING: State = (-1, 0.0)


def watch(
    run: Callable[[Source, HashedIdSet], Tally],
    parts: Parts,
    source: Source,
    every: float,
    stop: Event,
    *,
    settle: float = SETTLE,
    retry: bool = True,
) -> Iterator[Tally]:
    """Run repeatedly, with new files each time, until `stop` is set; `every` seconds between.

    retry  retry errors whose files have changed; not if other processes write parts too
    """
    done, files, errors = done_in(parts), SettledFiles(settle), Errors(parts, settle)
    while True:
        start = time.time()
        if retry:
            errors.learn()
            for id in errors.forget_changed():
                done.discard(id)
        yield run(files.settled(source, done), done)
        if retry:
            errors.learn(start)
        if _idle(every, stop):
            return


def _idle(seconds: float, stop: Event) -> bool:
    """Wait some seconds, or until `stop` is set; return True if it is set.

    It naps, since a signal just before a wait wakes nobody; and not in `stop.wait`, which briefly holds the lock that
    `stop.set` needs: a signal handler that calls it then, in the same thread, would block for ever.
    """
    end = time.monotonic() + seconds
    while not stop.is_set() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, NAP))
    return stop.is_set()


@dataclass
class SettledFiles:
    """Files that were still being written at the last look: they are listed once they have settled."""

    settle: float
    held: dict[str, State] | None = None

    def settled(self, source: Source, done: HashedIdSet) -> Source:
        """Return the source without files that may still be being written: each listing is one look."""

        def listing(passed_over: PassedOver) -> Iterator[Item]:
            before, self.held = self.held, {}
            path, takes = None, True
            for item in source.items(passed_over):
                if item.id not in done and (file := local_file(item.container or item.source)) is not None:
                    if file != path:  # all images of a tar together
                        path, takes = file, self._takes(file, before)
                    if not takes:
                        continue
                yield item

        return replace(source, listing=listing)

    def _takes(self, file: str, before: dict[str, State] | None) -> bool:
        state = _state(file)
        has_settled = (before is None or before.get(file) == state) and _age(state) >= self.settle
        if not has_settled and self.held is not None:
            self.held[file] = state
        return has_settled


@dataclass
class Errors:
    """Images that could not be labelled, and how their files were then."""

    parts: Parts
    settle: float
    states: dict[str, tuple[str, State | None]] = field(default_factory=dict)  # None: it may have changed while read
    known: set[str] = field(default_factory=set)

    def learn(self, start: float | None = None) -> None:
        """Read new parts, whose images were read after `start`, or by the time of each part."""
        for path in self.parts.paths():
            if path.name in self.known:
                continue
            self.known.add(path.name)
            since = path.stat().st_mtime - WRITTEN if start is None else start
            for row in errors_in(path):
                if (file := local_file(row["source"])) is not None:
                    state = _state(file)
                    self.states[row["id"]] = file, None if state[1] > since - self.settle else state

    def forget_changed(self) -> list[str]:
        """Remove errors from the parts if their files have changed; return their ids."""
        states = {id: (_state(file), before) for id, (file, before) in self.states.items()}
        changed = {id for id, (now, before) in states.items() if now != before and _age(now) >= self.settle}
        for id in changed:
            del self.states[id]
        return self.parts.forget_errors(lambda row: row["id"] in changed) if changed else []


def _state(file: str) -> State:
    try:
        status = Path(file).stat()
    except (OSError, ValueError):
        return MISSING
    return status.st_size, status.st_mtime


def _age(state: State) -> float:
    """Return the seconds since the last change."""
    return abs(time.time() - state[1])  # clocks differ: a change in the future waits no longer
