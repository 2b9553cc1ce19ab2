"""Attention on a CPU in kernels of our own, compiled on this machine on first use.

`attention.c` takes float32, `attention_amx.c` bfloat16 on a processor with AMX; elsewhere bfloat16 is computed in
float32. They say what they do and why it needs less time than `scaled_dot_product_attention`. Each is compiled with the
installed C compiler, for this processor, in about a second, and kept in the user's cache folder under a name that says
all it depends on. Without a compiler, torch's OpenMP runtime or a vector unit, everything goes through torch's own
kernels: the same numbers, in more time.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from open_gem.errors import OutputError
from open_gem.files import cache_folder, write_file
from open_gem.method import kernels
from open_gem.numerics import is_counted

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
SOURCES = {torch.float32: "attention.c", torch.bfloat16: "attention_amx.c"}
SHARPEST = 40.0
"""Largest 1/τ: the least entry of a row is exp(−2/τ), which float32 has to hold."""
MOST = 3
"""Maximum number of projections."""
QUERY_KEY = -1
"""Stands for a number of iterations: attention of queries to keys."""


class Kernel(NamedTuple):
    """The compiled library, or None and the `reason`, a word for people."""

    library: ctypes.CDLL | None
    reason: str


class _View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((stride, ctypes.c_long) for stride in ("image", "head", "token")))


class _Job(ctypes.Structure):
    _fields_ = (
        ("p", _View * MOST),
        ("v", _View),
        ("out", _View),
        ("inverse", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("images", "heads", "tokens", "width", "projections", "iterations")),
        *((name, ctypes.c_long) for name in ("threads", "next")),
        ("memory", ctypes.c_void_p),
    )


@cache
def load(dtype: torch.dtype = torch.float32) -> Kernel:
    """Load the kernel for a type of `SOURCES` and this machine, compiled on first use."""
    source = Path(__file__).with_name(SOURCES[dtype])
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        return Kernel(None, f"CC is {os.environ['CC']!r}, expected a command as a shell takes it: {error}")
    compiler = chosen or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not compiler:
        return Kernel(None, "no C compiler was found")
    with tempfile.TemporaryDirectory(prefix="open_gem-") as scratch:  # a library stays loaded when its file has gone
        try:
            library = _loaded(compiler, source, cache_folder() or Path(scratch))
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {error.returncode}"]
            return Kernel(None, f"it could not be built with {compiler[0]}: {lines[-1]}")
        except (OSError, OutputError, AttributeError, subprocess.SubprocessError) as error:
            return Kernel(None, f"it could not be built with {compiler[0]}: {error}")
    if library.prepare():
        return Kernel(None, "the system does not grant the processor's tiles")
    return Kernel(library, f"compiled with {compiler[0]}")


def _loaded(compiler: Sequence[str], source: Path, folder: Path) -> ctypes.CDLL:
    path = _compiled(compiler, source, folder)
    try:
        return _open(path)
    except (OSError, AttributeError):  # broken: compile it again
        path.unlink()
        return _open(_compiled(compiler, source, folder))


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    library.attend.argtypes, library.attend.restype = [ctypes.POINTER(_Job)], ctypes.c_int
    library.prepare.argtypes, library.prepare.restype = [], ctypes.c_int
    return library


def _compiled(compiler: Sequence[str], source: Path, folder: Path) -> Path:
    """Compile the kernel into `folder`, under hashes of everything it depends on and of its content: loading half a
    library would end the process."""
    instructions = processor("flags", "Features")  # a home folder may be shared by machines that differ
    depends = (source.read_text("utf-8"), *compiler, *FLAGS, platform.platform(), instructions)
    name = _digest("\n".join(depends).encode())
    for path in sorted(folder.glob(f"{name}-*.so")):
        if path.stem == f"{name}-{_digest(path.read_bytes())}":
            return path
        path.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        scratch_file = Path(scratch, "made.so")
        command = (*compiler, *FLAGS, "-o", str(scratch_file), str(source), "-lm")
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        content = scratch_file.read_bytes()
    path = folder / f"{name}-{_digest(content)}.so"
    write_file(path, content, durable=True)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def processor(*entries: str) -> str:
    """Return Linux's entry about the processor under one of these names, such as "model name"; elsewhere Python's."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    entry = next((line for line in lines if line.startswith(entries)), platform.processor())
    return entry.rpartition(":")[2].strip()


def fits(inverse_temperature: Tensor | float, *heads: Tensor) -> bool:
    """Return True if a kernel can take these heads, all `(b, h, n, c)`: of one type of `SOURCES` on a CPU, without
    gradient; and 1/τ, a number or one an image, above 0 and not above `SHARPEST`."""
    first = heads[0]
    return (
        kernels.are_plain(*heads)
        and all(p.shape == first.shape and p.stride(-1) == 1 for p in heads)
        and _is_mild(inverse_temperature, len(first))
        and kernels.are_on()
        and _kernel(first.dtype) is not None
    )


def _kernel(dtype: torch.dtype) -> torch.dtype | None:
    """Return the type of the kernel that takes heads of `dtype`; None without any."""
    return next((own for own in (dtype, torch.float32) if load(own).library is not None), None)


