"""The files that a folder, a path, a URL or a pattern means, as items: an id, and where the image's bytes are."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from glob import has_magic
from importlib.util import find_spec
from pathlib import Path

from open_gem.label.reading import READ_TIMEOUT, Item, describe_error, is_url, within
from open_gem.label.remote import folder

HEIF = frozenset({".heic", ".heif", ".hif"})
"""Endings of phones' images, which PIL reads with the package `pillow_heif` alone."""

ENDINGS = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
        *(".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
        *(HEIF if find_spec("pillow_heif") else ()),
    }
)
"""Endings of images in folders and tars, in either case; other files are skipped, and counted."""


class PassedOver(Counter[str]):
    """Counts of files that a listing left out, by ending, or by kind ("hidden", "symbolic links")."""

    MOST = 50  # maximum number of endings that are counted by name: any text may follow the last dot

    def add(self, kind: str, count: int = 1) -> None:
        self[kind if kind in self or len(self) < self.MOST else "others"] += count

    def takes(self, name: str) -> bool:
        """Return True if a file name is an image's, by its ending; count it otherwise."""
        base = re.split(r"[/\\]", name)[-1]
        ending = os.path.splitext(base)[1].lower()  # noqa: PTH122 - of any system
        if base.startswith("."):
            self.add("hidden")
        elif ending not in ENDINGS:
            self.add(printable(ending) or "without an ending")
        else:
            return True
        return False

    def ordered(self) -> dict[str, int]:
        """Return the counts, largest first, whatever order the files came in."""
        return dict(sorted(self.items(), key=lambda pair: (-pair[1], pair[0])))

    def __str__(self) -> str:
        """Format for people: "2 .heic (pip install 'open_gem[heif]'), 1 hidden"."""
        hints = dict.fromkeys(HEIF, " (pip install 'open_gem[heif]')")
        return ", ".join(f"{count} {kind}{hints.get(kind, '')}" for kind, count in self.ordered().items())


# Folders and patterns -------------------------------------------------------------------------------------------------


ALL = ("**",)  # everything in and below a folder


