"""The auto-annotation function does what CVAT's own driver asks of one."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from open_gem.data.scenes import scene
from open_gem.errors import InputError
from open_gem.serve.cvat import create

PICTURE = scene(seed=1, size=192)


def test_settings_that_make_no_sense_are_reported():
    for settings, expected in [
        ({}, "expected prompts"),
        ({"prompts": "cat", "classes": "a.yaml"}, "and not both"),
        ({"prompts": "cat", "shape": "cuboid"}, "shape is 'cuboid', expected one of mask, rectangle"),
        ({"prompts": "cat", "presence": 2.0}, "presence of label 'cat' is 2.0"),
        ({"prompts": "cat", "refine": "pmar"}, "unknown refinement 'pmar'"),
        ({"prompts": "cat", "min_area": 2.0}, "min area is 2.0"),
    ]:
        with pytest.raises(InputError, match=expected):
            create(**settings)


def test_a_class_files_thresholds_count_unless_others_are_given(tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("labels: {cat: {presence: 0.95}, dog: }\npresence: 0.8\nthreshold: 0.4")
    wanted = create(model="embedded", classes=str(path)).labeling.classes
    assert (wanted.presence, wanted.threshold) == ((0.95, 0.8), (0.4, 0.4))
    wanted = create(model="embedded", classes=str(path), presence=0.5, threshold=0.6).labeling.classes
    assert (wanted.presence, wanted.threshold) == ((0.95, 0.5), (0.6, 0.6))


def annotate(function: Any, *, type: str, **context: Any) -> list[Any]:
    """What reaches the server: the driver's own mapping, which refuses what breaks a rule."""
    driver: Any = pytest.importorskip("cvat_sdk.auto_annotation.driver")
    labels = [
        SimpleNamespace(name=label.name, id=100 + label.id, type=type, attributes=[], sublabels=[])
        for label in function.spec.labels
    ]
    convert = context.get("conv_mask_to_poly", False)
    rules = {"allow_unmatched_labels": False, "conv_mask_to_poly": convert}
    mapper = driver._AnnotationMapper(logging.getLogger(), function.spec.labels, labels, **rules)
    found = function.detect(driver._DetectionFunctionContextImpl(frame_name="a.png", **context), PICTURE.image)
    tags, shapes = mapper.validate_and_remap(found, ds_frame=7)
    assert tags == []
    assert all(shape.frame == 7 and shape.label_id >= 100 for shape in shapes)
    return shapes


def test_masks_polygons_and_rectangles_are_of_the_same_objects():
    masks: Any = pytest.importorskip("cvat_sdk.masks")
    sv = pytest.importorskip("supervision")
    prompts = ",".join(PICTURE.names)
    found = create(prompts, model="embedded", presence=0.0)
    as_masks = annotate(found, type="mask")
    assert {shape.label_id for shape in as_masks} == {100 + index for index in range(len(PICTURE.names))}
    as_polygons = annotate(found, type="polygon", conv_mask_to_poly=True)
    boxes = annotate(create(prompts, model="embedded", shape="rectangle", presence=0.0), type="rectangle")
    assert len(as_masks) == len(as_polygons) == len(boxes)
    side = PICTURE.image.shape[1]
    for mask, polygon, box in zip(as_masks, as_polygons, boxes, strict=True):
        pixels = masks.decode_mask(mask.points, image_width=side, image_height=side)
        corners = np.array(polygon.points).reshape(-1, 2).astype(int)
        assert np.array_equal(sv.polygon_to_mask(corners, (side, side)).astype(bool), pixels)
        ys, xs = np.nonzero(pixels)
        assert mask.points[-4:] == [xs.min(), ys.min(), xs.max(), ys.max()]
        assert mask.label_id == polygon.label_id == box.label_id
        assert box.points == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_the_confidence_that_cvat_asks_for_is_of_presence():
    pytest.importorskip("cvat_sdk")
    found = create(",".join([*PICTURE.names, "a zebra crossing"]), model="embedded", presence=0.0)
    assert annotate(found, type="mask", conf_threshold=0.0)
    assert annotate(found, type="mask", conf_threshold=1.0) == []


def test_each_label_has_the_prompts_and_thresholds_of_the_class_file(tmp_path):
    pytest.importorskip("cvat_sdk")
    first, second = PICTURE.names[:2]

    def areas(*settings: str) -> dict[int, float]:
        path = tmp_path / "classes.yaml"
        path.write_text(f"labels:\n  thing: {{prompts: [{first}], {settings[0]}}}\n  other: {{{settings[1]}}}\n")
        function = create(classes=str(path), model="embedded", shape="rectangle", instances="label")
        assert [label.name for label in function.spec.labels] == ["thing", "other"]
        boxes = [(shape.label_id, shape.points) for shape in annotate(function, type="rectangle")]
        return {label: (right - left) * (bottom - top) for label, (left, top, right, bottom) in boxes}

    both = areas("presence: 0", f"prompts: {second}, presence: 0")
    assert both.keys() == {100, 101}
    assert areas("presence: 0", f"prompts: {second}, presence: 1").keys() == {100}
    tight = areas("presence: 0, threshold: 0.9", f"prompts: {second}, presence: 0")
    assert tight[100] < both[100] and tight[101] == both[101]


def test_cvat_cli_loads_it(tmp_path):
    loader = pytest.importorskip("cvat_cli._internal.common").FunctionLoader
    parse = pytest.importorskip("cvat_cli._internal.parsers").parse_function_parameter
    (tmp_path / "classes.yaml").write_text("labels: {animal: [snail, rabbit], food: {prompts: hamburger, presence: 1}}")
    for labels, expected in [
        ("prompts=str:snail,rabbit", ["snail", "rabbit"]),
        (f"classes=str:{tmp_path / 'classes.yaml'}", ["animal", "food"]),
    ]:
        settings = [labels, "model=str:embedded", "shape=str:rectangle", "threshold=float:0.4"]
        function = loader("open_gem.serve.cvat", None, dict(map(parse, settings))).load()
        assert [(label.name, label.id, str(label.type)) for label in function.spec.labels] == [
            (label, index, "rectangle") for index, label in enumerate(expected)
        ]
        assert function.labeling.classes.threshold == (0.4, 0.4)
