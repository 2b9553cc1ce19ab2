"""Several drawings on one sheet, in rows and columns with headings."""

import io
from collections.abc import Sequence
from math import ceil, sqrt
from typing import NamedTuple

from PIL import Image, ImageDraw

from open_gem.errors import InputError
from open_gem.images.colors import ACCENT, DARK, HEAT, LABELS, LIGHT, MUTED, Color
from open_gem.images.draw import bar_of, font_of, shortened

TILE = 480  # pixels of the longer side of a drawing on a sheet
COLORS = 256  # colours of a PNG: images are noisy, and files should be small


class Head(NamedTuple):
    """A heading: text with a note behind it; struck through for an absent label; with a patch of its colour."""

    text: str
    note: str = ""
    struck: bool = False
    color: Color | None = None


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    columns: Sequence[Head] = (),
    names: Sequence[Sequence[Head]] = (),
    bar: str = "",
    tile: int = TILE,
) -> Image.Image:
    """Arrange drawings in a grid, each shrunk to `tile` pixels if larger; None leaves a place empty.

    columns  headings of the columns, as many as the longest row has drawings
    names    headings of the rows, one or several each, above the row
    bar      what the colours of heat mean, written beside a colour bar below; "" for none

    Raises InputError for no drawing.
    """
    tiles = [[None if image is None else _fitted(image, tile) for image in row] for row in rows]
    drawn = [image for row in tiles for image in row if image is not None]
    if not drawn:
        raise InputError("no image for a sheet, expected one or more")
    width, height = (max(image.size[side] for image in drawn) for side in (0, 1))
    across, text, gap = max(map(len, tiles)), max(12, round(width / 15)), max(4, width // 40)
    line = round(1.9 * text)
    top = gap + (line if columns else 0)
    step = height + gap + (line if names else 0)
    size = (across * (width + gap) + gap, top + len(tiles) * step + (line + gap if bar else 0))
    page = Image.new("RGB", size, LIGHT)
    for column, head in enumerate(columns):
        _draw_head(page, head, gap + column * (width + gap), gap / 2 + line / 2, width, text)
    for row, images in enumerate(tiles):
        under = top + row * step + (line if names else 0)
        if names:
            left = float(gap)
            for head in names[row]:
                left = _draw_head(page, head, left, under - line / 2, page.width - gap - left, text) + text
        for column, image in enumerate(images):
            if image is not None:
                left = gap + column * (width + gap) + (width - image.width) // 2
                page.paste(image, (left, under + (height - image.height) // 2))
    if bar:
        _draw_bar(page, bar, gap, page.height - gap - line / 2, text)
    return page


def contact_sheet(
    images: Sequence[Image.Image], columns: int | None = None, *, bar: str = "", tile: int = TILE
) -> Image.Image:
    """Arrange drawings in a grid, in reading order; `columns` by default make it square. Settings and errors as
    `sheet`."""
    columns = columns or max(1, ceil(sqrt(len(images))))
    return sheet([images[start : start + columns] for start in range(0, len(images), columns)], bar=bar, tile=tile)


def png(image: Image.Image) -> bytes:
    """Encode a PNG with few colours."""
    ours = [channel for color in (LIGHT, DARK, MUTED, ACCENT, *LABELS, *HEAT[::12]) for channel in color]
    free = 3 * COLORS - len(ours)
    palette = image.quantize(free // 3, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).getpalette() or []
    others = [255 if channel > 250 else channel for channel in palette[:free]]  # no shades next to white paper
    colors = Image.new("P", (1, 1))
    colors.putpalette([*ours, *others])  # so that paper, text and legends keep their colours
    file = io.BytesIO()
    image.quantize(palette=colors, dither=Image.Dither.FLOYDSTEINBERG).save(file, "PNG", optimize=True)
    return file.getvalue()


def _fitted(image: Image.Image, tile: int) -> Image.Image:
    copy = image.convert("RGB")
    copy.thumbnail((tile, tile), Image.Resampling.LANCZOS)
    return copy


def _draw_head(page: Image.Image, head: Head, left: float, middle: float, max_width: float, text: int) -> float:
    """Draw a heading that starts at `left`; returns where it ends."""
    draw, bold, font = ImageDraw.Draw(page), font_of(text, True), font_of(round(0.85 * text))
    if head.color is not None:
        side = round(0.8 * text)
        draw.rounded_rectangle([left, middle - side / 2, left + side, middle + side / 2], text // 6, fill=head.color)
        left, max_width = left + 1.4 * side, max_width - 1.4 * side
    gap = text // 2 if head.note else 0
    words = shortened(head.text, bold, max_width - font.getlength(head.note) - gap)
    width, color = bold.getlength(words), MUTED if head.struck else DARK
    draw.text((left, middle), words, font=bold, fill=color, anchor="lm")
    if head.struck:
        draw.line((left, middle, left + width, middle), fill=color, width=max(1, text // 10))
    draw.text((left + width + gap, middle), head.note, font=font, fill=MUTED, anchor="lm")
    return left + width + gap + font.getlength(head.note)


def _draw_bar(page: Image.Image, meaning: str, left: float, middle: float, text: int) -> None:
    font, width, height = font_of(round(0.85 * text)), 9 * text, round(0.6 * text)
    draw = ImageDraw.Draw(page)
    draw.text((left, middle), "0", font=font, fill=MUTED, anchor="lm")
    start = round(left + font.getlength("0") + text / 3)
    page.paste(bar_of(width, height), (start, round(middle - height / 2)))
    end = start + width + text / 3
    draw.text((end, middle), "1", font=font, fill=MUTED, anchor="lm")
    words = shortened(meaning, font, page.width - end - 2 * text)
    draw.text((end + 1.5 * text, middle), words, font=font, fill=MUTED, anchor="lm")
