"""Loading with any library: silence, a reason in one line, the hub or its cache, the model on its device and in its
type."""

import logging
import pickle
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import RLock
from time import monotonic
from typing import TypeVar

import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from open_gem.errors import OpenGemError, WeightsError
from open_gem.numerics import cpu_by_default, torch_defaults

T = TypeVar("T", bound=nn.Module)

ADVICE = (
    "Name a folder or file of weights, set a proxy or mirror (HTTPS_PROXY, HF_ENDPOINT), or copy the cache of another "
    "machine (HF_HOME); to try without a download: open-gem demo"
)
_LOGITS = ("logit_scale", "logit_bias")
ATTEMPTS = 5  # attempts to build a model in float32
REMEMBERED = 60  # seconds for which the answer of the hub, or its absence, is cached
FEW = 3  # names of weights that an error lists


def finished(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model in evaluation mode, on its device, in its type; scales and biases of logits stay float32 (with
    the 8 bits of bfloat16, exp(4.6) would be off by a percent)."""
    exact = {name: p.detach().float() for name, p in model.named_parameters() if name.endswith(_LOGITS)}
    model.eval().to(device, dtype)
    for name, value in exact.items():
        model.get_parameter(name).data = value.to(device)
    return model


def in_float32(build: Callable[[], T]) -> T:
    """Build a model, again until all its weights are float32: it is made in torch's default type, which another thread
    may change at any time, and weights would be rounded.

    Raises WeightsError if threads keep changing that type.
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


# Files of weights -----------------------------------------------------------------------------------------------------

_CHECKPOINT_KEYS = (  # where training loops put the weights; an average of them (EMA) is the last resort
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema_model",
    "ema",
)
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # DDP, torch.compile, FSDP
_LEADING = {*_WRAPPERS, "model"}  # and Lightning's


def read_weights(file: str | Path, expected: Collection[str] = ()) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a pickled checkpoint that needs no code to run, under the model's
    own names: without the prefixes of training loops.

    `expected`: the model's own names, which are never shortened. From a file of several models, those behind the prefix
    that fits best are read, and a warning counts the others. Raises WeightsError for a file without a state dict, and
    what libraries raise for a broken one.
    """
    file = Path(file)
    pickled = file.suffix != ".safetensors"
    content = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
    while isinstance(content, dict):
        inner = next((content[key] for key in _CHECKPOINT_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        raise WeightsError(f"cannot load {file}: it holds a {type(content).__name__}, expected a state dict")
    by_prefix: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in content.items():
        if isinstance(value, Tensor):
            prefix, inner_name = _split(name, expected)
            by_prefix[prefix][inner_name] = value
    if not by_prefix:
        keys = _few(sorted(map(str, content))) or "none"
        raise WeightsError(
            f"cannot load {file}: it holds no tensors under the keys it has ({keys}), expected a state dict, bare or "
            f"as one of {', '.join(_CHECKPOINT_KEYS)}"
        )
    best = max(by_prefix, key=lambda prefix: (len(by_prefix[prefix].keys() & set(expected)), len(by_prefix[prefix])))
    if others := sorted(name for prefix, tensors in by_prefix.items() if prefix != best for name in tensors):
        warnings.warn(f"{file} holds {len(others)} tensors beside the model, left out: {_few(others)}", stacklevel=3)
    return by_prefix[best]


def _split(name: str, expected: Collection[str]) -> tuple[str, str]:
    """Split a tensor's name in a file into the prefix of what was wrapped around the model, and the name in the
    model."""
    parts, start = name.split("."), 0
    while start < len(parts) - 1 and parts[start] in _LEADING and ".".join(parts[start:]) not in expected:
        start += 1
    inner = ".".join(parts[start:])
    if inner not in expected:
        inner = ".".join(part for part in parts[start:] if part not in _WRAPPERS)
    return ".".join(parts[:start]), inner


# The hub --------------------------------------------------------------------------------------------------------------


@contextmanager
def hub_or_cache(name: str, cache_dir: str | None = None) -> Iterator[None]:
    """Let libraries ask the hub inside, or its cache alone if the hub does not answer: they would retry for a minute.

    Raises WeightsError about the model `name` for a file that is in neither.
    """
    unreachable = _why_unreachable()
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, unreachable is not None
    try:
        yield
    except OpenGemError:
        raise
    except Exception as error:
        if not is_caused_by(error, LocalEntryNotFoundError, OfflineModeIsEnabled):
            raise
        reason = unreachable or str(error).splitlines()[0].rstrip(". ")
        cache = cache_dir or constants.HF_HUB_CACHE
        raise WeightsError(f"cannot load {name}: it is not in the cache {cache}, and {reason}. {ADVICE}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _why_unreachable() -> str | None:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return _why_silent(constants.ENDPOINT, int(monotonic() // REMEMBERED))


@lru_cache(maxsize=1)
def _why_silent(endpoint: str, period: int) -> str | None:
    try:
        get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # any error of the client that the hub's package uses
        return f"{endpoint} cannot be reached ({(str(error) or type(error).__name__).splitlines()[0]})"
    return None


def is_caused_by(error: BaseException | None, *kinds: type[BaseException]) -> bool:
    """Return True if `error`, or one that led to it, is of one of these kinds."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, kinds):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


# Errors ---------------------------------------------------------------------------------------------------------------


def needs_transformers(error: ImportError) -> str:
    """Return what to do if transformers, or something that it needs, is not installed."""
    return f'this model needs the package transformers ({error.name} is missing): pip install "open_gem[transformers]"'


def reason_of(error: Exception) -> str:
    """Return one line: what does not fit if it is a state dict, else the error's first line and what to do."""
    message = str(error).strip() or type(error).__name__
    if misfit := mismatch_in(message):
        return misfit
    if any(
        word in message for word in ("Unsupported global", "is blocked", "TorchScript")
    ):  # torch's words for code that would run
        return (
            "the file is a pickle that needs code to run (or a TorchScript archive), which is refused; save the bare "
            "state dict, best as .safetensors"
        )
    if isinstance(error, EOFError | pickle.UnpicklingError | SafetensorError) or "zip archive" in message:
        return "the file holds no weights: it is broken, or something else"
    return f"{message.splitlines()[0].rstrip('. ')}. {ADVICE}"


def mismatch(missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str] = ()) -> str | None:
    """Return how a checkpoint does not fit its architecture, in one line; None if it fits."""
    faults = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    counts = [f"{len(names)} {fault} ({_few(names)})" for fault, keys in faults if (names := sorted(keys))]
    hint = _prefix_hint(set(missing), set(unexpected))
    return f"the weights do not fit the architecture: {'; '.join(counts)}{hint}" if counts else None


