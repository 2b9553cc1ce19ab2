"""Linear layers through oneDNN, with what follows them in the same pass over memory.

Of torch's two CPU libraries for matrix products, MKL is what its `linear` takes for float32. On other processors than
Intel's, oneDNN is somewhat faster at these shapes; it needs no copy of the bias, and applies GELU while numbers are
still in registers. Weights stay as they are.
"""

import math
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from open_gem.method import kernels
from open_gem.method.kernels.attention import processor

MAX_VALUES = {torch.float32: 1 << 22, torch.bfloat16: 1 << 24}
"""Maximum number of values between the two layers of a feed-forward network at a time: 16 MiB, and 32. The C library
reuses blocks of such a size; larger ones come fresh from the system, and every page of them costs an interrupt. In
bfloat16 weights are reordered at every call, so that fewer calls are worth more."""

HAS_FAST_MKL = "GenuineIntel" in processor("vendor_id") and torch.backends.mkl.is_available()
MIN_WEIGHTS = {torch.float32: math.inf if HAS_FAST_MKL else 1 << 18, torch.bfloat16: 1 << 18}
"""Minimum number of weights of a layer. What oneDNN does before each product takes longer than it saves at small ones,
and MKL is faster on Intel's processors."""


class _Activation(NamedTuple):
    """oneDNN's name of an activation: f(x) = swish(slope · x) / slope, or another if slope is 1."""

    name: str
    algorithm: str = ""
    slope: float = 1.0


_ACTIVATIONS = {
    "torch.nn.modules.activation.GELU": _Activation("gelu", "none"),
    "transformers.activations.GELUActivation": _Activation("gelu", "none"),
    "transformers.activations.GELUTanh": _Activation("gelu", "tanh"),
    "open_clip.transformer.QuickGELU": _Activation("swish", slope=1.702),
    "transformers.activations.QuickGELUActivation": _Activation("swish", slope=1.702),
}
_LAYERS = {  # the two linear layers and the activation between them; other layers must do nothing
    "torch.nn.modules.container.Sequential": ("c_fc", "gelu", "c_proj"),
    "timm.layers.mlp.Mlp": ("fc1", "act", "fc2"),
    **{
        f"transformers.models.{kind}.modeling_{kind}.{name}": ("fc1", "activation_fn", "fc2")
        for kind, name in {
            "clip": "CLIPMLP",
            "siglip": "SiglipMLP",
            "siglip2": "Siglip2MLP",
            "metaclip_2": "MetaClip2MLP",
            "chinese_clip": "ChineseCLIPVisionMLP",
            "altclip": "AltCLIPMLP",
            "blip": "BlipMLP",
        }.items()
    },
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias, as `torch.nn.functional.linear` does."""
    return _product(x, weight, bias) if _takes(x, weight, bias) else functional.linear(x, weight, bias)


def apply(layer: Any, x: Tensor) -> Tensor:
    """Return `layer(x)`; faster for a linear layer without hooks."""
    if not _is_linear(layer):
        return layer(x)
    weight, bias = layer.weight, layer.bias
    return _product(x, weight, bias) if _takes(x, weight, bias) else layer(x)


def feed_forward(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    """Make the network of two linear layers in a block, `(b, n, d)` → `(b, n, d)`; faster for a known kind.

    Its weights are read at every call, and so is what listens to it.
    """
    names = _LAYERS.get(_kind(mlp))

    def forward(x: Tensor) -> Tensor:
        layers = None if names is None else _known(mlp, names)
        if layers is None:
            return mlp(x)
        first, _, second = layers
        can = _takes(x, first.weight, first.bias, second.weight, second.bias)
        return _fused(x, *layers) if can else mlp(x)

    return forward


def _known(mlp: nn.Module, names: tuple[str, str, str]) -> tuple[Any, _Activation, Any] | None:
    """Return the layers of `mlp` that have these names; None if they are not plain, or not the whole network."""
    children = dict(mlp.named_children())
    if not children.keys() >= set(names) or is_watched(mlp, *children.values()):
        return None
    if any(module.training for module in (mlp, *children.values())):
        return None
    first, between, second = (children.pop(name) for name in names)
    activation = _ACTIVATIONS.get(_kind(between))
    if activation is None or not _is_linear(first) or not _is_linear(second):
        return None
    if any(not isinstance(rest, nn.Identity | nn.Dropout) for rest in children.values()):
        return None
    return first, activation._replace(algorithm=getattr(between, "approximate", activation.algorithm)), second


def _fused(x: Tensor, first: Any, activation: _Activation, second: Any) -> Tensor:
    """Run the network, some rows of `x` at a time."""
    name, how, slope = activation

    def network(rows: Tensor) -> Tensor:
        if slope == 1:
            return _product(_product(rows, first.weight, first.bias, name, how), second.weight, second.bias)
        bias = None if first.bias is None else first.bias * slope  # scale the smaller tensors by the slopes
        out = _product(_product(rows * slope, first.weight, bias, name, how), second.weight).div_(slope)
        return out if second.bias is None else out.add_(second.bias)

    rows_at_once = max(1, MAX_VALUES[x.dtype] // len(first.weight))
    return torch.cat([network(rows) for rows in x.flatten(0, -2).split(rows_at_once)]).view(*x.shape[:-1], -1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none", how: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], how)


def _takes(x: Tensor, *weights: Tensor | None) -> bool:
    """Return True if oneDNN can take `x`, and the weights and biases, and is faster. It keeps nothing for gradients, so
    these are refused."""
    known = [weight for weight in weights if weight is not None]
    return (
        HAS_ONEDNN
        and not torch.is_grad_enabled()
        and kernels.are_plain(x, *known)
        and all(
            weight.is_contiguous() and (weight.ndim < 2 or weight.numel() >= MIN_WEIGHTS[x.dtype]) for weight in known
        )
        and x.ndim > 1
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
        and kernels.are_on()
    )


def _is_linear(layer: Any) -> bool:
    return type(layer) is nn.Linear and not is_watched(layer)


def is_watched(*modules: nn.Module) -> bool:
    """Return True if calling one of them does more than its class says."""
    everywhere = bool(torch.nn.modules.module._has_any_global_hook())
    return everywhere or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules
    )


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _has_onednn() -> bool:
    """Return True if torch has the fused layer, on a kind of processor that it was tested on."""
    known = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


HAS_ONEDNN = _has_onednn()

if HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: Any, weight: Any, *_: object, **__: object) -> int:
        rows = 1
        for side in x[:-1]:
            rows *= side
        return 2 * rows * weight[0] * weight[1]
