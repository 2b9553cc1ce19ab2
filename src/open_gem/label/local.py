"""The engine of one machine: threads that read and decode -> the model -> threads that make objects -> parts.

    with writing(folder):
        tally = run(Parts.claim(folder, labeling.manifest(source)), labeling, source)

Every queue is bounded, so memory does not grow with the number of images. On a CPU the model sees two batches at a
time, each with half of torch's threads: what one does in a single thread, the other fills. A read that hangs keeps one
thread and nobody else: images that are ready go before it, objects are found by threads of their own, and all are
daemons, which the end of a process does not wait for. Several graphics cards, or machines, are one process each and
share the images by hash: `torchrun --nproc-per-node 8 …`.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
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
from open_gem.label.done import WHOLE, HashedIdSet, Shard, Tally, default_workers, done_in
from open_gem.label.labeling import Labeling, LocatedImage, PreparedImage, failed
from open_gem.label.parts import LabelRow, Parts
from open_gem.label.sources import Item, Source
from open_gem.locate import by_shape

PASSES = 2  # passes of the model at a time, on a CPU if torch has a thread for each
AHEAD = 4  # batches that are read ahead; images of one shape are grouped among them
PART_ROWS, PART_BYTES, PART_SECONDS = 1000, 2**26, 60  # a part is written when it has one of these
PATIENCE = 1.0  # seconds for which order is kept: then faster images overtake a slow one
LOOK = 0.1  # seconds between checks of the stop event while nothing comes
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # messages of torch's devices

A = TypeVar("A")
B = TypeVar("B")


def run(
    parts: Parts,
    labeling: Labeling,
    source: Source,
    *,
    shard: Shard = WHOLE,
    batch_size: int = 8,
    workers: int | None = None,
    stop: Event | None = None,
    done: HashedIdSet | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda images: None,
    **limits: Any,
) -> Tally:
    """Label the images of `source` that are this shard's and in no part yet; `limits` as of `PartWriter`.

    batch_size  images of one shape that the model sees at a time; halved for the rest of the run if memory runs out
    workers     threads that read, decode and make objects, see `default_workers`
    stop        set it to end the run: the model's results are written, and no further work starts
    done        ids that are labelled already; those of this run are added. By default those of all parts
    limit       number of new images after which the run ends
    progress    called with the number of images that are done

    If this ends early, the images labelled until then are written. Raises OutputError if that fails.
    """
    stop, done = stop or Event(), done_in(parts) if done is None else done
    tally = Tally()
    items = pending(source.items(tally.passed_over), done, shard, tally, limit)
    with PartWriter(parts, shard, **limits) as writer:
        for row in label(labeling, items, batch_size=batch_size, workers=workers, stop=stop):
            writer.add(row)
            done.add(row["id"])
            tally.count(row)
            progress(1)
    return tally


def pending(
    items: Iterable[Item], done: HashedIdSet, shard: Shard, tally: Tally, limit: int | None = None
) -> Iterator[Item]:
    """Yield the items that are this shard's and new, each once, up to `limit` of them; count them as they pass."""
    left = limit
    for item in items:
        if not shard.has(item.id):
            continue
        tally.listed += 1
        if not tally.seen.add(item.id):
            tally.duplicates += 1
        elif item.id in done:
            tally.done += 1
        elif left == 0:
            tally.listed, tally.is_limited = tally.listed - 1, True
            return
        else:
            left = None if left is None else left - 1
            yield item
    tally.is_whole = True


# The pipeline ---------------------------------------------------------------------------------------------------------


