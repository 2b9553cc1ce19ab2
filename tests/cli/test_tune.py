"""`open-gem tune`: a page of detections, tables against marks, and thresholds in a class file."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from open_gem.cli import app
from open_gem.data.scenes import scene
from open_gem.label.parts import Parts

CLASSES = "labels:\n  cat: [cat, tabby cat]\n  bee:\n  snail:\n"


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    (folder / "photos").mkdir()
    for seed in range(8):
        Image.fromarray(scene(seed, 96).image).save(folder / "photos" / f"{seed}.png")
    (folder / "classes.yaml").write_text(CLASSES)
    options = ("--model", "embedded", "--presence", "0.02", "--quiet", "--samples", "0")
    run("label", folder / "photos", "--classes", folder / "classes.yaml", "--out", folder / "labels", *options)
    return folder


def write_marks(folder: Path, path: Path) -> int:
    """Mark detections of presence above the middle as right."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "label", "left", "top", "right", "bottom", "mark"))
        lines = [
            (row["id"], own["label"], *own["xyxy"], "right" if own["presence"] > 0.1 else "wrong")
            for row in Parts.open(folder).rows("id", "objects")
            for own in row["objects"]
        ]
        writer.writerows(lines)
    return len(lines)


def test_from_a_page_over_marks_to_a_class_file(labelled, tmp_path):
    out, _ = run("tune", labelled / "labels", "--page", tmp_path / "marks.html", "--samples", 5)
    assert out.startswith(f"5 detections in {tmp_path / 'marks.html'}: open it") and (tmp_path / "marks.html").exists()
    count = write_marks(labelled / "labels", tmp_path / "marks.csv")
    against = ("tune", labelled / "labels", "--against", tmp_path / "marks.csv")
    out, _ = run(*against)
    assert "Thresholds for a precision of 0.9" in out and "not in it" in out
    document = json.loads(run(*against, "--json")[0])["labels"]
    assert sum(entry["curve"][0]["precision"]["of"] for entry in document.values() if entry["curve"]) == count
    (tmp_path / "classes.yaml").write_text(CLASSES)
    _, err = run(*against, "--write", tmp_path / "classes.yaml", "--curves")
    assert "classes.yaml: thresholds of" in err
    relabelled, _ = run("relabel", labelled / "labels", "--classes", tmp_path / "classes.yaml")
    presence = {label: entry["best"]["presence"] for label, entry in document.items() if entry["best"]}
    assert presence and relabelled
    kept = [own for row in Parts.open(labelled / "labels").rows("objects") for own in row["objects"]]
    assert all(own["presence"] > 0.1 for own in kept if own["label"] in presence)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), "neither --page nor --against given, expected one of them"),
        (("--page", "a.html", "--against", "marks.csv"), "--page and --against given, expected one of them"),
        (("--against", "marks.csv", "--precision", "1.5"), "precision is 1.5, expected a number above 0, up to 1"),
        (("--against", "truth.json", "--iou", "0"), "iou is 0.0, expected a number above 0, up to 1"),
        (("--against", "missing.csv"), "cannot read marks from 'missing.csv': No such file"),
        (("--against", "missing.csv", "--write", "a.txt"), "'a.txt' is no class file with thresholds"),
    ],
)
def test_impossible_requests_are_refused_in_a_line(labelled, options, error):
    out, err = run("tune", labelled / "labels", *options, code=2)
    assert not out and err.count("\n") == 1 and error in err
