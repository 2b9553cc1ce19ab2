"""Exports divide images into sets by their ids, and put the images beside the labels."""

import errno
import io
import json
import tarfile
from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from labelled import EVERY, SOLID, available, exported, image, thing, write_parts
from PIL import Image
from typer.testing import CliRunner

from open_gem.cli import app
from open_gem.errors import InputError, OutputError
from open_gem.export import FORMATS, Split
from open_gem.export.split import parse_split

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
IDS = [f"{folder}/{number}.jpg" for folder in "abcdef" for number in range(20)]


def export_of(folder: Path, ids: list[str], name: str, **options: Any) -> Path:
    rows = [image(id, thing("cat", 0.3, SOLID)) for id in ids]
    return exported(write_parts(folder / "labels", rows, size=10), name, **options)


def run(*words: object) -> SimpleNamespace:
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


# Sets -----------------------------------------------------------------------------------------------------------------


def test_sets_have_their_shares():
    counts = Counter(Split(SHARES).of(f"{number}.jpg") for number in range(10_000))
    for name, share in SHARES.items():
        spread = (10_000 * share * (1 - share)) ** 0.5
        assert abs(counts[name] - 10_000 * share) < 4 * spread


def test_the_set_is_a_hash_of_the_seed_and_the_id():
    for seed in (0, 7):
        for id in IDS:
            place = int(sha256(f"{seed}/{id}".encode()).hexdigest()[:16], 16) / 2**64
            expected = "train" if place < 0.8 else "val" if place < 0.9 else "test"
            assert Split(SHARES, seed=seed).of(id) == expected
    assert [Split(SHARES).of(id) for id in IDS] != [Split(SHARES, seed=1).of(id) for id in IDS]


def test_by_folder_images_of_a_folder_stay_together():
    split = Split({"train": 0.5, "val": 0.5}, by="folder")
    sets = {folder: {split.of(id) for id in IDS if id.startswith(folder)} for folder in "abcdef"}
    assert all(len(names) == 1 for names in sets.values())
    assert set.union(*sets.values()) == {"train", "val"}


def sets_of_coco(folder: Path) -> dict[str, set[str]]:
    documents = {name: json.loads((folder / f"instances_{name}.json").read_text()) for name in SHARES}
    for name, document in documents.items():
        known = {one["id"] for one in document["images"]}
        assert {one["image_id"] for one in document["annotations"]} == known
        results = json.loads((folder / f"results_{name}.json").read_text())
        assert {one["image_id"] for one in results} == known
    return {name: {one["file_name"] for one in document["images"]} for name, document in documents.items()}


def sets_of_panoptic(folder: Path) -> dict[str, set[str]]:
    sets = {}
    for name in SHARES:
        document = json.loads((folder / f"panoptic_{name}.json").read_text())
        files = {path.relative_to(folder / f"panoptic_{name}") for path in (folder / f"panoptic_{name}").rglob("*.png")}
        assert {Path(one["file_name"]) for one in document["annotations"]} == files
        sets[name] = {one["file_name"] for one in document["images"]}
    return sets


def sets_of_semantic(folder: Path) -> dict[str, set[str]]:
    return {name: {f"{one}.jpg" for one in (folder / f"sets/{name}.txt").read_text().split()} for name in SHARES}


def sets_of_voc(folder: Path) -> dict[str, set[str]]:
    lists = folder / "VOCdevkit/VOC2012/ImageSets"
    for kind in ("Main", "Segmentation"):
        assert {path.stem for path in (lists / kind).iterdir()} == SHARES.keys()
    return {name: {f"{one}.jpg" for one in (lists / f"Segmentation/{name}.txt").read_text().split()} for name in SHARES}


def sets_of_yolo(folder: Path) -> dict[str, set[str]]:
    data = yaml.safe_load((folder / "data.yaml").read_text())
    assert {name: data[name] for name in SHARES} == {name: f"images/{name}" for name in SHARES}
    labels = {name: folder / data[name].replace("images", "labels") for name in SHARES}
    return {
        name: {f"{path.relative_to(place).with_suffix('')}.jpg" for path in place.rglob("*.txt")}
        for name, place in labels.items()
    }


def sets_of_fiftyone(folder: Path) -> dict[str, set[str]]:
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    return {name: {one["open_gem_id"] for one in samples if one["tags"] == [name]} for name in SHARES}


def sets_of_label_studio(folder: Path) -> dict[str, set[str]]:
    tasks = json.loads((folder / "tasks.json").read_text())
    return {name: {one["data"]["id"] for one in tasks if one["data"]["split"] == name} for name in SHARES}


READERS = {
    "coco": sets_of_coco,
    "panoptic": sets_of_panoptic,
    "semantic": sets_of_semantic,
    "voc": sets_of_voc,
    "yolo": sets_of_yolo,
    "fiftyone": sets_of_fiftyone,
    "label-studio": sets_of_label_studio,
    "label-studio-brush": sets_of_label_studio,
}


