"""Pictures for people: heatmaps, boxes, points and label maps drawn over an image. Pure functions, PIL in and PIL out.

These are to look at, not to compute with: small pictures are enlarged so that their labels can be read. This file owns
matplotlib (the turbo colours, and DejaVu Sans, which writes more scripts than the font inside PIL).
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import ceil, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from open_gem.errors import InputError

READABLE = 224  # pixels of the shorter side up to which a small picture is enlarged, by a whole factor
LARGEST = 2048  # pixels beyond which enlarging stops
TILE = 640  # pixels of the longer side of a picture on a contact sheet
COOL, HOT = 0.1, 0.7  # opacity of a heatmap where it is 0 and where it is 1
LEGEND = 24  # phrases a legend has room for
LIGHT, DARK, ACCENT = (255, 255, 255), (0, 0, 0), (255, 45, 150)  # turbo has no pink, so marks stand out from heat


class _Style(NamedTuple):
    """Sizes in pixels that follow from the picture's: its shorter side decides."""

    text: int
    line: int
    dot: int


def heat_colors(heatmap: Any) -> np.ndarray:
    """Values `(y, x)` in [0, 1] → turbo colours `(y, x, 3)` uint8."""
    return _turbo()[np.rint(np.clip(_array(heatmap), 0, 1) * 255).astype(np.uint8)]


def overlay(
    image: Image.Image,
    heatmap: Any,
    *,
    mask: Any = None,
    boxes: Iterable[Sequence[float]] = (),
    point: Sequence[float] | None = None,
    caption: str = "",
    score: float | None = None,
) -> Image.Image:
    """A heatmap `(y, x)` in [0, 1] over its picture, hot parts more opaque, with what was found drawn on top.

    mask     `(y, x)` bool, drawn as a contour
    boxes    xyxy in pixels of `image`, right and bottom exclusive
    point    xy in pixels of `image`
    caption  written in the corner with `score` behind it; shortened where the picture is too narrow

    Raises InputError where heatmap or mask are not of the picture's size.
    """
    factor = _enlargement(image)
    heat = _enlarge(_fitting(heatmap, image, "heatmap").astype(np.float32), factor, Image.Resampling.BILINEAR)
    base = np.asarray(_zoom(image.convert("RGB"), factor), dtype=np.float32)
    opacity = (COOL + (HOT - COOL) * np.clip(heat, 0, 1))[..., None]
    drawn = Image.fromarray(np.rint(base * (1 - opacity) + heat_colors(heat) * opacity).astype(np.uint8))
    style = _style(drawn)
    if mask is not None:
        marks = _enlarge(_fitting(mask, image, "mask").astype(np.uint8) * 255, factor, Image.Resampling.NEAREST)
        _draw_contour(drawn, marks, style)
    for box in boxes:
        _draw_box(drawn, [side * factor for side in box], style)
    if point is not None:
        _draw_point(drawn, [(side + 0.5) * factor for side in point], style)
    _draw_label(drawn, caption, "" if score is None else f"{score:.3f}", style)
    return drawn


def segmentation(image: Image.Image, labels: Any, prompts: Sequence[str]) -> Image.Image:
    """A label map `(y, x)` over its picture, with a legend below; −1, the background, stays as it is.

    The legend names what is in the picture, largest first, as far as there is room. Raises InputError where the label
    map is not of the picture's size.
    """
    factor = _enlargement(image)
    small = _fitting(labels, image, "label map").astype(np.int32)
    zoomed = _enlarge(small, factor, Image.Resampling.NEAREST)
    base = np.asarray(_zoom(image.convert("RGB"), factor), dtype=np.float32)
    found, counts = np.unique(small[small >= 0], return_counts=True)
    present = found[np.argsort(-counts, kind="stable")]
    colors = np.zeros((int(found.max(initial=0)) + 1, 3), dtype=np.float32)
    for index in present:
        colors[index] = palette(index)
    opacity = np.where(zoomed >= 0, 0.6, 0.0)[..., None]
    drawn = Image.fromarray(np.rint(base * (1 - opacity) + colors[np.maximum(zoomed, 0)] * opacity).astype(np.uint8))
    return _with_legend(drawn, [(str(prompts[index]), palette(index)) for index in present])


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures in a grid, in reading order, each shrunk to `TILE` where larger; `columns` by default make it square.

    Raises InputError for no picture.
    """
    if not images:
        raise InputError("no picture for a contact sheet, expected one or more")
    tiles = [image.convert("RGB") for image in images]
    for tile in tiles:
        tile.thumbnail((TILE, TILE))
    width, height = (max(sides) for sides in zip(*(tile.size for tile in tiles), strict=True))
    columns = columns or ceil(sqrt(len(tiles)))
    gap = max(2, min(width, height) // 50)
    rows = ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), LIGHT)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        left, top = gap + column * (width + gap), gap + row * (height + gap)
        sheet.paste(tile, (left + (width - tile.width) // 2, top + (height - tile.height) // 2))
    return sheet


def palette(index: int) -> tuple[int, int, int]:
    """The colour of label `index`: PascalVOC's, whose first colour (black, the background) is skipped."""
    label, channels = int(index) + 1, [0, 0, 0]
    for bit in range(7, -1, -1):
        for channel in range(3):
            channels[channel] |= (label >> channel & 1) << bit
        label >>= 3
    return channels[0], channels[1], channels[2]


