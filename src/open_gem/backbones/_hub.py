"""Checkpoints in Hugging Face's format, from the hub or a folder: read strictly, without running code that they bring.

`name` is "org/repo" or "local-dir:folder" everywhere. Errors are one line: UnknownModelError where the hub has no such
repository, UnsupportedModelError where it holds something that transformers does not know, WeightsError for the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from open_gem.backbones._weights import mismatch, quiet, reason_of
from open_gem.errors import OpenGemError, UnknownModelError, UnsupportedModelError, WeightsError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def configuration(name: str, cache_dir: str | None = None) -> Any:
    """The configuration of a checkpoint, of the class that its `model_type` says."""
    with _telling(name):
        return AutoConfig.from_pretrained(_place(name), cache_dir=cache_dir, trust_remote_code=False)


def fetch(kind: Any, name: str, *, cache_dir: str | None = None, **settings: Any) -> nn.Module:
    """A model of class `kind` with the weights of `name`: float32, in evaluation mode. `settings` for its construction.

    Every weight must be there, in its shape, and none may be left over: transformers itself makes up what is missing,
    at random, and only logs it. Buffers `position_ids`, which older versions saved, are no weights, and it drops them.
    """
    with _telling(name):
        model, found = kind.from_pretrained(
            _place(name),
            cache_dir=cache_dir,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so as to name them: what it raises itself does not
            **settings,
        )
        reshaped = [key for key, *_ in found["mismatched_keys"]]
        if wrong := mismatch(found["missing_keys"], found["unexpected_keys"], reshaped):
            raise WeightsError(f"cannot load {name}: {wrong}")
    return model.eval()


def fetch_processor(name: str, cache_dir: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of a checkpoint, and what its preprocessor_config.json says about pictures, as it is written."""
    return fetch_tokenizer(name, cache_dir), picture_settings(name, cache_dir)


def fetch_tokenizer(name: str, cache_dir: str | None = None) -> Any:
    """The tokenizer of a checkpoint."""
    place = _place(name)
    if Path(place).is_dir() and not has_tokenizer(place):  # transformers makes one up, of three tokens
        raise WeightsError(f"cannot load {name}: it has no tokenizer, expected one of {', '.join(_TOKENIZER_FILES)}")
    with _telling(name):
        tokenizer = AutoTokenizer.from_pretrained(place, cache_dir=cache_dir, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise WeightsError(f"cannot load {name}: its tokenizer has no vocabulary")
    return tokenizer


def picture_settings(name: str, cache_dir: str | None = None) -> dict[str, Any]:
    """What a checkpoint's preprocessor_config.json says about pictures, as it is written."""
    with _telling(name):
        return ImageProcessingMixin.get_image_processor_dict(_place(name), cache_dir=cache_dir)[0]


def has_tokenizer(folder: str | Path) -> bool:
    """True where a folder holds the vocabulary of a tokenizer."""
    return any((Path(folder) / file).is_file() for file in _TOKENIZER_FILES)


def _place(name: str) -> str:
    """What transformers is to be given: the repository, or the folder's path."""
    if not name.startswith("local-dir:"):
        return name
    folder = Path(name.removeprefix("local-dir:"))
    if not folder.is_dir():
        raise WeightsError(f"no such folder: {folder}")
    return str(folder.absolute())


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """Silence inside; and whatever a hub, a file system or a checkpoint throws, as our error about `name`."""
    try:
        with quiet():
            yield
    except OpenGemError:
        raise
    except Exception as error:
        causes = list(_causes(error))
        if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
            if not any(isinstance(cause, GatedRepoError) for cause in causes):
                raise UnknownModelError(
                    f"unknown model {name!r}: the hub has no such repository, or shows it to nobody who is not logged in"
                ) from error
        message = str(error)
        if "trust_remote_code" in message:
            raise UnsupportedModelError(f"cannot read {name}: it brings its own code, which is never run") from error
        if isinstance(error, ValueError) and ("model_type" in message or "model type" in message):
            reason = message.split("\n")[0].rstrip(". ")
            raise UnsupportedModelError(f"cannot read {name}: {reason}") from error
        raise WeightsError(f"cannot load {name}: {reason_of(error)}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
