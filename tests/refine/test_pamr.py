"""PAMR against a loop over pixels and neighbours, in double."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from open_gem import Localization
from open_gem.errors import InputError
from open_gem.refine import REFINEMENTS, Refinement, find_refinement, names_alone
from open_gem.refine.pamr import Pamr
from open_gem.types import Size

AROUND = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def neighbours(y: int, x: int, size: tuple[int, int], dilations: tuple[int, ...]) -> list[tuple[int, int]]:
    """Places around (y, x); those outside are the nearest inside."""
    return [
        (min(max(y + d * down, 0), size[0] - 1), min(max(x + d * right, 0), size[1] - 1))
        for d in dilations
        for down, right in AROUND
    ]


def slow_weights(image: Tensor, dilations: tuple[int, ...], std_weight: float) -> Tensor:
    pixels = image.double().tolist()
    size = (image.shape[1], image.shape[2])
    weights = torch.zeros(8 * len(dilations), *size, dtype=torch.float64)
    for y in range(size[0]):
        for x in range(size[1]):
            places = neighbours(y, x, size, dilations)
            kernel = [0.0] * len(places)
            for channel in pixels:
                values = [channel[v][u] for v, u in places]
                sample = values + [channel[y][x]] * len(dilations)
                mean = sum(sample) / len(sample)
                deviation = math.sqrt(sum((value - mean) ** 2 for value in sample) / (len(sample) - 1))
                for at, value in enumerate(values):
                    kernel[at] -= abs(value - channel[y][x]) / (1e-8 + std_weight * deviation) / len(pixels)
            exponentials = [math.exp(value) for value in kernel]
            weights[:, y, x] = torch.tensor(exponentials, dtype=torch.float64) / sum(exponentials)
    return weights


def slow_refine(weights: Tensor, heatmap: Tensor, dilations: tuple[int, ...], iterations: int) -> Tensor:
    size = (heatmap.shape[0], heatmap.shape[1])
    values = heatmap.double().tolist()
    alpha = weights.permute(1, 2, 0).tolist()
    for _ in range(iterations):
        values = [
            [
                sum(a * values[v][u] for a, (v, u) in zip(alpha[y][x], neighbours(y, x, size, dilations), strict=True))
                for x in range(size[1])
            ]
            for y in range(size[0])
        ]
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (1, 6), (5, 1), (4, 4)])
@pytest.mark.parametrize("dilations", [(1,), (1, 2), (2, 12), (24,)])  # 12 and 24 reach beyond all of these
@pytest.mark.parametrize("std_weight", [0.1, 1.0])
def test_weights_and_maps_are_the_formulas(
    size: tuple[int, int], dilations: tuple[int, ...], std_weight: float
) -> None:
    refine = Pamr(3, dilations, std_weight)
    image, heatmap = random(3, *size), random(*size, seed=1) * 2 - 1
    expected = slow_weights(image, dilations, std_weight)
    weights = refine.weights(image)
    assert weights.shape == (8 * len(dilations), *size)
    assert weights.dtype == torch.float32
    close(weights.double(), expected, 2e-6)
    close(refine.weights(image.double()), expected, 1e-9)
    close(refine(weights, heatmap).double(), slow_refine(expected, heatmap, dilations, 3), 5e-6)
    close(refine(expected, heatmap.double()), slow_refine(expected, heatmap, dilations, 3), 1e-12)


def test_a_picture_with_flat_parts_and_an_edge() -> None:
    """Deviations of 0, where only the 1e-8 stands between the formula and a division by 0, and 8-bit steps."""
    image = torch.full((3, 8, 9), 0.3)
    image[:, :, 5:] = 0.3 + 1 / 255
    image[1, 2, 2] = 1.0
    for dilations in ((1,), (1, 3)):
        expected = slow_weights(image, dilations, 0.1)
        ours = Pamr(dilations=dilations).weights(image)
        assert ours.isfinite().all()
        close(ours.double(), expected, 1e-4)  # steps of 1/255 have 4 or 5 digits in float32
        close(Pamr(dilations=dilations).weights(image.double()), expected, 1e-9)


def test_several_maps_are_each_refined_alone() -> None:
    refine = Pamr(2, (1, 2))
    weights, maps = refine.weights(random(3, 6, 8)), random(4, 6, 8, seed=2)
    ours = refine(weights, maps)
    assert ours.shape == maps.shape
    for one, alone in zip(ours, maps, strict=True):
        assert torch.equal(one, refine(weights, alone))


def test_what_was_given_stays() -> None:
    refine = Pamr(2, (1,))
    image, maps = random(3, 5, 6), random(2, 5, 6)
    weights = refine.weights(image)
    copies = [some.clone() for some in (image, maps, weights)]
    refine(weights, maps)
    assert all(map(torch.equal, (image, maps, weights), copies))
    columns = maps.transpose(1, 2).contiguous().transpose(1, 2)  # the same values in another order in memory
    assert torch.equal(refine(weights, columns), refine(weights, maps))


def test_weights_add_up_to_one_and_nothing_leaves_its_range() -> None:
    refine = Pamr(dilations=(1, 2, 4))
    weights = refine.weights(random(3, 30, 40))
    assert (weights >= 0).all()
    close(weights.sum(dim=0), torch.ones(30, 40))
    heatmap = random(30, 40, seed=3) * 2 - 1
    ours = refine(weights, heatmap)
    assert ours.min() >= heatmap.min() - 1e-6 and ours.max() <= heatmap.max() + 1e-6
    assert ours.std() < heatmap.std() / 2  # it does something
    close(refine(weights, torch.full((30, 40), 0.7)), torch.full((30, 40), 0.7), 2e-6)


def test_without_iterations_a_map_stays_as_it_is() -> None:
    refine = Pamr(0)
    heatmap = random(6, 7)
    assert torch.equal(refine(refine.weights(random(3, 6, 7)), heatmap), heatmap)


def test_a_blurred_mask_is_drawn_to_the_edge_of_a_two_coloured_picture() -> None:
    image = torch.zeros(3, 40, 60)
    image[:, :, 30:] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    image += random(3, 40, 60) * 0.02
    ramp = torch.linspace(1, 0, 60).expand(40, 60)  # falls slowly over the edge
    refine = Pamr(dilations=(1, 2, 4))
    ours = refine(refine.weights(image), ramp)
    step = (ours[:, 29] - ours[:, 30]).mean()
    assert (ramp[:, 29] - ramp[:, 30]).mean() < 0.02
    assert step > 0.1
    within = max((ours[:, 20:29] - ours[:, 21:30]).mean(), (ours[:, 30:39] - ours[:, 31:40]).mean())
    assert step > 10 * within


def test_brightness_and_contrast_do_not_matter() -> None:
    """As pixels that were normalised for a model show the same picture."""
    image = random(3, 12, 15)
    mean, std = torch.tensor([0.48, 0.46, 0.41])[:, None, None], torch.tensor([0.27, 0.26, 0.28])[:, None, None]
    close(Pamr().weights((image - mean) / std), Pamr().weights(image), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_on_in_full(dtype: torch.dtype) -> None:
    refine, image, heatmap = Pamr(2, (1, 3)), random(3, 8, 9).to(dtype), random(8, 9, seed=4).to(dtype)
    weights = refine.weights(image)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, refine.weights(image.float()))
    assert torch.equal(refine(weights, heatmap), refine(weights, heatmap.float()))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"iterations": -1}, "iterations is -1"),
        ({"iterations": 2.0}, "iterations is 2.0"),
        ({"iterations": True}, "iterations is True"),
        ({"dilations": ()}, "dilations are ()"),
        ({"dilations": 8}, "dilations are 8"),
        ({"dilations": (8, 0)}, "dilations are (8, 0)"),
        ({"dilations": (1.5,)}, "dilations are (1.5,)"),
        ({"std_weight": 0}, "std_weight is 0"),
        ({"std_weight": math.nan}, "std_weight is nan"),
        ({"std_weight": math.inf}, "std_weight is inf"),
        ({"std_weight": "0.1"}, "std_weight is '0.1'"),
    ],
)
def test_impossible_settings(settings: dict, part: str) -> None:
    with pytest.raises(InputError) as caught:
        Pamr(**settings)
    assert part in str(caught.value) and "expected" in str(caught.value) and "\n" not in str(caught.value)


def test_dilations_of_json_are_as_those_of_python() -> None:
    refine = Pamr(dilations=[8, 16])  # pyright: ignore[reportArgumentType]
    assert refine == Pamr() and hash(refine) == hash(Pamr())


@pytest.mark.parametrize("image", [torch.zeros(8, 9), torch.zeros(1, 3, 8, 9), torch.zeros(3, 8, 9, dtype=torch.uint8)])
def test_what_is_no_picture(image: Tensor) -> None:
    with pytest.raises(InputError, match=r"expected floats of shape \(3, y, x\)"):
        Pamr().weights(image)


@pytest.mark.parametrize(
    ("weights", "heatmap", "part"),
    [
        ((8, 5, 6), (5, 6), r"expected \(16, y, x\)"),
        ((16, 5, 6), (1, 1, 5, 6), r"\(y, x\) or \(p, y, x\)"),
        ((16, 5, 6), (6, 5), r"heatmap is \(6, 5\) pixels, expected the image's \(5, 6\)"),
    ],
)
def test_maps_that_do_not_fit(weights: tuple[int, ...], heatmap: tuple[int, ...], part: str) -> None:
    with pytest.raises(InputError, match=part):
        Pamr()(torch.zeros(weights), torch.zeros(heatmap))


# Every refinement -----------------------------------------------------------------------------------------------------


def located(height: int, width: int) -> Localization:
    return Localization(("cat", "dog"), random(2, 3, 4) * 2 - 1, Size(height, width), scores=torch.tensor([0.3, 0.2]))


def image(height: int, width: int) -> Image.Image:
    values = random(height, width, 3, seed=5) * 255
    return Image.fromarray(values.to(torch.uint8).numpy())


@pytest.mark.parametrize("name", names_alone())
def test_every_refinement_without_a_checkpoint_changes_maps_and_nothing_else(name: str) -> None:
    refinement, before = find_refinement(name), located(20, 30)
    after = refinement.refine(image(20, 30), before)
    assert (after.labels, after.size, after.scores, after.maps) == (
        before.labels,
        (20, 30),
        before.scores,
        before.maps,
    )
    ours, plain = after.heatmaps("cosine").stack(), before.heatmaps("cosine").stack()
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() > 1e-4
    assert torch.equal(before.heatmaps("cosine").stack(), plain)  # the one that was given stays
    assert before.refiner is None


@pytest.mark.parametrize("name", REFINEMENTS)
def test_every_refinement_refuses_an_image_of_another_size(name: str) -> None:
    with pytest.raises(InputError, match=r"the image is 30×20 .* expected the one localized: 20×30"):
        find_refinement(name).refine(image(30, 20), located(20, 30))


@pytest.mark.parametrize("name", REFINEMENTS)
def test_every_refinement_describes_itself_for_json(name: str) -> None:
    refinement = find_refinement(name)
    described = json.loads(json.dumps(refinement.describe()))
    assert described.pop("refinement") == name
    assert type(refinement)(**described) == refinement  # the settings are all there


def test_an_unknown_refinement_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"unknown refinement 'parm' \(did you mean pamr\?\); known: .*pamr"):
        find_refinement("parm")


def test_a_refinement_is_one_class() -> None:
    """All that another one needs: nothing else knows which there are."""

    @dataclass(frozen=True)
    class Darker(Refinement):
        by: float = 0.5

        def refine(self, image: Image.Image, localization: Localization) -> Localization:
            return replace(localization, refiner=lambda heatmap: heatmap - self.by)

    before = located(6, 7)
    after = Darker(0.25).refine(image(6, 7), before)
    close(after.heatmaps("cosine").stack(), before.heatmaps("cosine").stack() - 0.25)
    assert torch.equal(after.points(), before.points())
    assert Darker().describe() == {"refinement": "darker", "by": 0.5}
