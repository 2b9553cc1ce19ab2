"""Labelling: rows say what the localizer says, whatever happens every image is in one part, and runs go on where they
were."""

import io
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event, Lock, Thread
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import open_gem
from open_gem import Localizer, Views
from open_gem.data.scenes import CONCEPTS, scene
from open_gem.errors import ImageError, InputError, OpenGemError, OutputError
from open_gem.images.read import read_image
from open_gem.label import local
from open_gem.label.decoding import decode
from open_gem.label.done import Shard, done_in, writing
from open_gem.label.labeling import Labeling, load_labeling
from open_gem.label.local import PartWriter, label, run
from open_gem.label.ontology import Ontology
from open_gem.label.parts import LabelRow, Parts
from open_gem.label.rules import OUTPUTS, PixelBudget
from open_gem.label.sources import Columns, Item, open_source
from open_gem.label.summary import summarize
from open_gem.localization import INSTANCES
from open_gem.refine.pamr import Pamr

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")  # decode

ANY = {"presence": 0.0}  # whatever the model says, so that a random one finds something


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Forty small scenes of several shapes."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(40):
        height, width = ((64, 64), (64, 96), (80, 48))[seed % 3]
        Image.fromarray(scene(seed, (height, width)).image).save(folder / f"{seed:02}.png")
    return folder


@pytest.fixture
def labeling(tiny_localizer: Localizer) -> Labeling:
    return Labeling(tiny_localizer, Ontology.of(["cat", "dog"], **ANY))


def claim(folder: Path, labeling: Labeling, source) -> Parts:
    return Parts.claim(folder, labeling.manifest(source))


def items_of(folder: Path) -> list[Item]:
    return sorted(open_source(str(folder)).items())


# Rows -----------------------------------------------------------------------------------------------------------------


def row_of(labeling: Labeling, item: Item) -> LabelRow:
    [row] = label(labeling, [item])
    assert row["status"] == "ok", row["error"]
    return row


def decoded(one: dict) -> np.ndarray:
    return coco.decode({"size": one["rle"]["size"], "counts": one["rle"]["counts"].encode()}).astype(bool)


def test_objects_are_those_of_the_localization(photos, tiny_localizer, labeling):
    """Boxes, scores and masks against `Localization`, which has them by code of its own."""
    for item in items_of(photos)[:6]:
        row = row_of(replace(labeling, min_area=0.0, keep=None), item)
        result = tiny_localizer(item.source, ["cat", "dog"])
        assert (row["height"], row["width"]) == result.size
        for index, (name, boxes) in enumerate(zip(result.labels, result.boxes(), strict=True)):
            objects = [one for one in row["objects"] if one["label"] == name]
            assert sorted(one["xyxy"] for one in objects) == sorted(boxes.xyxy.tolist())
            assert {one["prompt"] for one in objects} == {name}
            assert [one["score"] for one in objects] == pytest.approx(boxes.scores.tolist(), abs=1e-6)
            union = np.any([decoded(one) for one in objects], axis=0)
            assert np.array_equal(union, result.masks()[index].numpy())
            assert objects[0]["point"] == result.points()[index].tolist()
            assert result.scores is not None and result.presence is not None
            assert objects[0]["image_score"] == pytest.approx(result.scores[index].item(), abs=1e-6)
            assert objects[0]["presence"] == pytest.approx(result.presence[index].item(), abs=1e-5)


def test_one_object_a_label(photos, labeling):
    for item in items_of(photos)[:6]:
        parts = row_of(replace(labeling, min_area=0.0), item)["objects"]
        wholes = row_of(replace(labeling, instances="label"), item)["objects"]
        assert [one["label"] for one in wholes] == ["cat", "dog"]
        for whole in wholes:
            some = [one for one in parts if one["label"] == whole["label"]]
            assert whole["score"] == max(one["score"] for one in some)
            assert whole["xyxy"][:2] == [min(one["xyxy"][axis] for one in some) for axis in (0, 1)]
            assert np.array_equal(decoded(whole), np.any([decoded(one) for one in some], axis=0))


def test_presence_comes_before_place(photos, tiny_localizer, labeling):
    item = items_of(photos)[0]
    presence = tiny_localizer(item.source, ["cat", "dog"]).presence
    assert presence is not None
    cat, dog = presence.tolist()
    for label_, own, expected in (("cat", cat, {"cat"}), ("dog", dog, {"dog"})):
        thresholds = {"cat": {"presence": 1.0}, "dog": {"presence": 1.0}} | {label_: {"presence": own - 1e-4}}
        found = row_of(replace(labeling, classes=Ontology.of(thresholds)), item)["objects"]
        assert {one["label"] for one in found} == expected
    assert row_of(replace(labeling, classes=Ontology.of(["cat", "dog"], presence=1.0)), item)["objects"] == []


