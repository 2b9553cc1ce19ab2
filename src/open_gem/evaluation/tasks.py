"""What is asked of a picture of a data set, how answers are counted, and the scores that are made of counts.

What is counted depends on what a data set knows: the class of each pixel, labelled points, or (scenes) whole objects.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from open_gem.data import IGNORE, Points, PointSample, Sample, SceneSample, Segmentation
from open_gem.errors import DatasetError
from open_gem.evaluation.metrics import (
    Mean,
    Records,
    Row,
    Score,
    bootstrap,
    bootstrap_difference,
    boundary,
    box_overlap,
    confusion,
    frequency_weighted_iou,
    image_means,
    mask_overlap,
    mean_accuracy,
    mean_iou,
    micro_iou,
    object_contrast,
    pair_means,
    patch_similarity,
    pixel_accuracy,
    point_accuracy,
    point_counts,
    pointing_game,
    ratio,
    text_contrast,
    to_grid,
)
from open_gem.evaluation.protocol import EvalProtocol
from open_gem.localization import Localization
from open_gem.method.run import Encoded
from open_gem.text import Vocabulary
from open_gem.types import Grid, Size

Dataset = Segmentation | Points

# Tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EvalTask:
    """What is asked of one picture, and how the answer is counted: by each name of `SCORES` a row of `Records`."""

    vocabulary: Vocabulary
    count: Callable[[Localization], dict[str, Row]]


def tasks_of(dataset: Dataset, sample: Sample | PointSample, size: Size, protocol: EvalProtocol) -> list[EvalTask]:
    """What is asked of a sample whose picture has this `size`: nothing, where no class has a point that says yes.

    Raises DatasetError where its labels cannot be read or are of another size.
    """
    if isinstance(sample, PointSample):
        return [_ask_points(sample, protocol)] if sample.positive else []
    assert isinstance(dataset, Segmentation)
    of_pixels = _ask_pixels(dataset, sample, size, protocol)
    return [of_pixels, *_ask_objects(sample, protocol)] if isinstance(sample, SceneSample) else [of_pixels]


def _best_is_there(found: Localization, sample: SceneSample) -> Row:
    """Whether the likeliest of all concepts, by the image as a whole, is in the scene."""
    assert found.scores is not None
    best = found.prompts[int(found.scores.argmax())]
    return Mean.of([int(best in sample.scene.names)]).row


def _names(dataset: Segmentation, protocol: EvalProtocol) -> str | None:
    return protocol.names if protocol.names in dataset.vocabularies else None


def _ask_pixels(dataset: Segmentation, sample: Sample, size: Size, protocol: EvalProtocol) -> EvalTask:
    """Every pixel to one class. The background class takes what no label is probable enough for."""
    threshold = None if dataset.background is None else protocol.background_of(dataset.name)
    nobody = -1 if dataset.background is None else dataset.background
    all_classes = [*dataset.foreground, nobody]  # −1, no label, takes the last
    class_of = torch.tensor(all_classes, dtype=torch.int64, device="cpu")
    true, classes = torch.from_numpy(sample.labels()), len(dataset.classes)
    if tuple(true.shape) != size:
        given, expected = ("×".join(map(str, sides)) for sides in (true.shape, size))
        raise DatasetError(f"labels of {sample.id!r} are {given} (height × width), expected its picture's {expected}")

    def count(found: Localization) -> dict[str, Row]:
        predicted = class_of[found.segment(threshold).cpu()]
        rows: dict[str, Row] = {
            "pixels": confusion(predicted, true, classes).row,
            "boundaries": boundary(predicted, true, classes),
        }
        return rows | {"top1": _best_is_there(found, sample)} if isinstance(sample, SceneSample) else rows

    return EvalTask(dataset.vocabulary(_names(dataset, protocol)), count)


def _ask_points(sample: PointSample, protocol: EvalProtocol) -> EvalTask:
    """Each class that is there by itself: its min-max map above a threshold, at the points people have labelled."""
    xy, of, yes = (torch.from_numpy(values) for values in (sample.xy, sample.of, sample.yes))

    def count(found: Localization) -> dict[str, Row]:
        masks = found.masks(protocol.threshold)
        return {
            "points": {
                sample.classes[label]: point_counts(masks[index].cpu(), xy[of == label], yes[of == label])
                for index, label in enumerate(sample.positive)
            }
        }

    return EvalTask(Vocabulary.of([sample.names[label] for label in sample.positive]), count)


def _ask_objects(sample: SceneSample, protocol: EvalProtocol) -> list[EvalTask]:
    """The objects of a scene by name: where each is; and of all concepts, whether the likeliest is there."""
    masks, boxes = (torch.from_numpy(values) for values in (sample.scene.masks, sample.scene.boxes))

    def count(found: Localization) -> dict[str, Row]:
        best = [one.xyxy for one in found.boxes(protocol.threshold, instances="label")]
        return {
            "pointing": pointing_game(found.points(), masks).row,
            "masks": mask_overlap(found.masks(protocol.threshold).stack().cpu(), masks).row,
            "boxes": box_overlap(best, boxes).row,
        }

    return [EvalTask(Vocabulary.of(sample.scene.names), count)]


# Analysis -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def analyse(
    dataset: Dataset,
    sample: Sample | PointSample,
    protocol: EvalProtocol,
    features: Encoded,
    encode: Callable[[list[str]], Tensor],
    project: Callable[[Tensor], Tensor],
) -> dict[str, Row]:
    """The paper's analysis of one image's patches (section 5): in the joint space, and "@7" after each block traced.

    features  of this image alone; `trace` is read where there is one
    encode    labels → their embeddings `(p, e)`
    project   tokens of a block → the joint space, where texts are; the other two take them as they are

    Masks are those of the classes that are there. All other patches are outside of them, the background included (eqs.
    7 to 9 have k ∉ M); only the void between classes is nowhere, where a data set tells it from its background.
    """
    if not (isinstance(dataset, Segmentation) and isinstance(sample, Sample)):
        return {}
    label_of = dict(zip(dataset.foreground, dataset.vocabulary(_names(dataset, protocol)).labels, strict=True))
    labels = torch.from_numpy(sample.labels())
    present = [int(one) for one in labels.unique() if int(one) in label_of]
    masks = torch.stack([labels == one for one in present]) if present else None
    void = None if dataset.background is None else labels == IGNORE
    text = encode([label_of[one] for one in present]).cpu() if present else None

    def measured(patches: Tensor, joint: Tensor, grid: Grid, name: str) -> Iterator[tuple[str, Row]]:
        yield f"patch_similarity{name}", Mean.of([patch_similarity(patches).item()]).row
        if masks is not None and text is not None:
            sides = to_grid(masks, grid, void)
            yield f"object_contrast{name}", Mean.of(object_contrast(patches, sides).tolist()).row
            yield f"text_contrast{name}", Mean.of(text_contrast(joint, text, sides).tolist()).row

    patches = features.patches[0].cpu()
    rows = dict(measured(patches, patches, features.grid, ""))
    for block, tokens in features.trace.items():
        inside = tokens[0, features.prefix :].cpu()
        rows |= measured(inside, project(tokens)[0, features.prefix :].cpu(), features.grid, f"@{block}")
    return rows


# Scores ---------------------------------------------------------------------------------------------------------------

_Scored = tuple[Callable[[Records], Records], Score]


def _as_counted(records: Records) -> Records:
    return records


SCORES: Mapping[str, Mapping[str, _Scored]] = {
    "pixels": {
        "mean_iou": (_as_counted, mean_iou),
        "pixel_accuracy": (_as_counted, pixel_accuracy),
        "mean_accuracy": (_as_counted, mean_accuracy),
        "frequency_weighted_iou": (_as_counted, frequency_weighted_iou),
    },
    "boundaries": {"boundary_iou": (_as_counted, mean_iou)},
    "points": {
        "class_pooled": (_as_counted, mean_iou),
        "pair_mean": (pair_means, ratio),
        "image_mean": (image_means, ratio),
        "micro": (_as_counted, micro_iou),
        "point_accuracy": (_as_counted, point_accuracy),
    },
    "pointing": {"pointing_game": (_as_counted, ratio)},
    "masks": {"mask_iou": (_as_counted, ratio)},
    "boxes": {"box_iou": (_as_counted, ratio)},
    "top1": {"top1": (_as_counted, ratio)},
    "patch_similarity": {"patch_similarity": (_as_counted, ratio)},
    "object_contrast": {"object_contrast": (_as_counted, ratio)},
    "text_contrast": {"text_contrast": (_as_counted, ratio)},
}
"""What is counted -> the scores made of it: what is done to the records first, and the score of their sum."""


class Estimate(NamedTuple):
    """A score over all images, in [0, 1] (of the analysis, in [-1, 1]), or the difference of two, and its 95 % interval
    over such images."""

    value: float
    low: float
    high: float


def scores(counts: Mapping[str, Records]) -> dict[str, Estimate]:
    """Every score of one method, with intervals by bootstrap over images; NaN where nothing was counted. Those of one
    block end in its number: "patch_similarity@7"."""
    return {name: _estimate(score, records) for name, score, records in _scored(counts)}


def differences(counts: Mapping[str, Records], other: Mapping[str, Records]) -> dict[str, Estimate]:
    """Every score of one method less that of another on the same images, with the paired interval of the difference;
    NaN where nothing was counted for one of them.

    Raises InputError where the images are not the same.
    """
    others = {name: records for name, _, records in _scored(other)}
    return {name: _estimate(score, one, others[name]) for name, score, one in _scored(counts) if name in others}


def _scored(counts: Mapping[str, Records]) -> Iterator[tuple[str, Score, Records]]:
    """Every score by its name, with what it is made of."""
    for counted, records in counts.items():
        kind, at, block = counted.partition("@")
        for name, (prepare, score) in SCORES[kind].items():
            yield name + at + block, score, prepare(records)


def _estimate(score: Score, one: Records, other: Records | None = None) -> Estimate:
    """A score, or its difference to that of `other`."""
    if not one.classes or (other is not None and not other.classes):
        return Estimate(math.nan, math.nan, math.nan)
    if other is None:
        return Estimate(one.value(score), *bootstrap(one, score))
    return Estimate(one.value(score) - other.value(score), *bootstrap_difference(one, other, score))
