"""The model in the package really localizes: what it was trained for, what it was not, and how methods compare."""

import importlib.resources
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import open_gem
from open_gem import METHODS, Localizer, Vocabulary, cli
from open_gem.data import scenes
from open_gem.data.scenes import CONCEPTS, scene
from open_gem.errors import OpenGemWarning, PromptError
from open_gem.evaluation.run import evaluate
from open_gem.evaluation.tasks import scores
from open_gem.label.labeling import Labeling
from open_gem.label.ontology import Ontology
from open_gem.towers.loading import CAUTION, EMBEDDED

HELD_OUT = range(60)


@pytest.fixture(scope="module")
def localizer() -> Localizer:
    return open_gem.load(EMBEDDED, device="cpu").acknowledge()


@pytest.fixture(scope="module")
def outcomes(localizer) -> dict[str, dict[str, float]]:
    counts = evaluate(localizer, {"clip": "clip", "gem": "gem"}, scenes(HELD_OUT))
    return {name: {score: found.value for score, found in scores(some).items()} for name, some in counts.items()}


def test_the_image_level_objective_was_learned(outcomes):
    assert outcomes["clip"]["top1"] >= 0.95


def test_gem_finds_the_objects(outcomes):
    assert outcomes["gem"]["pointing_game"] >= 0.8
    assert outcomes["gem"]["mask_iou"] >= 0.35


def test_gem_is_far_better_than_clips_own_patches(outcomes):
    """The paper's point: the same weights, read another way."""
    gem, clip = outcomes["gem"], outcomes["clip"]
    assert gem["pointing_game"] > clip["pointing_game"] + 0.6
    assert gem["mask_iou"] > clip["mask_iou"] + 0.3
    assert gem["mean_iou"] > clip["mean_iou"] + 0.3


def test_present_concepts_score_higher_at_image_level(localizer):
    right = wrong = 0
    for seed in HELD_OUT:
        picture = scene(seed, 256)
        absent = [name for name in CONCEPTS if name not in picture.names][seed % 50]
        result = localizer(picture.image, [*picture.names, absent])
        right += int((result.scores[:-1] > result.scores[-1]).sum())
        wrong += int((result.scores[:-1] <= result.scores[-1]).sum())
    assert right > 9 * wrong


def test_one_scene_end_to_end(localizer):
    """The demo's picture: the point of each phrase is in its own object, and the best box overlaps the object's."""
    picture = scene(0, 512)
    assert len(picture.names) == 4
    result = localizer(picture.image, picture.names)
    assert result.segment().shape == (512, 512)
    for (x, y), mask, boxes, box in zip(result.points(), picture.masks, result.boxes(), picture.boxes, strict=True):
        assert mask[y, x]
        left, top = torch.maximum(boxes.xyxy[0][:2], torch.tensor(box[:2]))
        right, bottom = torch.minimum(boxes.xyxy[0][2:], torch.tensor(box[2:]))
        assert right > left
        assert bottom > top


def test_all_concepts_are_accepted(localizer):
    assert localizer.backbone.text.concepts == CONCEPTS
    localizer.text.check([*CONCEPTS, *(f"A red {name.upper()}" for name in CONCEPTS), "boat", ""])


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("flower", ["'flower'", "sunflower"]),
        (["cat", "the person"], ["'the person'", "120 concepts"]),
        ("a photo", ["'a photo'"]),
        ("x-ray", ["'x-ray'"]),
        ({"cat": ["cat", "cats"]}, ["'cats'", "such as cat"]),
        (Vocabulary.of("cat").with_background(["tree", "sky"]), ["'sky'"]),
    ],
)
def test_a_prompt_without_a_known_word_is_refused_with_the_nearest_concepts(prompts, words, localizer):
    """The embeddings of all such words are zero: they would have one score and one map."""
    with pytest.raises(PromptError) as caught:
        localizer(scene(0, 64).image, prompts)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_templates_and_backgrounds_of_known_words_are_accepted(localizer):
    vocabulary = Vocabulary.of({"cat": ["cat", "a big cat"]}).with_background(["tree", "an old house"])
    for template in ("{}", "imagenet-80"):
        assert replace(localizer, template=template)(scene(0, 64).image, vocabulary).presence is not None


