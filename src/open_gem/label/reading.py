"""Reads the bytes of an item, local or remote: the only module that opens files of users.

Remote reads may hang for ever, and libraries cannot cancel them, so each runs in a thread of its own, which is left
behind after the timeout. Only regular local files are opened: a pipe would wait for a writer.
"""

import io
import os
import re
import stat
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import parse_qs
from zipfile import ZipFile

from open_gem.errors import ImageError, InputError
from open_gem.label.archives import CHUNK, GZIPPED, Gunzipped, check_size, is_whole, tar_members, zip_member
from open_gem.label.remote import fetch, fetch_part, open_remote

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

READ_TIMEOUT = 60.0  # default timeout in seconds of one remote read
LOOK = 1.0  # seconds between checks for signals, which may not wake a waiting thread
ROW = re.compile(r"(.+)#((?:split=[^&]*&)?column=[^&]+&row=[0-9]+)")  # a row of a table in `Item.source`

R = TypeVar("R")


class Item(NamedTuple):
    """An image: `id`, unique in its source; `source`, its path or URL.

    An item of an archive also has `container`, its path, and how many bytes it has; in a tar, `offset` is where they
    begin. `error` says why something could not be listed.
    """

    id: str
    source: str
    container: str = ""
    offset: int = 0
    size: int = 0
    error: str | None = None


def read(item: Item, seconds: float = READ_TIMEOUT) -> bytes | Path:
    """Return what `read_image` takes: the bytes of the file, or the path of a local one.

    Raises ImageError in one line, also if a remote read takes longer than `seconds`.
    """
    try:
        if item.error is not None:
            raise ImageError(item.error)
        in_archive = _place_in_archive(item)
        is_remote = is_url(in_archive[2] if in_archive else item.source)
        return within(seconds, _read, item, seconds) if is_remote else _read(item, seconds)
    except LateError:
        _column.cache_clear()  # the hanging read may hold a lock of theirs
        _zip.cache_clear()
        raise
    except ImageError:
        raise
    except Exception as error:  # any error of the library behind the URL
        raise ImageError(f"cannot be read: {describe_error(error)}") from error


def _read(item: Item, seconds: float) -> bytes | Path:
    if place := _place_in_archive(item):
        content = _member(item, *place, seconds)
        if len(content) < item.size:
            raise ImageError(f"{len(content)} bytes read, expected {item.size}")
        return content
    if match := ROW.fullmatch(item.source):
        return _cell(match[1], {name: values[0] for name, values in parse_qs(match[2]).items()}, seconds)
    if is_url(item.source):
        return fetch(item.source, seconds)
    return _regular(item.source)


class LateError(ImageError):
    """A remote read took too long."""


def within(seconds: float, work: Callable[..., R], *arguments: Any) -> R:
    """Return the result of `work`. Raises LateError after a timeout; its thread is then left behind."""
    future: Future[R] = Future()

    def act() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # the waiting thread handles it
            future.set_exception(error)

    Thread(target=act, name="read", daemon=True).start()
    end = monotonic() + seconds
    while not future.done():
        if (left := end - monotonic()) <= 0:
            raise LateError(f"was not read within {seconds:g} seconds")
        wait([future], min(left, LOOK))
    return future.result()


NOT_FILES = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def _regular(path: str) -> Path:
    """Return the local path of a path or file:// URL of a regular file: others may block for ever. Raises ImageError,
    OSError."""
    place = Path(local_path(path))
    if (kind := stat.S_IFMT(place.stat().st_mode)) != stat.S_IFREG:
        raise ImageError(f"{str(place)!r} is {NOT_FILES.get(kind, 'no regular file')}, expected a file")
    return place


IN_ARCHIVE = re.compile(r"(tar|zip)://((?:(?!::).)+)::((?:(?!::).)+)", re.DOTALL)  # in `Item.source`, as fsspec has it


def _place_in_archive(item: Item) -> tuple[str, str, str] | None:
    """Return the kind of the archive that an image is in, its name there, and the archive's path; None if in none."""
    if item.container:
        kind, _, name = item.source.removesuffix(f"::{item.container}").partition("://")
        return kind, name, item.container
    return None if (match := IN_ARCHIVE.fullmatch(item.source)) is None else (match[1], match[2], match[3])


