"""path | bytes | PIL | array | tensor -> 8-bit RGB: the only place that opens images and rejects bad ones.

    image  = read_image("cats.jpg")              # any source -> 8-bit RGB, upright, decoded
    header = read_header(data)                   # what the file says, nothing decoded

torch is not imported here: processes that only decode (`decoder`) need 30 MB without it, and ten times that with it.
Height before width everywhere; PIL's (width, height) appears only in calls to PIL.
"""

import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TypeAlias, Union

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, features

from open_gem.errors import ImageError
from open_gem.images import deep
from open_gem.images.bounds import FORMATS, check_blocks, check_scans, count_pages, pixels_to_decode, tags_fit
from open_gem.images.deep import ImageWarning as ImageWarning
from open_gem.types import Size

if TYPE_CHECKING:
    import torch

ImageLike: TypeAlias = Union[str, os.PathLike[str], bytes, Image.Image, np.ndarray, "torch.Tensor"]

_Check = Callable[[ImageFile.ImageFile, str], None]

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: PIL's default threshold for a decompression bomb (256 MiB of RGB)."""


def size_of(image: Image.Image) -> Size:
    """Return the size of a PIL image in pixels, height before width."""
    return Size(image.height, image.width)


def height_x_width(sides: tuple[int, int]) -> str:
    """Format a size for messages; with a plain x, for terminals that lack ×."""
    return f"{sides[0]}x{sides[1]}"


def read_image(
    source: ImageLike, *, max_pixels: int = MAX_PIXELS, before_decoding: Callable[[int], None] = lambda pixels: None
) -> Image.Image:
    """Read any image as a PIL image of mode RGB: a fresh copy, upright, fully decoded, without metadata.

    * A path, or the bytes of a file, of one of `bounds.FORMATS`: first frame, up to `max_pixels`. If a TIFF has more
      pages, `info["pages"]` of the result says how many. HEIF needs the extra open_gem[heif].
    * A PIL image of any mode, at the frame it stands at; it is not changed (beyond being loaded).
    * An array (y, x), (y, x, 1), (y, x, 3) or (y, x, 4), or a tensor (y, x), (1, y, x), (3, y, x) or (4, y, x):
      uint8 in 0..255, uint16 in 0..65535, or floating point in [0, 1].

    EXIF orientation is applied. Transparent pixels become white, half-transparent ones mix with white, as on a page or
    in a viewer. Simply dropping the alpha would show the colours under it, mostly black or noise, and a backbone would
    see shapes that no person sees. Values of more than 8 bits are scaled from the range that the file
    declares (see `deep`), never clipped; floats are expected in [0, 1]. Colour profiles are ignored, as in CLIP's
    training.

    `before_decoding` is called once a file's header has passed all checks, with how many pixels the decoder will hold.

    Untrusted files can still take long, or more memory than their header says: `decoder.Decoder` stops them.

    Raises:
        ImageError: in one line, for anything that cannot be read or makes no sense as an image.
    """

    def check(image: ImageFile.ImageFile, name: str) -> None:
        before_decoding(_check_decodable(image, name, max_pixels))

    if isinstance(source, str | os.PathLike | bytes):
        with _open_file(source) as (image, name):
            return _from_pil(image, name, check)
    if isinstance(source, Image.Image):
        return _from_pil(source, "PIL image", check)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    torch = sys.modules.get("torch")  # nothing is a tensor unless torch was imported
    if torch is not None and isinstance(source, torch.Tensor):
        return _from_tensor(source)
    kind = type(source).__name__
    raise ImageError(f"expected a path, the bytes of a file, a PIL image, an array or a tensor, not {kind}")


class Header(NamedTuple):
    """What an image's file declares before anything is decoded: its format as PIL names it, such as "JPEG" (also for an
    MPO, a JPEG with further frames behind it), its size as stored, before EXIF orientation, and how many pages it has,
    if it is a TIFF; only the first is read."""

    format: str
    size: Size
    pages: int = 1


def read_header(source: str | os.PathLike[str] | bytes) -> Header:
    """Read the header of an image file, from its path or its bytes. Raises ImageError if it is no image."""
    with _open_file(source) as (image, _):
        return Header("JPEG" if image.format == "MPO" else image.format or "", size_of(image), _pages(image))


