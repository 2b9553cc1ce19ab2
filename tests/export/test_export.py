"""What all formats have in common: whole or not at all, nothing kept of an image, choices, names, mistakes."""

import errno
import gc
import hashlib
import json
import tracemalloc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from labelled import (
    EVERY,
    GOOD,
    IMAGES,
    LABELS,
    SOLID,
    exported,
    filled,
    image,
    needs_supervision,
    thing,
    write_parts,
)
from typer.testing import CliRunner

from open_gem.checks import listed
from open_gem.cli import app
from open_gem.errors import InputError, OutputError
from open_gem.export import FORMATS, export
from open_gem.export.labelled import Labelled, LabelledImage
from open_gem.export.output import IMAGE_ENDINGS, name_of
from open_gem.label.parts import Manifest, Parts

# All formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_every_format_takes_every_row(labelled, name):
    reported, seen = [], []
    folder = exported(labelled, name, skip=lambda *what: reported.append(what), progress=seen.append)
    assert sum(seen) == len(IMAGES)
    assert [image_id for image_id, _ in reported] == ([one["id"] for one in GOOD] if name == "geojson" else [])
    assert [path.name for path in folder.parent.iterdir()] == [name]  # nothing temporary is left
    assert any(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert not [path for path in folder.rglob("*") if "broken" in path.name]


@pytest.mark.parametrize("name", EVERY)
def test_every_format_takes_nothing(tmp_path, name):
    folder = exported(write_parts(tmp_path / "labels", IMAGES[2:3]), name)
    assert folder.is_dir()


@pytest.mark.parametrize("name", EVERY)
def test_what_fails_leaves_nothing(labelled, name, monkeypatch):
    (labelled / "part-9999.parquet").write_bytes(b"no parquet")
    with pytest.raises(OutputError, match="part-9999"):
        exported(labelled, name)
    assert list((labelled.parent / "out").iterdir()) == []


@pytest.mark.parametrize("name", EVERY)
def test_what_is_there_stays(labelled, name):
    folder = exported(labelled, name)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="exists already"):
        exported(labelled, name)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_kept_of_an_image(tmp_path, name):
    small = thing("cat", 0.3, filled((slice(5, 8), slice(5, 8))))
    rows = [image(f"{number:04d}.jpg", small) for number in range(900)]
    labelled = write_parts(tmp_path / "labels", rows, size=50)
    seen, sizes = 0, []

    def progress(images: int) -> None:
        nonlocal seen
        seen += images
        if seen in (200, 900):
            sizes.append(memory())

    tracemalloc.start()
    try:
        exported(labelled, name, progress=progress)
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 150_000  # 200 bytes an image would show; what the interpreter has for reuse is less


@pytest.mark.parametrize("name", EVERY)
def test_a_format_has_two_images_at_a_time(tmp_path, name, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def tracked(*fields: Any) -> LabelledImage:
        one = LabelledImage(*fields)
        alive.add(one)
        most.append(len(alive))
        return one

    monkeypatch.setattr("open_gem.export.labelled.LabelledImage", tracked)
    rows = [image(f"{number}.jpg", thing("cat", 0.3, SOLID)) for number in range(30)]
    exported(write_parts(tmp_path / "labels", rows, size=10), name)
    assert len(most) == len(rows)
    assert max(most) == 2  # the one that is written, and the next


def memory() -> int:
    """Bytes that Python objects have now, but for the interpreter's own table of names of files."""
    gc.collect()
    traces = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, "*pathlib.py")])
    return sum(one.size for one in traces.statistics("filename"))


# Choices, names and mistakes ------------------------------------------------------------------------------------------


def test_objects_are_chosen(labelled):
    def kept(**options):
        found = Labelled.open(labelled, **options)
        return [(one.label, one.index, round(one.score, 2)) for row in found for one in row.objects]

    assert len(kept()) == 7
    assert kept(labels=["dog"]) == [("dog", 0, 0.28), ("dog", 0, 0.2), ("dog", 0, 0.33)]
    assert ("cat", 0, 0.24) in kept(min_score=0.24)  # stored as 0.2399999946, in single precision
    assert len(kept(min_presence=0.9)) == 7
    assert kept(min_score=0.3) == [("cat", 0, 0.31), ("dog", 2, 0.33)]
    assert kept(labels=["dog"], min_presence=0.95) == [("dog", 0, 0.2)]  # that has no presence