def has_bfloat16() -> bool:
    """Return True if heads in bfloat16 have a kernel of their own here."""
    return kernels.are_on() and _kernel(torch.bfloat16) == torch.bfloat16


def _is_mild(inverse_temperature: Tensor | float, images: int) -> bool:
    """Return True if 1/τ is in range: a scaled score of two unit vectors is 1/τ at most."""
    if not isinstance(inverse_temperature, Tensor):
        return 0 < inverse_temperature <= SHARPEST
    is_per_image = inverse_temperature.numel() == 1 or inverse_temperature.shape == (images, 1, 1, 1)
    if not (is_per_image and kernels.are_plain(inverse_temperature)):
        return False
    least, most = inverse_temperature.aminmax()
    return least.item() > 0 and most.item() <= SHARPEST


def self_self(
    projections: Sequence[Tensor], values: Tensor, inverse_temperature: Tensor | float, iterations: int
) -> Tensor:
    """Compute normalised self-self attention, the mean over `projections`, as `attention.self_self` defines it."""
    inverse = torch.as_tensor(inverse_temperature, dtype=torch.float32, device="cpu").flatten()
    inverse = inverse.expand(len(values)).contiguous()
    attend = _self_self if is_counted() else _attend  # an operator of torch takes longer than a small attention
    return attend(list(projections), values, inverse, iterations)


def query_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √c) v."""
    return _query_key(q, k, v) if is_counted() else _attend_to_keys(q, k, v)


@torch.library.custom_op("open_gem::self_self", mutates_args=(), device_types="cpu")
def _self_self(projections: Sequence[Tensor], values: Tensor, inverse_temperature: Tensor, iterations: int) -> Tensor:
    return _attend(projections, values, inverse_temperature, iterations)


@torch.library.custom_op("open_gem::query_key", mutates_args=(), device_types="cpu")
def _query_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend_to_keys(q, k, v)


def _attend_to_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    inverse = torch.full((len(v),), v.shape[-1] ** -0.5, dtype=torch.float32, device="cpu")
    return _attend((q, k), v, inverse, QUERY_KEY)


def _attend(projections: Sequence[Tensor], values: Tensor, inverse: Tensor, iterations: int) -> Tensor:
    _check(inverse, values.shape[:1], torch.float32)
    for heads in (*projections, values):
        _check(heads, values.shape, values.dtype)
    if _kernel(values.dtype) != values.dtype:
        converted = [p.to(torch.float32) for p in (*projections, values)]
        return _attend(converted[:-1], converted[-1], inverse, iterations).to(values.dtype)
    out = _empty_output(values)
    views = [_View(p.data_ptr(), *p.stride()[:3]) for p in projections]
    value, outcome = (_View(p.data_ptr(), *p.stride()[:3]) for p in (values, out))
    numbers = (*values.shape, len(views), iterations, torch.get_num_threads())
    job = _Job((_View * MOST)(*views), value, outcome, inverse.data_ptr(), *numbers)
    if _library(values.dtype).attend(ctypes.byref(job)):
        raise MemoryError(f"no memory for the attention of {tuple(values.shape)}")
    return out


def _check(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise TypeError for what the kernel, which sees an address, would read as something else."""
    fits = tensor.dtype == dtype and dtype in SOURCES and tensor.device.type == "cpu" and tensor.shape == shape
    if not fits or tensor.stride(-1) != 1:
        actual = f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
        raise TypeError(f"the kernel got {actual}, expected {dtype} of shape {tuple(shape)}, the last stride 1")


def _empty_output(values: Tensor) -> Tensor:
    """Return an uninitialised result `(b, h, n, c)` as the output projection reads it: a token's heads together."""
    return torch.empty_like(values.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _library(dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    library = load(dtype).library
    assert library is not None, load(dtype).reason
    return library


@_self_self.register_fake
def _(projections: Sequence[Tensor], values: Tensor, inverse_temperature: Tensor, iterations: int) -> Tensor:
    return _empty_output(values)


@_query_key.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _empty_output(v)


@register_flop_formula(torch.ops.open_gem.self_self, get_raw=True)
def _self_self_flops(projections: Sequence, values: Tensor, inverse: object, iterations: int, **_: object) -> int:
    return _flops(values, len(projections), iterations)


@register_flop_formula(torch.ops.open_gem.query_key, get_raw=True)
def _query_key_flops(q: object, k: object, v: Tensor, **_: object) -> int:
    return _flops(v, 2, QUERY_KEY)


def _flops(values: Tensor, projections: int, iterations: int) -> int:
    """Return the operations of the kernel that takes `values`."""
    b, h, n, c = values.shape
    kernel = _kernel(values.dtype)
    assert kernel is not None, f"no kernel takes {values.dtype}"
    operations = _library(kernel).operations
    operations.argtypes, operations.restype = [ctypes.c_long] * 6, ctypes.c_double
    return round(operations(b * h, torch.get_num_threads(), n, c, projections, iterations))
