"""Several drawings on one sheet."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from open_gem.errors import InputError
from open_gem.images.colors import HEAT, LABELS, LIGHT
from open_gem.images.sheet import TILE, Head, contact_sheet, png, sheet

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def tile(color: tuple[int, int, int], height: int = 60, width: int = 100) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def colors_of(page: Image.Image) -> list[tuple[int, Any]]:
    return page.getcolors(100_000) or []


def test_a_contact_sheet_keeps_reading_order():
    page = contact_sheet([tile(color) for color in COLORS])
    quarters = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75)]
    assert [page.getpixel((int(x * page.width), int(y * page.height))) for x, y in quarters] == COLORS
    assert page.width < 220
    with pytest.raises(InputError, match="no image"):
        contact_sheet([])


def test_large_drawings_shrink_and_stay_what_they_are():
    large = tile((128, 128, 128), 1500, 2000)
    assert contact_sheet([large] * 4).width < 2 * TILE + 60
    assert large.size == (2000, 1500)


def test_headings_have_room_of_their_own():
    rows = [[tile(COLORS[0]), tile(COLORS[1])], [tile(COLORS[2]), None]]
    bare = sheet(rows)
    headed = sheet(
        rows, columns=[Head("image"), Head("gem")], names=[[Head("cat", "0.98")], [Head("dog", "0.02", struck=True)]]
    )
    assert headed.width == bare.width and headed.height > bare.height
    for page in (bare, headed):
        counts = {color: count for count, color in colors_of(page)}
        assert [counts[color] for color in COLORS] == [100 * 60] * 3  # nothing is written across them


def test_long_headings_stay_in_their_column():
    long = Head("a heading that is very much longer than the drawing below it", "0.98", color=LABELS[0])
    page = np.asarray(sheet([[tile(COLORS[0], width=200), tile(COLORS[1], width=200)]], columns=[long, Head("")]))
    words = (page != LIGHT).any(-1) & ~(page == COLORS[0]).all(-1) & ~(page == COLORS[1]).all(-1)
    assert words.any() and np.nonzero(words)[1].max() <= 205


def test_a_bar_says_what_heat_means():
    bare, barred = (sheet([[tile(COLORS[0], 200, 300)]], bar=bar) for bar in ("", "cosine"))
    seen = {color for _, color in colors_of(barred)}
    assert {HEAT[0], HEAT[255]} <= seen and barred.height > bare.height


def test_a_png_of_few_colours_keeps_paper_and_legends():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    page = sheet([[noise]], columns=[Head("cat", color=LABELS[3])])
    with Image.open(io.BytesIO(png(page))) as image:
        seen = image.convert("RGB")
    assert seen.size == page.size
    assert seen.getpixel((0, 0)) == LIGHT
    patch = np.abs(np.asarray(seen, dtype=int) - LABELS[3]).max(-1)
    assert patch.min() < 8
    assert len(png(page)) < 100_000
