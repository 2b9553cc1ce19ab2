"""Localizations as JSON: labels and their objects, masks as run lengths or PNG, similarities as base64."""

import io
from base64 import b64encode
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_gem.localization import Localization
from open_gem.objects import Object
from open_gem.serve.errors import RequestError
from open_gem.serve.schemas import LocatedLabel, LocatedObject, Options


def describe(
    label: Localization, is_present: bool, objects: Sequence[Object], options: Options, max_pixels: int
) -> tuple[LocatedLabel, list[LocatedObject]]:
    """Return the answer for a localization of one label, and its objects.

    max_pixels  of all PNGs of masks together: beyond it RequestError is raised
    """
    answer = LocatedLabel(
        label=label.labels[0], score=_number(label.scores), presence=_number(label.presence), present=is_present
    )
    if options.similarity:
        own = 1 if label.vocabulary is None else len(label.vocabulary.prompts[0])
        answer.similarity = _as_float16(reduce(torch.maximum, label.maps[:own]))
    pixels = label.size.height * label.size.width
    if options.mask == "png" and len(objects) * pixels > max_pixels:
        raise RequestError(
            413, f"{len(objects)} masks of {pixels} pixels as PNG, expected {max_pixels} pixels at most: see mask=rle"
        )
    return answer, [_describe_object(obj, options.mask) for obj in objects]


def objects_of(located: Localization, options: Options, absent: str = "none") -> list[Object]:
    """Return the objects of labels that are present by the rule `absent`, best first within each, as the options
    say."""
    return located.objects(
        options.threshold,
        options.scale,
        presence=options.presence,
        absent=absent,
        min_area=options.min_area,
        instances=options.instances,
        exclusive=options.exclusive,
        nms=options.nms,
        masks=options.mask != "none",
    )


def _describe_object(obj: Object, mask: str) -> LocatedObject:
    fields: dict[str, Any] = obj.to_dict()
    if mask == "png" and obj.mask is not None:
        fields["mask"] = _as_png(obj.mask)
    return LocatedObject(**fields)


def _as_png(mask: np.ndarray) -> str:
    """Encode a mask `(y, x)` as base64 of a PNG, 255 inside and 0 outside."""
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG", compress_level=1)
    return b64encode(file.getvalue()).decode("ascii")


def _as_float16(similarity: Tensor) -> str:
    """Encode a map `(r, k)` as base64 of little-endian float16, row by row."""
    return b64encode(similarity.float().numpy().astype("<f2").tobytes()).decode("ascii")


def _number(values: Tensor | None) -> float | None:
    """Return the number in a tensor `(1,)`."""
    return None if values is None else round(values.item(), 6)
