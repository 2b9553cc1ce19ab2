"""Tasks: what is located in each image of a data set, how that is counted, and the scores made of the counts.

What is counted depends on what a data set has: the class of each pixel, labelled points, or (scenes) whole objects.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from open_gem.data import IGNORE, Points, PointSample, Sample, SceneSample, Segmentation
from open_gem.errors import DatasetError
from open_gem.evaluation.metrics.contrast import object_contrast, patch_similarity, text_contrast, to_grid
from open_gem.evaluation.metrics.counts import ImageCounts, Records, mean_counts
from open_gem.evaluation.metrics.intervals import bootstrap, bootstrap_difference
from open_gem.evaluation.metrics.objects import (
    boundary_overlap,
    box_overlap,
    mask_overlap,
    pointing_game,
)
from open_gem.evaluation.metrics.points import image_means, pair_means, point_counts
from open_gem.evaluation.metrics.scores import (
    Score,
    frequency_weighted_iou,
    mean_accuracy,
    mean_iou,
    micro_iou,
    pixel_accuracy,
    point_accuracy,
    ratio,
)
from open_gem.evaluation.metrics.segmentation import boundary_counts, region_counts
from open_gem.evaluation.protocol import EvalProtocol
from open_gem.localization import Localization
from open_gem.method.run import Encoded
from open_gem.text import Vocabulary
from open_gem.types import Grid, Size

Dataset = Segmentation | Points

# Tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EvalTask:
    """A question about one image, and how the result is counted: a row of `Records` for some names of `SCORES`."""

    vocabulary: Vocabulary
    count: Callable[[Localization, EvalProtocol], dict[str, ImageCounts]]


def tasks_of(dataset: Dataset, sample: Sample | PointSample, size: Size, protocol: EvalProtocol) -> list[EvalTask]:
    """Return the tasks of a sample whose image has this `size`; none if no class has a positive point.

    Raises DatasetError if its labels cannot be read or have another size than the image.
    """
    if isinstance(sample, PointSample):
        return [_points_task(sample)] if sample.positive else []
    assert isinstance(dataset, Segmentation)
    pixels = _pixels_task(dataset, sample, size, protocol)
    return [pixels, _objects_task(sample)] if isinstance(sample, SceneSample) else [pixels]


def _is_best_present(result: Localization, sample: SceneSample) -> ImageCounts:
    """Count whether the concept with the highest image-level score is in the scene."""
    assert result.scores is not None
    best = result.labels[int(result.scores.argmax())]
    return mean_counts([int(best in sample.scene.names)])


def _names(dataset: Segmentation, protocol: EvalProtocol) -> str | None:
    return protocol.names if protocol.names in dataset.vocabularies else None


def _pixels_task(dataset: Segmentation, sample: Sample, size: Size, protocol: EvalProtocol) -> EvalTask:
    """Return the task of one class for each pixel: the background class if no label is probable enough."""
    no_label = -1 if dataset.background is None else dataset.background
    all_classes = [*dataset.foreground, no_label]  # −1, no label, takes the last
    class_of = torch.tensor(all_classes, dtype=torch.int64, device="cpu")
    true, classes = torch.from_numpy(sample.labels()), len(dataset.classes)
    if tuple(true.shape) != size:
        actual, expected = ("×".join(map(str, sides)) for sides in (true.shape, size))
        raise DatasetError(f"labels of {sample.id!r} are {actual} (height × width), expected its image's {expected}")

    def count(result: Localization, protocol: EvalProtocol) -> dict[str, ImageCounts]:
        threshold = None if dataset.background is None else protocol.background_of(dataset.name)
        predicted = class_of[result.segment(threshold, absent=protocol.absent).cpu()]
        rows: dict[str, ImageCounts] = {
            "pixels": region_counts(predicted, true, classes),
            "boundaries": boundary_counts(predicted, true, classes),
        }
        return rows | {"top1": _is_best_present(result, sample)} if isinstance(sample, SceneSample) else rows

    return EvalTask(dataset.vocabulary(_names(dataset, protocol)), count)


def _points_task(sample: PointSample) -> EvalTask:
    """Return a task per present class: its min-max map above a threshold, at the points that people have labelled."""
    xy, of, yes = (torch.from_numpy(values) for values in (sample.xy, sample.of, sample.yes))

    def count(result: Localization, protocol: EvalProtocol) -> dict[str, ImageCounts]:
        masks = result.masks(protocol.threshold)
        return {
            "points": {
                sample.classes[label]: point_counts(masks[index].cpu(), xy[of == label], yes[of == label])
                for index, label in enumerate(sample.positive)
            }
        }

    return EvalTask(Vocabulary.of([sample.names[label] for label in sample.positive]), count)


def _objects_task(sample: SceneSample) -> EvalTask:
    """Return the task of locating each object of a scene by its name."""
    masks, boxes = (torch.from_numpy(values) for values in (sample.scene.masks, sample.scene.boxes))

    def count(result: Localization, protocol: EvalProtocol) -> dict[str, ImageCounts]:
        best = [predicted.xyxy for predicted in result.boxes(protocol.threshold, instances="label")]
        predicted = result.masks(protocol.threshold).stack().cpu()
        return {
            "pointing": pointing_game(result.points(), masks),
            "masks": mask_overlap(predicted, masks),
            "mask_boundaries": boundary_overlap(predicted, masks),
            "boxes": box_overlap(best, boxes),
        }

    return EvalTask(Vocabulary.of(sample.scene.names), count)


# Analysis -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def analyse(
    dataset: Dataset,
    sample: Sample | PointSample,
    protocol: EvalProtocol,
    encoded: Encoded,
    encode_text: Callable[[list[str]], Tensor],
    project: Callable[[Tensor], Tensor],
) -> dict[str, ImageCounts]:
    """Analyse one image's patches as the paper does (section 5): in the joint space, and after each traced block
    ("@7").

    encoded      of this image alone; its `trace` is analysed too
    encode_text  labels → their embeddings `(p, e)`
    project      tokens of a block → the joint space, where texts are; only the text contrast needs it

    Masks are those of the present classes. All other patches are outside of them, including the background (eqs. 7 to 9
    have k ∉ M); only void pixels are neither inside nor outside, if the data set distinguishes them from background.
    """
    if not (isinstance(dataset, Segmentation) and isinstance(sample, Sample)):
        return {}
    label_of = dict(zip(dataset.foreground, dataset.vocabulary(_names(dataset, protocol)).labels, strict=True))
    labels = torch.from_numpy(sample.labels())
    present = [index for index in labels.unique().tolist() if index in label_of]
    masks = torch.stack([labels == index for index in present]) if present else None
    void = None if dataset.background is None else labels == IGNORE
    text = encode_text([label_of[index] for index in present]).cpu() if present else None

    def measures(patches: Tensor, joint: Tensor, grid: Grid, name: str) -> Iterator[tuple[str, ImageCounts]]:
        yield f"patch_similarity{name}", mean_counts([patch_similarity(patches).item()])
        if masks is not None and text is not None:
            sides = to_grid(masks, grid, void)
            yield f"object_contrast{name}", mean_counts(object_contrast(patches, sides).tolist())
            yield f"text_contrast{name}", mean_counts(text_contrast(joint, text, sides).tolist())

    patches = encoded.patches[0].cpu()
    rows = dict(measures(patches, patches, encoded.grid, ""))
    for block, tokens in encoded.trace.items():
        patches, joint = (values[0, encoded.prefix :].cpu() for values in (tokens, project(tokens)))
        rows |= measures(patches, joint, encoded.grid, f"@{block}")
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
    "mask_boundaries": {"mask_boundary_iou": (_as_counted, ratio)},
    "boxes": {"box_iou": (_as_counted, ratio)},
    "top1": {"top1": (_as_counted, ratio)},
    "patch_similarity": {"patch_similarity": (_as_counted, ratio)},
    "object_contrast": {"object_contrast": (_as_counted, ratio)},
    "text_contrast": {"text_contrast": (_as_counted, ratio)},
}
"""The scores of each kind of count: a function of the records, then the score of their sum."""


class Estimate(NamedTuple):
    """A score over all images, in [0, 1] (in [-1, 1] for the analysis), or the difference of two scores, with its 95 %
    bootstrap interval over images."""

    value: float
    low: float
    high: float


def scores(counts: Mapping[str, Records]) -> dict[str, Estimate]:
    """Return every score of one method, with bootstrap intervals over images; NaN if nothing was counted. Names of
    scores of a single block end in its number: "patch_similarity@7"."""
    return {name: _estimate(score, records) for name, score, records in _scored(counts)}


def differences(counts: Mapping[str, Records], other: Mapping[str, Records]) -> dict[str, Estimate]:
    """Return every score of one method minus that of another on the same images, with the paired interval of the
    difference; NaN if nothing was counted for one of them.

    Raises InputError if the images are not the same.
    """
    others = {name: records for name, _, records in _scored(other)}
    return {name: _estimate(score, records, others[name]) for name, score, records in _scored(counts) if name in others}


def _scored(counts: Mapping[str, Records]) -> Iterator[tuple[str, Score, Records]]:
    """Yield every score by its name, with the records that it is made of."""
    for counted, records in counts.items():
        kind, at, block = counted.partition("@")
        for name, (prepare, score) in SCORES[kind].items():
            yield name + at + block, score, prepare(records)


def _estimate(score: Score, records: Records, other: Records | None = None) -> Estimate:
    """Return a score, or its difference from that of `other`."""
    if not records.classes or (other is not None and not other.classes):
        return Estimate(math.nan, math.nan, math.nan)
    if other is None:
        return Estimate(records.value(score), *bootstrap(records, score))
    return Estimate(records.value(score) - other.value(score), *bootstrap_difference(records, other, score))
