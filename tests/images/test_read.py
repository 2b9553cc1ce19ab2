"""imaging: sizes, every kind of source, every way an image can be bad, and bit parity with torchvision."""

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision import transforms

from open_gem.errors import ImageError, InputError
from open_gem.images import pixels as imaging
from open_gem.images.pixels import (
    INTERPOLATIONS,
    MAX_PATCHES,
    MAX_PIXELS,
    Preprocess,
    read_image,
    size_of,
    target_size,
)
from open_gem.images.read import ImageWarning
from open_gem.types import Size

PREPROCESS = Preprocess(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic", Size(9, 9)
)
NOISE = np.random.default_rng(0).integers(0, 256, (13, 21, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(height: int, width: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand, for what PIL does not write; `colour` 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + chunk(b"IEND", b"")


def colour(source: imaging.ImageLike) -> tuple[int, ...]:
    """The one colour of an image that has one."""
    image = read_image(source)
    assert image.mode == "RGB"
    colours = np.unique(np.asarray(image).reshape(-1, 3), axis=0)
    assert len(colours) == 1, colours
    return tuple(colours[0].tolist())


def message(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(source)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("rule", "size", "patch", "expected"),
    [
        ("short:448", (480, 640), (16, 16), (448, 592)),  # 597.33 is 37.33 patches
        ("short:448", (640, 480), (16, 16), (592, 448)),
        ("short:448", (480, 640), (14, 14), (448, 602)),  # 42.67 patches round up
        ("short:448", (480, 640), (16, 32), (448, 608)),  # patches need not be square: 18.67 columns
        ("short:450", (480, 640), (16, 16), (448, 608)),
        ("long:448", (480, 640), (16, 16), (336, 448)),
        ("long:448", (640, 480), (16, 16), (448, 336)),
        ("long:32", (16, 1000), (16, 16), (16, 32)),  # 0.512 high, yet at least one patch
        ("square:448", (480, 640), (16, 16), (448, 448)),
        ("square:450", (480, 640), (14, 14), (448, 448)),
        ("native", (480, 640), (16, 16), (480, 640)),
        ("native", (375, 500), (16, 16), (368, 496)),  # 23.44 and 31.25
        ("native", (40, 24), (16, 16), (48, 32)),  # ties round up, both at an even and at an odd number
        ("native", (16, 16), (16, 16), (16, 16)),
        ("native", (4096, 4096), (16, 16), (4096, 4096)),  # exactly the limit
    ],
)
def test_target_size(rule: str, size: tuple[int, int], patch: tuple[int, int], expected: tuple[int, int]) -> None:
    result = target_size(rule, Size(*size), patch)
    assert result == expected
    assert isinstance(result, Size)


@pytest.mark.parametrize("rule", imaging.SIZE_RULES)
def test_every_rule_gives_whole_patches_close_to_the_aspect(rule: str) -> None:
    for size in (Size(300, 517), Size(517, 300), Size(400, 400)):
        height, width = target_size(rule.replace("N", "333"), size, (16, 14))
        assert height % 16 == 0 and width % 14 == 0
        if not rule.startswith("square"):
            assert abs(height / width - size.height / size.width) < 0.1


@pytest.mark.parametrize(
    "rule",
    [
        *(
            "",
            "short",
            "short:",
            "short:0",
            "short:-448",
            "short:4.5",
            "short:N",
            "short:+4",
            "short: 448",
            "short:448 ",
        ),
        *("Short:448", "native:448", "native:", "tall:448", "448", "short:448:1", "short:٤٤٨", "short:" + "9" * 5000),
        *(None, 448),
    ],
)
def test_bad_rule_lists_the_rules(rule: str) -> None:
    with pytest.raises(InputError, match="short:N, long:N, square:N, native") as caught:
        target_size(rule, Size(480, 640), (16, 16))
    assert not isinstance(caught.value, ImageError)
    assert repr(rule) in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (15, 640), (640, 15)])
@pytest.mark.parametrize("rule", ["short:448", "native", "square:448"])
def test_smaller_than_a_patch(rule: str, size: tuple[int, int]) -> None:
    expected = f"is {size[0]}x{size[1]} pixels, smaller than one 16x16 patch: nothing to localize"
    with pytest.raises(ImageError, match=expected):
        target_size(rule, Size(*size), (16, 16))


def test_too_many_patches_says_what_to_do() -> None:
    size = Size(4096, 4105)  # 256.56 columns: one more than fits
    with pytest.raises(ImageError) as caught:
        target_size("native", size, (16, 16))
    for part in ("4096x4105", "256x257", str(256 * 257), str(MAX_PATCHES), "'native'", "long:N"):
        assert part in str(caught.value)
    advice = int(str(caught.value).split()[-1])
    assert target_size(f"long:{advice}", Size(5000, 5000), (16, 16)) == (
        4096,
        4096,
    )  # the advice works, and is the best


@pytest.mark.parametrize(
    ("rule", "scale", "expected"),
    [
        ("short:448", 1.0, (448, 592)),
        ("short:448", 0.5, (224, 304)),  # 298.67, the scale before the rounding
        ("short:448", 1.5, (672, 896)),
        ("short:400", 1.1, (448, 592)),  # 440 is 27.5 patches, a tie
        ("short:440", 0.9, (400, 528)),  # 396 and 528 exactly
        ("square:320", 0.7, (224, 224)),
        ("native", 0.01, (16, 16)),  # at least one patch
    ],
)
def test_scale_multiplies_what_the_rule_gives(rule: str, scale: float, expected: tuple[int, int]) -> None:
    assert target_size(rule, Size(480, 640), (16, 16), scale=scale) == expected


def test_a_tie_after_scaling_is_a_tie() -> None:
    """0.3 and 0.7 as floats lie below what is meant: half a patch would round down."""
    for scale, expected in ((0.1, 64), (0.3, 176), (0.7, 400), (1.1, 624)):  # 3.5, 10.5, 24.5 and 38.5 patches
        assert target_size("square:560", Size(99, 99), (16, 16), scale=scale) == (expected, expected)


@pytest.mark.parametrize(
    ("rule", "size", "window", "expected"),
    [
        ("short:448", (480, 640), 448, (448, 597)),  # 597.33
        ("short:448", (480, 635), 448, (448, 593)),  # 592.67
        ("short:448", (640, 480), 448, (597, 448)),
        ("native", (451, 1001), 448, (451, 1001)),  # both sides are longer
        ("native", (440, 700), 448, (448, 700)),  # 27.5 patches
        ("native", (300, 439), 448, (304, 432)),  # neither is
        ("short:512", (480, 480), 512, (512, 512)),
    ],
)
def test_whole_pixels_where_a_side_is_longer_than_the_window(
    rule: str, size: tuple[int, int], window: int, expected: tuple[int, int]
) -> None:
    assert target_size(rule, Size(*size), (16, 16), window=window, whole_pixels=True) == expected
    patches = target_size(rule, Size(*size), (16, 16), window=window)
    assert patches == target_size(rule, Size(*size), (16, 16))
    assert target_size(rule, Size(*size), (16, 16), whole_pixels=True) == patches  # without windows nothing is free


def test_whole_pixels_round_half_up() -> None:
    result = target_size("native", Size(451, 601), (16, 16), scale=1.5, window=448, whole_pixels=True)
    assert result == (677, 902)  # 676.5 and 901.5
    result = target_size("native", Size(449, 597), (16, 16), scale=0.5, window=224, whole_pixels=True)
    assert result == (225, 299)  # 224.5, longer than the window once it is rounded, and 298.5
    result = target_size("native", Size(897, 597), (16, 16), scale=0.25, window=224, whole_pixels=True)
    assert result == (224, 144)  # 224.25 is not; 149.25 is 9.3 patches


def test_the_limit_of_patches_is_that_of_a_window() -> None:
    size = Size(5000, 6000)
    with pytest.raises(ImageError, match="313x375"):
        target_size("native", size, (16, 16))
    assert target_size("native", size, (16, 16), window=448) == (5008, 6000)
    assert target_size("native", size, (16, 16), window=448, whole_pixels=True) == (5000, 6000)
    with pytest.raises(ImageError) as caught:
        target_size("native", size, (16, 16), window=4800)
    for part in ("window of 4800x4800 pixels", "300x300 = 90000 patches", "'native'", str(MAX_PATCHES)):
        assert part in str(caught.value)
    advice = int(str(caught.value).split()[-1])
    assert target_size("native", size, (16, 16), window=advice)
    assert target_size("native", Size(300, 6000), (16, 16), window=4800)  # the window is 304 high there


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (14, 32)])
def test_an_image_behind_windows_has_as_many_pixels_as_may_be_decoded(scale: float, patch: tuple[int, int]) -> None:
    size = Size(19000, 20000)
    with pytest.raises(ImageError) as caught:
        target_size("native", size, patch, window=448, scale=scale)
    for part in ("19000x20000", str(MAX_PIXELS), "'native'", *([] if scale == 1 else [f"at scale {scale:g}"])):
        assert part in str(caught.value)
    advice = int(str(caught.value).split()[-1])
    height, width = target_size(f"square:{advice}", size, patch, window=448, scale=scale)
    assert 0.99 * MAX_PIXELS < height * width <= MAX_PIXELS


