"""The paper's tables and figures: rows that are what they say, one pass over the data, reports that can be read."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from open_gem import METHODS, cli, towers
from open_gem.data import Points, Sample, SceneSample, Segmentation, scenes
from open_gem.errors import ImageError, InputError, WeightsError
from open_gem.evaluation.metrics.contrast import object_contrast, patch_similarity, text_contrast, to_grid
from open_gem.evaluation.protocol import PROTOCOLS, EvalProtocol, Variant
from open_gem.evaluation.run import evaluate
from open_gem.evaluation.tasks import Estimate, differences, scores
from open_gem.method.steps import Scga
from open_gem.paper.figures import plot
from open_gem.paper.measuring import Outcome, jobs, reproduce, union
from open_gem.paper.numbers import MODELS, TABLES
from open_gem.paper.qualitative import failures
from open_gem.paper.rendering import curves, markdown
from open_gem.paper.rows import EXPERIMENTS
from open_gem.paper.runs import Run, Scores
from open_gem.refine.fgs import Fgs
from open_gem.text import Vocabulary

GEM = METHODS["gem"]


@pytest.mark.parametrize("layers", [6, 12, 24])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_rows_fit_the_model_and_curves_use_only_existing_rows(name, layers):
    experiment = EXPERIMENTS[name]
    rows = experiment.rows(layers)
    assert len(rows) > 1
    methods = {name: row.method if isinstance(row, Variant) else row for name, row in rows.items()}
    assert all(method.depth <= layers for method in methods.values())
    points = [point for drawn in experiment.plots for curve in drawn.curves(layers).values() for point in curve]
    assert all(point.row in rows for point in points)
    for point in points:
        if point.block is not None and not methods[point.row].is_host:
            assert layers - methods[point.row].depth < point.block <= layers


@pytest.mark.parametrize("name", TABLES)
def test_the_papers_values_belong_to_existing_rows_and_models(name):
    experiment = EXPERIMENTS[name]
    assert TABLES[name].keys() <= set(experiment.models)
    for model, rows in TABLES[name].items():
        assert rows.keys() <= ({"as trained"} if model == "GroupViT" else experiment.rows(12).keys())


def test_table_1_is_projections_with_and_without_normalisation():
    rows = EXPERIMENTS["table1"].rows(12)
    assert rows["CLIP"] == METHODS["clip"].fitted(12)
    assert rows["value, raw"] == METHODS["clip_surgery"].replace(depth=4)
    assert rows["qkv, norm, K = 1"] == GEM.replace(depth=4)
    assert rows["key, norm, K = 0"] == GEM.replace(projections="k", iterations=0, depth=4)


def test_table_5_is_depth_with_and_without_mlps():
    rows = EXPERIMENTS["table5"].rows(12)
    assert len(rows) == 22
    assert rows["6 blocks"] == GEM
    assert rows["11 blocks, MLP"] == GEM.replace(depth=11, mlp=True)
    assert TABLES["table5"]["CLIP ViT-B/16"]["4 blocks"]["voc2012"] == 45.5
    assert TABLES["table5"]["CLIP ViT-B/32"]["1 block, MLP"]["voc2012"] == 4.3


def test_rows_that_experiments_share_are_computed_once():
    names = list(EXPERIMENTS)
    together = union(names, 12)
    assert len(set(together.values())) == len(together)
    asked = [method for name in names for method in EXPERIMENTS[name].rows(12).values()]
    assert set(together.values()) == set(asked)
    assert len(asked) > len(together)
    assert union(names[::-1], 12) == together and list(union(names[::-1], 12)) == list(together)


def test_there_is_one_job_for_each_model_and_split():
    every = list(EXPERIMENTS)
    assert jobs(every, True, ("held-out",), None) == [(None, None, tuple(every))]
    on_voc = {job[:2]: job.experiments for job in jobs(every, False, ("val", "train"), None)}
    assert on_voc["CLIP ViT-B/16", "train"] == ("figure3",)
    assert on_voc["CLIP ViT-B/16", "val"] == tuple(name for name in every if name != "figure3")
    assert on_voc["CLIP ViT-B/32", "val"] == ("table4", "table5", "figure5")
    assert on_voc["GroupViT", "val"] == ("table3",)
    assert {model for model, _ in on_voc} == set(MODELS)
    assert {job.split for job in jobs(every, False, ("val", "train"), "val")} == {"val"}


def test_one_pass_gives_the_same_as_each_row_by_itself(tiny_localizer, tmp_path, monkeypatch):
    data, protocol = scenes(range(3), 64), PROTOCOLS["paper"]
    passes = []
    embed = tiny_localizer.backbone.vision.embed
    monkeypatch.setattr(tiny_localizer.backbone.vision, "embed", lambda pixels: passes.append(1) or embed(pixels))
    found = reproduce(["table1", "table3"], tiny_localizer, data, tmp_path, protocol=protocol).rows
    assert len(passes) == 1
    assert list(found["table3"]) == list(EXPERIMENTS["table3"].rows(6))
    alone = evaluate(tiny_localizer, {"it": EXPERIMENTS["table1"].rows(6)["key, raw"]}, data, protocol)["it"]
    assert found["table1"]["key, raw"] == scores(alone)
    reproduce(["table1", "table3"], tiny_localizer, data, tmp_path, protocol=protocol)
    assert len(passes) == 2  # the line above; the counts are kept


def test_unreadable_images_are_reported(tiny_localizer, tmp_path, monkeypatch):
    def broken(sample: Any) -> Any:
        raise ImageError(f"cannot read {sample.id}")

    data, read = scenes(range(3), 64), Sample.read_image
    monkeypatch.setattr(Sample, "read_image", lambda self: broken(self) if self.id == "scene-1" else read(self))
    found = reproduce(["table3"], tiny_localizer, data, tmp_path)
    assert (found.run.images, found.run.total) == (2, 3)
    assert found.run.failed == {"scene-1": "cannot read scene-1"}
    assert found.rows["table3"]["GEM"]["pointing_game"].value >= 0
    monkeypatch.setattr(Sample, "read_image", broken)
    with pytest.raises(InputError, match="none of 3 images of scenes could be read: cannot read scene"):
        reproduce(["table3"], tiny_localizer, data, tmp_path / "other")


def test_the_analysis_equals_the_metrics(tiny_localizer):
    """Of the objects' own masks against all that is not in them: in the joint space, and after each block."""
    data, methods = scenes(range(2), 64), {"gem": GEM, "clip": METHODS["clip"]}
    counts = evaluate(tiny_localizer, methods, data, EvalProtocol(), analysed=["gem"])
    assert not any("contrast" in what or "similarity" in what for what in counts["clip"])
    found = scores(counts["gem"])
    for sample in data:
        assert isinstance(sample, SceneSample)
        features = tiny_localizer.encode(sample.read_image(), methods, trace=["gem"])["gem"]
        visible = [sample.labels() == data.classes.index(name) for name in sample.scene.names]
        pairs = [(name, mask) for name, mask in zip(sample.scene.names, visible, strict=True) if mask.any()]
        sides = to_grid(torch.stack([torch.from_numpy(mask) for _, mask in pairs]), features.grid)
        text = tiny_localizer.text([name for name, _ in pairs])
        streams = {f"@{block}": tokens[0, 1:] for block, tokens in features.trace.items()}
        assert list(streams) == [f"@{block}" for block in range(1, 7)]
        for at, patches in {"": features.patches[0], **streams}.items():
            joint = tiny_localizer.backbone.vision.project(patches) if at else patches
            expected = {
                "patch_similarity": [patch_similarity(patches).item()],
                "object_contrast": object_contrast(patches, sides).tolist(),
                "text_contrast": text_contrast(joint, text, sides).tolist(),
            }
            for what, values in expected.items():
                usable = [value for value in values if value == value]
                row: Any = counts["gem"][what + at].rows[sample.id]
                total, count = row.get(0, (0, 0))
                assert count == len(usable)
                assert total == pytest.approx(sum(usable), abs=1e-5)
                assert what + at in found


