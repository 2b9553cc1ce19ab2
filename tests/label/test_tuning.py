"""Tuning: curves by a plain count, Wilson's intervals by their formula, matching, and the class file."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from labelled import rle_of

from open_gem.errors import InputError
from open_gem.label.kept import keep
from open_gem.label.marks import Detection
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Manifest, Parts, row_of
from open_gem.label.rules import ObjectRules
from open_gem.label.tuning import (
    LOWEST,
    THRESHOLDS,
    Judged,
    Rate,
    Truth,
    at_presence,
    best_point,
    check_class_file,
    judge,
    judge_marks,
    tuned,
    verdict,
    write_class_file,
)
from open_gem.localization import Localization
from open_gem.types import Size

CLASSES = Ontology.of({"labels": {"cat": ["cat", "kitten"], "dog": {"threshold": 0.6}}, "background": "sky"})
SIZE = Size(40, 60)


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def stored(
    label: str, box: tuple[int, int, int, int], presence: float = 0.8, confidence: float = 0.5
) -> dict[str, Any]:
    known = {"presence": presence, "confidence": confidence, "rle": rle_of(rectangle(*box))}
    return {"label": label, "prompt": label, "xyxy": list(box), "score": 0.2, **known}


def parts_of(folder: Path, images: dict[str, list[dict[str, Any]]], **settings: Any) -> Parts:
    rules = ObjectRules(CLASSES, keep=None).describe() | settings
    parts = Parts.claim(folder, Manifest(json.loads(json.dumps(rules)), CLASSES.labels))
    size = {"height": SIZE.height, "width": SIZE.width}
    parts.write("1", [row_of(id, "", status="ok", seconds=0, objects=own, **size) for id, own in images.items()])
    return parts


def truth_of(path: Path, objects: dict[str, list[tuple[str, tuple[int, int, int, int]]]], **more: Any) -> Path:
    numbers = {"dog": 7, "cat": 3}
    annotations = [
        {
            "id": 10 * image + number,
            "image_id": image,
            "category_id": numbers[label],
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "area": (box[2] - box[0]) * (box[3] - box[1]),
            "iscrowd": 0,
            "segmentation": rle_of(rectangle(*box)),
        }
        for image, own in enumerate(objects.values(), start=1)
        for number, (label, box) in enumerate(own)
    ]
    listed = [
        {"id": image, "file_name": name, "height": 40, "width": 60} for image, name in enumerate(objects, start=1)
    ]
    categories = [{"id": number, "name": label} for label, number in numbers.items()]
    path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories} | more))
    return path


# Curves ---------------------------------------------------------------------------------------------------------------


def judged(count: int = 200, wanted: int | None = None) -> Judged:
    random = np.random.default_rng(0)
    own = Judged(0.5, wanted=wanted)
    for presence in random.uniform(0.1, 1, count):
        own.add(float(presence), bool(random.uniform() < presence))
    return own


@pytest.mark.parametrize("wanted", [None, 150])
def test_a_curve_has_precision_and_recall_at_each_presence(wanted):
    own = judged(wanted=wanted)
    curve = own.curve()
    assert [point.presence for point in curve] == sorted(
        {math.floor(10_000 * value) / 10_000 for value in own.presence}
    )
    for point in curve:
        kept = [right for presence, right in zip(own.presence, own.right, strict=True) if presence >= point.presence]
        assert point.precision == Rate(sum(kept), len(kept))
        assert point.recall == Rate(sum(kept), wanted or sum(own.right))


def test_intervals_are_wilsons():
    z = 1.959963984540054
    for hits, of in ((0, 5), (3, 7), (90, 100), (12, 12)):
        share = hits / of
        middle, reach = share + z**2 / (2 * of), z * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
        expected = [(middle + sign * reach) / (1 + z**2 / of) for sign in (-1, 1)]
        assert Rate(hits, of).interval == pytest.approx(expected, abs=1e-9)
    assert all(map(math.isnan, (Rate(0, 0).value, *Rate(0, 0).interval)))


def test_the_best_point_has_the_most_recall_at_the_wanted_precision():
    curve = judged().curve()
    best = best_point(curve, 0.8)
    assert best is not None and best.precision.value >= 0.8 and best.precision.of >= 10
    assert all(p.recall.hits <= best.recall.hits for p in curve if p.precision.value >= 0.8 and p.precision.of >= 10)
    assert at_presence(curve, best.presence) == best
    assert at_presence(curve, 1.0) is None


def certain(hits: int, misses: int, presence: float = 0.9) -> Judged:
    own = Judged(0.5)
    for right in [True] * hits + [False] * misses:
        own.add(presence, right)
    return own


@pytest.mark.parametrize(
    ("hits", "misses", "says"),
    [
        (200, 0, "shown by the data"),
        (19, 1, "likely, not shown: 20 detections are too few"),
        (5, 0, "not supported: reached by fewer than 10 detections only"),
        (3, 4, "not supported: 7 detections, expected 10 or more"),
        (5, 15, "not reached: 0.25 at most, at presence 0.9"),
        (0, 0, "not supported: 0 detections, expected 10 or more"),
    ],
)
def test_what_the_data_do_not_support_is_said(hits, misses, says):
    curve = certain(hits, misses).curve()
    best = best_point(curve, 0.9)
    assert (best is None) == says.startswith("not") and verdict(curve, best, 0.9) == says


# Marks ----------------------------------------------------------------------------------------------------------------


def test_marks_judge_the_detections_they_are_of(tmp_path):
    images = {"a.jpg": [stored("cat", (0, 0, 9, 9), 0.7), stored("dog", (0, 0, 9, 9), 0.6)], "b.jpg": []}
    images["b.jpg"] = [stored("cat", (0, 0, 9, 9), 0.9), stored("cat", (20, 20, 29, 29), 0.9)]
    marks = {Detection("a.jpg", "cat", (0, 0, 9, 9)): False, Detection("b.jpg", "cat", (20, 20, 29, 29)): True}
    result = judge_marks(parts_of(tmp_path, images), marks)
    assert {label: own for label, [own] in result.items()} == {
        "cat": Judged(0.5, pytest.approx([0.7, 0.9]), [False, True]),  # pyright: ignore[reportArgumentType]
        "dog": Judged(0.6),
    }


def test_marks_of_another_folder_are_refused(tmp_path):
    parts = parts_of(tmp_path, {"a.jpg": [stored("cat", (0, 0, 9, 9))]})
    marks = {Detection("a.jpg", "cat", (0, 0, 9, 9)): True, Detection("a.jpg", "cat", (0, 0, 9, 8)): True}
    with pytest.raises(InputError, match=r"1 of 2 marks are of no detection in .*, such as 'cat' in 'a.jpg'"):
        judge_marks(parts, marks)


# True objects ---------------------------------------------------------------------------------------------------------

BOX, NEAR, FAR = (0, 0, 20, 20), (2, 0, 20, 20), (30, 10, 50, 30)  # IoU 0.9, 0


def test_a_detection_is_right_if_it_matches_a_true_object(tmp_path):
    images = {
        "a.jpg": [
            stored("cat", NEAR, 0.9, 0.3),
            stored("cat", BOX, 0.9, 0.7),  # the more confident takes the object
            stored("dog", BOX, 0.4),
            stored("dog", FAR, 0.4, 0.6),
        ],
        "b.jpg": [stored("cat", FAR, 0.2)],
        "not in the truth.jpg": [stored("cat", FAR, 0.99)],
    }
    truth = truth_of(
        tmp_path / "t.json", {"a.jpg": [("cat", BOX), ("dog", FAR)], "x/b.jpg": [("cat", BOX), ("cat", FAR)]}
    )
    result = judge(parts_of(tmp_path / "labels", images), Truth.read(truth))
    of_labels = {
        label: (sorted(zip(own.presence, own.right, strict=True)), own.wanted) for label, [own] in result.items()
    }
    approx = [(pytest.approx(presence), right) for presence, right in [(0.2, True), (0.9, False), (0.9, True)]]
    assert of_labels["cat"] == (approx, 3)
    assert of_labels["dog"] == ([(pytest.approx(0.4), False), (pytest.approx(0.4), True)], 1)
    strict = judge(Parts.open(tmp_path / "labels"), Truth.read(truth), iou=0.95)
    assert sum(strict["cat"][0].right) == 2


def test_without_masks_boxes_are_compared(tmp_path):
    path = truth_of(tmp_path / "t.json", {"a.jpg": [("cat", BOX)]})
    document = json.loads(path.read_text())
    del document["annotations"][0]["segmentation"]
    path.write_text(json.dumps(document))
    truth = Truth.read(path)
    parts = parts_of(tmp_path / "labels", {"a.jpg": [stored("cat", NEAR) | {"rle": None}]})
    assert not truth.has_masks and judge(parts, truth)["cat"][0].right == [True]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", "is not COCO's instances"),
        ("[]", "is not COCO's instances"),
        ('{"images": [], "annotations": [{"id": 1}], "categories": []}', "is not COCO's instances .KeyError: 'bbox'"),
        (None, "cannot read .*No such file"),
    ],
)
def test_a_file_that_is_not_cocos_is_refused(tmp_path, content, error):
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match=error):
        Truth.read(tmp_path / "t.json")


def test_truth_that_does_not_match_the_labels_is_refused(tmp_path):
    parts = parts_of(tmp_path / "labels", {"a.jpg": [stored("cat", BOX)]})
    categories = [{"id": 3, "name": "feline"}]
    truth = truth_of(tmp_path / "t.json", {"a.jpg": [("cat", BOX)]}, categories=categories)
    with pytest.raises(InputError, match="no category of the truth is a label, expected cat, dog; got feline"):
        judge(parts, Truth.read(truth))
    truth = truth_of(tmp_path / "t.json", {"z.jpg": [("cat", BOX)]})
    with pytest.raises(InputError, match=r"no labelled image is in the truth, .* such as 'a.jpg'; got 'z.jpg'"):
        judge(parts, Truth.read(truth))
    listed = [{"id": 1, "file_name": "a.jpg", "height": 60, "width": 40}]
    truth = truth_of(tmp_path / "t.json", {"a.jpg": [("cat", BOX)]}, images=listed)
    with pytest.raises(InputError, match=r"'a.jpg' is 40x60 pixels .* in the labels and 60x40 in the truth"):
        judge(parts, Truth.read(truth))


def test_kept_maps_are_tried_at_other_thresholds(tmp_path):
    maps = torch.rand(4, 4, 6, generator=torch.Generator().manual_seed(1)) / 4  # cat, kitten, dog, sky
    presence = torch.tensor([0.3, LOWEST / 2])
    located = Localization(CLASSES.labels, maps, SIZE, presence, presence=presence, vocabulary=CLASSES.vocabulary)
    rules = ObjectRules(CLASSES)
    parts = Parts.claim(tmp_path / "labels", Manifest(json.loads(json.dumps(rules.describe())), CLASSES.labels))
    row = row_of("a.jpg", "", status="ok", seconds=0, kept=keep(located, 0.0), **rules.fields(located))
    parts.write("1", [row])
    assert row["objects"] == []  # by the presence of 0.5 that made the labels
    truth = truth_of(tmp_path / "t.json", {"a.jpg": [("cat", BOX)]})
    result = judge(parts, Truth.read(truth), iou=0.2)
    assert [own.threshold for own in result["cat"]] == [0.5, *THRESHOLDS]
    for own in result["cat"]:
        objects = [obj for obj in located.objects(own.threshold, presence=LOWEST) if obj.label == "cat"]
        assert own.presence == pytest.approx([0.3] * len(objects)) and own.wanted == 1
        ious = [(obj.mask & rectangle(*BOX)).sum() / (obj.mask | rectangle(*BOX)).sum() for obj in objects]  # pyright: ignore[reportOptionalOperand]
        assert any(own.right) == any(iou >= 0.2 for iou in ious)
    assert {len(own.right) for own in result["dog"]} == {0}


# The class file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classes.yaml", "classes.json"])
def test_thresholds_are_written_into_the_class_file(tmp_path, name):
    [point, *_] = certain(20, 0, 0.87).curve()
    changed = tuned(CLASSES, {"cat": replace_threshold(point, 0.7)})
    assert (changed.presence, changed.threshold) == ((0.87, 0.5), (0.7, 0.6))
    check_class_file(tmp_path / name, CLASSES)
    write_class_file(tmp_path / name, changed)
    assert Ontology.read(tmp_path / name) == replace(changed, vocabulary=Ontology.read(tmp_path / name).vocabulary)
    assert Ontology.read(tmp_path / name).describe() == changed.describe()
    check_class_file(tmp_path / name, CLASSES)  # only thresholds differ


def replace_threshold(point: Any, threshold: float) -> Any:
    return point._replace(threshold=threshold)


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"labels": {"cat": "cat", "dog": None}}, "at label 'cat': 'cat', 'kitten' there, 'cat' in the file"),
        ({"labels": {"cat": ["cat", "kitten"]}, "background": "sky"}, "at label 'dog': 'dog' there, no such label in"),
        ({"labels": {"cat": ["cat", "kitten"], "dog": None}, "background": "sea"}, "another background .* 'sky'"),
    ],
)
def test_a_class_file_that_differs_is_refused(tmp_path, document, error):
    path = tmp_path / "classes.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match=error):
        check_class_file(path, CLASSES)


def test_a_class_file_without_thresholds_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"'.*classes.txt' is no class file with thresholds, expected an ending of .yaml"
    ):
        check_class_file(tmp_path / "classes.txt", CLASSES)
