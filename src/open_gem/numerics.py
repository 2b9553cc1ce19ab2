"""Independence of torch's defaults and of autocast; checks for numbers that are not finite.

`torch.set_default_dtype` and `set_default_device` belong to their caller, perhaps in another thread:
transformers sets the default type while it loads a model. Our own code names type and device at every tensor it makes
(`tests/test_numerics.py` sees to that); libraries that do not run inside `cpu_by_default`, or `torch_defaults` while a
model is built. Under autocast a model computes in the type that was asked for; results, and what is kept, do not.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from open_gem.errors import NotFiniteError

FEW = 3  # names of weights that an error lists


class Lock:
    """`threading.Lock` for objects that are copied or sent to another process: a copy has a lock of its own, open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


# Defaults of torch ----------------------------------------------------------------------------------------------------


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """Make libraries that name no device use the CPU, as they expect. Also a decorator."""
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Do as `cpu_by_default`, and make float32 of tensors whose type a library does not name. The default type belongs
    to all threads: use it only while a model is built."""
    before = torch.get_default_dtype()
    if before != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with cpu_by_default():
            yield
    finally:
        if before != torch.float32:
            torch.set_default_dtype(before)


# Autocast -------------------------------------------------------------------------------------------------------------

DEVICES = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
"""Kinds of devices that torch has autocast for."""


def autocast() -> dict[str, torch.dtype]:
    """Return the kinds of devices for which autocast is on in this thread, and the type of its products."""
    return {kind: torch.get_autocast_dtype(kind) for kind in DEVICES if torch.is_autocast_enabled(kind)}


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute with tensors in their own types; functions called inside may enable autocast again. Also a decorator."""
    with ExitStack() as stack:
        for kind in autocast():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


# Finite numbers -------------------------------------------------------------------------------------------------------


def is_traced() -> bool:
    """Return True if torch compiles, maps or differentiates a function now: tensors are then placeholders."""
    level = torch._C._functorch.maybe_current_level()  # pyright: ignore[reportAttributeAccessIssue]
    return torch.compiler.is_compiling() or level is not None


def is_counted() -> bool:
    """Return True if a mode of torch, such as a counter of operations, sees every operator that is called now."""
    return torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore[reportAttributeAccessIssue]


def are_finite(*values: Tensor) -> bool:
    """Return True if all entries are finite: one sum of each tensor, and one answer for all, which must be on one
    device."""
    sums = (value.sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite() for value in values)
    return bool(torch.stack(list(sums)).all())


def check_finite(what: str, model: Any, *values: Tensor) -> None:
    """Raise NotFiniteError, which names the model and the likely cause, if any of `values`, called `what`, are infinite
    or not a number. `model`: a backbone or tower that made them."""
    if is_traced() or any(type(value) is not Tensor or value.is_meta for value in values):
        return  # no numbers to look at
    if not are_finite(*values):
        raise NotFiniteError(_cause(what, model))


def check_finite_number(what: str, model: Any, value: float) -> float:
    """Return the number itself. Raises NotFiniteError if it is infinite or not a number."""
    if not isfinite(value):
        raise NotFiniteError(f"the {what} of {_name(model)} is {value}: its weights are damaged; load them again")
    return value


def _cause(what: str, model: Any) -> str:
    name, problem = _name(model), "infinite or not a number"
    weights = _weights(model)
    if damaged := [at for at, weight in weights.named_parameters() if not are_finite(weight.detach())]:
        names = ", ".join(damaged[:FEW]) + (f" … ({len(damaged)} in all)" if len(damaged) > FEW else "")
        return f"{name} gives {what} that are {problem}, for its weights are damaged ({names}): load them again"
    types = [weight.dtype for weight in weights.parameters() if weight.ndim > 1]
    narrow = next((kind for kind in (*types, *autocast().values()) if kind.itemsize < 4), None)
    if narrow is not None:
        kind, most = str(narrow).removeprefix("torch."), torch.finfo(narrow).max
        other = "" if narrow == torch.bfloat16 else " or bfloat16"
        return f"{name} gives {what} that are {problem}: {kind} ends at {most:.5g}; compute in float32{other} (`dtype`)"
    return f"{name} gives {what} that are {problem}: its weights are too large, or not those of this architecture"


def _name(model: Any) -> str:
    kind = type(_weights(model)).__name__  # an adapted one is called by its library
    return f"{model.name} ({kind})" if hasattr(model, "name") else kind


def _weights(model: Any) -> nn.Module:
    return model.model if hasattr(model, "model") else model.module
