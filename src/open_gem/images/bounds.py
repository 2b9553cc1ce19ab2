"""Limits on what a file may demand of a decoder, checked on its header: PIL only checks the number of pixels, with its
own limit.

A file of a few bytes can declare a tile of 40,000×40,000 pixels, a megabyte can hold 20,000 scans of one image, and
blocks before an image are read one by one. This module counts them without decoding, and reads only their headers.
"""

import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import IO, NamedTuple

from PIL import ImageFile, TiffImagePlugin

from open_gem.errors import ImageError

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Formats that are opened, as PIL names them. PIL's other decoders are for formats that no camera or photo editor
writes; some of them run programs (EPS), hold files of other formats (ICO, ICNS) or unpack without limit (FITS)."""

MAX_BLOCKS = 65_536
"""Maximum number of chunks, segments, blocks or tags of a file: PIL reads each in Python, including those of 8 KiB of a
PNG of 500 MB."""

MAX_GIF_BLOCKS = 4_096
"""Maximum number of blocks before the first frame of a GIF: PIL joins those of a comment by copying all before."""

MAX_PAGES = 65_536
"""Maximum number of pages of a TIFF that are counted; there may be more."""

MAX_SCANS = 100
"""Maximum number of scans of a JPEG: progressive ones have about ten, and each goes over the whole image."""

SCANNED_IMAGES = 16
"""Scans times pixels, as a multiple of the limit of pixels."""


# Before a file is opened ----------------------------------------------------------------------------------------------


def check_blocks(stream: IO[bytes], start: bytes, name: str) -> None:
    """Refuse files with so many blocks that opening them would take long. Leaves `stream` at its start.

    Raises:
        ImageError: for too many.
    """
    walk, limit = next(((walk, limit) for magic, walk, limit in _WALKS if re.match(magic, start)), (None, 0))
    if walk is not None:
        blocks = sum(1 for _ in islice(walk(stream), limit + 1))
        stream.seek(0)
        if blocks > limit:
            raise ImageError(f"{name} has more than {limit} blocks, which is unusual for an image: save it again")


def _png(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the names of a PNG's chunks; the stream stands at the chunk's data."""
    position = 8
    while len(head := _at(stream, position, 8)) == 8:
        yield head[4:]
        position += 12 + int.from_bytes(head[:4], "big")


def _riff(stream: IO[bytes]) -> Iterator[bytes]:
    position = 12
    while len(head := _at(stream, position, 8)) == 8:
        yield head[:4]
        size = int.from_bytes(head[4:], "little")
        position += 8 + size + size % 2


