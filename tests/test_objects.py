"""Objects of an image: by a plain computation with SciPy, and each setting by itself."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from scipy import ndimage
from torch.nn.functional import interpolate

from open_gem import Boxes, Localization, Vocabulary
from open_gem.errors import InputError
from open_gem.images.views import Views, plan
from open_gem.label.label_map import LabelMap
from open_gem.objects import Object
from open_gem.types import Size
from open_gem.windows import MergedMaps

SIZE = Size(45, 61)
VOCABULARY = Vocabulary.of({"cat": ["cat", "kitten"], "dog": "dog", "owl": ["owl", "bird", "fowl"]})
SYNONYMS = [["cat", "kitten"], ["dog"], ["owl", "bird", "fowl"]]
PHRASES = [[0, 1], [2], [3, 4, 5]]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def located(**fields: Any) -> Localization:
    """Three labels, of two phrases, one and three, whose masks fall into several components."""
    maps = random(7, 6, 8) / 4  # the last is of the background
    presence, scores = torch.tensor([0.9, 0.6, 0.7]), torch.tensor([0.3, 0.1, 0.2])
    vocabulary = VOCABULARY.with_background("sky")
    return Localization(
        vocabulary.labels, maps, SIZE, **{"scores": scores, "presence": presence, "vocabulary": vocabulary, **fields}
    )


def explicit_maps(found: Localization, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and heatmaps of all labels, `(p, y, x)`."""
    cosines = interpolate(found.similarity[None], size=tuple(SIZE), mode="bilinear", align_corners=False)[0]
    best = torch.stack([cosines[phrases].amax(0) for phrases in PHRASES])
    if scale == "minmax":
        low, high = best.amin((1, 2), keepdim=True), best.amax((1, 2), keepdim=True)
        return best.numpy(), ((best - low) / (high - low)).numpy()
    if scale == "probability":
        shares = (100 * cosines).softmax(0)
        return best.numpy(), torch.stack([shares[phrases].amax(0) for phrases in PHRASES]).numpy()
    return best.numpy(), best.numpy()


def explicit_objects(
    found: Localization, threshold: float, scale: str, min_area: float, instances: str
) -> list[tuple[int, np.ndarray, float, tuple[int, int]]]:
    """(label, mask, score, point) of every object, best first within each label."""
    objects = []
    for index, (cosine, heatmap) in enumerate(zip(*explicit_maps(found, scale), strict=True)):
        mask = heatmap > threshold
        numbered: Any = ndimage.label(mask, structure=np.ones((3, 3)))
        regions = (
            [numbered[0] == number for number in range(1, numbered[1] + 1)] if instances == "component" else [mask]
        )
        own = []
        for region in regions:
            if region.sum() < min_area * region.size or not region.any():
                continue
            inside = np.where(region, cosine, -np.inf)
            y, x = np.unravel_index(inside.argmax(), inside.shape)
            own.append((index, region, float(inside.max()), (int(x), int(y))))
        objects += sorted(own, key=lambda one: -one[2])
    return objects


SETTINGS = [(0.5, "minmax"), (0.8, "minmax"), (0.05, "cosine"), (-0.02, "cosine"), (0.4, "probability")]


@pytest.mark.parametrize("instances", ["component", "label"])
@pytest.mark.parametrize("min_area", [0.0, 0.0005, 0.03])
@pytest.mark.parametrize(("threshold", "scale"), SETTINGS)
def test_objects_are_the_components_of_each_labels_mask(threshold, scale, min_area, instances):
    found = located()
    ours = found.objects(threshold, scale, min_area=min_area, instances=instances)
    expected = explicit_objects(found, threshold, scale, min_area, instances)
    assert len(expected) > 1
    assert [one.index for one in ours] == [index for index, *_ in expected]
    for one, (index, region, score, point) in zip(ours, expected, strict=True):
        assert one.label == found.labels[index]
        assert one.score == pytest.approx(score, abs=1e-6)
        assert one.point == point
        assert one.mask is not None and np.array_equal(one.mask, region)
        ys, xs = np.nonzero(region)
        assert one.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert one.area == region.sum()


