"""Localizations as JSON: labels and their objects, masks as run lengths or PNG, similarities as base64."""

import io
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from open_gem.localization import Localization
from open_gem.objects import Object
from open_gem.serve.schemas import LocatedLabel, LocatedObject, Options
from open_gem.text import Vocabulary


def by_label(located: Localization) -> Iterator[Localization]:
    """Yield one localization per label: maps of the image's size take long, and are made for one label at a time."""
    vocabulary = Vocabulary.of(located.labels) if located.vocabulary is None else located.vocabulary
    end = 0
    for index, (label, prompts) in enumerate(zip(located.labels, vocabulary.prompts, strict=True)):
        start, end = end, end + len(prompts)
        yield replace(
            located,
            labels=(label,),
            maps=located.maps[start:end],
            scores=None if located.scores is None else located.scores[[index]],
            detections=None if located.detections is None else (located.detections[index],),
            presence=None if located.presence is None else located.presence[[index]],
            vocabulary=Vocabulary((label,), (prompts,)),
        )


def describe(label: Localization, options: Options) -> tuple[LocatedLabel, list[LocatedObject]]:
    """Return the answer for a localization of one label, and its objects."""
    answer = LocatedLabel(
        label=label.labels[0],
        score=_number(label.scores),
        presence=_number(label.presence),
        present=label.present(options.presence)[0],
    )
    if options.similarity:
        answer.similarity = _as_float16(label.similarity.amax(dim=0))
    objects = objects_of(label, options) if options.objects else []
    return answer, [_describe_object(obj, options.mask) for obj in objects]


def objects_of(label: Localization, options: Options) -> list[Object]:
    """Return the objects of a label, best first, as the options say."""
    return label.objects(
        options.threshold,
        presence=options.presence,
        instances=options.instances,
        masks=options.mask != "none",
    )


def confidence(obj: Object) -> float:
    """Return a number in [0, 1] that ranks objects of all labels: a label's best object has its presence, others less;
    for models without presence, the score."""
    return round(obj.score if obj.presence is None or obj.peak is None else obj.presence * obj.peak, 6)


def _describe_object(obj: Object, mask: str) -> LocatedObject:
    fields: dict[str, Any] = obj.to_dict() | {"confidence": confidence(obj)}
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
