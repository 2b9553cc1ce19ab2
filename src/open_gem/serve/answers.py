"""Localizations as JSON: the values of each phrase, masks as run lengths or pictures, similarities as base64."""

import io
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_gem import readout
from open_gem.localization import Localization
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


MASKS: dict[str, Callable[[Tensor], Any]] = {"rle": as_rle, "png": as_png, "none": lambda mask: None}


def as_float16(similarity: Tensor) -> str:
    """A map `(r, k)` as base64 of little-endian float16, row by row."""
    return b64encode(similarity.float().numpy().astype("<f2").tobytes()).decode("ascii")


def by_prompt(found: Localization) -> Iterator[Localization]:
    """One localization per prompt: maps at pixel size of many prompts take long, and are made one prompt at a time."""
    vocabulary = Vocabulary.of(found.prompts) if found.vocabulary is None else found.vocabulary
    for index, label in enumerate(found.prompts):
        phrases = [at for at, group in enumerate(vocabulary.groups) if group == index]
        yield replace(
            found,
            prompts=(label,),
            maps=found.similarity[phrases],
            scores=None if found.scores is None else found.scores[[index]],
            presence=None if found.presence is None else found.presence[[index]],
            vocabulary=Vocabulary((label,), (vocabulary.synonyms[index],)),
        )


def result(label: Localization, *, threshold: float | None, mask: str, similarity: bool, place: bool) -> Result:
    """The values of one prompt.

    threshold   of the min-max map, in [0, 1]; None: 0.5
    mask        a name of `MASKS`
    similarity  with the cosines on the patch grid
    place       with box and point
    """
    limit = THRESHOLD if threshold is None else threshold
    grid = as_float16(label.similarity[0]) if similarity else None
    whole = {"prompt": label.prompts[0], "score": value(label.scores), "presence": value(label.presence)}
    return Result(**whole, **_placed(label, limit, mask, place), similarity=grid)


def _placed(found: Localization, limit: float, mask: str, place: bool) -> dict[str, Any]:
    """Box, point and mask: what `Localization.boxes`, `points` and `masks` give, from one map at pixel size."""
    if not place and mask == "none":
        return {"box": None, "point": None, "mask": None}
    cosine = found.heatmaps("cosine")[0]
    inside = readout.min_max(cosine) > limit
    boxes = readout.component_boxes(inside, cosine).xyxy.tolist() if place else []
    return {
        "box": boxes[0] if boxes else None,
        "point": list(readout.peak(cosine)) if place else None,
        "mask": MASKS[mask](inside),
    }


def object_scores(label: Localization, cosines: Sequence[float]) -> list[float]:
    """A confidence for each object of one label, by which objects can be ranked, from the highest cosine inside it.

    The label's presence times the highest value of the min-max map inside the object, in [0, 1]: the best object has
    the presence, others less. For models without presence, the cosine as it is.
    """
    presence = value(label.presence)
    if presence is None:
        return [round(cosine, 6) for cosine in cosines]
    stretch = readout.min_max_of(label.heatmaps("cosine")[0].float())
    return [
        round(presence * peak, 6) for peak in stretch(torch.tensor(cosines, dtype=torch.float32, device="cpu")).tolist()
    ]


def value(values: Tensor | None) -> float | None:
    """The one value `(1,)` there is."""
    return None if values is None else round(values.item(), 6)