def test_there_are_several_components_and_small_ones_are_left_out():
    """What the comparison above would be worth nothing without."""
    found = located()
    every = found.objects(0.5, min_area=0.0)
    assert max([one.index for one in every].count(index) for index in range(3)) >= 3
    least = sorted(one.area for one in every)[2]
    kept = found.objects(0.5, min_area=least / (SIZE.height * SIZE.width))
    assert [one.box for one in kept] == [one.box for one in every if one.area >= least]
    assert len(kept) == len(every) - 2
    assert found.objects(0.5, min_area=1.0) == []


@pytest.mark.parametrize("instances", ["component", "label"])
@pytest.mark.parametrize(("threshold", "scale"), SETTINGS[:4])
def test_objects_have_the_boxes_of_the_label(threshold, scale, instances):
    found = located()
    objects = found.objects(threshold, scale, min_area=0, instances=instances)
    for index, boxes in enumerate(found.boxes(threshold, scale, instances=instances)):
        own = [one for one in objects if one.index == index]
        assert [list(one.box) for one in own] == boxes.xyxy.tolist()
        assert [one.score for one in own] == pytest.approx(boxes.scores.tolist(), abs=1e-6)


def test_scores_of_the_image_are_those_of_the_label():
    found = located()
    for one in found.objects():
        assert found.scores is not None and found.presence is not None
        assert (one.image_score, one.presence) == (found.scores[one.index], found.presence[one.index])
    for one in located(scores=None, presence=None).objects():
        assert one.image_score is None and one.presence is None


def test_each_label_may_have_a_threshold_of_its_own():
    found, thresholds = located(), [0.9, 0.3, 0.6]
    ours = [(one.index, one.box) for one in found.objects(thresholds)]
    expected = [
        (one.index, one.box) for index, at in enumerate(thresholds) for one in found.objects(at) if one.index == index
    ]
    assert ours == expected
    assert ours != [(one.index, one.box) for one in found.objects(0.9)]


@pytest.mark.parametrize(
    ("presence", "labels"),
    [
        (0.0, ["cat", "dog", "owl"]),
        (0.5, ["cat", "owl"]),
        (0.9, ["cat"]),
        (0.95, []),
        ([0.95, 0.1, 0.7], ["dog", "owl"]),
    ],
)
def test_labels_that_are_hardly_present_have_no_objects(presence, labels):
    ours = located(presence=torch.tensor([0.9, 0.4, 0.7], dtype=torch.float64)).objects(presence=presence)
    assert list(dict.fromkeys(one.label for one in ours)) == labels
    every = {one.box: one for one in located().objects()}
    assert all(one.box in every for one in ours)


def test_a_label_that_is_not_likelier_than_not_is_absent():
    found = located(presence=torch.tensor([0.9, 0.4, 0.5]))
    assert found.present() == (True, False, True)
    assert found.present(0) == found.present([0.8, 0.1, 0.5]) == (True, True, True)
    assert {one.label for one in found.objects()} == {"cat", "owl"}
    assert located(presence=None).present(1.0) == (True, True, True)


def test_boxes_are_there_whether_a_label_is_or_not():
    found = located(presence=torch.tensor([0.9, 0.0, 0.1]))
    assert [len(boxes.xyxy) > 0 for boxes in found.boxes()] == [True, True, True]


def test_without_presence_nothing_is_left_out():
    assert len(located(presence=None).objects(presence=1.0)) == len(located().objects())


@pytest.mark.parametrize("values", [[0.5], [0.5] * 4, []])
@pytest.mark.parametrize("setting", ["threshold", "presence"])
def test_values_for_labels_are_one_a_label(setting, values):
    with pytest.raises(InputError, match=f"{len(values)} .*3 labels"):
        located().objects(**{setting: values})


def test_objects_may_come_without_masks():
    with_masks, without = located().objects(), located().objects(masks=False)
    for one, bare in zip(with_masks, without, strict=True):
        assert bare.rle is None and bare.mask is None
        assert vars(replace(one, rle=None)) == vars(replace(bare))
        left, top, right, bottom = bare.box
        assert bare.xywh == [left, top, right - left, bottom - top]
        assert bare.area == (right - left) * (bottom - top) >= one.area


