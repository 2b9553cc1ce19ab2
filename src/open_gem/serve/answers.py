"""Localizations as JSON: the values of each prompt, masks as run lengths or PNG, similarities as base64."""

import io
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from open_gem.localization import Localization
from open_gem.objects import Object
from open_gem.rle import run_lengths
from open_gem.serve.schemas import Result
from open_gem.text import Vocabulary
from open_gem.types import Size

THRESHOLD = 0.5  # of a min-max map, as `Localization.masks` has it


def as_rle(mask: Tensor) -> dict[str, Any]:
    """A mask `(y, x)` in COCO's compressed run-length encoding."""
    height, width = mask.shape
    return run_lengths(mask.numpy(), (slice(0, height), slice(0, width)), Size(height, width))


def as_png(mask: Tensor) -> str:
    """A mask `(y, x)` as base64 of a PNG, 255 inside and 0 outside."""
    file = io.BytesIO()
    Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(file, format="PNG", compress_level=1)
    return b64encode(file.getvalue()).decode("ascii")


MASKS: dict[str, Callable[[Tensor], Any]] = {"rle": as_rle, "png": as_png}


def as_float16(similarity: Tensor) -> str:
    """A map `(r, k)` as base64 of little-endian float16, row by row."""
    return b64encode(similarity.float().numpy().astype("<f2").tobytes()).decode("ascii")


def by_prompt(located: Localization) -> Iterator[Localization]:
    """One localization per prompt: maps of the image's size take long, and are made one prompt at a time."""
    vocabulary = Vocabulary.of(located.labels) if located.vocabulary is None else located.vocabulary
    end = 0
    for index, (label, phrases) in enumerate(zip(located.labels, vocabulary.prompts, strict=True)):
        start, end = end, end + len(phrases)
        yield replace(
            located,
            labels=(label,),
            maps=located.maps[start:end],
            scores=None if located.scores is None else located.scores[[index]],
            detections=None if located.detections is None else (located.detections[index],),
            presence=None if located.presence is None else located.presence[[index]],
            vocabulary=Vocabulary((label,), (phrases,)),
        )


def result(label: Localization, *, threshold: float | None, mask: str, similarity: bool, place: bool) -> Result:
    """The values of one prompt.

    threshold   of the min-max map, in [0, 1]; None: 0.5
    mask        a name of `MASKS`, or "none"
    similarity  with the cosines on the patch grid
    place       with box and point
    """
    limit = THRESHOLD if threshold is None else threshold
    box, point = _place(label, limit) if place else (None, None)
    return Result(
        prompt=label.labels[0],
        score=value(label.scores),
        presence=value(label.presence),
        box=box,
        point=point,
        mask=MASKS[mask](label.masks(limit)[0]) if mask in MASKS else None,
        similarity=as_float16(label.similarity[0]) if similarity else None,
    )


def _place(label: Localization, threshold: float) -> tuple[list[int] | None, list[int]]:
    """The box of the best object, and the most confident pixel."""
    best = next(iter(label.objects(threshold, presence=0, min_area=0, masks=False)), None)
    point = label.points()[0].tolist() if best is None or best.point is None else list(best.point)
    return None if best is None else list(best.box), point


def objects(label: Localization, *, threshold: float = THRESHOLD, presence: float) -> list[Object]:
    """The objects of one label, whose scores rank objects of all labels.

    A score is the label's presence times the highest value of the min-max map inside the object, in [0, 1]: the best
    object has the presence, others less. For models without presence, it is the highest cosine.
    """
    share = value(label.presence)
    return [
        replace(one, score=round(one.score if share is None or one.peak is None else share * one.peak, 6))
        for one in label.objects(threshold, presence=presence)
    ]


def value(values: Tensor | None) -> float | None:
    """The number in a tensor `(1,)`."""
    return None if values is None else round(values.item(), 6)
