"""What is drawn, checked on pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from open_gem.errors import InputError
from open_gem.images import draw as viz
from open_gem.images.colors import ACCENT, HEAT, OPACITY, label_color

GREY = (128, 128, 128)


def grey(height: int = 512, width: int = 640) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def spot(height: int = 512, width: int = 640) -> np.ndarray:
    heat = np.zeros((height, width), dtype=np.float32)
    heat[height // 2 :, width // 2 :] = 1
    return heat


def test_heat_is_dark_where_it_is_0_and_light_where_it_is_1():
    colors = viz.heat_colors(np.array([[0.0, 0.5, 1.0]]))
    assert colors.dtype == np.uint8
    assert [tuple(color) for color in colors[0]] == [HEAT[0], HEAT[128], HEAT[255]]
    assert (viz.heat_colors(np.array([[-1.0, 2.0]])) == colors[:, [0, 2]]).all()


@pytest.mark.parametrize("heat", [0.0, 0.25, 0.7, 1.0])
def test_heat_is_more_opaque_where_hotter(heat):
    drawn = np.asarray(viz.overlay(grey(), np.full((512, 640), heat, np.float32)), dtype=float)
    expected = (1 - OPACITY * heat) * 128 + OPACITY * heat * np.array(viz.heat_colors(np.array([[heat]]))[0, 0])
    assert abs(drawn - expected).max() <= 1


@pytest.mark.parametrize("level", range(0, 256, 51))
def test_the_hottest_place_is_not_darkened(level):
    image = Image.new("RGB", (640, 512), (level, level, level))
    drawn = np.asarray(viz.overlay(image, np.ones((512, 640), np.float32)).convert("L"))
    assert drawn.min() >= min(level, 220)


def test_overlay_takes_tensors_and_leaves_the_picture_alone():
    image, heat = grey(), spot()
    assert viz.overlay(image, torch.from_numpy(heat)).tobytes() == viz.overlay(image, heat).tobytes()
    assert image.getcolors() == [(512 * 640, GREY)]


def test_overlay_draws_boxes_inside_their_exclusive_edges():
    plain = np.asarray(viz.overlay(grey(), spot()))
    drawn = np.asarray(viz.overlay(grey(), spot(), boxes=[(40, 50, 101, 121)]))
    ys, xs = np.nonzero((plain != drawn).any(-1))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (40, 50, 101, 121)
    assert tuple(drawn[50, 70]) == ACCENT


def test_overlay_draws_the_point_where_it_is():
    plain = np.asarray(viz.overlay(grey(), spot()))
    drawn = np.asarray(viz.overlay(grey(), spot(), point=(80, 60)))
    ys, xs = np.nonzero((plain != drawn).any(-1))
    assert abs(xs.mean() - 80) <= 1
    assert abs(ys.mean() - 60) <= 1


def test_overlay_draws_the_contour_of_the_mask_only():
    mask = np.zeros((512, 640), dtype=bool)
    mask[60:120, 80:200] = True
    changed = (np.asarray(viz.overlay(grey(), spot())) != np.asarray(viz.overlay(grey(), spot(), mask=mask))).any(-1)
    assert changed[60, 80:200].all()
    assert not changed[~mask].any()
    assert not changed[75:105, 95:185].any()


def test_further_boxes_are_thinner():
    plain, drawn = (
        np.asarray(viz.overlay(grey(900, 900), spot(900, 900), boxes=boxes))
        for boxes in ([], [(100, 100, 400, 400), (500, 500, 800, 800)])
    )
    changed = (plain != drawn).any(-1)
    assert changed[:450].sum() > 1.3 * changed[450:].sum() > 0


def test_an_absent_label_is_grey_faint_and_crossed_out():
    image = Image.new("RGB", (640, 512), (250, 40, 10))
    present, absent = (np.asarray(viz.overlay(image, spot(), absent=flag), dtype=float) for flag in (False, True))

    def chroma(drawn: np.ndarray) -> np.ndarray:
        return drawn.max(-1) - drawn.min(-1)

    assert chroma(absent).max() < 0.5 * chroma(present).max()
    hot, cold = absent[400, 600], absent[120, 400]
    assert 0 < (hot - cold).mean() < 60
    middle, beside = absent[250:262, 314:326], absent[250:262, 80:92]
    assert middle.std() > beside.std()  # where the diagonals meet


CAPTIONS = ["кот", "猫", "😀👩‍👩‍👧", "שלום", "a\nb\x00c\td", "\udcff", "x" * 5000]
SIZES = [(1, 1), (8, 300), (300, 8), (64, 64), (1500, 2100)]


@pytest.mark.parametrize(
    ("caption", "size"),
    [*((caption, (64, 64)) for caption in CAPTIONS), *(("word " * 500, size) for size in SIZES)],
)
def test_captions_of_any_text_at_any_size(caption: str, size: tuple[int, int]):
    height, width = size
    plain = viz.overlay(grey(height, width), spot(height, width))
    drawn = viz.overlay(grey(height, width), spot(height, width), caption=caption, bar=True)
    assert drawn.size == plain.size
    assert drawn.tobytes() != plain.tobytes()
    viz.draw_caption(drawn, caption, "absent 0.25", struck=True)


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 230, 0)])
def test_a_caption_can_be_read_on_any_ground(ground):
    image = Image.new("RGB", (448, 448), ground)
    viz.draw_caption(image, "a cat", "present 0.98")
    corner = np.asarray(image.convert("L").crop((12, 12, 200, 36)), dtype=float) / 255
    light, dark = corner.max(), np.median(corner)  # letters, and the plate that they are on

    def luminance(level: float) -> float:
        return ((level + 0.055) / 1.055) ** 2.4 if level > 0.04045 else level / 12.92

    assert (luminance(light) + 0.05) / (luminance(dark) + 0.05) > 7  # WCAG, level AAA


def test_a_colour_bar_is_in_the_other_corner():
    plain, drawn = (np.asarray(viz.overlay(grey(), spot() * 0, bar=flag)) for flag in (False, True))
    ys, xs = np.nonzero((plain != drawn).any(-1))
    assert ys.min() > drawn.shape[0] * 0.8 and xs.min() > drawn.shape[1] * 0.5
    seen = {tuple(color) for color in drawn.reshape(-1, 3)}
    assert {HEAT[0], HEAT[255]} <= seen


def test_small_pictures_grow_and_large_ones_do_not():
    assert viz.overlay(grey(32, 48), spot(32, 48)).size == (48 * 14, 32 * 14)
    assert viz.overlay(grey(900, 1200), spot(900, 1200)).size == (1200, 900)
    assert max(viz.overlay(grey(4, 1000), spot(4, 1000)).size) <= viz.LARGEST


def test_a_text_is_shortened_to_its_room():
    font = viz.font_of(13)
    line = viz.shortened("very " * 50, font, 150)
    assert line.startswith("very") and line.endswith("…")
    assert font.getlength(line) <= 150
    assert viz.shortened("cat", font, 150) == "cat"
    assert viz.shortened("cat", font, 1) == ""


@pytest.mark.parametrize("keyword", ["heatmap", "mask"])
def test_maps_of_another_size_are_refused(keyword: str):
    maps = {"heatmap": spot(), "mask": spot() > 0, keyword: spot(10, 20)}
    with pytest.raises(InputError, match=rf"{keyword} has shape \(10, 20\), expected .*\(512, 640\)"):
        viz.overlay(grey(), **maps)


def test_segmentation_colors_labels_and_leaves_background():
    labels = np.full((512, 640), -1)
    labels[:100] = 0
    labels[100:130] = 4000
    drawn = np.asarray(viz.segmentation(grey(), labels, ["cat"] * 4001), dtype=float)
    for row, index in ((50, 0), (115, 4000)):
        assert abs(drawn[row, 5] - ((1 - viz.TINT) * 128 + viz.TINT * np.array(label_color(index)))).max() <= 1
    assert (drawn[200] == 128).all()
    assert drawn.shape[0] > 512  # the legend
    legend = drawn[512:].reshape(-1, 3)
    assert all((legend == label_color(index)).all(-1).any() for index in (0, 4000))


def test_segmentation_with_nothing_found_is_the_picture():
    assert viz.segmentation(grey(), torch.full((512, 640), -1), ["cat"]).tobytes() == grey().tobytes()


@pytest.mark.parametrize("width", [200, 448, 1200])
def test_a_legend_is_no_wider_than_its_image(width):
    names = ["a cat", "remote control", "the left half of a very large and otherwise unremarkable garden table", "x"]
    labels = np.arange(100 * width).reshape(100, width) % 4
    drawn = viz.segmentation(grey(100, width), labels, names)
    plain = viz.segmentation(grey(100, width), labels, names, legend=False)
    strip = np.asarray(drawn)[plain.height :]
    assert drawn.width == plain.width
    assert (strip[:, -3:] == 255).all() and (strip[:, :3] == 255).all()
    assert all((strip.reshape(-1, 3) == label_color(index)).all(-1).any() for index in range(4))


def test_a_legend_has_an_end():
    heights = set()
    for count in (viz.LEGEND + 1, 5000):
        labels = np.arange(512 * 640).reshape(512, 640) % count
        heights.add(viz.segmentation(grey(), labels, [f"thing {index}" for index in range(count)]).height)
    assert len(heights) == 1
