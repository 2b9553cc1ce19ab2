"""Models of transformers that were trained to localize, to compare training-free readouts with.

A kind of model is a file here and a row of `towers.families.LOCALIZING`. Preprocessing, encoders, decoders and heads
are the library's own.
"""

from collections.abc import Callable
from importlib import import_module
from os import PathLike
from typing import Any

import torch

from open_gem.errors import UnsupportedModelError
from open_gem.towers.base import check_evaluating
from open_gem.towers.families import LOCALIZING, ORIGINAL, TrainedFamily
from open_gem.towers.loading import EMBEDDED, as_folder, find_device, find_dtype, is_transformers
from open_gem.towers.weights import finished, needs_transformers
from open_gem.trained.base import TrainedModel

__all__ = [
    "adapt_trained",
    "forward_pass",
    "is_trained",
    "load_trained",
]


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
    place = find_device(device)
    placement = place, find_dtype(dtype, place)
    hub, library = _transformers()
    name = as_folder(name)
    config = hub.configuration(name, cache_dir)
    spec = _find_spec(config.model_type, name)
    loaded = hub.fetch(getattr(library, spec.model), name, cache_dir=cache_dir)
    model = finished(loaded, *placement)
    tokenizer, settings = hub.fetch_processor(name, cache_dir)
    return _read(spec, name, model, tokenizer, getattr(library, spec.processor).from_dict(settings))


def adapt_trained(model: Any, processor: Any, *, name: str = "transformers") -> TrainedModel:
    """Make a trained model of one of transformers in memory, and its processor; neither is ever changed.

    Raises UnsupportedModelError for another kind of model, InputError for one in training mode.
    """
    kind = type(model).__name__
    spec = next((spec for spec in LOCALIZING.values() if spec.model == kind), None)
    if spec is None:
        raise UnsupportedModelError(
            f"cannot read {kind}: expected {', '.join(spec.model for spec in LOCALIZING.values())}"
        )
    check_evaluating(model)
    return _read(spec, name, model, processor.tokenizer, processor.image_processor)


def is_trained(name: str, cache_dir: str | None = None) -> bool:
    """Return True if `name` is one for `load_trained`, by its configuration; weights are not fetched. Errors as
    there."""
    name = as_folder(name)
    if name in (EMBEDDED, *ORIGINAL) or not is_transformers(name):
        return False
    return _transformers()[0].configuration(name, cache_dir).model_type in LOCALIZING


def _read(spec: TrainedFamily, name: str, model: Any, tokenizer: Any, processor: Any) -> TrainedModel:
    """Return what localizes with a model of this kind."""
    kind = _reader(spec)
    part = model if spec.part is None else getattr(model, spec.part)
    return kind(name, model, kind.text_reader(part, tokenizer), processor)


def _reader(spec: TrainedFamily) -> type[TrainedModel]:
    file, _, reader = spec.reader.partition(":")
    return getattr(import_module(f"open_gem.trained.{file}"), reader)


def _find_spec(model_type: str, name: str) -> TrainedFamily:
    if model_type not in LOCALIZING:
        raise UnsupportedModelError(
            f"{name} ({model_type}) is not a model trained to localize that can be read here, which are of type "
            f"{', '.join(LOCALIZING)}; for training-free readouts use open_gem.load({name!r})"
        )
    return LOCALIZING[model_type]


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
