"""Pretrained models behind one interface: load them by name, or adapt one that is in memory."""

from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import torch

from open_gem.errors import InputError, UnknownModelError, UnsupportedModelError, WeightsError
from open_gem.method.kernels import attention
from open_gem.towers.base import Backbone, ModuleTower, Recommended
from open_gem.towers.check import randomize
from open_gem.towers.families import FAMILIES, ORIGINAL, ModelFamily, find_family
from open_gem.towers.weights import needs_transformers

__all__ = [
    "DEFAULT_MODEL",
    "DTYPES",
    "EMBEDDED",
    "FAMILIES",
    "Backbone",
    "ModelFamily",
    "ModuleTower",
    "Recommended",
    "adapt",
    "build_tower",
    "find_device",
    "find_dtype",
    "list_models",
    "load",
]

EMBEDDED = "embedded"  # the model that ships in the package

DEFAULT_MODEL = ("ViT-B-16", "openai")
"""Name and tag of the model that is loaded if none is named: OpenAI's CLIP, which the paper reports."""

CAUTION = (
    'model "embedded" knows 120 drawn objects, not photographs; for photographs use another model, such as '
    f"{DEFAULT_MODEL[0]} with {DEFAULT_MODEL[1]} weights"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Names of the types that weights may have -> torch's."""


def load(
    name: str | PathLike[str] | None = None,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    cache_dir: str | None = None,
) -> Backbone:
    """Load a backbone with its weights.

    name        open_clip's names ("ViT-B-16"); "hf-hub:org/repo" in open_clip's format; a transformers repository
                ("openai/clip-vit-base-patch16"); a folder in either format, or "local-dir:folder"; "embedded", the
                model in the package, which knows drawn objects alone; None for `DEFAULT_MODEL`
    pretrained  the tag of an open_clip name ("openai"), or a file of weights for the architecture that `name` says
    device      "auto" takes CUDA, then Apple's MPS, then the CPU
    dtype       a key of `DTYPES`: what the weights are cast to; "auto" takes bfloat16 on a CPU with AMX, and float32
                elsewhere
    cache_dir   where downloaded weights are kept, by default the Hugging Face cache

    Never returns a model with random weights. Raises UnknownModelError, WeightsError or UnsupportedModelError, and
    InputError for the device and type.
    """
    place = find_device(device)
    placement: dict[str, Any] = {"device": place, "dtype": find_dtype(dtype, place)}
    if name is None:
        name, pretrained = DEFAULT_MODEL[0], pretrained or DEFAULT_MODEL[1]
    if name == EMBEDDED:
        if pretrained is not None:
            raise UnknownModelError(f'"embedded" has one set of weights; the tag {pretrained!r} does not apply')
        from open_gem.towers import open_clip

        folder = files("open_gem.towers") / "embedded"
        backbone = open_clip.load(f"local-dir:{folder}", **placement)
        backbone.name, backbone.caution = EMBEDDED, CAUTION
        return backbone
    name = as_folder(name)
    return library_of(name).load(name, pretrained, cache_dir=cache_dir, **placement)


def as_folder(name: str | PathLike[str]) -> str:
    """Return "local-dir:" and the path for the path of a folder; names that open_clip knows, and others, are unchanged.

    Raises WeightsError for the path of a file, or of nothing: "./x", "/x", "~/x", "x.pt".
    """
    from open_gem.towers import open_clip

    name = fspath(name)
    if name == EMBEDDED or open_clip.knows(name):
        return name
    path = Path(name).expanduser()
    if name and path.is_dir():
        return f"local-dir:{path}"
    if path.is_file():
        raise WeightsError(f"{name} is a file: name its architecture, load(NAME, {name!r})")
    if name.startswith(("./", "../", "/", "~")):
        raise WeightsError(f"no such folder: {name}")
    return name


def library_of(name: str) -> Any:
    """Return the module that loads `name`; open_clip's for an unknown one, since its error lists names."""
    from open_gem.towers import open_clip

    return _transformers() if is_transformers(name) else open_clip


def is_transformers(name: str) -> bool:
    """Return True for a folder in transformers' format, and for "org/repo" unless it is an architecture of
    open_clip."""
    from open_gem.towers import open_clip

    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        return not (folder / "open_clip_config.json").is_file() and (folder / "config.json").is_file()
    return name in ORIGINAL or ("/" in name and not open_clip.knows(name))


def _transformers() -> Any:
    try:
        from open_gem.towers import transformers
    except ImportError as error:
        raise UnsupportedModelError(needs_transformers(error)) from error
    return transformers


def build_tower(name: str) -> ModuleTower:
    """Build the vision tower of an architecture with random weights, the same each time, for checks; fetches no
    weights.

    "embedded" and folders in open_clip's format have their own.

    Raises UnknownModelError, WeightsError or UnsupportedModelError.
    """
    name = as_folder(name)
    if name == EMBEDDED or (name.startswith("local-dir:") and not is_transformers(name)):
        return load(name, device="cpu").vision
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = library_of(name).build_tower(name)
    randomize(tower.module)
    return tower


def build(name: str) -> Backbone:
    """Build a whole model of an architecture of open_clip with random weights, to measure; "embedded" and folders have
    their own. Raises UnknownModelError, WeightsError, UnsupportedModelError, and InputError if it needs a network."""
    name = as_folder(name)
    if name == EMBEDDED or name.startswith("local-dir:"):
        return load(name, device="cpu")
    if is_transformers(name):
        raise InputError(f"{name!r} is an architecture of transformers, expected one of open_clip")
    try:
        return library_of(name).build(name)
    except OSError as error:
        raise InputError(
            f"the texts of {name!r} need a network, expected an architecture with CLIP's tokenizer"
        ) from error


def adapt(model: Any, tokenizer: Any) -> Backbone:
    """Make a backbone of a model already in memory (your fine-tuned one, say), which it never changes.

    model      of open_clip or transformers
    tokenizer  open_clip's, or transformers' tokenizer or processor

    Raises UnsupportedModelError if its vision tower cannot be read, InputError if it is in training mode.
    """
    if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return _transformers().adapt(model, tokenizer)
    from open_gem.towers import open_clip

    return open_clip.adapt(model, tokenizer)


class ModelName(NamedTuple):
    """A name that `load` knows.

    tag                 of its weights; None if there is one set of them, or none
    library             whose model it is
    family              see `ModelFamily`; None if none fits
    unsupported_reason  None for a supported model
    """

    name: str
    tag: str | None
    library: str
    family: str | None
    unsupported_reason: str | None


def list_models() -> list[ModelName]:
    """Return the names for `load`: the model in the package, every name and tag of open_clip, and examples of each
    family of transformers; with the reason for each that is not supported."""
    from open_gem.towers import open_clip

    others = [row for row in FAMILIES if row.library != "open_clip"]
    examples = [ModelName(name, tag, row.library, row.name, None) for row in others for name, tag in row.examples]
    architectures = [
        ModelName(name, tag, "open_clip", _family_name(name), reason) for name, tag, reason in open_clip.catalogue()
    ]
    return [ModelName(EMBEDDED, None, "open_gem", EMBEDDED, None), *architectures, *examples]


def _family_name(name: str) -> str | None:
    family = find_family("open_clip", name)
    return None if family is None else family.name


def find_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type for a key of `DTYPES`, or one of those types itself, or float64; for "auto" bfloat16 where there
    is a kernel for it, and float32 elsewhere. Raises InputError for another."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cpu" and attention.has_bfloat16() else torch.float32
    known = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if known not in (*DTYPES.values(), torch.float64):
        raise InputError(f"cannot compute in {dtype}, expected auto or one of {', '.join(DTYPES)}")
    return known


def find_device(device: str | torch.device) -> torch.device:
    """Return the device for "auto" or a name. Raises InputError for one that torch does not know or have."""
    if device != "auto":
        try:
            named = torch.device(device)
            torch.empty(0, dtype=torch.float32, device=named)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"cannot use device {device!r}: {reason}") from error
        return named
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