def test_advice_on_patches_knows_the_scale() -> None:
    with pytest.raises(ImageError, match="at scale 3") as caught:
        target_size("native", Size(3000, 3000), (16, 16), scale=3)
    advice = int(str(caught.value).split()[-1])
    assert target_size(f"long:{advice}", Size(3000, 3000), (16, 16), scale=3) == (4096, 4096)


def test_patches_and_aspect_can_be_limited_further() -> None:
    """A server's limits: a file of 158 bytes, 16x800 pixels, is 5,000 patches once its short side is 160."""
    strip = Size(16, 800)
    assert target_size("short:160", strip, (16, 16), max_patches=5000, max_aspect=50) == (160, 8000)
    with pytest.raises(ImageError, match=r"16x800 pixels needs a grid of 10x500 = 5000 patches .* limit is 4999: use"):
        target_size("short:160", strip, (16, 16), max_patches=4999)
    for size in (strip, Size(800, 16)):
        with pytest.raises(ImageError, match=r"is 50 times as long as it is short, the limit is 49\.9: crop it"):
            target_size("short:160", size, (16, 16), max_aspect=49.9)


def test_a_thin_strip_and_a_huge_rule_are_refused() -> None:
    for rule, size in (("short:448", Size(16, 16000)), ("square:999999999", Size(480, 640))):
        with pytest.raises(ImageError, match="long:N"):
            target_size(rule, size, (16, 16))