def _prefix_hint(missing: set[str], unexpected: set[str]) -> str:
    """Return what to do if names would fit with, or without, a prefix; else nothing."""
    for long, short, advice in (
        (unexpected, missing, 'names fit without the prefix "{}": save the state dict of that part alone'),
        (missing, unexpected, 'names fit behind the prefix "{}": the file seems to hold that part of a model alone'),
    ):
        dots = ((name, at) for name in long for at, letter in enumerate(name) if letter == ".")
        prefixes = Counter(name[: at + 1] for name, at in dots if name[at + 1 :] in short)
        if prefixes and (likeliest := prefixes.most_common(1)[0])[1] > 1:
            return f"; {likeliest[1]} {advice.format(likeliest[0])}"
    return ""


def mismatch_in(message: str) -> str | None:
    """Return `mismatch` from the message of torch's `load_state_dict`."""
    if "state_dict" not in message:
        return None
    missing, unexpected = (
        re.findall(r'"([^"]+)"', match.group(1))
        if (match := re.search(rf"{kind} key\(s\) in state_dict: (.*)", message))
        else []
        for kind in ("Missing", "Unexpected")
    )
    return mismatch(missing, unexpected, re.findall(r"size mismatch for (\S+):", message))


def _few(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (", …" if len(names) > FEW else "")


_QUIET = RLock()  # logging and warning filters belong to the whole process


@contextmanager
def quiet(*warned: str) -> Iterator[None]:
    """Silence libraries and the hub, since the error raised next says it better, and warnings that begin with one of
    `warned`. Progress bars of downloads are shown. Libraries make tensors on the CPU."""
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
