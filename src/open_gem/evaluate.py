"""Measure pathways on a data set: one loop, one pass of the model an image for all of them, counts that add.

    counts = evaluate(localizer, {"gem": "gem", "clip": "clip"}, open_dataset("voc2012", root))
    scores(counts["gem"])["mean_iou"]          # an Estimate: value, low, high

What is counted depends on what a data set knows: label maps, labelled points, or (scenes) whole objects. `runs` keeps
counts on disk, so that a run can be interrupted anywhere, shared between machines, and gone on with.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from open_gem.datasets import IGNORE, Points, PointSample, Sample, SceneSample, Segmentation
from open_gem.errors import ImageError, InputError
from open_gem.imaging import size_of
from open_gem.localization import Localization
from open_gem.localizer import Localizer
from open_gem.methods import Pathway
from open_gem.metrics import (
    Mean,
    Records,
    Row,
    Score,
    bootstrap,
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
from open_gem.pathway import Features
from open_gem.prompts import Vocabulary
from open_gem.protocols import Protocol
from open_gem.trained import TrainedLocalizer

Dataset = Segmentation | Points
Counts = dict[str, Records]  # of one pathway, by what is counted

# What is asked of a picture, and what is counted ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of one picture, and how the answer is counted: by each name of `SCORES` a row of `Records`."""

    vocabulary: Vocabulary
    count: Callable[[Localization], dict[str, Row]]


def questions(dataset: Dataset, sample: Sample | PointSample, protocol: Protocol) -> list[Question]:
    """What is asked of a sample of a data set."""
    if isinstance(sample, PointSample):
        return [_ask_points(sample, protocol)]
    assert isinstance(dataset, Segmentation)
    of_pixels = _ask_pixels(dataset, sample, protocol)
    return [of_pixels, *_ask_objects(sample, protocol)] if isinstance(sample, SceneSample) else [of_pixels]


def _best_is_there(found: Localization, sample: SceneSample) -> Row:
    """Whether the likeliest of all concepts, by the image as a whole, is in the scene."""
    assert found.scores is not None
    best = found.prompts[int(found.scores.argmax())]
    return Mean.of([int(best in sample.scene.names)]).row


def _ask_pixels(dataset: Segmentation, sample: Sample, protocol: Protocol) -> Question:
    """Every pixel to one class. The background class takes what no label is probable enough for."""
    names = protocol.names if protocol.names in dataset.vocabularies else None
    threshold = None if dataset.background is None else protocol.background_of(dataset.name)
    nobody = -1 if dataset.background is None else dataset.background
    class_of = torch.tensor([*dataset.foreground, nobody])  # −1, no label, takes the last
    true, classes = torch.from_numpy(sample.labels()), len(dataset.classes)

    def count(found: Localization) -> dict[str, Row]:
        predicted = class_of[found.segment(threshold).cpu()]
        rows: dict[str, Row] = {
            "pixels": confusion(predicted, true, classes).row,
            "boundaries": boundary(predicted, true, classes),
        }
        return rows | {"top1": _best_is_there(found, sample)} if isinstance(sample, SceneSample) else rows

    return Question(dataset.vocabulary(names), count)


def _ask_points(sample: PointSample, protocol: Protocol) -> Question:
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

    return Question(Vocabulary.of([sample.names[label] for label in sample.positive]), count)


def _ask_objects(sample: SceneSample, protocol: Protocol) -> list[Question]:
    """The objects of a scene by name: where each is; and of all concepts, whether the likeliest is there."""
    masks, boxes = (torch.from_numpy(values) for values in (sample.scene.masks, sample.scene.boxes))

    def count(found: Localization) -> dict[str, Row]:
        best = [one.xyxy for one in found.boxes(protocol.threshold, per="prompt")]
        return {
            "pointing": pointing_game(found.points(), masks).row,
            "masks": mask_overlap(found.masks(protocol.threshold).stack().cpu(), masks).row,
            "boxes": box_overlap(best, boxes).row,
        }

    return [Question(Vocabulary.of(sample.scene.names), count)]


