"""What measuring itself has to keep: turns, ratios, counts, memory of a fresh process, another interpreter."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from open_gem.bench import comparison, measuring, published
from open_gem.bench.cases import CASES, CEILING, GROUPS, PLAIN, TOGETHER, find_cases
from open_gem.bench.measuring import count_flops, interleave, measure
from open_gem.bench.memory import Memory, measure_memory, run_alone
from open_gem.bench.subject import Setting, Subject
from open_gem.cli import app
from open_gem.errors import InputError, UnsupportedModelError
from open_gem.method.table import METHODS


@pytest.fixture
def setting(tiny: str) -> Setting:
    return Setting(tiny, side=32, batch=2, prompts=3)


def call(*given: Any) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, given)])


def test_cases_take_turns_and_the_first_turn_is_dropped():
    order: list[str] = []
    times = iter(range(100))
    turns = {name: lambda name=name: order.append(name) or float(next(times)) for name in "ab"}
    assert interleave(turns, 2) == {"a": (2.0, 4.0), "b": (3.0, 5.0)}
    assert "".join(order) == "ababab"


def test_operations_are_counted_in_matrix_products():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert count_flops(lambda: (a @ b).exp() + 1) == 2 * 3 * 4 * 5


def test_every_case_is_measured_beside_the_plain_forward_pass(setting, monkeypatch):
    monkeypatch.setattr(measuring, "LARGE", 0)
    names = [name for name in CASES if name not in GROUPS["trained"]]
    costs = {cost.case: cost for cost in measure(setting, find_cases(names), repeats=1)}
    assert list(costs)[:2] == [CEILING, PLAIN]
    assert costs.keys() == set(names)
    assert costs[PLAIN].time_ratio == costs[PLAIN].flops_ratio == 1
    for cost in costs.values():
        assert len(cost.seconds) == 1 and cost.seconds[0] > 0
        assert cost.time_ratio == pytest.approx(cost.seconds[0] / costs[PLAIN].seconds[0])
        assert (cost.flops is None) == (cost.case in GROUPS["answers"])
    flops = {name: cost.flops for name, cost in costs.items() if cost.flops}
    assert flops["maskclip"] <= flops["clip"] <= flops[PLAIN] < flops["gem"] < flops[TOGETHER]
    assert costs["gem"].ceiling == pytest.approx(
        flops["gem"] / costs["gem"].seconds[0] / (flops[CEILING] / costs[CEILING].seconds[0])
    )


def test_small_models_have_no_ceiling(setting):
    assert {cost.ceiling for cost in measure(setting, find_cases(["gem"]), repeats=1)} == {None}


def test_work_grows_with_the_number_and_size_of_images(tiny):
    def flops(**change: Any) -> float:
        settings: dict[str, Any] = {"side": 32, "batch": 1, **change}
        costs = measure(Setting(tiny, **settings), find_cases(["gem"]), repeats=1)
        return next(cost.flops for cost in costs if cost.case == "gem")  # type: ignore[return-value]

    assert flops(batch=3) == 3 * flops()
    assert flops(side=64) > 4 * flops()


@pytest.mark.parametrize("name", ["clipseg", "groupvit", pytest.param("owlv2", marks=pytest.mark.slow)])
def test_trained_models_run_as_transformers_has_them(name, monkeypatch, setting):
    """Made tiny; what each is called with has to be accepted."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {**small, "num_hidden_layers": 1, "vocab_size": 1001, "bos_token_id": 0, "eos_token_id": 1000}
    config = {"clipseg": "CLIPSegConfig", "groupvit": "GroupViTConfig", "owlv2": "Owlv2Config"}[name]
    original = getattr(transformers, config)
    vision = {
        "clipseg": {**small, "num_hidden_layers": 10, "image_size": 352, "patch_size": 32},
        "groupvit": {},
        "owlv2": {**small, "num_hidden_layers": 1, "image_size": 768, "patch_size": 256},
    }[name]
    more = {
        "clipseg": {"reduce_dim": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 8},
        "groupvit": {},
        "owlv2": {"projection_dim": 16},
    }[name]
    text = {} if name == "groupvit" else text
    monkeypatch.setattr(transformers, config, lambda: original(text_config=text, vision_config=vision, **more))
    with torch.no_grad():
        CASES[name].make(Subject(setting))()