# Sizes and arrays -----------------------------------------------------------------------------------------------------


def _array(values: Any) -> np.ndarray:
    """An array of anything array-like; a tensor comes from its device."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _fitting(values: Any, image: Image.Image, what: str) -> np.ndarray:
    array = _array(values)
    if array.shape != (image.height, image.width):
        raise InputError(
            f"{what} has shape {array.shape}, expected the picture's (height, width): {image.height, image.width}"
        )
    return array


def _enlargement(image: Image.Image) -> int:
    shorter, longer = sorted(image.size)
    return max(1, min(ceil(READABLE / shorter), LARGEST // longer))


def _zoom(image: Image.Image, factor: int) -> Image.Image:
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _enlarge(values: np.ndarray, factor: int, filter: Image.Resampling) -> np.ndarray:
    height, width = values.shape
    return np.asarray(Image.fromarray(values).resize((width * factor, height * factor), filter))


def _style(image: Image.Image) -> _Style:
    shorter = min(image.size)
    return _Style(text=max(13, shorter // 26), line=max(2, shorter // 240), dot=max(4, shorter // 90))


# matplotlib -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _turbo() -> np.ndarray:
    """The 256 colours of turbo, `(256, 3)` uint8."""
    import matplotlib

    colors = matplotlib.colormaps["turbo"](np.arange(256), bytes=True)
    return np.ascontiguousarray(colors[:, :3])


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


# Marks ----------------------------------------------------------------------------------------------------------------


def _draw_contour(image: Image.Image, mask: np.ndarray, style: _Style) -> None:
    """A light line just inside the mask, with a dark one inside that, so it shows on any ground."""
    once, twice = (_shrunk(mask, by * style.line) for by in (1, 2))
    image.paste(DARK, mask=Image.fromarray(once - twice))
    image.paste(LIGHT, mask=Image.fromarray(mask - once))


def _shrunk(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask without its outermost pixels, but for those where the picture ends."""
    image = Image.fromarray(mask)
    for _ in range(pixels):
        image = image.filter(ImageFilter.MinFilter(3))
    return np.asarray(image)


def _draw_box(image: Image.Image, box: Sequence[float], style: _Style) -> None:
    left, top, right, bottom = box
    draw = ImageDraw.Draw(image)
    corners = [left, top, max(left, right - 1), max(top, bottom - 1)]  # PIL's corners are inclusive
    draw.rectangle(corners, outline=DARK, width=style.line + 2)
    draw.rectangle(corners, outline=ACCENT, width=style.line)


def _draw_point(image: Image.Image, point: Sequence[float], style: _Style) -> None:
    draw = ImageDraw.Draw(image)
    for radius, color in ((style.dot + style.line, DARK), (style.dot, LIGHT), (style.dot // 2, ACCENT)):
        draw.circle(point, radius, fill=color)


def _draw_label(image: Image.Image, phrase: str, score: str, style: _Style) -> None:
    if not phrase and not score:
        return
    font, pad = _font(style.text), style.text // 3
    line = _line_of_text(phrase, score, font, image.width - 2 * pad)
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, font.getlength(line) + 2 * pad, style.text + 2 * pad], fill=DARK)
    draw.text((pad, pad + style.text / 2), line, font=font, fill=LIGHT, anchor="lm")


def _line_of_text(phrase: str, score: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Phrase and score on one line of `room` pixels; the phrase gives way, the score stays."""
    words = _drawable(phrase)
    for length in range(len(words), -1, -1):
        shown = words if length == len(words) else words[:length].rstrip() + "…"
        line = f"{shown}  {score}".strip()
        if font.getlength(line) <= room:
            return line
    return score


def _drawable(text: str, longest: int = 200) -> str:
    """What can be set on one line: no line breaks, no control characters, no halves of surrogate pairs."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * longest])
    return " ".join(plain.split())[:longest]


def _with_legend(image: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """The picture with a strip below it: a patch of colour and the phrase, in as many columns as fit."""
    if not entries:
        return image
    style = _style(image)
    font, row = _font(style.text), round(style.text * 1.6)
    shown = list(entries[:LEGEND])
    rest = [(f"+ {len(entries) - LEGEND} more", LIGHT)] if len(entries) > LEGEND else []
    columns = max(1, image.width // (style.text * 14))
    width = image.width // columns
    rows = ceil(len(shown + rest) / columns)
    sheet = Image.new("RGB", (image.width, image.height + rows * row + row // 2), LIGHT)
    sheet.paste(image, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for index, (phrase, color) in enumerate(shown + rest):
        line, column = divmod(index, columns)
        left, middle = column * width + row // 3, image.height + row // 4 + line * row + row // 2
        half = style.text // 2
        draw.rectangle([left, middle - half, left + style.text, middle + half], fill=color)
        text = _line_of_text(phrase, "", font, width - row // 3 - 2 * style.text)
        draw.text((left + 1.5 * style.text, middle), text, font=font, fill=DARK, anchor="lm")
    return sheet
