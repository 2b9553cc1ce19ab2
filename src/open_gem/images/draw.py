"""One image with what was located in it drawn on top: heatmaps, masks, boxes, points, label maps. PIL in and PIL out.

To look at, not to compute with: small images are enlarged so that their labels can be read. Colours are those of
`colors`, several drawings together are a `sheet`. This file owns matplotlib, for DejaVu Sans: it writes more scripts
than the font inside PIL.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from open_gem.errors import InputError
from open_gem.images.colors import ACCENT, DARK, HEAT, LIGHT, MUTED, OPACITY, Color, label_color

READABLE = 448  # pixels of the shorter side up to which a small image is enlarged, by a whole factor
LARGEST = 2048  # pixels beyond which enlarging stops
LEGEND = 24  # labels in a legend at most
SMOOTH = 4  # factor by which slanted and round shapes are drawn larger before they are scaled down
TINT = 0.62  # opacity of a label map
ABSENT_OPACITY = 0.3  # opacity of the grey heat of an absent label, where it is 1


class Style(NamedTuple):
    """Sizes in pixels that follow from the image's shorter side."""

    text: int
    line: int
    dot: int


def heat_colors(heatmap: Any) -> np.ndarray:
    """Map values `(y, x)` in [0, 1] to colours `(y, x, 3)` uint8, see `colors.HEAT`."""
    return np.array(HEAT, dtype=np.uint8)[np.rint(np.clip(_array(heatmap), 0, 1) * 255).astype(np.uint8)]


def overlay(
    image: Image.Image,
    heatmap: Any,
    *,
    mask: Any = None,
    boxes: Iterable[Sequence[float]] = (),
    point: Sequence[float] | None = None,
    caption: str = "",
    absent: bool = False,
    bar: bool = False,
) -> Image.Image:
    """Draw a heatmap `(y, x)` in [0, 1] over its image, more opaque where hotter, with marks on top.

    mask     `(y, x)` bool, drawn as a contour
    boxes    xyxy in pixels of `image`, right and bottom exclusive; the first is drawn with a thicker line
    point    xy in pixels of `image`
    caption  written in the corner; shortened if the image is too narrow
    absent   of a label that is not in the image: grey, faint and crossed out
    bar      with a colour bar from 0 to 1 in the other corner

    Raises InputError if heatmap or mask do not have the image's size.
    """
    factor = _enlargement(image)
    heat = np.clip(_enlarge(_fitting(heatmap, image, "heatmap").astype(np.float32), factor, BILINEAR), 0, 1)
    base = np.asarray(_zoom(image.convert("RGB"), factor), dtype=np.float32)
    if absent:
        grey = base.mean(axis=2, keepdims=True)
        drawn = _blend(0.25 * base + 0.55 * grey + 50, np.full_like(base, 255), ABSENT_OPACITY * heat)
    else:
        drawn = _blend(base, heat_colors(heat), OPACITY * heat)
    style = style_of(drawn)
    if mask is not None:
        marks = _enlarge(_fitting(mask, image, "mask").astype(np.uint8) * 255, factor, Image.Resampling.NEAREST)
        _draw_contour(drawn, marks, style)
    if absent:
        _draw_cross(drawn, style)
    for rank, box in enumerate(boxes):
        _draw_box(drawn, [side * factor for side in box], style, thin=rank > 0)
    if point is not None:
        _draw_point(drawn, [(side + 0.5) * factor for side in point], style)
    draw_caption(drawn, caption)
    if bar and not absent:
        _draw_bar(drawn, style)
    return drawn


def plain(image: Image.Image, caption: str = "") -> Image.Image:
    """Return the image at the size of its overlays, with a caption."""
    drawn = _zoom(image.convert("RGB"), _enlargement(image))
    draw_caption(drawn, caption)
    return drawn


def segmentation(image: Image.Image, labels: Any, names: Sequence[str], *, legend: bool = True) -> Image.Image:
    """Draw a label map `(y, x)` over its image, with a legend below; −1, the background, stays as it is.

    The legend names the labels in the image, largest first, `LEGEND` at most. Raises InputError if the label map does
    not have the image's size.
    """
    factor = _enlargement(image)
    small = _fitting(labels, image, "label map").astype(np.int32)
    zoomed = _enlarge(small, factor, Image.Resampling.NEAREST)
    base = np.asarray(_zoom(image.convert("RGB"), factor), dtype=np.float32)
    present, counts = np.unique(small[small >= 0], return_counts=True)
    by_size = present[np.argsort(-counts, kind="stable")]
    colors = np.zeros((int(present.max(initial=0)) + 1, 3), dtype=np.float32)
    for index in by_size:
        colors[index] = label_color(int(index))
    drawn = _blend(base, colors[np.maximum(zoomed, 0)], np.where(zoomed >= 0, TINT, 0.0))
    if not legend:
        return drawn
    return _with_legend(drawn, [(str(names[index]), label_color(int(index))) for index in by_size])