def _member(item: Item, kind: str, name: str, path: str, seconds: float) -> bytes:
    """Return the bytes of an image in an archive."""
    if kind == "zip":
        return zip_member(_zip(path, _changed(path), seconds), name)
    offset, size = (item.offset, item.size) if item.container else _tar_index(path, _changed(path), seconds)[name]
    check_size(size)
    if is_url(path):
        return fetch_part(path, offset, size, seconds)
    if path.lower().endswith(GZIPPED):
        return _gunzipped(path, _changed(path)).part(offset, size)
    with _regular(path).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _changed(path: str) -> float:
    """Return when a local file was last changed: another archive of that name is opened again."""
    return 0.0 if is_url(path) else Path(local_path(path)).stat().st_mtime


@lru_cache(maxsize=4)
def _zip(path: str, changed: float, seconds: float) -> ZipFile:
    with ExitStack() as stack:
        archive = ZipFile(stack.enter_context(open_file(path, seconds)))
        weakref.finalize(archive, stack.pop_all().close)  # once no read of it goes on
        return archive


@lru_cache(maxsize=2)
def _gunzipped(path: str, changed: float) -> Gunzipped:
    return Gunzipped(open_file(path))


@lru_cache(maxsize=2)
def _tar_index(path: str, changed: float, seconds: float) -> dict[str, tuple[int, int]]:
    """Return where each file of a tar begins, and its bytes, for images of which only the address is known."""
    places: dict[str, tuple[int, int]] = {}
    with open_tar(path, seconds) as file:
        for member in filter(is_whole, tar_members(file)):
            places.setdefault(member.name, (member.offset_data, member.size))
    return places


def open_tar(path: str, seconds: float = READ_TIMEOUT) -> Any:
    """Open a tar for `tar_members`, a gzip one by its content."""
    file = open_file(path, seconds)
    return Gunzipped(file, window=CHUNK) if path.lower().endswith(GZIPPED) else file


def _cell(place: str, where: Mapping[str, str], seconds: float) -> bytes | Path:
    """Return an image in a row of a table: bytes, or the path beside them."""
    row, column = int(where["row"]), where["column"]
    folder = place
    if "split" in where or not place.lower().endswith((".parquet", ".pq")):
        value = _of_dataset(place, where.get("split", ""), column)[row][column]
    else:
        value, folder = _column(place, column)[row], place.rpartition("/")[0] or "."
    if isinstance(value, Mapping):  # as `datasets` keeps images: their bytes, or the path of a file
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ImageError("the row has no image")
    if isinstance(value, bytes):
        return value
    if not is_url(value) and not local_path(value).startswith("/"):
        value = f"{folder}/{value}"  # in the folder of the table, as paths in a list
    return within(seconds, fetch, value, seconds) if is_url(value) else _regular(value)


class _Column:
    """A column of a Parquet file by rows, for threads that ask for them nearly in order: a few rows are in memory, and
    one before them, or far behind, means reading from the start of its row group."""

    ROWS, KEPT = 16, 4  # rows of a batch; batches that are kept

    def __init__(self, path: str, column: str):
        self._file, self._column = parquet_file(path), column
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = list(accumulate(sizes, initial=0))
        self._lock = Lock()  # readers of Parquet are not thread-safe
        self._go_to(0)

    def __getitem__(self, row: int) -> Any:
        with self._lock:
            group = bisect_right(self._starts, row) - 1
            if (self._kept and row < self._kept[0][0]) or self._starts[group] > self._end:
                self._go_to(group)
            while row >= self._end:
                values = next(self._batches).column(0)
                self._kept.append((self._end, values))
                self._end += len(values)
            start, values = next(pair for pair in reversed(self._kept) if pair[0] <= row)
            return values[row - start].as_py()

    def _go_to(self, group: int) -> None:
        groups = list(range(group, len(self._starts) - 1))
        self._batches = self._file.iter_batches(self.ROWS, groups, [self._column], use_threads=False)
        self._kept: deque[tuple[int, Any]] = deque(maxlen=self.KEPT)
        self._end = self._starts[group]


