"""Query by example: how a region becomes an embedding, what its values mean, and what is refused."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from typer.testing import CliRunner

from open_gem import Exemplar, Localizer, Views, Vocabulary
from open_gem.cli import app
from open_gem.cli.options import read_exemplar
from open_gem.data.scenes import VALIDATION, Scene, scene
from open_gem.errors import InputError, PromptError
from open_gem.exemplars import CONTEXT, LIKELY, SHARPNESS, coverage
from open_gem.label.labeling import Labeling
from open_gem.label.ontology import Ontology
from open_gem.method.run import run
from open_gem.method.table import METHODS
from open_gem.types import Grid, Size


@pytest.fixture(scope="module")
def shown() -> Scene:
    return scene(VALIDATION + 3, 96)


@pytest.fixture
def exemplar(shown: Scene) -> Exemplar:
    return Exemplar(shown.image, tuple(shown.boxes[0].tolist()))


@pytest.fixture
def file(shown: Scene, tmp_path: Path) -> Path:
    Image.fromarray(shown.image).save(tmp_path / "mug.png")
    return tmp_path / "mug.png"


# What an exemplar is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(0, 0, 60, 40), (7, 3, 31, 26), (59, 39, 60, 40), (12, 0, 13, 40)])
def test_a_patch_counts_by_the_share_of_its_pixels_in_the_box(box):
    size, grid = Size(40, 60), Grid(5, 6)  # patches of 8 × 10 pixels
    inside = np.zeros(size)
    inside[box[1] : box[3], box[0] : box[2]] = 1
    naive = [inside[y : y + 8, x : x + 10].mean() for y in range(0, 40, 8) for x in range(0, 60, 10)]
    np.testing.assert_allclose(coverage(box, size, grid).numpy(), naive, atol=1e-6)


@pytest.mark.parametrize("method", ["gem", "csa"])
def test_values_follow_the_formula(embedded: Localizer, shown: Scene, exemplar: Exemplar, method: str):
    encoded, asked = (embedded.encode(image, method) for image in (shown.image, scene(VALIDATION + 4, 96).image))
    result = embedded.locate(asked, {"it": exemplar})
    patches = [normalize(row, dim=-1) for row in encoded.patches[0]]
    weights = coverage(exemplar.box, Size(96, 96), encoded.grid).tolist()  # pyright: ignore[reportArgumentType]
    inside = sum(weight * patch for weight, patch in zip(weights, patches, strict=True)) / sum(weights)
    around = [patch for weight, patch in zip(weights, patches, strict=True) if weight == 0]
    embedding = normalize(inside - CONTEXT * sum(around) / len(around), dim=0)  # pyright: ignore[reportArgumentType]
    own = max(float(patch @ embedding) for weight, patch in zip(weights, patches, strict=True) if weight > 0)
    empty = embedded.backbone.encode_text(["a photo of a ."])[0]
    neutral = sum(float(patch @ empty) for patch in patches) / len(patches)
    scale = embedded.backbone.logit_scale
    cosines = [float(normalize(row, dim=0) @ embedding) for row in asked.patches[0]]
    expected = [neutral + SHARPNESS / scale * (cosine / own - LIKELY) for cosine in cosines]
    np.testing.assert_allclose(result.similarity[0].flatten().tolist(), expected, atol=1e-5)
    assert result.scores is not None and result.presence is not None
    assert result.scores.item() == pytest.approx(max(expected), abs=1e-5)
    logit = SHARPNESS * (max(cosines) / own - LIKELY)
    assert result.presence.item() == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)


def test_an_exemplar_is_located_in_its_own_image_and_in_its_mirror_image(
    embedded: Localizer, shown: Scene, exemplar: Exemplar
):
    for image, mask in ((shown.image, shown.masks[0]), (shown.image[:, ::-1].copy(), shown.masks[0][:, ::-1])):
        result = embedded(image, exemplar)
        x, y = result.points()[0].tolist()
        assert mask[y, x] and result.present() == (True,)
    assert embedded(np.full((96, 96, 3), 128, np.uint8), exemplar).present() == (False,)


def test_texts_are_what_they_are_without_exemplars(embedded: Localizer, shown: Scene, exemplar: Exemplar):
    alone, mixed = embedded(shown.image, ["pig", "cat"]), embedded(shown.image, ["pig", exemplar, "cat"])
    assert mixed.labels == ("pig", exemplar.name, "cat")
    assert mixed.presence is not None and alone.presence is not None
    torch.testing.assert_close(mixed.similarity[[0, 2]], alone.similarity, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed.presence[[0, 2]], alone.presence, rtol=0, atol=1e-6)


def test_a_distractor_that_is_an_exemplar_leaves_presence_alone(embedded: Localizer, shown: Scene, exemplar: Exemplar):
    """An exemplar's score is no image-level cosine, so texts are not compared with it."""
    alone = embedded(shown.image, ["pig"])
    beside = embedded(shown.image, Vocabulary.of(["pig"]).with_background(exemplar))
    assert torch.equal(beside.presence, alone.presence)  # pyright: ignore[reportArgumentType]


