"""Ways to mix the values of one transformer block: pure functions on tensors split into heads.

Everything is `(b, h, n, c)`: images, heads, tokens ([CLS] first), head width. Every attention is one call of
`scaled_dot_product_attention`, whose fused kernels (CPU, CUDA) never store an n×n matrix of scores; or, if it can do
it, of a kernel of our own. A bias is such a matrix: n² numbers for all images and heads, 0.4 GB at 10,000 patches.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention
from torch.nn.functional import normalize as unit

from open_gem.method import kernels
from open_gem.method.kernels import attention as native
from open_gem.numerics import without_autocast
from open_gem.tensors import at_least_float32
from open_gem.types import Grid

ROWS = 1024
"""Maximum number of rows of an affinity map that `external` holds at a time, over all images of a batch."""


class Heads(NamedTuple):
    """Query, key and value of one block."""

    q: Float[Tensor, "b h n c"]
    k: Float[Tensor, "b h n c"]
    v: Float[Tensor, "b h n c"]


def query_key(heads: Heads) -> Float[Tensor, "b h n c"]:
    """Attend as the model was trained: softmax(q kᵀ / √c) v."""
    attend = native.query_key if native.fits(heads.q.shape[-1] ** -0.5, *heads) else scaled_dot_product_attention
    return attend(*heads)


def identity(heads: Heads) -> Float[Tensor, "b h n c"]:
    """Return the values as they are: every token attends to itself alone (MaskCLIP)."""
    return heads.v


def self_self(
    projections: Sequence[Float[Tensor, "b h n c"]],
    values: Float[Tensor, "b h n c"],
    inverse_temperature: Float[Tensor, "#b 1 1 1"] | float,
    *,
    normalize: bool,
    iterations: int,
    bias: Tensor | None = None,
) -> Float[Tensor, "b h n c"]:
    """Attend by self-self attention (paper eqs. 2–6): the mean over `projections` p of softmax(p pᵀ / τ + bias) values.

    projections          of q, k and v, those that take part
    inverse_temperature  1/τ: a number, or one per image, `(b, 1, 1, 1)`
    normalize            unit norm per head before each step
    iterations           K of eq. 3: refinement steps before the assignment to the values
    bias                 broadcasts to `(b, h, n, n)`, is added to the scaled scores of each step
    """
    can = normalize and bias is None and iterations >= 0 and 0 < len(projections) <= native.MOST
    for kernel in (kernels.on_gpu(), native) if can else ():
        if kernel is not None and kernel.fits(inverse_temperature, *projections, values):
            return kernel.self_self(projections, values, inverse_temperature, iterations)
    norm: Callable[[Tensor], Tensor] = to_unit if normalize else (lambda p: p)

    def step(p: Tensor, values: Tensor) -> Tensor:  # τ rides on the query, one value an image
        return scaled_dot_product_attention(p * inverse_temperature, p, values, attn_mask=bias, scale=1.0)

    def attend(p: Tensor) -> Tensor:
        p = norm(p)
        for _ in range(iterations):
            p = norm(step(p, p))
        return step(p, values)

    mixed = [attend(p) for p in projections]
    return sum(mixed[1:], mixed[0]) / len(mixed)


def adaptive_inverse_temperature(normed: Float[Tensor, "b n d"], head_width: int) -> Float[Tensor, "b 1 1 1"]:
    """Return 1/τ of section 4.1, one value an image, shape `(b, 1, 1, 1)`.

    τ = N √c / Σᵢ‖xᵢ‖ with x = `normed` `(b, n, d)`, the block's input after its first norm, over all N tokens, [CLS]
    included. The paper's √d is the *head* width c, as the published code has it.
    """
    mean_norm = at_least_float32(normed).norm(dim=-1).mean(dim=-1)
    return (mean_norm * head_width**-0.5).to(normed.dtype)[:, None, None, None]


def gaussian(grid: Grid, prefix: int, std: float) -> Float[Tensor, "n n"]:
    """Return NACLIP's bias ω for patches on `grid` after `prefix` other tokens: `(n, n)`, float32.

    exp(−(Δrow² + Δcol²) / 2 std²) between two patches, `std` in patches; 0 where a prefix token is involved.
    """
    places = (torch.arange(side, dtype=torch.float32, device="cpu") for side in grid)
    along_rows, along_cols = (torch.exp(-((at[:, None] - at) ** 2) / (2 * std**2)) for at in places)
    bias = torch.zeros((prefix + grid.patches,) * 2, dtype=torch.float32, device="cpu")
    patches = bias[prefix:, prefix:].unflatten(0, grid).unflatten(2, grid)
    torch.mul(along_rows[:, None, :, None], along_cols[None, :, None, :], out=patches)  # written in place
    return bias


@without_autocast()
def external(
    expert: Float[Tensor, "b m e"], values: Float[Tensor, "b h m c"], *, gamma: float = 3.0, beta: float = 1.2
) -> Float[Tensor, "b h m c"]:
    """Attend by another model's tokens (ProxyCLIP): softmax(γ (S − β mean S)) values, pairs below 0 left out.

    expert  `(b, m, e)`: its patch tokens F, of any norm. S = F̂F̂ᵀ are their cosines; mean S is over all pairs of one
            image, as in the later published code (the earlier took it over the batch: the same for one image)
    values  `(b, h, m, c)` of the host, on the expert's grid (`resize_values`): all heads get the same map
    gamma   γ, above 0: larger is sharper
    beta    β, 0 or more: how far above the mean a pair must be

    Returns `(b, h, m, c)` in the type of `values`, computed in float32 at least. A token whose every pair would be left
    out, even the one with itself, keeps its own value: this happens if all tokens are much alike, mean S > 1/β, for
    which the published code gives NaN.
    """
    dtype = torch.promote_types(at_least_float32(expert).dtype, values.dtype)
    points, flat = unit(expert.to(dtype), dim=-1), values.to(dtype).transpose(1, 2).flatten(2)
    threshold = beta * points.mean(dim=1).square().sum(dim=-1)[:, None, None]  # mean S = ‖mean F̂‖²
    mixed = []
    step = max(1, ROWS // len(points))
    for start in range(0, points.shape[1], step):
        excess = points[:, start : start + step] @ points.mT - threshold
        excess.diagonal(offset=start, dim1=-2, dim2=-1).clamp_(min=0)  # the cosine with itself is the highest
        mixed.append((gamma * excess).masked_fill_(excess < 0, -torch.inf).softmax(dim=-1) @ flat)
    return torch.cat(mixed, dim=1).unflatten(-1, (values.shape[1], -1)).transpose(1, 2).to(values.dtype)


def resize_values(values: Float[Tensor, "b h n c"], grid: Grid, to: Grid) -> Float[Tensor, "b h m c"]:
    """Resize values `(b, h, r·k, c)` of patches on `grid` to another grid over the same image.

    Bilinear, corners not aligned, without antialias, as ProxyCLIP has it; in float32 at least. As they are where the
    grids are equal.
    """
    if grid == to:
        return values
    maps = at_least_float32(values).transpose(2, 3).flatten(1, 2).unflatten(-1, grid)
    resized = interpolate(maps, size=tuple(to), mode="bilinear", align_corners=False)
    return resized.flatten(2).unflatten(1, (values.shape[1], -1)).transpose(2, 3).to(values.dtype)


def to_unit(p: Float[Tensor, "b h n c"]) -> Float[Tensor, "b h n c"]:
    """Normalise to unit norm per head; the norm in float32, since in float16 the guard against zero vectors is itself
    zero."""
    return unit(at_least_float32(p), dim=-1).to(p.dtype)
