"""Where images come from: folders, lists, tars, Parquet and data sets, as a stream of items.

    source = open_source("photos")            # or "urls.csv", "s3://bucket/shard-*.tar", "rows.parquet", …
    for item in source.items():
        picture = read_image(read(item))

Listing streams: no list of all images is kept. An item is small and means the same on every machine that sees the
files. A kind of source is one function and one row of `KINDS`.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from open_gem.errors import InputError
from open_gem.label.paths import (
    ENDINGS,  # noqa: F401 - who exports asks here
    is_pattern,
    is_picture,
    matches,
    printable,
    root_of,
    walk,
    walk_remote,
)
from open_gem.label.reading import (
    SECONDS,
    Item,
    check_protocol,
    is_url,
    local_path,
    one_line,
    open_file,
    parquet_file,
    saved_dataset,
    told,
    within,
)
from open_gem.label.remote import fetch_part

COLUMNS = (
    *("image", "img", "path", "image_path", "filepath", "file_path", "file_name", "filename", "file"),
    *("url", "image_url", "uri", "jpg", "png", "bytes"),
)
"""Names by which the column of pictures is known, the first that is there, where none was asked for."""


@dataclass(frozen=True)
class Source:
    """A stream of items. `root` is what ids are relative to, None where they stand for themselves; `columns` those of a
    table that were asked for."""

    kind: str
    root: str | None
    items: Callable[[], Iterator[Item]]
    columns: str | None = None
    given: str = ""

    def check_not_empty(self) -> None:
        """Raises InputError where there is no image, or none that could be listed: perhaps a name is wrong."""
        reason = ""
        for item in self.items():
            if item.error is None:
                return
            reason = reason or f": {item.error}"
        raise InputError(f"no image in {self.given!r}, expected at least one{reason}")


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
    if _ends(*COMPRESSED)(given):
        raise InputError(f"{given!r} is compressed, and pictures in it cannot be reached one by one: unpack it to .tar")
    if "::" in given and is_url(given) and is_pattern(given):
        raise InputError(f"{given!r} is a pattern in another file, expected the name of one file there")
    kind = next((name for name, (is_it, _) in KINDS.items() if is_it(given)), None)
    if kind is None:
        raise InputError(f"{given!r} is no source of images, expected {EXPECTED}")
    source = KINDS[kind][1](given, columns)
    chosen = ", ".join(f"{name} {value!r}" for name, value in (("column", columns.image), ("ids", columns.id)) if value)
    return replace(source, columns=chosen or None, given=given)  # other columns are other images


# Files ----------------------------------------------------------------------------------------------------------------


def _folder(given: str, columns: Columns) -> Source:
    root = given.rstrip("/") if is_url(given) else str(Path(given).absolute())
    items = partial(walk_remote, f"{root}/", columns.seconds) if is_url(given) else partial(walk, given)
    return Source("folder", root, items)


def _pattern(given: str, columns: Columns) -> Source:
    return Source("pattern", root_of(given), partial(matches, given, is_picture, columns.seconds))


# Lists ----------------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """What a list says in one place: a line, or a row."""

    place: str
    id: str | None
    path: str | None
    error: str | None = None


def _list(given: str, columns: Columns, read: Callable[[str, Columns], Iterator[_Entry]]) -> Source:
    """Ids and paths that something lists; relative ones are relative to it."""
    folder = root_of(given)
    first = next((entry.path for entry in read(given, columns) if entry.path), "")
    is_relative = not (is_url(first) or local_path(first).startswith("/"))
    return Source(
        "list", folder if is_relative else None, lambda: (_listed(folder, one) for one in read(given, columns))
    )


def _listed(folder: str, entry: _Entry) -> Item:
    """What an entry means; where that cannot be, an item that says which and why."""
    path = local_path(entry.path or "")
    whole = path if not path or is_url(path) or path.startswith("/") else f"{folder}/{path}"
    reason = entry.error or _why_not(entry, whole)
    error = None if reason is None else f"{entry.place} {reason}"
    return Item(printable(entry.id or entry.place), whole, error=error)


def _why_not(entry: _Entry, whole: str) -> str | None:
    if not entry.path:
        return "has no path"
    if not entry.id:
        return "has no id"
    try:
        check_protocol(whole)
    except InputError as error:
        return f"is {entry.path!r}: {error}"
    if printable(whole) != whole and not os.path.lexists(whole):
        return "is not UTF-8 text, and no file has its bytes for a name"
    return None


def _lines(given: str, columns: Columns) -> Iterator[_Entry]:
    with told(given), open_file(given, columns.seconds) as file:
        for number, line in enumerate(file, start=1):
            encoding = "utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8"
            if path := line.decode(encoding, "surrogateescape").strip():
                yield _Entry(f"line {number}", path, path)


def _csv(given: str, columns: Columns) -> Iterator[_Entry]:
    with told(given), open_file(given, columns.seconds) as file:
        text = (line.decode("utf-8-sig", "surrogateescape") for line in file)
        rows = csv.DictReader(text, delimiter="\t" if given.lower().endswith(".tsv") else ",")
        column = columns.find(given, rows.fieldnames or [])
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield _Entry(f"line {rows.reader.line_num}", None, None, f"cannot be read: {error}")
                continue
            path, id = ((row[name] or "").strip() for name in (column, columns.id or column))
            yield _Entry(f"line {rows.line_num}", id, path)


# Containers -----------------------------------------------------------------------------------------------------------


def _tars(given: str, columns: Columns) -> Source:
    return _containers("tar", given, partial(_tar, seconds=columns.seconds), columns.seconds)


def _containers(kind: str, given: str, inside: Callable[[str, str], Iterator[Item]], seconds: float) -> Source:
    """Items of all files that `given` means; one that cannot be read (to its end) is an item that says so."""

    def items() -> Iterator[Item]:
        for file in matches(given, seconds=seconds):
            if file.error:
                yield file
                continue
            try:
                yield from inside(file.source, file.id)
            except Exception as error:
                yield file._replace(error=f"cannot be read to its end: {one_line(error)}")

    return Source(kind, root_of(given), items)


def _tar(path: str, name: str, seconds: float) -> Iterator[Item]:
    import tarfile

    if is_url(path):
        within(seconds, fetch_part, path, 1, 1, seconds)  # where that cannot be, told once and not of each picture
    with open_file(path, seconds) as file, tarfile.open(fileobj=file, mode="r:") as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for member in tar:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or it keeps all of them
            if member.isfile() and is_picture(member.name):
                source = f"tar://{member.name}::{path}"  # as fsspec writes it
                yield Item(f"{name}/{printable(member.name)}", source, path, member.offset_data, member.size)


def _parquet(given: str, columns: Columns) -> Source:
    """A list of paths where the column has text, images where it has bytes."""
    import pyarrow as pa

    first, fields = _schema(given, columns.seconds)
    column = columns.find(first, fields.names)
    kind = fields.field(column).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _list(given, columns, partial(_parquet_paths, column=column))
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
        raise InputError(f"column {column!r} of {first!r} is {kind}, expected paths, or the bytes of images")
    return _containers("parquet", given, partial(_parquet_rows, column=column, columns=columns), columns.seconds)


def _schema(given: str, seconds: float) -> tuple[str, Any]:
    """The first file that can be read, and its fields. Raises InputError where there is none."""
    broken: InputError | None = None
    for file in matches(given, seconds=seconds):
        try:
            with told(file.source):
                return file.source, parquet_file(file.source, seconds).schema_arrow
        except InputError as error:
            broken = broken or error
    raise broken or InputError(f"{given!r} matches no file, expected at least one")


def _parquet_paths(given: str, columns: Columns, column: str) -> Iterator[_Entry]:
    wanted = [column] if columns.id is None else [column, columns.id]
    for file in matches(given, seconds=columns.seconds):
        number = 0
        try:
            for batch in parquet_file(file.source, columns.seconds).iter_batches(4096, columns=wanted):
                for row in batch.to_pylist():
                    yield _Entry(f"row {number} of {file.id}", _id(row[columns.id or column]), row[column])
                    number += 1
        except Exception as error:
            yield _Entry(file.id, file.id, file.source, f"cannot be read to its end: {one_line(error)}")


def _id(value: Any) -> str | None:
    """A cell as an id, None where it is empty."""
    return None if value is None else str(value).strip() or None


def _parquet_rows(path: str, name: str, column: str, columns: Columns) -> Iterator[Item]:
    file = parquet_file(path, columns.seconds)
    if columns.id is None:
        ids: Iterable[str | None] = (f"{name}/{row}" for row in range(file.metadata.num_rows))
    else:
        batches = file.iter_batches(4096, columns=[columns.id])
        ids = (_id(id) for batch in batches for id in batch.column(0).to_pylist())
    for row, id in enumerate(ids):
        yield _cell(f"{name}/{row}", id, path, column=column, row=row)


def _cell(place: str, id: str | None, path: str, **where: Any) -> Item:
    """A picture in a row of a table; one whose column of ids is empty says so."""
    error = f"{place} has no id" if id is None else None
    return Item(printable(id or place), f"{path}#{urlencode(where)}", error=error)


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
            named = None if columns.id is None else rows.select_columns([columns.id])
            for row in range(len(rows)):
                place = f"{split}/{row}" if split else str(row)
                id = place if named is None else _id(named[row][columns.id])
                yield _cell(place, id, root, split=split, column=column, row=row)

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

COMPRESSED = tuple(
    ending for kind in ("gz", "bz2", "xz", "zst") for ending in (f".tar.{kind}", f".t{kind.removesuffix('2')}")
)

EXPECTED = (
    "a folder (a remote one with / at its end), a pattern such as 'photos/**/*.jpg', a list of paths or URLs "
    "(.txt, .csv, .tsv, .parquet), tars (not compressed), Parquet with the bytes of images, or a data set that "
    "`datasets` saved on disk"
)
