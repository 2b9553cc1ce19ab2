"""Steps on text against their formulas: prompts clustered one merge at a time, each winner moved, maps mixed."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from open_gem import METHODS, Localizer, Views, run
from open_gem.errors import InputError, MethodError
from open_gem.method.text_steps import TEXT_STEPS, Cass, find_text_step
from open_gem.tensors import similarity

PROMPTS = ["cat", "dog", "a remote control", "sky", "kitten"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_ward(unit: Tensor, distance: float) -> list[set[int]]:
    """Clusters by Ward's criterion on cosine distances, by the update of Lance and Williams."""
    groups = {index: {index} for index in range(len(unit))}
    apart = {(i, j): 1 - float(unit[i] @ unit[j]) for i in groups for j in groups if i < j}
    while apart and min(apart.values()) <= distance:
        (i, j), nearest = min(apart.items(), key=lambda pair: pair[1])
        for k in groups.keys() - {i, j}:
            a, b, c = (len(groups[index]) for index in (i, j, k))
            first, second = (apart[min(index, k), max(index, k)] for index in (i, j))
            square = ((a + c) * first**2 + (b + c) * second**2 - c * nearest**2) / (a + b + c)
            apart[min(i, k), max(i, k)] = math.sqrt(square)
        groups[i] |= groups.pop(j)
        apart = {pair: value for pair, value in apart.items() if j not in pair}
    return list(groups.values())


def slow_cass(step: Cass, text: Tensor, patches: Tensor, cosines: Tensor) -> Tensor:
    unit = [vector / vector.norm() for vector in text]
    directions = [patch / patch.norm() for patch in patches]
    adapted = list(unit)
    for group in slow_ward(torch.stack(unit), step.distance):
        winner = max(group, key=lambda index: cosines[index].item())
        best = sorted(directions, key=lambda patch: -float(patch @ unit[winner]))[:2]
        mean = sum(best) / len(best)
        moved = (1 - step.alpha) * unit[winner] + step.alpha * mean / mean.norm()  # pyright: ignore[reportAttributeAccessIssue]
        adapted[winner] = moved / moved.norm()
    return torch.stack(adapted)


@pytest.mark.parametrize(
    "step", [Cass(), Cass(alpha=0.4, distance=0.9), Cass(alpha=0.2, distance=0.0), Cass(alpha=0.3, distance=9)]
)
@pytest.mark.parametrize(("prompts", "patches"), [(12, 30), (1, 30), (5, 1)])
def test_cass_is_its_formula(step, prompts, patches):
    text, features = random(prompts, 6).double(), random(patches, 6, seed=1).double()
    cosines = random(prompts, seed=2).double()
    adapted = step.adapt(text, features, cosines)
    torch.testing.assert_close(adapted, slow_cass(step, text, features, cosines), rtol=0, atol=1e-9)
    maps = random(prompts, 3, 4, seed=3)
    expected = [
        (1 - step.weight) * own + step.weight * cosine for own, cosine in zip(maps, cosines.float(), strict=True)
    ]
    torch.testing.assert_close(step.mix(maps, cosines), torch.stack(expected))


def test_equal_prompts_have_a_single_winner():
    text = random(1, 6).expand(3, 6)
    adapted = Cass(alpha=0.5).adapt(text, random(9, 6, seed=1), torch.tensor([0.1, 0.3, 0.2]))
    moved = (adapted - text / text.norm(dim=-1, keepdim=True)).norm(dim=-1) > 1e-3
    assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize("views", [Views(), Views(window=32, stride=32), Views(window=32, stride=16, merge="logits")])
def test_a_localizer_adapts_its_prompts_to_each_window(tiny_localizer, views):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    step = Cass(alpha=0.3, distance=0.5)
    plain = Localizer(tiny_localizer.backbone, views=views)
    ours = Localizer(tiny_localizer.backbone, views=views, text_step=step)
    encoded = ours.encode(image)
    text, pooled = plain.text(tuple(PROMPTS)), encoded.pooled
    cosines = similarity(pooled, text)[:, 0]
    located = ours.locate(encoded, PROMPTS)
    parts = [part for row in encoded.windows for part in row] if views.merge == "logits" else [encoded]
    expected = [
        (1 - step.weight) * similarity(part.patches[0], slow_cass(step, text, part.patches[0], cosines))
        + step.weight * cosines[:, None]
        for part in parts
    ]
    small = located.maps.maps[0] if views.merge == "logits" else located.maps[None]  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue, reportCallIssue]
    torch.testing.assert_close(small.flatten(2), torch.stack(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(located.presence, plain.locate(encoded, PROMPTS).presence)


def test_a_localizer_takes_the_name_and_describes_the_step(tiny_localizer):
    localizer = tiny_localizer.configured(text_step="cass")
    assert localizer.text_step == Cass()
    assert localizer.describe()["text_step"] == {"text_step": "cass", "alpha": 0.03, "weight": 0.25, "distance": 0.1}
    assert tiny_localizer.describe()["text_step"] is None


def test_without_a_pooled_embedding_there_is_no_step(tiny_localizer):
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels = tiny_localizer.prepare(image).pixels[None]
    encoded = run(tiny_localizer.backbone.vision, pixels, {"gem": METHODS["gem"]})["gem"]
    with pytest.raises(InputError, match="no pooled embedding, which the text step needs"):
        tiny_localizer.configured(text_step=Cass()).locate(encoded, "cat")


@pytest.mark.parametrize("name", TEXT_STEPS)
def test_every_step_describes_itself_by_its_name(name):
    assert find_text_step(name).describe()["text_step"] == name


def test_an_unknown_step_lists_the_known():
    with pytest.raises(MethodError, match=r"unknown text step 'caas' .did you mean cass.*known: cass"):
        find_text_step("caas")


@pytest.mark.parametrize(("name", "value"), [("alpha", 1), ("weight", -0.1), ("distance", -1)])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(MethodError, match=f"{name} is {value}, expected a number"):
        Cass(**{name: value})