# --------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(32, 16), (8, 11), (13, 21)])
def test_pixels_equal_torchvision_bit_for_bit(interpolation: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(NOISE)
    theirs = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode(interpolation)),
            transforms.ToTensor(),
            transforms.Normalize(PREPROCESS.mean, PREPROCESS.std),
        ]
    )
    preprocess = Preprocess(PREPROCESS.mean, PREPROCESS.std, interpolation, Size(9, 9))
    ours = imaging.to_pixels(image, Size(*size), preprocess)
    assert ours.shape == (3, *size) and ours.dtype == torch.float32 and ours.is_contiguous()
    assert torch.equal(ours, theirs(image))  # pyright: ignore[reportArgumentType]


def test_pixels_need_rgb_and_a_known_interpolation() -> None:
    with pytest.raises(ImageError, match="mode L: expected RGB"):
        imaging.to_pixels(Image.new("L", (32, 32)), Size(32, 32), PREPROCESS)
    with pytest.raises(InputError, match="'cubic': expected one of bicubic, bilinear, nearest"):
        Preprocess(PREPROCESS.mean, PREPROCESS.std, "cubic", Size(9, 9))


def test_one_image_from_every_source(tmp_path: Path) -> None:
    image = Image.fromarray(NOISE)
    path = tmp_path / "image.png"
    image.save(path)
    tensor = torch.from_numpy(NOISE).permute(2, 0, 1)
    sources = [path, str(path), path.read_bytes(), image, Image.open(io.BytesIO(path.read_bytes())), NOISE, tensor]
    sources += [NOISE[::-1].copy()[::-1], NOISE / 255, (NOISE / 255).astype(np.float32), tensor.double() / 255]
    sources += [NOISE.astype(np.uint16) * 257, (NOISE.astype(">u2") * 257).astype(">u2"), tensor.float() / 255]
    sources += [(tensor.int() * 257).to(torch.uint16), (tensor / 255).requires_grad_()]
    for number, source in enumerate(sources):
        result = read_image(source)
        assert result.mode == "RGB" and size_of(result) == Size(13, 21)
        assert np.array_equal(np.asarray(result), NOISE), number


# ---------------------------------------------------------------------------------------------------------- modes


def palette(*, transparency: object = None) -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def palette_with_alpha(alpha: int) -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([9, 9, 9, 255, 10, 20, 30, alpha], "RGBA")
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("RGB", (2, 2), (1, 2, 3)), (1, 2, 3)),
        (Image.new("RGBX", (2, 2), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("CMYK", (2, 2), (255, 0, 0, 0)), (0, 255, 255)),
        (Image.new("YCbCr", (2, 2), (77, 128, 128)), (77, 77, 77)),
        (Image.new("HSV", (2, 2), (0, 255, 255)), (255, 0, 0)),
        # alpha: opaque is exact, transparent is white whatever lies under it, the rest mixes
        (Image.new("RGBA", (2, 2), (1, 2, 3, 255)), (1, 2, 3)),
        (Image.new("RGBA", (2, 2), (1, 2, 3, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (2, 2), (7, 255)), (7, 7, 7)),
        (Image.new("LA", (2, 2), (7, 0)), (255, 255, 255)),
        (Image.new("LA", (2, 2), (0, 51)), (204, 204, 204)),
        (Image.new("LA", (2, 2), (0, 51)).convert("La"), (204, 204, 204)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)).convert("RGBa"), (204, 204, 204)),
        (Image.new("PA", (2, 2), (0, 0)), (255, 255, 255)),
        (palette(), (10, 20, 30)),
        (palette(transparency=0), (10, 20, 30)),
        (palette(transparency=1), (255, 255, 255)),
        (palette(transparency=b"\xff\x00"), (255, 255, 255)),
        (palette_with_alpha(255), (10, 20, 30)),
        (palette_with_alpha(0), (255, 255, 255)),
        # more than 8 bits: scaled and rounded, never clipped
        (Image.new("I;16", (2, 2), 257 * 204), (204, 204, 204)),
        (Image.new("I;16", (2, 2), 257 * 204 + 128), (204, 204, 204)),
        (Image.new("I;16", (2, 2), 257 * 204 + 129), (205, 205, 205)),
        (Image.new("I;16B", (2, 2), 257 * 204), (204, 204, 204)),
        (Image.new("I;16", (2, 2), 65535), (255, 255, 255)),
        (Image.new("I", (2, 2), 257 * 204), (204, 204, 204)),
        (Image.new("F", (2, 2), 0.2), (51, 51, 51)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value[0]),
)
def test_every_mode(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert colour(image) == expected


@pytest.mark.parametrize(
    ("depth", "kind", "row", "extra", "expected"),
    [
        (16, 0, struct.pack(">HH", 52428, 52428), (), (204, 204, 204)),
        (16, 2, struct.pack(">3H", 0, 13107, 65535) * 2, (), (0, 51, 255)),
        (16, 4, struct.pack(">HH", 52428, 0) * 2, (), (255, 255, 255)),
        (16, 0, struct.pack(">HH", 52428, 52428), (chunk(b"tRNS", struct.pack(">H", 52428)),), (255, 255, 255)),
        (16, 0, struct.pack(">HH", 52428, 52428), (chunk(b"tRNS", struct.pack(">H", 52429)),), (204, 204, 204)),
        (8, 0, b"\x07\x07", (chunk(b"tRNS", struct.pack(">H", 7)),), (255, 255, 255)),
        (8, 2, b"\x01\x02\x03" * 2, (chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)),), (255, 255, 255)),
        (8, 3, b"\0\0", (chunk(b"PLTE", b"\x01\x02\x03"), chunk(b"tRNS", b"\0")), (255, 255, 255)),
        (8, 3, b"\0\0", (chunk(b"PLTE", b"\x01\x02\x03"),), (1, 2, 3)),
        (1, 0, b"\x80", (chunk(b"tRNS", struct.pack(">H", 0)),), None),
    ],
)
def test_png_depths(
    depth: int, kind: int, row: bytes, extra: tuple[bytes, ...], expected: tuple[int, ...] | None
) -> None:
    data = png(2, 2, depth, kind, (b"\0" + row) * 2, *extra)
    assert colour(data) == (expected or (255, 255, 255))