def test_names_stay_inside_the_folder():
    kept = {
        "a/b.jpg": "a/b.jpg",
        "/absolute/a.png": "absolute/a.png",
        "https://host/x/a.jpg": "host/x/a.jpg",
        "s3://bucket/a.jpg": "bucket/a.jpg",
    }
    assert {given: str(name_of(given)) for given in kept} == kept
    changed = {  # these lose letters, and get some of their hash
        "../../etc/passwd": "etc/passwd-{}",
        "https://host/x/a.jpg?v=1": "host/x/a.jpg_v=1-{}",
        "C:\\pictures\\a.jpg": "C_/pictures/a-{}.jpg",
        "a\0b\n.jpg": "a_b_-{}.jpg",
        "": "image-{}",
        "ü" * 300 + ".jpg": "ü" * 98 + "-{}.jpg",
    }
    letters = {given: hashlib.sha256(given.encode()).hexdigest()[:8] for given in changed}
    expected = {given: name.format(letters[given]) for given, name in changed.items()}
    assert {given: str(name_of(given)) for given in changed} == expected


@needs_supervision
def test_images_that_would_share_a_file_are_reported(tmp_path):
    rows = [image("a.jpg", thing("cat", 0.3, SOLID)), image("a.png", thing("dog", 0.3, SOLID))]
    reported = []
    folder = exported(write_parts(tmp_path / "labels", rows), "yolo", skip=lambda *what: reported.append(what))
    taken = "belongs to another image: keep this image out of the exported set, where readers would give it the other's"
    assert reported == [("a.png", f"its file labels/a.txt {taken} labels")]
    assert (folder / "labels/a.txt").read_text().startswith("0 ")


def test_ids_that_lose_letters_keep_files_of_their_own(tmp_path):
    ids = ["a?b.jpg", "a_b.jpg", "a:b.jpg", "http://h/c.jpg", "https://h/c.jpg", "d.jpg", "/d.jpg", "../d.jpg"]
    ids += ["x" * 300 + f"{number}.jpg" for number in range(2)]
    rows = [image(id, thing("cat", 0.3, SOLID)) for id in ids]
    reported: list[tuple[str, str]] = []
    labelled = write_parts(tmp_path / "labels", rows)
    maps = exported(labelled, "semantic", skip=lambda *what: reported.append(what)) / "maps"
    names = [path.relative_to(maps).as_posix() for path in maps.rglob("*.png")]
    assert reported == []
    assert len(names) == len(ids)
    assert {"a_b.png", "h/c.png", "d.png"} < set(names)
    files = [path.relative_to(maps) for path in maps.rglob("*.png")]
    voc = exported(labelled, "voc", skip=lambda *what: reported.append(what)) / "VOCdevkit/VOC2012"
    assert reported == []
    assert sorted(
        path.relative_to(voc / "SegmentationObject") for path in (voc / "SegmentationObject").rglob("*.png")
    ) == sorted(files)
    listed = (voc / "ImageSets/Main/trainval.txt").read_text("utf-8").splitlines()
    assert sorted(listed) == sorted(path.with_suffix("").as_posix() for path in files)


def test_an_image_whose_name_cannot_be_a_file_is_reported(tmp_path):
    rows = [image("a.jpg"), image("a.png/b.jpg"), image("/".join(["long" * 40] * 30) + ".jpg"), image("c.jpg")]
    reported = []
    folder = exported(write_parts(tmp_path / "labels", rows), "semantic", skip=lambda *what: reported.append(what[0]))
    assert reported == [rows[1]["id"], rows[2]["id"]]
    assert sorted(path.name for path in (folder / "maps").rglob("*.png")) == ["a.png", "c.png"]