# Sizes and arrays -----------------------------------------------------------------------------------------------------

BILINEAR = Image.Resampling.BILINEAR


def _array(values: Any) -> np.ndarray:
    """Return a NumPy array of anything array-like; a tensor comes from its device."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _fitting(values: Any, image: Image.Image, what: str) -> np.ndarray:
    array = _array(values)
    if array.shape != (image.height, image.width):
        raise InputError(
            f"{what} has shape {array.shape}, expected the image's (height, width): {image.height, image.width}"
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


def _blend(base: np.ndarray, colors: np.ndarray, opacity: np.ndarray) -> Image.Image:
    """Blend colours `(y, x, 3)` over others, by an opacity `(y, x)`."""
    share = opacity[..., None]
    return Image.fromarray(np.rint(base * (1 - share) + colors * share).clip(0, 255).astype(np.uint8))


def style_of(image: Image.Image) -> Style:
    """Return the sizes of marks and text on an image."""
    shorter = min(image.size)
    return Style(text=max(13, shorter // 18), line=max(2, shorter // 150), dot=max(4, shorter // 70))


@lru_cache(maxsize=64)
def font_of(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans of a height in pixels."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


# Marks ----------------------------------------------------------------------------------------------------------------


def _paste_shape(
    image: Image.Image,
    color: Color,
    box: Sequence[float],
    draw: Callable[[ImageDraw.ImageDraw], Any],
    opacity: float = 1,
) -> None:
    """Draw a shape with smooth edges: `draw` works in a canvas `SMOOTH` times as large, whose corner is that of `box`,
    xyxy."""
    left, top = int(box[0]), int(box[1])
    width, height = (max(1, ceil(end) - start) for start, end in ((left, box[2]), (top, box[3])))
    canvas = Image.new("L", (width * SMOOTH, height * SMOOTH))
    draw(ImageDraw.Draw(canvas))
    mask = canvas.resize((width, height), Image.Resampling.BOX).point([round(level * opacity) for level in range(256)])
    image.paste(color, (left, top), mask)


def _draw_contour(image: Image.Image, mask: np.ndarray, style: Style) -> None:
    """Draw a light line just inside the mask, with a dark one inside that: visible on any background."""
    inside, core = (_shrunk(mask, by * style.line) for by in (1, 2))
    image.paste(DARK, mask=Image.fromarray(inside - core))
    image.paste(LIGHT, mask=Image.fromarray(mask - inside))


def _shrunk(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Return the mask without its outermost pixels, except at the image's border."""
    image = Image.fromarray(mask)
    for _ in range(pixels):
        image = image.filter(ImageFilter.MinFilter(3))
    return np.asarray(image)


def _draw_cross(image: Image.Image, style: Style) -> None:
    """Draw two diagonals from corner to corner."""
    width, height = image.size[0] * SMOOTH, image.size[1] * SMOOTH
    for color, line in ((DARK, 2 * style.line + 2), (LIGHT, 2 * style.line)):

        def draw(canvas: ImageDraw.ImageDraw, line: int = line) -> None:
            for ends in ((0, 0, width, height), (0, height, width, 0)):
                canvas.line(ends, fill=255, width=line * SMOOTH)

        _paste_shape(image, color, (0, 0, *image.size), draw, opacity=0.75)


