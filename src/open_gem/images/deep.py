"""Values of more than 8 bits -> 8 bits, by the range that their file declares: PIL hands them on as they are stored.

A TIFF of 12 bits, or one whose declared maximum is 4095, would come out black if 65535 were white, and one whose zero
is white as a negative. Without a declaration the type's own range counts, and images that use less than a quarter of it
give a warning.
"""

import struct
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from open_gem.errors import ImageError


class ImageWarning(UserWarning):
    """An image was read, but perhaps not as intended."""


class Range(NamedTuple):
    """The range of values that a file declares.

    maximum   the value of white, 0 if the file does not declare it
    inverted  whether zero is white and the maximum black
    bits      PNG: how many of 16 bits count; these are the upper ones, though some programs write the lower ones
    """

    maximum: int = 0
    inverted: bool = False
    bits: int = 0


UNKNOWN = Range()
_DARK = 1 << 14


def declared(image: Image.Image, name: str) -> Range:
    """Return the range that an open, not yet decoded image declares. Raises ImageError for colours of 16 bits that PIL
    would make black."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        bits, maximum = _largest(tags.get(258, 1)), _largest(tags.get(281, 0))
        if image.mode in ("RGB", "RGBA", "RGBX", "CMYK") and bits == 16 and 0 < maximum < 1 << 15:
            raise ImageError(
                f"{name} has 16-bit colours up to {maximum} by its own tags: expected 65535, scale it first"
            )
        if bits < 16 and not maximum:
            maximum = (1 << bits) - 1
        return Range(maximum, inverted=tags.get(262) == 0)
    if isinstance(image, PngImagePlugin.PngImageFile) and image.mode in ("I", "I;16"):
        return Range(bits=_significant_bits(image))
    return Range(65535) if image.format == "PPM" else UNKNOWN  # PIL has scaled these by the file's maximum


def _largest(value: object) -> int:
    """Return the largest value of a tag that has a number for each band, or one for all."""
    numbers = value if isinstance(value, tuple) else (value,)
    return max((number for number in numbers if isinstance(number, int)), default=0)


def _significant_bits(image: ImageFile.ImageFile) -> int:
    """Return the significant bits in a PNG's sBIT chunk, 0 if there is none."""
    if image.fp is None:
        return 0
    place, position, bits = image.fp.tell(), 8, 0
    while True:
        image.fp.seek(position)
        head = image.fp.read(9)
        if len(head) < 9 or head[4:8] == b"IDAT":
            break
        if head[4:8] == b"sBIT":
            bits = head[8]
            break
        position += 12 + struct.unpack(">I", head[:4])[0]
    image.fp.seek(place)
    return bits if 8 < bits <= 16 else 0


def _from_integers(image: Image.Image, known: Range, name: str) -> Image.Image:
    """Convert modes I;16 and its byte orders; and I, signed 32 bits, which is how PIL holds some 16-bit files. Returns
    L, or LA if the file names a transparent grey."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    limit = known.maximum or 65535
    if low < 0 or high > limit:
        which = f"up to {limit} by its own tags" if known.maximum else "16-bit values, 0 to 65535"
        raise ImageError(f"{name} of mode {image.mode} has values from {low} to {high}: expected {which}")
    if known.bits and high < 1 << known.bits and (values & ((1 << 16 - known.bits) - 1)).any():
        limit = (1 << known.bits) - 1  # so the lower bits count: with the upper ones, all bits below would be zero
    elif not known.maximum and not known.bits:
        warn_if_dark(high)
    bands = scaled(values.astype(np.uint32), limit)
    bands = 255 - bands if known.inverted else bands
    grey = image.info.get("transparency")
    if isinstance(grey, int):
        bands = np.stack([bands, np.where(values == grey, 0, 255).astype(np.uint8)], axis=-1)
    return Image.fromarray(bands)


def _from_floats(image: Image.Image, known: Range, name: str) -> Image.Image:
    """Convert mode F, floats in [0, 1]."""
    bands = unit_to_8_bits(np.asarray(image), f"{name} of mode F")
    return Image.fromarray(255 - bands if known.inverted else bands)


MODES: dict[str, Callable[[Image.Image, Range, str], Image.Image]] = {  # whose values PIL itself would clip at 255
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N", "I"), _from_integers),
    "F": _from_floats,
}


def scaled(values: np.ndarray, maximum: int) -> np.ndarray:
    """Scale whole numbers from 0 to `maximum` to 0 to 255, rounded to nearest: uint8."""
    return ((values.astype(np.uint64 if maximum > 1 << 22 else np.uint32) * 255 + maximum // 2) // maximum).astype(
        np.uint8
    )


def warn_if_dark(high: int) -> None:
    """Warn if values only go up to `high` and the file does not declare their range."""
    if 0 < high < _DARK:  # without the image's name, since Python keeps each text of a warning
        warnings.warn(
            f"a 16-bit image declares no range and has values up to {high}: it is read as 0 to 65535 and so comes out "
            f"{'nearly black' if high < _DARK // 4 else 'dark'}; scale its values, or declare their range",
            ImageWarning,
            stacklevel=2,
        )


def unit_to_8_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Convert floats in [0, 1]. Up to half an 8-bit step outside is the noise of a resize, and rounds away."""
    low, high = float(values.min()), float(values.max())  # NaN if there is one
    if not np.isfinite([low, high]).all():
        raise ImageError(f"{name} has NaN or infinite values: expected finite values in [0, 1]")
    if low * 255 < -0.5 or high * 255 > 255.5:
        hint = "pass the image before it was normalised" if low < 0 else "divide 8-bit values by 255"
        raise ImageError(f"{name} has values from {low:g} to {high:g}: expected floats in [0, 1] ({hint})")
    return np.rint(np.clip(values.astype(np.float32), 0, 1) * 255).astype(np.uint8)
