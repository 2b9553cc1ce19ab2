"""Reports: every run with its settings, the best method first, the paper's values where they compare."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from open_gem import METHODS
from open_gem.data import scenes
from open_gem.errors import InputError
from open_gem.evaluation.metrics.intervals import bootstrap_difference
from open_gem.evaluation.metrics.scores import mean_iou
from open_gem.evaluation.protocol import PROTOCOLS
from open_gem.evaluation.store import Store, run, settings_of
from open_gem.evaluation.tasks import SCORES, Estimate
from open_gem.files import to_json
from open_gem.paper import numbers
from open_gem.paper.report import render, tables
from open_gem.paper.runs import LABELS, Run, collect, read_run
from open_gem.trained.localizer import TRAINED

PAPER = PROTOCOLS["paper"]
SHORT = replace(PAPER, size="short:32")
METHODS_OF_RUN = {name: METHODS[name] for name in ("clip", "maskclip")}
PARTS = ("", " low", " high", " paper")  # columns of a score in CSV
ESTIMATE = Estimate(0.47, 0.45, 0.49)


def stored(place, localizer, methods, protocol=SHORT, images: int = 3) -> Store:
    """A run on scenes, below `place`."""
    data = scenes(range(images), 64)
    store = Store.at(place, settings_of(localizer, methods, data, protocol))
    run(store, localizer, methods, data, protocol)
    return store


def a_run(scores: dict[str, dict[str, Estimate]] | None = None, **changed: Any) -> Run:
    """A run over all of PascalVOC with the paper's model, method and protocol, or a changed one."""
    scores = {"gem": {"mean_iou": ESTIMATE}} if scores is None else scores
    usual = json.loads(to_json({name: METHODS[name].describe() for name in scores if name in METHODS}))
    settings = {
        "dataset": "voc2012",
        "split": "val",
        "model": "ViT-B-16, openai",
        "size_rule": "short:448",
        "protocol": {"name": "paper", "background": {"": 0.8}, "threshold": 0.5},
        "methods": {method: {} for method in scores} | usual,
    }
    fields = {name: changed.pop(name) for name in ("images", "failed", "total", "against") if name in changed}
    if "protocol" in changed:
        changed["protocol"] = settings["protocol"] | {"name": changed["protocol"]}
    return replace(Run("run", settings | changed, 1449, {}, 1449, scores), **fields)


def test_every_score_has_a_name_that_people_know():
    assert LABELS.keys() == {name for kind in SCORES.values() for name in kind}


@pytest.mark.parametrize("format", ["markdown", "html", "csv"])
def test_reports_have_every_run(format, tiny_localizer, tmp_path):
    for protocol in (PAPER, PROTOCOLS["official"]):
        stored(tmp_path, tiny_localizer, METHODS_OF_RUN, replace(protocol, size="short:32"))
    text = render(collect(tmp_path), format)
    assert text.count("maskclip") == 2
    assert "3 of 3" in text
    assert "pointing_game" in text if format == "csv" else "pointing game" in text
    assert [run.folder for run in collect(tmp_path)] == sorted(path.name for path in tmp_path.iterdir())
    for against in (None, "gem"):
        with pytest.raises(InputError, match="no runs in"):
            collect(tmp_path / "nothing", against)


def test_an_unknown_format_is_refused():
    with pytest.raises(InputError, match="pdf"):
        render([], "pdf")


def test_the_best_method_and_the_most_important_score_come_first():
    nan = float("nan")
    poor, good, none = (Estimate(value, 0, 1) for value in (0.2, 0.6, nan))
    run = a_run(
        {
            "clip": {"boundary_iou": good, "mean_iou": poor},
            "kk": {"mean_iou": none},
            "gem": {"mean_iou": good, "top1": poor},
        }
    )
    [table] = tables([run])
    assert table.head == ["method", "mIoU", "paper", "boundary IoU", "top-1"]
    assert [name for name, _ in table.rows] == ["gem", "clip", "kk"]
    assert [str(cell) for cell in table.rows[1][1]] == ["20.0 [0.0, 100.0]", "10.4 (+9.6)", "60.0 [0.0, 100.0]", ""]
    better = a_run({"gem": {"mean_iou": Estimate(0.7, 0, 1)}}, protocol="field")
    assert [table.about["protocol"] for table in tables([run, better])] == ["field", "paper"]


def test_a_table_says_what_decides_its_numbers():
    [table] = tables([a_run(template="a photo of a {}.", images=3, total=5, failed={"a": "broken"})])
    assert table.title == "voc2012 val: ViT-B-16, openai"
    assert table.about == {
        "images": "3 of 5, 1 failed",
        "protocol": "paper",
        "image size": "short:448",
        "template": "'a photo of a {}.'",
        "background threshold": "0.8",
        "run": "run",
    }
    scenes_run = a_run({"gem": {"mask_iou": ESTIMATE}}, dataset="scenes")
    assert tables([scenes_run])[0].about["mask threshold"] == "0.5"


