"""What every library's loading needs: silence, a reason in one line, and the model in its final place and type."""

import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from open_gem.errors import WeightsError
from open_gem.numerics import cpu_by_default, torch_defaults

T = TypeVar("T", bound=nn.Module)

ADVICE = (
    "Weights are kept in the Hugging Face cache (HF_HOME; `cache_dir` chooses another). Without network, put a "
    'checkpoint with its configuration in a folder and load "local-dir:FOLDER", or load "embedded", which needs no '
    "download"
)
_LOGITS = ("logit_scale", "logit_bias")
ATTEMPTS = 5  # at a model in float32
FEW = 3  # names of weights that an error lists


def finished(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """The model in evaluation mode, on its device, in its type; scales and biases of logits stay float32 (of 8 bits, as
    bfloat16 has, exp(4.6) would be off by a percent)."""
    exact = {name: p.detach().float() for name, p in model.named_parameters() if name.endswith(_LOGITS)}
    model.eval().to(device, dtype)
    for name, value in exact.items():
        model.get_parameter(name).data = value.to(device)
    return model


def in_float32(build: Callable[[], T]) -> T:
    """A model that `build` makes in torch's default type and reads weights into, once all of them are float32: another
    thread may change that type at any time, and weights would be rounded on their way.

    Raises WeightsError where others keep changing it.
    """
    for _ in range(ATTEMPTS):
        with torch_defaults():
            model = build()
        if all(weight.dtype == torch.float32 for weight in model.parameters() if weight.is_floating_point()):
            return model
    raise WeightsError(
        "other threads keep changing torch's default dtype while the model is built, expected float32: load models one "
        "after another"
    )


def needs_transformers(error: ImportError) -> str:
    """What to do where transformers, or something that it needs, is not installed."""
    return f'this model needs the package transformers ({error.name} is missing): pip install "open_gem[transformers]"'


def reason_of(error: Exception) -> str:
    """One line: what does not fit where a state dict does not, else the error's first line and what to do."""
    message = str(error).strip() or type(error).__name__
    if found := mismatch_in(message):
        return found
    if any(
        word in message for word in ("Unsupported global", "is blocked", "TorchScript")
    ):  # torch's words for what would run
        return (
            "the file is a pickle that needs code to run (or a TorchScript archive), which is refused; save the bare "
            "state dict, best as .safetensors"
        )
    if isinstance(error, EOFError | pickle.UnpicklingError | SafetensorError) or "zip archive" in message:
        return "the file holds no weights: it is broken, or something else"
    return f"{message.splitlines()[0].rstrip('. ')}. {ADVICE}"


def mismatch(missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str] = ()) -> str | None:
    """What of a checkpoint does not fit its architecture, in one line; None where all does."""
    parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    said = [f"{len(names)} {what} ({_some(names)})" for what, some in parts if (names := sorted(some))]
    return f"the weights do not fit the architecture: {'; '.join(said)}" if said else None


def mismatch_in(message: str) -> str | None:
    """`mismatch`, from the message of torch's `load_state_dict`."""
    if "state_dict" not in message:
        return None
    missing, unexpected = (
        re.findall(r'"([^"]+)"', found.group(1))
        if (found := re.search(rf"{kind} key\(s\) in state_dict: (.*)", message))
        else []
        for kind in ("Missing", "Unexpected")
    )
    return mismatch(missing, unexpected, re.findall(r"size mismatch for (\S+):", message))


def _some(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (", …" if len(names) > FEW else "")


def cut_off(tokenizer: Any, text: str, length: int) -> str:
    """The end of `text` that does not fit into `length` tokens of a transformers tokenizer, special ones included."""
    tokens = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return tokenizer.decode(tokens[length - tokenizer.num_special_tokens_to_add() :]).strip()


_QUIET = RLock()  # logging and warning filters belong to the whole process


@contextmanager
def quiet(*warned: str) -> Iterator[None]:
    """Silence the libraries and the hub: what they log the error raised next says better. Warnings that begin with one
    of `warned` have been dealt with. Progress bars of downloads are shown. What
    they make is on the CPU."""
    with _QUIET, warnings.catch_warnings(), cpu_by_default():
        for message in warned:
            warnings.filterwarnings("ignore", message=message)
        disabled, handlers = logging.root.manager.disable, list(logging.root.handlers)
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
            logging.root.handlers[:] = handlers  # `logging.info`, as open_clip calls it, installs one