def test_values_pil_would_clip_keep_their_order() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for image in (Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        grey = np.asarray(read_image(image))[..., 0].ravel()
        assert (np.diff(grey.astype(int)) > 0).all() and grey[0] == 0 and grey[-1] == 255


def test_what_a_tiff_declares_of_its_values_counts() -> None:
    half = np.full((2, 2), 2048, np.uint16)
    assert colour(grey_tiff(half, (281, 3, 4095))) == (128, 128, 128)
    assert colour(grey_tiff(half, (281, 3, 4095), (262, 3, 0))) == (127, 127, 127)
    assert colour(grey_tiff(half, (281, 3, 2048))) == (255, 255, 255)
    assert colour(grey_tiff(half, (281, 3, 65535))) == (8, 8, 8)  # nothing to warn about, for so it says
    assert "mode I;16 has values from 2048 to 2048: expected up to 1000 by its own tags" in message(
        grey_tiff(half, (281, 3, 1000))
    )
    ramp = np.array([[0, 257 * 51], [257 * 204, 65535]], np.uint16)
    assert np.asarray(read_image(grey_tiff(ramp)))[..., 0].tolist() == [[0, 51], [204, 255]]
    assert np.asarray(read_image(grey_tiff(ramp, (262, 3, 0))))[..., 0].tolist() == [[255, 204], [51, 0]]
    negative = np.array([[0.0, 0.2]], np.float32)
    assert np.asarray(read_image(grey_tiff(negative, (262, 3, 0), (339, 3, 3))))[..., 0].tolist() == [[255, 204]]
    assert np.asarray(read_image(grey_tiff(np.array([[0, 51]], np.uint8), (262, 3, 0))))[..., 0].tolist() == [
        [255, 204]
    ]
    wide = np.array([[0, 500_000], [1_000_000, 1_000_000]], np.int32)
    shades = np.asarray(read_image(grey_tiff(wide, (281, 4, 1_000_000))))[..., 0]
    assert shades.tolist() == [[0, 128], [255, 255]]


def test_a_tiff_of_12_bits_is_not_black() -> None:
    sizes = [(256, 4, 2), (257, 4, 1), (278, 4, 1), (279, 4, 3), (273, 4, 8)]
    data = tiff(b"\xff\xf8\x00", *sizes, (258, 3, 12), (259, 3, 1), (262, 3, 1), (277, 3, 1))
    assert np.asarray(read_image(data))[..., 0].tolist() == [[255, 128]]


def test_colours_of_16_bits_that_would_be_black_are_refused() -> None:
    def rgb(maximum: int) -> bytes:
        sizes = [(256, 4, 1), (257, 4, 1), (278, 4, 1), (279, 4, 6), (273, 4, 8)]
        bits = struct.pack("<HHII", 258, 3, 3, 14)
        kinds = struct.pack("<HHIIHHII", 277, 3, 1, 3, 281, 3, 1, maximum)
        tags = [*sizes[:2], (259, 3, 1), (262, 3, 2), *sizes[2:]]
        data = struct.pack("<6H", 4095, 2048, 0, 16, 16, 16)
        return tiff(data, *tags, more=bits + kinds)

    assert "image bytes has 16-bit colours up to 4095 by its own tags: expected 65535, scale it first" in message(
        rgb(4095)
    )
    assert colour(rgb(65535)) == (15, 8, 0)


def test_significant_bits_of_a_png() -> None:
    def grey(bits: int, *values: int) -> list[int]:
        row = b"\0" + struct.pack(f">{len(values)}H", *values)
        data = png(1, len(values), 16, 0, row, chunk(b"sBIT", bytes([bits])))
        return np.asarray(read_image(data))[0, :, 0].tolist()

    assert grey(12, 0, 2048, 4095) == [0, 128, 255]  # as cameras write them: the lower bits
    assert grey(12, 0, 2048 << 4 | 8, 0xFFFF) == [0, 128, 255]  # as the format says: the upper bits
    assert grey(12, 0, 16 << 4) == [0, 1]  # dark, and the upper bits too
    assert grey(16, 0, 4095) == [0, 16]


def test_the_maximum_of_a_pgm() -> None:
    def pgm(maximum: int, *values: int) -> list[int]:
        data = b"P5 %d 1 %d\n" % (len(values), maximum) + struct.pack(f">{len(values)}H", *values)
        return np.asarray(read_image(data))[0, :, 0].tolist()

    assert pgm(4095, 0, 2048, 4095) == [0, 128, 255]
    assert pgm(65535, 0, 2048, 4095) == [0, 8, 16]  # it says so itself


def test_a_jpeg2000_of_12_bits() -> None:
    """PIL writes 16; the middle of the range is stored as zero, so that of 12 bits is 30,720 lower."""
    values = np.array([[0, 2048], [4095, 4095]]) + 30_720
    data = bytearray(encoded(Image.fromarray(values.astype(np.uint16)), "JPEG2000"))
    place = data.index(b"\xff\x4f\xff\x51")
    data[place + 42] = 11  # bits, less one
    if b"ihdr" in data:
        data[data.index(b"ihdr") + 14] = 11
    shades = np.asarray(read_image(bytes(data)))[..., 0]
    assert shades.tolist() == [[0, 128], [255, 255]]


def test_a_range_that_cannot_be_told_is_warned_about() -> None:
    dark = np.array([[5, 4095]], np.uint16)
    row = b"\0" + struct.pack(">2H", 5, 4095)
    sources = (dark, Image.fromarray(dark), Image.fromarray(dark.astype(np.int32)), grey_tiff(dark))
    for source in (*sources, png(1, 2, 16, 0, row), torch.from_numpy(dark)):
        with pytest.warns(
            ImageWarning, match=r"declares no range and has values up to 4095: .* comes out nearly black"
        ):
            assert np.asarray(read_image(source))[..., 0].tolist() == [[0, 16]]
    with pytest.warns(ImageWarning, match="values up to 16383: it is read as 0 to 65535 and so comes out dark; scale"):
        read_image(np.full((2, 2), 16383, np.uint16))
    assert colour(np.zeros((2, 2), np.uint16)) == (0, 0, 0)  # black whatever the range
    assert colour(np.full((2, 2), 16448, np.uint16)) == (64, 64, 64)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("I", (2, 2), 65536), "mode I has values from 65536 to 65536: expected 16-bit values"),
        (Image.new("I", (2, 2), -1), "mode I has values from -1 to -1"),
        (Image.new("F", (2, 2), 200.0), "mode F has values from 200 to 200: expected floats in [0, 1]"),
        (Image.new("F", (2, 2), float("nan")), "mode F has NaN or infinite values"),
        (Image.new("RGB", (0, 3)), "PIL image is empty (3x0 pixels)"),
    ],
)
def test_bad_pil_images(image: Image.Image, expected: str) -> None:
    assert expected in message(image)