def test_differences_to_a_method(tiny_localizer, tmp_path):
    """Beside runs that do not have it, and against the same by hand."""
    store = stored(tmp_path, tiny_localizer, METHODS_OF_RUN)
    name, other = METHODS_OF_RUN
    rows = store.read().counts()
    stored(tmp_path, tiny_localizer, {name: METHODS_OF_RUN[name]})
    [run] = collect(tmp_path, against=other)
    assert (list(run.scores), run.against, run.images) == ([name], other, 3)
    assert run.scores[name].keys() == read_run(store).scores[name].keys()
    mine, theirs = rows[name]["pixels"], rows[other]["pixels"]
    estimate = run.scores[name]["mean_iou"]
    assert estimate == (
        mine.value(mean_iou) - theirs.value(mean_iou),
        *bootstrap_difference(mine, theirs, mean_iou),
    )
    text = render([run])
    assert f"| {name} − {other} | {100 * estimate.value:+.1f} [" in text
    [row] = csv.DictReader(io.StringIO(render([run], "csv")))
    assert (row["method"], row["against"]) == (name, other)
    with pytest.raises(InputError, match=rf"no run has method '{other}x' \(did you mean {other}\?\), expected one of"):
        collect(tmp_path, against=other + "x")


def test_a_difference_to_a_tuned_method_says_so(tiny_localizer, tmp_path):
    methods = {"clip": METHODS["clip"], "gem": METHODS["gem"].replace(temperature_scale=0.5)}
    store = stored(tmp_path, tiny_localizer, methods, images=2)
    assert "| clip − gem (tuned) |" in render(collect(tmp_path, against="gem"))
    assert "| gem (tuned) − clip |" in render(collect(tmp_path, against="clip"))
    assert all("against" not in document for document in read_run(store).documents())


@pytest.mark.parametrize(
    ("method", "value"), [("clip", 10.4), ("maskclip", 28.6), ("clip_surgery", 41.2), (TRAINED, 42.8)]
)
def test_the_papers_value_belongs_to_the_method(method, value):
    model = "nvidia/groupvit-gcc-yfcc" if method == TRAINED else "ViT-B-16, openai"
    assert f"| {value} (" in render([a_run({method: {"mean_iou": ESTIMATE}}, model=model)])


def test_names_are_quoted_as_a_format_needs():
    run = replace(a_run({"gem": {"top1": ESTIMATE, "text_contrast@7": ESTIMATE}}, model="<a|b>"), folder="x")
    assert "| gem | 47.0 [45.0, 49.0] |\n" in render([run])  # scores of single blocks are not shown
    assert "## voc2012 val: <a|b>\n" in render([run])
    assert "<h2>voc2012 val: &lt;a|b&gt;</h2>" in render([run], "html")
    against = replace(run, against="clip", scores={"gem": {"top1": Estimate(-0.125, -0.25, -0.0001)}})
    assert "| gem − clip | -12.5 [-25.0, +0.0] |" in render([against])


def test_csv_has_full_precision():
    other = a_run({"clip": {"top1": Estimate(1 / 3, 0.25, 0.75)}}, dataset="scenes", images=3, total=5)
    text = render([a_run(), other], "csv")
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0][7:] == ["method", "against", *(f"{n}{p}" for n in ("mean_iou", "top1") for p in PARTS)]
    assert rows[1][7:] == ["gem", "", "0.47", "0.45", "0.49", "0.462", "", "", "", ""]
    assert rows[2][7:] == ["clip", "", "", "", "", "", repr(1 / 3), "0.25", "0.75", ""]
    assert "\r" not in text


def test_the_papers_value_is_shown_for_the_same_setting():
    assert "| gem | 47.0 [45.0, 49.0] | 46.2 (+0.8) |" in render([a_run()])


@pytest.mark.parametrize(
    "other",
    [
        {"model": "embedded"},
        {"protocol": "field"},
        {"protocol": "own"},
        {"split": "train"},
        {"images": 1448},
        {"methods": {"gem": {"temperature_scale": 0.5}}},
        {"against": "clip"},
    ],
)
def test_the_papers_value_is_not_shown_for_other_settings(other):
    assert "46.2" not in render([a_run(**other)])


def test_the_papers_models_are_recognised_by_their_names_in_runs():
    assert numbers.label_of("ViT-B-16, openai") == numbers.label_of("openai/clip-vit-base-patch16") == numbers.B16
    assert numbers.label_of("embedded") is None
    assert numbers.value("table4", "ViT-L-14, openai", "GEM", "context59", "val", "official") == 28.6


def test_a_score_without_a_value_is_null():
    run = a_run({"gem": {"mean_iou": Estimate(*[float("nan")] * 3)}})
    assert "nothing counted" in render([run])
    [document] = run.documents()
    assert json.dumps(document, allow_nan=False).count("null") == 3