def walk(
    top: str,
    segments: Sequence[str] = ALL,
    passed_over: PassedOver | None = None,
    seconds: float = READ_TIMEOUT,
    below: str = "",
    at: frozenset[int] | None = None,
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[Item]:
    """Yield the files below `top`, a path or URL that ends with /, whose names match a pattern; ids are relative to
    `top`.

    segments     the pattern between its slashes
    passed_over  counts what is no image; None: every file is meant
    seconds      timeout for listing one remote folder
    below …      for folders inside: their path, the segments that may match next, and the folders that hold them

    Links are followed, but never in circles (wcmatch lists an image of a circle 40 times). Local files come unsorted,
    since sorting would keep all names of a folder. A folder that cannot be listed is an item with the error.
    """
    place, at = f"{top}{below}" or ".", _with_skipped(segments, {0}) if at is None else at
    try:
        if not is_url(place):
            status = os.stat(place)  # noqa: PTH116 - ten million times
            if (me := (status.st_dev, status.st_ino)) in above:
                return
            above |= {me}
        for name, is_folder in _entries(place, seconds):
            after = _after(name, segments, at)
            inside = f"{below}/{name}" if below else name
            if not after:
                if segments is ALL and passed_over is not None:  # a pattern skips other names on purpose
                    passed_over.add("hidden")
            elif is_folder:
                yield from walk(top, segments, passed_over, seconds, inside, after, above)
            elif len(segments) in after and (passed_over is None or passed_over.takes(name)):
                yield Item(printable(inside), f"{top}{inside}")
    except Exception as error:  # any error of the library behind a URL
        yield Item(printable(below or "."), place, error=f"cannot list this folder: {describe_error(error)}")


def _entries(place: str, seconds: float) -> Iterator[tuple[str, bool]]:
    """Yield the names in a folder, and whether each is a folder; broken and circular links are none."""
    if is_url(place):
        yield from within(seconds, folder, place, seconds)
        return
    with os.scandir(place) as entries:
        for entry in entries:
            try:
                yield entry.name, entry.is_dir()
            except OSError:
                yield entry.name, False


def _after(name: str, segments: Sequence[str], at: frozenset[int]) -> frozenset[int]:
    """Return which segments may match next after a name, if those `at` may match it; their number after the last one.

    ** stands for any folders, or none; no wildcard stands for the dot of a hidden name.
    """
    hidden = name.startswith(".")
    if segments is ALL:
        return frozenset() if hidden else at
    after = set()
    for index in at - {len(segments)}:
        segment = segments[index]
        if segment == "**":
            after |= set() if hidden else {index}
        elif fnmatchcase(name, segment) and (segment.startswith(".") or not hidden):
            after.add(index + 1)
    return _with_skipped(segments, after)


def _with_skipped(segments: Sequence[str], at: Iterable[int]) -> frozenset[int]:
    """Return the segments, and those behind any ** among them."""
    after = set(at)
    for index, segment in enumerate(segments):
        if index in after and segment == "**":
            after.add(index + 1)
    return frozenset(after)


def matches(address: str, passed_over: PassedOver | None = None, seconds: float = READ_TIMEOUT) -> Iterator[Item]:
    """Yield the files that a path, URL or pattern means; `passed_over` and `seconds` as of `walk`."""
    root, has_pattern = root_of(address), is_pattern(address)
    for path in expand(address) if has_pattern else [address]:
        if not has_pattern or not _has_wildcards(path):
            if passed_over is None or passed_over.takes(path):
                yield Item(printable(below_root(root, path)), path)
            continue
        top = _before(path)
        if not is_url(top) and not Path(top or ".").is_dir():
            continue
        between = printable(below_root(root, top)).strip("/")  # what braces before the first wildcard expand to
        prefix = f"{between}/" if between else ""
        for item in walk(top, tuple(filter(None, path.removeprefix(top).split("/"))), passed_over, seconds):
            yield item._replace(id=prefix + item.id) if prefix else item


def is_pattern(address: str) -> bool:
    """Return True if a path or URL has wildcards or braces, unless a file has that very name."""
    return (_has_wildcards(address) or bool(BRACES.search(address))) and (
        is_url(address) or not os.path.lexists(address)
    )


def _has_wildcards(address: str) -> bool:
    """Return True if there are wildcards. A question mark in a web address is none."""
    return "*" in address if address.startswith(("http://", "https://")) else has_magic(address)


BRACES = re.compile(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{},]*(?:,[^{},]*)+))\}")


def expand(address: str) -> Iterator[str]:
    """Expand braces: "{0..2}", "{008..010}", "{a,b}", as shells and WebDataset do."""
    if (braces := BRACES.search(address)) is None:
        yield address
        return
    first, last, names = braces.groups()
    if names is None:
        width = max(len(number) if number.startswith("0") else 0 for number in (first, last))
        step = 1 if int(first) <= int(last) else -1
        options: Iterable[str] = (str(number).zfill(width) for number in range(int(first), int(last) + step, step))
    else:
        options = names.split(",")
    for option in options:
        yield from expand(address[: braces.start()] + option + address[braces.end() :])


def _before(address: str) -> str:
    """Return what comes before the last / of a path, or of a pattern before its first wildcard; / included."""
    wild = re.search(r"[*?\[{]", address) if is_pattern(address) else None
    before, slash, _ = address[: wild.start() if wild else None].rpartition("/")
    return before + slash


def root_of(address: str) -> str:
    """Return the folder of a file, or of a pattern before its first wildcard; absolute if it is local."""
    before = _before(address)
    return before.removesuffix("/") if is_url(address) else str(Path(before or ".").absolute())


def below_root(root: str, path: str) -> str:
    if is_url(path):  # one place has several spellings, as s3://x and s3:///x
        from fsspec.core import strip_protocol

        return strip_protocol(path).removeprefix(strip_protocol(root)).lstrip("/")
    return str(Path(path).absolute()).removeprefix(root).lstrip("/")


def printable(text: str) -> str:
    """Return text that UTF-8 can hold: other bytes of a name become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