@contextmanager
def _open_file(source: str | os.PathLike[str] | bytes) -> Iterator[tuple[Image.Image, str]]:
    """Open the image in a file, reading only its header; return it and its name for messages."""
    if isinstance(source, bytes):
        yield _opened(io.BytesIO(source), "image bytes"), "image bytes"
        return
    path = os.fsdecode(source)
    name = repr(path)
    if re.match("[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise ImageError(f"{name} is a URL, expected a path or the bytes of a file: download it first")
    with _decoding(name), Path(path).open("rb") as file:
        stream = file if file.seekable() else io.BytesIO(file.read())  # a pipe cannot be rewound
        yield _opened(stream, name), name


def _opened(stream: IO[bytes], name: str) -> Image.Image:
    start = stream.read(16)
    stream.seek(0)
    if not start:
        raise ImageError(f"{name} is empty (0 bytes)")
    if start.startswith(b"%!PS"):  # PIL would run Ghostscript on it, a programming language
        raise ImageError(f"{name} is a PostScript (EPS) drawing, not an image: render it to PNG first")
    with _decoding(name):
        check_blocks(stream, start, name)
        try:
            with _quiet():
                Image.init()
                _register_heif(start, name)
                return Image.open(stream, formats=[format for format in FORMATS if format in Image.OPEN])
        except UnidentifiedImageError as error:
            # Do not quote the content: a list from elsewhere may name any file, and its author reads the errors.
            known = next((f": it is {kind}" for begin, kind in _NO_IMAGES if start.startswith(begin)), "")
            formats = ", ".join(FORMATS)
            raise ImageError(f"{name} is not an image of any format that is read ({formats}){known}") from error


_NO_IMAGES = (  # formats that are often given instead
    (b"version https://", "a Git LFS pointer, get the file by git lfs pull"),
    (b"<", "HTML or XML"),
)


def _register_heif(start: bytes, name: str) -> None:
    """Let PIL open HEIC and the like, if this is such a file. Raises ImageError if no package can."""
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS and "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import options, register_heif_opener  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImageError(
                f"{name} is a HEIF image (HEIC): pip install 'open_gem[heif]', or convert it to JPEG"
            ) from None
        options.DECODE_THREADS = 1  # so that decoders start no threads, each with memory of its own
        register_heif_opener()
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis") and not features.check("avif"):
        raise ImageError(f"{name} is an AVIF image: install Pillow 11.3 or later, or convert it to JPEG")


_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def _from_pil(image: Image.Image, name: str, check: _Check) -> Image.Image:
    size = size_of(image)
    if 0 in size:
        raise ImageError(f"{name} is empty ({height_x_width(size)} pixels)")
    with _decoding(name):
        pages = 1
        if isinstance(image, ImageFile.ImageFile):  # opened from a file, so perhaps not decoded yet
            check(image, name)
            pages = _pages(image)
        values = deep.declared(image, name)
        with _quiet() if image.format in _NOISY else nullcontext():
            image.load()
        turn = _TURNS.get(_orientation(image))
        image = deep.MODES[image.mode](image, values, name) if image.mode in deep.MODES else image
        if image.mode != "RGB" or turn is None or _has_alpha(image):  # turning makes a copy too
            image = _on_white(image) if _has_alpha(image) else image.convert("RGB")
        image = image if turn is None else image.transpose(turn)
    image.info.clear()  # otherwise reading the result again would turn it again
    if pages > 1:
        image.info["pages"] = pages
    return image


def _pages(image: Image.Image) -> int:
    """Return how many pages a newly opened TIFF has, 1 for all else."""
    return count_pages(image.fp) if isinstance(image, TiffImagePlugin.TiffImageFile) and image.fp is not None else 1


def _check_decodable(image: ImageFile.ImageFile, name: str, max_pixels: int) -> int:
    """Return how many pixels are decoded at a time. Refuses, from the header alone, images beyond the limits."""
    size, pixels = size_of(image), pixels_to_decode(image)
    if pixels > max_pixels:
        more = "" if pixels == size.height * size.width else f" and has tiles of {pixels} pixels"
        raise ImageError(f"{name} is {height_x_width(size)} pixels{more}, {_too_many(max_pixels)}")
    if image.format in ("JPEG", "MPO") and image.fp is not None:
        check_scans(image, name, max_pixels)
    if image.format == "EPS":  # opened by the caller; see `_opened`
        raise ImageError(f"{name} is a PostScript (EPS) drawing, not an image: render it to PNG first")
    return pixels


def _too_many(limit: int) -> str:
    return f"more than the {limit} that are safe to decode: shrink it first, or pass the decoded pixels as an array"


_FILE_TROUBLE: dict[type[Exception], str] = {
    FileNotFoundError: "does not exist",
    IsADirectoryError: "is a directory, not an image",
    PermissionError: "may not be read: permission denied",
    MemoryError: "needs more memory to decode than there is",
    Image.DecompressionBombError: f"has {_too_many(MAX_PIXELS)}",  # PIL's own limit, at twice ours
}


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn any error inside into an ImageError about `name`.

    All exceptions, because a broken file can make PIL's decoders raise almost any: OSError, SyntaxError, ValueError,
    struct.error, zlib.error, EOFError, IndexError, KeyError, OverflowError, MemoryError …
    """
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} {_FILE_TROUBLE.get(type(error), f'cannot be read: {reason}')}") from error


_NOISY = {"TIFF"}  # formats whose decoders in PIL warn, about metadata, while they decode
_WARNINGS = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress PIL's warnings about bombs and odd metadata: the first are our error, the second concern nobody.

    Warning filters belong to the whole process, so one thread at a time, and only around the short reads of headers
    and EXIF, where these warnings arise; decoding stays parallel, except for the formats in `_NOISY`.
    """
    with _WARNINGS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