def test_thresholds_are_of_each_label(photos, labeling):
    item = items_of(photos)[0]
    classes = Ontology.of({"cat": {"threshold": 0.9}, "dog": {"threshold": 0.2}}, **ANY)
    labeling = replace(labeling, instances="label")
    before, after = row_of(labeling, item), row_of(replace(labeling, classes=classes), item)
    areas = [[decoded(one).sum() for one in row["objects"]] for row in (before, after)]
    assert areas[1][0] < areas[0][0] and areas[1][1] > areas[0][1]


def test_specks_are_left_out(photos, labeling):
    item = items_of(photos)[0]
    every = row_of(replace(labeling, min_area=0.0), item)["objects"]
    areas = [decoded(one).mean() for one in every]
    least = sorted(areas)[len(areas) // 2]
    kept = row_of(replace(labeling, min_area=least), item)["objects"]
    assert kept == [one for one, area in zip(every, areas, strict=True) if area >= least]
    assert 0 < len(kept) < len(every)


def test_the_phrase_is_the_best_one_where_the_object_is(photos, tiny_localizer):
    classes = Ontology.of({"cat": ["cat", "kitten", "tiger"], "dog": ["dog"]}, **ANY)
    labeling = Labeling(tiny_localizer, classes)
    seen = Counter()
    for item in items_of(photos)[:9]:
        result = tiny_localizer(item.source, ["cat", "kitten", "tiger"])
        for one in row_of(labeling, item)["objects"]:
            if one["label"] == "cat":
                x, y = one["point"]
                best = result.heatmaps("cosine").stack()[:, y, x]
                assert best.max() - best[result.labels.index(one["prompt"])] < 0.02  # interpolation aside
                assert best.max() == pytest.approx(one["score"], abs=1e-5)
                seen[one["prompt"]] += 1
    assert len(seen) > 1


@pytest.mark.parametrize("scale", ["minmax", "cosine", "probability"])
def test_scales_are_those_of_heatmaps(scale, photos, tiny_localizer, labeling):
    item = items_of(photos)[1]
    threshold = {"minmax": 0.7, "cosine": 0.1, "probability": 0.5}[scale]
    classes = Ontology.of(["cat", "dog"], threshold=threshold, **ANY)
    row = row_of(replace(labeling, heatmap_scale=scale, classes=classes, min_area=0.0), item)
    expected = tiny_localizer(item.source, ["cat", "dog"]).masks(threshold, scale)
    for index, name in enumerate(("cat", "dog")):
        masks = [decoded(one) for one in row["objects"] if one["label"] == name]
        union = np.any(masks, axis=0) if masks else np.zeros((row["height"], row["width"]), dtype=bool)
        assert np.array_equal(union, expected[index].numpy())


@pytest.mark.parametrize("instances", INSTANCES)
def test_a_map_that_is_nowhere_above_its_threshold_has_no_object(instances, photos, labeling):
    """And is no reason to lose those of other labels."""
    classes = Ontology.of({"cat": {"threshold": 1.0}, "dog": {"threshold": 0.0}}, **ANY)
    row = row_of(
        replace(labeling, heatmap_scale="probability", classes=classes, instances=instances), items_of(photos)[0]
    )
    assert {one["label"] for one in row["objects"]} == {"dog"}


@pytest.mark.parametrize("band", [1, 150])
def test_large_maps_are_worked_on_in_bands(band, photos, labeling, monkeypatch):
    """Of a row at least, and none other than at once."""
    items = items_of(photos)[:3]
    objects = [row_of(labeling, item)["objects"] for item in items]
    monkeypatch.setattr("open_gem.readout.BAND", band)
    assert [row_of(labeling, item)["objects"] for item in items] == objects


def test_large_images_wait_for_the_pixel_budget():
    budget, done = PixelBudget(10), []

    def work(pixels: int) -> None:
        with budget.taken(pixels):
            done.append(pixels)

    threads = [Thread(target=work, args=(pixels,), daemon=True) for pixels in (4, 5, 1000)]
    with budget.taken(6):
        for thread in threads:
            thread.start()
        threads[0].join(10)
        threads[1].join(0.05)
        assert done == [4]
    for thread in threads:
        thread.join(10)
    assert sorted(done) == [4, 5, 1000], "an image larger than the budget goes alone"


def test_seconds_are_those_that_an_image_took(photos, labeling):
    start = perf_counter()
    assert 0 < row_of(labeling, items_of(photos)[0])["seconds"] < perf_counter() - start


def test_outputs_are_there_when_asked_for(photos, labeling):
    item = items_of(photos)[0]
    least = row_of(replace(labeling, outputs=("boxes",)), item)
    assert least["labelmap"] is None
    assert all(one["rle"] is None and one["point"] is None for one in least["objects"])
    most = row_of(replace(labeling, outputs=OUTPUTS), item)
    assert [one["xyxy"] for one in most["objects"]] == [one["xyxy"] for one in least["objects"]]
    assert all(one["rle"] and one["point"] for one in most["objects"])
    with pytest.raises(InputError, match="output 'polygons', expected any of boxes"):
        replace(labeling, outputs=("polygons",))


@pytest.mark.parametrize("count", [2, 300])
def test_label_maps_have_the_best_object_of_each_pixel(count, photos, tiny_localizer):
    names = [f"thing {number}" for number in range(count)]
    thresholds = {name: {"presence": 0.0 if number >= count - 2 else 1.0} for number, name in enumerate(names)}
    labeling = Labeling(tiny_localizer, Ontology.of(thresholds), outputs=("masks", "labelmap"), min_area=0.0)
    item = items_of(photos)[0]
    row = row_of(labeling, item)
    labelmap = np.asarray(Image.open(io.BytesIO(row["labelmap"])))
    assert labelmap.dtype == (np.uint8 if count <= 255 else np.uint16)
    cosines = tiny_localizer(item.source, names[-2:]).heatmaps("cosine").stack().numpy()
    masks = [np.any([decoded(one) for one in row["objects"] if one["label"] == name], axis=0) for name in names[-2:]]
    expected = np.where(~masks[0] & ~masks[1], 0, count - 1)
    expected[masks[1] & ~(masks[0] & (cosines[0] >= cosines[1]))] = count
    assert np.array_equal(labelmap, expected)


def test_windows_and_refinement(photos, tiny_localizer, labeling):
    views = Views(window=32, stride=16)
    refined = replace(tiny_localizer, refinement=open_gem.Pamr(), views=views)
    for localizer in (replace(tiny_localizer, views=views), refined, replace(refined, views=Views())):
        item = items_of(photos)[2]
        row = row_of(replace(labeling, localizer=localizer, instances="label"), item)
        expected = localizer(item.source, ["cat", "dog"]).masks().stack().numpy()
        assert np.array_equal([decoded(one) for one in row["objects"]], expected)
    merged = replace(tiny_localizer, views=replace(views, merge="logits"))
    labeling = replace(labeling, localizer=merged)
    assert row_of(labeling, items_of(photos)[0])["objects"]
    assert labeling.keep is None, "there is no patch grid whose maps could be kept"


@pytest.mark.parametrize("name", ["clipseg", "owlv2"])
def test_models_trained_to_localize_label_too(name, photos, tmp_path):
    pytest.importorskip("transformers")
    from trained.test_localizer import make

    localizer, item = make(name, tmp_path).ours, items_of(photos)[1]
    labeling = Labeling(localizer, Ontology.of(["cat", "dog"], threshold=0.3, **ANY), outputs=OUTPUTS)
    labeling.manifest(open_source(str(photos)))
    expected = localizer(item.source, ["cat", "dog"]).objects(0.3, presence=0)
    assert expected
    stored = row_of(labeling, item)["objects"]
    assert [(one["label"], one["xyxy"], one["rle"]) for one in stored] == [
        (one.label, list(one.box), one.rle) for one in expected
    ]


def test_scenes_are_found():
    """The embedded model, by its own judgement of what is there."""
    localizer = open_gem.load("embedded", device="cpu").acknowledge()
    labeling = Labeling(localizer, Ontology.of(CONCEPTS, presence=0.9), instances="label", outputs=("masks",))
    right = wrong = missed = 0
    overlaps = []
    for seed in range(12):
        picture = scene(seed, 256)
        ready = labeling.prepare(_item_of(picture.image))
        assert not isinstance(ready, dict)
        objects = {one["label"]: decoded(one) for one in labeling.row(labeling.locate([ready])[0])["objects"]}
        right += len(objects.keys() & set(picture.names))
        wrong += len(objects.keys() - set(picture.names))
        missed += len(set(picture.names) - objects.keys())
        for name, mask in zip(picture.names, picture.masks, strict=True):
            if name in objects:
                overlaps.append((mask & objects[name]).sum() / (mask | objects[name]).sum())
    assert right > 2 * wrong and right > 2 * missed
    assert np.mean(overlaps) > 0.4


def _item_of(image: np.ndarray) -> Item:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".png", delete=False) as file:
        Image.fromarray(image).save(file)
    return Item("x", file.name)


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was(photos, labeling, tmp_path):
    source = open_source(str(photos))
    stop, seen = Event(), Counter()

    def after_ten(images: int) -> None:
        seen["images"] += images
        if seen["images"] >= 10:
            stop.set()

    parts = claim(tmp_path, labeling, source)
    first = run(parts, labeling, source, stop=stop, batch_size=2, progress=after_ten, images_per_part=4)
    assert 10 <= first.labeled < 30
    assert len(done_in(parts)) == first.labeled
    second = run(parts, labeling, source, images_per_part=7)
    assert (second.listed, second.done, second.labeled) == (40, first.labeled, 40 - first.labeled)
    third = run(parts, labeling, source)
    assert (third.done, third.labeled) == (40, 0)
    ids = [row["id"] for row in parts.rows("id")]
    assert sorted(ids) == sorted(path.name for path in photos.iterdir())


