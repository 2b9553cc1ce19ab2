"""Where images come from: folders, lists, tars, Parquet and data sets, as a stream of items.

    source = open_source("photos")            # or "urls.csv", "s3://bucket/shard-*.tar", "rows.parquet", …
    for item in source.items():
        picture = read_image(read(item))

Listing streams: no list of all images is kept. An item is small and means the same on every machine that sees the
files. A kind of source is one function and one row of `KINDS`.
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from glob import has_magic, iglob
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from open_gem.errors import InputError
from open_gem.label.reading import (
    SECONDS,
    check_protocol,
    is_url,
    local_path,
    one_line,
    open_file,
    parquet_file,
    saved_dataset,
    told,
)

ENDINGS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".jp2"),
    *(".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"),
}
"""What names of pictures in folders and tars end with, in either case; other files are passed over."""

COLUMNS = (
    *("image", "img", "path", "image_path", "filepath", "file_path", "file_name", "filename", "file"),
    *("url", "image_url", "uri", "jpg", "png", "bytes"),
)
"""Names by which the column of pictures is known, the first that is there, where none was asked for."""


class Item(NamedTuple):
    """An image: `id`, unique in its source; `source`, its path or URL, as given.

    Of a tar also `container`, its path, and where in it the `size` bytes of the file begin. `error`, where something
    could not even be listed.
    """

    id: str
    source: str
    container: str = ""
    offset: int = 0
    size: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Source:
    """A stream of items. `root` is what ids are relative to, None where they stand for themselves; of tables also the
    columns that were asked for."""

    kind: str
    root: str | None
    items: Callable[[], Iterator[Item]]


@dataclass(frozen=True)
class Columns:
    """Names of the columns with pictures (or their paths) and with ids, where a source has columns; None: as usual.

    seconds  that one read of a remote list, tar or table may take
    """

    image: str | None = None
    id: str | None = None
    seconds: float = SECONDS

    def find(self, given: str, names: Iterable[str]) -> str:
        """The name of the column with pictures. Raises InputError where there is none."""
        there = list(names)
        wanted = COLUMNS if self.image is None else (self.image,)
        for name in filter(None, (*wanted, self.id)):
            if name == self.id and name not in there:
                raise InputError(f"no column {name!r} in {given!r}, expected one of {', '.join(there)}")
        if (found := next((name for name in wanted if name in there), None)) is None:
            what = "column of pictures" if self.image is None else f"column {self.image!r}"
            raise InputError(f"no {what} in {given!r}, expected one of {', '.join(there)}")
        return found


def open_source(given: str, columns: Columns = Columns()) -> Source:
    """What a person means by a path, a URL or a pattern, see `KINDS`.

    Raises InputError where it is none of them or not there, or a package for it is missing.
    """
    check_protocol(given)
    given = local_path(given)
    if not is_url(given) and not is_pattern(given) and not Path(given).exists():
        raise InputError(f"{given!r} does not exist, expected {EXPECTED}")
    kind = next((name for name, (is_it, _) in KINDS.items() if is_it(given)), None)
    if kind is None:
        raise InputError(f"{given!r} is no source of images, expected {EXPECTED}")
    source = KINDS[kind][1](given, columns)
    if columns.image is None and columns.id is None:
        return source
    chosen = ", ".join(f"{name} {value!r}" for name, value in (("column", columns.image), ("ids", columns.id)) if value)
    return replace(source, root=f"{source.root or ''} {chosen}".strip())  # other columns are other images


# Files ----------------------------------------------------------------------------------------------------------------


def is_picture(name: str) -> bool:
    """Whether a file name is a picture's: by its ending, hidden ones aside."""
    base = re.split(r"[/\\]", name)[-1]
    return os.path.splitext(base)[1].lower() in ENDINGS and not base.startswith(".")  # noqa: PTH122 - of any system


def _folder(given: str, columns: Columns) -> Source:
    root = given.rstrip("/") if is_url(given) else str(Path(given).absolute())
    listed = partial(_walk_remote, root) if is_url(given) else partial(_walk, Path(given))
    return Source("folder", root, listed)


def _walk(root: Path, below: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Item]:
    """Pictures in a folder and those in it, links followed but never round in circles; in no order, for sorting would
    keep all names of a folder."""
    place = os.path.join(root, below)  # noqa: PTH118 - ten million times
    try:
        status = os.stat(place)  # noqa: PTH116
        if (me := (status.st_dev, status.st_ino)) in above:
            return
        with os.scandir(place) as entries:
            for entry in entries:
                inside = f"{below}/{entry.name}" if below else entry.name
                if entry.name.startswith("."):
                    continue
                is_folder = _is_dir(entry)
                if is_folder:
                    yield from _walk(root, inside, above | {me})
                elif is_picture(entry.name):
                    yield Item(printable(inside), entry.path)
    except OSError as error:
        yield Item(printable(below or "."), place, error=f"cannot list this folder: {error.strerror}")


