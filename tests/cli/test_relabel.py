"""A few images first, thresholds without the model, then the rest: `open-gem label` and `relabel` as a person does."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from open_gem import cli
from open_gem.data.scenes import scene
from open_gem.label.parts import Parts

CLASSES = "labels: {cat: [cat, kitten], dog: }\nbackground: [sky]\npresence: 0\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with six images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for seed in range(6):
        Image.fromarray(scene(seed, 64).image).save(tmp_path / "in" / f"{seed}.png")
    (tmp_path / "classes.yaml").write_text(CLASSES)
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def label(tiny: str, *arguments: object) -> Result:
    options = ("--out", "out", "--model", tiny, "--device", "cpu", "-c", "classes.yaml", "--samples", 0)
    return invoke("label", "in", *options, *arguments)


def succeeded(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def rows(folder: str = "out") -> dict[str, Any]:
    return {row["id"]: {**row, "seconds": None} for row in Parts.open(folder).rows()}


def test_a_few_first_then_thresholds_then_the_rest(place, tiny):
    result = succeeded(label(tiny, "--limit", 2))
    assert "stopped at the limit: the same command without --limit labels the rest" in result.stderr
    assert len(rows()) == 2
    result = succeeded(label(tiny, "--sample", 3, "--seed", 7))
    assert "limit" not in result.stderr
    few = rows()
    assert 3 <= len(few) <= 5
    result = succeeded(invoke("relabel", "out", "--presence", 0.5, "--min-area", 0.01, "--samples", 0, "--json"))
    assert json.loads(result.stdout)["images"] == len(few)
    assert rows() != few
    refused(label(tiny), "labels made with other settings", "presence was 0.5, is 0")
    assert "stopped" not in succeeded(label(tiny, "--presence", 0.5, "--min-area", 0.01)).stderr
    after = rows()
    assert len(after) == 6
    fresh = ("--presence", 0.5, "--min-area", 0.01, "--out", "fresh")
    succeeded(label(tiny, *fresh))
    assert after == rows("fresh")
    assert Parts.open("out").manifest == Parts.open("fresh").manifest


def test_thresholds_of_a_class_file(place, tiny):
    succeeded(label(tiny))
    before = rows()
    Path("stricter.yaml").write_text(CLASSES.replace("dog: ", "dog: {presence: 1}"))
    succeeded(invoke("relabel", "out", "-c", "stricter.yaml", "--out", "new", "--samples", 1))
    labels = Parts.open("new").manifest.settings["classes"]["labels"]
    assert [labels[name]["presence"] for name in ("cat", "dog")] == [0, 1]
    assert {one["label"] for row in rows("new").values() for one in row["objects"]} == {"cat"}
    assert rows() == before
    assert {"_summary.json", "_samples.html", "_kept"} < {path.name for path in Path("new").iterdir()}


def test_rules_for_absent_labels(place, tiny):
    succeeded(label(tiny, "--absent", "none", "--presence", 1))
    everything = rows()
    assert all({one["label"] for one in row["objects"]} == {"cat", "dog"} for row in everything.values())
    succeeded(invoke("relabel", "out", "--absent", "presence", "--samples", 0))
    assert all(row["objects"] == [] for row in rows().values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--absent", "never"], ["absent is 'never', expected one of none, presence, denoise"]),
        (["--presence", "2"], ["presence of label 'cat' is 2.0, expected a number in [0, 1]"]),
        (["--min-area", "-1"], ["min area is -1.0"]),
        (["-c", "others.yaml"], ["other prompts need the model", 'prompts.cat was ["cat", "kitten"], is ["tiger"]']),
        (["-c", "missing.yaml"], ["missing.yaml"]),
        (["--first-is-background"], ["--first-is-background given without --classes"]),
        (["--out", "taken"], ["'taken' holds labels already, expected a new folder"]),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(arguments, words, place, tiny):
    Path("others.yaml").write_text("labels: {cat: tiger, dog: }\nbackground: [sky]\n")
    succeeded(label(tiny, "--limit", 1))
    succeeded(label(tiny, "--limit", 1, "--out", "taken"))
    before = rows()
    refused(invoke("relabel", "out", *arguments), *words)
    assert rows() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--watch", "1", "--limit", "3"], ["--limit and --watch given, expected one of them"]),
        (["--watch", "1", "--sample", "3"], ["--sample and --watch given, expected one of them"]),
        (["--no-keep", "--keep-floor", "0.5"], ["--keep-floor and --no-keep given, expected one of them"]),
        (["--keep-floor", "0.5"], ["presence of label 'cat' is 0, expected 0.5 or more"]),
    ],
)
def test_a_wrong_request_to_label_is_one_line(arguments, words, place, tiny):
    refused(label(tiny, *arguments), *words)
    assert not Path("out").exists()


def test_labels_without_what_was_kept_stay_as_they_are(place, tiny):
    succeeded(label(tiny, "--no-keep", "--limit", 1))
    assert not Path("out/_kept").exists()
    refused(invoke("relabel", "out", "--presence", 0.5), "nothing that the model saw is kept in 'out'")
    refused(invoke("relabel", "nowhere"), "no labels in 'nowhere'")


def test_what_is_not_kept_or_large_is_said(place, tiny):
    merged = ("--window", 32, "--stride", 16, "--merge", "logits", "--limit", 1)
    assert "note: views merged as logits have no patch grid: nothing is kept" in succeeded(label(tiny, *merged)).stderr
    Path("classes.yaml").write_text("\n".join(f"- thing {number}" for number in range(101)))
    result = succeeded(label(tiny, "--out", "many", "--limit", 1))
    assert "note: maps of 101 prompts are kept, about" in result.stderr
    assert "note" not in succeeded(label(tiny, "--out", "few", "--limit", 1, "--keep-floor", 0.1)).stderr


def test_a_dry_run_estimates_what_the_limit_leaves(place, tiny):
    documents = [
        json.loads(succeeded(label(tiny, "--dry-run", "--json", *more)).stdout)
        for more in ([], ["--limit", 2], ["--sample", 3], ["--no-keep"])
    ]
    assert [document["left"] for document in documents] == [6, 2, 3, 6]
    assert documents[0]["bytes"] > documents[3]["bytes"]
