"""The engine of many machines: the same pipeline as `local` in actors of Ray Data, the same parts.

    tally = run(parts, labeling, source, make=make)     # make() gives the same labeling in another process

What is left to do is cut into parts beforehand, each with its name. An actor gets a part at a time, labels it and
writes it under that name, so one that Ray tries again (a worker or a machine was lost) is written once. The parts
themselves are the checkpoint: no other is kept, and either engine resumes what the other began. All machines see
the folder and the images under the same paths.
"""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from typing import Any, NamedTuple

from open_gem.errors import InputError, OpenGemError, OutputError
from open_gem.files import to_json
from open_gem.label import local
from open_gem.label.done import TODO, WHOLE, HashedIdSet, Shard, Tally, done_in
from open_gem.label.labeling import Labeling
from open_gem.label.parts import LabelRow, Manifest, Parts, rows_in
from open_gem.label.sources import Item, Source

PART_ROWS = 256  # default images per part: small, since a lost actor loses its unfinished part
FILE_PARTS = 64  # parts per task list
COUNTED = ("id", "status", "seconds")  # fields of an actor's answer
STOP = ".stop"  # in the folder of the parts, while a run is asked to end


def run(
    parts: Parts,
    labeling: Labeling,
    source: Source,
    *,
    make: Callable[[], Labeling],
    shard: Shard = WHOLE,
    batch_size: int = 8,
    workers: int | None = None,
    stop: Event | None = None,
    done: HashedIdSet | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda images: None,
    images_per_part: int = PART_ROWS,
) -> Tally:
    """Label as `local.run` does, on all machines of the Ray cluster in RAY_ADDRESS or of `ray start`, otherwise on this
    one.

    make      makes `labeling` in an actor, or raises there
    workers   actors, each with a model; by default one per graphics card, otherwise one per processor but one
    stop      set: actors write what they have and begin nothing more

    Raises InputError without ray, and if the run is a shard: Ray distributes images by itself.
    """
    if shard.of > 1:
        raise InputError("torchrun and --engine ray given, expected one of them: Ray shares images out by itself")
    stop, done, tally = stop or Event(), done_in(parts) if done is None else done, Tally()
    folder = parts.folder.absolute()
    items = local.pending(source.items(tally.passed_over), done, shard, tally, limit)
    todo = _write_todo(folder / TODO, items, images_per_part)
    if not todo:
        return tally
    actor = partial(Actor, str(Path.cwd()), str(folder), todo[0], parts.manifest, make, batch_size)
    try:
        with _cluster(), _telling(stop, folder / STOP):
            for row in _results(todo, actor, workers):
                done.add(row["id"])
                tally.count(row)
                progress(1)
    finally:
        shutil.rmtree(folder / TODO, ignore_errors=True)
    return tally


# What is to be done ---------------------------------------------------------------------------------------------------


def _write_todo(folder: Path, items: Iterable[Item], rows: int) -> list[str]:
    """Write files with a row for each part: its name, and its items as JSON; return their paths.

    The list of all images is never in memory.
    """
    import pyarrow as pa
    from pyarrow import parquet

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = local.stamp()  # also in the names of files, so that every run has its own
    chunks = enumerate(_chunks(items, rows))
    parts = ({"part": f"{start}-ray-{number:06d}", "items": to_json(chunk)} for number, chunk in chunks)
    files = []
    for number, chunk in enumerate(_chunks(parts, FILE_PARTS)):
        path = folder / f"{start}-{number:06d}{TODO}"  # not .parquet: readers of the whole folder must not read it
        parquet.write_table(pa.Table.from_pylist(chunk), path)
        files.append(str(path))
    return files


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _items_of(text: str) -> list[Item]:
    """Return the items in a row of such a file."""
    return [Item(*fields) for fields in json.loads(text)]


# Ray ------------------------------------------------------------------------------------------------------------------


def check_installed() -> None:
    """Raise InputError if Ray is not installed."""
    if find_spec("ray") is None:
        raise InputError("ray is not installed: pip install 'open_gem[ray]'")


