"""`open-gem verify`: what is checked, what cannot be, and what the exit code says."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from open_gem import cli
from open_gem.errors import ImageError, InputError, WeightsError
from open_gem.verify import images
from open_gem.verify.checkers import Framing
from open_gem.verify.images import DRAWN, URLS, ImageStore
from open_gem.verify.run import FAILED, NOT_CHECKED, PASSED, SHOWN, Result, find_values, judge, verify
from open_gem.verify.values import VALUES


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["verify", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images by the names that are looked for."""
    for name in URLS:
        Image.new("RGB", (64, 48), "red").save(tmp_path / name)
    return tmp_path


def answers(monkeypatch: pytest.MonkeyPatch, off: float = 0.0) -> None:
    """Models that give the published numbers, or others."""
    monkeypatch.setattr("open_gem.towers.load", lambda *name, **where: None)
    for kind in {type(row) for row in VALUES}:
        monkeypatch.setattr(kind, "load", lambda self, **where: None)
        monkeypatch.setattr(kind, "measure", lambda self, model, image: torch.tensor(self.expected).double() + off)


@pytest.mark.parametrize("row", VALUES, ids=lambda row: f"{row.checkpoint} {row.compared}")
def test_published_values_are_complete(row):
    assert row.image in URLS or row.image in DRAWN
    assert row.certainty in ("A", "B", "C")
    assert 0 < row.tolerance < 0.1
    assert all(map(math.isfinite, row.expected))
    assert row.source
    if row.kind == "tokens":
        assert len(row.expected) == len(row.rows) * row.columns
    if row.kind == "scores":
        assert len(row.expected) == len(row.prompts)
    assert row.pretrained is None or row.repository


def test_the_cats_are_checked_with_both_libraries():
    rows = [row for row in VALUES if row.expected == (24.5701, 19.3049)]
    assert [row.name for row in rows] == ["openai/clip-vit-base-patch32", "ViT-B-32, openai"]


def test_a_difference_within_the_tolerance_passes():
    row = VALUES[0]
    for off, status in ((0.0, PASSED), (0.9, PASSED), (1.1, FAILED), (math.nan, FAILED)):
        measured = (row.expected[0], row.expected[1] + off * row.tolerance)
        assert judge(row, measured).status == status
    assert judge(replace(row, certainty="C"), (0.0, 0.0)).status == SHOWN


def test_what_cannot_be_loaded_is_not_checked(folder, monkeypatch):
    def load(self: Any, **where: Any) -> Any:
        raise WeightsError("no network")

    monkeypatch.setattr(type(VALUES[0]), "load", load)
    [result] = verify(VALUES[:1], ImageStore(folder))
    assert (result.status, result.reason, result.measured) == (NOT_CHECKED, "no network", None)
    assert json.dumps(result.document())


def test_an_unreachable_image_is_asked_for_once(tmp_path, monkeypatch):
    calls = []

    def urlopen(url: str, timeout: float) -> Any:
        calls.append(url)
        raise OSError("no network")

    monkeypatch.setattr(images, "urlopen", urlopen)
    store = ImageStore(tmp_path)
    for _ in range(2):
        with pytest.raises(ImageError, match="no network"):
            store(images.CATS)
    assert len(calls) == 1


def test_a_downloaded_image_is_kept(tmp_path, folder, monkeypatch):
    content = (folder / images.CATS_PNG).open("rb")
    monkeypatch.setattr(images, "urlopen", lambda url, timeout: content)
    place = tmp_path / "kept"
    lines = []
    assert ImageStore(place, announce=lines.append)(images.CATS_PNG).size == (64, 48)
    assert lines == [f"downloading {URLS[images.CATS_PNG]}"]
    assert ImageStore(place, downloads=False)(images.CATS_PNG).size == (64, 48)
    with pytest.raises(ImageError, match="is not in"):
        ImageStore(place, downloads=False)(images.CATS)