def test_a_label_of_a_text_and_an_exemplar_is_the_better_of_both(embedded: Localizer, shown: Scene, exemplar: Exemplar):
    both = embedded(shown.image, {"it": ["cat", exemplar]})
    single = [embedded(shown.image, prompt) for prompt in ("cat", exemplar)]
    expected = torch.maximum(*(result.heatmaps("cosine")[0] for result in single))
    torch.testing.assert_close(both.heatmaps("cosine")[0], expected, rtol=0, atol=1e-6)
    assert {obj.prompt for obj in both.objects()} == {exemplar.name}
    assert json.dumps([obj.to_dict() for obj in both.objects()])


def test_an_encoded_image_is_an_exemplar_too(embedded: Localizer, shown: Scene, exemplar: Exemplar):
    encoded = embedded.encode(shown.image)
    again = embedded.locate(encoded, Exemplar(encoded, exemplar.box))
    torch.testing.assert_close(again.similarity, embedded.locate(encoded, exemplar).similarity)
    with pytest.raises(PromptError, match="every patch"):
        embedded.locate(encoded, Exemplar(encoded))


def test_a_whole_image_is_set_into_a_frame(embedded: Localizer, shown: Scene):
    left, top, right, bottom = shown.boxes[0].tolist()
    cut = shown.image[top:bottom, left:right]
    framed = Image.new("RGB", (2 * max(cut.shape[:2]),) * 2, (128, 128, 128))
    place = ((framed.width - cut.shape[1]) // 2, (framed.height - cut.shape[0]) // 2)
    framed.paste(Image.fromarray(cut), place)
    box = (*place, place[0] + cut.shape[1], place[1] + cut.shape[0])
    ours, theirs = (embedded(shown.image, prompt).similarity for prompt in (Exemplar(cut), Exemplar(framed, box)))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("merge", ["features", "logits"])
def test_views(embedded: Localizer, shown: Scene, exemplar: Exemplar, merge: str):
    localizer = embedded.configured(views=Views(flip=True, merge=merge))
    result = localizer(shown.image, exemplar)
    x, y = result.points()[0].tolist()
    assert shown.masks[0][y, x] and result.present() == (True,)


def test_a_model_trained_with_a_sigmoid(tiny_localizer: Localizer, shown: Scene, exemplar: Exemplar):
    """Presence is calibrated on the exemplar's own image, whatever texts are compared with."""
    biased = copy.deepcopy(tiny_localizer)
    biased.backbone.model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    expected, found = tiny_localizer(shown.image, exemplar).presence, biased(shown.image, exemplar).presence
    assert expected is not None and found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_step_on_text_leaves_exemplars_alone(embedded: Localizer, shown: Scene, exemplar: Exemplar):
    stepping, texts = embedded.configured(text_step="cass"), ["pig", "cat"]
    mixed = stepping(shown.image, ["pig", exemplar, "cat"])
    expected = (embedded(shown.image, exemplar), stepping(shown.image, texts))
    for found, own in ((mixed.maps[[1]], expected[0].maps), (mixed.maps[[0, 2]], expected[1].maps)):
        torch.testing.assert_close(found, own, rtol=0, atol=1e-5)


def test_each_exemplar_is_encoded_once_by_a_method(embedded: Localizer, shown: Scene, exemplar: Exemplar, monkeypatch):
    localizer = embedded.configured()
    encoded = localizer.encode([shown.image] * 2, ["gem", "csa"])
    seen = Mock(wraps=localizer.backbone.vision.embed)
    monkeypatch.setattr(localizer.backbone.vision, "embed", seen)
    for image in encoded:
        for name in ("gem", "csa"):
            localizer.locate(image[name], exemplar)
    assert seen.call_count == 2


# What is refused ------------------------------------------------------------------------------------------------------

BAD = {
    "an empty box": (lambda image: Exemplar(image, (5, 5, 5, 9)), "is empty"),
    "a box of three": (lambda image: Exemplar(image, (5, 5, 9)), "expected left, top, right, bottom"),  # pyright: ignore[reportArgumentType]
    "a box outside": (lambda image: Exemplar(image, (5, 5, 500, 9)), "leaves its image of 96x96 pixels"),
    "no file": (lambda image: Exemplar("none.png"), "cannot read the exemplar 'none.png'"),
    "no image": (lambda image: Exemplar(b"text"), "cannot read the exemplar 'exemplar'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_exemplar_is_an_error_in_one_line(case: str, embedded: Localizer, shown: Scene):
    make, reason = BAD[case]
    with pytest.raises(PromptError, match=reason) as raised:
        embedded.check(make(shown.image))
    assert "\n" not in str(raised.value)


def test_settings_that_compare_texts_refuse_exemplars(embedded: Localizer, shown: Scene, exemplar: Exemplar):
    with pytest.raises(PromptError, match="redundancy"):
        embedded.configured(remove_redundancy=True)(shown.image, exemplar)


def test_features_of_an_unknown_method_are_refused(embedded: Localizer, shown: Scene, exemplar: Exemplar):
    pixels = embedded.prepare(shown.image).pixels
    assert pixels is not None
    encoded = run(embedded.backbone.vision, pixels[None], {"gem": METHODS["gem"].fitted(6)}, pooled=True)["gem"]
    assert embedded.locate(encoded, exemplar).labels == (exemplar.name,)
    with pytest.raises(InputError, match="unknown method"):
        embedded.locate(replace(encoded, method=None), exemplar)


# Command line and files -----------------------------------------------------------------------------------------------


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_ground_takes_a_region_of_a_file(shown: Scene, file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    box = ",".join(map(str, shown.boxes[0].tolist()))
    options = ["--model", "embedded", "--device", "cpu", "--json", "--save", "none", "-q"]
    result = call("ground", "mug.png", "-p", "cat", "--like", f"it=mug.png:{box}", "--like", "mug.png", *options)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [entry["label"] for entry in document["labels"]] == ["cat", "it", "mug.png"]
    assert document["labels"][1]["present"]


def test_a_label_and_a_file_name_may_have_an_equals_sign(file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mug.png").rename("w=64.png")
    for like, label in (("a=b=w=64.png:1,2,30,40", "a=b"), ("w=64.png", ""), ("it=w=64.png", "it")):
        assert read_exemplar(like)[0] == label


@pytest.mark.parametrize(
    ("like", "reason"),
    [("none.png", "none.png"), ("mug.png:1,2", "box"), ("mug.png:a,b,c,d", "box"), ("mug.png:0,0,999,9", "leaves")],
)
def test_a_bad_option_is_one_line(like: str, reason: str, file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("ground", "mug.png", "--like", like, "--model", "embedded", "--device", "cpu")
    assert result.exit_code == 2 and reason in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error")]) == 1
    assert not Path("open_gem_out").exists()


def test_a_class_file_names_exemplars_beside_texts(embedded: Localizer, file: Path):
    classes = file.with_name("classes.yaml")
    classes.write_text(
        "labels:\n  mug: [pig, {like: mug.png, box: [10, 20, 60, 70]}]\n  pot: {like: mug.png, name: whole}\n"
    )
    read = Ontology.read(classes)
    assert read.vocabulary.prompts[0][0] == "pig"
    assert [exemplar.name for exemplar in read.vocabulary.exemplars] == ["mug.png:10,20,60,70", "whole"]
    described = read.describe()["labels"]["mug"]["prompts"][1]
    assert described["box"] == [10, 20, 60, 70] and len(described["sha256"]) == 12
    assert Labeling(embedded, read).classes is read
    for bad in ("{like: none.png}", "{like: 3}", "{like: mug.png, bx: 3}", "{like: mug.png, box: [1, 2]}"):
        classes.write_text(f"labels:\n  mug: {bad}\n")
        with pytest.raises(InputError, match=r"classes\.yaml"):
            Ontology.read(classes)
    classes.write_text("labels:\n  mug: {like: mug.png, box: [1, 2, 999, 4]}\n")
    with pytest.raises(PromptError, match="leaves"):
        Labeling(embedded, Ontology.read(classes))