def test_rows_do_not_depend_on_batches_or_threads(photos, labeling):
    def rows(batch_size: int, workers: int) -> list[LabelRow]:
        rows = sorted(
            label(labeling, items_of(photos), batch_size=batch_size, workers=workers), key=lambda row: row["id"]
        )
        for row in rows:
            row["seconds"] = 0.0
            for one in row["objects"]:
                for name in ("score", "image_score", "presence", "peak", "probability", "confidence"):
                    one[name] = round(one[name], 4)
        return rows

    one = rows(batch_size=1, workers=1)
    assert len(one) == 40
    many = rows(batch_size=16, workers=4)
    assert [row["id"] for row in many] == [row["id"] for row in one]
    same = sum(a["objects"] == b["objects"] for a, b in zip(one, many, strict=True))
    assert same >= 38  # in batches the last digits differ, and once in a while a pixel at the threshold


def test_no_thread_is_left(photos, labeling):
    before = set(threading.enumerate())
    assert len(list(label(labeling, items_of(photos)[:3], workers=2))) == 3
    assert set(threading.enumerate()) <= before


def test_batches_are_full_but_for_the_last_of_each_shape(photos, labeling, monkeypatch):
    locate, sizes = Labeling.locate, []

    def counted(self: Labeling, group):
        sizes.append(len(group))
        return locate(self, group)

    monkeypatch.setattr(Labeling, "locate", counted)
    list(label(labeling, items_of(photos), batch_size=4))
    assert sorted(sizes) == [1, 1, 2, *[4] * 9]


