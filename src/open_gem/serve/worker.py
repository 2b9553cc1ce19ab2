"""One thread that owns the model: it runs the jobs of all requests, those that can share a pass together."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

Input = TypeVar("Input")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class JobKind(Generic[Input, Result]):
    """A kind of work that the model does with several inputs at once.

    work      inputs of one key → their results, in order
    key       of an input: those with equal ones may be worked on together
    cost      of an input
    max_cost  of a batch; one input alone may cost more
    """

    name: str
    work: Callable[[Sequence[Input]], Sequence[Result]]
    key: Callable[[Input], Any]
    cost: Callable[[Input], int]
    max_cost: int


@dataclass(eq=False)
class _Job:
    kind: JobKind
    input: Any
    future: Future = field(default_factory=Future)

    @property
    def key(self) -> Any:
        return self.kind.name, self.kind.key(self.input)


class Worker:
    """Runs jobs in order, the oldest together with all waiting ones that may share its batch. It never waits to fill a
    batch: the next one fills while one runs.

    `watch(name, inputs)` is called before each batch. A job whose asker has gone is left out. If a batch fails, its
    inputs are tried separately, so that what is wrong with one is no other's trouble.
    """

    def __init__(self, watch: Callable[[str, int], None] = lambda name, inputs: None):
        self._waiting: deque[_Job] = deque()
        self._changed = Condition()
        self._stopping = False
        self._watch = watch
        self.batches = 0  # done so far
        self._thread = Thread(target=self._run, name="open_gem model", daemon=True)
        self._thread.start()

    async def do(self, kind: JobKind[Input, Result], input: Input) -> Result:
        """Run one input and return its result. Cancelling this removes the job from the queue; raises the errors of the
        work."""
        return await asyncio.wrap_future(self.submit(kind, input))

    async def do_all(self, kind: JobKind[Input, Result], inputs: Sequence[Input]) -> list[Result | BaseException]:
        """Run inputs that come together as `do` does; return the result of each, or its error."""
        futures = map(asyncio.wrap_future, self.submit_all(kind, inputs))
        return await asyncio.gather(*futures, return_exceptions=True)

    def submit(self, kind: JobKind[Input, Result], input: Input) -> "Future[Result]":
        """Run one input as `do` does, for callers without an event loop."""
        return self.submit_all(kind, [input])[0]

    def submit_all(self, kind: JobKind[Input, Result], inputs: Sequence[Input]) -> "list[Future[Result]]":
        """Run inputs that come together, so that those of one key share batches."""
        jobs = [_Job(kind, input) for input in inputs]
        with self._changed:
            if self._stopping:
                raise RuntimeError("the worker has been stopped")
            self._waiting.extend(jobs)
            self._changed.notify()
        return [job.future for job in jobs]

    def stop(self, seconds: float | None = None) -> None:
        """Finish pending jobs, and end the thread; wait at most so many seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def __len__(self) -> int:
        return len(self._waiting)

    def _run(self) -> None:
        while batch := self._take():
            self._watch(batch[0].kind.name, len(batch))
            self.batches += 1
            self._work(batch)

    def _take(self) -> list[_Job]:
        """Return the oldest job and those that may share its batch; none once all is done and the worker stops."""
        with self._changed:
            while True:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if not self._waiting:
                    return []
                if batch := self._together():
                    return batch

    def _together(self) -> list[_Job]:
        batch: list[_Job] = []
        left: deque[_Job] = deque()
        cost = 0
        for job in self._waiting:
            more = job.kind.cost(job.input)
            fits = not batch or (job.key == batch[0].key and cost + more <= job.kind.max_cost)
            if not fits:
                left.append(job)
            elif job.future.set_running_or_notify_cancel():  # False: the caller has gone
                batch.append(job)
                cost += more
        self._waiting = left
        return batch

    def _work(self, batch: list[_Job]) -> None:
        try:
            results = batch[0].kind.work([job.input for job in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:
                for job in batch:
                    self._work([job])
            return
        for job, result in zip(batch, results, strict=True):
            job.future.set_result(result)
