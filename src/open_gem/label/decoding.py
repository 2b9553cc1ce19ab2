"""Images decoded within a time limit: small plain ones in this process, all others in processes that can be stopped.

Sending an image from another process costs about 4 ms of a processor for 640 × 480 pixels, as much as decoding three
of them: most of what a run spends beside the model. So what cannot take long is decoded here.
"""

from functools import cache
from pathlib import Path

from PIL import Image

from open_gem.errors import ImageError
from open_gem.images.decoder import Decoder
from open_gem.images.read import read_image

PROCESSES = 16  # maximum number of processes; they start when images need them
PLAIN_BYTES, PLAIN_PIXELS, PLAIN_SCANS = 2**22, 2**22, 16  # above these, an image may take seconds
JPEG, SCAN = b"\xff\xd8\xff", b"\xff\xda"  # first bytes of a file and of its scans
PNG, PROFILE = b"\x89PNG\r\n\x1a\n", b"iCCP"


def decode(source: bytes | Path, seconds: float) -> Image.Image:
    """Return what `read_image` makes of the bytes of a file, or of a path, within a timeout in seconds, except for
    small plain JPEG and PNG files.

    Raises ImageError as `read_image`, and for what takes too long or too much memory.
    """
    if _may_be_plain(source):
        try:
            return read_image(source, before_decoding=_check_plain)
        except _NotPlainError:
            pass
    return _decoder().read(source, seconds=seconds)


@cache
def _decoder() -> Decoder:
    return Decoder(PROCESSES)


def _may_be_plain(source: bytes | Path) -> bool:
    """Return True if decoding is quick unless there are too many pixels: a small PNG, or a JPEG of a few scans, each of
    which takes the time that its pixels do."""
    content = source
    if isinstance(content, Path):
        try:
            with content.open("rb") as file:
                content = file.read(PLAIN_BYTES + 1)
        except OSError:
            return False
    if len(content) > PLAIN_BYTES:
        return False
    if content.startswith(PNG):
        return content.count(PROFILE) <= 1  # each is unpacked
    return content.startswith(JPEG) and content.count(SCAN) <= PLAIN_SCANS


class _NotPlainError(ImageError):
    """The image has too many pixels to be decoded here."""


def _check_plain(pixels: int) -> None:
    if pixels > PLAIN_PIXELS:
        raise _NotPlainError