def test_images_of_many_shapes_do_not_pile_up(labeling, tmp_path):
    for number in range(40):
        Image.new("RGB", (64 + 8 * number, 64)).save(tmp_path / f"{number:02}.png")
    taken = []

    def items() -> Iterator[Item]:
        for item in items_of(tmp_path):
            taken.append(item)
            yield item

    rows = label(labeling, items(), batch_size=2, workers=1)
    next(rows)
    assert len(taken) <= 20
    assert len(list(rows)) == 39


def test_shards_are_one_run(photos, labeling, tmp_path):
    source = open_source(str(photos))
    for index in (1, 0):
        with writing(tmp_path, Shard(index, 2)):
            tally = run(claim(tmp_path, labeling, source), labeling, source, shard=Shard(index, 2))
        assert (tally.done, tally.listed) == (0, tally.labeled) and 10 < tally.labeled < 30
    ids = [row["id"] for row in Parts.open(tmp_path).rows("id")]
    assert len(ids) == len(set(ids)) == 40


def test_every_bad_image_is_a_row_with_the_reason_and_no_neighbour_is_lost(photos, labeling, tmp_path):
    good = photos / "00.png"
    content = good.read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "small.png").write_bytes(_png(3, 3))
    (folder / "huge.png").write_bytes(_bomb())
    (folder / "twin.png").write_bytes(content)
    for number in range(10):
        (folder / f"good{number}.png").write_bytes(content)
    listing = tmp_path / "list.txt"
    listing.write_text(
        "\n".join([*(f"in/{path.name}" for path in sorted(folder.iterdir())), "in/none.png", "in/twin.png"])
    )
    source = open_source(str(listing))
    parts = claim(tmp_path / "out", labeling, source)
    tally = run(parts, labeling, source, batch_size=4)
    rows = {row["id"]: row for row in parts.rows()}
    reasons = {
        "empty": "is empty",
        "text": "is not an image",
        "cut": "cannot be read",
        "small": "smaller than one 8x8 patch",
        "huge": "more than the 89478485 that are safe",
        "none": "No such file",
    }
    for name, reason in reasons.items():
        row = rows.pop(f"in/{name}.png")
        assert row["status"] == "error" and reason in row["error"], row["error"]
        assert (row["objects"], row["height"]) == ([], None)
    assert len(rows) == 11 and all(row["status"] == "ok" and row["objects"] for row in rows.values())
    assert (tally.listed, tally.duplicates, tally.labeled, tally.failed) == (18, 1, 11, 6)


