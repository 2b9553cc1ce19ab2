# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
"""Self-self attention on a GPU, a kernel in Triton. It is off unless OPEN_GEM_TRITON is 1, and not yet measured.

softmax(p pᵀ / τ) of unit vectors p is made of E = exp((p pᵀ − 1) / τ): no row needs its maximum, since that is its
diagonal, 1. Between iterations p is normalised again while a block of rows is in registers. One launch a step takes q,
k and v together, and the last one writes their mean.

Two savings of the kernels for a CPU do not pay here. Half of the scores by symmetry would need atomic sums of rows from
other blocks. One product with v for all projections needs the sums of rows first, and so the scores twice: 7 products
instead of 6.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import register_flop_formula
from triton.runtime.interpreter import InterpretedFunction

from open_gem.numerics import is_traced
from open_gem.tensors import at_least_float32

WIDEST = 128
"""Maximum width of a head: wider ones do not fit registers."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _attend(
    p,
    x,
    inverse,
    out,
    x_projection,
    x_image,
    x_head,
    x_token,
    out_projection,
    out_image,
    out_head,
    out_token,
    images,
    heads,
    tokens,
    width,
    COUNT: tl.constexpr,
    ASSIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write a block of rows of one head: with ASSIGN the mean of softmax(p pᵀ / τ) x over COUNT projections; without,
    the direction of E x for one projection.

    p is (projections, images, heads, tokens, width), contiguous; x and out have strides, along the width 1. WIDEN
    multiplies the same numbers as float32, for the interpreter, which takes the bits of bfloat16 for whole numbers.
    """
    item = tl.program_id(1).to(tl.int64)
    head = item % heads
    image = item // heads % images
    first = item // heads // images  # the projection; 0 with ASSIGN
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, WIDTH)
    are_rows = rows[:, None] < tokens
    are_dims = dims[None, :] < width
    scale = tl.load(inverse + image).to(tl.float32) * 1.4426950408889634  # / ln 2: for powers of 2
    result = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for which in tl.static_range(COUNT):
        here = p + (((first + which) * images + image) * heads + head) * tokens * width
        values = x + first * x_projection + image * x_image + head * x_head
        left = tl.load(here + rows[:, None] * width + dims[None, :], mask=are_rows & are_dims, other=0.0)
        if WIDEN:
            left = left.to(tl.float32)
        mixed = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        sums = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, tokens, COLUMNS):
            at = start + tl.arange(0, COLUMNS)
            mask = (at[:, None] < tokens) & are_dims
            right = tl.load(here + at[:, None] * width + dims[None, :], mask=mask, other=0.0)
            if WIDEN:
                right = right.to(tl.float32)
            scores = tl.dot(left, tl.trans(right), input_precision=PRECISION)
            weights = tl.where(at[None, :] < tokens, tl.exp2((scores - 1.0) * scale), 0.0)
            value = tl.load(values + at[:, None] * x_token + dims[None, :], mask=mask, other=0.0)
            weights = weights.to(value.dtype)
            sums += tl.sum(weights.to(tl.float32), axis=1)  # of what is multiplied, rounded
            if WIDEN:
                value = value.to(tl.float32)
                weights = weights.to(tl.float32)
            mixed = tl.dot(weights, value, acc=mixed, input_precision=PRECISION)
        if ASSIGN:
            result += mixed / (sums[:, None] * COUNT)
        else:
            mixed = mixed / sums[:, None]  # as float16 must hold them, and short ones are as short as in the formula
            result = mixed / tl.maximum(tl.sqrt(tl.sum(mixed * mixed, axis=1)), 1e-12)[:, None]
    place = out + first * out_projection + image * out_image + head * out_head
    tl.store(place + rows[:, None] * out_token + dims[None, :], result.to(out.dtype.element_ty), are_rows & are_dims)


IS_INTERPRETED = isinstance(_attend, InterpretedFunction)
"""True where TRITON_INTERPRET runs kernels on a CPU, which is how the tests do it."""


def fits(inverse_temperature: Tensor | float, *heads: Tensor) -> bool:
    """Return True if the kernel can take these heads, all `(b, h, n, c)`: of one type on one GPU, without gradient,
    c up to `WIDEST`; and 1/τ, a number above 0 or one an image."""
    first = heads[0]
    device = "cpu" if IS_INTERPRETED else "cuda"
    tensors = (*heads, inverse_temperature) if isinstance(inverse_temperature, Tensor) else heads
    return (
        all(type(p) is Tensor and p.device == first.device and not p.requires_grad for p in tensors)
        and all(p.dtype == first.dtype and p.shape == first.shape and p.stride(-1) == 1 for p in heads)
        and first.device.type == device
        and first.dtype in TYPES
        and first.numel() > 0
        and first.shape[-1] <= WIDEST
        and not is_traced()
        and not torch.is_autocast_enabled(first.device.type)
        and _is_known(inverse_temperature, len(first))
    )


def _is_known(inverse_temperature: Tensor | float, images: int) -> bool:
    """Return True for one number, or one an image. A tensor's values are not read, since the GPU would be waited for:
    they only have to be so small that exp(2/τ) is finite if negative."""
    if not isinstance(inverse_temperature, Tensor):
        return inverse_temperature > 0
    return inverse_temperature.numel() == 1 or inverse_temperature.shape == (images, 1, 1, 1)


def self_self(
    projections: Sequence[Tensor], values: Tensor, inverse_temperature: Tensor | float, iterations: int
) -> Tensor:
    """Compute normalised self-self attention, the mean over `projections`, as `attention.self_self` defines it."""
    if isinstance(inverse_temperature, Tensor):
        inverse = inverse_temperature.flatten().expand(len(values)).contiguous()
    else:
        inverse = torch.full((len(values),), inverse_temperature, dtype=torch.float32, device=values.device)
    return _self_self(list(projections), values, inverse, iterations)


@torch.library.custom_op("open_gem::self_self_triton", mutates_args=())
def _self_self(projections: Sequence[Tensor], values: Tensor, inverse: Tensor, iterations: int) -> Tensor:
    p = normalize(at_least_float32(torch.stack(list(projections))), dim=-1).to(values.dtype)
    for _ in range(iterations):
        p = _launch(p, p, inverse, torch.empty_like(p), assign=False)
    out = _empty_output(values)
    _launch(p, values[None], inverse, out[None], assign=True)
    return out


@register_flop_formula(torch.ops.open_gem.self_self_triton)
def _flops(projections: Sequence, values: Sequence[int], inverse: object, iterations: int, **_: object) -> int:
    b, h, n, c = values
    return 4 * b * h * n * n * c * len(projections) * (iterations + 1)


@_self_self.register_fake
def _(projections: Sequence[Tensor], values: Tensor, inverse: Tensor, iterations: int) -> Tensor:
    return _empty_output(values)


def _empty_output(values: Tensor) -> Tensor:
    """Return an uninitialised result `(b, h, n, c)` as the output projection reads it: a token's heads together."""
    return torch.empty_like(values.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _launch(p: Tensor, x: Tensor, inverse: Tensor, out: Tensor, assign: bool) -> Tensor:
    count, images, heads, tokens, width = p.shape
    rows, columns, warps, stages = blocks(p.dtype, width)
    grid = (triton.cdiv(tokens, rows), images * heads * (1 if assign else count))
    with torch.cuda.device(p.device) if p.is_cuda else torch.no_grad():
        _attend[grid](
            *(p, x, inverse, out, *x.stride()[:4], *out.stride()[:4], images, heads, tokens, width),
            COUNT=count if assign else 1,
            ASSIGN=assign,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            WIDEN=IS_INTERPRETED and p.dtype == torch.bfloat16,
            ROWS=rows,
            COLUMNS=columns,
            WIDTH=max(16, triton.next_power_of_2(width)),
            num_warps=warps,
            num_stages=stages,
        )
    return out


def blocks(dtype: torch.dtype, width: int) -> tuple[int, int, int, int]:
    """Return rows and columns of a block of scores, warps and stages of the pipeline."""
    if dtype == torch.float32:
        return (64, 32, 4, 2)
    return (128, 64, 4 if width <= 64 else 8, 3)
