"""Evaluation counts what its docstring says, in parts as in one piece."""

import numpy as np
import pytest
import torch

from open_gem import PATHWAYS, Localization
from open_gem.datasets.scenes import CONCEPTS, scene
from open_gem.evaluate import SCENE_SIZE, _count_one, evaluate_scenes
from open_gem.types import Size


def perfect(picture, prompts, scores) -> Localization:
    """A localization whose maps are the masks themselves."""
    maps = np.zeros((len(prompts), *picture.image.shape[:2]), dtype=np.float32)
    for name, mask in zip(picture.names, picture.masks, strict=True):
        maps[prompts.index(name)] = mask
    return Localization(tuple(prompts), torch.from_numpy(maps), Size(*picture.image.shape[:2]), scores)


def test_perfect_maps_have_perfect_scores():
    picture = scene(4, SCENE_SIZE)
    scores = torch.tensor([float(name == picture.names[0]) for name in CONCEPTS])
    outcome = _count_one(picture, perfect(picture, picture.names, None), perfect(picture, CONCEPTS, scores))
    assert outcome.scores() == {"pointing_game": 1.0, "mask_iou": 1.0, "mean_iou": 1.0, "top1": 1.0}


def test_swapped_maps_have_none():
    picture = next(one for one in (scene(seed, SCENE_SIZE) for seed in range(50)) if len(one.names) == 2)
    absent = next(name for name in CONCEPTS if name not in picture.names)
    scores = torch.tensor([float(name == absent) for name in CONCEPTS])
    named, among_all = perfect(picture, picture.names, None), perfect(picture, CONCEPTS, scores)
    swapped = Localization(named.prompts, named.similarity.flip(0), named.size)
    order = list(range(len(CONCEPTS)))
    first, second = (CONCEPTS.index(name) for name in picture.names)
    order[first], order[second] = second, first
    confused = Localization(among_all.prompts, among_all.similarity[order], among_all.size, scores)
    assert _count_one(picture, swapped, confused).scores() == {
        "pointing_game": 0.0,
        "mask_iou": 0.0,
        "mean_iou": 0.0,
        "top1": 0.0,
    }


def test_parts_add_up_to_the_whole(tiny_localizer):
    pathways = {name: PATHWAYS[name] for name in ("clip", "maskclip")}
    whole = evaluate_scenes(tiny_localizer, pathways, range(4))
    parts = [evaluate_scenes(tiny_localizer, pathways, seeds) for seeds in (range(2), range(2, 4))]
    for name in pathways:
        merged = parts[0][name] + parts[1][name]
        assert merged.scores() == pytest.approx(whole[name].scores(), nan_ok=True)
        assert torch.equal(merged.pixels.counts, whole[name].pixels.counts)


def test_no_scenes_is_an_error(tiny_localizer):
    with pytest.raises(ValueError, match="no seeds"):
        evaluate_scenes(tiny_localizer, PATHWAYS, [])