@pytest.mark.parametrize("background", [None, 0])
def test_void_is_not_outside_of_masks_if_the_data_set_has_a_background(background, tiny_localizer):
    labels = np.full((64, 64), 255, dtype=np.uint8)
    labels[:32, :32], labels[32:] = 1, 0
    classes = ("background", "cat") if background == 0 else ("dog", "cat")
    sample = Sample("a", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), labels)
    names = Vocabulary.of(["cat"] if background == 0 else ["dog", "cat"])
    data = Segmentation("two", "val", classes, background, {"own": names}, [sample])
    counts = evaluate(tiny_localizer, {"gem": GEM}, data, EvalProtocol(), analysed=["gem"])["gem"]
    features = tiny_localizer.encode(sample.read_image())
    masks = torch.from_numpy(np.stack([labels == one for one in ((1,) if background == 0 else (0, 1))]))
    void = torch.from_numpy(labels == 255)
    kept, dropped = to_grid(masks, features.grid), to_grid(masks, features.grid, void)
    expected = dropped if background == 0 else kept
    row: Any = counts["object_contrast"].rows["a"]
    assert row[0][0] == pytest.approx(object_contrast(features.patches[0], expected).sum().item(), abs=1e-6)
    assert not torch.equal(dropped.outside, kept.outside)


