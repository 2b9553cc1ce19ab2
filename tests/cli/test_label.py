"""`open-gem label` and `open-gem summary` as a person uses them."""

import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from open_gem import cli
from open_gem.cli.label import format_duration
from open_gem.data.scenes import scene
from open_gem.label import control, on_ray
from open_gem.label.done import TODO, HashedIdSet, Shard, Tally
from open_gem.label.labeling import Labeling
from open_gem.label.local import label as label_items
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Manifest, Parts, encode, row_of
from open_gem.label.sheet import SIDE, Sheet, draw
from open_gem.label.sources import Item, Source, open_source
from open_gem.label.summary import kind_of, summarize
from open_gem.label.watching import Errors, SettledFiles, watch


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with six pictures and one that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for seed in range(6):
        Image.fromarray(scene(seed, 64).image).save(tmp_path / "in" / f"{seed}.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "classes.yaml").write_text("labels: {cat: [cat, kitten], dog: }\nbackground: [sky]\npresence: 0\n")
    return tmp_path


def label(tiny: str, *arguments: object) -> Result:
    given = ["label", "in", "--out", "out", "--model", tiny, "--device", "cpu", *map(str, arguments)]
    return CliRunner().invoke(cli.app, given)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert not Path("out").exists()


def test_a_folder_is_labelled_and_summarised(place, tiny):
    result = label(tiny, "-c", "classes.yaml")
    assert result.exit_code == 1, result.output  # one image has an error
    assert "6 images labelled" in result.stdout
    assert "1 image with an error: 'in/broken.png' is not an image of any format that is read" in result.stdout
    files = {path.name for path in Path("out").iterdir() if not path.name.startswith(".")}
    assert {"_manifest.json", "_summary.json", "_samples.html", "_kept"} < files and len(files) == 5
    assert [name[:5] for name in files if not name.startswith("_")] == ["part-"]
    rows = {row["id"]: row for row in Parts.open("out").rows()}
    assert sorted(rows) == [*(f"{seed}.png" for seed in range(6)), "broken.png"]
    summary = json.loads(Path("out/_summary.json").read_text())
    counted = [one["label"] for row in rows.values() for one in row["objects"]]
    for name in ("cat", "dog"):
        images = sum(any(one["label"] == name for one in row["objects"]) for row in rows.values())
        assert summary["labels"][name]["images"] == images
        assert summary["labels"][name]["objects"] == counted.count(name)
    assert (summary["images"], summary["labeled"], summary["empty"]) == (7, 6, 0)
    page = Path("out/_samples.html").read_text()
    assert page.count("<img src='data:image/jpeg;base64,") == sum(
        6 for name in ("cat", "dog") if summary["labels"][name]["images"] == 6
    )
    assert "<dt>Presence threshold</dt><dd>0</dd>" in page and "1 × &#x27;in/broken.png&#x27; is not" in page


@pytest.mark.parametrize("reader", ["pandas", "duckdb", "datasets"])
def test_the_folder_is_read_as_a_whole_by_libraries_for_tables(reader, place, tiny):
    """Also while Ray is at work there, whose list of what to do is Parquet, too."""
    import datasets
    import duckdb
    import pandas

    label(tiny, "-c", "classes.yaml")
    on_ray._write_todo(Path("out") / TODO, [Item("x.png", "in/x.png")], 1)
    read: dict[str, Callable[[], Any]] = {
        "pandas": lambda: pandas.read_parquet("out")["id"],
        "duckdb": lambda: [id for (id,) in duckdb.execute("select id from read_parquet('out')").fetchall()],
        "datasets": lambda: datasets.load_dataset("out", split="train", cache_dir="cache")["id"],
    }
    assert sorted(read[reader]()) == sorted(row["id"] for row in Parts.open("out").rows("id"))


def test_what_is_passed_over_is_counted_and_shown(place, tiny):
    for name in ("notes.txt", "a.TXT", "photo.heic", ".hidden.png"):
        (place / "in" / name).write_bytes(b"x")
    dry = json.loads(label(tiny, "-c", "classes.yaml", "--dry-run", "--json").stdout)
    result = label(tiny, "-c", "classes.yaml")
    heic = {} if find_spec("pillow_heif") else {".heic": 1}
    assert dry["passed_over"] == {".txt": 2, **heic, "hidden": 1}
    shown = "2 .txt, 1 .heic (pip install 'open_gem[heif]'), 1 hidden" if heic else "2 .txt, 1 hidden"
    assert f"Passed over in the source: {shown}\n" in result.stdout
    again = CliRunner().invoke(cli.app, ["summary", "out", "--json"])
    assert json.loads(again.stdout)["passed_over"] == dry["passed_over"]
    assert json.loads(Path("out/_summary.json").read_text())["passed_over"] == dry["passed_over"]


def test_the_choice_between_two_columns_is_shown(place, tiny):
    Path("list.csv").write_text("url,path\nhttp://127.0.0.1:1/a.png,in/0.png\n")
    given = ["label", "list.csv", "--out", "out", "--model", tiny, "--device", "cpu", "-p", "cat"]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 0, result.output
    assert "note: images of 'list.csv' are read from column 'path'; --column and" in result.stderr


def test_samples_are_drawn_from_any_working_folder(place, tiny, monkeypatch):
    label(tiny, "-c", "classes.yaml")
    page = Path("out/_samples.html").read_bytes()
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert CliRunner().invoke(cli.app, ["summary", "../out"]).exit_code == 0
    assert (place / "out" / "_samples.html").read_bytes() == page and b"<img" in page


def test_the_ray_engine_needs_ray(place, tiny, monkeypatch):
    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    refused(label(tiny, "-p", "cat", "--engine", "ray"), "ray is not installed: pip install 'open_gem[ray]'")
    assert not Path("out").exists()


def test_samples_are_shown_after_the_images_were_moved(place, tiny):
    label(tiny, "-c", "classes.yaml")
    page = Path("out/_samples.html").read_bytes()
    Path("in").rename("moved")
    assert CliRunner().invoke(cli.app, ["summary", "out"]).exit_code == 0
    assert Path("out/_samples.html").read_bytes() != page, "nobody knows yet where they are"
    given = ["label", "moved", "-c", "classes.yaml", "--out", "out", "--model", tiny, "--device", "cpu"]
    assert CliRunner().invoke(cli.app, given).exit_code == 0
    assert Path("out/_samples.html").read_bytes() == page


def test_the_same_command_resumes_and_errors_can_be_retried(place, tiny):
    assert label(tiny, "-c", "classes.yaml").exit_code == 1
    before = sorted(Path("out").glob("*.parquet"))
    again = label(tiny, "-c", "classes.yaml")
    assert again.exit_code == 0, "nothing was left to do"
    assert sorted(Path("out").glob("*.parquet")) == before
    shutil.copy("in/0.png", "in/broken.png")
    result = label(tiny, "-c", "classes.yaml", "--retry-errors", "--json")
    assert result.exit_code == 0, result.output
    assert "retrying 1 image with an error" in result.stderr
    summary = json.loads(result.stdout)
    assert (summary["labeled"], summary["errors"]) == (7, {})
    assert len(list(Parts.open("out").rows("id"))) == 7


def test_other_settings_need_another_folder(place, tiny):
    assert label(tiny, "-c", "classes.yaml").exit_code == 1
    for change in (["--method", "clip"], ["--threshold", "0.4"], ["--outputs", "boxes"]):
        result = label(tiny, "-c", "classes.yaml", *change)
        assert result.exit_code == 2
        assert "holds labels made with other settings" in result.stderr, change


def test_a_summary_can_be_made_again(place, tiny):
    label(tiny, "-c", "classes.yaml", "--samples", "0")
    assert not Path("out/_samples.html").exists()
    result = CliRunner().invoke(cli.app, ["summary", "out", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["images"] == 7
    assert Path("out/_samples.html").exists()
    shutil.rmtree("in")
    assert CliRunner().invoke(cli.app, ["summary", "out"]).exit_code == 0
    assert (
        "does not exist" in Path("out/_samples.html").read_text()
        or "No such file" in Path("out/_samples.html").read_text()
    )


def test_names_in_the_page_are_text(place, tiny):
    Path("in/0.png").rename("in/<b>&.png")
    label(tiny, "-p", "<i>cat</i>", "--presence", "0")
    page = Path("out/_samples.html").read_text()
    assert "&lt;b&gt;&amp;.png" in page and "&lt;i&gt;cat&lt;/i&gt;" in page
    assert "<b>" not in page and "<i>" not in page


def test_a_dry_run_writes_nothing(place, tiny):
    result = label(tiny, "-c", "classes.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("7 images: 0 done, 7 left, 0 listed twice\nabout ")
    assert not Path("out").exists()
    label(tiny, "-c", "classes.yaml")
    shutil.copy("in/0.png", "in/9.png")
    told = json.loads(label(tiny, "-c", "classes.yaml", "--dry-run", "--json").stdout)
    assert (told["images"], told["done"], told["left"], told["sampled"]) == (8, 7, 1, 1)
    assert told["seconds"] > 0 and told["bytes"] > 0
    told = json.loads(label(tiny, "-c", "classes.yaml", "--dry-run", "--retry-errors", "--json").stdout)
    assert (told["done"], told["left"]) == (6, 2)


def test_a_dry_run_counts_what_is_listed_twice(place, tiny):
    Path("list.txt").write_text("in/0.png\nin/1.png\nin/0.png\n")
    given = ["label", "list.txt", "--out", "out", "--model", tiny, "--device", "cpu", "-p", "cat", "--dry-run"]
    assert CliRunner().invoke(cli.app, given).stdout.startswith("3 images: 0 done, 2 left, 1 listed twice\nabout ")


def test_an_estimate_is_of_all_that_are_left(place, tiny_localizer, monkeypatch):
    """By the first few, which are seen as a run would; the first time of all, which is slow, does not count."""
    clock, locate = [0.0], Labeling.locate

    def slow(self: Labeling, group: Any) -> Any:
        clock.append(clock[-1] + (100.0 if len(clock) == 1 else 1.0))
        return locate(self, group)

    monkeypatch.setattr(Labeling, "locate", slow)
    monkeypatch.setattr(control, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    Path("in/broken.png").unlink()
    labeling, source = Labeling(tiny_localizer, Ontology.of(["cat"], presence=0.0), keep=None), open_source("in")
    found = control.estimate(labeling, source, HashedIdSet(["0.png"]), sample=2, batch_size=1, workers=1)
    assert (found.sampled, found.seconds, found.tally.done) == (2, 5.0, 1)
    size = len(encode(list(label_items(labeling, [one for one in source.items() if one.id != "0.png"][:2]))))
    assert found.size == pytest.approx(size / 2 * 5, rel=0.1)
    nothing = control.estimate(labeling, source, HashedIdSet(f"{seed}.png" for seed in range(6)))
    assert (nothing.sampled, nothing.seconds, nothing.size) == (0, None, None)
    shares = [control.estimate(labeling, source, HashedIdSet(), shard=Shard(index, 2)).tally.listed for index in (0, 1)]
    assert sum(shares) == 6 and all(shares)


def test_durations_are_in_the_largest_unit_of_which_there_are_two():
    told = {1.24: "1.2 seconds", 119: "119.0 seconds", 120: "2.0 minutes", 7200: "2.0 hours", 216000: "2.5 days"}
    assert {seconds: format_duration(seconds) for seconds in told} == told


def test_the_page_names_labels_without_objects(place, tiny):
    label(tiny, "-p", "cat", "--presence", "1")
    page = Path("out/_samples.html").read_text()
    assert "<tr class=absent><td>cat</td><td>0</td>" in page and "<h2>cat</h2>" not in page


@pytest.fixture
def read_only(monkeypatch):
    """The system says that no file can be made; root could in a folder that only says so itself."""

    def refuses(*given, **settings):
        raise PermissionError(13, "Permission denied")

    def forbid() -> None:
        monkeypatch.setattr(Path, "replace", refuses)
        monkeypatch.setattr("tempfile.TemporaryFile", refuses)

    return forbid


def test_a_summary_is_printed_where_nothing_can_be_written(place, tiny, read_only):
    assert label(tiny, "-c", "classes.yaml").exit_code == 1
    Path("out/_samples.html").unlink()
    read_only()
    result = CliRunner().invoke(cli.app, ["summary", "out"])
    assert result.exit_code == 0, result.output
    assert "6 images labelled" in result.stdout and "Labels are in out\n" in result.stdout
    assert "note: cannot write 'out/_summary.json': Permission denied" in result.stderr
    assert label(tiny, "-c", "classes.yaml", "--dry-run").exit_code == 0
    assert label(tiny, "-c", "classes.yaml", "--dry-run", "--out", "nowhere").exit_code == 0
    assert not Path("nowhere").exists()


def test_names_that_match_nothing_claim_no_folder(place, tiny):
    given = ["label", "in/*.jpg", "--out", "out", "--model", tiny, "--device", "cpu", "-p", "cat"]
    refused(CliRunner().invoke(cli.app, given), "no image in 'in/*.jpg', expected at least one")


def test_lists_with_the_same_image_twice(place, tiny):
    Path("list.txt").write_text("in/0.png\nin/1.png\nin/0.png\n")
    given = ["label", "list.txt", "--out", "out", "--model", tiny, "--device", "cpu", "-p", "cat"]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 0, result.output
    assert "warning: 1 duplicate id in the source, labelled once" in result.stderr
    assert [row["id"] for row in Parts.open("out").rows("id")] == ["in/0.png", "in/1.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no prompt given, expected --prompt, --like or --classes"]),
        (["-p", "cat", "-c", "classes.yaml"], ["--classes and --prompt given"]),
        (["-c", "none.yaml"], ["none.yaml", "No such file"]),
        (["-p", "cat", "--outputs", "polygons"], ["output 'polygons'"]),
        (["-p", "cat", "--heatmap-scale", "log"], ["'log'"]),
        (["-p", "cat", "--instances", "image"], ["instances is 'image'"]),
        (["-p", "cat", "--min-area", "2"], ["2.0"]),
        (["-p", "cat", "--min-area", "-0.1"], ["-0.1"]),
        (["-p", "cat", "--presence", "2"], ["presence of label 'cat' is 2.0"]),
        (["-p", "cat", "--engine", "spark"], ["engine is 'spark', expected one of local, ray"]),
        (["-p", "cat", "--method", "gme"], ["did you mean gem"]),
    ],
)
def test_a_wrong_request_is_one_line(arguments, words, place, tiny):
    refused(label(tiny, *arguments), *words)


def test_under_torchrun_each_process_has_its_share(place, tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = label(tiny, "-c", "classes.yaml")
        assert result.exit_code == 0, "an image with an error is no reason for torchrun to end the others"
        assert f"process {rank}: " in result.stderr
    ids = [row["id"] for row in Parts.open("out").rows("id")]
    assert len(ids) == len(set(ids)) == 7
    assert not Path("out/_summary.json").exists(), "no process knows all"


def test_a_growing_folder_is_watched(place, tiny, monkeypatch):
    stopping = control.stopping
    stops = []

    def caught(say):
        manager = stopping(say)
        stop = manager.__enter__()
        stops.append(stop)
        return _Context(stop, manager)

    monkeypatch.setattr(control, "stopping", caught)

    def act() -> None:
        _wait(lambda: Path("out/_manifest.json").exists() and len(list(Parts.open("out").rows("id"))) == 7)
        shutil.copy("in/0.png", "in/new.png")
        _wait(lambda: len(list(Parts.open("out").rows("id"))) == 8)
        shutil.copy("in/1.png", "in/broken.png")
        _wait(lambda: all(row["status"] == "ok" for row in Parts.open("out").rows("status")))
        _wait(lambda: len(list(Parts.open("out").rows("id"))) == 8)
        stops[0].event.set()

    actor = threading.Thread(target=act)
    actor.start()
    result = label(tiny, "-c", "classes.yaml", "--watch", "0.1", "--settle", "0")
    actor.join()
    assert result.exit_code == 0, result.output
    assert "1 image labelled, 0 with an error; waiting for more" in result.stderr
    assert "8 images labelled" in result.stdout


class _Context:
    def __init__(self, stop, manager):
        self.stop, self.manager = stop, manager

    def __enter__(self):
        return self.stop

    def __exit__(self, *raised):
        return self.manager.__exit__(*raised)


def _wait(until) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_files_wait_until_they_have_settled(place):
    def ids(files: SettledFiles, done: HashedIdSet = HashedIdSet()) -> list[str]:  # noqa: B008 - never changed
        return sorted(item.id for item in files.settled(open_source("in"), done).items())

    names = sorted(path.name for path in Path("in").iterdir())
    assert ids(SettledFiles(1000)) == []
    assert ids(SettledFiles(1000), HashedIdSet(names)) == names, "what is done is counted, and nobody looks at it"
    files = SettledFiles(0)
    assert ids(files) == names, "what is there at first is taken"
    shutil.copy("in/0.png", "in/new.png")
    assert ids(files, HashedIdSet(names)) == names, "what comes then is taken when it stood still for one look"
    Path("in/new.png").write_bytes(b"more")
    assert ids(files, HashedIdSet(names)) == names
    assert ids(files, HashedIdSet(names)) == sorted([*names, "new.png"])
    ahead = time.time() + 1000
    os.utime("in/0.png", (ahead, ahead))
    assert ids(SettledFiles(100)) == ["0.png"], "by a clock that is ahead"


def test_a_tar_that_grows_waits_as_a_whole(place):
    def add(name: str) -> None:
        with tarfile.open("s.tar", "a") as tar:
            tar.add("in/0.png", name)

    def ids(files: SettledFiles) -> list[str]:
        return [item.id for item in files.settled(open_source("s.tar"), HashedIdSet()).items()]

    add("a.png")
    files = SettledFiles(0)
    assert ids(files) == ["s.tar/a.png"]
    add("b.png")
    assert ids(files) == []
    assert ids(files) == ["s.tar/a.png", "s.tar/b.png"]


def test_errors_are_tried_again_when_their_files_have_changed(place, tmp_path):
    """Also those of a run before, and of files that were changed while they were read; others are not."""
    parts = Parts.claim(tmp_path / "out", Manifest({}, ("cat",)))
    old = time.time() - 1000
    changes = {"same": 0, "grown": 0, "growing": 0, "replaced": 0, "recent": 940, "while": 0}
    for name, change in changes.items():
        Path(f"in/{name}.png").write_bytes(b"x")
        os.utime(f"in/{name}.png", (old, old + change))
    places = {name: f"in/{name}.png" for name in changes if name != "while"}
    places |= {"gone": "in/gone.png", "none": "in/\0.png", "far": "s3://b/x.png"}
    rows = [row_of(id, source, status="error", error="", seconds=0.0) for id, source in places.items()]
    parts.write("1", [*rows, row_of("good", "in/0.png", status="ok", seconds=0.0)])
    errors = Errors(parts, 2.0)
    errors.learn()
    assert errors.forget_changed() == ["recent"], "which may have been read just before it changed"
    parts.write("2", [row_of("while", "in/while.png", status="error", error="", seconds=0.0)])
    start = time.time() - 10
    os.utime("in/while.png", (start, start - 1))
    errors.learn(start)
    Path("in/grown.png").write_bytes(b"xx")
    os.utime("in/grown.png", (old, old))
    Path("in/growing.png").write_bytes(b"xx")
    os.utime("in/replaced.png", (old, old + 2))
    assert sorted(errors.forget_changed()) == ["grown", "replaced", "while"]
    assert errors.forget_changed() == []
    assert sorted(row["id"] for row in parts.rows("id")) == ["far", "gone", "good", "growing", "none", "same"]


@pytest.mark.parametrize("retry", [True, False])
def test_watching_tries_an_error_again_once_its_file_has_changed(retry, place, tmp_path):
    """Not for having been new when it was read; nor where other processes write parts too."""
    parts, stop, tries = Parts.claim(tmp_path / "out", Manifest({}, ("cat",))), Event(), []
    source, now = open_source("in"), time.time()
    os.utime("in/broken.png", (now, now - 60))

    def run(images: Source, done: HashedIdSet) -> Tally:
        tries.append("broken.png" not in done)
        if done.add("broken.png"):
            row = row_of("broken.png", "in/broken.png", status="error", error="", seconds=0.0)
            parts.write(str(len(tries)), [row])
        if len(tries) == 2:
            os.utime("in/broken.png", (now, now - 30))
        if len(tries) == 3:
            stop.set()
        return Tally()

    assert len(list(watch(run, parts, source, 0.0, stop, settle=0.0, retry=retry))) == 3
    assert tries == [True, False, retry]


def found(label: str, score: float, presence: float, peak: float = 1.0, probability: float = 1.0) -> dict[str, Any]:
    known = {"presence": presence, "peak": peak, "probability": probability}
    return {"label": label, "score": score, **known, "confidence": presence * peak * probability}


def test_rows_are_counted(tmp_path):
    parts = Parts.claim(tmp_path, Manifest({}, ("cat", "dog")))
    cats = [found("cat", 0.25, 0.9), found("cat", 0.75, 0.9)]
    rows = [row_of(f"{number}.png", "", status="ok", seconds=0.5, objects=cats[number:]) for number in range(3)]
    failed = [row_of(name, "", status="error", error=f"'{name}' is empty", seconds=0.25) for name in ("x.png", "y.png")]
    parts.write("1", rows + failed)
    assert summarize(parts).document() == {
        "images": 5,
        "labeled": 3,
        "empty": 1,
        "errors": {"'x.png' is empty": 2},
        "passed_over": {},
        "seconds": 2.0,
        "labels": {
            "cat": {
                "images": 2,
                "objects": 3,
                **dict.fromkeys(("presence", "confidence"), pytest.approx(0.9)),
                "score": pytest.approx(1.75 / 3),
            },
            "dog": {"images": 0, "objects": 0, "presence": None, "confidence": None, "score": None},
        },
    }


def test_samples_are_random_ones_and_the_least_certain():
    """The same ones in whichever order images come."""
    rows = [
        row_of(f"{number}.png", "", status="ok", objects=[found("cat", 0.2, 1.0), found("cat", 0.2, number / 20)])
        for number in range(20)
    ]
    rows += [row_of("none.png", "", status="ok"), row_of("broken.png", "", status="error")]
    chosen = []
    for order in (range(22), range(21, -1, -1)):
        sheet = Sheet(Manifest({}, ("cat", "dog")), 4)
        for number in order:
            sheet.add(Path("part"), rows[number])
        chosen.append([list(lowest.ids) for lowest in (*sheet.random.values(), sheet.empty)])
        assert list(sheet.near["cat"].ids) == ["0.png", "1.png"]
    random, dogs, empty = chosen[0]
    assert chosen[0] == chosen[1]
    assert len(set(random)) == 4 and random != [f"{number}.png" for number in range(4)]
    assert (dogs, empty) == ([], ["none.png"])


@pytest.mark.parametrize(("scale", "near"), [("minmax", "peak"), ("cosine", "score"), ("probability", "probability")])
def test_images_that_need_a_look_are_those_near_a_threshold_and_those_where_labels_compete(scale, near):
    classes = {"labels": {"cat": {"presence": 0.8, "threshold": 0.25}}}
    sheet = Sheet(Manifest({"classes": classes, "heatmap_scale": scale}, ("cat",)), 6)
    objects = {
        "sure": [found("cat", 0.9, 0.99)],
        "hardly present": [found("cat", 0.9, 0.81)],
        "hardly above": [found("cat", 0.9, 0.99), found("cat", 0.9, 0.99) | {near: 0.27}],
        "another": [found("cat", 0.9, 0.99, probability=0.49)],
        "quite another": [found("cat", 0.9, 0.99, probability=0.48), found("cat", 0.9, 0.99)],
    }
    for id, own in objects.items():
        sheet.add(Path("part"), row_of(id, "", status="ok", objects=own))
    assert list(sheet.near["cat"].ids)[:2] == ["hardly present", "hardly above"]
    contested = ["quite another", "another"]
    assert list(sheet.contested["cat"].ids) == (["hardly above"] if near == "probability" else []) + contested


def test_the_page_begins_with_the_least_confident_label(tmp_path):
    parts = Parts.claim(tmp_path, Manifest({}, ("cat", "dog", "owl")))
    objects = {"cat": [found("cat", 0.9, 0.9)] * 2, "dog": [found("dog", 0.9, 0.9, probability=0.2)]}
    part = parts.write("1", [row_of(id, "", status="ok", seconds=0, objects=own) for id, own in objects.items()])
    sheet = Sheet(parts.manifest, 4)
    page = sheet.write(parts, summarize(parts, sheet.add)).decode()
    assert part.exists() and re.findall("<h2>(.*?)</h2>", page) == ["dog", "cat"]
    assert re.findall("<h3>(.*?)</h3>", page) == ["Nearest to the thresholds"] * 2


def test_with_many_labels_the_page_has_fewer_of_each():
    assert [Sheet(Manifest({}, tuple(map(str, range(count)))), 8).empty.count for count in (1, 150, 400, 5000)] == [
        8,
        8,
        3,
        1,
    ]


def test_a_sample_without_masks_shows_its_boxes():
    picture = Image.new("RGB", (2 * SIDE, SIDE))
    plain, drawn = draw(picture, []), draw(picture, [{"rle": None, "xyxy": [100, 50, 300, 200]}])
    assert plain.size == (SIDE, SIDE // 2)
    pixels, factor = np.asarray(drawn), drawn.width / plain.width
    marked = (pixels != pixels[0, 0]).any(axis=2)
    columns, rows = (np.nonzero(marked.any(axis=axis))[0] / factor for axis in (0, 1))
    assert [columns[0], rows[0], columns[-1], rows[-1]] == pytest.approx([50, 25, 150, 100], abs=3)


def test_errors_by_kind():
    assert (
        kind_of("'a/it\\'s.jpg' is empty (0 bytes)") == kind_of("'b.jpg' is empty (0 bytes)") == "… is empty (n bytes)"
    )
    assert kind_of("it starts with b'\\x00ab'") == kind_of('it starts with b"x\'"') == "it starts with …"


@pytest.fixture
def hangup() -> Iterator[Callable[[Any], Any]]:
    """Sets what the process does with SIGHUP."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_goes_away_stops_a_run_cleanly(hangup):
    hangup(signal.SIG_DFL)
    told = []
    with control.stopping(told.append) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.event.is_set() and stop.signal == signal.SIGHUP
        assert len(told) == 1 and told[0].startswith("SIGHUP: ")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL, "a third one ends it whatever still runs"
    with control.stopping(told.append):
        pass
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


@contextmanager
def printing(path: Path) -> Iterator[None]:
    """A file in place of what the process prints to."""
    with path.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def test_nothing_is_printed_once_the_terminal_is_gone(hangup, tmp_path):
    def gone(text: str) -> None:
        raise OSError

    hangup(signal.SIG_DFL)
    with printing(tmp_path / "terminal"), control.stopping(gone) as stop:
        signal.raise_signal(signal.SIGHUP)
        print("more", flush=True)
    assert stop.event.is_set() and (tmp_path / "terminal").read_text() == ""


def test_output_is_flushed_when_a_process_leaves(tmp_path, monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    with printing(tmp_path / "terminal"):
        print("more")
        control.leave(signal.SIGINT)
        assert (codes, (tmp_path / "terminal").read_text()) == ([130], "more\n")


def test_ignored_signals_stay_ignored(hangup):
    """As by nohup."""
    hangup(signal.SIG_IGN)
    with control.stopping(print) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal is None


def test_the_summary_fits_a_terminal_of_80_columns(place, tiny, monkeypatch):
    """Also with a label that is long; a label that no image has is crossed out."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    prompts = ("-p", "cat", "-p", "dog " * 40, "--presence", "0")
    lines = label(tiny, *prompts).stdout.splitlines()
    table = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in lines if any(side in line for side in "┏│└")]
    assert table and max(map(len, table)) <= 80
    absent = label(tiny, *prompts[:-1], "1", "--out", "other").stdout
    assert "\x1b[2;9mcat" in absent and "\x1b[2;9mcat" not in "\n".join(lines)


def test_a_model_that_is_not_for_photographs_warns_once_and_in_the_files(place):
    """On stderr, in the manifest and on the page; again in each summary."""
    arguments = ["label", "in", "--out", "out", "--model", "embedded", "--device", "cpu", "-p", "cat"]
    result = CliRunner().invoke(cli.app, arguments)
    [warning] = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "not photographs" in warning
    assert json.loads(Path("out/_manifest.json").read_text())["warnings"] == [warning.removeprefix("warning: ")]
    assert "not photographs" in Path("out/_samples.html").read_text()
    assert warning in CliRunner().invoke(cli.app, ["summary", "out"]).stderr
