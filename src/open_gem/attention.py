"""Ways to mix the values of one transformer block: pure functions on tensors split into heads.

Everything is `(b, h, n, c)`: images, heads, tokens ([CLS] first), head width. Every attention is one call of
`scaled_dot_product_attention`, whose fused kernels (CPU, CUDA) never store an n×n matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit
from torch.nn.functional import scaled_dot_product_attention


class Heads(NamedTuple):
    """Query, key and value of one block, each `(b, h, n, c)`."""

    q: Tensor
    k: Tensor
    v: Tensor


def query_key(heads: Heads) -> Tensor:
    """The attention the model was trained with: softmax(q kᵀ / √c) v."""
    return scaled_dot_product_attention(heads.q, heads.k, heads.v)


def identity(heads: Heads) -> Tensor:
    """Every token attends to itself alone (MaskCLIP): the values as they are."""
    return heads.v


def self_self(
    heads: Heads, inverse_temperature: Tensor | float, *, projections: str, normalize: bool, iterations: int
) -> Tensor:
    """Self-self attention (paper eqs. 2–6), averaged over `projections`, a subset of "qkv".

    `inverse_temperature` is 1/τ: a number, or a tensor that broadcasts to `(b, h, n, c)`.
    `iterations` is K of eq. 3: refinement steps before the assignment to the values.
    """
    norm: Callable[[Tensor], Tensor] = _unit if normalize else (lambda p: p)

    def step(p: Tensor, values: Tensor) -> Tensor:  # softmax(p pᵀ / τ) values; τ rides on the query, one value an image
        return scaled_dot_product_attention(p * inverse_temperature, p, values, scale=1.0)

    outputs = []
    for name in projections:
        p = norm(getattr(heads, name))
        for _ in range(iterations):
            p = norm(step(p, p))
        outputs.append(step(p, heads.v))
    return sum(outputs[1:], outputs[0]) / len(outputs)


def adaptive_inverse_temperature(normed: Tensor, head_width: int) -> Tensor:
    """1/τ of section 4.1, one value an image, shape `(b, 1, 1, 1)`.

    τ = N √c / Σᵢ‖xᵢ‖ with x = `normed` `(b, n, d)`, the block's input after its first norm, over all N tokens, [CLS]
    included. The paper's √d is the *head* width c, as the published code has it.
    """
    mean_norm = _wide(normed).norm(dim=-1).mean(dim=-1)
    return (mean_norm * head_width**-0.5).to(normed.dtype)[:, None, None, None]


def _unit(p: Tensor) -> Tensor:
    """Unit norm per head; the norm in float32, since in float16 the guard against zero vectors is zero itself."""
    return unit(_wide(p), dim=-1).to(p.dtype)


def _wide(p: Tensor) -> Tensor:
    return p.to(torch.promote_types(p.dtype, torch.float32))
