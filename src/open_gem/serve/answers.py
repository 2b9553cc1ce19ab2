"""Localizations as JSON: the values of each phrase, masks as run lengths or pictures, similarities as base64."""

import io
from base64 import b64encode
from collections.abc import Callable
from threading import Event
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from open_gem import readout
from open_gem.label.labeling import run_lengths
from open_gem.localization import Localization
from open_gem.types import Size

THRESHOLD = 0.5  # of a min-max map, as `Localization.masks` has it


def as_rle(mask: Tensor) -> dict[str, Any]:
    """A mask `(y, x)` in COCO's compressed run-length encoding."""
    return run_lengths(mask.numpy(), (slice(None), slice(None)), Size(*mask.shape))


def as_png(mask: Tensor) -> str:
    """A mask `(y, x)` as base64 of a PNG, 255 inside and 0 outside."""
    file = io.BytesIO()
    Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(file, format="PNG", compress_level=1)
    return b64encode(file.getvalue()).decode("ascii")


MASKS: dict[str, Callable[[Tensor], Any]] = {"rle": as_rle, "png": as_png, "none": lambda mask: None}


def as_float16(similarity: Tensor) -> str:
    """A map `(r, k)` as base64 of little-endian float16, row by row."""
    return b64encode(similarity.float().numpy().astype("<f2").tobytes()).decode("ascii")


def results(
    found: Localization, gone: Event, *, threshold: float | None, mask: str, similarity: bool, place: bool
) -> list[dict[str, Any]]:
    """What was found of each phrase; stops early, and returns what there is, once the asker has `gone`.

    threshold   of the min-max map, in [0, 1]; None: 0.5
    mask        a name of `MASKS`
    similarity  with the cosines on the patch grid
    place       with box and point
    """
    limit = THRESHOLD if threshold is None else threshold
    told = []
    for index, prompt in enumerate(found.prompts):
        if gone.is_set():
            break
        one = {"prompt": prompt, "score": _at(found.scores, index), "presence": _at(found.presence, index)}
        one |= _placed(found, index, limit, mask, place)
        told.append(one | {"similarity": as_float16(found.similarity[index]) if similarity else None})
    return told


def _placed(found: Localization, index: int, limit: float, mask: str, place: bool) -> dict[str, Any]:
    """Box, point and mask: what `Localization.boxes`, `points` and `masks` give, from one map at pixel size."""
    if not place and mask == "none":
        return {"box": None, "point": None, "mask": None}
    cosine = found.heatmaps("cosine")[index]
    inside = readout.min_max(cosine) > limit
    boxes = readout.component_boxes(inside, cosine).xyxy.tolist() if place else []
    return {
        "box": boxes[0] if boxes else None,
        "point": list(readout.peak(cosine)) if place else None,
        "mask": MASKS[mask](inside),
    }


def _at(values: Tensor | None, index: int) -> float | None:
    return None if values is None else round(float(values[index]), 6)
