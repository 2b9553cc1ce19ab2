"""Precision and cosines of tensors; whether weights have changed."""

import hashlib
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from open_gem.errors import InputError
from open_gem.numerics import without_autocast


def at_least_float32(values: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Convert to float32 at least: sums and norms in half precision lose too many digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@without_autocast()
def similarity(patches: Float[Tensor, "*b n e"], text: Float[Tensor, "p e"]) -> Float[Tensor, "*b p n"]:
    """Return the cosine in [-1, 1] of every patch with every text: `(..., n, e)`, `(p, e)` → `(..., p, n)`, float32 at
    least."""
    patches, text = map(at_least_float32, (patches, text))
    return normalize(text, dim=-1) @ normalize(patches, dim=-1).transpose(-2, -1)


# Weights --------------------------------------------------------------------------------------------------------------


class Version:
    """Detects changed weights: called with them, it returns another value after a move or a write.

    Writes that torch does not count (through `tensor.data`, in inference mode, by a fused optimizer) show in `SAMPLED`
    values of each tensor, spread over it. A write through `.data` that changes none of those, such as to a few rows of
    an embedding table, goes unnoticed.
    """

    SAMPLED = 8

    def __init__(self) -> None:
        self._samples: tuple[Hashable, list[list[Tensor]]] = (), []

    def __reduce__(self) -> Any:
        return Version, ()  # copies watch weights of their own

    @torch.no_grad()
    def __call__(self, weights: Iterable[Tensor]) -> Hashable:
        weights = list(weights)
        places = tuple((w.device, w.dtype, w.data_ptr()) for w in weights)
        counts = tuple(0 if w.is_inference() else w._version for w in weights)
        known, samples = self._samples
        if known != places:  # views are cached: making them takes longer than reading them
            samples = self._views(weights)
            self._samples = places, samples
        values = tuple(torch.cat(views).view(torch.uint8).cpu().numpy().tobytes() for views in samples)
        return places, counts, values

    def _views(self, weights: Iterable[Tensor]) -> list[list[Tensor]]:
        """Return samples of each tensor as one-dimensional views, grouped by device and type."""
        views: dict[Hashable, list[Tensor]] = {}
        for w in weights:
            if w.numel() and not w.is_meta:
                count = min(w.numel(), self.SAMPLED) if w.is_contiguous() else 1
                view = w.detach().as_strided((count,), (w.numel() // count,))
                views.setdefault((w.device, w.dtype), []).append(view)
        return list(views.values())


def version(weights: Iterable[Tensor]) -> Hashable:
    """Return the value of a new `Version`, for a few tensors."""
    return Version()(weights)


def fingerprint(model: nn.Module) -> str:
    """Return 12 hex digits for a model's weights: equal for equal names, shapes, types and values, on any device."""
    sha = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        sha.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        sha.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:12]


def check_has_numbers(model: nn.Module) -> None:
    """Raise InputError for weights on the device "meta", which holds shapes without numbers."""
    if any(weight.is_meta for weight in model.parameters()):
        raise InputError(
            f"the weights of {type(model).__name__} are on the device 'meta', which holds no numbers, expected a "
            "device with memory, such as 'cpu': load them first"
        )