# --------------------------------------------------------------------------------------- orientation and metadata

STORED = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
UPRIGHT = {
    1: STORED,
    2: STORED[:, ::-1],
    3: STORED[::-1, ::-1],
    4: STORED[::-1],
    5: STORED.T,
    6: np.rot90(STORED, -1),
    7: np.rot90(STORED, 2).T,
    8: np.rot90(STORED),
    9: STORED,  # not a value
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_from_every_source(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(STORED), kind, exif=exif)
    path = tmp_path / "turned"
    path.write_bytes(data)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    for source in (data, path, Image.open(io.BytesIO(data)), loaded, loaded.copy()):
        image = read_image(source)
        assert np.array_equal(np.asarray(image)[..., 0], UPRIGHT[orientation])
        assert np.array_equal(np.asarray(read_image(image)), np.asarray(image)), "turned twice"


def test_the_source_is_not_changed() -> None:
    image = Image.fromarray(STORED)
    image.info.update(exif=b"Exif\0\0", note="mine")
    read_image(image).putpixel((0, 0), (9, 9, 9))
    assert image.info == {"exif": b"Exif\0\0", "note": "mine"}
    assert np.array_equal(np.asarray(image), STORED)
    array = NOISE.copy()
    read_image(array).putpixel((0, 0), (9, 9, 9))
    assert np.array_equal(array, NOISE)


@pytest.mark.parametrize("block", [b"garbage", b"MM\0*\0\0\0\x08\0\x05\x01\x12", b"MM\0*\xff\xff\xff\xff", b""])
def test_broken_exif_is_no_reason_to_refuse_or_warn(block: bytes) -> None:
    data = encoded(Image.fromarray(STORED), "JPEG", exif=b"Exif\0\0" + block)
    assert size_of(read_image(data)) == (2, 3)


def test_odd_tags_of_a_tiff_are_no_reason_to_refuse_or_warn() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description longer than four bytes"
    data = encoded(Image.fromarray(STORED), "TIFF", exif=exif)
    tag = struct.pack("<HH", 0x010E, 2)
    place = data.index(tag)
    broken = data[:place] + tag + struct.pack("<II", 10**6, 10**6) + data[place + 12 :]  # lies beyond the file
    assert size_of(read_image(broken)) == (2, 3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), shade) for shade in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert colour(data) == (255, 0, 0)


# --------------------------------------------------------------------------------------------- arrays and tensors


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (np.full((4, 5), 7, np.uint8), (7, 7, 7)),
        (np.full((4, 5, 1), 7, np.uint8), (7, 7, 7)),
        (np.full((4, 5, 4), 255, np.uint8), (255, 255, 255)),
        (np.zeros((4, 5, 4), np.uint8), (255, 255, 255)),
        (np.zeros((4, 5, 4), np.float32), (255, 255, 255)),
        (np.full((4, 5), 257 * 204, np.uint16), (204, 204, 204)),
        (np.full((4, 5), 0.2, np.float16), (51, 51, 51)),
        (np.full((4, 5), 1 + 1e-6), (255, 255, 255)),  # the noise of a resize
        (np.full((4, 5), -1e-6), (0, 0, 0)),
        (torch.full((4, 5), 7, dtype=torch.uint8), (7, 7, 7)),
        (torch.full((1, 4, 5), 7, dtype=torch.uint8), (7, 7, 7)),
        (torch.zeros((4, 5, 5), dtype=torch.uint8), (255, 255, 255)),
        (torch.full((3, 4, 5), 0.2, dtype=torch.bfloat16), (51, 51, 51)),
        (torch.full((3, 4, 5), 0.2, dtype=torch.float16), (51, 51, 51)),
    ],
)
def test_array_shapes_and_types(source: imaging.ImageLike, expected: tuple[int, ...]) -> None:
    assert colour(source) == expected


