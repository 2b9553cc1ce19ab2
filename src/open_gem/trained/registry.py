"""Models of transformers that were trained to localize, to compare training-free readouts with.

A kind of model is a file and a row of `TRAINED`. Preprocessing, encoders, decoders and heads are the library's own.
"""

from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple

import torch

from open_gem.errors import UnsupportedModelError
from open_gem.towers.base import check_evaluating
from open_gem.towers.families import ORIGINAL
from open_gem.towers.hf_text import HfText
from open_gem.towers.loading import EMBEDDED, as_folder, find_device, find_dtype, is_transformers
from open_gem.towers.weights import finished, needs_transformers
from open_gem.trained.base import TrainedModel
from open_gem.trained.clipseg import CLIPSeg
from open_gem.trained.groupvit import GroupViT
from open_gem.trained.owl import OWL

__all__ = [
    "TRAINED",
    "adapt_trained",
    "forward_pass",
    "is_trained",
    "load_trained",
]


class TrainedSpec(NamedTuple):
    """One kind of model.

    reader     what reads it here
    model      name of its class in transformers
    processor  name of its image processor there: one that resizes with PIL, as the models' own code did
    part       attribute of the model that encodes texts; None for the model itself
    """

    reader: type[TrainedModel]
    model: str
    processor: str
    part: str | None

    def read(self, name: str, model: Any, tokenizer: Any, processor: Any) -> TrainedModel:
        """Return what localizes with a model of this kind."""
        part = model if self.part is None else getattr(model, self.part)
        return self.reader(name, model, HfText(part, tokenizer), processor)


TRAINED = {
    "groupvit": TrainedSpec(GroupViT, "GroupViTModel", "CLIPImageProcessorPil", None),
    "clipseg": TrainedSpec(CLIPSeg, "CLIPSegForImageSegmentation", "ViTImageProcessorPil", "clip"),
    "owlv2": TrainedSpec(OWL, "Owlv2ForObjectDetection", "Owlv2ImageProcessorPil", "owlv2"),
    "owlvit": TrainedSpec(OWL, "OwlViTForObjectDetection", "OwlViTImageProcessorPil", "owlvit"),
}
"""`model_type` of a configuration → its kind."""


def load_trained(
    name: str | PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    cache_dir: str | None = None,
) -> TrainedModel:
    """Load a model that was trained to localize, with its weights: a transformers repository or a folder in its format
    ("local-dir:folder"). Arguments as `towers.load`.

    Raises UnknownModelError, WeightsError or UnsupportedModelError, and InputError for the device and type.
    """
    placement = find_device(device), find_dtype(dtype)
    hub, library = _transformers()
    name = as_folder(name)
    kind = hub.configuration(name, cache_dir).model_type
    spec = _find_spec(kind, name)
    model = finished(hub.fetch(getattr(library, spec.model), name, cache_dir=cache_dir), *placement)
    tokenizer, settings = hub.fetch_processor(name, cache_dir)
    return spec.read(name, model, tokenizer, getattr(library, spec.processor).from_dict(settings))


def adapt_trained(model: Any, processor: Any, *, name: str = "transformers") -> TrainedModel:
    """Make a trained model of one of transformers in memory, and its processor; neither is ever changed.

    Raises UnsupportedModelError for another kind of model, InputError for one in training mode.
    """
    kind = type(model).__name__
    spec = next((spec for spec in TRAINED.values() if spec.model == kind), None)
    if spec is None:
        raise UnsupportedModelError(
            f"cannot read {kind}: expected {', '.join(spec.model for spec in TRAINED.values())}"
        )
    check_evaluating(model)
    return spec.read(name, model, processor.tokenizer, processor.image_processor)


def is_trained(name: str, cache_dir: str | None = None) -> bool:
    """Return True if `name` is one for `load_trained`, by its configuration; weights are not fetched. Errors as
    there."""
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
    """Return what reads checkpoints, and the library."""
    try:
        import transformers

        from open_gem.towers import hub as _hub
    except ImportError as error:
        raise UnsupportedModelError(needs_transformers(error)) from error
    return _hub, transformers


def forward_pass(name: str, images: int, prompts: int) -> Callable[[], Any]:
    """Return a function that runs one pass of a model with random weights, to measure, see `random.forward_pass`.
    Raises UnsupportedModelError without transformers."""
    _transformers()
    from open_gem.trained import random

    return random.forward_pass(name, images, prompts)
