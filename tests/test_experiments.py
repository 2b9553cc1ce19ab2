"""The paper's tables and figures: rows that are what they say, one pass over the data, reports that can be read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from open_gem import PATHWAYS, cli
from open_gem.datasets import Sample, scenes
from open_gem.errors import ImageError
from open_gem.evaluate import Estimate, evaluate, scores
from open_gem.experiments import EXPERIMENTS, curves, markdown, reproduce, union
from open_gem.figures import plot
from open_gem.metrics import object_contrast, patch_similarity, text_contrast, to_grid
from open_gem.protocols import PROTOCOLS, Protocol

GEM = PATHWAYS["gem"]


@pytest.mark.parametrize("layers", [6, 12, 24])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_rows_fit_the_model_and_curves_are_made_of_them(name, layers):
    experiment = EXPERIMENTS[name]
    rows = experiment.rows(layers)
    assert len(rows) > 1
    assert all(pathway.depth <= layers for pathway in rows.values())
    series = experiment.sweep(layers) if experiment.sweep else {}
    assert all(row in rows for points in series.values() for _, row in points)
    if layers == 12:  # the model of the paper's values
        assert experiment.paper.keys() <= rows.keys()


def test_table_1_is_projections_with_and_without_normalisation():
    rows = EXPERIMENTS["table1"].rows(12)
    assert rows["CLIP"].is_host
    assert rows["value, raw"] == replace(PATHWAYS["clip_surgery"], depth=4)
    assert rows["qkv, norm, K = 1"] == replace(GEM, depth=4)
    assert rows["key, norm, K = 0"] == replace(GEM, projections="k", iterations=0, depth=4)


def test_table_5_is_depth_with_and_without_mlps():
    rows = EXPERIMENTS["table5"].rows(12)
    assert len(rows) == 22
    assert rows["6 blocks"] == GEM
    assert rows["11 blocks, MLP"] == replace(GEM, depth=11, mlp=True)
    assert EXPERIMENTS["table5"].paper["4 blocks"]["voc2012"] == 45.5
    assert EXPERIMENTS["table5"].paper["1 block, MLP"]["voc2012"] == 26.2


def test_rows_that_experiments_share_are_read_once():
    names = list(EXPERIMENTS)
    together = union(names, 12)
    assert len(set(together.values())) == len(together)
    asked = [pathway for name in names for pathway in EXPERIMENTS[name].rows(12).values()]
    assert set(together.values()) == set(asked)
    assert len(asked) > len(together)


def test_reproduce_is_each_row_by_itself_from_one_pass(tiny_localizer, tmp_path, monkeypatch):
    data, protocol = scenes(range(3), 64), PROTOCOLS["paper"]
    passes = []
    embed = type(tiny_localizer.backbone).embed
    monkeypatch.setattr(
        type(tiny_localizer.backbone), "embed", lambda self, pixels: passes.append(1) or embed(self, pixels)
    )
    found = reproduce(["table1", "table3"], tiny_localizer, data, tmp_path, protocol=protocol)
    assert len(passes) == 1
    assert list(found["table3"]) == list(EXPERIMENTS["table3"].rows(6))
    alone = evaluate(tiny_localizer, {"it": EXPERIMENTS["table1"].rows(6)["key, raw"]}, data, protocol)["it"]
    assert found["table1"]["key, raw"] == scores(alone)
    reproduce(["table1", "table3"], tiny_localizer, data, tmp_path, protocol=protocol)
    assert len(passes) == 2  # the line above; the counts are kept


def test_pictures_that_cannot_be_read_are_told(tiny_localizer, tmp_path, monkeypatch):
    def broken(sample: Any) -> Any:
        raise ImageError(f"cannot read {sample.id}")

    data, picture = scenes(range(3), 64), Sample.picture
    monkeypatch.setattr(Sample, "picture", lambda self: broken(self) if self.id == "scene-1" else picture(self))
    with pytest.warns(UserWarning, match="1 images could not be read and do not count, scene-1"):
        found = reproduce(["table3"], tiny_localizer, data, tmp_path)
    assert found["table3"]["GEM"]["pointing_game"].value >= 0


def test_the_analysis_is_that_of_the_metrics(tiny_localizer):
    data = scenes(range(2), 64)
    counts = evaluate(tiny_localizer, {"gem": "gem"}, data, Protocol(analysis=True))["gem"]
    found = scores(counts)
    for sample in data:
        patches = tiny_localizer.encode(tiny_localizer.pixels(sample.picture())[None]).patches[0]
        labels = torch.from_numpy(sample.labels())
        present = [one for one in labels.unique().tolist() if one != 255]
        void = labels == 255 if len(present) > 1 else None
        grid = tiny_localizer.encode(tiny_localizer.pixels(sample.picture())[None]).grid
        sides = to_grid(torch.stack([labels == one for one in present]), grid, void)
        text = tiny_localizer.text([data.classes[one] for one in present])
        expected = {
            "alike": [patch_similarity(patches).item()],
            "parted": object_contrast(patches, sides).tolist(),
            "told": text_contrast(patches, text, sides).tolist(),
        }
        for what, values in expected.items():
            usable = [value for value in values if value == value]
            row: Any = counts[what].rows[sample.id]
            total, count = row.get(0, (0, 0))
            assert count == len(usable)
            assert total == pytest.approx(sum(usable), abs=1e-5)
    assert {"patch_similarity", "object_contrast", "text_contrast"} <= found.keys()


def test_a_table_has_intervals_and_the_papers_values():
    estimate = Estimate(0.461, 0.45, 0.47)
    text = markdown("table3", {"GEM": {"mean_iou": estimate}, "GEM, K = 2": {"mean_iou": estimate}}, "voc2012")
    assert "| GEM | 46.1 [45.0, 47.0] | 46.2 |" in text
    assert "| GEM, K = 2 | 46.1 [45.0, 47.0] |  |" in text
    assert "paper" not in markdown("table3", {"GEM": {"mean_iou": estimate}}, "scenes").split("\n\n")[1]


def test_figures_are_drawn_and_tables_are_not():
    estimate = {"mean_iou": Estimate(0.4, 0.3, 0.5)}
    found = dict.fromkeys(EXPERIMENTS["figure5"].rows(12), estimate)
    [(score, picture)] = curves("figure5", found, 12).items()
    assert score == "mean_iou"
    assert isinstance(picture, Image.Image) and min(picture.size) > 300
    assert curves("table1", {}, 12) == {}
    with pytest.raises(ValueError, match="no curve"):
        plot({})


def test_reproduce_makes_a_report_and_goes_on(tiny: str, tmp_path: Path):
    def call(*arguments: object):
        return CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments), "--model", tiny, "--out", str(tmp_path)])

    result = call("table3", "figure5", "--limit", 2, "-q")
    assert result.exit_code == 0, result.output
    report = (tmp_path / "report.md").read_text()
    assert "## Table3" in report and "## Figure5" in report
    for file in ("figure5.mean_iou.png", "figure5.pointing_game.png"):
        assert f"]({file})" in report and (tmp_path / file).exists()
    assert call("table3", "figure5", "--limit", 2, "-q").exit_code == 0
    assert (tmp_path / "report.md").read_text() == report
    planned = call("all", "--plan", "--limit", 2)
    assert planned.exit_code == 0
    assert "pathways from one pass over 2 images" in " ".join(planned.stdout.split())
    wrong = call("tabel3")
    assert wrong.exit_code == 2
    assert "did you mean table3" in wrong.stderr


def test_figures_without_numbers_are_drawn(tiny: str, tmp_path: Path):
    arguments = ["reproduce", "figure2", "figure9", "--model", tiny, "--out", str(tmp_path), "-q"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    report = (tmp_path / "report.md").read_text()
    for name in ("figure2", "figure9"):
        assert f"]({name}.png)" in report
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300
    assert not (tmp_path / "runs").exists()