@contextmanager
def _cluster() -> Iterator[None]:
    """Connect to the Ray cluster that is running, or start one on this machine inside the `with` block."""
    check_installed()
    import ray

    started = not ray.is_initialized()
    numbers = (signal.SIGTERM, signal.SIGINT) if current_thread() is main_thread() else ()  # others have no handlers
    handlers = {number: signal.getsignal(number) for number in numbers}
    if started:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        for number, handler in handlers.items():
            signal.signal(number, handler)  # restore what Ray has replaced
    for name in ("ray.data", "ray.data._internal.execution.streaming_executor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _telling(stop: Event, file: Path) -> Iterator[None]:
    """Create `file` once `stop` is set, which actors on all machines see; remove it on exit."""
    file.unlink(missing_ok=True)
    over = Event()

    def tell() -> None:
        while not over.is_set():
            if stop.wait(0.2):
                file.touch()
                return

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
        file.unlink(missing_ok=True)


def _results(todo: list[str], actor: "partial[Actor]", workers: int | None) -> Iterator[dict[str, Any]]:
    """Yield fields of rows as actors finish parts. Our own errors are raised as they were in the actor."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [Node(*(int(own.get(name, 0)) for name in Node._fields)) for own in resources]
    gpus = sum(node.GPU for node in nodes)
    count = _count(nodes, workers)
    share = _share(nodes, count)
    data = (
        ray.data.read_parquet(todo, file_extensions=[TODO.lstrip(".")])
        .repartition(target_num_rows_per_block=1)
        .map_batches(
            Actor,
            fn_constructor_args=(*actor.args, max(1, share)),
            batch_size=1,
            num_cpus=share,
            num_gpus=1 if gpus else 0,
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=2),
        )
    )
    try:
        yield from data.iter_rows()
    except Exception as error:
        raise _ours(error) from error


class Node(NamedTuple):
    """The resources of a machine of the cluster, by Ray's names."""

    CPU: int
    GPU: int = 0


def _count(nodes: Sequence[Node], wanted: int | None) -> int:
    """Return the number of actors: `wanted`, at most one per graphics card if there are any; by default one per card,
    or one per processor with one processor left free."""
    gpus = sum(node.GPU for node in nodes)
    if gpus:
        return min(wanted or gpus, gpus)
    return wanted or max(1, sum(node.CPU for node in nodes) - 1)


def _share(nodes: Sequence[Node], count: int) -> int:
    """Return how many processors each of `count` actors can have at most; 0 if there is not one for each, which Ray
    grants to any number.

    One processor in all stays free for what feeds the actors, and no actor is larger than the machine that it has to
    fit on: both would wait for ever.
    """
    gpus = sum(node.GPU for node in nodes)
    most = (sum(node.CPU for node in nodes) - 1) // count

    def places(node: Node, share: int) -> int:
        by_processors = node.CPU // share
        return min(by_processors, node.GPU) if gpus else by_processors

    return next((share for share in range(most, 0, -1) if sum(places(node, share) for node in nodes) >= count), 0)


def _ours(error: BaseException) -> BaseException:
    """Return the error that our own code raised in an actor, if it did; otherwise `error`."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OpenGemError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return error


class Actor:
    """A process with a model, which labels a part at a time.

    place     the folder that paths of images are relative to
    folder    of the parts
    token     a file that exists as long as the run does
    manifest  of the run: `make` has to give a labeling with the same one
    threads   that read and decode, and of torch
    """

    def __init__(
        self,
        place: str,
        folder: str,
        token: str,
        manifest: Manifest,
        make: Callable[[], Labeling],
        batch_size: int,
        threads: int,
    ):
        import torch

        os.chdir(place)  # a cluster may have been started anywhere
        torch.set_num_threads(threads)
        self.labeling, self.parts, self.token = make(), Parts(Path(folder), manifest), Path(token)
        self.settings: dict[str, Any] = {"batch_size": batch_size, "workers": threads}
        source = Source("", manifest.root, lambda passed_over: iter(()), manifest.settings.get("columns"))
        if self.labeling.manifest(source) != manifest:
            raise InputError("an actor has other settings or weights than the run, expected the same on every machine")

    def __call__(self, todo: dict[str, Any]) -> dict[str, list[Any]]:
        parts = zip(todo["part"], todo["items"], strict=True)
        rows = [row for name, items in parts for row in self._rows(str(name), _items_of(items))]
        return {name: [row[name] for row in rows] for name in COUNTED}

    def _rows(self, name: str, items: list[Item]) -> list[LabelRow]:
        """Return the rows of a part, which is then on disk; a part that an earlier attempt wrote stays."""
        if (path := self.parts.path(name)).exists():
            return list(rows_in(path, *COUNTED))
        rows = list(local.label(self.labeling, items, stop=_StopFile(self.parts.folder / STOP), **self.settings))
        if not self.token.exists():  # the run was killed, and another may be at work on these images
            raise OutputError("the run that this actor belongs to is over")
        if rows:
            self.parts.write(name, rows)
        return rows


class _StopFile(Event):
    """An event that is set while a file exists."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def is_set(self) -> bool:
        return self.path.exists()
