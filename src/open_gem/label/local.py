"""The engine of one machine: threads that read and decode -> the model -> threads that find objects -> parts.

    with writing(folder):
        tally = run(Parts.claim(folder, labeling.manifest(source)), labeling, source)

Every queue is bounded, so memory does not grow with the number of images. On a CPU the model sees two batches at a
time, each with half of torch's threads: what one does in a single thread, the other fills. A read that hangs keeps one
thread and nobody else: images that are ready go before it, objects are found by threads of their own, and all are
daemons, which the end of a process does not wait for. Several graphics cards, or machines, are one process each and
share the images by hash: `torchrun --nproc-per-node 8 …`.
"""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from queue import SimpleQueue
from threading import Event, Lock, Semaphore, Thread
from time import monotonic
from typing import Any, TypeVar
from uuid import uuid4

import torch

from open_gem.errors import NotFiniteError
from open_gem.label.done import WHOLE, Ids, Shard, Tally, done_in
from open_gem.label.labeling import Found, Labeling, Ready, failed
from open_gem.label.parts import Parts, Row
from open_gem.label.sources import Item, Source

PASSES = 2  # of the model at a time, on a CPU and where torch has a thread for each
AHEAD = 4  # batches that are read ahead, and among which images of one shape are looked for
PART_ROWS, PART_BYTES, PART_SECONDS = 1000, 2**26, 60  # a part is written when it has one of these
PATIENCE = 1.0  # seconds that images are kept in order for: others then go before one that takes longer
LOOK = 0.1  # seconds between looks whether to stop, while nothing comes
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as devices of torch say it

A = TypeVar("A")
B = TypeVar("B")


def run(
    parts: Parts,
    labeling: Labeling,
    source: Source,
    *,
    shard: Shard = WHOLE,
    batch: int = 8,
    workers: int | None = None,
    stop: Event | None = None,
    done: Ids | None = None,
    progress: Callable[[int], None] = lambda images: None,
    **limits: Any,
) -> Tally:
    """Label what of `source` is this shard's and in no part yet; `limits` as of `PartWriter`.

    batch     images of one shape that the model sees at a time; where memory ends, halved for the rest of the run
    workers   threads that read, decode and find objects; by default see `default_workers`
    stop      set by whoever wants the run to end: what the model has seen is written, and no more is begun
    done      ids that are labelled already; those of this run are added. By default what all parts have
    progress  hears how many images are done

    Whatever ends this early, what was labelled until then is written. Raises OutputError where it cannot be.
    """
    stop, done = stop or Event(), done_in(parts) if done is None else done
    tally = Tally()
    items = pending(source.items(tally.left), done, shard, tally)
    with PartWriter(parts, shard, **limits) as writer:
        for row in label(labeling, items, batch=batch, workers=workers, stop=stop):
            writer.add(row)
            done.add(row["id"])
            tally.count(row)
            progress(1)
    return tally


def pending(items: Iterable[Item], done: Ids, shard: Shard, tally: Tally) -> Iterator[Item]:
    """The items that are this shard's, new, and not there twice; counted as they pass."""
    for item in items:
        if not shard.has(item.id):
            continue
        tally.listed += 1
        if not tally.seen.add(item.id):
            tally.twice += 1
        elif item.id in done:
            tally.there += 1
        else:
            yield item
    tally.is_whole = True


# The pipeline ---------------------------------------------------------------------------------------------------------