def test_every_format_with_sets_is_read_back():
    assert {name for name, row in FORMATS.items() if row.sets} == set(READERS)


@pytest.mark.parametrize("name", [available(name) for name in READERS])
def test_every_image_is_in_its_set_alone(name, tmp_path):
    split = Split(SHARES)
    expected = {name: {id for id in IDS if split.of(id) == name} for name in SHARES}
    assert READERS[name](export_of(tmp_path, IDS, name, split=split)) == expected


def test_images_that_are_added_move_no_other(tmp_path):
    before = sets_of_coco(export_of(tmp_path / "few", IDS[::2], "coco", split=Split(SHARES)))
    after = sets_of_coco(export_of(tmp_path / "all", IDS, "coco", split=Split(SHARES)))
    assert all(before[name] <= after[name] for name in SHARES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train", "--split has 'train', expected such as train=0.8,val=0.1,test=0.1"),
        ("train=much,val=0.1", "--split has 'train=much', expected such as"),
        ("", "--split has '', expected such as"),
        ("train=0.5,train=0.5", "--split names 'train' twice"),
        ("train=0.8,val=0.1", "the shares of the sets sum to 0.9, expected 1"),
        ("train=80,val=20", "the shares of the sets sum to 100, expected 1"),
        ("train=1,val=0", "the share of 'val' is 0.0, expected a number above 0"),
        ("train=2,val=-1", "the share of 'val' is -1.0, expected a number above 0"),
        ("train=nan,val=1", "the share of 'train' is nan, expected a number above 0"),
        ("../up=0.5,val=0.5", "a set is called '../up', expected letters, digits, - and _"),
        ("=1", "a set is called '', expected letters, digits, - and _"),
    ],
)
def test_shares_that_make_no_sense_are_refused(text, reason):
    with pytest.raises(InputError) as raised:
        parse_split(text)
    assert reason in str(raised.value)


def test_the_command_refuses_what_makes_no_sense_and_writes_nothing(tmp_path):
    labels = write_parts(tmp_path / "labels", [image(id) for id in IDS])
    whole = "train=0.5,val=0.5"
    for words, expected in [
        (["-f", "coco", "--split", "train=0.5"], "sum to 0.5, expected 1"),
        (["-f", "coco", "--split", whole, "--split-by", "folders"], "split by 'folders' (did you mean folder?)"),
        (["-f", "coco", "--split-by", "folder"], "are about --split, expected it too"),
        (["-f", "coco,labelme", "--split", whole], "labelme has no sets of images: leave out --split"),
        (["-f", "yolo", "--split", "train=0.5,test=0.5"], "YOLO's readers need the sets train and val"),
        (["-f", "coco", "--link-images", "soft"], "cannot link images by 'soft', expected hard, sym, copy"),
        (["-f", "fiftyone", "--link-images", "sym"], "fiftyone has no place for images: leave out --link-images"),
    ]:
        wrong = run(labels, *words, "--out", tmp_path / "out")
        assert wrong.code == 2
        assert wrong.err.startswith("error: ") and expected in wrong.err and wrong.err.count("\n") == 1, wrong.err
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_set_without_images_is_reported(tmp_path):
    labels = write_parts(tmp_path / "labels", [image("a.jpg")])
    done = run(labels, "-f", "coco", "--split", "train=0.5,val=0.25,test=0.25", "--out", tmp_path / "out")
    assert done.code == 0
    assert done.err.startswith("warning: no image is in ") and done.err.count("\n") == 1


# Images beside the labels ---------------------------------------------------------------------------------------------

PLACES = {  # format -> where an image then is
    "coco": "images/{id}",
    "voc": "VOCdevkit/VOC2012/JPEGImages/{base}.jpg",
    "yolo": "images/{id}",
    "labelme": "{id}",
}