def _png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, format="PNG")
    return file.getvalue()


def _bomb() -> bytes:
    """A small file that says it is a picture of 20000 × 20000."""
    import struct
    import zlib

    content = bytearray(_png(8, 8))
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_where_memory_ends_batches_are_halved(error, photos, labeling, monkeypatch):
    tried = []
    locate = Labeling.locate

    def small(self: Labeling, group):
        tried.append(len(group))
        if len(group) > 2:
            raise error
        return locate(self, group)

    monkeypatch.setattr(Labeling, "locate", small)
    rows = list(label(labeling, items_of(photos), batch_size=8))
    assert len({row["id"] for row in rows}) == len(rows) == 40
    assert all(row["status"] == "ok" for row in rows)
    assert tried[0] == 8 and max(tried[-5:]) <= 2, "and stay small"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_model_sees_two_batches_at_a_time_each_with_half_of_the_threads(photos, labeling, monkeypatch):
    alone, locate = list(label(labeling, items_of(photos), batch_size=4)), Labeling.locate
    both, threads = Barrier(2, timeout=30), []

    def together(self: Labeling, group):
        threads.append(torch.get_num_threads())
        if len(threads) <= 2:
            both.wait()  # breaks where the second does not come before the first is done
        return locate(self, group)

    monkeypatch.setattr(Labeling, "locate", together)
    rows = list(label(labeling, items_of(photos), batch_size=4))
    assert set(threads) == {1} and torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2
    assert [(row["id"], row["objects"]) for row in rows] == [(row["id"], row["objects"]) for row in alone]


@pytest.mark.usefixtures("two_threads")
def test_threads_share_those_of_torch(photos, labeling, monkeypatch):
    used: dict[str, set[int]] = {"prepare": set(), "locate": set(), "row": set()}
    for name, counts in used.items():
        step = getattr(Labeling, name)

        def noted(self: Labeling, work, step=step, counts=counts):
            torch.ones(1 << 16).exp()  # enough work for several threads
            counts.add(torch.get_num_threads())
            return step(self, work)

        monkeypatch.setattr(Labeling, name, noted)
    torch.set_num_threads(8)
    assert len(list(label(labeling, items_of(photos), batch_size=2, workers=4))) == len(list(items_of(photos)))
    assert used == {"prepare": {2}, "locate": {4}, "row": {2}}
    assert torch.get_num_threads() == 8


@pytest.mark.usefixtures("two_threads")
def test_where_memory_ends_the_model_sees_a_batch_alone_before_it_sees_less(photos, labeling, monkeypatch):
    locate, both, lock, at_once, tried = Labeling.locate, Barrier(2, timeout=30), Lock(), [], []

    def crowded(self: Labeling, group):
        with lock:
            at_once.append(group)
            tried.append((len(at_once), len(group)))
            number = len(tried)
        if number <= 2:
            both.wait()
        try:
            if number == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return locate(self, group)
        finally:
            with lock:
                at_once.remove(group)

    monkeypatch.setattr(Labeling, "locate", crowded)
    rows = list(label(labeling, items_of(photos), batch_size=4))
    assert {row["status"] for row in rows} == {"ok"} and len(rows) == 40
    assert tried[:3] == [(1, 4), (2, 4), (1, 4)] and {count for count, _ in tried[2:]} == {1}
    assert sum(size for _, size in tried) == 44, "the one that failed was tried whole again"


