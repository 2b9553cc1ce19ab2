"""Output of exporters: a folder that exists whole or not at all, files named by image ids, JSON item by item."""

import errno
import hashlib
import io
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from PIL import Image

from open_gem.errors import ImageError, OutputError
from open_gem.export.labelled import LabelledImage
from open_gem.export.split import UNSPLIT, Split
from open_gem.files import to_json
from open_gem.label.reading import Item, is_url, read
from open_gem.label.sources import ENDINGS

LINKS = ("hard", "sym", "copy")

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
    split   gives the set of each image
    link    how images get into the folder, a name of `LINKS`; "": they do not
    """

    folder: Path
    skip: Callable[[str, str], None]
    note: Callable[[str, str], None]
    split: Split = UNSPLIT
    link: str = ""

    def place(self, kind: str, image: LabelledImage, ending: str, **settings: Any) -> Path | None:
        """Return the path of an image's file of some kind; `settings` as of `places`."""
        paths = self.places(image, (kind, ending), **settings)
        return None if paths is None else paths[0]

    def places(
        self,
        image: LabelledImage,
        *kinds: tuple[str, str],
        odd: str = ODD,
        move: Callable[[PurePosixPath], PurePosixPath] = lambda file: file,
        images: str | None = None,
        ending: str | None = None,
    ) -> list[Path] | None:
        """Return the paths of an image's files, one for each (folder, ending), all with one name; make their folders.
        If images are linked, put the image into the folder `images`: its path is then the last.

        odd     see `name_of`
        move    gives the path, relative to the format's folder, at which the file of such a path has to be
        images  folder of the images in this format; None: it has none
        ending  that readers expect of them; None: the image's own

        Returns None and calls `skip` if another image has one of them ("a.jpg" and "a.png" share a name in formats that
        drop the ending), no file can have such a name, or the image cannot be linked: an image has all its files or
        none.
        """
        linked = None if images is None or not self.link else self._source(image)
        if isinstance(linked, str):
            self.skip(image.id, linked)
            return None
        name = name_of(image.id, odd)
        names = [name] if str(name) == image.id else [name, _marked(name, image.id)]  # "http://h/a" and "https://h/a"
        reasons: list[str] = []
        for name in names:
            base, own = _split(name.name)
            files = [move(PurePosixPath(kind, name.with_name(base + suffix))) for kind, suffix in kinds]
            if linked is not None:
                files.append(PurePosixPath(images or "", name.with_name(base + (ending or own or _ending(linked)))))
            refused = [f"its file {file} {reason}" for file in files if (reason := self._why_not(self.folder / file))]
            if not refused:
                paths = [self.folder / file for file in files]
                if linked is not None:
                    self._put(linked, paths[-1])
                return paths
            reasons += refused
        self.skip(image.id, reasons[0])
        return None

    def _source(self, image: LabelledImage) -> bytes | Path | str:
        """Return the file of an image, or its bytes if it is to be copied from an archive, a table or a URL; a reason
        if there is none."""
        cannot = f"is no file of its own and cannot be linked: {image.source}; --link-images copy writes it"
        if self.link != "copy" and is_url(image.source):
            return cannot
        try:
            content = read(Item(image.id, image.source))
        except ImageError as error:
            return f"its image {error}"
        return cannot if self.link != "copy" and isinstance(content, bytes) else content

    def _put(self, content: bytes | Path, path: Path) -> None:
        """Put an image at a path. Raises OutputError if no link can be made there."""
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif self.link == "copy":
            shutil.copyfile(content, path)
        elif self.link == "sym":
            path.symlink_to(content.absolute())
        else:
            try:
                path.hardlink_to(content.resolve())
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM):
                    raise
                raise OutputError(
                    f"cannot make a hard link to {str(content)!r}: {error.strerror}; use --link-images sym or copy"
                ) from error

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


def _ending(content: bytes | Path) -> str:
    """Return the ending that an image without one gets: that of its file, or of its format."""
    if isinstance(content, Path) and content.suffix.lower() in IMAGE_ENDINGS:
        return content.suffix
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            kind = image.format or ""
    except Exception:  # it was labelled, but is no image any more
        return ""
    return {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}.get(kind, f".{kind.lower()}")


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


@contextmanager
def name_lists(folder: Path, names: Iterable[str]) -> Iterator[dict[str, Callable[[Path], None]]]:
    """Open a list for each name, `<name>.txt` in a new folder: what adds the path of a file to it, without its
    ending."""
    with ExitStack() as stack:
        lists: dict[str, Callable[[Path], None]] = {}
        for name in names:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / f"{name}.txt").open("x", encoding="utf-8"))
            lists[name] = lambda path, file=file: print(path.with_suffix("").as_posix(), file=file)
        yield lists


def save_map(path: Path | BinaryIO, labels: Any, colors: bytes | None = None) -> None:
    """Save integers `(y, x)` as PNG: with a palette, 8 bits; without, 16 bits."""
    image = Image.fromarray(labels.astype("uint16" if colors is None else "uint8"))
    if colors is not None:
        image.putpalette(colors)
    image.save(path, format="PNG")