def label(
    labeling: Labeling,
    items: Iterable[Item],
    *,
    batch_size: int = 8,
    workers: int | None = None,
    stop: Event | None = None,
) -> Iterator[LabelRow]:
    """Yield a row for each item, in the order in which images of one shape come together.

    Once `stop` is set, pending reads are abandoned, images that wait for others of their shape are left for the next
    run, and the model's results still become rows. Threads that start meanwhile have fewer of torch's threads, until
    this ends or is closed: run one at a time.
    """
    stop, threads, count = stop or Event(), torch.get_num_threads(), workers or default_workers()
    limits = BatchLimits(batch_size, min(PASSES, threads) if labeling.localizer.device.type == "cpu" else 1)
    # One that used more of torch's threads than there are processors would wait for the others at every map.
    readers, finders = (Threads(count, partial(_use_threads, max(1, threads // count))) for _ in range(2))
    models = Threads(limits.passes, partial(_use_threads, -(-threads // limits.passes)))
    pools, locate = (readers, models, finders), partial(_locate, labeling, limits)
    ahead = AHEAD * batch_size
    try:
        prepared = _ahead(readers, labeling.prepare, _until(stop, items), ahead, OldestOrReady(stop))
        groups = _until(stop, by_shape(prepared, _shape, lambda: limits.size, waiting=ahead))
        # A single pass is faster in this thread: no hand-over.
        batches = map(locate, groups) if limits.passes == 1 else _ahead(models, locate, groups, limits.passes)
        located = chain.from_iterable(batches)
        yield from _ahead(finders, partial(_row, labeling), located, 2 * batch_size)
    finally:
        end = monotonic() + PATIENCE
        for pool in pools:
            pool.close()
        for pool in pools:
            pool.wait(end)
        torch.set_num_threads(threads)  # new threads start with this number, too


def _use_threads(count: int) -> None:
    """Give this thread so many of torch's threads."""
    torch.get_num_threads()  # the first use sets it to what another thread asked for last
    torch.set_num_threads(count)


def _row(labeling: Labeling, image: LocatedImage | LabelRow) -> LabelRow:
    return image if isinstance(image, dict) else labeling.row(image)


class Threads:
    """Daemon threads that work through their queue; each calls `begin` first."""

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
                except BaseException as error:  # the waiting thread handles it
                    future.set_exception(error)
            del job, future, work, item  # an image must not live on while the thread waits

    def close(self) -> None:
        """Start no further work."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)

    def wait(self, end: float) -> None:
        """Wait until threads have finished their work, or until a deadline."""
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
    """Yield the results of `work` with up to `limit` items pending: in order, or as `take` says; None ends it."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(threads.submit(work, item))
        if len(waiting) >= limit:
            if (future := take(waiting)) is None:
                return
            yield future.result()
    while waiting and (future := take(waiting)) is not None:
        yield future.result()


class OldestOrReady:
    """Takes the oldest item, or any that is ready once the oldest keeps others waiting; nothing once `stop` is set."""

    def __init__(self, stop: Event):
        self._stop, self._late = stop, set[Any]()

    def __call__(self, waiting: deque[Any]) -> Any:
        start = monotonic()
        while not self._stop.is_set():
            oldest = next((future for future in waiting if future not in self._late), None)
            wanted = self._late if oldest is None else {oldest, *self._late}
            if done := wait(wanted, LOOK, FIRST_COMPLETED).done:
                ready = next(future for future in waiting if future in done)
                waiting.remove(ready)
                self._late.discard(ready)
                return ready
            if oldest is not None and monotonic() - start > PATIENCE:
                self._late.add(oldest)
                start = monotonic()
        return None


class BatchLimits:
    """The known limits of memory: `passes` of the model at a time, each with `size` images."""

    def __init__(self, size: int, passes: int):
        self.size, self.passes = size, passes
        self.turn, self._lock = Semaphore(passes), Lock()

    def shrink_after_oom(self, size: int, passes: int) -> int:
        """Return how many images to try next after `size` images in one of `passes` passes did not fit: as many, in a
        single pass from now on; half of them if it was the only pass; 0 after a single image."""
        with self._lock:
            if passes > 1:
                if self.passes > 1:
                    self.passes = 1
                    self.turn.acquire()  # never released: the next pass waits until the other one ends
                return size
            self.size = max(1, min(self.size, size // 2))
            return size // 2


def _shape(image: PreparedImage | LabelRow) -> Hashable:
    return None if isinstance(image, dict) else image.prepared.shape


def _locate(
    labeling: Labeling, limits: BatchLimits, group: list[PreparedImage | LabelRow]
) -> list[LocatedImage | LabelRow]:
    """Run the model on a group of images; if memory runs out, on fewer at a time from then on. An image for which the
    model's output is not finite becomes a row with the error; rows stay as they are."""
    located: list[LocatedImage | LabelRow] = [image for image in group if isinstance(image, dict)]
    prepared = [image for image in group if not isinstance(image, dict)]
    todo = [prepared] if prepared else []
    while todo:
        batch = todo.pop()
        try:
            with limits.turn:
                passes, results = limits.passes, _located_unless_oom(labeling, batch)
        except NotFiniteError as error:  # perhaps of only a few images
            if len(batch) > 1:
                todo += [[image] for image in reversed(batch)]
            else:
                located.append(failed(batch[0].item, error, batch[0].seconds))
            continue
        if results is not None:
            located += results
        elif size := limits.shrink_after_oom(len(batch), passes):
            todo += [half for half in (batch[size:], batch[:size]) if half]
        else:
            located.append(failed(batch[0].item, MemoryError(), batch[0].seconds))
    return located


def _located_unless_oom(labeling: Labeling, group: list[PreparedImage]) -> list[LocatedImage] | None:
    """Run the model on a group; return None if memory ran out, with the traceback, which keeps tensors, released."""
    try:
        return labeling.locate(group)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the machine or a device ran out of memory."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


# Parts ----------------------------------------------------------------------------------------------------------------


def stamp() -> str:
    """Return the prefix of names of parts: the time, and a random suffix that no other run has."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"


@dataclass
class PartWriter:
    """Collects rows and writes a part when there are `images_per_part` of them, `max_bytes`, or `max_seconds` have
    passed since the last.

    A thread writes while the next rows come; at most one part waits. On leaving, also after an error, the rest is
    written. Raises OutputError if a part cannot be written.
    """

    parts: Parts
    shard: Shard = WHOLE
    images_per_part: int = PART_ROWS
    max_bytes: int = PART_BYTES
    max_seconds: float = PART_SECONDS

    def __enter__(self) -> "PartWriter":
        self._stamp, self._number = stamp(), 0
        self._rows: list[LabelRow] = []
        self._bytes, self._since = 0, monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="parts")
        self._writing: Future[Any] | None = None
        return self

    def add(self, row: LabelRow) -> None:
        self._rows.append(row)
        self._bytes += size_of(row)
        full = len(self._rows) >= self.images_per_part or self._bytes >= self.max_bytes
        if full or monotonic() - self._since >= self.max_seconds:
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


def size_of(row: LabelRow) -> int:
    """Estimate how many bytes a row takes in memory."""
    maps = len(row["labelmap"] or b"") + len((row.get("kept") or {}).get("values", b""))
    return 500 + maps + sum(500 + len((stored["rle"] or {}).get("counts", "")) for stored in row["objects"])
