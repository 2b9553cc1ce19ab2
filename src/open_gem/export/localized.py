"""A `Localization` as exporters know images: without parts on disk."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from open_gem import readout
from open_gem.export.labelled import LabelledImage, Object
from open_gem.localization import Localization
from open_gem.rle import run_lengths


def image_of(
    result: Localization,
    *,
    threshold: float = 0.5,
    scale: str = "minmax",
    presence: float = 0.0,
    least_area: float = 0.0005,
    image_id: str = "",
    source: str = "",
) -> LabelledImage:
    """The objects of a result: a connected part of a mask each, or a box that the model itself predicts.

    threshold, scale  of the masks, see `Localization.masks`
    presence          prompts that are less probable in the image than this have no objects; a min-max map has a
                      maximum, present or not
    least_area        share of the picture's pixels, in [0, 1], that a part has at least, as in labelling; smaller ones
                      are specks
    """
    shares = [None] * len(result.prompts) if result.presence is None else result.presence.tolist()
    objects = [
        one
        for index, share in enumerate(shares)
        if share is None or share >= presence
        for one in _objects(result, index, threshold, scale, least_area)
    ]
    objects.sort(key=lambda one: -one.score)
    return LabelledImage(image_id, source, result.size, tuple(objects), lambda: None, dict)


def _objects(result: Localization, index: int, threshold: float, scale: str, least_area: float) -> Iterator[Object]:
    name, score, presence = result.prompts[index], _at(result.scores, index), _at(result.presence, index)
    if result.detections is not None:
        boxes = result.boxes(threshold, scale)[index]
        for xyxy, best in zip(boxes.xyxy.tolist(), boxes.scores.tolist(), strict=True):
            yield Object(index, name, name, best, score, presence, tuple(xyxy), None, None)
        return
    labels, spans = readout.components(result.masks(threshold, scale)[index])
    cosine = result.heatmaps("cosine")[index].float().cpu().numpy()
    for number, (rows, columns) in enumerate(spans, start=1):
        mask = labels[rows, columns] == number
        if mask.sum() < least_area * labels.size:
            continue
        inside = np.where(mask, cosine[rows, columns], -np.inf)
        y, x = np.unravel_index(inside.argmax(), inside.shape)
        box = (columns.start, rows.start, columns.stop, rows.stop)
        point = (columns.start + int(x), rows.start + int(y))
        rle = run_lengths(mask, (rows, columns), result.size)
        yield Object(index, name, name, float(inside[y, x]), score, presence, box, point, rle)


def _at(values: Tensor | None, index: int) -> float | None:
    return None if values is None else values[index].item()
