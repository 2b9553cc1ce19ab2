"""Output of exporters: a folder that exists whole or not at all, files named by image ids, JSON item by item."""

import errno
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from PIL import Image

from open_gem.files import to_json
from open_gem.label.sources import ENDINGS

IMAGE_ENDINGS = frozenset({*ENDINGS, ".dng", ".heic", ".heif", ".mpo"})
LONGEST = 200  # maximum bytes of one part of a path; file systems allow 255, ending included
ODD = r'[\x00-\x1f\x7f<>:"|?*]'  # characters in a path that some file system refuses
OF_A_LINE = ODD + r"|[\x80-\x9f\u2028\u2029]|^\s|\s$|^#"  # and those that readers of lists strip, or take for a comment
SCHEME = r"[A-Za-z][A-Za-z0-9+.-]+://"
TWIN = (
    "belongs to another image: keep this image out of the exported set, where readers would give it the other's labels"
)

OF_THE_NAME = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)  # about one image, not the disk


def name_of(image_id: str, odd: str = ODD) -> PurePosixPath:
    """Return an image's id as a relative path that every file system accepts: no scheme, no way out of the folder, no
    characters that the pattern `odd` matches in one of its parts.

    "a/b.jpg" and "https://host/b.jpg" keep what they say; one that loses letters has some of its hash behind, so that
    it is no other's: "b?.jpg" becomes "b_-42768118.jpg".
    """
    path = re.sub(rf"^{SCHEME}", "", image_id)
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")] or ["image"]
    fit = [_short(part, odd) for part in parts]
    name = PurePosixPath(*fit)
    return name if str(name) == path.lstrip("/") else _marked(name, image_id)


def _marked(name: PurePosixPath, image_id: str) -> PurePosixPath:
    """Return the name with a few digits of the id's hash behind its base."""
    base, ending = _split(name.name)
    return name.with_name(f"{base}-{hashlib.sha256(image_id.encode()).hexdigest()[:8]}{ending}")


def path_of(image_id: str) -> str:
    """Return where the image is: its id; for a URL, where it would be once it is downloaded."""
    return str(name_of(image_id)) if re.match(SCHEME, image_id) else image_id


def _short(part: str, odd: str) -> str:
    """Return the part of a path without odd characters, within the length that file systems allow; the ending stays."""
    base, ending = (re.sub(odd, "_", text) for text in _split(part))
    limit = LONGEST - len(ending.encode())
    return base.encode()[:limit].decode("utf-8", "ignore") + ending


def _split(name: str) -> tuple[str, str]:
    """Split a name before its ending, if that is an image's: "v1.2" has none."""
    path = PurePosixPath(name)
    return (path.stem, path.suffix) if path.suffix.lower() in IMAGE_ENDINGS else (name, "")


@dataclass(frozen=True)
class Output:
    """The folder of a format, and what to call for images that it cannot hold.

    folder  new and empty
    skip    called with an image's id and the reason: it is left out
    note    called with an image's id and what is left out of it
    """

    folder: Path
    skip: Callable[[str, str], None]
    note: Callable[[str, str], None]

    def place(self, kind: str, image_id: str, ending: str, **settings: Any) -> Path | None:
        """Return the path of an image's file of some kind; `settings` as of `places`."""
        paths = self.places(image_id, (kind, ending), **settings)
        return None if paths is None else paths[0]

    def places(
        self,
        image_id: str,
        *kinds: tuple[str, str],
        odd: str = ODD,
        move: Callable[[PurePosixPath], PurePosixPath] = lambda file: file,
    ) -> list[Path] | None:
        """Return the paths of an image's files, one for each (folder, ending), all with one name; make their folders.

        odd   see `name_of`
        move  gives the path, relative to the format's folder, at which the file of such a path has to be

        Returns None and calls `skip` if another image has one of them ("a.jpg" and "a.png" share a name in formats that
        drop the ending) or no file can have such a name: an image has all its files or none.
        """
        name = name_of(image_id, odd)
        names = [name] if str(name) == image_id else [name, _marked(name, image_id)]  # "http://h/a" and "https://h/a"
        files = [
            [move(PurePosixPath(kind, name.with_name(_split(name.name)[0] + ending))) for kind, ending in kinds]
            for name in names
        ]
        reasons: list[str] = []
        for paths in files:
            refused = [f"its file {file} {reason}" for file in paths if (reason := self._why_not(self.folder / file))]
            if not refused:
                return [self.folder / file for file in paths]
            reasons += refused
        self.skip(image_id, reasons[0])
        return None

    def _why_not(self, path: Path) -> str | None:
        """Return why no file can be made there, None if one can; make its folder."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            taken = path.exists()
        except OSError as error:
            if error.errno not in OF_THE_NAME:
                raise
            return f"cannot be written: {error.strerror}"
        return TWIN if taken else None


def xml_text(text: str) -> str:
    """Return the text without the characters that XML cannot hold."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text)


class Items:
    """A JSON array in a file, written item by item."""

    def __init__(self, file: BinaryIO):
        self._file, self._before = file, b"\n"

    def add(self, item: Any) -> None:
        self._file.write(self._before + to_json(item).encode())
        self._before = b",\n"


@contextmanager
def json_array(path: Path) -> Iterator[Items]:
    """Open a file that holds one JSON array."""
    with path.open("xb") as file:
        file.write(b"[")
        yield Items(file)
        file.write(b"\n]\n")


@contextmanager
def json_arrays(path: Path, head: dict[str, Any], *names: str) -> Iterator[tuple[Items, ...]]:
    """Open a file that holds one JSON object: the contents of `head`, and arrays called `names`, which may grow side by
    side."""
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in names]
        yield tuple(Items(file) for file in files)
        file = stack.enter_context(path.open("xb"))
        file.write(("{" + ",\n".join(f"{to_json(name)}: {to_json(value)}" for name, value in head.items())).encode())
        for name, array in zip(names, files, strict=True):
            array.seek(0)
            file.write(f",\n{to_json(name)}: [".encode())
            shutil.copyfileobj(array, file)
            file.write(b"\n]")
        file.write(b"}\n")


def save_map(path: Path | BinaryIO, labels: Any, colors: bytes | None = None) -> None:
    """Save integers `(y, x)` as PNG: with a palette, 8 bits; without, 16 bits."""
    image = Image.fromarray(labels.astype("uint16" if colors is None else "uint8"))
    if colors is not None:
        image.putpalette(colors)
    image.save(path, format="PNG")
