"""Parts: what is written is what is read, by the libraries people use; one folder holds one kind of labels."""

import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from open_gem.errors import InputError, OutputError
from open_gem.label.parts import Manifest, Parts, row_of
from open_gem.rle import mask_of, run_lengths
from open_gem.types import Size

MANIFEST = Manifest({"model": "tiny", "presence": {"cat": 0.5}}, ("cat", "dog"))
CAT = {
    "label": "cat",
    "prompt": "kitten",
    "score": 0.25,
    "peak": 1.0,
    "probability": 0.5,
    "confidence": 0.375,
    "image_score": 0.5,
    "presence": 0.75,
    "xyxy": [1, 2, 4, 6],
    "rle": {"size": [8, 9], "counts": "abc"},
    "point": [2, 3],
    "mask_quality": 0.5,
}
ROWS = [
    row_of("a/ä.jpg", "/in/a/ä.jpg", status="ok", height=8, width=9, seconds=0.5, objects=[CAT, {**CAT, "rle": None}]),
    row_of("b.jpg", "/in/b.jpg", status="error", error="it is empty", seconds=0.0),
    row_of(
        "c.jpg",
        "/in/c.jpg",
        status="ok",
        height=8,
        width=9,
        seconds=0.25,
        labelmap=b"PNG",
    ),
]


@pytest.fixture
def parts(tmp_path):
    parts = Parts.claim(tmp_path / "labels", MANIFEST)
    parts.write("1", ROWS[:2])
    parts.write("2", ROWS[2:])
    return parts


def test_rows_come_back(parts):
    again = Parts.open(parts.folder)
    assert again.manifest == MANIFEST
    assert list(again.rows()) == ROWS
    assert list(again.rows("id", "status"))[1] == {"id": "b.jpg", "status": "error"}
    labels = [row["objects"] for row in again.rows("objects.list.element.label")]
    assert labels == [[{"label": "cat"}, {"label": "cat"}], [], []]


def test_nothing_but_parts_and_the_manifest(parts):
    names = sorted(path.name for path in parts.folder.iterdir())
    assert names == [".huggingface.yaml", "_manifest.json", "part-1.parquet", "part-2.parquet"]
    assert json.loads((parts.folder / "_manifest.json").read_text())["fingerprint"] == MANIFEST.fingerprint


def test_a_part_that_is_written_again_is_there_once(parts):
    parts.write("2", ROWS[2:])
    assert len(list(parts.rows())) == 3


def test_a_snapshot_does_not_see_later_parts(parts):
    then = parts.snapshot()
    parts.write("3", [row_of("d.jpg", "/in/d.jpg", status="error", error="it is empty", seconds=0.0)])
    assert [len(list(one.rows("id"))) for one in (then, parts)] == [3, 4]


def test_a_part_is_on_disk_before_it_has_its_name(parts, monkeypatch):
    synced = []

    def fsync(file: int) -> None:
        synced.append((os.fstat(file).st_size, parts.path("3").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    path = parts.write("3", ROWS)
    assert synced == [(path.stat().st_size, False)]


def test_other_libraries_read_parts(parts, tmp_path):
    import datasets
    import duckdb
    import pandas

    loaded: Any = datasets.load_dataset(str(parts.folder), split="train", cache_dir=str(tmp_path / "cache"))
    rows: list[dict[str, Any]] = list(loaded.to_list())
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    assert rows[0]["objects"][0]["xyxy"] == CAT["xyxy"]
    assert rows[2]["labelmap"] == b"PNG"

    found: Any = pandas.read_parquet(parts.folder)["objects"][0][0]
    assert found["rle"]["counts"] == "abc"
    assert list(found["xyxy"]) == CAT["xyxy"]

    query = "select o.label, count(*), max(o.xyxy[3]) from (select unnest(objects) o from read_parquet(?)) group by 1"
    assert duckdb.execute(query, [str(parts.folder)]).fetchall() == [("cat", 2, 4)]


def test_other_settings_are_refused_with_what_differs(parts):
    other = Manifest({"model": "tiny", "presence": {"cat": 0.6}}, MANIFEST.labels)
    with pytest.raises(InputError, match=r"presence\.cat was 0\.5, is 0\.6"):
        Parts.claim(parts.folder, other)
    assert Parts.claim(parts.folder, MANIFEST).manifest == MANIFEST


def test_what_differs_alike_is_reported_once(tmp_path):
    def manifest(presence: float) -> Manifest:
        labels = {label: {"presence": presence} for label in ("cat", "dog", "cow")}
        return Manifest({"classes": labels, "size": presence}, ("cat", "dog", "cow"))

    Parts.claim(tmp_path, manifest(0.5))
    with pytest.raises(InputError) as caught:
        Parts.claim(tmp_path, manifest(0.6))
    expected = "classes.cat.presence was 0.5, is 0.6 (and 2 more such); size was 0.5, is 0.6"
    assert str(caught.value).endswith(expected)


def test_images_may_be_moved_but_those_of_another_folder_are_others(tmp_path):
    one, two = (tmp_path / name for name in ("one", "two"))
    one.mkdir()
    Parts.claim(tmp_path / "labels", replace(MANIFEST, root=str(one)))
    with pytest.raises(InputError, match=r"of images in '.*one', which still exists"):
        Parts.claim(tmp_path / "labels", replace(MANIFEST, root=str(two)))
    one.rename(two)
    assert Parts.claim(tmp_path / "labels", replace(MANIFEST, root=str(two))).manifest.root == str(two)
    assert Parts.open(tmp_path / "labels").manifest.root == str(two)
    Parts.claim(tmp_path / "remote", replace(MANIFEST, root="s3://a"))
    with pytest.raises(InputError, match="which still exists"):
        Parts.claim(tmp_path / "remote", replace(MANIFEST, root="s3://b"))


def test_a_folder_of_images_by_another_name_is_the_same(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    Parts.claim(tmp_path / "labels", replace(MANIFEST, root=str(tmp_path / "photos")))
    for name in ("photos/../photos", "link"):
        assert Parts.claim(tmp_path / "labels", replace(MANIFEST, root=str(tmp_path / name)))


def test_what_is_not_a_folder_of_labels(tmp_path, parts):
    with pytest.raises(InputError, match="no labels in"):
        Parts.open(tmp_path)
    (parts.folder / "_manifest.json").write_text("{")
    with pytest.raises(InputError, match="not a manifest"):
        Parts.open(parts.folder)
    (parts.folder / "_manifest.json").unlink()
    with pytest.raises(InputError, match="parts without a _manifest"):
        Parts.claim(parts.folder, MANIFEST)


def test_a_damaged_part_is_named(parts):
    path = parts.folder / "part-2.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OutputError, match=r"part-2\.parquet.*remove it to label its images again"):
        list(parts.rows())


def test_run_lengths_are_those_of_coco():
    chance = np.random.default_rng(0)
    size = Size(9, 7)
    spans = [
        (slice(0, 9), slice(0, 7)),
        (slice(0, 9), slice(2, 5)),
        (slice(3, 9), slice(1, 7)),
        (slice(4, 5), slice(6, 7)),
    ]
    for span in spans:
        for share in (0.0, 0.3, 0.7, 1.0):
            whole = np.zeros(size, dtype=np.uint8, order="F")
            mask = chance.random(whole[span].shape) < share
            whole[span] = mask
            expected: Any = coco.encode(whole)
            rle = run_lengths(mask, span, size)
            assert rle == {"size": [9, 7], "counts": expected["counts"].decode()}
            assert np.array_equal(mask_of(rle), whole)
