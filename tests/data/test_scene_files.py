"""Scenes as files: images, and their objects in COCO's format."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from open_gem.cli import app
from open_gem.data import scene, write_scenes
from open_gem.errors import InputError, OutputError


def read(folder: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(folder / "truth.json"))


def test_the_truth_has_the_masks_and_boxes_of_the_scenes(tmp_path):
    write_scenes(tmp_path / "scenes", 3, 96)
    truth = read(tmp_path / "scenes")
    assert sorted(path.name for path in (tmp_path / "scenes" / "images").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]
    for seed in range(3):
        drawn, [image] = scene(seed, 96), truth.loadImgs([seed])
        with Image.open(tmp_path / "scenes" / "images" / image["file_name"]) as written:
            assert written.size == (image["width"], image["height"]) == (96, 96)
            assert np.abs(np.asarray(written) - drawn.image.astype(int)).mean() < 8
        objects = truth.loadAnns(truth.getAnnIds([seed]))
        assert [truth.cats[own["category_id"]]["name"] for own in objects] == list(drawn.names)
        for own, mask, (left, top, right, bottom) in zip(objects, drawn.masks, drawn.boxes, strict=True):
            assert np.array_equal(truth.annToMask(own), mask) and own["area"] == mask.sum()
            assert own["bbox"] == [left, top, right - left, bottom - top]
    ids = truth.getAnnIds()
    assert len(set(ids)) == len(ids) == len(truth.dataset["annotations"])


def test_only_scenes_that_show_a_concept(tmp_path):
    out = CliRunner().invoke(
        app, ["data", "scenes", "--out", f"{tmp_path}/few", "--images", "4", "--size", "64", "--showing", "cat,bee"]
    )
    assert out.exit_code == 0 and out.output.startswith("4 images in")
    seeds = [image["id"] for image in json.loads((tmp_path / "few" / "truth.json").read_text())["images"]]
    expected = [seed for seed in range(seeds[-1] + 1) if {"cat", "bee"} & set(scene(seed, 64).names)]
    assert seeds == expected and len(seeds) == 4


def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(tmp_path):
    for images, size, showing, words in [
        (1, 96, ["ca"], r"no scene shows 'ca' \(did you mean cat\?\)"),
        (0, 96, [], "images is 0"),
        (1, 8, [], "at least 32 pixels"),
    ]:
        with pytest.raises(InputError, match=words):
            write_scenes(tmp_path / "new", images, size, showing)
    (tmp_path / "old").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write_scenes(tmp_path / "old", 1)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        write_scenes(tmp_path / "file" / "new", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old"]