@pytest.mark.usefixtures("two_threads")
def test_where_memory_ends_for_two_batches_at_once_neither_is_halved(photos, labeling, monkeypatch):
    locate, both, tried = Labeling.locate, Barrier(2, timeout=30), []

    def crowded(self: Labeling, group):
        tried.append(len(group))
        if len(tried) <= 2:
            both.wait()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return locate(self, group)

    monkeypatch.setattr(Labeling, "locate", crowded)
    assert len(list(label(labeling, items_of(photos), batch_size=4))) == 40
    assert tried[:4] == [4] * 4 and sum(tried) == 48


@pytest.mark.usefixtures("two_threads")
def test_other_devices_see_one_batch_at_a_time(photos, labeling, monkeypatch):
    seen = []

    def refuse(self: Labeling, group):
        seen.append(threading.current_thread())
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Labeling, "locate", refuse)
    monkeypatch.setattr(Localizer, "device", property(lambda localizer: torch.device("cuda")))
    rows = list(label(labeling, items_of(photos)[:1]))
    assert [row["status"] for row in rows] == ["error"]
    assert seen == [threading.main_thread()]


def test_an_image_that_cannot_be_read_takes_no_place_in_a_batch(few, labeling, monkeypatch):
    good = items_of(few)
    broken = [Item(f"none{number}", "none.png") for number in range(3)]
    locate, sizes = Labeling.locate, []

    def counted(self: Labeling, group):
        sizes.append(len(group))
        return locate(self, group)

    monkeypatch.setattr(Labeling, "locate", counted)
    rows = list(label(labeling, [broken[0], good[0], *broken[1:], good[1]], batch_size=2))
    assert sizes == [2]
    assert sorted(row["status"] for row in rows) == ["error"] * 3 + ["ok"] * 2


def test_an_image_that_does_not_fit_alone_is_a_row(photos, labeling, monkeypatch):
    locate = Labeling.locate

    def picky(self: Labeling, group):
        if any(one.item.id == "07.png" for one in group):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return locate(self, group)

    monkeypatch.setattr(Labeling, "locate", picky)
    rows = {row["id"]: row for row in label(labeling, items_of(photos), batch_size=4)}
    assert len(rows) == 40
    assert [row["error"] for row in rows.values() if row["status"] == "error"] == ["does not fit into memory"]


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder of a test's own, with two small scenes."""
    (tmp_path / "few").mkdir()
    for seed in range(2):
        Image.fromarray(scene(seed, 64).image).save(tmp_path / "few" / f"{seed:02}.png")
    return tmp_path / "few"


