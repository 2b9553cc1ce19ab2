"""FGS against dense systems of equations, in double."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from open_gem import Localization
from open_gem.data.scenes import scene
from open_gem.errors import InputError
from open_gem.refine.fgs import Fgs
from open_gem.types import Size


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(seed: int, height: int, width: int) -> Tensor:
    return torch.from_numpy(scene(seed, (height, width)).image).permute(2, 0, 1).float() / 255


def solved(weights: list[float], strength: float, values: np.ndarray) -> np.ndarray:
    """Return the u that minimises Σ (u − values)² + strength · Σ weight · (difference of neighbours)²."""
    matrix = np.eye(len(values))
    for at, weight in enumerate(weights):
        step = np.zeros(len(values))
        step[at], step[at + 1] = 1, -1
        matrix += strength * weight * np.outer(step, step)
    return np.linalg.solve(matrix, values)


def slow(image: Tensor, heatmap: Tensor, reach: float, contrast: float, iterations: int) -> np.ndarray:
    pixels, values = image.double().permute(1, 2, 0).tolist(), heatmap.double().numpy().copy()
    height, width = values.shape
    right = [[math.dist(row[x], row[x + 1]) for x in range(width - 1)] for row in pixels]
    down = [[math.dist(pixels[y][x], pixels[y + 1][x]) for y in range(height - 1)] for x in range(width)]
    every = [step for line in (*right, *down) for step in line]
    sigma = contrast * math.sqrt(sum(step**2 for step in every) / len(every)) if every else 1.0
    for t in range(1, iterations + 1):
        strength = 3 / 2 * 4 ** (iterations - t) / (4**iterations - 1) * (reach * max(height, width)) ** 2
        for y in range(height):
            values[y] = solved([math.exp(-step / sigma) for step in right[y]], strength, values[y])
        for x in range(width):
            values[:, x] = solved([math.exp(-step / sigma) for step in down[x]], strength, values[:, x])
    return values


@pytest.mark.parametrize(("height", "width"), [(32, 41), (1, 7), (6, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("settings", [(0.7, 0.25, 3), (0.2, 1.0, 1), (3.0, 0.1, 2)])
def test_a_map_is_the_solution_of_its_systems(height, width, settings):
    refine = Fgs(*settings)
    image = drawn(3, 32, 41)[:, :height, :width]
    heatmap = random(height, width, seed=1) * 2 - 1
    refined = refine(refine.weights(image), heatmap)
    assert refined.dtype == torch.float32
    np.testing.assert_allclose(refined.numpy(), slow(image, heatmap, *settings), atol=1e-5)


def test_values_stay_in_their_range_and_a_constant_map_as_it_is():
    refine, image = Fgs(reach=5.0), drawn(1, 200, 300)
    weights, heatmap = refine.weights(image), random(200, 300) * 2 - 1
    refined = refine(weights, heatmap)
    assert heatmap.min() <= refined.min() and refined.max() <= heatmap.max()
    assert refined.std() < heatmap.std() / 2
    constant = torch.full((200, 300), 0.3)
    torch.testing.assert_close(refine(weights, constant), constant, rtol=0, atol=1e-4)


def test_a_coarse_map_gets_the_edge_of_the_image():
    image = torch.zeros(3, 40, 60)
    image[:, :, 30:] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    image += random(3, 40, 60) * 0.02
    ramp = torch.linspace(1, 0, 60).expand(40, 60)
    refined = Fgs()(Fgs().weights(image), ramp)
    step = (refined[:, 29] - refined[:, 30]).mean()
    assert step > 0.3
    assert (refined[:, :30].std() + refined[:, 30:].std()) < 0.2 * step


def test_brightness_contrast_and_size_of_the_image_do_not_matter():
    image, heatmap = drawn(2, 60, 80), random(60, 80, seed=4)
    refined = Fgs()(Fgs().weights(image), heatmap)
    paler = Fgs()(Fgs().weights(image / 3 + 0.4), heatmap)
    torch.testing.assert_close(paler, refined, rtol=0, atol=1e-4)
    smooth = torch.linspace(0, 1, 60)[:, None] * torch.linspace(1, 0.5, 80)
    small, large = (
        Fgs()(
            Fgs().weights(drawn(2, 60 * times, 80 * times)),
            torch.nn.functional.interpolate(smooth[None, None], scale_factor=times, mode="bilinear")[0, 0],
        )
        for times in (1, 3)
    )
    shrunk = torch.nn.functional.interpolate(large[None, None], size=(60, 80), mode="area")[0, 0]
    assert (shrunk - small).abs().mean() < 0.1 * smooth.std()


def test_a_flat_image_has_no_edges():
    refined = Fgs()(Fgs().weights(torch.full((3, 20, 30), 0.5)), random(20, 30))
    assert refined.isfinite().all() and refined.std() < 0.05


def test_maps_keep_their_type_and_what_comes_in_stays():
    weights = Fgs().weights(drawn(0, 40, 50))
    heatmap = random(40, 50)
    kept = heatmap.clone()
    refined = Fgs()(weights, heatmap)
    assert torch.equal(heatmap, kept)
    assert torch.equal(Fgs()(weights, heatmap), refined)  # weights stay too
    assert Fgs()(weights, heatmap.double()).dtype == torch.float64
    half = Fgs()(weights, heatmap.half())
    assert half.dtype == torch.float32 and torch.equal(half, Fgs()(weights, heatmap.half().float()))


def test_weights_are_made_once_an_image_and_not_pickled(monkeypatch):
    made, usual = [], Fgs.weights
    monkeypatch.setattr(Fgs, "weights", lambda self, image: made.append(1) or usual(self, image))
    image = Image.fromarray(scene(0, (40, 50)).image)
    before = Localization(("cat", "dog"), random(2, 3, 4), Size(40, 50))
    after = Fgs().refine(image, before)
    maps = after.heatmaps("cosine").stack()
    assert len(made) == 1
    again = pickle.loads(pickle.dumps(after))
    assert len(pickle.dumps(again)) < 20_000
    assert torch.equal(again.heatmaps("cosine").stack(), maps)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"reach": 0}, "reach is 0"),
        ({"reach": math.inf}, "reach is inf"),
        ({"contrast": -0.1}, "contrast is -0.1"),
        ({"contrast": "much"}, "contrast is 'much'"),
        ({"iterations": 0}, "iterations is 0"),
        ({"iterations": 2.0}, "iterations is 2.0"),
    ],
)
def test_impossible_settings_are_refused(settings, part):
    with pytest.raises(InputError, match=f"{part}, expected"):
        Fgs(**settings)


def test_maps_and_images_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"expected floats of shape \(3, y, x\)"):
        Fgs().weights(torch.zeros(3, 8, 9, dtype=torch.uint8))
    weights = Fgs().weights(random(3, 5, 6))
    with pytest.raises(InputError, match=r"heatmap is \(6, 5\) pixels, expected the image's \(5, 6\)"):
        Fgs()(weights, torch.zeros(6, 5))
    with pytest.raises(InputError, match=r"heatmap is \(2, 5, 6\), expected \(y, x\)"):
        Fgs()(weights, torch.zeros(2, 5, 6))