def _analyse(
    localizer: Localizer,
    dataset: Dataset,
    sample: Sample | PointSample,
    protocol: Protocol,
    features: Features,
    at: int,
) -> dict[str, Row]:
    """The paper's analysis of one image's patches (section 5): of all, and of the mask of each class that is there."""
    if not (isinstance(dataset, Segmentation) and isinstance(sample, Sample)):
        return {}
    names = protocol.names if protocol.names in dataset.vocabularies else None
    label_of = dict(zip(dataset.foreground, dataset.vocabulary(names).labels, strict=True))
    labels, patches = torch.from_numpy(sample.labels()), features.patches[at].cpu()
    present = [int(one) for one in labels.unique() if int(one) in label_of]
    rows: dict[str, Row] = {"alike": Mean.of([patch_similarity(patches).item()]).row}
    if present:
        void = labels == IGNORE if len(present) > 1 or dataset.background is not None else None
        sides = to_grid(torch.stack([labels == one for one in present]), features.grid, void)
        text = localizer.text([label_of[one] for one in present]).cpu()
        rows["parted"] = Mean.of(object_contrast(patches, sides).tolist()).row
        rows["told"] = Mean.of(text_contrast(patches, text, sides).tolist()).row
    return rows


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
    "alike": {"patch_similarity": (_as_counted, ratio)},
    "parted": {"object_contrast": (_as_counted, ratio)},
    "told": {"text_contrast": (_as_counted, ratio)},
}
"""What is counted -> the scores made of it: what is done to the records first, and the score of their sum."""


class Estimate(NamedTuple):
    """A score over all images, in [0, 1] (of the analysis, in [-1, 1]), and its 95 % interval over such images."""

    value: float
    low: float
    high: float


def scores(counts: Mapping[str, Records]) -> dict[str, Estimate]:
    """Every score of one pathway, with intervals by bootstrap over images; NaN where nothing was counted."""
    found = {}
    for counted, records in counts.items():
        for name, (prepare, score) in SCORES[counted].items():
            prepared = prepare(records)
            interval = bootstrap(prepared, score) if prepared.classes else (float("nan"),) * 2
            found[name] = Estimate(prepared.value(score), *interval)
    return found


TRAINED = "as trained"
"""What stands for a pathway where a model was trained to localize."""

# The loop -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measured:
    """What one picture gave: of each pathway the rows by what is counted; or why it could not be read."""

    index: int
    id: str
    rows: dict[str, dict[str, Row]]
    error: str | None = None


@dataclass(frozen=True, eq=False)
class _Ready:
    index: int
    sample: Sample | PointSample
    picture: Image.Image
    pixels: Tensor | None  # None where the picture is looked at in several views


def measure(
    localizer: Localizer | TrainedLocalizer,
    pathways: Mapping[str, str | Pathway],
    dataset: Dataset,
    indices: Sequence[int],
    protocol: Protocol,
    *,
    batch: int = 8,
    workers: int = 2,
) -> Iterator[Measured]:
    """Every picture of `indices` once, in batches of one shape; a picture that cannot be read gives its error.

    Decoding runs ahead in `workers` threads. A model that was trained to localize has no pathways: `TRAINED` then.
    Raises DatasetError where the truth of a picture cannot be read.
    """
    localizer = protocol.settle(localizer)
    chunks = [indices[start : start + 4 * batch] for start in range(0, len(indices), 4 * batch)]
    with ThreadPoolExecutor(workers) as pool:
        prepare = partial(_prepare, localizer, dataset)
        ahead = [pool.submit(prepare, index) for chunk in chunks[:1] for index in chunk]
        for number in range(len(chunks)):
            ready = [future.result() for future in ahead]
            ahead = [pool.submit(prepare, index) for chunk in chunks[number + 1 : number + 2] for index in chunk]
            yield from (one for one in ready if isinstance(one, Measured))
            for group in _by_shape([one for one in ready if isinstance(one, _Ready)], batch):
                yield from _measure_group(localizer, pathways, dataset, protocol, group)


