"""Atomic writes of files and folders, JSON that every reader takes, and hashes of settings."""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4
from zlib import crc32

from open_gem.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Writer = Callable[[BinaryIO], None]

# Whole or not at all --------------------------------------------------------------------------------------------------

_MACHINE = f"{crc32(socket.gethostname().encode()):08x}"
_TEMPORARY = re.compile(r"\.(?:.*?-)??(?:(?P<machine>[0-9a-f]{8})-)?[0-9a-f]{32}\.tmp")
_OLD = 86400  # seconds without a change after which a file counts as abandoned, if locks cannot tell


def write_file(path: Path, content: Writer | bytes, *, durable: bool = False) -> None:
    """Write a file atomically: under another name beside its place, then moved there. Raises OutputError.

    durable  flush to disk before the move: otherwise a power cut may leave the name without the content
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers_once(path.parent.absolute())
        with temporary_beside(path, Path.touch) as temporary:
            with temporary.open("wb") as file:
                file.write(content) if isinstance(content, bytes) else content(file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def cache_folder() -> Path | None:
    """Return the cache folder; None unless this user has one that others cannot write to: what is in it is trusted, and
    code is run from it."""
    if not hasattr(os, "getuid"):  # Windows
        return None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "open_gem")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            status = folder.stat()
    except (OSError, RuntimeError):  # a user without a home
        return None
    return folder if status.st_uid == os.getuid() and not status.st_mode & 0o022 else None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Open a folder to write into, which gets its name on success and is removed otherwise. Raises OutputError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        with temporary_beside(folder, Path.mkdir) as temporary:
            yield temporary
            temporary.rename(folder)
    except OSError as error:
        raise OutputError(f"cannot write {str(folder)!r}: {error.strerror or error}") from error


@contextmanager
def temporary_beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make a new file or folder beside `path` with `make`; it is removed afterwards unless it was moved.

    It is locked meanwhile, so that `remove_leftovers` can tell it from what a killed process left.
    """
    while True:
        temporary = path.with_name(f".{path.name[:20]}-{_MACHINE}-{uuid4().hex}.tmp")
        make(temporary)
        try:
            lock = _lock(temporary)
        except (BlockingIOError, FileNotFoundError):  # another process has just removed it as a leftover
            continue
        except OSError:  # a file system without locks
            lock = None
        break
    try:
        yield temporary
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`; files that are being written stay.

    The system frees the locks of a process that dies. If a lock says nothing (a file system without locks, or a file of
    another machine, whose locks may be invisible here), the file must be unchanged for a day.
    """
    try:
        paths = list(folder.iterdir())
    except OSError:  # it cannot be listed
        return
    for path in paths:
        if (ours := _TEMPORARY.fullmatch(path.name)) is None:
            continue
        lock, is_certain = None, ours["machine"] in (None, _MACHINE)
        with suppress(OSError):
            try:
                lock = _lock(path)
            except (BlockingIOError, FileNotFoundError):
                continue
            except OSError:
                is_certain = False
            if is_certain or time.time() - _changed(path) > _OLD:
                _remove(path)
        if lock is not None:
            os.close(lock)


@lru_cache(maxsize=1024)
def _remove_leftovers_once(folder: Path) -> None:
    """Remove leftovers once per folder, for folders that get many files."""
    remove_leftovers(folder)


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock of a file or folder until it is closed.

    Raises BlockingIOError if another one holds it, FileNotFoundError if the path is gone, and another OSError if
    there are no locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if fcntl is None:
            raise OSError("no locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileNotFoundError
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _changed(path: Path) -> float:
    """Return when a file, or something in a folder, was last changed."""
    return max(place.lstat().st_mtime for place in (path, *path.rglob("*")))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OutputError unless files can be made in `folder`, or it itself can be made; leaves nothing behind."""
    try:
        place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error


# JSON -----------------------------------------------------------------------------------------------------------------


def to_json(value: Any, *, indent: int | None = None, ascii: bool = False, sort_keys: bool = False) -> str:
    """Return standard JSON: NaN and infinities, which it does not have, become null.

    ascii  escape all other characters: for streams whose encoding may lack them
    """
    options: dict[str, Any] = {"indent": indent, "ensure_ascii": ascii, "sort_keys": sort_keys, "allow_nan": False}
    try:
        text = json.dumps(value, **options)
    except ValueError:
        text = json.dumps(_finite(value), **options)
    return text.encode("utf-8", "backslashreplace").decode()  # bytes of a path that are not UTF-8: JSON's own escapes


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(member) for key, member in value.items()}
    return [_finite(member) for member in value] if isinstance(value, list | tuple) else value


def digest(settings: Mapping[str, Any]) -> str:
    """Return the first 12 hex digits of the SHA-256 of settings as JSON; the order of names does not count."""
    return hashlib.sha256(to_json(settings, ascii=True, sort_keys=True).encode()).hexdigest()[:12]