def _is_dir(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a folder; a link that leads nowhere, or round in circles, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _walk_remote(root: str) -> Iterator[Item]:
    from fsspec.core import url_to_fs

    files, top = url_to_fs(root)
    for folder, _, names in files.walk(top):
        for name in sorted(filter(is_picture, names)):
            path = f"{folder.rstrip('/')}/{name}"
            yield Item(path[len(top) :].lstrip("/"), files.unstrip_protocol(path))


def _pattern(given: str, columns: Columns) -> Source:
    root = _root(given)
    paths = partial(_matches, given)
    return Source(
        "pattern", root, lambda: (Item(printable(_below(root, path)), path) for path in paths() if is_picture(path))
    )


def is_pattern(given: str) -> bool:
    """Whether a path or URL has wildcards; a question mark in a web address is none."""
    return "*" in given if given.startswith(("http://", "https://")) else has_magic(given)


def _root(given: str) -> str:
    """The folder of a file, or of a pattern that before the first wildcard; absolute where it is local."""
    wild = re.search(r"[*?\[]", given) if is_pattern(given) else None
    before = given[: wild.start() if wild else None].rpartition("/")[0]
    return before if is_url(given) else str(Path(before or ("/" if given.startswith("/") else ".")).absolute())


def _below(root: str, path: str) -> str:
    if is_url(path):  # of one place there are several spellings, as s3://x and s3:///x
        from fsspec.core import strip_protocol

        return strip_protocol(path).removeprefix(strip_protocol(root)).lstrip("/")
    return str(Path(path).absolute()).removeprefix(root).lstrip("/")


def _matches(given: str) -> Iterator[str]:
    """The files that a path, URL or pattern means."""
    if not is_pattern(given):
        yield given
    elif is_url(given):
        from fsspec.core import url_to_fs

        files, pattern = url_to_fs(given)
        yield from (files.unstrip_protocol(str(path)) for path in files.glob(pattern))
    else:
        yield from iglob(given, recursive=True)  # noqa: PTH207 - takes absolute patterns too


# Lists ----------------------------------------------------------------------------------------------------------------


def _list(given: str, columns: Columns, read: Callable[[str, Columns], Iterator[tuple[str, str]]]) -> Source:
    """Ids and paths that something lists; relative ones are relative to it."""
    folder = _root(given)
    first = next(read(given, columns), ("", ""))[0]

    def items() -> Iterator[Item]:
        for id, path in read(given, columns):
            check_protocol(path)
            whole = path if is_url(path) or path.startswith("/") else f"{folder}/{path}"
            yield Item(printable(id), whole)

    return Source("list", None if is_url(first) or first.startswith("/") else folder, items)


def _lines(given: str, columns: Columns) -> Iterator[tuple[str, str]]:
    with told(given), open_file(given, columns.seconds) as file:
        for line in file:
            if path := line.decode(
                "utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8", "surrogateescape"
            ).strip():
                yield path, path


def _csv(given: str, columns: Columns) -> Iterator[tuple[str, str]]:
    with told(given), open_file(given, columns.seconds) as file:
        text = (line.decode("utf-8-sig") for line in file)
        rows = csv.DictReader(text, delimiter="\t" if given.lower().endswith(".tsv") else ",")
        column = columns.find(given, rows.fieldnames or [])
        for row in rows:
            if path := (row[column] or "").strip():
                yield (row[columns.id] if columns.id else path), path


# Containers -----------------------------------------------------------------------------------------------------------


def _tars(given: str, columns: Columns) -> Source:
    return _containers("tar", given, partial(_tar, seconds=columns.seconds))


def _containers(kind: str, given: str, inside: Callable[[str, str], Iterator[Item]]) -> Source:
    """Items of all files that `given` means; one that cannot be read (to its end) is an item that says so."""
    root = _root(given)

    def items() -> Iterator[Item]:
        for path in _matches(given):
            name = printable(_below(root, path))
            try:
                yield from inside(path, name)
            except Exception as error:
                yield Item(name, path, error=f"cannot be read to its end: {one_line(error)}")

    return Source(kind, root, items)


def _tar(path: str, name: str, seconds: float) -> Iterator[Item]:
    import tarfile

    with open_file(path, seconds) as file, tarfile.open(fileobj=file, mode="r:") as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for member in tar:
            if member.isfile() and is_picture(member.name):
                source = f"tar://{member.name}::{path}"  # as fsspec writes it
                yield Item(f"{name}/{printable(member.name)}", source, path, member.offset_data, member.size)


def _parquet(given: str, columns: Columns) -> Source:
    """A list of paths where the column has text, images where it has bytes."""
    import pyarrow as pa

    first = next(_matches(given), None)
    if first is None:
        raise InputError(f"{given!r} matches no file, expected at least one")
    with told(first):
        fields = parquet_file(first, columns.seconds).schema_arrow
    column = columns.find(first, fields.names)
    kind = fields.field(column).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _list(given, columns, partial(_parquet_paths, column=column))
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
        raise InputError(f"column {column!r} of {first!r} is {kind}, expected paths, or the bytes of images")
    return _containers("parquet", given, partial(_parquet_rows, column=column, columns=columns))


def _parquet_paths(given: str, columns: Columns, column: str) -> Iterator[tuple[str, str]]:
    wanted = [column] if columns.id is None else [column, columns.id]
    for path in _matches(given):
        for batch in parquet_file(path, columns.seconds).iter_batches(4096, columns=wanted):
            for row in batch.to_pylist():
                if row[column]:
                    yield str(row[columns.id or column]), row[column]


def _parquet_rows(path: str, name: str, column: str, columns: Columns) -> Iterator[Item]:
    file = parquet_file(path, columns.seconds)
    if columns.id is None:
        ids: Iterable[str] = (f"{name}/{row}" for row in range(file.metadata.num_rows))
    else:
        batches = file.iter_batches(4096, columns=[columns.id])
        ids = (str(id) for batch in batches for id in batch.column(0).to_pylist())
    for row, id in enumerate(ids):
        yield Item(printable(id), f"{path}#{urlencode({'column': column, 'row': row})}")


def _dataset(given: str, columns: Columns) -> Source:
    """What `datasets` saved with `save_to_disk`."""
    root = str(Path(given).absolute())
    found: dict[str, tuple[Any, str]] = {}
    for split, rows in saved_dataset(root).items():
        pictures = [name for name, kind in rows.features.items() if type(kind).__name__ == "Image"]
        preferred = Columns(columns.image or next(iter(pictures), None), columns.id)
        found[split] = rows, preferred.find(given, rows.column_names)

    def items() -> Iterator[Item]:
        for split, (rows, column) in found.items():
            ids = (f"{split}/{row}" if split else str(row) for row in range(len(rows)))
            named = ids if columns.id is None else (str(row[columns.id]) for row in rows.select_columns([columns.id]))
            for row, id in enumerate(named):
                yield Item(printable(id), f"{root}#{urlencode({'split': split, 'column': column, 'row': row})}")

    return Source("dataset", root, items)


# The table ------------------------------------------------------------------------------------------------------------


def _is_dataset(given: str) -> bool:
    return not is_url(given) and any((Path(given) / name).exists() for name in ("state.json", "dataset_dict.json"))


def _is_folder(given: str) -> bool:
    return given.endswith("/") if is_url(given) else Path(given).is_dir()


def _ends(*endings: str) -> Callable[[str], bool]:
    return lambda given: (given.partition("?")[0] if is_url(given) else given).lower().endswith(endings)


_Open = Callable[[str, Columns], Source]
KINDS: Mapping[str, tuple[Callable[[str], bool], _Open]] = {
    "dataset": (_is_dataset, _dataset),
    "folder": (_is_folder, _folder),
    "tar": (_ends(".tar"), _tars),
    "parquet": (_ends(".parquet", ".pq"), _parquet),
    "csv": (_ends(".csv", ".tsv"), partial(_list, read=_csv)),
    "text": (_ends(".txt", ".lst", ".list"), partial(_list, read=_lines)),
    "pattern": (is_pattern, _pattern),
}
"""What a source can be, the first that fits: whether it is that, and how it is opened."""

EXPECTED = (
    "a folder (a remote one with / at its end), a pattern such as 'photos/**/*.jpg', a list of paths or URLs "
    "(.txt, .csv, .tsv, .parquet), tars (not compressed), Parquet with the bytes of images, or a data set that "
    "`datasets` saved on disk"
)


def printable(text: str) -> str:
    """Text that UTF-8 can hold: bytes of a name that are none become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
