"""The bytes of an item, wherever it is: the only place that opens files of others, local or remote."""

import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import parse_qs

from open_gem.errors import ImageError, InputError, OpenGemError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

    from open_gem.label.sources import Item

MAX_BYTES = 2**30  # of one file: more is no picture, and would fill the memory
ROW = re.compile(r"(.+)#((?:split=[^&]*&)?column=[^&]+&row=[0-9]+)")  # how a row of a table is told in `Item.source`

_one_at_a_time = Lock()  # readers of Parquet are not made for several threads


def read(item: "Item") -> bytes | Path:
    """What `read_image` takes: the bytes of the file, or the path of a local one. Raises ImageError in one line."""
    try:
        if item.error is not None:
            raise ImageError(item.error)
        if item.container:
            with open_file(item.container) as file:
                file.seek(item.offset)
                return file.read(item.size)
        if match := ROW.fullmatch(item.source):
            return _cell(match[1], {name: values[0] for name, values in parse_qs(match[2]).items()})
        if is_url(item.source):
            return _download(item.source)
        return _regular(item.source)
    except ImageError:
        raise
    except Exception as error:  # of whichever library stands behind the URL
        raise ImageError(f"cannot be read: {one_line(error)}") from error


def _regular(path: str) -> Path:
    if stat.S_ISFIFO(Path(path).stat().st_mode):  # would wait for somebody to write to it
        raise ImageError("is a pipe, expected a file")
    return Path(path)


def _download(url: str) -> bytes:
    import fsspec

    with cast(Any, fsspec.open(url, "rb")) as file:  # as a whole: of a file in a tar, it keeps the tar open
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ImageError(f"has more than {MAX_BYTES} bytes, expected a picture")
    return content


def _cell(place: str, where: Mapping[str, str]) -> bytes | Path:
    """A picture in a row of a table: bytes, or the path beside them."""
    row, column = int(where["row"]), where["column"]
    if "split" in where or not place.lower().endswith((".parquet", ".pq")):
        value = _of_dataset(place, where.get("split", ""), column)[row][column]
    else:
        with _one_at_a_time:
            group, start = _group_of(place, row)
            value = _column(place, column, group)[row - start].as_py()
    if isinstance(value, Mapping):  # as `datasets` keeps pictures: their bytes, or the path of a file
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ImageError("the row has no picture")
    return value if isinstance(value, bytes) else _regular(value)


def _group_of(path: str, row: int) -> tuple[int, int]:
    """The row group of a row of a Parquet file, and the row at which it begins."""
    bounds = _bounds(path)
    group = next(index for index, start in enumerate(bounds[1:]) if row < start)
    return group, bounds[group]


@lru_cache(maxsize=64)
def _bounds(path: str) -> list[int]:
    metadata = parquet_file(path).metadata
    bounds = [0]
    for group in range(metadata.num_row_groups):
        bounds.append(bounds[-1] + metadata.row_group(group).num_rows)
    return bounds


@lru_cache(maxsize=2)  # rows come in order, so the group at hand and the next
def _column(path: str, column: str, group: int) -> Any:
    return parquet_file(path).read_row_group(group, columns=[column]).column(0)


@lru_cache(maxsize=4)
def _of_dataset(place: str, split: str, column: str) -> Any:
    import datasets

    rows = saved_dataset(place)[split]
    is_picture = isinstance(rows.features[column], datasets.Image)
    return rows.cast_column(column, datasets.Image(decode=False)) if is_picture else rows


# Opening --------------------------------------------------------------------------------------------------------------


def is_url(given: str) -> bool:
    return re.match("[A-Za-z][A-Za-z0-9+.-]+://", given) is not None


def open_file(given: str) -> BinaryIO:
    """A local file, or what fsspec makes of a URL."""
    if not is_url(given):
        return Path(given).open("rb")
    import fsspec

    return cast(BinaryIO, cast(Any, fsspec.open(given, "rb")).open())


def parquet_file(given: str) -> "ParquetFile":
    from pyarrow import parquet

    return parquet.ParquetFile(open_file(given) if is_url(given) else given)


@lru_cache(maxsize=4)
def saved_dataset(folder: str) -> Mapping[str, Any]:
    """The splits of what `save_to_disk` wrote; one data set alone goes under "". Raises InputError."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{folder!r} is a data set of Hugging Face: pip install datasets") from error
    with told(folder):
        found = datasets.load_from_disk(folder)
    return {"": found} if isinstance(found, datasets.Dataset) else {str(name): rows for name, rows in found.items()}


def check_protocol(given: str) -> None:
    """Raises InputError for a URL that nothing here can read, with what to install."""
    if is_url(given):
        _check_protocol(given.partition("://")[0])


@lru_cache(maxsize=64)
def _check_protocol(protocol: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise InputError(f"cannot read {protocol}:// URLs: {one_line(error)}") from error


@contextmanager
def told(given: str) -> Iterator[None]:
    """Whatever goes wrong inside is an InputError about `given`: libraries behind URLs raise almost anything."""
    try:
        yield
    except OpenGemError:
        raise
    except Exception as error:
        raise InputError(f"cannot read {given!r}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())