def test_trained_models_without_transformers_are_an_error(monkeypatch, setting):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "open_gem.trained.random", raising=False)
    with pytest.raises(UnsupportedModelError, match="transformers"):
        CASES["clipseg"].make(Subject(setting))


@pytest.mark.slow
def test_memory_is_measured_in_a_new_process(setting):
    held = [torch.zeros(100, 2**18)]  # 100 MiB of this process
    memory = measure_memory("gem", setting)
    assert 100 < memory.rest <= memory.peak < 4000
    assert memory.peak - memory.rest < 100
    del held


def test_a_failing_process_is_an_error():
    with pytest.raises(InputError, match="memory could not be measured: ValueError: no"):
        run_alone([sys.executable, "-c", "raise ValueError('no')"])


def test_unknown_cases_are_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown case 'jem'.*gem.*known: methods, answers, trained, matrix-product"):
        find_cases(["jem"])


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called `gem` in the published one's shape."""
    (tmp_path / "gem.py").write_text(
        "import torch\n"
        "class Visual(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        assert x.shape == (2, 3, 32, 32), x.shape\n"
        "        return x, x\n"
        "class Wrapper(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model = torch.nn.Module()\n"
        "        self.model.visual = Visual()\n"
        "def create_gem_model(model_name, pretrained, device):\n"
        "    assert (model_name, pretrained, device) == ('ViT-B-16', None, 'cpu')\n"
        "    return Wrapper()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_the_published_code_takes_its_turns_in_another_interpreter(stand_in):
    with published.published(sys.executable, "ViT-B-16", 32, 2, 1) as other:
        assert all(seconds > 0 for seconds in (other(), other()))
        assert other.rest > 0 and other.peak > 0
    assert other.process.returncode is not None


@pytest.mark.parametrize(
    ("interpreter", "words"),
    [("no-such-python", "could not be run"), (sys.executable, ": it said: .*No module named 'gem'")],
)
def test_an_interpreter_without_the_published_code_is_an_error(interpreter, words, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(InputError, match=words), published.published(interpreter, "ViT-B-16", 32, 1, 1) as other:
        other()


def test_the_command_prints_markdown_and_json(tiny, monkeypatch):
    monkeypatch.setattr("open_gem.bench.memory.measure_memory", lambda case, setting: Memory(10, setting.side))
    options = ("--model", tiny, "--side", "32,64", "--batch-size", 2, "--cases", "gem,texts", "--repeats", 1)
    result = call(*options, "--memory")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["case", CEILING, PLAIN, "gem", "texts"] * 2
    assert {len(row) for row in rows} == {10}
    assert [row[-2:] for row in rows[1:]] == [[" 32 ", " 22 "]] * 4 + [[" peak MiB ", " above the model "]] + [
        [" 64 ", " 54 "]
    ] * 4
    assert ", 64 px, 2 images at a time, 20 prompts, float32 on cpu" in result.stdout
    assert measuring.machine() in lines[-1]
    document = json.loads(call(*options, "--json").stdout)
    assert [run["setting"]["side"] for run in document["runs"]] == [32, 64]
    assert document["machine"] == measuring.machine()
    assert all(cost["peak"] is None and len(cost["seconds"]) == 1 for run in document["runs"] for cost in run["costs"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--side", "32,x"), "--side is '32,x', expected comma-separated whole numbers"),
        (("--cases", "jem"), "unknown case 'jem'"),
        (("--side", "33"), "33"),
        (("--against", "no-such-python"), "could not be run"),
        (("--batch-size", "0"), "--batch-size is '0', expected whole numbers from 1"),
    ],
)
def test_impossible_options_are_refused(options, words, tiny):
    result = call("--model", tiny, "--side", "32", "--repeats", 1, *options)
    assert result.exit_code == 2
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_model_whose_tokenizer_needs_a_network_is_an_error():
    result = call("--model", "openai/clip-vit-base-patch16", "--cases", "texts")
    assert result.exit_code == 2
    assert "expected one of open_clip" in result.stderr


def test_every_method_is_a_case():
    assert set(METHODS) < set(CASES)
    assert all(case.about for case in CASES.values())


# Runs on disk ---------------------------------------------------------------------------------------------------------


def run_of(**seconds: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    return {name.replace("_", "-"): times for name, times in seconds.items()}


def test_cases_are_compared_in_times_of_the_plain_pass_of_the_same_turn():
    earlier = run_of(plain=(1.0, 2.0, 1.0), gem=(1.0, 2.0, 1.25), gone=(1.0, 1.0, 1.0))
    later = run_of(plain=(4.0, 2.0), gem=(6.0, 4.0), new=(1.0, 1.0))  # a slower machine
    (change,) = comparison.compare(earlier, later)
    assert change == ("gem", 1.0, 1.75, 1.75, 1.5 / 1.25, 2.0)


def measured(monkeypatch, seconds: float) -> None:
    """Let every case take as long as the plain pass, GEM `seconds`."""

    def measure(setting: Setting, cases: Any, repeats: int, others: Any) -> list[measuring.Cost]:
        times = {name: seconds if name == "gem" else 1.0 for name in cases}
        return [measuring.Cost(name, (time,) * repeats, time) for name, time in times.items()]

    monkeypatch.setattr(measuring, "measure", measure)


def test_a_saved_run_shows_which_cases_have_become_slower(tmp_path, monkeypatch):
    file, options = tmp_path / "runs" / "run.json", ("--cases", "gem,clip", "--side", "32,64", "--repeats", 2)
    measured(monkeypatch, 1.0)
    assert call(*options, "--save", file).exit_code == 0
    assert comparison.read_run(file)["repeats"] == 2
    measured(monkeypatch, 1.05)
    same = call(*options, "--compare", file)
    assert same.exit_code == 0 and same.stderr == ""
    assert same.stdout.count("| gem | 1.00 | 1.05 | 1.05 | 1.05 | 1.05 |") == 2
    slower = call(*options, "--compare", file, "--tolerance", 0.02, "--json", "--save", file)
    assert slower.exit_code == 1
    assert slower.stderr == (
        f"slower than {str(file)!r} by more than 2%: gem 1.00 → 1.05 × plain at 32 px, batch 1, and 1 other case\n"
    )
    changes = {change["case"]: change["ratio"] for change in json.loads(slower.stdout)["runs"][1]["changes"]}
    assert changes == {CEILING: 1, "clip": 1, "gem": 1.05}
    assert call(*options, "--compare", file, "--tolerance", 0.02).exit_code == 0  # it was saved anew


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"runs": 3}',
        '{"runs": [{"setting": {}, "costs": []}]}',
        '{"runs": [{"setting": 3, "costs": [{"case": "plain", "seconds": [1]}]}]}',
        '{"runs": [{"setting": {}, "costs": [{"case": "plain", "seconds": [0]}]}]}',
        '{"runs": [{"setting": {}, "costs": [{"case": "plain", "seconds": ["1"]}]}]}',
        '{"runs": [{"setting": {}, "costs": [{"case": "plain", "seconds": [1]}, {"case": "gem", "seconds": []}]}]}',
        "[" * 100_000,
    ],
)
def test_what_is_no_run_is_refused_in_one_line(content, tmp_path):
    file = tmp_path / "run.json"
    file.write_text(content)
    with pytest.raises(InputError, match="is not a run of open-gem bench, expected a file that --save wrote"):
        comparison.read_run(file)


def test_impossible_comparisons_are_refused_before_anything_is_measured(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    measured(monkeypatch, 1.0)
    assert call("--side", 32, "--repeats", 1, "--save", file).exit_code == 0
    monkeypatch.setattr(measuring, "measure", None)
    for options, words in (
        (("--compare", tmp_path / "no.json"), "cannot read"),
        (("--compare", file), "has no setting model ViT-B-16, side 64, batch 1"),
        (("--compare", file, "--tolerance", "nan"), "--tolerance is nan, expected a number above 0"),
        (("--save", file / "in a file"), "cannot write"),
    ):
        result = call("--side", 64, *options)
        assert result.exit_code == 2, result.output
        assert words in result.stderr and len(result.stderr.splitlines()) == 1
