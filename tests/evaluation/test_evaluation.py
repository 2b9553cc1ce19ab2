"""Evaluation counts what it says, once an image, in shards and after interruptions as in one piece."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from open_gem import METHODS, Localization, Localizer, Views
from open_gem.data import CONCEPTS, Points, Sample, SceneSample, Segmentation, scenes
from open_gem.errors import ImageError, InputError, OutputError
from open_gem.evaluation.metrics.counts import Records
from open_gem.evaluation.metrics.objects import box_overlap, mask_overlap
from open_gem.evaluation.protocol import PROTOCOLS, EvalProtocol, Variant, find_protocol
from open_gem.evaluation.run import evaluate, gather, measure
from open_gem.evaluation.store import Store, run, settings_of, shard
from open_gem.evaluation.tasks import Estimate, differences, scores, tasks_of
from open_gem.files import digest
from open_gem.images.pixels import size_of
from open_gem.method.table import Method
from open_gem.paper.runs import read_run
from open_gem.refine.fgs import Fgs
from open_gem.refine.pamr import Pamr
from open_gem.text import Vocabulary
from open_gem.types import Size

TWO = {name: METHODS[name] for name in ("clip", "maskclip")}
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
    of_pixels, of_objects = tasks_of(scenes(), sample, Size(*sample.image.shape[:2]), PAPER)
    assert of_pixels.vocabulary.labels == CONCEPTS
    assert of_objects.vocabulary.labels == sample.scene.names
    rows = of_pixels.count(among_all, PAPER) | of_objects.count(named, PAPER)
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
    for name in (
        "mean_iou",
        "pixel_accuracy",
        "boundary_iou",
        "top1",
        "pointing_game",
        "mask_iou",
        "mask_boundary_iou",
    ):
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
    "protocol", [EvalProtocol(size="short:32"), EvalProtocol(size="short:32", names="sclip", logit_scale=9.0)]
)
def test_pixel_counts_equal_a_loop(background, protocol, tiny_localizer, tmp_path):
    data = pictures(tmp_path, background)
    ours = scores(evaluate(tiny_localizer, {"gem": "gem"}, data, protocol)["gem"])
    localizer = replace(tiny_localizer, size="short:32")
    matrix = np.zeros((3, 3), dtype=int)
    for sample in data:
        found = localizer(sample.read_image(), data.vocabulary(protocol.names))
        cosines = torch.stack([found.heatmaps("cosine")[index] for index in range(len(found.labels))])
        if protocol.names:  # the softmax is over all synonyms
            every = replace(found, labels=found.vocabulary.all_prompts, vocabulary=None).heatmaps("cosine").stack()
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
    assert ours["mean_iou"].low <= ours["mean_iou"].value <= ours["mean_iou"].high


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_only_present_classes_are_scored_on_points(threshold, tiny_localizer, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    xy = np.array([[0.1, 0.2], [0.9, 0.9], [0.5, 0.5], [0.3, 0.7], [1.0, 1.0]])
    label, yes = np.array([7, 7, 7, 9, 3]), np.array([True, False, True, False, True])
    names = tuple(f"thing {index}" for index in range(10))
    data = Points(
        "points", "val", names, ("a",), (tmp_path / "a.png",), np.array([0, 5]), xy, label.astype(np.int32), yes, (), {}
    )
    protocol = EvalProtocol(size="short:32", threshold=threshold)
    counts = evaluate(tiny_localizer, {"gem": "gem"}, data, protocol, analysed=["gem"])["gem"]
    found = replace(tiny_localizer, size="short:32")(tmp_path / "a.png", ["thing 3", "thing 7"])
    masks = found.masks(threshold)
    expected = {}
    for name, which in (("thing 3", 3), ("thing 7", 7)):
        inside = [bool(masks[name][min(int(y * 40), 39), min(int(x * 60), 59)]) for x, y in xy[label == which]]
        pairs = list(zip(inside, yes[label == which].tolist(), strict=True))
        expected[which] = tuple(
            pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
        )
    assert counts["points"].rows == {"a": expected}
    assert set(scores(counts)) == {"class_pooled", "pair_mean", "image_mean", "micro", "point_accuracy"}


def test_unknown_names_fall_back_to_the_default_names():
    sample = drawn(4)
    [asked, _] = tasks_of(scenes(), sample, size_of(sample.read_image()), replace(PAPER, names="sclip"))
    assert asked.vocabulary.labels == CONCEPTS


def test_the_analysis_uses_the_names_of_the_protocol(tiny_localizer, tmp_path):
    picture, truth = pictures(tmp_path, None, 1), np.zeros((48, 48), np.uint8)
    truth[24:] = 1
    names = {**picture.vocabularies, "wild": Vocabulary.of(["lion", "wolf", "hawk"])}
    data = replace(picture, vocabularies=names, samples=[Sample("0", tmp_path / "0.png", truth)])
    usual, wild = (
        evaluate(tiny_localizer, {"gem": "gem"}, data, EvalProtocol(names=names), analysed=["gem"])["gem"]
        for names in (None, "wild")
    )
    assert {what.partition("@")[0] for what in usual if usual[what].rows != wild[what].rows} >= {"text_contrast"}


def test_scores_of_pixels_differ():
    rows = {"a": {0: (3, 1, 0), 1: (1, 0, 1)}}  # hits, false, missed
    found = {name: estimate.value for name, estimate in scores({"pixels": Records(rows)}).items()}
    assert found == pytest.approx(
        {"mean_iou": 0.625, "pixel_accuracy": 0.8, "mean_accuracy": 0.75, "frequency_weighted_iou": 0.65}
    )


def test_objects_use_the_threshold_of_the_protocol(tiny_localizer):
    """One box a phrase, whatever its mask falls into."""
    sample = drawn(4)
    protocol = replace(PAPER, threshold=0.7)
    [_, asked] = tasks_of(scenes(), sample, size_of(sample.read_image()), protocol)
    found = tiny_localizer(sample.read_image(), sample.scene.names)
    boxes = [box.xyxy for box in found.boxes(0.7, instances="label")]
    rows = asked.count(found, protocol)
    assert rows["boxes"] == box_overlap(boxes, torch.from_numpy(sample.scene.boxes))
    assert rows["masks"] == mask_overlap(found.masks(0.7).stack(), torch.from_numpy(sample.scene.masks))


def test_differences_cover_scores_that_both_methods_have():
    """NaN where one of them counted nothing."""
    one, nothing = Records({"a": {0: (1, 1)}}), Records({"a": {}})
    found = differences({"top1": one, "masks": one, "boxes": one}, {"top1": one, "masks": nothing})
    assert found.keys() == {"top1", "mask_iou"} and found["top1"] == Estimate(0.0, 0.0, 0.0)
    assert all(number != number for number in found["mask_iou"])


def test_views_are_part_of_a_protocol(tiny_localizer, tmp_path):
    data = pictures(tmp_path, None, 2)
    plain = evaluate(tiny_localizer, TWO, data, EvalProtocol(size="short:32"))
    slid = evaluate(tiny_localizer, TWO, data, EvalProtocol(size="short:64", views=Views(window=32, merge="logits")))
    assert plain["clip"]["pixels"].rows != slid["clip"]["pixels"].rows


def test_one_pass_of_the_model_serves_all_methods(tiny_localizer, tmp_path, monkeypatch):
    passes, vision = [], tiny_localizer.backbone.vision
    embed = vision.embed
    monkeypatch.setattr(vision, "embed", lambda pixels: passes.append(len(pixels)) or embed(pixels))
    evaluate(tiny_localizer, METHODS, pictures(tmp_path, None), EvalProtocol(size="short:32"), batch_size=2)
    assert sorted(passes) == [1, 2, 2]  # three pictures of one shape, two of the other


@pytest.mark.parametrize("usual", [PAPER, replace(PAPER, refinement=Fgs(iterations=1), absent="denoise")])
def test_variants_give_what_their_protocol_gives_from_the_pass_of_their_method(usual, tiny_localizer, monkeypatch):
    data, gem, clip = scenes(range(2), 64), METHODS["gem"], METHODS["clip"]
    encoded, encode = [], Localizer._encode

    def watched(self, group, methods, *rest):
        encoded.append(methods)
        return encode(self, group, methods, *rest)

    monkeypatch.setattr(Localizer, "_encode", watched)
    rows = {
        "gem": gem,
        "gem, absent": Variant(gem, absent="presence"),
        "gem, refined": Variant(gem, refinement=Pamr(1, (2,))),
        "clip, both": Variant(clip, "presence", Fgs()),
    }
    together = evaluate(tiny_localizer, rows, data, usual)
    [methods] = encoded
    assert list(methods.values()) == [gem, clip]

    def alone(method: Method, **settings):
        return evaluate(tiny_localizer, {"it": method}, data, replace(usual, **settings))["it"]

    assert together["gem"] == alone(gem)
    assert together["gem, absent"] == alone(gem, absent="presence")
    assert together["gem, refined"] == alone(gem, refinement=Pamr(1, (2,)))
    assert together["clip, both"] == alone(clip, absent="presence", refinement=Fgs())
    assert together["gem, refined"] != together["gem"]


def test_variants_describe_what_is_different():
    described = {
        digest(row.describe())
        for row in (
            METHODS["gem"],
            Variant(METHODS["gem"], absent="presence"),
            Variant(METHODS["gem"], refinement=Pamr()),
            Variant(METHODS["gem"], refinement=Fgs()),
        )
    }
    assert len(described) == 4
    assert Variant(METHODS["gem"]).describe() == METHODS["gem"].describe()


# Errors ---------------------------------------------------------------------------------------------------------------


def test_a_broken_image_is_reported_and_the_others_count(tiny_localizer, tmp_path):
    data = pictures(tmp_path, None)
    (tmp_path / "2.png").write_bytes(b"no picture")
    measured = list(measure(tiny_localizer, TWO, data, range(5), EvalProtocol(size="short:32")))
    assert [one.id for one in measured if one.error] == ["2"]
    assert sorted(one.id for one in measured) == ["0", "1", "2", "3", "4"]
    assert set(gather(measured)["clip"]["pixels"].rows) == {"0", "1", "3", "4"}
    with pytest.raises(ImageError, match=r"2\.png"):
        evaluate(tiny_localizer, TWO, data)


def test_labels_of_another_size_are_reported_and_the_others_count(tiny_localizer, tmp_path):
    data = pictures(tmp_path, None)
    data.samples[3] = replace(data.samples[3], truth=np.zeros((56, 40), np.uint8))  # pyright: ignore[reportIndexIssue]
    measured = {one.id: one for one in measure(tiny_localizer, TWO, data, range(5), EvalProtocol(size="short:32"))}
    assert measured["3"].error == "labels of '3' are 56×40 (height × width), expected its image's 40×56"
    assert sum(one.error is None for one in measured.values()) == 4


def test_an_image_without_a_present_class_counts_as_seen(tiny_localizer, tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    files, ends = (tmp_path / "a.png",) * 2, np.array([0, 1, 2])
    xy, label, yes = np.full((2, 2), 0.5), np.array([0, 1], dtype=np.int32), np.array([False, True])
    data = Points("points", "val", ("cat", "dog"), ("a", "b"), files, ends, xy, label, yes, (), {})
    counts = evaluate(tiny_localizer, TWO, data, EvalProtocol(size="short:32"))["clip"]
    assert counts["points"].rows["a"] == {}
    assert list(counts["points"].rows["b"]) == [1]


def test_no_images_is_an_error(tiny_localizer):
    with pytest.raises(InputError, match="no images"):
        evaluate(tiny_localizer, TWO, scenes(range(0)))


# Runs on disk ---------------------------------------------------------------------------------------------------------


def store_of(place: Path, localizer: Localizer, data: Segmentation) -> Store:
    return Store.at(place, settings_of(localizer, TWO, data, PAPER))


def documents(store: Store) -> dict:
    counts = store.read().counts()
    return {name: {what: some.to_json() for what, some in counted.items()} for name, counted in counts.items()}


def test_shards_give_the_same_numbers_as_one_run(tiny_localizer, tmp_path):
    data = scenes(range(7), 64)
    whole = store_of(tmp_path / "whole", tiny_localizer, data)
    run(whole, tiny_localizer, TWO, data, PAPER, batch_size=3)
    shards = store_of(tmp_path / "shards", tiny_localizer, data)
    parts = [shard(data.ids, index, 3) for index in (2, 0, 1)]
    assert sorted(image for part in parts for image in part) == sorted(data.ids)
    for part in parts:
        run(shards, tiny_localizer, TWO, data, PAPER, ids=part, batch_size=3)
    assert json.dumps(documents(shards)) == json.dumps(documents(whole))
    assert read_run(shards).scores == read_run(whole).scores


def test_an_interrupted_run_resumes_and_counts_nothing_twice(tiny_localizer, tmp_path, monkeypatch):
    data = scenes(range(9), 64)
    whole = store_of(tmp_path / "whole", tiny_localizer, data)
    run(whole, tiny_localizer, TWO, data, PAPER, batch_size=2)
    monkeypatch.setattr("open_gem.evaluation.store.PART", 2)
    store = store_of(tmp_path / "parts", tiny_localizer, data)
    heard: list[int] = []

    def impatient(images: int) -> None:
        heard.append(images)
        if sum(heard) >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store, tiny_localizer, TWO, data, PAPER, progress=impatient, batch_size=2)
    assert len(store.read().done) == 5
    assert len(list(store.folder.glob("part-*"))) == 3, "two images a part, and what was left"
    heard.clear()
    run(store, tiny_localizer, TWO, data, PAPER, progress=heard.append, batch_size=2)
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
    store.add(list(measure(tiny_localizer, TWO, data, [1, 2], PAPER)), 3)
    assert len(list(store.folder.glob("part-*"))) == 2
    assert documents(store) == before


def test_runs_with_different_settings_are_stored_separately(tiny_localizer, tmp_path):
    data = scenes(range(2), 64)
    folders = {
        store_of(tmp_path, tiny_localizer, data).folder,
        Store.at(tmp_path, settings_of(tiny_localizer, {"gem": METHODS["gem"]}, data, PAPER)).folder,
        Store.at(tmp_path, settings_of(tiny_localizer, TWO, data, replace(PAPER, threshold=0.4))).folder,
        Store.at(tmp_path, settings_of(tiny_localizer, TWO, scenes(range(3), 64), PAPER)).folder,
    }
    assert len(folders) == 4
    told = settings_of(tiny_localizer, TWO, data, PAPER, ["clip", "maskclip"])
    assert told == settings_of(replace(tiny_localizer, method="clip"), TWO, data, PAPER, ["maskclip", "clip"])
    assert told != settings_of(tiny_localizer, TWO, data, PAPER)
    again = store_of(tmp_path, tiny_localizer, data)
    assert again.folder in folders
    assert again.settings == Store.open(again.folder).settings


def test_runs_with_different_weights_are_stored_separately(tiny_localizer):
    def told() -> dict:
        return settings_of(tiny_localizer, TWO, scenes(range(2), 64), PAPER)

    before = told()
    assert before == told()
    weight = next(tiny_localizer.backbone.model.parameters())
    with torch.no_grad():
        weight += 1
        after = told()
        weight -= 1
    assert after != before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"of": 2, "ids"', "delimiter"),
        ("{}", "has no 'ids'"),
        ("[]", "indices"),
        ("null", "subscriptable"),
        ('{"of": 2, "ids": [], "failed": {}, "counts": {"clip": {"colour": {}}}}', "counts 'colour'.*not know"),
        ('{"of": 2, "ids": [], "failed": {}, "counts": {"clip": {"pixels": {"a": [[0, NaN]]}}}}', "finite"),
    ],
)
def test_an_unreadable_part_is_named(content, reason, tiny_localizer, tmp_path):
    store = store_of(tmp_path, tiny_localizer, scenes(range(2), 64))
    (store.folder / "part-0.json").write_text(content)
    with pytest.raises(OutputError, match=rf"part-0\.json.*{reason}.*remove it"):
        store.read()


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"model": 1}'])
def test_a_folder_without_settings_is_no_run(content, tiny_localizer, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="no run in"):
        Store.open(tmp_path)
    store = store_of(tmp_path, tiny_localizer, scenes(range(2), 64))
    (store.folder / "run.json").write_text(content)
    assert Store.open(store_of(tmp_path, tiny_localizer, scenes(range(2), 64)).folder).settings == store.settings


@pytest.mark.parametrize("name", ["open_gem", "dataset", "split", "model", "size_rule", "protocol", "methods"])
def test_settings_with_a_missing_key_are_no_run(name, tiny_localizer, tmp_path):
    store = store_of(tmp_path, tiny_localizer, scenes(range(2), 64))
    lacking = {one: value for one, value in store.settings.items() if one != name}
    (store.folder / "run.json").write_text(json.dumps(lacking))
    with pytest.raises(InputError, match=f"its run.json has no {name}$"):
        Store.open(store.folder)


def test_the_latest_part_says_how_many_images_there_are(tiny_localizer, tmp_path):
    store = store_of(tmp_path, tiny_localizer, scenes(range(2), 64))
    for of, name in ((3, "b"), (5, "a")):
        path = store.folder / f"part-{name}.json"
        path.write_text(json.dumps({"of": of, "ids": [], "failed": {}, "counts": {}}))
        os.utime(path, (of, of))
    assert store.read().total == 5


def test_images_are_identified_by_id_not_by_index(tiny_localizer, tmp_path):
    """Pictures that come later, before others in the list, are measured; those that were are not."""
    data = pictures(tmp_path, None)
    some = replace(data, samples=data.samples[2:])
    store = store_of(tmp_path / "runs", tiny_localizer, data)
    run(store, tiny_localizer, TWO, some, PAPER)
    assert store.read().total == 3
    heard: list[int] = []
    run(store, tiny_localizer, TWO, data, PAPER, progress=heard.append)
    assert heard == [3, 1, 1]
    assert store.read().done == {"0", "1", "2", "3", "4"}
    assert store.read().total == 5


def test_a_failed_image_is_tried_again(tiny_localizer, tmp_path):
    data = pictures(tmp_path, None)
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(b"no picture")
    store = store_of(tmp_path / "runs", tiny_localizer, data)
    run(store, tiny_localizer, TWO, data, PAPER)
    assert list(store.read().failed) == ["2"] and "2" not in store.read().done
    assert [list(read_run(store, ids).failed) for ids in (None, ["1", "3"])] == [["2"], []]
    (tmp_path / "2.png").write_bytes(whole)
    run(store, tiny_localizer, TWO, data, PAPER)
    assert not store.read().failed and "2" in store.read().done


def test_scores_cover_the_requested_images(tiny_localizer, tmp_path):
    data = scenes(range(5), 64)
    store = store_of(tmp_path, tiny_localizer, data)
    run(store, tiny_localizer, TWO, data, PAPER)
    few = store_of(tmp_path / "few", tiny_localizer, data)
    run(few, tiny_localizer, TWO, data, PAPER, ids=data.ids[:2])
    assert few.read().total == 5
    turned = dict(reversed(TWO.items()))
    again = Store.at(tmp_path, settings_of(tiny_localizer, turned, data, PAPER))
    assert list(read_run(again).scores) == list(turned)
    first = read_run(store, data.ids[:2])
    assert (first.images, first.total) == (2, 5)
    assert first.scores == read_run(few).scores


def test_shards_do_not_depend_on_which_images_a_machine_has():
    ids = [f"picture {index}" for index in range(200)]
    lacking = ids[::3]
    for index in range(4):
        assert set(shard(lacking, index, 4)) == set(shard(ids, index, 4)).intersection(lacking)
        assert 30 < len(shard(ids, index, 4)) < 70


KILLED = """
import sys
from pathlib import Path
from open_gem import METHODS, load
from open_gem.data import scenes
from open_gem.evaluation import store as stores
from open_gem.evaluation.protocol import PROTOCOLS

