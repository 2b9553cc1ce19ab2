"""How exporters write: a folder that is there whole or not at all, files named by image ids, JSON item by item."""

import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from uuid import uuid4

from PIL import Image

from open_gem.errors import OutputError
from open_gem.label.sources import ENDINGS

IMAGE_ENDINGS = frozenset({*ENDINGS, ".dng", ".heic", ".heif", ".mpo"})
LONGEST = 200  # bytes of one part of a path; file systems allow 255, and an ending comes behind
SCHEME = r"[A-Za-z][A-Za-z0-9+.-]+://"
OF_THE_NAME = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)  # errors of one image, not of the disk


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when all went well, and is gone otherwise. Raises OutputError."""
    temporary = folder.with_name(f".{folder.name}-{uuid4().hex}.tmp")
    try:
        try:
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot write {str(folder)!r}: {error.strerror or error}") from error


def name_of(image_id: str) -> PurePosixPath:
    """An image's id as a relative path that every file system takes: no scheme, no way out of the folder.

    "a/b.jpg" and "https://host/b.jpg" keep what they say; one that loses letters has some of its hash behind, so that
    it is no other's: "b?.jpg" becomes "b_-42768118.jpg".
    """
    path = re.sub(rf"^{SCHEME}", "", image_id)
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")] or ["image"]
    fit = [_short(re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", part)) for part in parts]
    name = PurePosixPath(*fit)
    return name if str(name) == path.lstrip("/") else _marked(name, image_id)


def _marked(name: PurePosixPath, image_id: str) -> PurePosixPath:
    """The name with letters behind its stem that are the id's own."""
    stem, ending = _split(name.name)
    return name.with_name(f"{stem}-{hashlib.sha256(image_id.encode()).hexdigest()[:8]}{ending}")


def path_of(image_id: str) -> str:
    """Where the picture truly is: its id as it is, but of an address where it would be, once it is fetched."""
    return str(name_of(image_id)) if re.match(SCHEME, image_id) else image_id


def _short(part: str) -> str:
    """Within the length that file systems allow; the ending stays."""
    stem, ending = _split(part)
    room = LONGEST - len(ending.encode())
    return stem.encode()[:room].decode("utf-8", "ignore") + ending


def _split(name: str) -> tuple[str, str]:
    """Before and from the ending, if it is one of a picture: "v1.2" has none."""
    path = PurePosixPath(name)
    return (path.stem, path.suffix) if path.suffix.lower() in IMAGE_ENDINGS else (name, "")


@dataclass(frozen=True)
class Output:
    """Where one format goes, and whom to tell of an image that it cannot hold.

    folder  new and empty
    skip    called with an image's id and the reason: the image is left out
    note    called with an image's id and what of it is not held: the rest is
    """

    folder: Path
    skip: Callable[[str, str], None]
    note: Callable[[str, str], None]

    def place(self, kind: str, image_id: str, ending: str) -> Path | None:
        """The path of an image's file of some kind, its folders made; None, and told, where another image has it
        ("a.jpg" and "a.png" share a name in formats that drop the ending) or no file can be called so."""
        name = name_of(image_id)
        names = [name] if str(name) == image_id else [name, _marked(name, image_id)]  # "http://h/a" and "https://h/a"
        reason = ""
        for one in names:
            path = self.folder / kind / one.with_name(_split(one.name)[0] + ending)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    return path
                reason = (
                    "belongs to another image: keep this image out of the exported set, where readers would give it "
                    "the other's labels"
                )
            except OSError as error:
                if error.errno not in OF_THE_NAME:
                    raise
                reason = f"cannot be written: {error.strerror}"
        file = name.with_name(_split(name.name)[0] + ending)
        self.skip(image_id, f"its file {PurePosixPath(kind, file)} {reason}")
        return None


class Items:
    """A JSON array in a file, written item by item."""

    def __init__(self, file: BinaryIO):
        self._file, self._before = file, b"\n"

    def add(self, item: Any) -> None:
        self._file.write(self._before + to_json(item))
        self._before = b",\n"


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": ")).encode("utf-8", "backslashreplace")


@contextmanager
def json_array(path: Path) -> Iterator[Items]:
    """A file that is one JSON array."""
    with path.open("xb") as file:
        file.write(b"[")
        yield Items(file)
        file.write(b"\n]\n")


@contextmanager
def json_arrays(path: Path, head: dict[str, Any], *names: str) -> Iterator[tuple[Items, ...]]:
    """A file that is one JSON object: what `head` has, and arrays called `names`, which may grow side by side."""
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in names]
        yield tuple(Items(file) for file in files)
        file = stack.enter_context(path.open("xb"))
        file.write(b"{" + b",\n".join(to_json(name) + b": " + to_json(value) for name, value in head.items()))
        for name, array in zip(names, files, strict=True):
            array.seek(0)
            file.write(b",\n" + to_json(name) + b": [")
            shutil.copyfileobj(array, file)
            file.write(b"\n]")
        file.write(b"}\n")


def save_map(path: Path | BinaryIO, labels: Any, colors: bytes | None = None) -> None:
    """Integers `(y, x)` as PNG: with a palette, 8 bits; without, 16 bits."""
    picture = Image.fromarray(labels.astype("uint16" if colors is None else "uint8"))
    if colors is not None:
        picture.putpalette(colors)
    picture.save(path, format="PNG")
