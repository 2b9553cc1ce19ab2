"""What a request may choose, and what `open-gem serve` is started with: the same as in Python, within limits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco
from serving import Server, png
from typer.testing import CliRunner

import open_gem
from open_gem.cli import app
from open_gem.images.views import Views
from open_gem.method.steps import Scga
from open_gem.method.table import GRADIENTS, METHODS
from open_gem.objects import Object
from open_gem.serve.settings import Settings

PROMPTS = ["a cat", "a dog", "tree"]
PAMR = open_gem.Pamr(iterations=2, dilations=(1,))


@pytest.fixture(scope="module")
def server(tiny_localizer):
    server = Server(tiny_localizer, Settings(refinements={"none": None, "pamr": PAMR}, max_refined_pixels=20_000))
    yield server
    server.stop()


@pytest.fixture
def ask(server):
    """Ask about an uploaded image of noise; the answer, which is expected to have this status."""
    path = f"/v1/images/{server.upload(png())['id']}/ground"

    def asked(status: int = 200, **settings: Any) -> Any:
        answer = server.client.post(path, json={"prompts": PROMPTS, **settings})
        assert answer.status_code == status, answer.text
        return answer.json() if status == 200 else answer.json()["error"]

    return asked


# Objects --------------------------------------------------------------------------------------------------------------

OBJECTS = {
    "presence 0": {"presence": 0},
    "absent none": {"absent": "none"},
    "absent denoise": {"absent": "denoise"},
    "min area": {"absent": "none", "min_area": 0.2},
    "label": {"absent": "none", "instances": "label", "threshold": 0.8},
    "cosine": {"absent": "none", "heatmap_scale": "cosine", "threshold": 0.1},
    "probability": {"absent": "none", "heatmap_scale": "probability", "threshold": 0.3},
    "exclusive": {"absent": "none", "exclusive": True, "threshold": 0.3},
    "nms": {"absent": "none", "nms": 0.1, "threshold": 0.3},
    "exclusive present": {"presence": 0.3, "exclusive": True, "nms": 0.5},
}


def to_dict(obj: Object) -> dict[str, Any]:
    """An object as it is served. Its confidence is a product, which may be rounded the other way."""
    return obj.to_dict() | {"confidence": pytest.approx(obj.confidence, abs=2e-6)}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_those_of_python_with_the_same_settings(ask, tiny_localizer, name):
    located, settings = tiny_localizer(png(), PROMPTS), OBJECTS[name]
    python = {"scale" if key == "heatmap_scale" else key: value for key, value in settings.items()}
    expected = [to_dict(obj) for obj in located.objects(**python)]
    answer = ask(mask="rle", **settings)
    assert answer["objects"] == expected
    absent = settings.get("absent", "presence")
    present = located.present(settings.get("presence", 0.5), absent=absent)
    assert [label["present"] for label in answer["labels"]] == list(present)


def test_labels_that_compete_have_fewer_pixels_and_objects(ask):
    def areas(**settings: Any) -> list[int]:
        objects = ask(absent="none", threshold=0.3, mask="rle", **settings)["objects"]
        return [int(coco.area(obj["mask"])) for obj in objects]

    free = areas()
    assert sum(areas(exclusive=True)) <= 60 * 90 < sum(free)
    assert 0 < len(areas(nms=0.1)) < len(free)
    assert ask(objects=False, nms=0.1, exclusive=True)["objects"] == []


def test_distractors_share_the_softmax_and_are_never_predicted(ask, tiny_localizer):
    vocabulary = open_gem.Vocabulary.of(PROMPTS[:1]).with_background(PROMPTS[1:])
    expected = tiny_localizer(png(), vocabulary).objects(0.3, "probability", absent="none")
    answer = ask(prompts=PROMPTS[:1], negative=PROMPTS[1:], threshold=0.3, absent="none")
    assert [obj["box"] for obj in answer["objects"]] == [list(obj.box) for obj in expected]
    assert [label["label"] for label in answer["labels"]] == PROMPTS[:1]


# Methods --------------------------------------------------------------------------------------------------------------


def test_several_methods_of_a_request_share_one_pass(server, ask):
    passes = server.metric('open_gem_batch_inputs_count{work="encode"}')
    form = {"prompts": PROMPTS, "presence": 0, "methods": ["naclip", "sclip", "gem"]}
    answer = server.client.post("/v1/ground", files={"file": png(seed=50)}, data=form).json()
    assert [result["method"] for result in answer["results"]] == form["methods"]
    assert server.metric('open_gem_batch_inputs_count{work="encode"}') == passes + 1
    for result in answer["results"]:
        single = {**form, "method": result["method"]}
        del single["methods"]
        assert server.client.post("/v1/ground", files={"file": png(seed=50)}, data=single).json() == result
    assert ask(methods=["gem"])["results"] == [ask(method="gem")]  # one of them is a list of one


def test_images_of_one_shape_share_a_pass_though_nothing_else_waits(server):
    lines = [f'open_gem_batch_inputs_{what}{{work="encode"}}' for what in ("count", "sum")]
    files = [("files", png(*size, seed=seed)) for seed, size in enumerate([(60, 90), (90, 60), (60, 90), (90, 60)], 60)]
    before = list(map(server.metric, lines))
    form = {"prompts": PROMPTS, "methods": ["gem", "clip"]}
    answers = server.client.post("/v1/ground/batch", files=files, data=form).json()["results"]
    assert list(map(server.metric, lines)) == [before[0] + 2, before[1] + 4]
    assert [[result["method"] for result in answer["results"]] for answer in answers] == [["gem", "clip"]] * 4
    assert [answer["results"][0]["height"] for answer in answers] == [60, 90, 60, 90]


def test_methods_beyond_what_is_served_are_refused(tiny_localizer):
    steps = METHODS["gem"].replace(steps=(Scga(),))
    server = Server(tiny_localizer, Settings(served={"stepped": steps, "clip": "clip"}))
    try:
        [model] = server.client.get("/v1/models").json()["models"]
        form = {"prompts": PROMPTS, "presence": 0}
        default, clip, gem = (
            server.client.post("/v1/ground", files={"file": png()}, data=form | more)
            for more in ({}, {"method": "clip"}, {"method": "gem"})
        )
        info = server.upload(png())
    finally:
        server.stop()
    assert (model["default"], info["methods"]) == ("stepped", ["stepped", "clip"])
    expected = tiny_localizer.locate(tiny_localizer.encode(png(), steps), PROMPTS).objects(presence=0)
    assert [obj["box"] for obj in default.json()["objects"]] == [list(obj.box) for obj in expected]
    assert (default.json()["method"], clip.json()["method"]) == ("stepped", "clip")
    assert "method 'gem' is not served; served are: stepped, clip" in gem.json()["error"]


def test_the_default_is_the_localizers_own_method(tiny_localizer):
    server = Server(replace(tiny_localizer, method="naclip"), Settings())
    try:
        assert server.client.get("/v1/models").json()["models"][0]["default"] == "naclip"
    finally:
        server.stop()


# Refinements ----------------------------------------------------------------------------------------------------------


def test_a_request_chooses_a_refinement_that_is_served(server, ask, tiny_localizer):
    assert server.client.get("/v1/models").json()["models"][0]["refinements"] == ["none", "pamr"]
    for name, localizer in [("none", tiny_localizer), ("pamr", replace(tiny_localizer, refinement=PAMR))]:
        expected = localizer(png(), PROMPTS).objects(absent="none")
        answer = ask(refine=name, absent="none", mask="rle")
        assert len(answer["objects"]) == len(expected) > 0
        for obj, python in zip(answer["objects"], expected, strict=True):
            assert np.array_equal(coco.decode(obj["mask"]).astype(bool), python.mask)
    assert ask(absent="none") == ask(refine="none", absent="none") != ask(refine="pamr", absent="none")


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "status", "error"),
    [
        ({"refine": "sharpen"}, 422, "refinement 'sharpen' is not served; served are: none, pamr"),
        ({"method": "gme"}, 422, "method 'gme' is not served"),
        ({"methods": ["gem", "gme"]}, 422, "method 'gme' is not served"),
        ({"methods": ["gem"], "method": "clip"}, 422, "method and methods given, expected one of them"),
        ({"methods": ["gem", "clip", "sclip", "naclip", "kk"]}, 422, "5 methods, expected 4 at most"),
        ({"methods": []}, 422, "methods"),
        ({"absent": "perhaps"}, 422, "absent"),
        ({"heatmap_scale": "log"}, 422, "heatmap_scale"),
        ({"min_area": -1}, 422, "min_area"),
        ({"min_area": 0, "refine": "pamr"}, 422, "min_area is 0.0 with a refinement, expected 0.0005 or more"),
        ({"nms": 1.5}, 422, "nms: Input should be less than or equal to 1"),
        ({"nms": "inf"}, 422, "nms"),
        ({"exclusive": "perhaps"}, 422, "exclusive"),
        ({"negative": ["x"] * 62}, 422, "65 prompts, expected 64 at most"),
        ({"refine": "pamr", "prompts": [*PROMPTS, "x"]}, 413, "expected 20000 at most: ask 3 at a time"),
        ({"refine": "pamr", "methods": ["gem", "clip"]}, 413, "ask 1 at a time"),
        ({"refine": "pamr", "heatmap_scale": "probability"}, 413, "ask 1 at a time"),
        ({"refine": "pamr", "negative": ["x"], "objects": True}, 413, "ask 1 at a time"),
    ],
)
def test_choices_beyond_the_limits_are_refused_with_one_line(ask, settings, status, error):
    answer = ask(status, **settings)
    assert error in answer and "\n" not in answer


def test_masks_as_png_have_a_limit_of_pixels_together(tiny_localizer):
    server = Server(tiny_localizer, Settings(max_map_pixels=60 * 90))
    try:
        path = f"/v1/images/{server.upload(png())['id']}/ground"
        asked = {"prompts": ["a cat"], "absent": "none", "min_area": 0}
        objects = server.client.post(path, json={**asked, "mask": "rle"}).json()["objects"]
        answer = server.client.post(path, json={**asked, "mask": "png"})
    finally:
        server.stop()
    assert len(objects) > 1 and answer.status_code == 413
    assert f"{len(objects)} masks of 5400 pixels as PNG" in answer.json()["error"]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """Run `open-gem serve` up to the moment where it would listen; the application's service."""
    apps: list[Any] = []
    monkeypatch.setattr("open_gem.cli.serve.run", lambda application, *_, **__: apps.append(application))

    def start(*words: str) -> Any:
        ran = CliRunner().invoke(app, ["serve", "--port", "0", *words])
        assert ran.exit_code == 0, ran.output
        return apps.pop().state.service

    return start