def test_axes_of_arrays_and_tensors() -> None:
    assert size_of(read_image(np.zeros((40, 60, 3), np.uint8))) == Size(40, 60)
    assert size_of(read_image(torch.zeros(3, 40, 60))) == Size(40, 60)
    assert size_of(read_image(torch.zeros(40, 60))) == Size(40, 60)


ONE_OF = "expected uint8 (0 to 255), uint16 (0 to 65535) or floating point (0 to 1)"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (np.zeros((3, 40, 60)), ["array of shape (3, 40, 60)", "looks channels-first", "array.transpose(1, 2, 0)"]),
        (torch.zeros(40, 60, 3), ["tensor of shape (40, 60, 3)", "looks channels-last", "tensor.permute(2, 0, 1)"]),
        (np.zeros((40, 60, 2)), ["(40, 60, 2)", "(y, x, 3) or (y, x, 4)"]),
        (torch.zeros(5, 40, 60), ["(5, 40, 60)", "(3, y, x) or (4, y, x)"]),
        (np.zeros((1, 40, 60, 3)), ["(1, 40, 60, 3)", "looks like a batch"]),
        (torch.zeros(1, 3, 40, 60), ["(1, 3, 40, 60)", "looks like a batch"]),
        (np.zeros(5), ["(5,)", "expected (y, x)"]),
        (np.array(0.5), ["array of shape ()"]),
        (np.zeros((0, 60, 3)), ["(0, 60, 3) is empty"]),
        (torch.zeros(3, 40, 0), ["(3, 40, 0) is empty"]),
        (np.zeros((4, 5), bool), ["values of type bool", ONE_OF]),
        (torch.zeros(4, 5, dtype=torch.bool), ["values of type bool", ONE_OF]),
        (np.zeros((4, 5), np.int64), ["values of type int64", ONE_OF]),
        (np.zeros((4, 5), np.complex64), ["values of type complex64", ONE_OF]),
        (np.full((4, 5), "a"), ["values of type <U1", ONE_OF]),
        (np.full((4, 5), np.nan), ["(4, 5) has NaN or infinite values"]),
        (np.where(np.eye(4) > 0, np.nan, 0.5), ["NaN"]),
        (np.full((4, 5), np.inf), ["NaN or infinite values"]),
        (torch.full((3, 4, 5), -torch.inf), ["NaN or infinite values"]),
        (np.full((4, 5), 200.0), ["values from 200 to 200", "floats in [0, 1]", "divide 8-bit values by 255"]),
        (np.full((4, 5), 1.01), ["values from 1.01 to 1.01"]),
        (torch.randn(3, 40, 60) * 5, ["values from -", "before it was normalised"]),
        (torch.zeros(3, 4, 5, device="meta"), ["tensor of shape (3, 4, 5) cannot be read: "]),
        (None, ["expected a path, the bytes of a file, a PIL image, an array or a tensor, not NoneType"]),
        (7, ["not int"]),
        ([NOISE], ["not list"]),
        (io.BytesIO(), ["not BytesIO"]),
    ],
)
def test_what_is_no_image(source: object, expected: list[str]) -> None:
    text = message(source)
    for part in expected:
        assert part in text


# -------------------------------------------------------------------------------------------------- files gone bad

JPEG = encoded(Image.fromarray(NOISE).resize((210, 130)), "JPEG")
PNG = encoded(Image.fromarray(NOISE), "PNG")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty (0 bytes)"),
        (b"hello, I am a text\nwith lines", "is not an image of any format that is read (AVIF, BMP, "),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer, get the file by git lfs pull"),
        (b"<!DOCTYPE html><title>403</title>", "it is HTML or XML"),
        (JPEG[: len(JPEG) // 2], "cannot be read: image file is truncated"),
        (PNG[: len(PNG) // 2], "cannot be read: "),
        (PNG[:20], "cannot be read: Truncated"),
        (PNG[:60] + b"\0\0\0\0" + PNG[64:], "cannot be read: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n", "PostScript"),
    ],
)
def test_bad_contents(data: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    for source, name in ((path, repr(str(path))), (str(path), repr(str(path))), (data, "image bytes")):
        text = message(source)
        assert text.startswith(name) and expected in text
        assert "hello" not in text.removeprefix(name), "what is in a file is nobody else's business"


def test_path_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.jpg").mkdir()
    Path("file.jpg").write_bytes(PNG)
    assert message("nowhere/cats.jpg") == "'nowhere/cats.jpg' does not exist"
    assert message("folder.jpg") == "'folder.jpg' is a directory, not an image"
    assert message("file.jpg/cats.jpg").startswith("'file.jpg/cats.jpg' cannot be read: ")
    assert message("a\0b").startswith(r"'a\x00b' cannot be read: ")
    assert "download it first" in message("https://example.com/cats.jpg")
    assert message("two\nlines.jpg") == r"'two\nlines.jpg' does not exist"


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # a real one cannot be had as root, as tests in containers are
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert message("locked.jpg") == "'locked.jpg' may not be read: permission denied"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(PNG,))
    writer.start()
    assert np.array_equal(np.asarray(read_image(path)), NOISE)
    writer.join()


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (9460, f"is 9460x9460 pixels, more than the {MAX_PIXELS}"),  # PIL would only warn
        (60000, f"has more than the {MAX_PIXELS}"),  # PIL would raise an error of its own
    ],
)
def test_decompression_bomb(width: int, expected: str, tmp_path: Path) -> None:
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    data = png(width, width, 1, 0, b"")
    path = tmp_path / "bomb.png"
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        for source, name in ((data, "image bytes"), (path, repr(str(path)))):
            text = message(source)
            assert text.startswith(f"{name} {expected}") and "shrink it first" in text
    assert not leaked
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_bomb_limit_is_by_header_and_holds_for_lazy_images_only() -> None:
    assert size_of(read_image(PNG, max_pixels=13 * 21)) == (13, 21)
    for source, name in ((PNG, "image bytes"), (Image.open(io.BytesIO(PNG)), "PIL image")):
        with pytest.raises(ImageError, match=f"{name} is 13x21 pixels, more than the {13 * 21 - 1}"):
            read_image(source, max_pixels=13 * 21 - 1)
    assert size_of(read_image(Image.fromarray(NOISE), max_pixels=1)) == (13, 21)  # in memory: nothing left to protect