def label(
    labeling: Labeling, items: Iterable[Item], *, batch: int = 8, workers: int | None = None, stop: Event | None = None
) -> Iterator[Row]:
    """A row for each item, in the order in which images of one shape come together.

    Once `stop` is set, reads under way are not waited for, and what the model has seen still becomes rows. On a CPU
    threads that anyone begins meanwhile have half of torch's threads, until this ends or is closed: one at a time.
    """
    stop, threads, count = stop or Event(), torch.get_num_threads(), workers or default_workers()
    limit = _Limit(batch, min(PASSES, threads) if labeling.localizer.backbone.device.type == "cpu" else 1)
    readers, finders = Threads(count), Threads(count)
    models = Threads(limit.passes, partial(torch.set_num_threads, -(-threads // limit.passes)))
    pools, locate = (readers, models, finders), partial(_locate, labeling, limit)
    try:
        prepared = _ahead(readers, labeling.prepare, _until(stop, items), AHEAD * batch, _Impatient(stop))
        groups = _by_shape(prepared, limit, stop)
        # A single pass is faster in this thread: none hands over to another.
        found = map(locate, groups) if limit.passes == 1 else _ahead(models, locate, groups, limit.passes)
        located = chain.from_iterable(found)
        rows = _ahead(finders, lambda one: one if isinstance(one, dict) else labeling.row(one), located, 2 * batch)
        yield from rows
    finally:
        end = monotonic() + PATIENCE
        for pool in pools:
            pool.close()
        for pool in pools:
            pool.wait(end)
        torch.set_num_threads(threads)  # it is what the next thread of anyone begins with, too


class Threads:
    """Daemon threads that do what is put before them, `begin` first."""

    def __init__(self, count: int, begin: Callable[[], object] = lambda: None):
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self._begin, self._closed = begin, False
        self._threads = [Thread(target=self._work, name="label", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[A], B], item: A) -> "Future[B]":
        future: Future[B] = Future()
        self._jobs.put((future, work, item))
        return future

    def _work(self) -> None:
        self._begin()
        while (job := self._jobs.get()) is not None:
            future, work, item = job
            if not self._closed:
                try:
                    future.set_result(work(item))
                except BaseException as error:  # whoever waits for it decides
                    future.set_exception(error)
            del job, future, work, item  # an image must not live on while the thread waits

    def close(self) -> None:
        """Begin nothing more."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)

    def wait(self, end: float) -> None:
        """Let threads at work end, until then."""
        for thread in self._threads:
            thread.join(max(0.0, end - monotonic()))


def _until(stop: Event, items: Iterable[A]) -> Iterator[A]:
    for item in items:
        if stop.is_set():
            return
        yield item


def _ahead(
    threads: Threads,
    work: Callable[[A], B],
    items: Iterable[A],
    limit: int,
    take: "Callable[[deque[Future[B]]], Future[B] | None]" = deque.popleft,
) -> Iterator[B]:
    """The results of `work` with up to `limit` items under way: in order, or as `take` says; None ends it."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(threads.submit(work, item))
        if len(waiting) >= limit:
            if (one := take(waiting)) is None:
                return
            yield one.result()
    while waiting and (one := take(waiting)) is not None:
        yield one.result()


class _Impatient:
    """Takes the oldest, but for those that keep others waiting: whichever is done goes before them; nothing once `stop`
    is set."""

    def __init__(self, stop: Event):
        self._stop, self._late = stop, set[Any]()

    def __call__(self, waiting: deque[Any]) -> Any:
        start = monotonic()
        while not self._stop.is_set():
            oldest = next((one for one in waiting if one not in self._late), None)
            wanted = self._late if oldest is None else {oldest, *self._late}
            if done := wait(wanted, LOOK, FIRST_COMPLETED).done:
                one = next(one for one in waiting if one in done)
                waiting.remove(one)
                self._late.discard(one)
                return one
            if oldest is not None and monotonic() - start > PATIENCE:
                self._late.add(oldest)
                start = monotonic()
        return None


class _Limit:
    """What memory is enough for, as far as is known: `passes` of the model at a time, each of `size` images."""

    def __init__(self, size: int, passes: int):
        self.size, self.passes = size, passes
        self.turn, self._lock = Semaphore(passes), Lock()

    def narrow(self, size: int, passes: int) -> int:
        """How many images to try next where so many were too many, with so many passes: as many, alone from now on, or
        half where they were; 0 of one."""
        with self._lock:
            if passes > 1:
                if self.passes > 1:
                    self.passes = 1
                    self.turn.acquire()  # never given back: whoever goes on waits until the other pass is over
                return size
            self.size = max(1, min(self.size, size // 2))
            return size // 2


def _by_shape(prepared: Iterable[Ready | Row], limit: _Limit, stop: Event) -> Iterator[list[Ready | Row]]:
    """Images in groups of one shape: full ones, or where too many wait, the largest; rows go with the next group.

    Once `stop` is set, images that wait are left for the next run.
    """
    groups: dict[Any, list[Ready]] = defaultdict(list)
    rows: list[Row] = []
    waiting = 0
    for one in prepared:
        if stop.is_set():
            break
        if isinstance(one, dict):
            rows.append(one)
            if len(rows) >= AHEAD * limit.size:
                yield [*rows]
                rows.clear()
            continue
        shape = one.item.id if one.pixels is None else one.pixels.shape  # windows of one image are a batch already
        groups[shape].append(one)
        waiting += 1
        if len(groups[shape]) >= limit.size or one.pixels is None or waiting >= AHEAD * limit.size:
            group = groups.pop(max(groups, key=lambda shape: len(groups[shape])))
            waiting -= len(group)
            yield [*rows, *group]
            rows.clear()
    yield [*rows]
    for group in groups.values():
        if stop.is_set():
            return
        yield [*group]


def _locate(labeling: Labeling, limit: _Limit, group: list[Ready | Row]) -> list[Found | Row]:
    """Rows, and what the model says of each image; where memory ends, of fewer at a time from then on. An image that
    the model gives no numbers for is a row with the reason."""
    located: list[Found | Row] = [one for one in group if isinstance(one, dict)]
    ready = [one for one in group if not isinstance(one, dict)]
    left = [ready] if ready else []
    while left:
        some = left.pop()
        try:
            with limit.turn:
                passes, found = limit.passes, _find(labeling, some)
        except NotFiniteError as error:  # of some of them, perhaps
            if len(some) > 1:
                left += [[one] for one in reversed(some)]
            else:
                located.append(failed(some[0].item, error, some[0].seconds))
            continue
        if found is not None:
            located += found
        elif size := limit.narrow(len(some), passes):
            left += [few for few in (some[size:], some[:size]) if few]
        else:
            located.append(failed(some[0].item, MemoryError(), some[0].seconds))
    return located


def _find(labeling: Labeling, group: list[Ready]) -> list[Found] | None:
    """What the model says of a group, None where memory ended; the traceback, which keeps tensors, is gone then."""
    try:
        return labeling.find(group)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ended, of the machine or of a device."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


# Parts ----------------------------------------------------------------------------------------------------------------


def stamp() -> str:
    """What names of parts begin with: the time, and letters that no other run has."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"


@dataclass
class PartWriter:
    """Collects rows and writes a part when there are `rows`, `size` bytes, or `seconds` have passed since the last.

    A thread writes while the next rows come; at most one part waits. On leaving, whatever ended it, the rest is
    written. Raises OutputError where a part cannot be written.
    """

    parts: Parts
    shard: Shard = WHOLE
    rows: int = PART_ROWS
    size: int = PART_BYTES
    seconds: float = PART_SECONDS

    def __enter__(self) -> "PartWriter":
        self._stamp, self._number = stamp(), 0
        self._rows: list[Row] = []
        self._bytes, self._since = 0, monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="parts")
        self._writing: Future[Any] | None = None
        return self

    def add(self, row: Row) -> None:
        self._rows.append(row)
        self._bytes += size_of(row)
        full = len(self._rows) >= self.rows or self._bytes >= self.size
        if full or monotonic() - self._since >= self.seconds:
            self._flush()

    def __exit__(self, *raised: Any) -> None:
        try:
            self._flush()
            self._wait()
        finally:
            self._thread.shutdown()

    def _flush(self) -> None:
        self._wait()
        if self._rows:
            name = f"{self._stamp}-{self.shard.index:03d}-{self._number:06d}"
            self._writing = self._thread.submit(self.parts.write, name, self._rows)
        self._rows, self._bytes, self._since = [], 0, monotonic()
        self._number += 1

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def size_of(row: Row) -> int:
    """About how many bytes a row has in memory."""
    maps = len(row["labelmap"] or b"") + len((row["similarity"] or {}).get("values", b""))
    return 500 + maps + sum(500 + len((one["rle"] or {}).get("counts", "")) for one in row["objects"])


def default_workers() -> int:
    """Threads that are worth having: one a processor that this process may use, but not more than 16."""
    return max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