@pytest.mark.parametrize("name", ["coco", "semantic"])
def test_a_full_disk_is_reported_and_leaves_nothing(labelled, name, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("open_gem.export.output.Items.add", full)
    monkeypatch.setattr("open_gem.export.maps.save_map", full)
    with pytest.raises(OutputError, match=f"cannot write '.*{name}': No space left on device"):
        exported(labelled, name)
    assert list((labelled.parent / "out").iterdir()) == []


def test_mistakes_are_reported(labelled, tmp_path):
    with pytest.raises(InputError, match=r"unknown format 'coc' \(did you mean coco\?\)"):
        export(labelled, ["coc"], tmp_path / "out")
    with pytest.raises(InputError, match=r"unknown label 'cut' \(did you mean cat\?\)"):
        export(labelled, ["coco"], tmp_path / "out", labels=["cut"])
    with pytest.raises(InputError, match="no label is chosen; known: cat, Füchse & Co, dog"):
        export(labelled, ["coco"], tmp_path / "out", labels=[])
    with pytest.raises(InputError, match="no labels in"):
        export(tmp_path / "nowhere", ["coco"], tmp_path / "out")
    with pytest.raises(InputError, match="min_presence is nan, expected a number"):
        export(labelled, ["coco"], tmp_path / "out", min_presence=float("nan"))
    Parts.claim(tmp_path / "empty", Manifest({}, LABELS))
    with pytest.raises(InputError, match="no image is labelled there yet"):
        export(tmp_path / "empty", ["coco"], tmp_path / "out")


# The command ----------------------------------------------------------------------------------------------------------


def run(*words: str) -> SimpleNamespace:
    result = CliRunner().invoke(app, ["export", *words])
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def test_the_command_writes_and_tells(labelled, tmp_path):
    done = run(str(labelled), "--format", "coco,semantic", "--out", str(tmp_path / "o"), "--labels", "cat,dog")
    assert (done.code, done.err) == (0, "warning: 1 of 6 images could not be labelled and are left out\n")
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["coco", "semantic"]
    categories = json.loads((tmp_path / "o/coco/instances.json").read_text("utf-8"))["categories"]
    assert [one["name"] for one in categories] == ["cat", "dog"]


def test_labels_with_commas_can_be_chosen(tmp_path):
    labels = ("cat", "car", "car, parked", '6" pipe', "a,b")
    Parts.claim(tmp_path / "labels", Manifest({}, labels)).write("0", [image("a.jpg")])

    def chosen(*given: str) -> list[str]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        words = [word for value in given for word in ("--labels", value)]
        done = run(str(tmp_path / "labels"), "-f", "coco", "--out", str(out), *words)
        assert (done.code, done.err) == (0, "")
        return [one["name"] for one in json.loads((out / "coco/instances.json").read_text("utf-8"))["categories"]]

    assert chosen() == list(labels)
    assert chosen("car, cat") == ["cat", "car"]
    assert chosen("car, parked") == ["car, parked"]
    assert chosen('cat, "car, parked",6" pipe') == ["cat", "car, parked", '6" pipe']
    assert chosen("a,b", "cat") == ["cat", "a,b"]
    wrong = run(str(tmp_path / "labels"), "-f", "coco", "--labels", "car,park", "--out", str(tmp_path / "o"))
    assert wrong.code == 2
    assert wrong.err == "error: unknown label 'park'; known: cat, car, 'car, parked', 6\" pipe, 'a,b'\n"


def test_of_many_labels_the_first_are_reported():
    assert listed(["a", "b, c"], most=2) == "a, 'b, c'"
    assert listed([f"{number}" for number in range(30)], most=3) == "0, 1, 2 … (30 in all)"


def test_all_formats_have_the_same_images_while_labelling_goes_on(labelled, tmp_path):
    parts, seen = Parts.open(labelled), []

    def progress(images: int) -> None:
        seen.append(images)
        parts.write(f"later{len(seen)}", [image(f"later{len(seen)}.jpg", thing("cat", 0.3, SOLID))])

    export(labelled, ["coco", "panoptic", "semantic"], tmp_path / "out", progress=progress)
    assert sum(seen) == 3 * len(IMAGES)
    for name in ("coco/instances.json", "panoptic/panoptic.json"):
        document = json.loads((tmp_path / "out" / name).read_text("utf-8"))
        assert [one["file_name"] for one in document["images"]] == [one["id"] for one in GOOD]
    assert len(list((tmp_path / "out/semantic/maps").rglob("*.png"))) == len(GOOD)


def test_the_command_lists_formats():
    lines = run("--formats").out.splitlines()
    for name, one in FORMATS.items():
        [line] = [line for line in lines if f" {name} " in line]
        assert one.about in line
        assert not one.extra or f"open_gem[{one.extra}]" in line


def test_the_command_says_what_is_wrong(labelled, tmp_path):
    for words, expected in [
        ([str(labelled)], "expected --format, such as"),
        ([str(labelled), "-f", "coc"], "unknown format 'coc' (did you mean coco?)"),
        ([str(tmp_path), "-f", "coco"], "no labels in"),
    ]:
        wrong = run(*words)
        assert wrong.code == 2
        assert wrong.err.startswith("error: ") and expected in wrong.err
        assert wrong.err.count("\n") == 1


def test_the_command_ends_with_1_where_images_are_left_out(tmp_path):
    rows = [image("a.jpg", thing("cat", 0.3, SOLID)), image("a.png", thing("dog", 0.3, SOLID))]
    done = run(str(write_parts(tmp_path / "labels", rows)), "-f", "semantic", "--out", str(tmp_path / "o"))
    assert done.code == 1
    assert done.err.startswith("warning: a.png: its file maps/a.png belongs to another image: keep this image out of ")
    assert done.err.endswith("; left out\n") and done.err.count("\n") == 1


def test_the_command_tells_of_the_first_ten_left_out(tmp_path):
    rows = [image(f"a{ending}") for ending in sorted(IMAGE_ENDINGS)[:13]]
    done = run(str(write_parts(tmp_path / "labels", rows)), "-f", "semantic", "--out", str(tmp_path / "o"))
    assert done.code == 1
    assert len(done.err.splitlines()) == 11
    assert done.err.endswith("warning: and 2 images more: left out\n")