@lru_cache(maxsize=4)
def _column(path: str, column: str) -> _Column:
    return _Column(path, column)


@lru_cache(maxsize=4)
def _of_dataset(place: str, split: str, column: str) -> Any:
    import datasets

    rows = saved_dataset(place)[split]
    is_image = isinstance(rows.features[column], datasets.Image)
    return rows.cast_column(column, datasets.Image(decode=False)) if is_image else rows


# Opening --------------------------------------------------------------------------------------------------------------


def is_url(address: str) -> bool:
    """Return True if this is the address of something that may be remote."""
    return re.match("[A-Za-z][A-Za-z0-9+.-]+://", address) is not None and not address.startswith(LOCAL)


LOCAL = ("file://", "local://")  # prefix of URLs of local files


def local_path(address: str) -> str:
    """Return a file:// URL as a path; other values are unchanged."""
    if not address.startswith(LOCAL):
        return address
    from fsspec.core import strip_protocol

    return strip_protocol(address)


def local_file(address: str) -> str | None:
    """Return the local file that holds what `Item.source` names; None if that is remote."""
    if match := ROW.fullmatch(address):
        address = match[1]
    if address.startswith(("tar://", "zip://")):
        address = address.rpartition("::")[2]
    address = local_path(address)
    return None if is_url(address) else address


def absolute(item: Item) -> str:
    """Return `source` so that it is valid elsewhere: local paths are absolute, also those of file:// URLs."""
    if item.container:
        return item.source.removesuffix(item.container) + _absolute(item.container)
    match = ROW.fullmatch(item.source)
    file = item.source if match is None else match[1]
    return _absolute(file) + item.source[len(file) :]


def _absolute(place: str) -> str:
    place = local_path(place)
    return place if is_url(place) or not place else str(Path(place).absolute())


def open_file(address: str, seconds: float = READ_TIMEOUT) -> BinaryIO:
    """Open a local file, or a URL by fsspec; then no single read takes longer than `seconds`."""
    if not is_url(address):
        return _regular(address).open("rb")
    patient = _Patient(within(seconds, open_remote, address), seconds)
    return cast(BinaryIO, io.BufferedReader(patient, 2**16))  # fewer threads


class _Patient(io.RawIOBase):
    """A remote file whose reads end after some seconds, with an ImageError."""

    def __init__(self, file: BinaryIO, seconds: float):
        self._file, self._seconds = file, seconds

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any) -> int:
        content = within(self._seconds, self._file.read, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def parquet_file(address: str, seconds: float = READ_TIMEOUT) -> "ParquetFile":
    from pyarrow import parquet

    # With a buffer; otherwise a column's whole chunk is read at once.
    return parquet.ParquetFile(open_file(address, seconds) if is_url(address) else _regular(address), buffer_size=2**20)


@lru_cache(maxsize=4)
def saved_dataset(folder: str) -> Mapping[str, Any]:
    """Open the splits that `save_to_disk` wrote; a single data set is under "". Raises InputError."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{folder!r} is a data set of Hugging Face: pip install datasets") from error
    with input_errors(folder):
        saved = datasets.load_from_disk(folder)
    return {"": saved} if isinstance(saved, datasets.Dataset) else {str(name): rows for name, rows in saved.items()}


def check_protocol(address: str) -> None:
    """Raise InputError for a URL that no installed package can read, with what to install."""
    if is_url(address):
        _check_protocol(address.partition("://")[0])


@lru_cache(maxsize=64)
def _check_protocol(protocol: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise InputError(f"cannot read {protocol}:// URLs: {describe_error(error)}") from error


@contextmanager
def input_errors(address: str) -> Iterator[None]:
    """Raise any error inside as an InputError about `address`: libraries behind URLs raise almost anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) and not isinstance(error, ImageError):  # an ImageError lacks the address
            raise
        raise InputError(f"cannot read {address!r}: {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.strerror is None:  # fsspec's holds a name alone, for any cause
        return describe_error(error.__cause__) if error.__cause__ else f"no such file: {error}"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())
