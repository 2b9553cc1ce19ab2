"""Models that were trained to localize, of transformers: what training-free readouts are compared with.

    Trained = the library's model, tokenizer and image processor, and what becomes of its output here

A kind of model is a file and a spec of `TRAINED`. Preprocessing, encoders, decoders and heads are the library's own.
"""

from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple

import torch

from open_gem.errors import UnsupportedModelError
from open_gem.towers.base import check_evaluating
from open_gem.towers.families import ORIGINAL
from open_gem.towers.loading import EMBEDDED, as_folder, find_device, find_dtype, is_transformers
from open_gem.towers.weights import finished, needs_transformers
from open_gem.trained.base import Grounding, Trained
from open_gem.trained.clipseg import CLIPSeg
from open_gem.trained.groupvit import GroupViT
from open_gem.trained.owl import OWL

__all__ = [
    "TRAINED",
    "Grounding",
    "Trained",
    "adapt_trained",
    "forward_pass",
    "is_trained",
    "load_trained",
]


class TrainedSpec(NamedTuple):
    """One kind of model: what reads it here, and the names of transformers' classes for model and pictures.

    The image processors are those that resize with PIL, as the models' own code did.
    """

    reader: type[Trained]
    model: str
    images: str


TRAINED = {  # a configuration's model_type -> its spec
    "groupvit": TrainedSpec(GroupViT, "GroupViTModel", "CLIPImageProcessorPil"),
    "clipseg": TrainedSpec(CLIPSeg, "CLIPSegForImageSegmentation", "ViTImageProcessorPil"),
    "owlv2": TrainedSpec(OWL, "Owlv2ForObjectDetection", "Owlv2ImageProcessorPil"),
    "owlvit": TrainedSpec(OWL, "OwlViTForObjectDetection", "OwlViTImageProcessorPil"),
}


def load_trained(
    name: str | PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    cache_dir: str | None = None,
) -> Trained:
    """Load a model that was trained to localize, with its weights: a transformers repository or a folder in its format
    ("local-dir:folder"). Arguments as `towers.load`.

    Raises UnknownModelError, WeightsError or UnsupportedModelError, and InputError for the device and type.
    """
    where = find_device(device), find_dtype(dtype)
    hub, library = _transformers()
    name = as_folder(name)
    kind = hub.configuration(name, cache_dir).model_type
    spec = _find_spec(kind, name)
    model = finished(hub.fetch(getattr(library, spec.model), name, cache_dir=cache_dir), *where)
    tokenizer, settings = hub.fetch_processor(name, cache_dir)
    return spec.reader(name, model, tokenizer, getattr(library, spec.images).from_dict(settings))


def adapt_trained(model: Any, processor: Any, *, name: str = "transformers") -> Trained:
    """The same around a model of transformers that is in memory, and its processor; it never changes either.

    Raises UnsupportedModelError for another model, InputError where it is in training mode.
    """
    kind = type(model).__name__
    spec = next((spec for spec in TRAINED.values() if spec.model == kind), None)
    if spec is None:
        raise UnsupportedModelError(
            f"cannot read {kind}: expected {', '.join(spec.model for spec in TRAINED.values())}"
        )
    check_evaluating(model)
    return spec.reader(name, model, processor.tokenizer, processor.image_processor)


def is_trained(name: str, cache_dir: str | None = None) -> bool:
    """True where `name` is one for `load_trained`, by its configuration; weights are not fetched. Errors as there."""
    name = as_folder(name)
    if name in (EMBEDDED, *ORIGINAL) or not is_transformers(name):
        return False
    return _transformers()[0].configuration(name, cache_dir).model_type in TRAINED


def _find_spec(model_type: str, name: str) -> TrainedSpec:
    if model_type not in TRAINED:
        raise UnsupportedModelError(
            f"{name} ({model_type}) is not a model trained to localize that can be read here, which are of type "
            f"{', '.join(TRAINED)}; for training-free readouts use open_gem.load({name!r})"
        )
    return TRAINED[model_type]


def _transformers() -> tuple[Any, Any]:
    """What reads checkpoints, and the library."""
    try:
        import transformers

        from open_gem.towers import hub as _hub
    except ImportError as error:
        raise UnsupportedModelError(needs_transformers(error)) from error
    return _hub, transformers


def forward_pass(name: str, images: int, prompts: int) -> Callable[[], Any]:
    """One pass of a model with random weights, to measure, see `random.forward_pass`. Raises UnsupportedModelError
    without transformers."""
    _transformers()
    from open_gem.trained import random

    return random.forward_pass(name, images, prompts)
