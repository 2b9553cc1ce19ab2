"""Each format is read back with the library that owns it, and says what the parts say."""

import base64
import io
import json
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from labelled import (
    GOOD,
    HEIGHT,
    IMAGES,
    LABELS,
    OVERLAPPING,
    PIXEL,
    RING,
    SOLID,
    TWO_PARTS,
    WIDTH,
    available,
    box_of,
    exported,
    filled,
    flattened,
    image,
    needs_supervision,
    quiet_supervision,
    thing,
    union,
    write_parts,
)
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.datasets import VOCSegmentation

from open_gem.data.scenes import scene
from open_gem.errors import InputError
from open_gem.export import FORMATS
from open_gem.export.detections import to_supervision
from open_gem.export.fiftyone import sample_of
from open_gem.export.labelled import Labelled
from open_gem.export.output import TWIN
from open_gem.export.polygons import polygons
from open_gem.images.pixels import read_image
from open_gem.label.kept import keep
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Manifest, Parts
from open_gem.localization import Localization
from open_gem.types import Size

# Ids that have a format's own folders in their path ------------------------------------------------------------------

FOLDERS = [
    *("images", "labels", "train", "val", "trainval", "maps", "panoptic", "yolo", "VOCdevkit", "VOC2012"),
    *("JPEGImages", "Annotations", "ImageSets", "Main", "Segmentation", "SegmentationClass", "SegmentationObject"),
]
IN_FOLDERS = [f"{place}/a.jpg" for one in FOLDERS for place in (one, f"x/{one}", f"{one}/{one}")]
IN_FOLDERS += ["images/labels/a.jpg", "a.jpg", "Images/a.jpg", "images.jpg", "labels.txt.jpg"]
SPOTS = [
    filled((slice(3 * (at % 13), 3 * (at % 13) + 3), slice(6 * (at // 13), 6 * (at // 13) + 4)))
    for at in range(len(IN_FOLDERS))
]  # each image's own


def read_coco(folder: Path) -> dict[str, np.ndarray]:
    coco = COCO(folder / "instances.json")
    return {
        str(image["file_name"]): coco.annToMask(coco.loadAnns(coco.getAnnIds(imgIds=number))[0]).astype(bool)
        for number, image in coco.imgs.items()
    }


def read_panoptic(folder: Path) -> dict[str, np.ndarray]:
    document = json.loads((folder / "panoptic.json").read_text("utf-8"))
    names = {one["id"]: one["file_name"] for one in document["images"]}
    return {
        names[one["image_id"]]: np.asarray(Image.open(folder / "panoptic" / one["file_name"]))[..., 0] > 0
        for one in document["annotations"]
    }


def read_semantic(folder: Path) -> dict[str, np.ndarray]:
    return {id: np.asarray(Image.open(folder / "maps" / Path(id).with_suffix(".png"))) > 0 for id in IN_FOLDERS}


def read_voc(folder: Path) -> dict[str, np.ndarray]:
    devkit = folder / "VOCdevkit/VOC2012"
    for id in IN_FOLDERS:
        (devkit / "JPEGImages" / id).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(devkit / "JPEGImages" / id)
    dataset = VOCSegmentation(folder, image_set="trainval")
    ids = [path.removeprefix(f"{devkit}/JPEGImages/") for path in dataset.images]
    for id, mask in zip(ids, dataset.masks, strict=True):
        assert mask == str(devkit / "SegmentationClass" / Path(id).with_suffix(".png"))
        assert (devkit / "Annotations" / Path(id).with_suffix(".xml")).is_file()
    return {id: np.asarray(dataset[at][1]) > 0 for at, id in enumerate(ids)}


def read_yolo(folder: Path) -> dict[str, np.ndarray]:
    """As ultralytics and its kin: the last /images/ of a picture's path is /labels/."""
    masks = {}
    for id in IN_FOLDERS:
        head, _, tail = str(folder / "images" / id).rpartition("/images/")
        _, *shares = Path(f"{head}/labels/{tail}").with_suffix(".txt").read_text().split()
        corners = (np.array(shares, float).reshape(-1, 2) * [WIDTH, HEIGHT]).astype(int)
        masks[id] = quiet_supervision().polygon_to_mask(corners, (WIDTH, HEIGHT)) > 0
    return masks


def read_labelme(folder: Path) -> dict[str, np.ndarray]:
    masks = {}
    for path in folder.rglob("*.json"):
        document = json.loads(path.read_text("utf-8"))
        id = (path.parent / document["imagePath"]).resolve().relative_to(folder.resolve()).as_posix()
        corners = np.array(document["shapes"][0]["points"], int)
        masks[id] = quiet_supervision().polygon_to_mask(corners, (WIDTH, HEIGHT)) > 0
    return masks


def read_label_studio(folder: Path) -> dict[str, np.ndarray]:
    tasks = json.loads((folder / "tasks.json").read_text("utf-8"))
    return {
        task["data"]["image"].removeprefix("/data/local-files/?d=pictures/"): drawn_from_percent(
            task["predictions"][0]["result"][0]["value"]["points"]
        )
        for task in tasks
    }


def read_fiftyone(folder: Path) -> dict[str, np.ndarray]:
    masks = {}
    for sample in json.loads((folder / "samples.json").read_text("utf-8"))["samples"]:
        [one] = sample["objects"]["detections"]
        mask = np.zeros((HEIGHT, WIDTH), bool)
        left, top = (round(share * side) for share, side in zip(one["bounding_box"], (WIDTH, HEIGHT), strict=False))
        inside = unpacked(one["mask"])
        mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        masks[sample["filepath"].removeprefix("/pictures/")] = mask
    return masks


READERS = {
    "coco": read_coco,
    "panoptic": read_panoptic,
    "semantic": read_semantic,
    "voc": read_voc,
    "yolo": read_yolo,
    "labelme": read_labelme,
    "label-studio": read_label_studio,
    "fiftyone": read_fiftyone,
}


def test_all_formats_with_files_of_images_have_a_reader():
    assert FORMATS.keys() - READERS == {"label-studio-brush", "geojson"}  # the addresses of label-studio; a single file


@pytest.mark.parametrize("name", [available(name) for name in READERS])
def test_ids_may_have_the_folders_of_a_format_in_their_path(tmp_path, name):
    rows = [image(id, thing("cat", 0.3, mask)) for id, mask in zip(IN_FOLDERS, SPOTS, strict=True)]
    reported: list[str] = []
    folder = exported(write_parts(tmp_path / "labels", rows), name, skip=lambda id, reason: reported.append(id))
    assert reported == []
    found = READERS[name](folder)
    assert found.keys() == set(IN_FOLDERS)
    for id, mask in zip(IN_FOLDERS, SPOTS, strict=True):
        assert np.array_equal(found[id], mask), id


@needs_supervision
def test_images_for_which_readers_look_at_the_same_labels_are_reported(tmp_path):
    ids = ["images/labels/a.jpg", "labels/images/a.jpg"]
    reported: list[tuple[str, str]] = []
    labelled = write_parts(tmp_path / "labels", [image(id) for id in ids])
    exported(labelled, "yolo", skip=lambda *what: reported.append(what))
    reason = "its file images/labels/labels/a.txt " + TWIN
    assert reported == [(ids[1], reason)]


def test_an_image_is_there_with_all_its_files_or_with_none(tmp_path):
    """`a.png/b.jpg` cannot be beside a map called a.png, though its annotation could."""
    rows = [image(id, thing("cat", 0.3, SOLID)) for id in ("a.jpg", "a.png/b.jpg", "http://h/c.jpg", "https://h/c.jpg")]
    reported: list[tuple[str, str]] = []
    labelled = write_parts(tmp_path / "labels", rows)
    folder = exported(labelled, "voc", skip=lambda *what: reported.append(what)) / "VOCdevkit/VOC2012"
    refused = "its file VOCdevkit/VOC2012/SegmentationClass/a.png/b.png cannot be written: File exists"
    assert reported == [("a.png/b.jpg", refused)]
    listed = (folder / "ImageSets/Main/trainval.txt").read_text("utf-8").splitlines()
    assert len(listed) == 3
    for kind in ("Annotations", "SegmentationClass", "SegmentationObject"):
        files = [path.relative_to(folder / kind) for path in (folder / kind).rglob("*") if path.is_file()]
        assert sorted(file.with_suffix("").as_posix() for file in files) == sorted(listed)


# One by one -----------------------------------------------------------------------------------------------------------


def test_coco_is_read_by_pycocotools(labelled):
    folder = exported(labelled, "coco")
    instances = COCO(folder / "instances.json")
    assert [one["name"] for one in instances.loadCats(instances.getCatIds())] == list(LABELS)
    images: Any = instances.loadImgs(instances.getImgIds())
    assert [one["file_name"] for one in images] == [one["id"] for one in GOOD]
    assert {(one["height"], one["width"]) for one in images} == {(HEIGHT, WIDTH)}
    results = instances.loadRes(str(folder / "results.json"))
    for number, one in enumerate(GOOD, start=1):
        for loaded in (instances, results):
            annotations: Any = loaded.loadAnns(loaded.getAnnIds(imgIds=number))
            assert len(annotations) == len(one["objects"])
            for annotation, stored in zip(annotations, by_confidence(one), strict=True):
                left, top, right, bottom = stored["xyxy"]
                assert annotation["bbox"] == [left, top, right - left, bottom - top]
                assert [one["name"] for one in loaded.loadCats(annotation["category_id"])] == [stored["label"]]
                assert annotation["score"] == pytest.approx(stored["confidence"], abs=1e-6)
                if stored["rle"]:
                    mask = coco_mask.decode(stored["rle"]).astype(bool)
                    assert np.array_equal(loaded.annToMask(annotation), mask)
                    if loaded is instances:
                        assert annotation["area"] == mask.sum()
    boxes = instances.loadAnns(instances.getAnnIds(imgIds=5))
    assert [(one["segmentation"], one["area"]) for one in boxes] == [([], 600), ([], 100)]


def by_confidence(one: dict) -> list[dict]:
    return sorted(one["objects"], key=lambda stored: -stored["confidence"])


def test_coco_scores_itself_perfectly(tmp_path):
    from pycocotools.cocoeval import COCOeval

    labelled = write_parts(tmp_path / "labels", IMAGES[:4])  # those with masks that are large enough to count
    folder = exported(labelled, "coco")
    truth = COCO(folder / "instances.json")
    for kind in ("segm", "bbox"):
        scored = COCOeval(truth, truth.loadRes(str(folder / "results.json")), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
        assert scored.stats[0] == pytest.approx(1)


def test_panoptic_ids_are_the_segments(labelled):
    folder = exported(labelled, "panoptic")
    document = json.loads((folder / "panoptic.json").read_text("utf-8"))
    images = {one["id"]: one for one in document["images"]}
    names = {one["id"]: one["name"] for one in document["categories"] if one["isthing"]}
    for annotation, stored in zip(document["annotations"], GOOD, strict=True):
        picture = images.pop(annotation["image_id"])
        assert (picture["file_name"], picture["height"], picture["width"]) == (stored["id"], HEIGHT, WIDTH)
        masked = {one["label"]: one["confidence"] for one in stored["objects"] if one["rle"]}
        segments = annotation["segments_info"]
        assert {names[one["category_id"]]: one["score"] for one in segments} == pytest.approx(masked, abs=1e-6)
        assert not any(one["iscrowd"] for one in segments)
        colors = np.asarray(Image.open(folder / "panoptic" / annotation["file_name"])).astype(int)
        assert colors.shape == (HEIGHT, WIDTH, 3)
        ids = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
        assert sorted({*ids.ravel().tolist()} - {0}) == sorted(one["id"] for one in annotation["segments_info"])
        for segment in annotation["segments_info"]:
            ys, xs = np.nonzero(ids == segment["id"])
            assert segment["area"] == len(ys)
            left, top, width, height = segment["bbox"]
            assert (left, top) == (xs.min(), ys.min())
            assert (left + width, top + height) == (xs.max() + 1, ys.max() + 1)
        covered = [coco_mask.decode(one["rle"]) for one in stored["objects"] if one["rle"]]
        assert np.array_equal(ids > 0, np.any([np.zeros((HEIGHT, WIDTH)), *covered], axis=0))
    assert not images
    overlap = document["annotations"][0]["segments_info"]
    assert [one["area"] for one in overlap] == [SOLID.sum(), (OVERLAPPING & ~SOLID).sum()]  # the best on top


def test_semantic_maps_are_labels(labelled):
    folder = exported(labelled, "semantic")
    assert (folder / "labels.txt").read_text("utf-8").splitlines() == ["background", *LABELS]
    picture: Any = Image.open(folder / "maps" / "plain.png")
    values = np.asarray(picture)
    assert picture.mode == "P"
    assert np.array_equal(values == 1, SOLID)
    assert np.array_equal(values == 3, OVERLAPPING & ~SOLID)
    assert picture.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]  # Pascal VOC's first colours
    assert not np.asarray(Image.open(folder / "maps" / "nothing.png")).any()
    assert not np.asarray(Image.open(folder / "maps" / "box.png")).any()  # a box alone paints nothing


def test_a_stored_label_map_comes_first_and_follows_the_labels_asked_for(tmp_path):
    stored = np.zeros((HEIGHT, WIDTH), np.uint8)
    stored[:10], stored[10:20], stored[20:30] = 1, 2, 3
    png = io.BytesIO()
    Image.fromarray(stored).save(png, format="PNG")
    labelled = write_parts(tmp_path / "labels", [image("a.jpg", thing("cat", 0.3, SOLID), labelmap=png.getvalue())])
    assert np.array_equal(np.asarray(Image.open(exported(labelled, "semantic") / "maps/a.png")), stored)
    some = exported(labelled, "semantic", out="some", labels=["dog", "cat"])
    expected = np.select([stored == 1, stored == 3], [1, 2])
    assert np.array_equal(np.asarray(Image.open(some / "maps/a.png")), expected)
    for limit in ({"min_score": 0.4}, {"min_presence": 0.95}):  # of a map nothing can be left out by score
        sure = exported(labelled, "semantic", out=f"sure {limit}", **limit)
        assert not np.asarray(Image.open(sure / "maps/a.png")).any()


@pytest.mark.parametrize(("count", "mode"), [(254, "P"), (255, "I;16"), (300, "I;16")])
def test_beyond_254_labels_maps_need_16_bits(tmp_path, count, mode):
    names = tuple(f"label {number}" for number in range(count))
    Parts.claim(tmp_path / "labels", Manifest({}, names)).write("0", [image("a.jpg", thing(names[-1], 0.3, SOLID))])
    with Image.open(exported(tmp_path / "labels", "semantic") / "maps" / "a.png") as picture:
        assert picture.mode == mode
        assert np.array_equal(np.asarray(picture), np.where(SOLID, count, 0))
    if count > 254:
        with pytest.raises(InputError, match=f"hold 254 labels, got {count}"):
            exported(tmp_path / "labels", "voc")
    else:
        voc = exported(tmp_path / "labels", "voc") / "VOCdevkit/VOC2012/SegmentationClass/a.png"
        assert np.asarray(Image.open(voc)).max() == 254


def test_voc_is_read_by_torchvision(tmp_path):
    labelled = write_parts(tmp_path / "labels", GOOD)
    folder = exported(labelled, "voc")
    for one in GOOD:
        path = folder / "VOCdevkit/VOC2012/JPEGImages" / f"{one['id'].rpartition('.')[0]}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    dataset = VOCSegmentation(folder, image_set="trainval")
    assert len(dataset) == len(GOOD)
    _, target = dataset[0]
    assert np.array_equal(np.asarray(target) == 1, SOLID)
    ids = np.asarray(Image.open(folder / "VOCdevkit/VOC2012/SegmentationObject/plain.png"))
    assert np.array_equal(ids, np.where(SOLID, 1, np.where(OVERLAPPING, 2, 0)))


@needs_supervision
def test_voc_is_read_by_supervision(labelled, pictures):
    folder = exported(labelled, "voc")
    flat = flattened(folder, "VOCdevkit/VOC2012/Annotations")
    dataset = quiet_supervision().DetectionDataset.from_pascal_voc(str(pictures), str(flat))
    assert sorted(dataset.classes) == sorted(LABELS)
    for one in GOOD:
        found = dataset.annotations[str(pictures / Path(one["id"]).name)]
        assert found.xyxy.tolist() == [stored["xyxy"] for stored in by_confidence(one)]
        assert [dataset.classes[index] for index in found.class_id] == [
            stored["label"] for stored in by_confidence(one)
        ]


NAMES = {  # id -> what VOC and LabelMe say of where the picture is
    "a/b.jpg": ("a", "b.jpg", "b.jpg"),
    "a?b/c:d.jpg": ("a?b", "c:d.jpg", "../a?b/c:d.jpg"),
    "é «ü».png": (".", "é «ü».png", "é «ü».png"),
    "../up.jpg": ("..", "up.jpg", "../up.jpg"),
    "/abs/x.jpg": ("/abs", "x.jpg", "/abs/x.jpg"),
    "s3://bucket/y.jpg": ("bucket", "y.jpg", "y.jpg"),
}


def test_voc_tells_the_true_names_of_images(tmp_path):
    labelled = write_parts(tmp_path / "labels", [image(id) for id in NAMES])
    folder = exported(labelled, "voc") / "VOCdevkit/VOC2012/Annotations"
    found = [ElementTree.parse(path).getroot() for path in folder.rglob("*.xml")]
    reported = {(one.findtext("folder"), one.findtext("filename")) for one in found}
    assert reported == {(place, name) for place, name, _ in NAMES.values()}


@needs_supervision
def test_labelme_tells_the_true_paths_of_images(tmp_path):
    labelled = write_parts(tmp_path / "labels", [image(id) for id in NAMES])
    folder = exported(labelled, "labelme")
    found = {path: json.loads(path.read_text("utf-8"))["imagePath"] for path in folder.rglob("*.json")}
    assert sorted(found.values()) == sorted(path for _, _, path in NAMES.values())
    [beside] = [path for path, picture in found.items() if picture == "../a?b/c:d.jpg"]
    assert beside.parent.relative_to(folder).as_posix() == "a_b"


def voc_objects(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a VOC annotation says of each object, as text."""
    root = ElementTree.parse(folder / f"VOCdevkit/VOC2012/Annotations/{name}.xml").getroot()
    return [{part.tag: part.text for part in one.iter()} for one in root.iter("object")]


def test_voc_annotations_of_an_image(labelled):
    folder = exported(labelled, "voc")
    root = ElementTree.parse(folder / "VOCdevkit/VOC2012/Annotations/plain.xml").getroot()
    size = {name: root.findtext(f"size/{name}") for name in ("width", "height", "depth")}
    assert size == {"width": str(WIDTH), "height": str(HEIGHT), "depth": "3"}
    cat, dog = voc_objects(folder, "plain")
    assert (cat["name"], dog["name"]) == ("cat", "dog")
    assert (float(str(cat["score"])), float(str(dog["score"]))) == (0.279, 0.252)
    assert (cat["xmin"], cat["ymin"], cat["xmax"], cat["ymax"]) == ("11", "6", "40", "25")


def png_of(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


STORED = np.where(OVERLAPPING, 3, np.where(SOLID, 1, 0))  # the dog, of a lower score, has what both have
STORED[20:22, 32:36] = 1


def maps_of(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    place = folder / "VOCdevkit/VOC2012"
    classes, objects = (np.asarray(Image.open(place / kind / f"{name}.png")) for kind in VOC_MAPS)
    return classes, objects


VOC_MAPS = ("SegmentationClass", "SegmentationObject")


@pytest.mark.parametrize("stored", [STORED, None], ids=["label map", "masks alone"])
@pytest.mark.parametrize("options", [{}, {"labels": ["dog"]}, {"min_score": 0.2}], ids=str)
def test_every_object_has_its_own_class_in_voc(tmp_path, stored, options):
    again = filled((slice(20, 30), slice(25, 45)))  # a dog over a dog
    things = [thing("cat", 0.31, SOLID), thing("dog", 0.28, OVERLAPPING), thing("dog", 0.29, again)]
    if stored is not None:
        stored = np.where(again & (stored == 0), 3, stored)
    row = image("a.jpg", *things, labelmap=None if stored is None else png_of(stored))
    folder = exported(write_parts(tmp_path / "labels", [row]), "voc", **options)
    classes, objects = maps_of(folder, "a")
    names = ["background", *options.get("labels", LABELS)]
    reported = [one["name"] for one in voc_objects(folder, "a")]
    assert sorted({*np.unique(objects)} - {0}) == list(range(1, len(reported) + 1))
    for number, name in enumerate(reported, start=1):
        assert {names[value] for value in np.unique(classes[objects == number])} == {name}
    assert np.array_equal(classes > 0, objects > 0)
    if stored is not None and options == {}:
        assert np.array_equal(classes, stored)
        semantic = exported(tmp_path / "labels", "semantic")
        assert np.array_equal(np.asarray(Image.open(semantic / "maps/a.png")), classes)
        panoptic = np.asarray(Image.open(exported(tmp_path / "labels", "panoptic") / "panoptic/a.png"))
        assert np.array_equal(panoptic[..., 0], objects)


def test_voc_without_masks_has_the_label_map_and_no_map_of_objects(tmp_path):
    rows = [image("a.jpg", thing("cat", 0.3, None), labelmap=png_of(STORED)), image("b.jpg", thing("cat", 0.3, None))]
    folder = exported(write_parts(tmp_path / "labels", rows), "voc")
    place = folder / "VOCdevkit/VOC2012"
    assert np.array_equal(np.asarray(Image.open(place / "SegmentationClass/a.png")), STORED)
    assert [path.name for path in (place / "SegmentationObject").iterdir()] == ["b.png"]
    assert not np.any(maps_of(folder, "b"))


def labelmap_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """As datumaro reads it: lines stripped, without comments, four fields a line, each name once."""
    lines = (folder / "VOCdevkit/VOC2012/labelmap.txt").read_text("utf-8").split("\n")
    fields = [line.strip().split(":") for line in lines if line.strip() and not line.strip().startswith("#")]
    assert {(len(one), *one[2:]) for one in fields} == {(4, "", "")}
    colors = {name: tuple(map(int, color.split(","))) for name, color, _, _ in fields}
    assert len(colors) == len(fields)
    return colors


def test_voc_has_the_colours_of_its_labels_beside_it(labelled):
    folder = exported(labelled, "voc")
    colors = labelmap_of(folder)
    assert colors == {"background": (0, 0, 0), "cat": (128, 0, 0), LABELS[1]: (0, 128, 0), "dog": (128, 128, 0)}
    picture = np.asarray(Image.open(folder / "VOCdevkit/VOC2012/SegmentationClass/plain.png").convert("RGB"))
    assert (picture[SOLID] == colors["cat"]).all()


ODD_LABELS = {  # label -> what VOC's files call it
    "a: b": "a_ b",
    "a_ b": "a_ b-2",
    "#1": "_1",
    " inside ": "inside",
    "line\nbreak": "line_break",
    "bell\a": "bell_",
    "background": "background-7",
    "<&\"'>, é 猫": "<&\"'>, é 猫",
}


def test_labels_with_odd_letters_are_the_same_in_all_files_of_voc(tmp_path):
    rows = [image("a.jpg", *(thing(label, 0.5 - at / 10, None) for at, label in enumerate(ODD_LABELS)))]
    Parts.claim(tmp_path / "labels", Manifest({}, tuple(ODD_LABELS))).write("0", rows)
    with pytest.warns(UserWarning, match="Pascal VOC's files call 'a: b' 'a_ b', .* …"):
        folder = exported(tmp_path / "labels", "voc")
    expected = ["background", *ODD_LABELS.values()]
    assert list(labelmap_of(folder)) == expected
    assert (folder / "labels.txt").read_text("utf-8").splitlines() == expected
    assert [one["name"] for one in voc_objects(folder, "a")] == expected[1:]
    maps = exported(tmp_path / "labels", "semantic")
    assert len((maps / "labels.txt").read_text("utf-8").splitlines()) == len(expected)


def test_names_in_the_lists_of_voc_are_those_of_its_files(tmp_path):
    ids = ["#1.jpg", "end .jpg", " begin.jpg", "a\u2028b.jpg", "c\x85d.jpg", "#/e.jpg", "plain.jpg"]
    folder = exported(write_parts(tmp_path / "labels", [image(id) for id in ids]), "voc") / "VOCdevkit/VOC2012"
    listed = [line.strip() for line in (folder / "ImageSets/Main/trainval.txt").read_text("utf-8").splitlines()]
    assert not [name for name in listed if name.startswith("#")]
    files = [path.relative_to(folder / "Annotations") for path in (folder / "Annotations").rglob("*.xml")]
    assert sorted(listed) == sorted(file.with_suffix("").as_posix() for file in files)
    assert len(listed) == len(ids) and "plain" in listed


def test_voc_objects_cut_off_at_an_edge(tmp_path):
    inside = [10, 10, 30, 30]
    edges = [[0, 10, 30, 30], [10, 0, 30, 30], [10, 10, WIDTH, 30], [10, 10, 30, HEIGHT]]
    things = [thing("cat", 0.9 - index / 10, None, box) for index, box in enumerate([inside, *edges])]
    folder = exported(write_parts(tmp_path / "labels", [image("a.jpg", *things)]), "voc")
    assert [one["truncated"] for one in voc_objects(folder, "a")] == ["0", "1", "1", "1", "1"]


def test_voc_has_254_objects_in_a_map_and_tells_of_more(tmp_path):
    spots = [(index // WIDTH * 2, index % WIDTH) for index in range(300)]  # a pixel each, best first
    things = [
        thing("cat", 0.9 - index / 1000, filled((slice(y, y + 1), slice(x, x + 1))))
        for index, (y, x) in enumerate(spots)
    ]
    reported: list[tuple[str, str]] = []
    labelled = write_parts(tmp_path / "labels", [image("many.jpg", *things), image("few.jpg", *things[:254])])
    folder = exported(labelled, "voc", note=lambda *what: reported.append(what))
    assert reported == [("many.jpg", "has 300 objects, of which SegmentationObject holds the 254 best")]
    assert len(voc_objects(folder, "many")) == 300
    for name, count in (("many", 300), ("few", 254)):
        ids = np.asarray(Image.open(folder / f"VOCdevkit/VOC2012/SegmentationObject/{name}.png"))
        expected = np.zeros((HEIGHT, WIDTH), int)
        for number, (y, x) in enumerate(spots[:count], start=1):
            expected[y, x] = min(number, 255)
        assert np.array_equal(ids, expected)


@needs_supervision
def test_yolo_is_read_by_supervision(labelled, pictures):
    folder = exported(labelled, "yolo")
    flat = flattened(folder, "labels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = quiet_supervision().DetectionDataset.from_yolo(str(pictures), str(flat), str(folder / "data.yaml"))
    assert dataset.classes == list(LABELS)
    data = yaml.safe_load((folder / "data.yaml").read_text("utf-8"))
    assert data == {
        "train": "images",
        "val": "images",
        "names": dict(enumerate(LABELS)),
    }  # a path would be the reader's
    cat, dog = masks_by_label(dataset, pictures / "plain.jpg", "cat", "dog")
    assert np.array_equal(cat, SOLID)
    assert np.array_equal(dog, OVERLAPPING)
    fox, parts = masks_by_label(dataset, pictures / "süß 猫.png", "Füchse & Co", "cat")
    assert np.array_equal(fox, RING)  # the hole too
    assert np.array_equal(parts, TWO_PARTS)
    assert len(dataset.annotations[str(pictures / "süß 猫.png")]) == 3  # a line a part
    corners = "0.983334 0.975000 1.000000 0.975000 1.000000 1.000000 0.983334 1.000000"  # up: readers cut to pixels
    assert (flat / "tiny.txt").read_text() == f"2 {corners}\n"  # of a pixel's box: among polygons all lines are some
    boxes = dataset.annotations[str(pictures / "box.jpg")]
    assert boxes.xyxy.round(2).tolist() == [[3, 4, 33, 24], [50, 30, 60, 40]]
    assert (flat / "nothing.txt").read_text() == ""


def masks_by_label(dataset, path: Path, *labels: str) -> list[np.ndarray]:
    found = dataset.annotations[str(path)]
    return [union(*found.mask[found.class_id == dataset.classes.index(label)]) for label in labels]


@needs_supervision
def test_labelme_is_read_by_supervision(labelled, pictures):
    folder = exported(labelled, "labelme")
    flat = flattened(folder, ".")
    dataset = quiet_supervision().DetectionDataset.from_labelme(str(pictures), str(flat))
    assert dataset.classes == sorted(LABELS)
    for one in GOOD[:1] + GOOD[2:3]:
        found = dataset.annotations[str(pictures / Path(one["id"]).name)]
        assert len(found) == len(one["objects"])  # parts of one object are one object
        for mask, stored in zip(found.mask, by_confidence(one), strict=True):
            assert np.array_equal(mask, coco_mask.decode(stored["rle"]).astype(bool))
    assert dataset.annotations[str(pictures / "box.jpg")].xyxy.tolist() == [[3, 4, 33, 24], [50, 30, 60, 40]]
    assert dataset.annotations[str(pictures / "tiny.webp")].xyxy.tolist() == [[59, 39, 60, 40]]
    assert len(dataset.annotations[str(pictures / "nothing.jpg")]) == 0


@needs_supervision
def test_labelme_parts_of_an_object_share_a_group_of_their_own(tmp_path):
    other = filled((slice(2, 8), slice(40, 50)), (slice(30, 39), slice(40, 50)))
    things = [thing("cat", 0.3, TWO_PARTS), thing("cat", 0.2, other), thing("cat", 0.1, SOLID)]
    folder = exported(write_parts(tmp_path / "labels", [image("a.jpg", *things)]), "labelme")
    document = json.loads((folder / "a.json").read_text("utf-8"))
    assert (document["imageHeight"], document["imageWidth"]) == (HEIGHT, WIDTH)
    groups = [shape["group_id"] for shape in document["shapes"]]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert groups[4] is None
    assert document["shapes"][4]["description"] == "a cat: 0.1000"


@needs_supervision
def test_label_studio_polygons_give_back_masks(labelled):
    folder = exported(labelled, "label-studio")
    tasks = json.loads((folder / "tasks.json").read_text("utf-8"))
    assert [task["data"]["id"] for task in tasks] == [one["id"] for one in GOOD]
    assert tasks[2]["data"]["image"] == "/data/local-files/?d=pictures/Ordner/s%C3%BC%C3%9F%20%E7%8C%AB.png"
    scores = [max((one["confidence"] for one in image["objects"]), default=0) for image in GOOD]
    assert [task["predictions"][0]["score"] for task in tasks] == pytest.approx(scores, abs=1e-6)
    config = ElementTree.parse(folder / "config.xml")
    assert len({element.get("background") for element in config.iter("Label")}) == len(LABELS)
    controls = {element.get("name"): element for element in config.iter() if element.get("toName") == "image"}
    for task, one in zip(tasks, GOOD, strict=True):
        found = np.zeros((len(one["objects"]), HEIGHT, WIDTH), bool)
        regions = task["predictions"][0]["result"]
        assert len({region["id"] for region in regions}) == len(regions)
        for region in regions:
            truth = by_confidence(one)[int(region["id"].partition(".")[0]) - 1]
            assert (region["score"], region["meta"]) == (
                pytest.approx(truth["confidence"], abs=1e-6),
                {"text": [truth["prompt"]]},
            )
            assert (region["original_width"], region["original_height"]) == (WIDTH, HEIGHT)
            control = controls[region["from_name"]]
            [label] = region["value"][region["type"]]
            assert region["type"] == control.tag.lower()
            assert label == truth["label"]
            assert label in [element.get("value") for element in control]
            if region["type"] == "polygonlabels":
                number = int(region["id"].partition(".")[0]) - 1
                found[number] |= drawn_from_percent(region["value"]["points"])
        for mask, stored in zip(found, by_confidence(one), strict=True):
            if stored["rle"] and coco_mask.area(stored["rle"]) > 2:
                assert np.array_equal(mask, coco_mask.decode(stored["rle"]).astype(bool))
    boxes = tasks[4]["predictions"][0]["result"]
    assert [region["type"] for region in boxes] == ["rectanglelabels"] * 2
    assert [boxes[0]["value"][name] for name in ("x", "y", "width", "height")] == [5, 10, 50, 50]


@needs_supervision
def test_label_studio_addresses_are_served_from_above_the_folder(tmp_path):
    sources = {
        "a/b.jpg": ("/data/photos/a/b.jpg", "/data/local-files/?d=photos/a/b.jpg"),
        "/abs/c?.jpg": ("/abs/c?.jpg", "/data/local-files/?d=abs/c%3F.jpg"),
        "7": ("/data/photos/d.jpg", "/data/local-files/?d=data/photos/d.jpg"),
        "s3://bucket/e é.jpg": ("s3://bucket/e é.jpg", "s3://bucket/e é.jpg"),
        "f.jpg": ("https://hôte/a b%20é.jpg?sig=%2B%40", "https://hôte/a%20b%20%C3%A9.jpg?sig=%2B%40"),
    }
    rows = [{**image(id), "source": source} for id, (source, _) in sources.items()]
    folder = exported(write_parts(tmp_path / "labels", rows), "label-studio")
    tasks = json.loads((folder / "tasks.json").read_text("utf-8"))
    assert [task["data"]["image"] for task in tasks] == [address for _, address in sources.values()]


@needs_supervision
def test_label_studio_has_labels_with_odd_letters_as_its_configuration_says(tmp_path):
    Parts.claim(tmp_path / "labels", Manifest({}, tuple(ODD_LABELS))).write(
        "0", [image("a.jpg", *(thing(label, 0.5, None) for label in ODD_LABELS))]
    )
    folder = exported(tmp_path / "labels", "label-studio")
    known = [one.get("value") for one in ElementTree.parse(folder / "config.xml").iter("Label")]
    [task] = json.loads((folder / "tasks.json").read_text("utf-8"))
    reported = [one["value"]["rectanglelabels"][0] for one in task["predictions"][0]["result"]]
    assert reported == known[: len(ODD_LABELS)] == [label.replace("\a", "�") for label in ODD_LABELS]


def drawn_from_percent(points: list[list[float]]) -> np.ndarray:
    corners = np.rint(np.array(points) * [WIDTH, HEIGHT] / 100).astype(int)
    return quiet_supervision().polygon_to_mask(corners, (WIDTH, HEIGHT)).astype(bool)


@pytest.mark.parametrize("name", [available("label-studio"), available("label-studio-brush")])
def test_label_studio_finds_its_predictions_valid(labelled, name):
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface
    folder = exported(labelled, name)
    config = interface((folder / "config.xml").read_text("utf-8"))
    config.validate()
    tasks = json.loads((folder / "tasks.json").read_text("utf-8"))
    for task in tasks:
        assert config.validate_prediction(task["predictions"][0], return_errors=True) == []
    task = tasks[4]
    task["predictions"][0]["result"][0]["value"]["rectanglelabels"] = ["unknown"]
    assert config.validate_prediction(task["predictions"][0], return_errors=True) != []


@pytest.mark.parametrize("name", [available("label-studio-brush")])
def test_label_studio_brush_gives_back_masks(labelled, name):
    from label_studio_sdk.converter.brush import decode_rle  # pyright: ignore[reportMissingImports]

    tasks = json.loads((exported(labelled, name) / "tasks.json").read_text("utf-8"))
    regions = tasks[2]["predictions"][0]["result"]
    masks = [decode_rle(one["value"]["rle"]).reshape(HEIGHT, WIDTH, 4)[..., 3] > 0 for one in regions]
    assert np.array_equal(masks, [RING, TWO_PARTS])


@needs_supervision
def test_supervision_detections(labelled):
    rows = list(Labelled.open(labelled))
    found: Any = to_supervision(rows[0])
    assert found.xyxy.tolist() == [box_of(SOLID), box_of(OVERLAPPING)]
    assert np.array_equal(found.mask, [SOLID, OVERLAPPING])
    assert found.confidence.tolist() == pytest.approx([0.279, 0.252])
    assert found["score"].tolist() == pytest.approx([0.31, 0.28])
    assert found.class_id.tolist() == [0, 2]
    assert found["class_name"].tolist() == ["cat", "dog"]
    assert found["prompt"].tolist() == ["a cat", "a dog"]
    assert len(to_supervision(rows[1])) == 0
    tiny: Any = to_supervision(rows[3])
    assert np.isnan(tiny["presence"]).all()
    assert to_supervision(rows[4]).mask is None
    mixed: Any = to_supervision(replace(rows[0], objects=(*rows[0].objects, *rows[4].objects)))
    assert mixed.mask.any(axis=(1, 2)).tolist() == [True, True, False, False]
    annotated = quiet_supervision().MaskAnnotator().annotate(np.zeros((HEIGHT, WIDTH, 3), np.uint8), found)
    assert annotated[SOLID | OVERLAPPING].any(axis=-1).all() and not annotated[~(SOLID | OVERLAPPING)].any()


@needs_supervision
def test_supervision_detections_of_a_localization(tiny_localizer):
    picture = scene(seed=0, size=64)
    result = tiny_localizer(picture.image, ["cat", "dog"])
    found: Any = to_supervision(result, threshold=0.6, min_area=0.0)
    boxes = result.boxes(0.6)
    assert len(found) == sum(len(some.xyxy) for some in boxes) > 0
    for index, some in enumerate(boxes):
        mine = found[found.class_id == index]
        assert (np.diff(mine.confidence) <= 0).all()
        by_score = mine[np.argsort(-mine["score"])]
        assert by_score.xyxy.tolist() == some.xyxy.tolist()
        assert by_score["score"].tolist() == pytest.approx(some.scores.tolist(), abs=1e-6)
        assert np.array_equal(union(*mine.mask), result.masks(0.6)[index].numpy())
    predicted = replace(result, detections=tuple(boxes))
    assert to_supervision(predicted, threshold=0.0, scale="cosine").mask is None
    assert len(to_supervision(replace(result, presence=torch.tensor([0.2, 0.3])), presence=0.5)) == 0


# Georeferenced tiles --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiles(tmp_path):
    """One tile in a projection, north up; one whose rows run along another direction; two pictures that lie nowhere;
    one of another size."""
    rasterio = pytest.importorskip("rasterio")
    from affine import Affine

    folder = tmp_path / "tiles"
    folder.mkdir()
    north = Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)
    turned = Affine(0.4, 0.3, 300_000, 0.3, -0.4, 4_000_000)
    for name, transform, crs, width in [
        ("north.tif", north, "EPSG:32632", WIDTH),
        ("turned.tif", turned, "EPSG:32633", WIDTH),
        ("nowhere.tif", None, None, WIDTH),
        ("unplaced.tif", Affine.identity(), "EPSG:32632", WIDTH),
        ("other.tif", north, "EPSG:32632", 7),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            place = {} if crs is None else {"transform": transform, "crs": crs}
            size = {"height": HEIGHT, "width": width, "count": 1, "dtype": "uint8"}
            with rasterio.open(folder / name, "w", driver="GTiff", **size, **place) as raster:
                raster.write(np.zeros((1, HEIGHT, width), np.uint8))
    return folder


@pytest.mark.parametrize("name", [available("geojson")])
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # rasterio 1.4 multiplies affine 3 by *
def test_geojson_lies_where_the_tile_does(tiles, tmp_path, name):
    import rasterio
    from rasterio.features import is_valid_geom, rasterize
    from rasterio.warp import transform_geom

    masks = {"north.tif": [SOLID, TWO_PARTS, RING], "turned.tif": [OVERLAPPING, PIXEL]}
    rows = [image(id, *[thing("cat", 0.3, mask) for mask in some]) for id, some in masks.items()]
    rows[0]["objects"].append(thing("dog", 0.1, None, [3, 4, 33, 24]))
    rows += [image(id, thing("cat", 0.3, SOLID)) for id in ("nowhere.tif", "unplaced.tif", "other.tif", "missing.tif")]
    reported: list[tuple[str, str]] = []
    folder = exported(
        write_parts(tmp_path / "labels", rows), name, images=tiles, skip=lambda *what: reported.append(what)
    )
    features = json.loads((folder / "objects.geojson").read_text("utf-8"))["features"]
    expected = [*masks["north.tif"], filled((slice(4, 24), slice(3, 33))), *masks["turned.tif"]]
    assert len(features) == len(expected)
    for feature, mask in zip(features, expected, strict=True):
        assert is_valid_geom(feature["geometry"])
        with rasterio.open(tiles / feature["properties"]["image"]) as tile:
            geometry = transform_geom("EPSG:4326", tile.crs, feature["geometry"])
            burnt: Any = rasterize([geometry], out_shape=tile.shape, transform=tile.transform)
        assert np.array_equal(burnt > 0, mask)
    longitude, latitude = features[0]["geometry"]["coordinates"][0][0]
    assert (longitude, latitude) == pytest.approx(
        (9.0, 48.75), abs=0.01
    )  # the middle of UTM zone 32, and 5,400 km north
    assert [id for id, _ in reported] == ["nowhere.tif", "unplaced.tif", "other.tif", "missing.tif"]
    assert "not georeferenced" in reported[0][1] and "not georeferenced" in reported[1][1]
    assert reported[2][1] == "its tile is 40x7 pixels now (height x width), 40x60 were labelled"
    assert "cannot open its tile" in reported[3][1]
    box = features[3]["properties"]
    assert box == {
        "label": "dog",
        "prompt": "a dog",
        "score": 0.1,
        "confidence": 0.09,
        "presence": pytest.approx(0.9),
        "image": "north.tif",
    }


TURNED = {  # EXIF orientation -> the picture upright, of its pixels as stored
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("name", [available("geojson")])
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_geojson_of_a_turned_image_lies_where_its_pixels_do(tiles, tmp_path, name):
    import rasterio
    from PIL.TiffImagePlugin import ImageFileDirectory_v2
    from rasterio.features import rasterize
    from rasterio.warp import transform_geom

    with Image.open(tiles / "north.tif") as plain:
        tags = cast(Any, plain).tag_v2
    stored = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 251
    rows, masks = [], []
    for orientation, upright in TURNED.items():
        place = ImageFileDirectory_v2()
        for tag in (33550, 33922, 34735, 34737):  # the scale, a tie point, the projection
            place.tagtype[tag], place[tag] = tags.tagtype[tag], tags[tag]
        place[274] = orientation
        path = tiles / f"{orientation}.tif"
        Image.fromarray(stored.astype(np.uint8)).save(path, tiffinfo=place)
        picture = np.asarray(read_image(path))[..., 0]
        assert np.array_equal(picture, upright(stored))  # what is labelled
        mask = upright(SOLID | TWO_PARTS)
        height, width = mask.shape
        alone = thing("dog", 0.1, None, box_of(upright(SOLID)))
        rows.append(image(path.name, thing("cat", 0.3, mask), alone, height=height, width=width))
        masks += [SOLID | TWO_PARTS, SOLID]
    features = json.loads(
        (exported(write_parts(tmp_path / "labels", rows), name, images=tiles) / "objects.geojson").read_text("utf-8")
    )["features"]
    assert len(features) == len(masks)
    for feature, mask in zip(features, masks, strict=True):
        with rasterio.open(tiles / feature["properties"]["image"]) as tile:
            geometry = transform_geom("EPSG:4326", tile.crs, feature["geometry"])
            burnt: Any = rasterize([geometry], out_shape=tile.shape, transform=tile.transform)
        assert np.array_equal(burnt > 0, mask)


@pytest.mark.parametrize("name", [available("geojson")])
def test_geojson_parts_that_meet_at_a_corner_are_apart(tiles, tmp_path, name):
    corner = filled((slice(5, 10), slice(5, 10)), (slice(10, 15), slice(10, 15)))
    folder = exported(
        write_parts(tmp_path / "labels", [image("north.tif", thing("cat", 0.3, corner))]), name, images=tiles
    )
    [feature] = json.loads((folder / "objects.geojson").read_text("utf-8"))["features"]
    assert feature["geometry"]["type"] == "MultiPolygon"
    assert [len(part) for part in feature["geometry"]["coordinates"]] == [1, 1]


# FiftyOne -------------------------------------------------------------------------------------------------------------


def unpacked(text: str) -> np.ndarray:
    return np.load(io.BytesIO(zlib.decompress(base64.b64decode(text))))


def test_fiftyone_samples(labelled):
    folder = exported(labelled, "fiftyone", images=Path("/now"))
    info = json.loads((folder / "metadata.json").read_text("utf-8"))["info"]
    assert info["default_classes"] == list(LABELS)
    samples = json.loads((folder / "samples.json").read_text("utf-8"))["samples"]
    assert [one["open_gem_id"] for one in samples] == [one["id"] for one in GOOD]
    assert [one["filepath"] for one in samples] == [f"/now/{one['id']}" for one in GOOD]
    for sample, stored in zip(samples, GOOD, strict=True):
        for one, truth in zip(sample["objects"]["detections"], by_confidence(stored), strict=True):
            assert (one["label"], one["prompt"]) == (truth["label"], truth["prompt"])
            assert one["confidence"] == pytest.approx(truth["confidence"], abs=1e-6)
            x, y, width, height = np.array(one["bounding_box"]) * [WIDTH, HEIGHT, WIDTH, HEIGHT]
            left, top, right, bottom = truth["xyxy"]
            assert (x, y, x + width, y + height) == pytest.approx((left, top, right, bottom))
            if truth["rle"]:
                mask = coco_mask.decode(truth["rle"]).astype(bool)
                assert np.array_equal(unpacked(one["mask"]), mask[top:bottom, left:right])
            else:
                assert one["mask"] is None
        for point, truth in zip(sample["points"]["keypoints"], by_confidence(stored), strict=True):
            x, y = truth["point"]
            assert point["points"] == [pytest.approx([(x + 0.5) / WIDTH, (y + 0.5) / HEIGHT])]  # the pixel's middle
            assert point["confidence"] == [pytest.approx(truth["confidence"], abs=1e-6)]
    assert samples[3]["objects"]["detections"][0]["presence"] is None


def test_fiftyone_heatmaps(tmp_path):
    cosines = np.linspace(-0.2, 0.4, 12, dtype=np.float32).reshape(1, 3, 4)
    kept = keep(Localization(("Füchse & Co",), torch.from_numpy(cosines), Size(HEIGHT, WIDTH)), 0.0)
    settings = {"keep": 0.0, "classes": Ontology.of(["Füchse & Co"]).describe()}
    parts = Parts.claim(tmp_path / "labels", Manifest(settings, ("Füchse & Co",)))
    parts.write("1", [{**IMAGES[3], "objects": [], "kept": kept}])
    found = Labelled.open(parts.folder)
    [image] = found.each("similarity")
    sample = sample_of(image, found.labels)
    heatmap = sample["heatmap_0_f_chse_co"]
    assert heatmap["range"] == [-1, 1]
    assert np.allclose(unpacked(heatmap["map"]), cosines[0], atol=1e-5)
    assert not [name for name in sample_of(image) if name.startswith("heatmap")]


def test_fiftyone_reads_its_samples(labelled):
    fo = pytest.importorskip("fiftyone")
    folder = exported(labelled, "fiftyone")
    documents = json.loads((folder / "samples.json").read_text("utf-8"))["samples"]
    found = [fo.Sample.from_dict(one) for one in documents]
    masks = [one.to_segmentation(frame_size=(WIDTH, HEIGHT)).mask > 0 for one in found[2]["objects"].detections]
    assert np.array_equal(masks, [RING, TWO_PARTS])
    assert found[0]["points"].keypoints[0].points == [pytest.approx([10.5 / WIDTH, 5.5 / HEIGHT])]


# Polygons -------------------------------------------------------------------------------------------------------------


@needs_supervision
def test_polygons_give_back_masks():
    sv = quiet_supervision()
    shapes = [SOLID, OVERLAPPING, RING, TWO_PARTS]
    noise = np.random.default_rng(0).random((20, HEIGHT, WIDTH)) > 0.55  # pinches, thin lines, holes in holes
    for mask in [*shapes, *noise]:
        drawn = [sv.polygon_to_mask(corners, (WIDTH, HEIGHT)).astype(bool) for corners in polygons(mask)]
        kept = union(np.zeros_like(mask), *drawn)
        if any(mask is shape for shape in shapes):
            assert np.array_equal(kept, mask)
        lost = mask & ~kept
        assert lost.sum() <= 0.15 * mask.sum()  # parts without three corners


@needs_supervision
def test_a_hole_without_a_seam_is_filled(monkeypatch):
    quiet_supervision()
    from supervision.dataset import utils

    real = utils.approximate_mask_with_polygons

    def without_seams(mask: np.ndarray, bridge_holes: bool = False) -> Any:
        if bridge_holes:
            raise ValueError("No foreground-contained seam found for a mask hole.")
        return real(mask)

    monkeypatch.setattr(utils, "approximate_mask_with_polygons", without_seams)
    [corners] = polygons(RING)
    assert sorted(map(tuple, corners.tolist())) == [(8, 4), (8, 29), (39, 4), (39, 29)]


@needs_supervision
def test_thin_parts_have_no_polygon():
    line = filled((slice(3, 4), slice(5, 20)))
    assert polygons(line) == polygons(PIXEL) == polygons(np.zeros((3, 3), bool)) == []
    assert len(polygons(line | TWO_PARTS)) == 2