def test_an_unknown_word_over_http_is_a_client_error(localizer):
    pytest.importorskip("fastapi")
    from serving import Server, png

    from open_gem.serve.settings import Settings

    server = Server(localizer, Settings())
    try:
        id = server.upload(png())["id"]
        answer = server.client.post(f"/v1/images/{id}/ground", json={"prompts": ["flower"]})
        assert answer.status_code == 422 and "sunflower" in answer.json()["error"]
    finally:
        server.stop()


def test_a_prompt_without_a_known_word_is_refused_before_labelling_and_on_the_command_line(localizer):
    with pytest.raises(PromptError, match="sunflower"):
        Labeling(localizer, Ontology.of(["cat", "flower"]))
    result = CliRunner().invoke(cli.app, ["ground", str(photographs()[0]), "-p", "flower", "--model", EMBEDDED])
    assert result.exit_code == 2 and "sunflower" in result.stderr


# What it is not for ---------------------------------------------------------------------------------------------------


PHOTOGRAPHS = {
    "sklearn": ("datasets/images", ["china.jpg", "flower.jpg"]),
    "matplotlib": ("mpl-data/sample_data", ["grace_hopper.jpg"]),
    "skimage": (
        "data",
        ["astronaut.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg", "ihc.png", "rocket.jpg"],
    ),
}


def photographs() -> list[Path]:
    """Ten that come with packages that tests need."""
    return [
        Path(str(importlib.resources.files(package))) / folder / name
        for package, (folder, names) in PHOTOGRAPHS.items()
        for name in names
    ]


@pytest.mark.parametrize("photograph", photographs(), ids=lambda path: path.stem)
def test_a_photograph_gives_one_warning_a_run(photograph: Path):
    arguments = ["--model", EMBEDDED, "--device", "cpu", "--save", "none", "-q"]
    result = CliRunner().invoke(cli.app, ["ground", str(photograph), str(photograph), "-p", "cat", *arguments])
    assert (result.exit_code, result.stderr) == (0, f"warning: {CAUTION}\n")


def test_the_caution_is_given_once_a_localizer_and_by_no_copy_of_it():
    localizer, image = open_gem.load(EMBEDDED, device="cpu"), scene(0, 64).image
    assert localizer.caution == CAUTION and "120 drawn objects" in CAUTION
    with pytest.warns(OpenGemWarning, match="not photographs") as caught:
        localizer(image, "cat")
        localizer([image], "cat")
        localizer.configured(method="clip").encode(image)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("is_embedded", [True, False])
def test_nothing_is_warned_of_once_acknowledged_nor_with_a_model_for_photographs(is_embedded, tiny):
    localizer = open_gem.load(EMBEDDED if is_embedded else tiny, device="cpu")
    assert (localizer.caution is not None) == is_embedded
    if is_embedded:
        localizer.acknowledge()
    with warnings.catch_warnings(action="error"):
        localizer.configured(size="short:64").encode(scene(0, 64).image)


def test_the_model_uses_the_papers_temperature(localizer):
    """As its card says: no multiplier is recommended, and the size is one that the model was not trained at."""
    assert localizer.resolve("gem") == METHODS["gem"]
    assert localizer.size_rule == "short:160"


def test_open_clip_alone_loads_the_checkpoint(localizer):
    """The folder is an ordinary open_clip checkpoint, tokenizer included, and needs no network."""
    from importlib.resources import files

    import open_clip

    folder = f"local-dir:{files('open_gem.towers') / EMBEDDED}"
    model: Any
    model, preprocess = open_clip.create_model_from_pretrained(folder)  # pyright: ignore[reportGeneralTypeIssues]
    tokens = open_clip.get_tokenizer(folder)(["a photo of a cat."])
    with torch.no_grad():
        ours, theirs = localizer.backbone.encode_text(["a photo of a cat."]), model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(ours, theirs)
    assert preprocess is not None
