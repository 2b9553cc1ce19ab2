"""Faster ways to compute what the host's modules and torch's attention compute, to 2e-5.

On a CPU `attention`, a kernel in C, compiled on this machine, and `linear`, oneDNN's linear layers, fused with their
activations, where these are faster than torch's. On a GPU `triton`, self-self attention, where OPEN_GEM_TRITON is 1.
All step aside for anything they do not know, and where OPEN_GEM_KERNELS is 0.
"""

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from open_gem.numerics import is_traced

SWITCH = "OPEN_GEM_KERNELS"
TRITON_SWITCH = "OPEN_GEM_TRITON"


def are_on() -> bool:
    """Return True unless the environment sets OPEN_GEM_KERNELS to 0."""
    return os.environ.get(SWITCH) != "0"


def on_gpu() -> ModuleType | None:
    """Return the kernel for a GPU; None unless the environment sets OPEN_GEM_TRITON to 1, and without Triton."""
    return _triton() if os.environ.get(TRITON_SWITCH) == "1" and are_on() else None


@cache
def _triton() -> ModuleType | None:
    try:
        return import_module("open_gem.method.kernels.triton")
    except ImportError:
        return None


def are_plain(*tensors: Tensor) -> bool:
    """Return True if kernels take the tensors: float32 or bfloat16 numbers in a CPU's memory, all of one type, without
    gradient; not traced, mapped or otherwise watched by torch, and no autocast."""
    dtype, has_gradients = tensors[0].dtype, torch.is_grad_enabled()
    if dtype not in (torch.float32, torch.bfloat16) or is_traced() or torch.is_autocast_enabled("cpu"):
        return False
    for x in tensors:  # a loop: this is called some hundred times a pass
        if (
            type(x) not in (Tensor, Parameter)
            or not x.is_cpu
            or x.dtype != dtype
            or (has_gradients and x.requires_grad)
        ):
            return False
    return True