def test_an_image_without_classes_has_no_contrast(tiny_localizer):
    sample = Sample("a", np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8))
    data = Segmentation("two", "val", ("dog", "cat"), None, {"own": Vocabulary.of(["dog", "cat"])}, [sample])
    counts = evaluate(tiny_localizer, {"gem": GEM}, data, EvalProtocol(), analysed=["gem"])["gem"]
    assert {what.partition("@")[0] for what in counts} == {"pixels", "boundaries", "patch_similarity"}


ESTIMATE = Estimate(0.461, 0.45, 0.47)
GEM_ROW = {"GEM": {"mean_iou": ESTIMATE}}


def an_outcome(rows: Mapping[str, Scores], label: str = "CLIP ViT-B/16", images: int = 9, **setting: str) -> Outcome:
    """Of a run over PascalVOC with the paper's model and protocol, or of another `setting`."""
    settings: dict[str, Any] = {"dataset": "voc2012", "split": "val", "model": "ViT-B-16, openai"} | setting
    settings["protocol"] = {"name": setting.get("protocol", "paper")}
    return Outcome(label, 12, Run("run", settings, images, {}, 9, {}), rows)


def test_a_table_has_intervals_and_the_papers_values():
    rows = {"table3": {**GEM_ROW, "GEM, K = 2": {"mean_iou": ESTIMATE}}}
    text = markdown("table3", [an_outcome(rows)])
    assert "## Table 3" in text
    assert "| GEM | 46.1 [45.0, 47.0] | 46.2 (-0.1) |" in text
    assert "| GEM, K = 2 | 46.1 [45.0, 47.0] |  |" in text
    assert "| PACL (quoted by the paper, not measured) |  | 72.3 |" in text
    others: list[dict[str, Any]] = [{"images": 8}, {"model": "embedded"}, {"split": "train"}, {"protocol": "field"}]
    for other in [*others, {"dataset": "scenes"}]:
        assert "46.2" not in markdown("table3", [an_outcome(rows, **other)])
    assert "paper" not in markdown("table3", [an_outcome(rows, dataset="scenes")])


def test_additions_are_rows_of_the_tables_of_steps_rules_and_refinements():
    rows = EXPERIMENTS["additions"].rows(6)
    gem = METHODS["gem"].fitted(6)
    assert rows["gem"] == gem
    assert rows["gem + scga"] == gem.replace(steps=(Scga(),))
    assert rows["gem + absent: denoise"] == Variant(gem, absent="denoise")
    assert rows["gem + fgs"] == Variant(gem, refinement=Fgs())
    assert rows["gem + absent: presence + fgs"] == Variant(gem, "presence", Fgs())


def test_rows_that_add_to_another_have_the_change_with_its_paired_interval(tiny_localizer, tmp_path, monkeypatch):
    every = EXPERIMENTS["additions"].rows(6)
    few = {row: every[row] for row in ("gem", "gem + fgs")}
    monkeypatch.setitem(EXPERIMENTS, "additions", replace(EXPERIMENTS["additions"], rows=lambda layers: few))
    data = scenes(range(2), 64)
    outcome = reproduce(["additions"], tiny_localizer, data, tmp_path)
    refined, plain = (
        evaluate(tiny_localizer, {"it": few["gem"]}, data, replace(PROTOCOLS["paper"], refinement=own))["it"]
        for own in (Fgs(), None)
    )
    assert outcome.rows["additions"] == {"gem": scores(plain), "gem + fgs": scores(refined)}
    assert outcome.changes["additions"] == {"gem + fgs": differences(refined, plain)}
    change = outcome.changes["additions"]["gem + fgs"]["mask_iou"]
    text = markdown("additions", [outcome])
    low, high = (f"{100 * number:+.1f}" for number in (change.low, change.high))
    assert f"{100 * change.value:+.1f} [{low}, {high}]" in text
    assert "## Additions: " in text


