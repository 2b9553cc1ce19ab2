"""Scenes are exact, reproducible and honest about what can be seen."""

import numpy as np
import pytest

from open_gem.data.scenes import CONCEPTS, MAX_OBJECTS, Scene, scene

SEEDS = range(60)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(seed) for seed in SEEDS]


def same(first: Scene, second: Scene) -> bool:
    pairs = zip((first.image, first.masks, first.boxes), (second.image, second.masks, second.boxes), strict=True)
    return first.names == second.names and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("size", [64, 128, (96, 160)])
def test_a_seed_and_a_size_make_one_scene(size: int | tuple[int, int]) -> None:
    assert same(scene(3, size), scene(3, size))
    assert not same(scene(3, size), scene(4, size))


def test_shapes_and_types(scenes: list[Scene]) -> None:
    for drawn in [*scenes, scene(5, (80, 144)), scene(5, (144, 80))]:
        height, width = drawn.image.shape[:2]
        count = len(drawn.names)
        assert drawn.image.shape == (height, width, 3) and drawn.image.dtype == np.uint8
        assert drawn.masks.shape == (count, height, width) and drawn.masks.dtype == np.bool_
        assert drawn.boxes.shape == (count, 4) and drawn.boxes.dtype == np.int64


def test_size_is_height_before_width() -> None:
    assert scene(0, (64, 96)).image.shape == (64, 96, 3)


def test_one_to_four_different_concepts(scenes: list[Scene]) -> None:
    assert {len(drawn.names) for drawn in scenes} == set(range(1, MAX_OBJECTS + 1))
    for drawn in scenes:
        assert len(set(drawn.names)) == len(drawn.names)
        assert set(drawn.names) <= set(CONCEPTS)


def test_masks_are_disjoint_and_not_small(scenes: list[Scene]) -> None:
    for drawn in scenes:
        assert drawn.masks.sum(axis=0).max() == 1
        assert drawn.masks.sum(axis=(1, 2)).min() >= 100  # pixels of 128 x 128


def test_boxes_are_tight(scenes: list[Scene]) -> None:
    for drawn in scenes:
        for mask, (left, top, right, bottom) in zip(drawn.masks, drawn.boxes, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
            for edge in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]):
                assert edge.any()


def test_masks_cover_the_objects_of_the_image(scenes: list[Scene]) -> None:
    """Objects stand out: their colours are not those of the background next to them."""
    contrasts = []
    for drawn in scenes:
        shown = drawn.masks.any(axis=0)
        contrasts.append(np.abs(drawn.image[shown].mean(axis=0) - drawn.image[~shown].mean(axis=0)).max())
    assert np.median(contrasts) > 30


@pytest.mark.parametrize("seed", range(20))
def test_layout_does_not_depend_on_resolution(seed: int) -> None:
    small, large = scene(seed, 96), scene(seed, 192)
    assert small.names == large.names
    thinned = large.masks[:, ::2, ::2]
    overlap = (small.masks & thinned).sum(axis=(1, 2)) / (small.masks | thinned).sum(axis=(1, 2))
    assert overlap.min() > 0.6  # thin objects move by half a pixel
    shrunk = large.image.reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small.image).mean() < 12


def test_every_concept_is_drawn_somewhere() -> None:
    left = set(CONCEPTS)
    for seed in range(2000):
        left -= set(scene(seed, 32).names)
        if not left:
            break
    assert not left


def test_concepts_are_many_and_unique() -> None:
    assert len(CONCEPTS) >= 100
    assert len(set(CONCEPTS)) == len(CONCEPTS)


@pytest.mark.parametrize(
    ("seed", "size", "message"),
    [(-1, 128, "seed must be at least 0"), (0, 16, "at least 32 pixels"), (0, (128, 8), "at least 32 pixels")],
)
def test_impossible_arguments_are_refused(seed: int, size: int | tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        scene(seed, size)
    assert "\n" not in str(refusal.value)