def test_a_closed_pil_image_is_named() -> None:
    image = Image.open(io.BytesIO(PNG))
    image.close()
    assert message(image).startswith("PIL image cannot be read: ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "JPEG2000", "AVIF"])
def test_corrupted_files_give_an_image_or_an_error(kind: str) -> None:
    data = encoded(Image.fromarray(NOISE), kind)
    random = np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(data[: random.integers(len(data) // 2, len(data) + 1)])
        for place in random.integers(0, len(broken), 4):
            broken[place] = random.integers(256)
        try:
            read_image(bytes(broken))
        except ImageError as error:
            assert str(error).startswith("image bytes ")


# --------------------------------------------------------------- what a small file may ask: nothing is decoded of these


def tiff(data: bytes, *tags: tuple[int, int, int], more: bytes = b"") -> bytes:
    """A TIFF by hand, little-endian, its pixels `data` at 8; tags are (tag, kind, value), kinds 3 (16 bits) and 4."""
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(tags))
    count = len(tags) + len(more) // 12
    start = 8 + len(data) + len(data) % 2
    return (
        struct.pack("<2sHI", b"II", 42, start)
        + data.ljust(start - 8, b"\0")
        + struct.pack("<H", count)
        + (entries + more + bytes(4))
    )


def grey_tiff(values: np.ndarray, *tags: tuple[int, int, int]) -> bytes:
    """Of values (y, x), uncompressed, in one strip."""
    height, width = values.shape
    sizes = [(256, 4, width), (257, 4, height), (278, 4, height), (279, 4, values.nbytes), (273, 4, 8)]
    usual = {258: (3, 8 * values.itemsize), 259: (3, 1), 262: (3, 1), 277: (3, 1)}
    chosen = {tag: (kind, value) for tag, kind, value in tags}
    rest = [(tag, *one) for tag, one in (usual | chosen).items()]
    return tiff(values.tobytes(), *sizes, *rest)


def tiled(side: int) -> bytes:
    """16×16 pixels in one tile of `side`."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 20}
    return tiff(zlib.compress(bytes(256)), *((tag, 4, value) for tag, value in tags.items()))


def test_a_tile_counts_as_the_pixels_that_are_decoded() -> None:
    text = message(tiled(40_000))
    assert text.startswith(
        f"image bytes is 16x16 pixels and has tiles of {40_000**2} pixels, more than the {MAX_PIXELS}"
    )
    with pytest.raises(ImageError, match="has tiles of 4096 pixels, more than the 4095"):
        read_image(tiled(64), max_pixels=4095)
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: 64, 323: 64, 324: 8, 325: 4096}
    whole = tiff(bytes([7]) * 4096, *((tag, 4, value) for tag, value in tags.items()))
    assert colour(whole) == (7, 7, 7)  # tiles may well be larger than a small image


def test_the_code_stream_of_a_jpeg2000_counts_whatever_its_box_says() -> None:
    data = encoded(Image.new("L", (16, 16), 7), "JPEG2000")
    assert colour(data) == (7, 7, 7)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    assert colour(loaded) == (7, 7, 7)
    place = data.index(b"\xff\x4f\xff\x51") + 8
    assert f"of {40_000**2} pixels" in message(data[:place] + struct.pack(">II", 40_000, 40_000) + data[place + 8 :])


PROGRESSIVE = encoded(Image.fromarray(NOISE), "JPEG", progressive=True)


def with_scans(count: int, between: bytes = b"") -> bytes:
    """The last scan so many times more."""
    last = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
    return PROGRESSIVE[:-2] + (between + last) * count + PROGRESSIVE[-2:]


def test_scans_of_a_jpeg_are_counted() -> None:
    same = read_image(PROGRESSIVE).tobytes()
    comment = b"\xff\xfe\0\x06\xff\xda\xff\xd9"  # neither a scan nor the end
    assert read_image(with_scans(80)).size == (21, 13)
    for bomb in (with_scans(20_000), with_scans(101, comment), with_scans(101, b"\xff\x01")):
        assert "has more than 100 scans of 13x21 pixels: save it again" in message(bomb)
    assert read_image(with_scans(10, comment * 20)).size == (21, 13)
    assert read_image(PROGRESSIVE + b"\xff\xda" * 1000).tobytes() == same  # behind the image, as of a motion photo
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2002) + b"\xff\xda" * 1000
    assert read_image(PROGRESSIVE[:2] + thumbnail + PROGRESSIVE[2:]).tobytes() == same
    with pytest.raises(ImageError, match="has more than 16 scans of 13x21"):  # and their pixels altogether
        read_image(with_scans(30), max_pixels=13 * 21)
    assert read_image(encoded(Image.fromarray(NOISE), "JPEG"), max_pixels=13 * 21)


def test_blocks_that_are_read_one_by_one_are_counted() -> None:
    chunks = [chunk(b"prVt", b"")] * 70_000
    webp = encoded(Image.fromarray(NOISE), "WEBP")
    gif = encoded(Image.new("L", (4, 4), 7), "GIF")
    screen = 13 + (3 << (gif[10] & 7) + 1 if gif[10] & 128 else 0)
    comment = b"!\xfe" + b"\xff" * 256 * 5000 + b"\0"
    shared = b"".join(struct.pack("<HHII", 40_000 + tag, 1, 60_000, 8) for tag in range(100))
    bombs = {
        "png": png(2, 2, 8, 0, b"\0\0\0" * 2, *chunks),
        "png behind": PNG + b"".join(chunks),
        "webp": webp + b"VP8 \0\0\0\0" * 70_000,
        "gif": gif[:screen] + comment + gif[screen:],
        "jpeg": JPEG[:2] + b"\xff\xfe\0\2" * 70_000 + JPEG[2:],
        "tiff": tiff(bytes(60_000), (256, 4, 1), (257, 4, 1), more=shared),
    }
    for name, bomb in bombs.items():
        assert "blocks, which is unusual for an image: save it again" in message(bomb), name
        with pytest.raises(ImageError, match="blocks"):
            imaging.read_header(bomb)
    assert colour(gif[:screen] + b"!\xfe" + b"\xff" * 256 * 100 + b"\0" + gif[screen:]) == (7, 7, 7)
    assert read_image(png(2, 2, 8, 0, b"\0\0\0" * 2, *chunks[:1000])).size == (2, 2)


def test_tags_of_exif_that_hold_more_than_it_has_are_not_read() -> None:
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + b"".join(
        struct.pack("<HHII", 0x9000 + tag, 1, 40_000, 8) for tag in range(100)
    )
    exif = struct.pack("<2sHI", b"II", 42, 40_008) + bytes(40_000) + struct.pack("<H", 101) + entries + bytes(4)
    data = png(2, 3, 8, 0, b"\0\0\0\0" * 2, chunk(b"eXIf", exif))
    assert size_of(read_image(data)) == (2, 3)


def test_formats_that_hold_others_or_run_programs_are_not_opened() -> None:
    for kind in ("ICO", "ICNS", "PCX", "SGI", "DDS"):
        assert "is not an image of any format that is read (AVIF, BMP," in message(
            encoded(Image.new("RGB", (16, 16)), kind)
        )


def test_pages_of_a_tiff_are_counted(tmp_path: Path) -> None:
    pages = [Image.new("L", (9, 9), shade) for shade in (7, 8, 9)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    path = tmp_path / "pages.tif"
    path.write_bytes(data)
    for source in (data, path):
        assert imaging.read_header(source) == ("TIFF", (9, 9), 3)
        assert read_image(source).info == {"pages": 3} and colour(source) == (7, 7, 7)
    for kind in ("TIFF", "PNG", "GIF"):
        assert imaging.read_header(encoded(pages[0], kind)) == (kind, (9, 9), 1)
    smaller = grey_tiff(np.full((2, 2), 7, np.uint8))
    circle = smaller[:-4] + struct.pack("<I", struct.unpack("<I", smaller[4:8])[0])
    assert imaging.read_header(circle).pages == 1
    first = grey_tiff(np.full((2, 2), 7, np.uint8))
    copy = struct.pack("<HHHII", 1, 254, 4, 1, 1) + bytes(4)  # a smaller copy, as of pyramids
    assert imaging.read_header(first[:-4] + struct.pack("<I", len(first)) + copy).pages == 1


def test_an_mpo_is_a_jpeg_whose_first_frame_is_read() -> None:
    data = encoded(Image.new("RGB", (16, 16), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert imaging.read_header(data) == ("JPEG", (16, 16), 1)
    assert colour(data) == (254, 0, 0)


# ------------------------------------------------------------------------------------------------------ HEIF and AVIF

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heif_is_read_where_its_extra_is_installed() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded(Image.new("RGB", (64, 48), (200, 30, 40)), "HEIF", quality=100)
    assert imaging.read_header(data) == ("HEIF", (48, 64), 1)
    assert np.abs(np.asarray(read_image(data)).astype(int) - (200, 30, 40)).max() < 4
    assert message(data[: len(data) // 2])


def test_heif_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    assert message(HEIC) == ("image bytes is a HEIF image (HEIC): pip install 'open_gem[heif]', or convert it to JPEG")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (64, 48), (200, 30, 40)), "AVIF", quality=100)
    assert imaging.read_header(data) == ("AVIF", (48, 64), 1)
    assert np.abs(np.asarray(read_image(data)).astype(int) - (200, 30, 40)).max() < 4
    monkeypatch.setattr(features, "check", lambda name: False)
    assert message(data).startswith("image bytes is an AVIF image: install Pillow 11.3 or later")