def _prepare(localizer: Localizer | TrainedLocalizer, dataset: Dataset, index: int) -> _Ready | Measured:
    sample = dataset[index]
    try:
        picture = sample.picture()
        if isinstance(localizer, Localizer) and localizer.views.is_plain:
            return _Ready(index, sample, picture, localizer.pixels(picture))
        return _Ready(index, sample, picture, None)
    except ImageError as error:
        return Measured(index, sample.id, {}, str(error))


def _by_shape(ready: Sequence[_Ready], batch: int) -> Iterator[list[_Ready]]:
    groups: dict[Any, list[_Ready]] = defaultdict(list)
    for one in ready:
        groups[one.index if one.pixels is None else one.pixels.shape].append(one)
    for group in groups.values():
        yield from (group[start : start + batch] for start in range(0, len(group), batch))


def _measure_group(
    localizer: Localizer | TrainedLocalizer,
    pathways: Mapping[str, str | Pathway],
    dataset: Dataset,
    protocol: Protocol,
    group: Sequence[_Ready],
) -> Iterator[Measured]:
    asked = [questions(dataset, one.sample, protocol) for one in group]
    if isinstance(localizer, TrainedLocalizer):
        for one, some in zip(group, asked, strict=True):
            rows: dict[str, Row] = {}
            for question in some:
                answer = localizer(one.picture, question.vocabulary)
                rows |= question.count(_by_protocol(answer, protocol, one.picture))
            yield Measured(one.index, one.sample.id, {TRAINED: rows})
        return
    sizes = [size_of(one.picture) for one in group]
    counted: list[dict[str, dict[str, Row]]] = [{name: {} for name in pathways} for _ in group]
    seen = (
        localizer.look(group[0].picture, pathways)
        if group[0].pixels is None
        else localizer.read(torch.stack([one.pixels for one in group if one.pixels is not None]), pathways)
    )
    for name, features in seen.items():
        for which in range(len(asked[0])):
            vocabularies = [some[which].vocabulary for some in asked]
            for index, found in enumerate(localizer.locate(features, vocabularies, sizes)):
                answer = _by_protocol(found, protocol, group[index].picture)
                counted[index][name] |= asked[index][which].count(answer)
        if protocol.analysis and isinstance(features, Features):
            for index, one in enumerate(group):
                counted[index][name] |= _analyse(localizer, dataset, one.sample, protocol, features, index)
    for one, row in zip(group, counted, strict=True):
        yield Measured(one.index, one.sample.id, row)


def _by_protocol(found: Localization, protocol: Protocol, picture: Image.Image) -> Localization:
    scale = found.logit_scale if None in (protocol.logit_scale, found.logit_scale) else protocol.logit_scale
    answer = replace(found, logit_scale=scale)
    return answer if protocol.refinement is None else answer.refined(picture, protocol.refinement)


def gather(measured: Iterable[Measured]) -> dict[str, Counts]:
    """The counts of each pathway over the pictures that could be read."""
    rows: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for one in measured:
        for name, counted in one.rows.items():
            for what, row in counted.items():
                rows[name][what][one.id] = row
    return {name: {what: Records(some) for what, some in counted.items()} for name, counted in rows.items()}


def evaluate(
    localizer: Localizer | TrainedLocalizer,
    pathways: Mapping[str, str | Pathway],
    dataset: Dataset,
    protocol: Protocol = Protocol(),  # noqa: B008 - frozen
    *,
    progress: Callable[[int], None] = lambda images: None,
    **settings: Any,
) -> dict[str, Counts]:
    """The counts of each pathway over a whole data set, in memory; `settings` as of `measure`.

    `progress` hears how many images are done. Raises ImageError for the first picture that cannot be read, and
    InputError for a data set without any.
    """
    if not len(dataset):
        raise InputError(f"{dataset.name} has no images, expected at least one")

    def watched() -> Iterator[Measured]:
        for one in measure(localizer, pathways, dataset, range(len(dataset)), protocol, **settings):
            if one.error is not None:
                raise ImageError(one.error)
            progress(1)
            yield one

    return gather(watched())