def test_models_are_listed_below_each_other():
    rows = {"table3": {"as trained": {"mean_iou": ESTIMATE}}}
    trained = an_outcome(rows, "GroupViT", model="nvidia/groupvit-gcc-yfcc")
    text = markdown("table3", [an_outcome({"table3": GEM_ROW}), trained])
    assert "| CLIP ViT-B/16 · GEM | 46.1 [45.0, 47.0] | 46.2 (-0.1) |" in text
    assert "| GroupViT · as trained | 46.1 [45.0, 47.0] | 42.8 (+3.3) |" in text


def test_seeds_are_merged_into_mean_and_deviation():
    rows = {f"k-means, 3, seed {seed}": {"mean_iou": Estimate(0.4 + seed / 100, 0, 1)} for seed in range(3)}
    text = markdown("table2", [an_outcome({"table2": GEM_ROW | rows})])
    assert "| k-means, 3 (3 seeds) | 41.0 ± 1.0 |" in text
    assert "seed 0" not in text


def test_a_table_without_scores_says_so():
    text = markdown("figure3", [an_outcome({"figure3": {"CLIP": {}}}, dataset="openimages")])
    assert "openimages has no scores of the kind that this needs: patch similarity" in text


def test_figures_have_plots_and_tables_do_not():
    estimate = {"mean_iou": Estimate(0.4, 0.3, 0.5)}
    rows = {"figure5": dict.fromkeys(EXPERIMENTS["figure5"].rows(12), estimate)}
    outcome = an_outcome(rows)
    [(file, picture)] = curves("figure5", [outcome, an_outcome(rows, "another")]).items()
    assert file == "figure5.mean_iou"
    assert isinstance(picture, Image.Image) and min(picture.size) > 300
    assert curves("table1", [outcome]) == {}


def test_figure_3_is_drawn_over_iterations_and_over_blocks(tiny_localizer, tmp_path):
    found = reproduce(["figure3"], tiny_localizer, scenes(range(2), 64), tmp_path)
    files = curves("figure3", [found])
    kinds = ("patch_similarity", "object_contrast", "text_contrast")
    assert set(files) == {f"figure3{over}.{kind}" for over in ("", ".blocks") for kind in kinds}


def test_no_curve_is_an_error():
    with pytest.raises(ValueError, match="no curve"):
        plot({})


@pytest.mark.slow
def test_reproduce_writes_a_report_and_resumes(tiny: str, tmp_path: Path):
    def call(*arguments: object):
        return CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments), "--model", tiny, "--out", str(tmp_path)])

    result = call("table3", "figure5", "--limit", 2, "-q")
    assert result.exit_code == 0, result.output
    report = (tmp_path / "report.md").read_text()
    assert "## Table 3" in report and "## Figure 5" in report
    assert "on scenes (held-out): 2 of 500 images" in report
    for file in ("figure5.mean_iou.png", "figure5.pointing_game.png"):
        assert f"]({file})" in report and (tmp_path / file).exists()
    assert call("table3", "figure5", "--limit", 2, "-q").exit_code == 0
    assert (tmp_path / "report.md").read_text() == report
    against = CliRunner().invoke(cli.app, ["report", str(tmp_path / "runs"), "--against", "gem"])  # no hashes
    assert {"clip − gem", "gem, temperature_scale 0.5 − gem"} <= set(re.findall(r"\| ([^|]* − gem) \|", against.stdout))
    planned = call("all", "--plan", "--limit", 2)
    assert planned.exit_code == 0
    assert "methods from one pass over 2 images" in " ".join(planned.stdout.split())
    wrong = call("tabel3")
    assert wrong.exit_code == 2
    assert "did you mean table3" in wrong.stderr