def test_masks_are_cocos():
    for one in located().objects():
        assert one.rle is not None and one.mask is not None and one.point is not None
        assert one.rle["size"] == [45, 61]
        encoded: Any = {"size": one.rle["size"], "counts": one.rle["counts"].encode()}
        assert np.array_equal(coco.decode(encoded).astype(bool), one.mask)
        assert coco.toBbox(encoded).tolist() == one.xywh
        assert one.mask[one.point[1], one.point[0]]


def test_the_prompt_of_an_object_is_the_phrase_most_similar_where_it_is():
    found = located()
    objects = found.objects(0.5, min_area=0)
    for one in objects:
        assert one.point is not None
        x, y = one.point
        cell = found.similarity[:, y * 6 // 45, x * 8 // 61]
        best = int(cell[PHRASES[one.index]].argmax())
        assert one.prompt == SYNONYMS[one.index][best]
    assert {one.prompt for one in objects} == {"kitten", "dog", "bird", "fowl"}  # not always the first


def test_without_a_vocabulary_a_label_is_its_own_prompt():
    found = Localization(("cat", "dog"), random(2, 6, 8), SIZE)
    assert all(one.prompt == one.label == found.labels[one.index] for one in found.objects())


@pytest.mark.parametrize("labels", [3, 256])
def test_a_label_map_has_the_label_most_similar_at_each_pixel_of_an_object(labels):
    found, painted = located(), LabelMap(SIZE)
    objects = found.objects(0.5, presence=0, min_area=0.01, visit=painted.add)
    cosines, _ = explicit_maps(found, "cosine")
    best = np.full((3, *SIZE), -np.inf)
    for one in objects:
        assert one.mask is not None
        best[one.index][one.mask] = cosines[one.index][one.mask]
    expected = np.where(np.isinf(best.max(0)), 0, best.argmax(0) + 1)
    with Image.open(io.BytesIO(painted.png(labels))) as image:
        assert image.mode == ("L" if labels < 256 else "I;16")
        assert np.array_equal(np.array(image), expected)
    assert set(np.unique(expected)) == {0, 1, 2, 3}
    assert sum(one.area for one in objects) > (expected > 0).sum()  # some overlap


def test_nothing_stands_out_of_a_constant_map():
    found = Localization(("fog", "cat"), torch.stack([torch.full((6, 8), 0.2), random(6, 8)]), SIZE)
    assert {one.label for one in found.objects()} == {"cat"}
    assert found.objects(2.0) == []


def test_an_image_of_one_pixel_has_one_object():
    [one] = Localization(("cat",), torch.tensor([[[0.3]]]), Size(1, 1)).objects(0.1, "cosine")
    assert (one.box, one.point, one.area) == ((0, 0, 1, 1), (0, 0), 1)


def test_components_that_touch_at_corners_are_one_object():
    maps = torch.full((1, 4, 4), -0.1)
    maps[0, 0, 0] = maps[0, 1, 1] = maps[0, 3, 3] = 0.5
    objects = Localization(("cat",), maps, Size(4, 4)).objects(0.0, "cosine")
    assert [one.box for one in objects] == [(0, 0, 2, 2), (3, 3, 4, 4)]


def test_objects_of_merged_windows_are_those_of_their_maps():
    canvases = plan(Views(32, 16, merge="logits"), "native", Size(48, 64), (8, 8))
    merged = MergedMaps(canvases, [random(len(canvas.windows), 7, 4, 4) for canvas in canvases])
    ours, expected = replace(located(), maps=merged), replace(located(), maps=merged.stack())
    for one, other in zip(ours.objects(), expected.objects(), strict=True):
        assert vars(one) == vars(other)


def test_objects_are_those_of_refined_maps():
    found = located()
    mirrored = replace(found, refiner=lambda heatmap: heatmap.flip(-1))
    ours = sorted((one.index, one.area, one.box) for one in mirrored.objects())
    expected = sorted(
        (one.index, one.area, (61 - one.box[2], one.box[1], 61 - one.box[0], one.box[3])) for one in found.objects()
    )
    assert ours == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_any_type_have_objects(dtype):
    found = located()
    ours, expected = (
        replace(found, maps=found.similarity.to(dtype)).objects(min_area=0.02),
        found.objects(min_area=0.02),
    )
    assert [one.label for one in ours] == [one.label for one in expected]
    assert [one.score for one in ours] == pytest.approx([one.score for one in expected], abs=2e-3)


# Confidence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["minmax", "cosine", "probability"])
def test_confidence_is_presence_times_peak_times_probability(scale):
    found = located()
    heatmaps = explicit_maps(found, "minmax")[1]
    shares = (100 * found.similarity).softmax(0)  # on the grid, the background's prompt included
    for one in found.objects(0.0, scale, min_area=0.0):
        assert one.point is not None and one.presence is not None
        x, y = one.point
        probability = shares[PHRASES[one.index], y * 6 // 45, x * 8 // 61].sum().item()
        assert (one.peak, one.probability) == pytest.approx((heatmaps[one.index, y, x], probability), abs=1e-5)
        assert one.confidence == pytest.approx(one.presence * heatmaps[one.index, y, x] * probability, abs=1e-5)
        assert 0 <= one.confidence <= 1


def test_the_confidence_of_a_label_by_itself_stays_the_same():
    found = located()
    ours = [one.confidence for label in found.labels for one in found[label].objects()]
    assert ours == pytest.approx([one.confidence for one in found.objects()], abs=1e-6)


def test_what_is_not_known_is_left_out_of_confidence():
    one = Object("cat", 0, "kitten", 0.3, None, 0.5, (3, 4, 10, 6), peak=0.8)
    assert one.confidence == 0.4
    assert replace(one, presence=None).confidence == 0.8
    assert [replace(one, presence=None, peak=None, score=score).confidence for score in (0.3, -0.2)] == [0.3, 0]


@pytest.mark.parametrize("scale", ["minmax", "cosine"])
def test_the_best_box_of_a_detector_has_the_labels_presence(scale):
    found = located(detections=DETECTIONS, logit_scale=None, presence=torch.tensor([0.8, 0.04, 0.0]))
    ours = [one.confidence for one in found.objects(0.1, scale, presence=0)]
    assert ours == pytest.approx({"minmax": [0.8, 0.5, 0.3, 0.04], "cosine": [0.8, 0.5, 0.3]}[scale], abs=1e-6)


# Overlaps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "scale"), SETTINGS)
def test_a_pixel_belongs_to_the_label_with_the_highest_cosine_there(threshold, scale):
    found = located()
    cosines, heatmaps = explicit_maps(found, scale)
    masks = heatmaps > threshold
    winner = np.where(masks.any(0), np.where(masks, cosines, -np.inf).argmax(0), -1)
    assert masks.sum(0).max() > 1 or scale == "probability"
    ours = found.objects(threshold, scale, min_area=0.0, exclusive=True)
    for index in range(3):
        own = [one.mask for one in ours if one.index == index and one.mask is not None]
        assert np.array_equal(np.any([np.zeros(SIZE, bool), *own], axis=0), winner == index)
    for one in ours:
        assert one.mask is not None and one.point is not None and one.mask[one.point[1], one.point[0]]


def test_absent_labels_take_no_pixel():
    found = located(presence=torch.tensor([0.9, 0.1, 0.7]))
    ours, every = found.objects(exclusive=True, min_area=0), found.objects(min_area=0)
    covered, expected = (np.any([one.mask for one in objects], axis=0) for objects in (ours, every))  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert np.array_equal(covered, expected) and {one.label for one in ours} == {"cat", "owl"}


@pytest.mark.parametrize("iou", [0.0, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("predicts", [False, True])
def test_of_two_boxes_that_overlap_the_more_confident_stays(iou, predicts):
    boxes = torch.tensor([[0, 0, 48, 30], [5, 10, 20, 25], [40, 0, 60, 45]]), torch.tensor([0.7, 0.5, 0.3])
    fields = {"detections": (Boxes(*boxes), *DETECTIONS[:2]), "logit_scale": None}
    found = located(**fields if predicts else {})
    every = found.objects(0.2, min_area=0)
    kept: list[Object] = []
    for one in sorted(every, key=lambda one: -one.confidence):
        others = np.array([other.xywh for other in kept], float)
        if not kept or coco.iou(np.array([one.xywh], float), others, [0] * len(kept)).max() <= iou:  # pyright: ignore[reportAttributeAccessIssue]
            kept.append(one)
    assert len(kept) < len(every) or iou > 0.5
    assert [one.box for one in found.objects(0.2, min_area=0, nms=iou)] == [one.box for one in every if one in kept]


def test_a_label_map_has_no_object_that_was_suppressed():
    found, painted, expected = located(), LabelMap(SIZE), LabelMap(SIZE)
    without = found.objects(0.2, min_area=0.0, nms=0.1, masks=False, visit=painted.add)
    objects = found.objects(0.2, min_area=0.0, nms=0.1)
    for one in objects:
        assert one.mask is not None
        expected.add(one.index, (slice(None), slice(None)), one.mask, explicit_maps(found, "cosine")[0][one.index])
    assert painted.png(3) == expected.png(3)
    assert [one.box for one in without] == [one.box for one in objects] and not any(one.rle for one in without)


def test_impossible_settings_of_overlaps_are_refused():
    with pytest.raises(InputError, match=r"nms is 1\.5, expected an IoU"):
        located().objects(nms=1.5)
    with pytest.raises(InputError, match="exclusive masks of a model that predicts boxes"):
        located(detections=DETECTIONS, logit_scale=None).objects(exclusive=True)


# Boxes that the model itself predicts ---------------------------------------------------------------------------------

DETECTIONS = (
    Boxes(torch.tensor([[0, 0, 50, 30], [10, 10, 20, 20], [40, 0, 60, 45]]), torch.tensor([0.8, 0.5, 0.3])),
    Boxes(torch.tensor([[20, 20, 61, 40]]), torch.tensor([0.04])),
    Boxes(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0)),
)


@pytest.mark.parametrize(
    ("threshold", "scale", "instances", "scores"),
    [
        (0.5, "minmax", "component", [0.8, 0.5, 0.04]),  # of each label's best
        (0.2, "cosine", "component", [0.8, 0.5, 0.3]),
        (0.0, "cosine", "label", [0.8, 0.04]),
        ([0.6, 0.01, 0.5], "cosine", "component", [0.8, 0.04]),
        (0.9, "cosine", "component", []),
    ],
)
def test_objects_of_a_detector_are_its_boxes(threshold, scale, instances, scores):
    found = located(detections=DETECTIONS, logit_scale=None)
    ours = found.objects(threshold, scale, instances=instances)
    assert [one.score for one in ours] == pytest.approx(scores)
    boxes = {tuple(box) for some in DETECTIONS for box in some.xyxy.tolist()}
    for one in ours:
        assert one.box in boxes
        assert (one.point, one.rle, one.mask) == (None, None, None)
        assert one.prompt == one.label == found.labels[one.index]
        assert one.area == one.xywh[2] * one.xywh[3]


def test_boxes_of_labels_that_are_hardly_present_are_left_out():
    found = located(detections=DETECTIONS, logit_scale=None, presence=torch.tensor([0.9, 0.4, 0.7]))
    assert {one.label for one in found.objects(0.0, "cosine")} == {"cat"}
    assert {one.label for one in found.objects(0.0, "cosine", presence=0.4)} == {"cat", "dog"}


# One object -----------------------------------------------------------------------------------------------------------


def test_an_object_with_a_box_alone():
    one = Object("cat", 0, "kitten", 0.5, None, None, (3, 4, 10, 6))
    assert (one.xywh, one.area, one.mask) == ([3, 4, 7, 2], 14, None)


def test_a_localization_moves_with_all_that_objects_need():
    found = located(scores=torch.tensor([0.3, 0.1, 0.2], dtype=torch.bfloat16))
    moved = found.to("cpu")
    assert moved.scores is not None and moved.scores.dtype == torch.float32
    assert [one.box for one in moved.objects()] == [one.box for one in found.objects()]