def test_framings_are_those_of_the_sources():
    from open_gem.images.pixels import Preprocess
    from open_gem.types import Size

    preprocess = Preprocess((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", Size(224, 224))
    image = Image.new("RGB", (640, 480))
    image.paste((255, 255, 255), (80, 0, 560, 480))  # the square in the middle
    cropped = Framing(224, 224).pixels(image, preprocess)
    assert cropped.shape == (1, 3, 224, 224) and cropped[..., 3:-3].min() == 1
    assert Framing(224).pixels(image, preprocess)[..., 0].max() == 0


def test_names_choose_checkpoints():
    assert {row.checkpoint for row in find_values(["facebook/dino-vits8"])} == {"facebook/dino-vits8"}
    assert len(find_values(["ViT-B-32, openai"])) == 2
    assert find_values([]) == list(VALUES)
    with pytest.raises(InputError, match="did you mean facebook/dino-vits8"):
        find_values(["facebook/dino-vits"])


def test_without_a_network_nothing_is_checked_and_nothing_fails(tmp_path, monkeypatch):
    result = call("--images", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"{len(VALUES)} not checked" in result.stdout


def test_what_cannot_be_loaded_for_one_reason_is_one_line(folder, monkeypatch):
    def load(self: Any, **where: Any) -> Any:
        raise WeightsError(f"cannot load {self.name}: no network")

    for kind in {type(row) for row in VALUES}:
        monkeypatch.setattr(kind, "load", load)
    result = call("--images", folder)
    assert result.exit_code == 0, result.output
    assert f"not checked ({len(VALUES)}): cannot load a checkpoint: no network" in result.stdout
    assert call("--images", folder, "--quiet").stdout == ""


def test_everything_right_passes_and_anything_wrong_fails(folder, monkeypatch):
    answers(monkeypatch)
    result = call("--images", folder)
    assert result.exit_code == 0, result.output
    assert "failed" not in result.stdout and "24.57 19.3" in result.stdout
    answers(monkeypatch, off=1.0)
    result = call("--images", folder, "--json")
    assert result.exit_code == 1
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert {document["status"] for document in documents} == {FAILED, SHOWN}
    assert len(documents) == len(VALUES)


def test_only_cached_checkpoints_are_checked(folder, monkeypatch):
    answers(monkeypatch)
    monkeypatch.setattr("open_gem.verify.run.cached_repositories", lambda: {"facebook/dino-vits8"})
    result = call("--cached", "--images", folder, "--json")
    assert [json.loads(line)["checkpoint"] for line in result.stdout.splitlines()] == ["facebook/dino-vits8"]
    monkeypatch.setattr("open_gem.verify.run.cached_repositories", set)
    result = call("--cached", "--images", folder)
    assert (result.exit_code, result.stdout) == (0, "") and "network" in result.stderr


def test_a_result_without_numbers_has_no_difference():
    assert Result(VALUES[0], None, NOT_CHECKED, "why").difference is None


def test_the_papers_values_are_compared_on_a_slice(tiny, tmp_path, monkeypatch):
    import numpy as np

    from open_gem import towers

    home = tmp_path / "VOCdevkit" / "VOC2012"
    for place in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / place).mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (70, 50), "green").save(home / f"JPEGImages/{name}.jpg")
        Image.fromarray(np.full((50, 70), 3, np.uint8)).save(home / f"SegmentationClass/{name}.png")
    (home / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\n")
    monkeypatch.chdir(tmp_path)
    right = towers.load
    monkeypatch.setattr("open_gem.towers.load", lambda *name, **where: right(tiny, **where))
    result = call("--paper", "--data-root", tmp_path, "--limit", 2, "--json", "-q")
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["method"], row["paper"], row["images"]) for row in documents] == [("clip", 10.4, 2), ("gem", 46.2, 2)]
    assert result.exit_code == (1 if any(row["status"] == "failed" for row in documents) else 0)
    assert all((row["status"] == "passed") == (row["low"] <= row["paper"] <= row["high"]) for row in documents)
    assert call("--paper").exit_code == 2


def test_a_folder_of_images_that_does_not_exist_is_refused(tmp_path):
    result = CliRunner().invoke(cli.app, ["verify", "--images", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "expected a folder with the images" in result.stderr