def slow() -> bytes:
    """A file of ten million pixels, each a number in text: many seconds of decoding."""
    return b"P3 4000 2500 254 " + b"1 " * (3 * 4000 * 2500 // 8)


def test_an_image_that_takes_long_to_decode_is_an_error_and_its_neighbours_are_there(few, labeling, tmp_path):
    """In a folder and in a tar, from which it comes as bytes."""
    (few / "slow.ppm").write_bytes(slow())
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("slow.ppm", "00.png"):
            tar.add(few / name, name)
    items = [*items_of(few), *open_source(str(tmp_path / "s.tar")).items()]
    start = time.monotonic()
    rows = {row["id"]: row["error"] for row in label(replace(labeling, read_timeout=0.5), items)}
    assert time.monotonic() - start < 30
    assert rows.pop("slow.ppm") == f"'{few}/slow.ppm' was not decoded within 0.5 seconds"
    assert rows.pop("s.tar/slow.ppm") == "image bytes was not decoded within 0.5 seconds"
    assert len(rows) == len(items) - 2 and set(rows.values()) == {None}


def test_profiles_of_a_png_do_not_hold_a_thread(labeling, tmp_path):
    """Each of them is a megabyte of zeros in a kilobyte, and is unpacked."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG", icc_profile=b"\0" * 1_000_000)
    content = file.getvalue()
    start = content.index(b"iCCP") - 4
    profile = content[start : content.index(b"IDAT") - 4]
    (tmp_path / "a.png").write_bytes(content[:start] + profile * 3000 + content[start:])
    [row] = label(replace(labeling, read_timeout=0.5), open_source(str(tmp_path)).items())
    assert "was not decoded within 0.5 seconds" in row["error"]


def test_images_are_the_same_wherever_they_are_decoded(tmp_path, monkeypatch):
    """Small ones here, others in processes of their own."""
    monkeypatch.setattr("open_gem.label.decoding.PLAIN_PIXELS", 100 * 100)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    many_scans = io.BytesIO()
    noise.save(many_scans, "JPEG", progressive=True)
    scan = many_scans.getvalue()[many_scans.getvalue().rindex(b"\xff\xda") : -2]
    files = {"scans.jpg": many_scans.getvalue()[:-2] + scan * 20 + b"\xff\xd9", "empty.png": b"", "text.png": b"hello"}
    for name, side in (("a.png", 1), ("a.jpg", 1), ("a.gif", 1), ("a.webp", 1), ("large.png", 4)):
        noise.resize((60 * side, 40 * side)).save(tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        for source in (content, tmp_path / name):
            assert _decoded(decode, source, 60.0) == _decoded(read_image, source), name


def _decoded(read: Callable[..., Image.Image], *arguments: Any) -> str | tuple[tuple[int, int], bytes]:
    try:
        image = read(*arguments)
    except ImageError as error:
        return str(error)
    return image.size, image.tobytes()


def test_the_reason_does_not_quote_what_is_in_the_file(labeling, tmp_path):
    """A list of others may name any file, and its errors are read by whoever made the list."""
    (tmp_path / "key.txt").write_text("s3cret key")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/key.txt\n")
    [row] = label(labeling, open_source(str(tmp_path / "list.txt")).items())
    assert "is not an image" in row["error"] and "s3cret" not in row["error"]


def test_further_pages_are_counted(few, labeling, tmp_path):
    pages = [Image.fromarray(scene(seed, 64).image) for seed in range(3)]
    pages[0].save(few / "pages.tif", save_all=True, append_images=pages[1:])
    source = open_source(str(few))
    parts = claim(tmp_path / "out", labeling, source)
    run(parts, labeling, source)
    assert {row["pages"] for row in parts.rows("id", "pages") if row["id"] == "pages.tif"} == {3}
    assert summarize(parts).document()["passed_over"] == {"further pages": 2}


def test_photos_of_phones_are_read_with_the_extra(few, labeling):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(scene(0, 64).image)).save(few / "a.HEIC")
    [row] = [row for row in label(labeling, items_of(few)) if row["id"] == "a.HEIC"]
    assert (row["status"], row["error"]) == ("ok", None)


def test_what_one_image_does_to_a_library_is_its_own(photos, labeling, monkeypatch):
    def odd(mask, span, size):
        raise ValueError("odd\nmask")

    rows = list(label(labeling, items_of(photos)[:3]))
    monkeypatch.setattr("open_gem.localization.result.run_lengths", odd)
    broken = list(label(labeling, items_of(photos)[:3]))
    assert [row["error"] for row in broken] == ["ValueError: odd mask"] * 3
    assert [row["id"] for row in broken] == [row["id"] for row in rows]


def test_other_errors_of_a_model_are_not_hidden_and_what_was_done_is_written(photos, labeling, tmp_path, monkeypatch):
    locate, calls = Labeling.locate, []

    def breaks(self: Labeling, group):
        calls.append(group)
        if len(calls) == 4:
            raise RuntimeError("a bug")
        return locate(self, group)

    monkeypatch.setattr(Labeling, "locate", breaks)
    source = open_source(str(photos))
    parts = claim(tmp_path, labeling, source)
    with pytest.raises(RuntimeError, match="a bug"):
        run(parts, labeling, source, batch_size=2)
    done = len(done_in(parts))
    assert 0 < done <= 6
    assert run(parts, labeling, source, batch_size=2).labeled == 40 - done


def test_parts_are_written_when_full_large_or_late(labeling, photos, tmp_path):
    rows = list(label(labeling, items_of(photos)))
    large = max(map(local.size_of, rows))
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"images_per_part": 7}, [6]),
        ({"max_bytes": 10 * large}, range(3, 40)),
        ({"max_seconds": 0}, [40]),
        ({}, [1]),
    ]
    for limits, expected in cases:
        folder = tmp_path / str(limits)
        parts = Parts.claim(folder, labeling.manifest(open_source(str(photos))))
        with PartWriter(parts, **limits) as writer:
            for row in rows:
                writer.add(row)
        assert len(parts.paths()) in expected
        assert [row["id"] for row in parts.rows("id")] == [row["id"] for row in rows]


def test_a_last_part_that_cannot_be_written_is_reported(photos, labeling, tmp_path, monkeypatch):
    def full(*arguments: Any) -> None:
        raise OutputError("no room")

    source = open_source(str(photos))
    parts = claim(tmp_path, labeling, source)
    monkeypatch.setattr(Parts, "write", full)
    with pytest.raises(OutputError, match="no room"):
        run(parts, labeling, source)


def test_the_manifest_knows_what_decides_a_row(photos, labeling, tiny_localizer):
    source = open_source(str(photos))
    fingerprint = labeling.manifest(source).fingerprint
    assert labeling.manifest(source).fingerprint == fingerprint
    changed = [
        replace(labeling, classes=Ontology.of(["cat", "cow"], **ANY)),
        replace(labeling, classes=Ontology.of(["cat", "dog"], presence=0.1)),
        replace(labeling, classes=Ontology.of(["cat", "dog"], threshold=0.1, **ANY)),
        replace(labeling, localizer=replace(tiny_localizer, method="clip")),
        replace(labeling, localizer=replace(tiny_localizer, size="short:48")),
        replace(labeling, outputs=OUTPUTS),
        replace(labeling, heatmap_scale="cosine"),
        replace(labeling, instances="label"),
        replace(labeling, min_area=0.1),
        replace(labeling, absent="none"),
        replace(labeling, keep=None),
    ]
    others = {one.manifest(source).fingerprint for one in changed}
    others.add(labeling.manifest(replace(source, columns="ids 'n'")).fingerprint)
    assert len(others - {fingerprint}) == len(changed) + 1


def test_a_labeling_is_loaded_with_its_settings(tiny):
    settings: dict[str, Any] = {"method": "clip", "size": "short:48", "template": "a {}", "views": Views(window=32)}
    settings |= {"refinement": Pamr(iterations=2)}
    others: dict[str, Any] = {
        "outputs": ("masks",),
        "heatmap_scale": "cosine",
        "instances": "label",
        "min_area": 0.25,
        "absent": "none",
        "keep": None,
        "read_timeout": 7.0,
    }
    classes = Ontology.of(["cat"])
    made = load_labeling(classes, tiny, device="cpu", dtype="bfloat16", objects=others, **settings)
    assert {name: getattr(made.localizer, name) for name in settings} == settings
    assert {name: getattr(made, name) for name in others} == others
    assert made.classes is classes and made.localizer.describe()["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "mistake", [{"method": "gme"}, {"size": "huge"}, {"template": "none"}, {"objects": {"heatmap_scale": "log"}}]
)
def test_mistakes_in_settings_are_reported_before_a_model_is_loaded(mistake):
    with pytest.raises(InputError):
        load_labeling(Ontology.of(["cat"]), "no such model", **mistake)


@pytest.mark.parametrize(
    "mistake", [{"model": "ViT-B-16", "pretrained": "no such tag"}, {"model": "embedded", "device": "no such device"}]
)
def test_a_labeling_needs_weights_and_a_device(mistake):
    with pytest.raises(OpenGemError, match="no such"):
        load_labeling(Ontology.of(["cat"]), **mistake)


# Reads that hang ------------------------------------------------------------------------------------------------------


@pytest.fixture
def listing(photos, tmp_path, monkeypatch) -> Path:
    """A list of an image that never comes, and forty that do."""
    from hanging import register

    register()
    path = tmp_path / "list.txt"
    path.write_text("\n".join(["hanging://a.png", *map(str, sorted(photos.iterdir()))]))
    return path


def test_a_read_that_hangs_is_an_error_and_the_others_go_before_it(listing, labeling):
    items = open_source(str(listing)).items()
    rows = list(label(replace(labeling, read_timeout=2.0), items, batch_size=2, workers=2))
    assert [row["id"] for row in rows if row["status"] == "error"] == ["hanging://a.png"]
    late = next(row for row in rows if row["status"] == "error")
    assert late["error"] == "was not read within 2 seconds"
    assert len(rows) == 41 and rows.index(late) > 0


def test_a_run_that_is_stopped_does_not_wait_for_reads_that_hang(listing, labeling):
    stop, rows = Event(), []
    for row in label(replace(labeling, read_timeout=10_000.0), open_source(str(listing)).items(), workers=2, stop=stop):
        rows.append(row)
        stop.set()
    assert 0 < len(rows) <= 41 and all(row["status"] == "ok" for row in rows)


def test_a_remote_tar_that_hangs_is_an_item(listing):
    [item] = open_source("hanging://shard.tar", Columns(read_timeout=0.1)).items()
    assert item.error is not None and "was not read within 0.1 seconds" in item.error