def _jpeg(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the markers of a JPEG up to the first scan."""
    position = 2
    while len(head := _at(stream, position, 4)) == 4 and head[1:2] != b"\xda":
        yield head[1:2]
        plain = head[0] == 0xFF and 0xC0 <= head[1] <= 0xFE and not 0xD0 <= head[1] <= 0xD9
        position += 2 + max(2, int.from_bytes(head[2:], "big")) if plain else 1


def _gif(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the extensions of a GIF and their blocks up to the first frame."""
    flags = _at(stream, 10, 1)
    position = 13 + (3 << (flags[0] & 7) + 1 if flags and flags[0] & 128 else 0)
    while (kind := _at(stream, position, 1)) not in (b"", b",", b";"):
        yield kind
        position += 2 if kind == b"!" else 1
        while kind == b"!" and (size := _at(stream, position, 1)):
            position += 1 + size[0]
            if size[0] == 0:
                break
            yield size


def _tiff(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the tags of a TIFF's first page; those that do not fit count as too many."""
    yield from (b"" for _ in range(0 if tags_fit(stream) else MAX_BLOCKS + 1))


_WALKS: tuple[tuple[bytes, Callable[[IO[bytes]], Iterator[bytes]], int], ...] = (
    (rb"\x89PNG", _png, MAX_BLOCKS),
    (rb"RIFF....WEBP", _riff, MAX_BLOCKS),
    (rb"\xff\xd8", _jpeg, MAX_BLOCKS // 16),
    (rb"GIF8", _gif, MAX_GIF_BLOCKS),
    (rb"II[*+]\0|MM\0[*+]", _tiff, MAX_BLOCKS),
)


def _at(stream: IO[bytes], position: int, size: int) -> bytes:
    stream.seek(position)
    return stream.read(size)


# Pages of a TIFF ------------------------------------------------------------------------------------------------------


class _Tag(NamedTuple):
    bytes: int
    value: int  # if it is one whole number


_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def count_pages(stream: IO[bytes]) -> int:
    """Count the pages of a TIFF that are images of their own, neither smaller copies nor masks of others."""
    place = stream.tell()
    kinds = [page.get(254, _Tag(0, 0)).value for page in islice(_pages(stream), MAX_PAGES)]
    stream.seek(place)
    return sum(1 for kind in kinds if not kind & 5)


def tags_fit(stream: IO[bytes]) -> bool:
    """Return True if the tags of a TIFF's first page, or of EXIF, hold no more than the file does: they may all point
    to the same bytes, of which PIL makes a copy for each."""
    size = stream.seek(0, 2)
    return sum(min(tag.bytes, size) for tag in next(_pages(stream), {}).values()) <= 2 * size + 65_536


def _pages(stream: IO[bytes]) -> Iterator[dict[int, _Tag]]:
    """Yield the tags of each page; ends if the file is broken or its pages form a circle."""
    head = _at(stream, 0, 16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    number, count, entry = ("Q", "Q", "HHQ8s") if big else ("I", "H", "HHI4s")
    entry, offset_size = struct.Struct(order + entry), struct.calcsize(order + number)
    seen: set[int] = set()
    try:
        (position,) = struct.unpack_from(order + number, head, 8 if big else 4)
        while position and position not in seen:
            seen.add(position)
            (tags,) = struct.unpack(order + count, _at(stream, position, struct.calcsize(order + count)))
            if tags > MAX_BLOCKS:
                return
            page = {}
            for tag, kind, values, raw in entry.iter_unpack(stream.read(tags * entry.size)):
                form = {3: "H", 4: "I"}.get(kind)
                page[tag] = _Tag(values * _WIDTHS.get(kind, 0), struct.unpack_from(order + form, raw)[0] if form else 0)
            yield page
            (position,) = struct.unpack(order + number, stream.read(offset_size))
    except struct.error:
        return


# Once its header is read ----------------------------------------------------------------------------------------------


def pixels_to_decode(image: ImageFile.ImageFile) -> int:
    """Return how many pixels the decoder holds at a time: those of the image, or of a tile that is larger."""
    return max(image.width * image.height, *_LARGER.get(image.format or "", lambda image: [0])(image))


def _tiff_tiles(image: ImageFile.ImageFile) -> list[int]:
    """Return the sizes of tiles, which are decoded whole; libtiff cuts strips itself."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    sides = [image.tag_v2.get(tag, 0) for tag in (322, 323)]
    return [sides[0] * sides[1]] if all(isinstance(side, int) for side in sides) else [0]


def _jpeg2000_grids(image: ImageFile.ImageFile) -> list[int]:
    """Return the grids of all code streams, which repeat their size: the box around them may say another."""
    if image.fp is None:  # decoded already
        return [0]
    sizes = []
    for size in islice(re.finditer(rb"\xff\x4f\xff\x51.{4}(.{16}).{16}(..)", _rest(image.fp), re.S), 1000):
        x1, y1, x0, y0 = struct.unpack(">4I", size[1])
        sizes.append(max(0, x1 - x0) * max(0, y1 - y0) * -(-int.from_bytes(size[2], "big") // 4))
    return sizes or [0]


_LARGER: dict[str, Callable[[ImageFile.ImageFile], list[int]]] = {"TIFF": _tiff_tiles, "JPEG2000": _jpeg2000_grids}


def check_scans(image: ImageFile.ImageFile, name: str, max_pixels: int) -> None:
    """Refuse a JPEG that goes over its image too often. Raises ImageError."""
    assert image.fp is not None
    limit = min(MAX_SCANS, max(1, SCANNED_IMAGES * max_pixels // (image.width * image.height)))
    scans = _scans(_rest(image.fp), limit)
    if scans > limit:
        size = f"{image.height}x{image.width}"
        raise ImageError(f"{name} has more than {limit} scans of {size} pixels: save it again as a baseline JPEG")


_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # except RST and TEM, which have no length, and 0, which is data


def _scans(data: bytes, limit: int) -> int:
    """Count the scans up to the end of the image, but no more than one above the limit."""
    if data.count(b"\xff\xda") <= limit:  # some of which may be no markers: data of thumbnails or behind the image
        return 0
    scans, position = 0, 2
    while scans <= limit and (marker := _MARKER.search(data, position)) and marker[0][1] != 0xD9:
        scans += marker[0][1] == 0xDA
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _rest(stream: IO[bytes]) -> bytes:
    """Return all bytes of a file; its position does not change."""
    place = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(place)
    return data
