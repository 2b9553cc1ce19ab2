"""Steps after stitching: the published numbers, the formula, and how steps compose with methods and windows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from method.guides import Colours
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from open_gem import METHODS, Localizer, Views
from open_gem import localizer as localizer_module
from open_gem.errors import MethodError
from open_gem.method import calibration, steps
from open_gem.method.steps import STEPS, VALUES, Lposs, Scga, Step, StepContext, find_step, lposs, scga
from open_gem.types import Grid, Size

PUBLISHED = sorted((Path(__file__).parents[1] / "parity" / "steps").glob("*.npz"))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_scga_gives_the_published_numbers(file):
    with np.load(file) as arrays:
        given, expected = (torch.from_numpy(arrays[name])[0].flatten(1).T for name in ("scga_in", "scga_out"))
    torch.testing.assert_close(scga(given), expected, rtol=0, atol=2e-5)


def test_scga_is_its_formula_strip_by_strip(monkeypatch):
    features = random(30, 8)
    cosines = normalize(features, dim=-1) @ normalize(features, dim=-1).T
    excess = cosines - cosines.mean()
    weights = (10 * excess).masked_fill(excess < 0, -torch.inf).softmax(dim=-1)
    monkeypatch.setattr(calibration, "STRIP", 7 * 30)  # seven rows at a time
    torch.testing.assert_close(scga(features), weights @ features, rtol=0, atol=1e-6)


def published_lposs(file: Path) -> tuple[dict[str, Tensor], int]:
    with np.load(file) as arrays:
        values = {name.removeprefix("lposs_"): arrays[name] for name in arrays if name.startswith("lposs_")}
    return {name: torch.from_numpy(np.asarray(value)) for name, value in values.items()}, int(values["k"])


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_lposs_gives_the_published_numbers(file, dense, monkeypatch):
    monkeypatch.setattr(steps, "DENSE", len(np.load(file)["lposs_features"]) if dense else 0)
    monkeypatch.setattr(steps, "STRIP", 100_000)  # several strips
    arrays, k = published_lposs(file)
    ours = lposs(arrays["features"], arrays["windows"], arrays["locations"], arrays["logits"], k=k)
    torch.testing.assert_close(ours.double(), arrays["out"], rtol=0, atol=2e-5)


def test_lposs_run_to_its_end_solves_the_equations():
    features, logits = normalize(random(24, 6), dim=-1).double(), random(24, 3).double()
    windows, locations = torch.tensor([[3, 4], [3, 4]]), torch.tensor([[0.0, 48, 0, 64], [0, 48, 32, 96]])
    ours = lposs(features, windows, locations, logits, k=5, iterations=100, tolerance=1e-12)
    places = [(top + 16 * y, left + 16 * x) for top, left in ((0, 0), (0, 32)) for y in range(3) for x in range(4)]
    centers = torch.tensor(places, dtype=torch.float64)
    distances = torch.cdist(centers, centers)
    cosines = features @ features.T
    kept = torch.zeros_like(cosines).scatter_(1, cosines.topk(5).indices, 1)
    affinity = kept * cosines.clamp(min=0) ** 3 * torch.exp(-0.01 * distances)
    graph = affinity + affinity.T
    graph.fill_diagonal_(0)
    degree = graph.sum(dim=1)
    graph = graph / (degree[:, None] * degree[None]).sqrt()
    expected = torch.linalg.solve(torch.eye(24, dtype=torch.float64) - 0.95 * graph, logits)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_a_patch_without_neighbours_keeps_its_label_under_lposs():
    features = torch.eye(6)[:4]
    logits = random(4, 2)
    step = lposs(features, torch.tensor([[2, 2]]), torch.zeros(1, 4), logits, k=4)
    torch.testing.assert_close(step, logits)


def test_lposs_reads_the_values_of_the_last_block(tiny_localizer):
    image = (random(64, 64, 3).abs().clamp(max=1)).numpy()
    encoded = tiny_localizer.encode(image, {"stepped": METHODS["gem"].replace(steps=(Lposs(),))})["stepped"]
    plain = tiny_localizer.encode(image, {"gem": METHODS["gem"]})["gem"]
    pixels = tiny_localizer.prepare(image).pixels[None]
    tower = tiny_localizer.backbone.vision
    x, grid = tower.embed(pixels)
    *before, last = tower.blocks(grid)
    for block in before:
        x = block.forward(x)
    values = last.qkv(last.norm(x)).v[0].transpose(0, 1).flatten(1)[tower.prefix :]
    expected = Lposs()(plain.patches[0], StepContext(grid, {VALUES: values}))
    torch.testing.assert_close(encoded.patches[0], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("patch", [8, 4])
def test_lposs_reads_the_values_of_its_guide_on_the_grid_of_the_features(tiny_localizer, patch):
    image, guide = (random(64, 48, 3).abs().clamp(max=1)).numpy(), Colours(patch)
    methods = {"gem": METHODS["gem"], "stepped": METHODS["gem"].replace(steps=(Lposs(guide),))}
    encoded = tiny_localizer.encode(image, methods)
    pixels = tiny_localizer.prepare(image).pixels[None]
    values, grid = guide.projections(pixels)[2][0], encoded["gem"].grid
    map_of = values.T.unflatten(-1, tuple(guide.grid_for(Size(*pixels.shape[-2:]))))[None]
    resized = interpolate(map_of, size=tuple(grid), mode="bilinear")[0].flatten(1).T
    expected = Lposs()(encoded["gem"].patches[0], StepContext(grid, {VALUES: resized}))
    torch.testing.assert_close(encoded["stepped"].patches[0], expected, rtol=0, atol=2e-4)


def test_a_guide_sees_each_window(tiny_localizer):
    """Windows that do not overlap have the patches of the whole image, for a guide that knows no neighbours."""
    image = (random(64, 64, 3).abs().clamp(max=1)).numpy()
    seen: list = []

    @dataclass(frozen=True)
    class Look(Step):
        def taps(self, layers: int) -> list:
            return [Colours(8)]

        def __call__(self, features: Tensor, context: StepContext) -> Tensor:
            seen.append(context.taps[Colours(8)])
            return features

    method = METHODS["gem"].replace(steps=(Look(),))
    for views in (Views(), Views(window=32, stride=32), Views(window=32, stride=16, flip=True)):
        Localizer(tiny_localizer.backbone, method, views=views)(image, "a cat")
    for windows in seen[1:]:
        torch.testing.assert_close(windows, seen[0], rtol=0, atol=1e-5)


def test_the_name_of_an_expert_is_loaded_by_a_localizer_alone(tiny_localizer, monkeypatch):
    step = find_step("lposs:facebook/dino-vitb16")
    assert step == Lposs("facebook/dino-vitb16")
    with pytest.raises(MethodError, match="guide is the name 'facebook/dino-vitb16', which only a Localizer loads"):
        step.taps(12)
    monkeypatch.setattr(localizer_module, "_guide", lambda name, backbone: (name, backbone))
    [guided] = tiny_localizer.resolve(METHODS["gem"].replace(steps=(step,))).steps
    assert guided.guide == ("facebook/dino-vitb16", tiny_localizer.backbone)


@pytest.mark.parametrize("name", ["scga:facebook/dino-vitb16", "lposs:"])
def test_a_step_without_an_expert_is_refused(name):
    with pytest.raises(MethodError, match=f"'{name}' names no step with an expert, expected for example"):
        find_step(name)


@pytest.mark.parametrize(
    ("name", "value"), [("neighbors", 0), ("gamma", 0), ("sigma", -1), ("alpha", 1), ("iterations", 0)]
)
def test_impossible_settings_of_lposs_are_refused(name, value):
    with pytest.raises(MethodError, match=f"{name} is {value}, expected a"):
        Lposs(**{name: value})


def test_half_precision_is_computed_in_float32():
    features = random(20, 8).to(torch.bfloat16)
    assert torch.equal(scga(features), scga(features.float()).to(torch.bfloat16))


@pytest.mark.parametrize("name", STEPS)
def test_every_step_keeps_the_shape_and_describes_itself(name):
    step = find_step(name)
    assert step(random(12, 6), StepContext(Grid(3, 4), {VALUES: random(12, 5)})).shape == (12, 6)
    assert step.describe()["step"] == type(step).__name__


def test_an_unknown_step_lists_the_known():
    with pytest.raises(MethodError, match=r"unknown step 'scgaa' .did you mean scga.*known: scga"):
        find_step("scgaa")


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), "10"])
def test_impossible_settings_are_refused(scale):
    with pytest.raises(MethodError, match=r"scale is .* expected a number above 0"):
        Scga(scale)


@dataclass(frozen=True)
class _Recorder(Step):
    """Adds what the host has after its second block, and remembers where it was called."""

    seen: list

    def taps(self, layers: int) -> range:
        return range(2, 3)

    def __call__(self, features: Tensor, context: StepContext) -> Tensor:
        self.seen.append((tuple(features.shape), context.grid, {at: tuple(x.shape) for at, x in context.taps.items()}))
        return features * 2


@pytest.mark.parametrize("merge", ["features", "logits"])
def test_steps_come_once_windows_are_merged(tiny_localizer, merge):
    seen: list = []
    views = Views(window=32, stride=16, merge=merge)
    localizer = Localizer(tiny_localizer.backbone, METHODS["gem"].replace(steps=(_Recorder(seen),)), views=views)
    image = (random(64, 64, 3).abs().clamp(max=1)).numpy()
    localizer(image, "a cat")
    whole, window = Grid(8, 8), Grid(4, 4)
    grid, times = (whole, 1) if merge == "features" else (window, 9)
    assert seen == [((grid.patches, 16), grid, {2: (grid.patches, 16)})] * times


def test_a_method_with_a_step_is_the_step_of_its_features(tiny_localizer):
    image = (random(64, 64, 3).abs().clamp(max=1)).numpy()
    methods = {"gem": METHODS["gem"], "stepped": METHODS["gem"].replace(steps=(Scga(),))}
    encoded = tiny_localizer.encode(image, methods)
    assert torch.equal(encoded["stepped"].patches[0], scga(encoded["gem"].patches[0]))
    assert METHODS["gem"].describe() | {"steps": [Scga().describe()]} == methods["stepped"].describe()
