"""Sources of images: folders, lists, archives, Parquet and data sets, as a stream of items.

    source = open_source("photos")            # or "urls.csv", "s3://bucket/shard-*.tar", "rows.parquet", …
    for item in source.items():
        image = read_image(read(item))

Listing streams: no list of all images is kept. An item is small and means the same on every machine that sees the
files. A kind of source is one function and one row of `KINDS`.
"""

import codecs
import csv
import io
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from stat import S_ISLNK
from typing import Any, NamedTuple, cast
from urllib.parse import urlencode
from zipfile import ZipFile

from open_gem.errors import InputError
from open_gem.label.archives import GZIPPED, is_whole, leads_out, tar_members, zip_error
from open_gem.label.paths import (
    ENDINGS,  # noqa: F401 - who exports asks here
    PassedOver,
    is_pattern,
    matches,
    printable,
    root_of,
    walk,
)
from open_gem.label.reading import (
    READ_TIMEOUT,
    Item,
    check_protocol,
    describe_error,
    input_errors,
    is_url,
    local_path,
    open_file,
    open_tar,
    parquet_file,
    saved_dataset,
    within,
)
from open_gem.label.remote import fetch_part

COLUMNS = (
    *("image", "img", "picture", "photo", "path", "image_path", "img_path", "image_file", "filepath", "file_path"),
    *("file_name", "filename", "file", "url", "image_url", "img_url", "photo_url", "picture_url", "uri", "image_uri"),
    *("link", "image_link", "href", "src", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes"),
)
"""Names of the column of images, in either case: the first that exists, bytes before paths and URLs."""


@dataclass(frozen=True)
class Source:
    """A stream of items.

    root     the folder or URL that ids are relative to; None if they stand for themselves
    listing  gives the items, and counts what is no image
    columns  the columns of a table that were asked for
    note     which columns were chosen, if others could have been meant
    """

    kind: str
    root: str | None
    listing: Callable[[PassedOver], Iterator[Item]]
    columns: str | None = None
    note: str | None = None
    address: str = ""

    def items(self, passed_over: PassedOver | None = None) -> Iterator[Item]:
        """Start a new stream of the items; `passed_over` counts files that are no images."""
        return self.listing(PassedOver() if passed_over is None else passed_over)

    def check_not_empty(self) -> None:
        """Raise InputError if no image can be listed: perhaps a name is wrong."""
        passed_over, reason = PassedOver(), ""
        for item in self.items(passed_over):
            if item.error is None:
                return
            reason = reason or f": {item.error}"
        raise InputError(f"no image in {self.address!r}, expected at least one{reason or self._advice(passed_over)}")

    def _advice(self, passed_over: PassedOver) -> str:
        """Return what the source has instead, and how to name it as a source of another kind."""
        if not passed_over:
            return ""
        advice = ""
        if self.kind == "folder":
            patterns = [
                f"{self.address.rstrip('/')}/**/*{ending}"
                for ending in (".tar", ".tgz", ".zip", ".parquet", ".pq")
                if passed_over[ending]
            ]
            advice = f": give {' or '.join(map(repr, patterns))}" if patterns else ""
        if not advice and any(passed_over[f".{ending.rpartition('.')[2]}"] for ending in ARCHIVES):
            advice = ": unpack archives first"
        return f"; it has {passed_over}{advice}"


class Choice(NamedTuple):
    """The columns to read: `image` has images or their addresses, `id` has ids or is None; `note` says so if others
    could be meant."""

    image: str
    id: str | None = None
    note: str | None = None


IMAGES, BYTES, ADDRESSES = "images", "bytes", "addresses"  # kinds of columns; the first declares itself
RANKS = {IMAGES: 0, BYTES: 0, ADDRESSES: 1}


@dataclass(frozen=True)
class Columns:
    """Names of the columns with images (or their paths) and with ids, where a source has columns; None: as usual.

    read_timeout  seconds for one read of a remote list, tar or table
    """

    image: str | None = None
    id: str | None = None
    read_timeout: float = READ_TIMEOUT

    def choose(self, address: str, kinds: Mapping[str, str]) -> Choice:
        """Choose the columns to read of a table; `kinds` gives what each column holds: a key of `RANKS`, or another
        type. Images in the table go before addresses, which then are the ids.

        Raises InputError if none has images.
        """
        id = self.id and _named(self.id, kinds, address)
        if self.image is not None:
            return _checked(Choice(_named(self.image, kinds, address), id), address, kinds)
        usual = {name: COLUMNS.index(name.casefold()) for name in kinds if name.casefold() in COLUMNS}
        known = [name for name, kind in kinds.items() if name in usual or kind == IMAGES]
        if not known:
            raise InputError(
                f"which column of {address!r} has the images, or their paths or URLs? No usual name among "
                f"{', '.join(kinds) or 'none'}: name it by --column"
            )
        image, *others = sorted(known, key=lambda name: (RANKS.get(kinds[name], 2), usual.get(name, len(COLUMNS))))
        if id is None and kinds[image] in (IMAGES, BYTES):
            id = next((name for name in others if kinds[name] == ADDRESSES), None)
        read = f"column {image!r}" + ("" if id is None else f", ids from {id!r}")
        note = f"images of {address!r} are read from {read}; --column and --id-column choose others"
        return _checked(Choice(image, id, note if others else None), address, kinds)


def _named(wanted: str, names: Iterable[str], address: str) -> str:
    """Return the column of this name; case does not count if a single one is spelled so. Raises InputError."""
    known = list(names)
    same = [name for name in known if name.casefold() == wanted.casefold()]
    if wanted in known or len(same) == 1:
        return wanted if wanted in known else same[0]
    raise InputError(f"no column {wanted!r} in {address!r}, expected one of {', '.join(known)}")


def _checked(choice: Choice, address: str, kinds: Mapping[str, str]) -> Choice:
    if (kind := kinds[choice.image]) not in RANKS:
        raise InputError(
            f"column {choice.image!r} of {address!r} is {kind}, expected paths, or the bytes of images: "
            f"name another by --column"
        )
    return choice


def open_source(address: str, columns: Columns = Columns()) -> Source:
    """Open the source at a path, a URL or a pattern, see `KINDS`.

    Raises InputError if it is no source or does not exist, or if a package for it is missing.
    """
    check_protocol(address)
    address = local_path(address)
    if not is_url(address) and not is_pattern(address) and not Path(address).exists():
        raise InputError(f"{address!r} does not exist, expected {EXPECTED}")
    if "::" in address and is_url(address) and is_pattern(address):
        raise InputError(f"{address!r} is a pattern in another file, expected the name of one file there")
    if _ends(*COMPRESSED)(address) or (is_url(address) and _ends(*GZIPPED)(address)):
        raise InputError(f"{address!r} is compressed, and its images cannot be read one by one: unpack it to .tar")
    if _ends(*ARCHIVES)(address):
        raise InputError(f"{address!r} is an archive that cannot be read in place: unpack it, and pass the folder")
    kind = next((name for name, (is_it, _) in KINDS.items() if is_it(address)), None)
    if kind is None:
        raise InputError(f"{address!r} is not a source of images, expected {EXPECTED}")
    source = KINDS[kind][1](address, columns)
    chosen = ", ".join(f"{name} {value!r}" for name, value in (("column", columns.image), ("ids", columns.id)) if value)
    return replace(source, columns=chosen or None, address=address)  # other columns mean other images


# Files ----------------------------------------------------------------------------------------------------------------


def _folder(address: str, columns: Columns) -> Source:
    root = address.rstrip("/") if is_url(address) else str(Path(address).absolute())

    top = f"{address.rstrip('/')}/"
    return Source("folder", root, lambda passed_over: walk(top, passed_over=passed_over, seconds=columns.read_timeout))


def _pattern(address: str, columns: Columns) -> Source:
    return Source("pattern", root_of(address), partial(matches, address, seconds=columns.read_timeout))


# Lists ----------------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A line or row of a list."""

    place: str
    id: str | None
    path: str | None
    error: str | None = None


_Rows = Callable[[], Iterator[_Entry]]


def _list(address: str, rows: _Rows, note: str | None = None) -> Source:
    """Open a list of ids and paths; relative paths are relative to its folder."""
    folder = root_of(address)
    first = next((entry.path for entry in rows() if entry.path), "")
    is_relative = not (is_url(first) or local_path(first).startswith("/"))
    root = folder if is_relative else None
    return Source("list", root, lambda passed_over: (_listed(folder, entry) for entry in rows()), note=note)


def _listed(folder: str, entry: _Entry) -> Item:
    """Return the item of an entry; an invalid entry gives an item with an error that says where and why."""
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
    if "\0" in whole:
        return "has a NUL character in its path: if the list is UTF-16 without a byte order mark, save it as UTF-8"
    try:
        check_protocol(whole)
    except InputError as error:
        return f"is {entry.path!r}: {error}"
    if printable(whole) != whole and not os.path.lexists(whole):
        return "is not UTF-8 text, and no file has its bytes for a name"
    return None


def _text(address: str, columns: Columns) -> Source:
    return _list(address, partial(_lines, address, columns))


def _lines(address: str, columns: Columns) -> Iterator[_Entry]:
    with _text_of(address, columns.read_timeout) as text:
        for number, line in enumerate(text, start=1):
            if path := line.strip():
                yield _Entry(f"line {number}", path, path)


_MARKS = {  # byte order marks, longest first: one is the start of another
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextmanager
def _text_of(address: str, seconds: float) -> Iterator[Iterator[str]]:
    """Yield the lines of a file: UTF-8, of which other bytes are kept for names of files, or the encoding of its byte
    order mark.

    Marks at the start of later lines are dropped, too: lists are put together from several. Whatever goes wrong is an
    InputError about the file.
    """
    with input_errors(address), open_file(address, seconds) as file:
        start = cast(io.BufferedReader, file).peek(4)
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
        errors = "surrogateescape" if encoding is None else "replace"
        with io.TextIOWrapper(file, encoding or "utf-8", errors, newline="\n") as text:
            yield (line.removeprefix("\ufeff") for line in text)


def _csv(address: str, columns: Columns) -> Source:
    with _text_of(address, columns.read_timeout) as text:
        names = _table(address, text).fieldnames or []
    choice = columns.choose(address, dict.fromkeys(names, ADDRESSES))
    return _list(address, partial(_csv_rows, address, columns.read_timeout, choice), choice.note)


def _table(address: str, text: Iterator[str]) -> "csv.DictReader[str]":
    return csv.DictReader(text, delimiter="\t" if _ends(".tsv")(address) else ",")


def _csv_rows(address: str, seconds: float, choice: Choice) -> Iterator[_Entry]:
    with _text_of(address, seconds) as text:
        rows = _table(address, text)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield _Entry(f"line {rows.reader.line_num}", None, None, f"cannot be read: {error}")
                continue
            path, id = ((row.get(name) or "").strip() for name in (choice.image, choice.id or choice.image))
            yield _Entry(f"line {rows.line_num}", id, path)


# Containers -----------------------------------------------------------------------------------------------------------


_Inside = Callable[[str, str, PassedOver], Iterator[Item]]


def _tars(address: str, columns: Columns) -> Source:
    return _containers("tar", address, partial(_tar, seconds=columns.read_timeout), columns.read_timeout)


def _containers(kind: str, address: str, inside: _Inside, seconds: float, note: str | None = None) -> Source:
    """Open all files at `address`; a file that cannot be read to its end is an item with the error."""

    def listing(passed_over: PassedOver) -> Iterator[Item]:
        for file in matches(address, seconds=seconds):
            if file.error:
                yield file
                continue
            try:
                yield from inside(file.source, file.id, passed_over)
            except Exception as error:
                yield file._replace(error=f"cannot be read to its end: {describe_error(error)}")

    return Source(kind, root_of(address), listing, note=note)


class _Link(NamedTuple):
    """A link in a tar: its name, what kind it is, and the path it leads to."""

    name: str
    kind: str
    target: str


def _tar(path: str, name: str, passed_over: PassedOver, seconds: float) -> Iterator[Item]:
    """Yield the images in a tar. A link to another file in it is that file under a name of its own."""
    if is_url(path):
        within(seconds, fetch_part, path, 1, 1, seconds)  # a failure is one error, not one per image
    links: dict[str, _Link] = {}
    for member in _members(path, seconds):
        if member.isdir() or not passed_over.takes(member.name):
            continue
        if is_whole(member):
            yield _in_tar(path, name, member.name, member)
        elif member.issym() or member.islnk():
            links[posixpath.normpath(member.name)] = _link(member)
        else:
            passed_over.add("sparse files" if member.isreg() else "pipes and devices")
    ends: dict[str, list[_Link]] = {}
    for link in links.values():
        ends.setdefault(_end(link, links), []).append(link)
    if ends:  # second reading: link targets were unknown in the first, and keeping all names would take memory
        for member in filter(is_whole, _members(path, seconds)):
            for link in ends.pop(posixpath.normpath(member.name), ()):
                yield _in_tar(path, name, link.name, member)
    for link in chain.from_iterable(ends.values()):
        passed_over.add(f"{link.kind} links to what is not in the tar")


def _link(member: Any) -> _Link:
    folder, kind = ("", "hard") if member.islnk() else (posixpath.dirname(member.name), "symbolic")
    return _Link(member.name, kind, posixpath.normpath(posixpath.join(folder, member.linkname)))


def _end(link: _Link, links: Mapping[str, _Link]) -> str:
    """Return where a chain of links ends; None for a circular chain."""
    for _ in range(40):  # as many as file systems follow
        if link.target not in links:
            break
        link = links[link.target]
    return link.target


def _members(path: str, seconds: float) -> Iterator[Any]:
    with open_tar(path, seconds) as file:
        yield from tar_members(file)


def _in_tar(path: str, name: str, called: str, member: Any) -> Item:
    return _in_archive("tar", path, name, called, member.name, member.offset_data, member.size)


def _in_archive(
    kind: str, path: str, name: str, called: str, member: str, offset: int, size: int, error: str | None = None
) -> Item:
    """Return an image in an archive: `called` is its own name there, `member` that of the file with its bytes."""
    source = f"{kind}://{member}::{path}"  # as fsspec writes it
    error = "its name leads out of the archive" if leads_out(called) else error
    return Item(f"{name}/{printable(called.lstrip('/'))}", source, path, offset, size, error)


def _zips(address: str, columns: Columns) -> Source:
    return _containers("zip", address, partial(_zip, seconds=columns.read_timeout), columns.read_timeout)


def _zip(path: str, name: str, passed_over: PassedOver, seconds: float) -> Iterator[Item]:
    """Yield the images in a zip."""
    with open_file(path, seconds) as file, ZipFile(file) as archive:
        for member in archive.infolist():
            called = member.filename
            if member.is_dir() or not passed_over.takes(called):
                continue
            if S_ISLNK(member.external_attr >> 16):
                passed_over.add("symbolic links in zips")
            else:
                yield _in_archive("zip", path, name, called, called, 0, member.file_size, zip_error(member))


def _parquet(address: str, columns: Columns) -> Source:
    """Open a column as a list of paths if it has text, as images if it has bytes."""
    first, fields = _schema(address, columns.read_timeout)
    choice = columns.choose(first, {field.name: _kind(field.type) for field in fields})
    if _kind(fields.field(choice.image).type) == ADDRESSES:
        return _list(address, partial(_parquet_paths, address, columns.read_timeout, choice), choice.note)
    rows = partial(_parquet_rows, columns=columns, choice=choice)
    return _containers("parquet", address, rows, columns.read_timeout, choice.note)


def _kind(kind: Any) -> str:
    """Return what a column of a table holds, by its type in Arrow."""
    from pyarrow import types

    while types.is_dictionary(kind) or hasattr(kind, "storage_type"):
        kind = kind.value_type if types.is_dictionary(kind) else kind.storage_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return ADDRESSES
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return BYTES
    is_image = types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}  # as `datasets` keeps them
    return IMAGES if is_image else str(kind)


def _schema(address: str, seconds: float) -> tuple[str, Any]:
    """Return the first readable file, and its fields. Raises InputError if there is none."""
    broken: InputError | None = None
    for file in matches(address, seconds=seconds):
        try:
            with input_errors(file.source):
                return file.source, parquet_file(file.source, seconds).schema_arrow
        except InputError as error:
            broken = broken or error
    raise broken or InputError(f"{address!r} matches no file, expected at least one")


def _parquet_paths(address: str, seconds: float, choice: Choice) -> Iterator[_Entry]:
    """Yield the paths in the files that `address` means; relative paths in another folder than the root get that
    folder."""
    wanted = list(dict.fromkeys([choice.image, choice.id or choice.image]))
    for file in matches(address, seconds=seconds):
        number, folder = 0, file.id.rpartition("/")[0]
        try:
            for batch in parquet_file(file.source, seconds).iter_batches(4096, columns=wanted):
                for row in batch.to_pylist():
                    path = _below(folder, row[choice.image])
                    id = path if choice.id is None else row[choice.id]
                    yield _Entry(f"row {number} of {file.id}", _id(id), path)
                    number += 1
        except Exception as error:
            yield _Entry(file.id, file.id, file.source, f"cannot be read to its end: {describe_error(error)}")


def _below(folder: str, path: str | None) -> str | None:
    """Return a relative path below a folder; others as they are."""
    if not folder or not path or is_url(path) or local_path(path).startswith("/"):
        return path
    return f"{folder}/{path}"


def _id(value: Any) -> str | None:
    """Return a cell as an id, None if it is empty."""
    return None if value is None else str(value).strip() or None


def _parquet_rows(path: str, name: str, passed_over: PassedOver, columns: Columns, choice: Choice) -> Iterator[Item]:
    file = parquet_file(path, columns.read_timeout)
    ids: Iterable[Any] = repeat(None, file.metadata.num_rows)
    if choice.id is not None:
        ids = chain.from_iterable(batch.column(0).to_pylist() for batch in file.iter_batches(4096, columns=[choice.id]))
    return _rows_of(path, f"{name}/", ids, columns, column=choice.image)


def _rows_of(path: str, prefix: str, ids: Iterable[Any], columns: Columns, **where: str) -> Iterator[Item]:
    """Yield the images in rows of a table. A row without an id has its position as one, unless a column of ids was
    requested: then it is an error."""
    for row, cell in enumerate(ids):
        place, id = f"{prefix}{row}", _id(cell)
        error = f"{place} has no id" if id is None and columns.id is not None else None
        yield Item(printable(id or place), f"{path}#{urlencode({**where, 'row': row})}", error=error)


def _dataset(address: str, columns: Columns) -> Source:
    """Open what `datasets` saved with `save_to_disk`."""
    root = str(Path(address).absolute())
    splits: dict[str, tuple[Any, Choice]] = {}
    for split, rows in saved_dataset(root).items():
        kinds = {field.name: _kind(field.type) for field in rows.features.arrow_schema}
        splits[split] = rows, columns.choose(address, kinds)

    def listing(passed_over: PassedOver) -> Iterator[Item]:
        for split, (rows, choice) in splits.items():
            ids: Iterable[Any] = repeat(None, len(rows))
            if choice.id is not None:
                ids = (row[choice.id] for row in rows.select_columns([choice.id]))
            prefix = f"{split}/" if split else ""
            yield from _rows_of(root, prefix, ids, columns, split=split, column=choice.image)

    return Source("dataset", root, listing, note=next((choice.note for _, choice in splits.values()), None))


# The table ------------------------------------------------------------------------------------------------------------


def _is_dataset(address: str) -> bool:
    return not is_url(address) and any((Path(address) / name).exists() for name in ("state.json", "dataset_dict.json"))


def _is_folder(address: str) -> bool:
    return address.endswith("/") if is_url(address) else Path(address).is_dir()


def _ends(*endings: str) -> Callable[[str], bool]:
    return lambda address: (address.partition("?")[0] if is_url(address) else address).lower().endswith(endings)


_Open = Callable[[str, Columns], Source]
KINDS: Mapping[str, tuple[Callable[[str], bool], _Open]] = {
    "dataset": (_is_dataset, _dataset),
    "folder": (_is_folder, _folder),
    "tar": (_ends(".tar", *GZIPPED), _tars),
    "zip": (_ends(".zip"), _zips),
    "parquet": (_ends(".parquet", ".pq"), _parquet),
    "csv": (_ends(".csv", ".tsv"), _csv),
    "text": (_ends(".txt", ".lst", ".list"), _text),
    "pattern": (is_pattern, _pattern),
}
"""Kinds of sources, of which the first that fits is taken: how to recognise it, and how to open it."""

COMPRESSED = tuple(
    ending for kind in ("bz2", "xz", "zst") for ending in (f".tar.{kind}", f".t{kind.removesuffix('2')}")
)

ARCHIVES = (".7z", ".rar")

EXPECTED = (
    "a folder (a remote one with / at its end), a pattern such as 'photos/**/*.jpg', a list of paths or URLs "
    "(.txt, .csv, .tsv, .parquet), archives (.tar, .tar.gz, .tgz, .zip), Parquet with the bytes of images, or a data "
    "set that `datasets` saved on disk"
)