def test_the_command_serves_views_and_settings_as_ground_has_them(started, tiny):
    model = ["--model", tiny, "--device", "cpu"]
    service = started(*model, "--window", "32", "--flip", "--image-size", "short:64", "--template", "a {}")
    assert service.localizer.views == Views(window=32, flip=True)
    assert (service.localizer.size_rule, service.localizer.template) == ("short:64", "a {}")
    assert list(service.methods) == [*METHODS, *GRADIENTS] and list(service.refinements) == ["none"]
    service = started(*model, "--remove-redundancy", "--refine", "none,pamr", "--method", "naclip,clip")
    assert service.localizer.remove_redundancy and service.localizer.refinement is None
    assert list(service.methods) == ["naclip", "clip"] and list(service.refinements) == ["none", "pamr"]
    service = started(*model, "--refine", "pamr", "--iterations", "3", "--depth", "2")
    assert next(iter(service.refinements)) == "pamr" and service.default == "gem"
    assert service.methods["gem"].describe() == METHODS["gem"].replace(iterations=3, depth=2).describe()
    assert list(service.methods) == [*METHODS, *GRADIENTS]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--method", "gme"], "gme"),
        (["--method", "clip", "--depth", "3"], "--depth has no effect with method 'clip'"),
        (["--refine", "pmar"], "unknown refinement 'pmar'"),
        (["--window", "33"], "window is 33 pixels"),
        (["--stride", "8"], "stride is 8 without a window"),
        (["--template", "none"], "none"),
    ],
)
def test_impossible_settings_are_one_line_and_nothing_is_served(words, error, tiny):
    ran = CliRunner().invoke(app, ["serve", "--port", "0", "--model", tiny, "--device", "cpu", *words])
    assert ran.exit_code == 2 and ran.stderr.count("\n") == 1 and error in ran.stderr
