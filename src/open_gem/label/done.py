"""The ids of images in the parts, in little memory; and the lock of a folder that is written to."""

import os
import shutil
import socket
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

from open_gem.errors import InputError, OutputError
from open_gem.files import remove_leftovers, write_file
from open_gem.label.parts import LabelRow, Parts, tidy
from open_gem.label.paths import PassedOver

TODO = ".todo"  # work of Ray's actors, in the folder of the parts; without it they stop writing
PATIENCE = 1.0  # seconds to wait for a lock: starting processes hold it for an instant


@dataclass(frozen=True)
class Shard:
    """One of `of` processes that share a run: it labels the images whose hash says so."""

    index: int = 0
    of: int = 1

    def __str__(self) -> str:
        return f"{self.index}-of-{self.of}"

    def has(self, id: str) -> bool:
        """Return True if an image belongs to this shard."""
        return self.of == 1 or key(id) % self.of == self.index

    def share(self, limit: int | None) -> int | None:
        """Return this shard's share of a limit that is for all of them."""
        return None if limit is None else limit // self.of + (self.index < limit % self.of)

    @classmethod
    def of_environment(cls) -> "Shard":
        """Return the shard in torchrun's RANK and WORLD_SIZE; without it, everything."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


WHOLE = Shard()  # a single process


def default_workers() -> int:
    """Return a good number of threads: one per processor that this process may use, 16 at most."""
    return max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def key(id: str) -> int:
    """Return eight bytes for an id. Of ten million, two are the same with a chance of three in a million."""
    return int.from_bytes(blake2b(id.encode("utf-8", "surrogateescape"), digest_size=8).digest())


class HashedIdSet:
    """A set of ids that keeps an eight-byte hash of each, in small arrays by the first two bytes."""

    def __init__(self, ids: Iterable[str] = ()):
        self._buckets: list[array[int] | None] = [None] * 65_536
        self._count = 0
        for id in ids:
            self.add(id)

    def __contains__(self, id: str) -> bool:
        number = key(id)
        return number in (self._buckets[number >> 48] or ())

    def __len__(self) -> int:
        return self._count

    def add(self, id: str) -> bool:
        """Add `id`; return True if it was not present."""
        number = key(id)
        bucket = self._buckets[number >> 48]
        if bucket is None:
            self._buckets[number >> 48] = array("Q", (number,))
        elif number in bucket:
            return False
        else:
            bucket.append(number)
        self._count += 1
        return True

    def discard(self, id: str) -> None:
        """Remove an id, if it is present."""
        number = key(id)
        bucket = self._buckets[number >> 48]
        if bucket is not None and number in bucket:
            bucket.remove(number)
            self._count -= 1


def done_in(parts: Parts, errors: bool = True) -> HashedIdSet:
    """Return the ids in all parts, or only those of images that could be labelled; reads no other columns.

    Raises OutputError for a part that cannot be read.
    """
    if errors:
        return HashedIdSet(id for batch in parts.columns("id") for id in batch.column(0).to_pylist())
    return HashedIdSet(row["id"] for row in parts.rows("id", "status") if row["status"] != "error")


@dataclass
class Tally:
    """Counts of the images of a source so far."""

    listed: int = 0
    done: int = 0  # already in a part
    duplicates: int = 0  # listed again under the same id
    labeled: int = 0
    failed: int = 0
    seconds: float = 0.0
    seen: HashedIdSet = field(default_factory=HashedIdSet, repr=False)
    passed_over: PassedOver = field(default_factory=PassedOver)  # files that are no images, so far
    is_whole: bool = False  # the listing is complete
    is_limited: bool = False  # it ended at the limit, with images left

    def count(self, row: LabelRow) -> None:
        """Count one more row."""
        self.labeled += row["status"] == "ok"
        self.failed += row["status"] != "ok"
        self.seconds += row["seconds"]


# The lock -------------------------------------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path, shard: Shard = WHOLE) -> Iterator[None]:
    """Lock the folder against other writers of this shard, and of shards of another division.

    The system frees the lock of a process that dies, however it does. Raises InputError if somebody is writing,
    OutputError if the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(_lock(folder, str(shard)), timeout=PATIENCE))
            for other in _others(folder, shard):
                with FileLock(_lock(folder, other), timeout=PATIENCE):
                    pass
            _sweep(folder, shard)
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            note = f"process {os.getpid()} on {socket.gethostname()} since {now}"
            write_file(_note(folder, str(shard)), note.encode())
        except Timeout as error:
            writer = _writer(folder, Path(error.lock_file).name.removeprefix(".lock-"))
            raise InputError(f"{str(folder)!r} is being written by {writer}: expected one at a time") from None
        except OSError as error:
            raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
        yield
        _note(folder, str(shard)).unlink(missing_ok=True)


def _lock(folder: Path, shard: str) -> Path:
    return folder / f".lock-{shard}"


def _note(folder: Path, shard: str) -> Path:
    return folder / f".writer-{shard}"


def _others(folder: Path, shard: Shard) -> list[str]:
    """Return the locks of shards of other divisions that were once written here: if one is at work, images would be
    labelled twice."""
    shards = [path.name.removeprefix(".lock-") for path in folder.glob(".lock-*")]
    return [other for other in shards if not other.endswith(f"-of-{shard.of}")]


def _writer(folder: Path, shard: str) -> str:
    try:
        return _note(folder, shard).read_text("utf-8")
    except OSError:
        return "another process"


def _sweep(folder: Path, shard: Shard) -> None:
    """Remove what killed writers left half-written, and their task lists; files of other shards stay."""
    if shard.of == 1:
        shutil.rmtree(folder / TODO, ignore_errors=True)
        tidy(folder)
    remove_leftovers(folder)