_TURNS = {  # EXIF orientation -> what makes the image upright; 1 is upright, anything else is not a value
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image, 1 if there is none.

    Not `ImageOps.exif_transpose`, which also rewrites the EXIF block and so fails on images whose block is broken.
    """
    exif = image.info.get("exif", b"")
    if isinstance(exif, bytes) and not tags_fit(io.BytesIO(exif.removeprefix(b"Exif\0\0"))):
        return 1
    with _quiet():
        try:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # broken metadata says nothing, and the image itself is fine
            return 1


def _has_alpha(image: Image.Image) -> bool:
    """Return True if any pixel may be transparent: an alpha band, a transparent colour, or a palette with alpha."""
    palette = image.palette.mode if image.palette else ""
    return image.mode.endswith(("A", "a")) or "transparency" in image.info or palette.endswith("A")


def _on_white(image: Image.Image) -> Image.Image:
    """Composite over white, as RGB."""
    image = image.convert("LA") if image.mode == "La" else image  # PIL's only way from La to RGBA
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# --------------------------------------------------------------------------------------------- arrays and tensors


class _Layout(NamedTuple):
    channels: int  # axis of the channels where there are three axes
    mistaken: int  # the wrong axis, if the caller confuses the layouts
    shapes: str
    hint: str


_ARRAY = _Layout(
    -1, 0, "(y, x), (y, x, 1), (y, x, 3) or (y, x, 4)", "it looks channels-first: use array.transpose(1, 2, 0)"
)
_TENSOR = _Layout(
    0, -1, "(y, x), (1, y, x), (3, y, x) or (4, y, x)", "it looks channels-last: use tensor.permute(2, 0, 1)"
)
_CHANNELS = (1, 3, 4)


def _from_array(array: np.ndarray) -> Image.Image:
    name = f"array of shape {array.shape}"
    _check_shape(array.shape, _ARRAY, name)
    return _from_values(np.asarray(array), name)


def _from_tensor(tensor: "torch.Tensor") -> Image.Image:
    import torch

    shape = tuple(tensor.shape)
    name = f"tensor of shape {shape}"
    _check_shape(shape, _TENSOR, name)
    with _decoding(name):  # sparse, quantized and meta tensors have no values to read
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.dtype is torch.bfloat16 else tensor  # NumPy has no bfloat16
        values = tensor.resolve_neg().numpy()
    return _from_values(values if values.ndim == 2 else np.moveaxis(values, 0, -1), name)


def _check_shape(shape: tuple[int, ...], layout: _Layout, name: str) -> None:
    if 0 in shape:
        raise ImageError(f"{name} is empty: expected {layout.shapes}")
    if len(shape) == 2 or (len(shape) == 3 and shape[layout.channels] in _CHANNELS):
        return
    mistaken = len(shape) == 3 and shape[layout.mistaken] in _CHANNELS
    hint = layout.hint if mistaken else "it looks like a batch: pass one image at a time" if len(shape) == 4 else ""
    raise ImageError(f"{name}: expected {layout.shapes}" + (f"; {hint}" if hint else ""))


def _from_values(values: np.ndarray, name: str) -> Image.Image:
    """Convert values (y, x) or (y, x, 1 | 3 | 4), channels last, of a type that `_to_8_bits` takes, to RGB."""
    bands = np.ascontiguousarray(_to_8_bits(values, name))
    image = Image.fromarray(bands[..., 0] if bands.shape[2:] == (1,) else bands)
    return _on_white(image) if image.mode == "RGBA" else image.convert("RGB")


def _to_8_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Convert to uint8 of the same shape; the full range of a type becomes 0 to 255, rounded to nearest."""
    kind, size = values.dtype.kind, values.dtype.itemsize  # in either byte order
    if (kind, size) == ("u", 1):
        return values
    if (kind, size) == ("u", 2):
        deep.warn_if_dark(int(values.max()))
        return deep.scaled(values, 65535)
    if kind == "f" and size <= 8:
        return deep.unit_to_8_bits(values, name)
    expected = "uint8 (0 to 255), uint16 (0 to 65535) or floating point (0 to 1)"
    raise ImageError(f"{name} has values of type {values.dtype}: expected {expected}")