def _draw_box(image: Image.Image, box: Sequence[float], style: Style, *, thin: bool) -> None:
    left, top, right, bottom = box
    line = max(1, style.line // 2) if thin else style.line
    draw = ImageDraw.Draw(image)
    corners = [left, top, max(left, right - 1), max(top, bottom - 1)]  # PIL's corners are inclusive
    draw.rectangle(corners, outline=DARK, width=line + 2)
    draw.rectangle(corners, outline=ACCENT, width=line)


def _draw_point(image: Image.Image, point: Sequence[float], style: Style) -> None:
    x, y = point
    for radius, color in ((style.dot + style.line, DARK), (style.dot, LIGHT), (style.dot / 2, ACCENT)):
        left, top = int(x - radius), int(y - radius)
        middle = ((x - left) * SMOOTH, (y - top) * SMOOTH)
        _paste_shape(
            image,
            color,
            (left, top, x + radius, y + radius),
            lambda canvas, middle=middle, radius=radius: canvas.circle(middle, radius * SMOOTH, fill=255),
        )


def _draw_plate(image: Image.Image, box: Sequence[float], radius: int) -> None:
    """Draw a dark plate with round corners, on which light text can be read over any image."""
    size = [(box[2] - box[0]) * SMOOTH - 1, (box[3] - box[1]) * SMOOTH - 1]
    _paste_shape(
        image,
        DARK,
        box,
        lambda canvas: canvas.rounded_rectangle([0, 0, *size], radius * SMOOTH, fill=255),
        opacity=0.82,
    )


def draw_caption(image: Image.Image, caption: str, note: str = "", *, struck: bool = False) -> None:
    """Write a caption into the upper left corner, with a note behind it that is shortened last; `struck` through."""
    if not caption and not note:
        return
    style = style_of(image)
    font, pad, inset = font_of(style.text), style.text // 2, style.text // 3
    gap = style.text // 2 if caption and note else 0
    available = image.width - 2 * pad - 2 * inset - gap
    note = shortened(note, font, available)
    caption = shortened(caption, font, available - font.getlength(note))
    width, tail = font.getlength(caption), font.getlength(note)
    height = round(1.7 * style.text)
    left, middle = inset + pad, inset + height / 2
    _draw_plate(image, (inset, inset, ceil(left + width + gap + tail + pad), inset + height), style.text // 2)
    draw = ImageDraw.Draw(image)
    draw.text((left, middle), caption, font=font, fill=LIGHT, anchor="lm")
    if struck:
        draw.line((left, middle, left + width, middle), fill=LIGHT, width=max(1, style.text // 12))
    draw.text((left + width + gap, middle), note, font=font, fill=(200, 204, 214), anchor="lm")


def bar_of(width: int, height: int) -> Image.Image:
    """Return the colours of heat from 0 to 1, left to right."""
    return Image.fromarray(heat_colors(np.broadcast_to(np.linspace(0, 1, width), (height, width))))


def _draw_bar(image: Image.Image, style: Style) -> None:
    """Draw the colour bar in the lower right corner, if it fits."""
    font, pad, inset = font_of(max(11, round(0.8 * style.text))), style.text // 3, style.text // 3
    width, height = 6 * style.text, max(6, style.text // 2)
    ends = [ceil(font.getlength(end)) for end in ("0", "1")]
    right, bottom = image.width - inset, image.height - inset
    left, top = right - width - sum(ends) - 4 * pad, bottom - round(1.4 * style.text)
    if left < inset or top < 4 * style.text:
        return
    _draw_plate(image, (left, top, right, bottom), style.text // 2)
    middle, start = (top + bottom) / 2, left + 2 * pad + ends[0]
    image.paste(bar_of(width, height), (start, round(middle - height / 2)))
    draw = ImageDraw.Draw(image)
    draw.text((left + pad, middle), "0", font=font, fill=LIGHT, anchor="lm")
    draw.text((right - pad, middle), "1", font=font, fill=LIGHT, anchor="rm")


# Text -----------------------------------------------------------------------------------------------------------------


def shortened(text: str, font: ImageFont.FreeTypeFont, max_width: float) -> str:
    """Return as much of a text as fits on one line of `max_width` pixels, with an ellipsis if it is cut."""
    words = drawable(text)
    if font.getlength(words) <= max_width:
        return words
    for length in range(len(words) - 1, 0, -1):
        if font.getlength(line := words[:length].rstrip() + "…") <= max_width:
            return line
    return ""


def drawable(text: str, longest: int = 200) -> str:
    """Return a text as one line can show it: no line breaks, no control characters, no lone surrogates."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * longest])
    return " ".join(plain.split())[:longest]


def _with_legend(image: Image.Image, entries: Sequence[tuple[str, Color]]) -> Image.Image:
    """Add a strip below the image: a patch of colour and a label each, in as many rows as they need."""
    if not entries:
        return image
    text = style_of(image).text
    font, row, gap = font_of(text), round(text * 1.7), round(text * 0.6)
    more = [(f"+ {len(entries) - LEGEND} more", None)] if len(entries) > LEGEND else []
    places: list[tuple[int, int, str, Color | None]] = []
    x, line = gap, 0
    for label, color in [*entries[:LEGEND], *more]:
        patch = 0 if color is None else text + gap
        words = shortened(label, font, image.width - 2 * gap - patch)
        width = patch + ceil(font.getlength(words))
        if x > gap and x + width > image.width - gap:
            x, line = gap, line + 1
        places.append((x, line, words, color))
        x += width + 2 * gap
    strip = Image.new("RGB", (image.width, (line + 1) * row + gap), LIGHT)
    draw = ImageDraw.Draw(strip)
    for x, line, words, color in places:
        middle = gap / 2 + (line + 0.5) * row
        if color is not None:
            draw.rounded_rectangle([x, middle - text / 2, x + text, middle + text / 2], text // 5, fill=color)
        start = x if color is None else x + text + gap
        draw.text((start, middle), words, font=font, fill=MUTED if color is None else DARK, anchor="lm")
    sheet = Image.new("RGB", (image.width, image.height + strip.height), LIGHT)
    sheet.paste(image, (0, 0))
    sheet.paste(strip, (0, image.height))
    return sheet