stores.PART = 3
localizer, data, protocol = load(sys.argv[1], device="cpu"), scenes(range(40), 64), PROTOCOLS["paper"]
chosen = {name: METHODS[name] for name in ("clip", "maskclip")}
store = stores.Store.at(Path(sys.argv[2]), stores.settings_of(localizer, chosen, data, protocol))
stores.run(store, localizer, chosen, data, protocol, batch_size=2, progress=lambda n: print(n, flush=True))
"""


@pytest.mark.slow
def test_a_killed_run_resumes(tiny, tiny_localizer, tmp_path):
    """SIGKILL, twice at different places: every image counts once, and at most one part is lost each time."""
    data = scenes(range(40), 64)
    for number, after in enumerate((5, 12), start=1):
        place = [sys.executable, "-c", KILLED, tiny, str(tmp_path)]
        with subprocess.Popen(place, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            before = int(process.stdout.readline())
            for _ in range(after):
                process.stdout.readline()
            process.kill()
        [folder] = tmp_path.glob("scenes-*")
        done = Store.open(folder).read().done
        assert len(done) >= before + after - 3, number
    store = store_of(tmp_path, tiny_localizer, data)
    run(store, tiny_localizer, TWO, data, PAPER)
    whole = store_of(tmp_path / "whole", tiny_localizer, data)
    run(whole, tiny_localizer, TWO, data, PAPER)
    assert documents(store) == documents(whole)


# Protocols ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_can_be_stored_and_hashed(name):
    told = PROTOCOLS[name].describe()
    assert json.loads(json.dumps(told)) == told
    assert digest(told) == digest(dict(reversed(told.items())))
    assert digest(told) != digest(told | {"threshold": 0.1})
    assert find_protocol(name) is PROTOCOLS[name]


def test_absent_classes_are_part_of_a_protocol():
    assert digest(PAPER.describe()) != digest(replace(PAPER, absent="denoise").describe())
    with pytest.raises(InputError, match="absent is 'some', expected one of none, presence, denoise"):
        replace(PAPER, absent="some")


def test_an_unknown_protocol_lists_the_known():
    with pytest.raises(InputError, match=r"papre.*did you mean paper.*official"):
        find_protocol("papre")


def test_the_field_protocol_has_a_threshold_for_each_data_set():
    assert PROTOCOLS["field"].background_of("voc2012") == 0.5
    assert PROTOCOLS["field"].background_of("another") == 0.0
    assert PROTOCOLS["paper"].background_of("voc2012") == 0.8
