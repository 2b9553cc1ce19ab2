"""decoder: the images of reading in-process, and an end to what takes too long, too much, or the process with it."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_gem.errors import ImageError
from open_gem.images.decoder import Decoder
from open_gem.images.read import read_image

NOISE = np.random.default_rng(0).integers(0, 256, (13, 21, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def slow() -> bytes:
    """A small file of 40 million pixels, each a number in text: minutes of decoding."""
    return b"P3 8000 5000 254 " + b"1 " * (3 * 8000 * 5000 // 8)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(workers=2) as decoder:
        yield decoder


def same(decoder: Decoder, source: bytes | Path) -> None:
    ours, theirs = decoder.read(source, seconds=30), read_image(source)
    assert ours.mode == "RGB" and ours.size == theirs.size and ours.tobytes() == theirs.tobytes()
    assert not ours.info


def test_images_are_those_that_are_read_in_process(decoder: Decoder, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(NOISE), "JPEG", exif=exif)
    path = tmp_path / "turned.jpg"
    path.write_bytes(turned)
    many_strips = encoded(Image.fromarray(NOISE).resize((1000, 1501)), "PNG")
    for source in (turned, path, many_strips, encoded(Image.new("RGBA", (3, 70_000), (1, 2, 3, 4)), "PNG")):
        same(decoder, source)


@pytest.mark.parametrize(
    "source",
    [b"", b"hello", encoded(Image.fromarray(NOISE), "PNG")[:60], "nowhere/cats.jpg", "https://a.b/c.jpg", "a\0b"],
)
def test_errors_are_those_of_reading_in_process(decoder: Decoder, source: bytes | str) -> None:
    with pytest.raises(ImageError) as ours:
        decoder.read(source, seconds=30)
    with pytest.raises(ImageError) as theirs:
        read_image(source)
    assert str(ours.value) == str(theirs.value)


def test_an_image_that_takes_too_long_is_stopped_and_the_next_is_read(decoder: Decoder) -> None:
    data, start = slow(), time.monotonic()
    with pytest.raises(ImageError, match=r"^image bytes was not decoded within 0\.5 seconds$"):
        decoder.read(data, seconds=0.5)
    assert time.monotonic() - start < 5
    same(decoder, encoded(Image.fromarray(NOISE), "PNG"))