@pytest.mark.slow
def test_figures_without_numbers_are_drawn(tiny: str, tmp_path: Path):
    arguments = ["reproduce", "figure2", "figure8", "figure9", "--model", tiny, "--out", str(tmp_path), "-q"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    report = (tmp_path / "report.md").read_text()
    for name in ("figure2", "figure8", "figure9"):
        assert f"]({name}.png)" in report
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300
    assert not (tmp_path / "runs").exists()


def test_failures_are_the_classes_that_fit_worst(tiny_localizer, monkeypatch):
    drawn: list[str] = []

    def keep(picture: Image.Image, heatmap: Any, caption: str) -> Image.Image:
        drawn.append(caption)
        return picture

    monkeypatch.setattr("open_gem.paper.qualitative.overlay", keep)
    data = scenes(range(6), 64)
    failures(tiny_localizer, data, PROTOCOLS["paper"])
    given = [caption for caption in drawn if caption.startswith("gem")]
    fits = []
    for sample in data:
        assert isinstance(sample, SceneSample)
        found = tiny_localizer(sample.read_image(), sample.scene.names)
        for name, mask in zip(found.labels, found.masks(), strict=True):
            truth = torch.from_numpy(sample.labels() == data.classes.index(name))
            fits.append(((mask & truth).sum() / (mask | truth).sum()).item())
    assert [float(caption[-4:]) for caption in given] == pytest.approx(sorted(fits)[: len(given)], abs=0.006)


def a_voc(root: Path, count: int) -> None:
    """A data set in the exact layout of PascalVOC, of random pictures."""
    random, home = np.random.default_rng(0), root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    ids = [f"2007_{index:06d}" for index in range(count)]
    for one in ids:
        Image.fromarray(random.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(home / f"JPEGImages/{one}.jpg")
        labels = random.choice([0, 1, 2, 255], (50, 70)).astype(np.uint8)
        Image.fromarray(labels).save(home / f"SegmentationClass/{one}.png")
    for split in ("train", "val"):
        (home / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{one}\n" for one in ids))


def test_the_papers_models_are_measured_and_unavailable_ones_are_named(tiny, tmp_path, monkeypatch):
    """Real data, no --model: every model of the paper, on the split the paper has for it."""
    a_voc(tmp_path, 2)
    real = towers.load

    def load(name: str, pretrained: str | None = None, **where: Any) -> Any:
        if name == "ViT-B-16":
            return real(tiny, **where)
        raise WeightsError(f"cannot load {name}: no network")

    monkeypatch.setattr("open_gem.towers.load", load)
    monkeypatch.setattr("open_gem.trained.registry.is_trained", lambda name: False)
    out = tmp_path / "out"
    arguments = [
        "table4",
        "figure3",
        "figure4",
        "--dataset",
        "voc2012",
        "--data-root",
        str(tmp_path),
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(cli.app, ["reproduce", *arguments, "-q"])
    assert result.exit_code == 1, result.output
    assert "error: CLIP ViT-B/32: cannot load ViT-B-32: no network" in result.stderr
    report = (out / "report.md").read_text()
    assert "* CLIP ViT-B/16 on voc2012 (val): 2 of 2 images" in report
    assert "* CLIP ViT-B/16 on voc2012 (train): 2 of 2 images" in report
    assert "| OpenCLIP ViT-B/16 · GEM |" in report
    assert "figure3.blocks.text_contrast.png" in report and (out / "figure4.png").exists()
    planned = CliRunner().invoke(cli.app, ["reproduce", *arguments, "--plan"])
    assert "table4: cannot be run with CLIP ViT-L/14" in " ".join(planned.stdout.split())


def test_a_figure_that_the_data_does_not_support_is_named(tiny, tmp_path, monkeypatch):
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    values = np.full((1, 2), 0.5), np.array([0], dtype=np.int32), np.array([True])
    data = Points("openimages", "val", ("cat",), ("a",), (tmp_path / "a.png",), np.array([0, 1]), *values, (), {})
    monkeypatch.setattr("open_gem.data.open_dataset", lambda *where: data)
    arguments = [
        "reproduce",
        "figure3",
        "--dataset",
        "openimages",
        "--model",
        tiny,
        "--out",
        str(tmp_path / "out"),
        "-q",
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert "figure3 needs the class of each pixel, which openimages does not know" in result.stderr
