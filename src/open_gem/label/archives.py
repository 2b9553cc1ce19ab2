"""Members of archives, read in place: tars, gzip or not, and zips. Nothing is unpacked to the disk.

An archive may be made to fill memory or take for ever: what expands to far more than it takes up is refused.
"""

import gzip
import io
import posixpath
import tarfile
from collections import deque
from collections.abc import Iterator
from threading import Lock
from typing import Any, BinaryIO
from zipfile import ZipFile, ZipInfo

from open_gem.errors import ImageError
from open_gem.label.remote import MAX_BYTES

GZIPPED = (".tar.gz", ".tgz")
MAX_EXPANSION, ALWAYS = (
    100,
    2**26,
)  # greatest ratio of bytes to compressed bytes; bytes that may be as small as they are
WINDOW, CHUNK = 2**27, 2**20  # bytes of a gzip file that are kept, for threads that read nearly in order; of one step
MAX_HEADER = 2**24  # bytes of a header in a tar: names, not images


def check_size(size: int, packed: int | None = None) -> None:
    """Raise ImageError for a member of too many bytes, or of far more than it takes up (`packed`) in its archive."""
    if size > MAX_BYTES:
        raise ImageError(f"has more than {MAX_BYTES} bytes, expected an image")
    if packed is not None and size > max(ALWAYS, MAX_EXPANSION * packed):
        raise ImageError(f"expands to more than {MAX_EXPANSION} times its size, expected an image")


def leads_out(name: str) -> bool:
    """Return True if the name of a member leads out of its archive, such as "../a.jpg"."""
    return posixpath.normpath(name.lstrip("/")).split("/")[0] == ".."


# Zips -----------------------------------------------------------------------------------------------------------------


def zip_error(member: ZipInfo) -> str | None:
    """Return why a member cannot be read; None if it can."""
    if member.flag_bits & 1:
        return "is encrypted: unpack the archive, and pass the folder"
    try:
        check_size(member.file_size, member.compress_size)
    except ImageError as error:
        return str(error)
    return None


def zip_member(archive: ZipFile, name: str) -> bytes:
    """Return the bytes of a member. Raises ImageError, or an error of zipfile."""
    member = archive.getinfo(name)
    if error := zip_error(member):
        raise ImageError(error)
    with archive.open(member) as file:
        return file.read(member.file_size)  # without a number, it would expand all there is


# Tars -----------------------------------------------------------------------------------------------------------------


def tar_members(file: Any) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar that is open, none of which is kept."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or it keeps all of them
            yield member


def is_whole(member: tarfile.TarInfo) -> bool:
    """Return True if a member is a file whose bytes lie together."""
    return member.isreg() and not member.issparse()


class Gunzipped(io.RawIOBase):
    """What is in a gzip file, to be read nearly in order: further back than `WINDOW` means from the start again.

    `part` may be called by several threads. Raises ImageError for a file that expands to too much.
    """

    def __init__(self, file: BinaryIO, window: int = WINDOW):
        self._file, self._window = file, window
        self._content = gzip.GzipFile(fileobj=file)
        self._lock, self._place = Lock(), 0
        self._kept: deque[tuple[int, bytes]] = deque()  # pieces, and where each begins
        self._end = 0

    def part(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer at the end of the content."""
        with self._lock:
            if offset < (self._kept[0][0] if self._kept else self._end):
                self._content.rewind()
                self._kept.clear()
                self._end = 0
            while self._end < offset + size and (piece := self._content.read(CHUNK)):
                self._kept.append((self._end, piece))
                self._end += len(piece)
                if self._end > max(ALWAYS, MAX_EXPANSION * self._file.tell()):
                    raise ImageError(f"expands to more than {MAX_EXPANSION} times its size, expected images")
                while self._kept and self._kept[0][0] + len(self._kept[0][1]) <= min(offset, self._end - self._window):
                    self._kept.popleft()
            wanted = [
                piece[max(offset - start, 0) : offset + size - start]
                for start, piece in self._kept
                if start < offset + size and offset < start + len(piece)
            ]
        return b"".join(wanted)

    # As a file, which is how tarfile reads headers

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._place = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise ImageError(f"has a header of more than {MAX_HEADER} bytes, expected a tar of images")
        content = self.part(self._place, size)
        self._place += len(content)
        return content

    def close(self) -> None:
        self._file.close()
        super().close()
