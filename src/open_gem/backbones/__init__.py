"""Pretrained models behind one interface: load them by name, or adapt one that is in memory."""

from importlib.resources import files
from typing import Any

import torch

from open_gem.backbones._base import Backbone, Recommended
from open_gem.errors import InputError, UnknownModelError

__all__ = ["EMBEDDED", "Backbone", "Recommended", "adapt", "catalogue", "load"]

EMBEDDED = "embedded"  # the model that ships in the package


def load(
    name: str = EMBEDDED,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "auto",
    cache_dir: str | None = None,
) -> Backbone:
    """Load a backbone with its weights.

    name, pretrained  "embedded"; open_clip's names and tags ("ViT-B-16", "openai"); "hf-hub:org/repo";
                      "local-dir:folder"
    device            "auto" takes CUDA, then Apple's MPS, then the CPU
    cache_dir         where downloaded weights are kept, by default the Hugging Face cache

    Never returns a model with random weights. Raises UnknownModelError, WeightsError or UnsupportedModelError, and
    InputError for the device.
    """
    from open_gem.backbones import open_clip

    if name == EMBEDDED:
        if pretrained is not None:
            raise UnknownModelError(f'"embedded" has one set of weights; the tag {pretrained!r} does not apply')
        folder = files("open_gem.backbones") / "embedded"
        backbone = open_clip.load(f"local-dir:{folder}", device=find_device(device))
        backbone.name = EMBEDDED
        return backbone
    return open_clip.load(name, pretrained, device=find_device(device), cache_dir=cache_dir)


def adapt(model: Any, tokenizer: Any) -> Backbone:
    """A backbone around an open_clip model already in memory (your fine-tuned one, say), which it never changes.

    Raises UnsupportedModelError where its vision tower cannot be read, InputError where it is in training mode.
    """
    from open_gem.backbones.open_clip import OpenClipBackbone

    return OpenClipBackbone(model, tokenizer)


def catalogue() -> list[tuple[str, str | None, str | None]]:
    """Every (name, tag) that `load` knows by itself, with what is in the way of reading it, or None."""
    from open_gem.backbones import open_clip

    return [(EMBEDDED, None, None), *open_clip.catalogue()]


def find_device(device: str | torch.device) -> torch.device:
    """The device for "auto" or a name. Raises InputError where torch does not know or have it."""
    if device != "auto":
        try:
            found = torch.device(device)
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"cannot use device {device!r}: {reason}") from error
        return found
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
