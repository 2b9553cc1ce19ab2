"""What the model saw, kept beside the parts: from it come objects by other thresholds, without the model.

    for image in kept_images(Parts.open("labels")):
        image.id, image.localization.presence              # (p,) of the labels; scores are beside it
        image.localization.maps                            # (q, r, k) of all prompts, those of the background last
        image.localization.objects(0.4, presence=0.9)

Each map is kept as 16-bit steps between its lowest and its highest cosine. A step is 1/65535 of the map's range: for
cosines between 0.15 and 0.30 that is 2e-6, where float16 has steps of 1e-4 and 2e-4. Labelling itself makes objects of
the kept values, so that both agree exactly.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from open_gem.errors import InputError
from open_gem.label.ontology import Ontology
from open_gem.label.parts import LabelRow, Parts
from open_gem.localization import Localization
from open_gem.tensors import at_least_float32
from open_gem.text import Vocabulary
from open_gem.types import Size

STEPS = 65535  # between the lowest and the highest value of a map
CODES = np.dtype("<u2")


class KeptImage(NamedTuple):
    """An image without an error: its id, and the localization as labelling saw it, without the image and without its
    refinement. Maps that were not kept are NaN."""

    id: str
    localization: Localization


def kept_images(parts: Parts) -> Iterator[KeptImage]:
    """Yield what was kept of each image without an error, in the order of the rows, with a few of them in memory.

    Raises InputError if nothing was kept, OutputError for a file that cannot be read.
    """
    vocabulary = kept_vocabulary(parts)
    for path in parts.paths():
        for row, kept in parts.with_kept(path, "id", "status", "height", "width"):
            if kept is not None:
                yield KeptImage(row["id"], restore(kept, vocabulary, Size(row["height"], row["width"])))


def kept_vocabulary(parts: Parts) -> Vocabulary:
    """Return the labels and prompts of kept maps. Raises InputError if the folder keeps nothing."""
    settings = parts.manifest.settings
    if settings.get("keep") is None:
        raise InputError(
            f"nothing that the model saw is kept in {str(parts.folder)!r}: expected labels made without --no-keep, "
            "and without views merged as logits"
        )
    return Ontology.of(settings["classes"]).vocabulary


def keep(localization: Localization, floor: float) -> LabelRow:
    """Return what to keep of one image, see `parts.kept_schema`.

    floor  only maps of labels whose presence is not below it; 0 keeps those of all prompts, also of the background
    """
    vocabulary = localization.vocabulary or Vocabulary.of(localization.labels)
    present = localization.present(floor)
    wanted = [floor == 0 if group < 0 else present[group] for group in vocabulary.groups]
    maps = at_least_float32(localization.similarity).to(device="cpu", dtype=torch.float32).numpy()
    codes, low, high = _quantize(maps[wanted])
    limits = np.full((2, len(wanted)), np.nan, np.float32)
    limits[:, wanted] = low, high
    return {
        "grid": list(maps.shape[1:]),
        "logit_scale": localization.logit_scale,
        "scores": _numbers(localization.scores),
        "presence": _numbers(localization.presence),
        **{name: _or_none(values) for name, values in zip(("low", "high"), limits, strict=True)},
        "values": codes.tobytes(),
    }


def restore(kept: LabelRow, vocabulary: Vocabulary, size: Size) -> Localization:
    """Return the localization of an image of `size` from what was kept of it; maps that were not kept are NaN."""
    low, high = (np.array(kept[name], np.float32) for name in ("low", "high"))  # None becomes NaN
    wanted = ~np.isnan(low)
    maps = np.full((len(low), *kept["grid"]), np.nan, np.float32)
    codes = np.frombuffer(kept["values"], CODES).reshape(-1, *kept["grid"])
    maps[wanted] = _restored(codes, low[wanted], high[wanted])
    scores, presence = (
        None if kept[name] is None else torch.tensor(kept[name], dtype=torch.float32, device="cpu")
        for name in ("scores", "presence")
    )
    return Localization(
        vocabulary.labels,
        torch.from_numpy(maps),
        size,
        scores,
        kept["logit_scale"],
        presence=presence,
        vocabulary=vocabulary,
    )


def _quantize(
    maps: Float[np.ndarray, "m r k"],
) -> tuple[np.ndarray, Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Return codes `(m, r, k)` uint16 of maps, and their lowest and highest values."""
    low, high = (extreme(maps, axis=(1, 2)) for extreme in (np.min, np.max))
    span = (high.astype(np.float64) - low)[:, None, None]
    shares = np.divide(maps - low[:, None, None].astype(np.float64), span, out=np.zeros(maps.shape), where=span > 0)
    return np.rint(STEPS * shares).astype(CODES), low, high


def _restored(
    codes: np.ndarray, low: Float[np.ndarray, " m"], high: Float[np.ndarray, " m"]
) -> Float[np.ndarray, "m r k"]:
    """Return maps from what `_quantize` gives: lowest and highest values are exact."""
    low, high = (limit[:, None, None].astype(np.float64) for limit in (low, high))
    return (low + codes * (high - low) / STEPS).astype(np.float32)


def _numbers(values: Tensor | None) -> list[float] | None:
    return None if values is None else at_least_float32(values).tolist()


def _or_none(values: np.ndarray) -> list[Any]:
    return [None if np.isnan(value) else value for value in values.tolist()]
