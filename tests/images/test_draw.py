"""What is drawn, checked on pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from open_gem.errors import InputError
from open_gem.images import draw as viz

GREY = (128, 128, 128)


def grey(height: int = 256, width: int = 320) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def spot(height: int = 256, width: int = 320) -> np.ndarray:
    heat = np.zeros((height, width), dtype=np.float32)
    heat[height // 2 :, width // 2 :] = 1
    return heat


def test_heat_colors_are_turbo():
    colors = viz.heat_colors(np.array([[0.0, 0.5, 1.0]]))
    assert colors.dtype == np.uint8
    published = [[48, 18, 59], [164, 252, 60], [122, 4, 3]]  # turbo's ends and middle
    assert abs(colors[0].astype(int) - published).max() <= 1
    assert (viz.heat_colors(np.array([[-1.0, 2.0]])) == colors[:, [0, 2]]).all()


def test_overlay_is_more_opaque_where_hot():
    drawn = np.asarray(viz.overlay(grey(), spot()), dtype=float)
    assert drawn.shape == (256, 320, 3)
    for place, heat, opacity in (((10, 10), 0.0, viz.COOL), ((200, 300), 1.0, viz.HOT)):
        expected = (1 - opacity) * 128 + opacity * viz.heat_colors(np.array([[heat]]))[0, 0]
        assert abs(drawn[place] - expected).max() <= 1


def test_overlay_takes_tensors_and_leaves_the_picture_alone():
    image, heat = grey(), spot()
    assert viz.overlay(image, torch.from_numpy(heat)).tobytes() == viz.overlay(image, heat).tobytes()
    assert image.getcolors() == [(256 * 320, GREY)]


def test_overlay_draws_boxes_inside_their_exclusive_edges():
    plain = np.asarray(viz.overlay(grey(), spot()))
    drawn = np.asarray(viz.overlay(grey(), spot(), boxes=[(40, 50, 101, 121)]))
    ys, xs = np.nonzero((plain != drawn).any(-1))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (40, 50, 101, 121)
    assert tuple(drawn[50, 70]) == viz.ACCENT


def test_overlay_draws_the_point_where_it_is():
    plain = np.asarray(viz.overlay(grey(), spot()))
    drawn = np.asarray(viz.overlay(grey(), spot(), point=(80, 60)))
    ys, xs = np.nonzero((plain != drawn).any(-1))
    assert abs(xs.mean() - 80) <= 1
    assert abs(ys.mean() - 60) <= 1


def test_overlay_draws_the_contour_of_the_mask_only():
    mask = np.zeros((256, 320), dtype=bool)
    mask[60:120, 80:200] = True
    changed = (np.asarray(viz.overlay(grey(), spot())) != np.asarray(viz.overlay(grey(), spot(), mask=mask))).any(-1)
    assert changed[60, 80:200].all()
    assert not changed[~mask].any()
    assert not changed[75:105, 95:185].any()


CAPTIONS = ["кот", "猫", "😀👩‍👩‍👧", "שלום", "a\nb\x00c\td", "\udcff", "x" * 5000]
SIZES = [(1, 1), (8, 300), (300, 8), (64, 64), (1500, 2100)]


@pytest.mark.parametrize(
    ("caption", "size"),
    [*((caption, (64, 64)) for caption in CAPTIONS), *(("word " * 500, size) for size in SIZES)],
)
def test_captions_of_any_text_at_any_size(caption: str, size: tuple[int, int]):
    height, width = size
    drawn = viz.overlay(grey(height, width), spot(height, width), caption=caption, score=0.25)
    plain = viz.overlay(grey(height, width), spot(height, width))
    assert drawn.size == plain.size
    assert drawn.tobytes() != plain.tobytes()


def test_small_pictures_grow_and_large_ones_do_not():
    assert viz.overlay(grey(32, 48), spot(32, 48)).size == (48 * 7, 32 * 7)
    assert viz.overlay(grey(900, 1200), spot(900, 1200)).size == (1200, 900)
    assert max(viz.overlay(grey(4, 1000), spot(4, 1000)).size) <= viz.LARGEST


def test_a_long_caption_gives_way_to_the_score():
    font = viz._font(13)
    line = viz._line_of_text("very " * 50, "0.123", font, 150)
    assert line.startswith("very")
    assert line.endswith("…  0.123")
    assert font.getlength(line) <= 150
    assert viz._line_of_text("cat", "0.123", font, 150) == "cat  0.123"


@pytest.mark.parametrize("keyword", ["heatmap", "mask"])
def test_maps_of_another_size_are_refused(keyword: str):
    maps = {"heatmap": spot(), "mask": spot() > 0, keyword: spot(10, 20)}
    with pytest.raises(InputError, match=rf"{keyword} has shape \(10, 20\), expected .*\(256, 320\)"):
        viz.overlay(grey(), **maps)


def test_palette_is_pascalvocs_and_distinct():
    assert [viz.palette(index) for index in range(3)] == [(128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert len({viz.palette(index) for index in range(6000)}) == 6000


def test_segmentation_colors_labels_and_leaves_background():
    labels = np.full((256, 320), -1)
    labels[:100] = 0
    labels[100:130] = 4000
    drawn = np.asarray(viz.segmentation(grey(), labels, ["cat"] * 4001), dtype=float)
    for row, index in ((50, 0), (115, 4000)):
        assert abs(drawn[row, 5] - (0.4 * 128 + 0.6 * np.array(viz.palette(index)))).max() <= 1
    assert (drawn[200] == 128).all()
    assert drawn.shape[0] > 256  # the legend
    legend = drawn[256:].reshape(-1, 3)
    assert all((legend == viz.palette(index)).all(-1).any() for index in (0, 4000))


def test_segmentation_with_nothing_found_is_the_picture():
    assert viz.segmentation(grey(), torch.full((256, 320), -1), ["cat"]).tobytes() == grey().tobytes()


def test_a_legend_has_an_end():
    heights = set()
    for count in (viz.LEGEND + 1, 5000):
        labels = np.arange(256 * 320).reshape(256, 320) % count
        heights.add(viz.segmentation(grey(), labels, [f"thing {index}" for index in range(count)]).height)
    assert len(heights) == 1


def test_contact_sheet_keeps_reading_order():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = viz.contact_sheet([Image.new("RGB", (100, 60), color) for color in colors])
    quarters = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75)]
    assert [sheet.getpixel((int(x * sheet.width), int(y * sheet.height))) for x, y in quarters] == colors
    assert sheet.width < 220
    with pytest.raises(InputError, match="no picture"):
        viz.contact_sheet([])


def test_contact_sheet_shrinks_large_pictures():
    picture = grey(1500, 2000)
    assert viz.contact_sheet([picture] * 4).width < 2 * viz.TILE + 60
    assert picture.size == (2000, 1500)
