"""Measure how well phrases are localized, with one pass of the host for any number of pathways.

On scenes (`datasets.scenes`), whose masks are exact, the protocol is:

* prompts are the names of the objects in the scene, in the localizer's template;
* pointing game: the pixel where a prompt's map is highest lies in that object's visible mask;
* mask IoU: the min-max map above 0.5 against the mask, mean over objects;
* mIoU: every object pixel is given to the best of *all* concepts (argmax, no threshold), background pixels do not count
  (as Pascal Context 59), one confusion matrix over the data set, mean over the concepts that occur;
* top-1: the best of all concepts for the pooled embedding is in the scene: what the model was trained for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from open_gem.datasets.scenes import CONCEPTS, Scene, scene
from open_gem.errors import InputError
from open_gem.localization import Localization
from open_gem.localizer import Localizer
from open_gem.methods import Pathway
from open_gem.metrics import Confusion, Mean, confusion, mask_overlap, pointing_game
from open_gem.pathway import Features
from open_gem.types import Size

SCENE_SIZE = 256  # pixels a side
BATCH = 25
IGNORE = len(CONCEPTS)  # true label of pixels that do not count


@dataclass(frozen=True)
class Outcome:
    """Counts of one pathway over some images; outcomes of parts add up to that of the whole."""

    pointing: Mean
    masks: Mean
    pixels: Confusion
    top1: Mean

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            self.pointing + other.pointing,
            self.masks + other.masks,
            self.pixels + other.pixels,
            self.top1 + other.top1,
        )

    def scores(self) -> dict[str, float]:
        """The four scores, each in [0, 1]."""
        return {
            "pointing_game": self.pointing.value,
            "mask_iou": self.masks.value,
            "mean_iou": self.pixels.mean_iou,
            "top1": self.top1.value,
        }


def evaluate_scenes(
    localizer: Localizer,
    pathways: Mapping[str, str | Pathway],
    seeds: Sequence[int],
    *,
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, Outcome]:
    """The outcome of each of `pathways` over the scenes of `seeds`; `progress` hears how many images are done.

    Raises InputError where there are no seeds.
    """
    if not seeds:
        raise InputError("no seeds given, expected at least one scene")
    totals: dict[str, Outcome] = {}
    for start in range(0, len(seeds), BATCH):
        scenes = [scene(seed, SCENE_SIZE) for seed in seeds[start : start + BATCH]]
        pixels = torch.stack([localizer.pixels(picture.image) for picture in scenes])
        for name, features in localizer.read(pixels, pathways).items():
            outcome = _count(localizer, features, scenes)
            totals[name] = totals[name] + outcome if name in totals else outcome
        progress(len(scenes))
    return totals


def _count(localizer: Localizer, features: Features, scenes: Sequence[Scene]) -> Outcome:
    sizes = [Size(*picture.image.shape[:2]) for picture in scenes]
    named = localizer.locate(features, [picture.names for picture in scenes], sizes)
    among_all = localizer.locate(features, CONCEPTS, sizes)
    outcomes = [_count_one(*things) for things in zip(scenes, named, among_all, strict=True)]
    return sum(outcomes[1:], outcomes[0])


def _count_one(picture: Scene, named: Localization, among_all: Localization) -> Outcome:
    masks = torch.from_numpy(picture.masks)
    assert among_all.scores is not None  # encoded with the pooled embedding above
    best = CONCEPTS[int(among_all.scores.argmax())]
    return Outcome(
        pointing=pointing_game(named.points(), masks),
        masks=mask_overlap(named.masks(0.5).stack().cpu(), masks),
        pixels=confusion(among_all.segment().cpu(), _label_map(picture), len(CONCEPTS), IGNORE),
        top1=Mean(int(best in picture.names), 1),
    )


def _label_map(picture: Scene) -> torch.Tensor:
    labels = np.full(picture.image.shape[:2], IGNORE)
    for name, mask in zip(picture.names, picture.masks, strict=True):
        labels[mask] = CONCEPTS.index(name)
    return torch.from_numpy(labels)