SEED = 1  # with which the images of `photos` are in different sets


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of two images."""
    for number, name in enumerate(("a.jpg", "sub/b.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (100 * number, 0, 0)).save(path)
    return tmp_path / "photos"


def linked(photos: Path, name: str, how: str, ids: tuple[str, ...] = ("a.jpg", "sub/b.png"), **options: Any) -> Path:
    """The folder of an export of images in the folder."""
    rows = [{**image(id, thing("cat", 0.3, SOLID)), "source": str(photos / id)} for id in ids]
    return exported(write_parts(photos.parent / "labels", rows), name, link_images=how, **options)


def test_every_format_with_a_place_for_images_is_tested():
    assert {name for name, row in FORMATS.items() if row.images} == set(PLACES)


@pytest.mark.parametrize("name", [available(name) for name in PLACES])
@pytest.mark.parametrize("how", ["hard", "sym", "copy"])
def test_images_are_where_the_format_expects_them(name, how, photos):
    folder = linked(photos, name, how)
    for id in ("a.jpg", "sub/b.png"):
        path, original = folder / PLACES[name].format(id=id, base=id.partition(".")[0]), photos / id
        assert path.read_bytes() == original.read_bytes()
        assert path.is_symlink() == (how == "sym")
        assert path.samefile(original) == (how != "copy")


def test_a_yolo_reader_finds_images_and_labels_of_a_set(photos):
    folder = linked(photos, available_or_skip("yolo"), "sym", split=Split({"train": 0.5, "val": 0.5}, seed=SEED))
    data = yaml.safe_load((folder / "data.yaml").read_text())
    images = [path for name in ("train", "val") for path in (folder / data[name]).rglob("*") if path.is_file()]
    assert len(images) == 2
    for path in images:
        assert Path(str(path).replace("/images/", "/labels/")).with_suffix(".txt").read_text().startswith("0 ")


def available_or_skip(name: str) -> str:
    if reason := FORMATS[name].missing():
        pytest.skip(reason)
    return name


def test_coco_names_the_linked_file(photos):
    (photos / "a?.jpg").write_bytes((photos / "a.jpg").read_bytes())
    folder = linked(photos, "coco", "copy", ("a?.jpg",))
    [stored] = json.loads((folder / "instances.json").read_text())["images"]
    assert (folder / "images" / stored["file_name"]).is_file() and "?" not in stored["file_name"]


@pytest.mark.parametrize("name", [available(name) for name in PLACES])
def test_an_image_that_is_gone_is_left_out_with_its_labels(name, photos):
    reported: list[tuple[str, str]] = []
    ids = ("a.jpg", "gone.jpg")
    folder = linked(photos, name, "sym", ids, skip=lambda *what: reported.append(what))
    assert [id for id, _ in reported] == ["gone.jpg"] and "No such file" in reported[0][1]
    assert not [path for path in folder.rglob("*") if "gone" in path.name]


def test_an_image_that_loses_its_name_to_another_is_not_put_there(photos):
    Image.new("RGB", (60, 40)).save(photos / "a.png")
    reported: list[str] = []
    name = available_or_skip("yolo")
    folder = linked(photos, name, "copy", ("a.jpg", "a.png"), skip=lambda id, reason: reported.append(id))
    assert reported == ["a.png"]
    assert [path.name for path in (folder / "images").iterdir()] == ["a.jpg"]


def sources_without_a_file(photos: Path) -> dict[str, str]:
    """Addresses of images that are no files of their own, by ids."""
    import fsspec
    import pyarrow as pa
    from pyarrow import parquet

    content = (photos / "a.jpg").read_bytes()
    with tarfile.open(photos / "s.tar", "w") as tar:
        info = tarfile.TarInfo("x.jpg")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    parquet.write_table(pa.table({"image": [content]}), photos / "rows.parquet")
    fsspec.filesystem("memory").pipe("/bucket/r.jpg", content)
    return {
        "s.tar/x.jpg": f"tar://x.jpg::{photos}/s.tar",
        "rows.parquet/0": f"{photos}/rows.parquet#column=image&row=0",
        "memory://bucket/r.jpg": "memory://bucket/r.jpg",
    }


@pytest.mark.parametrize("how", ["hard", "sym", "copy"])
def test_images_that_are_no_files_are_copied_or_reported(how, photos):
    sources = sources_without_a_file(photos)
    rows = [{**image(id), "source": source} for id, source in sources.items()]
    reported: dict[str, str] = {}
    labels = write_parts(photos.parent / "labels", rows)
    folder = exported(labels, "coco", link_images=how, skip=lambda id, reason: reported.update({id: reason}))
    names = [one["file_name"] for one in json.loads((folder / "instances.json").read_text())["images"]]
    if how == "copy":
        assert reported == {} and names == ["s.tar/x.jpg", "rows.parquet/0.jpg", "bucket/r.jpg"]
        assert {(folder / "images" / name).read_bytes() for name in names} == {(photos / "a.jpg").read_bytes()}
    else:
        assert names == [] and reported.keys() == sources.keys()
        assert all("cannot be linked" in reason and "copy" in reason for reason in reported.values())


def test_a_link_to_another_disk_is_refused_whole(photos, monkeypatch):
    def refused(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    with pytest.raises(OutputError, match=r"cannot make a hard link to .*; use --link-images sym or copy"):
        linked(photos, "coco", "hard")
    assert list((photos.parent / "out").iterdir()) == []


@pytest.mark.parametrize("name", EVERY)
def test_without_the_options_nothing_is_split_or_linked(name, photos):
    rows = [{**image("a.jpg", thing("cat", 0.3, SOLID)), "source": str(photos / "a.jpg")}]
    folder = exported(write_parts(photos.parent / "labels", rows), name)
    assert not [path for path in folder.rglob("*") if path.suffix == ".jpg" or "train" in path.name.split("_")]
