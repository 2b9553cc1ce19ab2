"""Checkpoints in Hugging Face's format, from the hub or a folder: read strictly, without running code in them.

`name` is "org/repo" or "local-dir:folder" everywhere. Errors are one line: UnknownModelError if the hub has no such
repository, UnsupportedModelError if it holds something that transformers does not know, WeightsError for the rest.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from open_gem.errors import OpenGemError, UnknownModelError, UnsupportedModelError, WeightsError
from open_gem.towers import weights as _weights
from open_gem.towers.weights import hub_or_cache, is_caused_by, mismatch, quiet, reason_of

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"  # an environment variable that transformers reads


def configuration(name: str, cache_dir: str | None = None) -> Any:
    """Return the configuration of a checkpoint, of the class that its `model_type` says."""
    with _reporting(name, cache_dir):
        return AutoConfig.from_pretrained(_place(name), cache_dir=cache_dir, trust_remote_code=False)


def fetch(kind: Any, name: str, *, cache_dir: str | None = None, **settings: Any) -> nn.Module:
    """Load a model of class `kind` with the weights of `name`: float32, for evaluation. `settings` go to
    `from_pretrained`; if they hold a `config` and a `state_dict`, `name` only appears in errors.

    Every weight must be there, in its shape: transformers itself initialises missing ones at random, and only logs it.
    Extra weights are an error in a `state_dict`, and a warning in a checkpoint that has its own configuration. Buffers
    `position_ids`, which older versions saved, are no weights.
    """
    brings_weights = "state_dict" in settings
    with _reporting(name, cache_dir):
        model, report = kind.from_pretrained(
            None if brings_weights else _place(name),
            cache_dir=cache_dir,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by name below
            **settings,
        )
        missing, extra = report["missing_keys"], report["unexpected_keys"]
        reshaped = [key for key, *_ in report["mismatched_keys"]]
        wrong = mismatch(missing, extra, reshaped)
        if wrong and (brings_weights or missing or reshaped):
            raise WeightsError(f"cannot load {name}: {wrong}")
    if wrong:
        warnings.warn(f"{name} has more weights than its architecture: {wrong.partition(': ')[2]}", stacklevel=3)
    return model.eval()


def fetch_processor(name: str, cache_dir: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Load the tokenizer of a checkpoint, and the contents of its preprocessor_config.json."""
    return fetch_tokenizer(name, cache_dir), image_settings(name, cache_dir)


def fetch_tokenizer(name: str, cache_dir: str | None = None, kind: Any = AutoTokenizer) -> Any:
    """Load the tokenizer of a checkpoint; of class `kind` if the files do not say which."""
    missing = WeightsError(f"cannot load {name}: it has no tokenizer, expected one of {', '.join(_VOCABULARIES)}")
    with _reporting(name, cache_dir):
        try:
            tokenizer = kind.from_pretrained(_place(name), cache_dir=cache_dir, trust_remote_code=False)
        except (ValueError, TypeError, RuntimeError) as error:  # without files, each class fails in its own way …
            if "trust_remote_code" in str(error):
                raise
            raise missing from error
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # … or makes one up
            raise missing
    return tokenizer


def image_settings(name: str, cache_dir: str | None = None) -> dict[str, Any]:
    """Return the contents of a checkpoint's preprocessor_config.json: how images are prepared."""
    with _reporting(name, cache_dir):
        return ImageProcessingMixin.get_image_processor_dict(_place(name), cache_dir=cache_dir)[0]


def read_weights(file: Path, kind: Any = None, config: Any = None) -> dict[str, Tensor]:
    """Read the tensors of a file, under the names that a model of class `kind` has with this `config`: see
    `weights.read_weights`."""
    with _reporting(str(file)):
        expected = ()
        if kind is not None:
            with torch.device("meta"):
                expected = kind(config).state_dict().keys()
        return _weights.read_weights(file, expected)


def has_tokenizer(folder: Path) -> bool:
    """Return True if a folder holds the vocabulary of a tokenizer."""
    return any((folder / file).is_file() for file in _VOCABULARIES)


def _place(name: str) -> str:
    """Return the name that transformers expects: the repository, or the folder's path."""
    if not name.startswith("local-dir:"):
        return name
    folder = Path(name.removeprefix("local-dir:"))
    if not folder.is_dir():
        raise WeightsError(f"no such folder: {folder}")
    return str(folder.absolute())


@contextmanager
def _reporting(name: str, cache_dir: str | None = None) -> Iterator[None]:
    """Silence libraries, and turn errors of a hub, a file system or a checkpoint into our error about `name`."""
    is_local = name.startswith("local-dir:") or Path(name).is_file()
    try:
        with quiet(), _undisturbed(), nullcontext() if is_local else hub_or_cache(name, cache_dir):
            yield
    except OpenGemError:
        raise
    except Exception as error:
        message = str(error)
        if _is_unknown(error):
            raise UnknownModelError(
                f"unknown model {name!r}: the hub has no such repository, or it needs a login"
            ) from error
        if "trust_remote_code" in message:
            raise UnsupportedModelError(f"cannot read {name}: it brings its own code, which is never run") from error
        if isinstance(error, ImportError):
            reason = f'{message.strip().splitlines()[0].split(". ")[0]}: pip install "open_gem[transformers]"'
            raise UnsupportedModelError(f"cannot read {name}: {reason}") from error
        if isinstance(error, ValueError) and ("model_type" in message or "model type" in message):
            reason = message.splitlines()[0].rstrip(". ")
            raise UnsupportedModelError(f"cannot read {name}: {reason}") from error
        raise WeightsError(f"cannot load {name}: {reason_of(error)}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Show no progress bar while weights go from a file into a model (those of downloads are shown), and send no
    request to convert a repository, which transformers sends from a thread for one that holds pickles only."""
    before = os.environ.get(_CONVERSION)
    os.environ[_CONVERSION] = "1"
    hooks = hasattr(logging, "set_tqdm_hook")  # not in the first releases of transformers 5
    shown = logging.set_tqdm_hook(lambda bar, args, more: bar(*args, **{**more, "disable": True})) if hooks else None
    try:
        yield
    finally:
        if hooks:
            logging.set_tqdm_hook(shown)
        if before is None:
            del os.environ[_CONVERSION]
        else:
            os.environ[_CONVERSION] = before


def _is_unknown(error: Exception) -> bool:
    """Return True if there is no such repository; a gated one exists, but not for everybody."""
    return is_caused_by(error, RepositoryNotFoundError, HFValidationError) and not is_caused_by(error, GatedRepoError)
