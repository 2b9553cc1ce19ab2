"""Evaluation counts what it says, once an image, in shards and after interruptions as in one piece."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from open_gem import PATHWAYS, Localization, Localizer, Views
from open_gem.datasets import CONCEPTS, Points, Sample, SceneSample, Segmentation, scenes
from open_gem.errors import ImageError, InputError, OutputError
from open_gem.evaluate import Estimate, evaluate, gather, measure, questions, scores
from open_gem.files import digest
from open_gem.metrics import Records
from open_gem.prompts import Vocabulary
from open_gem.protocols import PROTOCOLS, Protocol, find_protocol
from open_gem.report import Line, collect, render, summary
from open_gem.runs import Store, run, settings_of
from open_gem.types import Size

TWO = {name: PATHWAYS[name] for name in ("clip", "maskclip")}
PAPER = PROTOCOLS["paper"]


# What is counted ------------------------------------------------------------------------------------------------------


def perfect(sample, prompts, values=None) -> Localization:
    """A localization whose maps are the masks themselves."""
    maps = np.zeros((len(prompts), *sample.image.shape[:2]), dtype=np.float32)
    for name, mask in zip(sample.scene.names, sample.scene.masks, strict=True):
        maps[prompts.index(name)] = mask
    return Localization(tuple(prompts), torch.from_numpy(maps), Size(*sample.image.shape[:2]), values)


def drawn(index: int) -> SceneSample:
    sample = scenes()[index]
    assert isinstance(sample, SceneSample)
    return sample


def counted(sample, among_all: Localization, named: Localization) -> dict[str, float]:
    of_pixels, of_objects = questions(scenes(), sample, PAPER)
    assert of_pixels.vocabulary.labels == CONCEPTS
    assert of_objects.vocabulary.labels == sample.scene.names
    rows = of_pixels.count(among_all) | of_objects.count(named)
    found = scores({what: Records({sample.id: row}) for what, row in rows.items()})
    return {name: estimate.value for name, estimate in found.items()}


def test_perfect_maps_have_perfect_scores():
    sample = drawn(4)
    values = torch.tensor([float(name == sample.scene.names[0]) for name in CONCEPTS])
    found = counted(sample, perfect(sample, CONCEPTS, values), perfect(sample, sample.scene.names))
    assert found.pop("box_iou") > 0.99  # boxes are of visible pixels, and so are masks
    assert set(found.values()) == {1.0}


def test_swapped_maps_have_none():
    sample = next(one for one in map(drawn, range(50)) if len(one.scene.names) == 2)
    absent = next(name for name in CONCEPTS if name not in sample.scene.names)
    values = torch.tensor([float(name == absent) for name in CONCEPTS])
    named, among_all = perfect(sample, sample.scene.names), perfect(sample, CONCEPTS, values)
    order = list(range(len(CONCEPTS)))
    first, second = (CONCEPTS.index(name) for name in sample.scene.names)
    order[first], order[second] = second, first
    swapped = replace(named, maps=named.similarity.flip(0))
    found = counted(sample, replace(among_all, maps=among_all.similarity[order]), swapped)
    for name in ("mean_iou", "pixel_accuracy", "boundary_iou", "top1", "pointing_game", "mask_iou"):
        assert found[name] == 0, name


def pictures(folder: Path, background: int | None, count: int = 5) -> Segmentation:
    """Random pictures of two shapes with labels, as a data set of three classes."""
    random = np.random.default_rng(1)
    samples = []
    for index in range(count):
        size = (40, 56) if index % 2 else (48, 48)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        truth = random.choice([0, 1, 2, 255], size).astype(np.uint8)
        samples.append(Sample(str(index), folder / f"{index}.png", truth))
    names = ("cat", "dog", "owl") if background is None else ("cat", "dog")
    vocabularies = {
        "usual": Vocabulary.of(names),
        "sclip": Vocabulary.of({name: [name, f"big {name}"] for name in names}),
    }
    classes = names if background is None else ("background", *names)
    return Segmentation("made-up", "val", classes, background, vocabularies, samples)


@pytest.mark.parametrize("background", [None, 0])
@pytest.mark.parametrize(
    "protocol", [Protocol(size="short:32"), Protocol(size="short:32", names="sclip", logit_scale=9.0)]
)
def test_pixels_are_counted_as_a_loop_does(background, protocol, tiny_localizer, tmp_path):
    data = pictures(tmp_path, background)
    ours = scores(evaluate(tiny_localizer, {"gem": "gem"}, data, protocol)["gem"])
    localizer = replace(tiny_localizer, size="short:32")
    matrix = np.zeros((3, 3), dtype=int)
    for sample in data:
        found = localizer(sample.picture(), data.vocabulary(protocol.names))
        cosines = torch.stack([found.heatmaps("cosine")[index] for index in range(len(found.prompts))])
        if protocol.names:  # the softmax is over all synonyms
            every = replace(found, prompts=found.vocabulary.phrases, vocabulary=None).heatmaps("cosine").stack()
        else:
            every = cosines
        probability = (protocol.logit_scale * (cosines - every.logsumexp(0) * 0)).exp() / (
            protocol.logit_scale * every
        ).exp().sum(0)
        best, label = probability.max(0)
        predicted = label if background is None else (label + 1).masked_fill(best < 0.8, 0)
        for true, given in zip(sample.labels().ravel(), predicted.flatten().tolist(), strict=True):
            if true != 255:
                matrix[true, given] += 1
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert ours["mean_iou"].value == pytest.approx(iou.mean(), abs=1e-3)
    assert ours["pixel_accuracy"].value == pytest.approx(np.diag(matrix).sum() / matrix.sum(), abs=1e-3)
    assert (
        ours["mean_iou"].low <= ours["mean_iou"].value + 1e-9 and ours["mean_iou"].high >= ours["mean_iou"].value - 0.1
    )


def test_points_are_those_of_the_classes_that_are_there(tiny_localizer, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    xy = np.array([[0.1, 0.2], [0.9, 0.9], [0.5, 0.5], [0.3, 0.7], [1.0, 1.0]])
    label, yes = np.array([7, 7, 7, 9, 3]), np.array([True, False, True, False, True])
    names = tuple(f"thing {index}" for index in range(10))
    data = Points(
        "points", "val", names, ("a",), (tmp_path / "a.png",), np.array([0, 5]), xy, label.astype(np.int32), yes, (), {}
    )
    counts = evaluate(tiny_localizer, {"gem": "gem"}, data, Protocol(size="short:32"))["gem"]
    found = replace(tiny_localizer, size="short:32")(tmp_path / "a.png", ["thing 3", "thing 7"])
    masks = found.masks(0.5)
    expected = {}
    for name, which in (("thing 3", 3), ("thing 7", 7)):
        inside = [bool(masks[name][min(int(y * 40), 39), min(int(x * 60), 59)]) for x, y in xy[label == which]]
        pairs = list(zip(inside, yes[label == which].tolist(), strict=True))
        expected[which] = tuple(
            pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
        )
    assert counts["points"].rows == {"a": expected}
    assert set(scores(counts)) == {"class_pooled", "pair_mean", "image_mean", "micro", "point_accuracy"}


def test_views_and_refinement_are_part_of_a_protocol(tiny_localizer, tmp_path):
    data = pictures(tmp_path, None, 2)
    plain = evaluate(tiny_localizer, TWO, data, Protocol(size="short:32"))
    slid = evaluate(tiny_localizer, TWO, data, Protocol(size="short:64", views=Views(window=32, merge="logits")))
    assert plain["clip"]["pixels"].rows != slid["clip"]["pixels"].rows


def test_one_pass_of_the_model_serves_all_pathways(tiny_localizer, tmp_path, monkeypatch):
    passes = []
    embed = type(tiny_localizer.backbone).embed
    monkeypatch.setattr(
        type(tiny_localizer.backbone), "embed", lambda self, pixels: passes.append(len(pixels)) or embed(self, pixels)
    )
    evaluate(tiny_localizer, PATHWAYS, pictures(tmp_path, None), Protocol(size="short:32"), batch=2)
    assert sorted(passes) == [1, 2, 2]  # three pictures of one shape, two of the other


# Errors ---------------------------------------------------------------------------------------------------------------


def test_a_broken_picture_is_told_and_the_others_are_counted(tiny_localizer, tmp_path):
    data = pictures(tmp_path, None)
    (tmp_path / "2.png").write_bytes(b"no picture")
    measured = list(measure(tiny_localizer, TWO, data, range(5), Protocol(size="short:32")))
    assert [one.id for one in measured if one.error] == ["2"]
    assert sorted(one.id for one in measured) == ["0", "1", "2", "3", "4"]
    assert set(gather(measured)["clip"]["pixels"].rows) == {"0", "1", "3", "4"}
    with pytest.raises(ImageError, match=r"2\.png"):
        evaluate(tiny_localizer, TWO, data)


def test_no_images_is_an_error(tiny_localizer):
    with pytest.raises(InputError, match="no images"):
        evaluate(tiny_localizer, TWO, scenes(range(0)))


# Runs on disk ---------------------------------------------------------------------------------------------------------


def store_of(place: Path, localizer: Localizer, data: Segmentation) -> Store:
    return Store.at(place, settings_of(localizer, TWO, data, PAPER))


def documents(store: Store) -> dict:
    return {name: {what: some.to_json() for what, some in counts.items()} for name, counts in store.counts().items()}


def test_shards_are_one_run_to_the_bit(tiny_localizer, tmp_path):
    data = scenes(range(7), 64)
    whole = store_of(tmp_path / "whole", tiny_localizer, data)
    run(whole, tiny_localizer, TWO, data, PAPER, batch=3)
    shards = store_of(tmp_path / "shards", tiny_localizer, data)
    for first in (2, 0, 1):
        run(shards, tiny_localizer, TWO, data, PAPER, indices=range(7)[first::3], batch=3)
    assert json.dumps(documents(shards)) == json.dumps(documents(whole))
    assert [line.scores for line in summary(shards)] == [line.scores for line in summary(whole)]


def test_an_interrupted_run_goes_on_and_counts_nothing_twice(tiny_localizer, tmp_path, monkeypatch):
    data = scenes(range(9), 64)
    whole = store_of(tmp_path / "whole", tiny_localizer, data)
    run(whole, tiny_localizer, TWO, data, PAPER, batch=2)
    monkeypatch.setattr("open_gem.runs.PART", 2)
    store = store_of(tmp_path / "parts", tiny_localizer, data)
    heard: list[int] = []

    def impatient(images: int) -> None:
        heard.append(images)
        if sum(heard) >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store, tiny_localizer, TWO, data, PAPER, progress=impatient, batch=2)
    assert len(store.done()) == 5
    heard.clear()
    run(store, tiny_localizer, TWO, data, PAPER, progress=heard.append, batch=2)
    assert heard == [5, 1, 1, 1, 1]
    assert documents(store) == documents(whole)
    before = len(list(store.folder.glob("part-*")))
    run(store, tiny_localizer, TWO, data, PAPER)
    assert len(list(store.folder.glob("part-*"))) == before


def test_an_image_that_two_processes_measured_counts_once(tiny_localizer, tmp_path):
    data = scenes(range(3), 64)
    store = store_of(tmp_path, tiny_localizer, data)
    run(store, tiny_localizer, TWO, data, PAPER)
    before = documents(store)
    store.add(list(measure(tiny_localizer, TWO, data, [1, 2], PAPER)))
    assert len(list(store.folder.glob("part-*"))) == 2
    assert documents(store) == before


def test_runs_of_other_settings_never_meet(tiny_localizer, tmp_path):
    data = scenes(range(2), 64)
    folders = {
        store_of(tmp_path, tiny_localizer, data).folder,
        Store.at(tmp_path, settings_of(tiny_localizer, {"gem": PATHWAYS["gem"]}, data, PAPER)).folder,
        Store.at(tmp_path, settings_of(tiny_localizer, TWO, data, replace(PAPER, threshold=0.4))).folder,
        Store.at(tmp_path, settings_of(tiny_localizer, TWO, scenes(range(3), 64), PAPER)).folder,
    }
    assert len(folders) == 4
    again = store_of(tmp_path, tiny_localizer, data)
    assert again.folder in folders
    assert again.settings == Store.open(again.folder).settings


def test_other_weights_are_another_run(tiny_localizer, tmp_path):
    before = tiny_localizer.backbone.fingerprint()
    assert before == tiny_localizer.backbone.fingerprint()
    weight = next(tiny_localizer.backbone.model.parameters())
    with torch.no_grad():
        weight += 1
        after = tiny_localizer.backbone.fingerprint()
        weight -= 1
    assert after != before


def test_a_part_that_was_cut_off_is_named(tiny_localizer, tmp_path):
    data = scenes(range(2), 64)
    store = store_of(tmp_path, tiny_localizer, data)
    run(store, tiny_localizer, TWO, data, PAPER)
    [part] = store.folder.glob("part-*")
    part.write_text(part.read_text()[:40])
    with pytest.raises(OutputError, match=part.name):
        store.counts()
    with pytest.raises(InputError, match="no run"):
        Store.open(tmp_path)


# Protocols and reports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_written_down_and_hashed(name):
    told = PROTOCOLS[name].describe()
    assert json.loads(json.dumps(told)) == told
    assert digest(told) == digest(dict(reversed(told.items())))
    assert digest(told) != digest(told | {"threshold": 0.1})
    assert find_protocol(name) is PROTOCOLS[name]


def test_an_unknown_protocol_lists_the_known():
    with pytest.raises(InputError, match=r"papre.*did you mean paper.*official"):
        find_protocol("papre")


def test_the_field_has_a_threshold_a_data_set():
    assert PROTOCOLS["field"].background_of("voc2012") == 0.5
    assert PROTOCOLS["field"].background_of("another") == 0.1
    assert PROTOCOLS["paper"].background_of("voc2012") == 0.8


@pytest.mark.parametrize("format", ["markdown", "html", "csv"])
def test_reports_have_every_run(format, tiny_localizer, tmp_path):
    data = scenes(range(3), 64)
    for protocol in (PAPER, PROTOCOLS["official"]):
        store = Store.at(tmp_path, settings_of(tiny_localizer, TWO, data, replace(protocol, size="short:32")))
        run(store, tiny_localizer, TWO, data, replace(protocol, size="short:32"))
    text = render(collect(tmp_path), format)
    assert text.count("maskclip") == text.count("scenes") // 2 == 2
    assert "pointing_game" in text
    with pytest.raises(InputError, match="pdf"):
        render([], "pdf")
    with pytest.raises(InputError, match="no runs"):
        collect(tmp_path / "nothing")


def test_the_papers_value_stands_beside_ours():
    kept = ("voc2012", "val", 1449, 0, "ViT-B-16/openai", "paper", "run")
    line = Line(*kept, "gem", {"mean_iou": Estimate(0.47, 0.45, 0.49)})
    assert "| 47.0 [45.0, 49.0]; paper 46.2 (+0.8) |" in render([line])
    assert "paper" not in render([replace(line, model="embedded")]).replace("| paper |", "")
    assert "46.2" not in render([replace(line, protocol="field")])
