"""The towers of an open_clip model, computed faster than open_clip does on a CPU; the results are the same.

Three shortcuts, none of which changes what a saved model computes: attention as plain matrix products (the fused CPU
kernel is slow backwards in bfloat16), patches dropped before they are embedded, and a last vision block that computes
only the class token, the one token that the loss sees.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Clip = Any
"""An `open_clip.model.CLIP`; the attributes of torch modules have no types that a checker could follow."""


def embed_patches(model: Clip, patches: Tensor, positions: Tensor) -> Tensor:
    """Image embeddings (b, e), not normalized.

    `patches` (b, n, 3*k*k) float, normalized pixels, channel first; `positions` (b, n) their places in the grid.
    """
    vision = model.visual
    x = F.linear(patches, vision.conv1.weight.flatten(1))
    x = x + vision.positional_embedding[1:][positions]
    first = (vision.class_embedding + vision.positional_embedding[0]).to(x.dtype)
    x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)
    x = vision.ln_pre(x)
    blocks = vision.transformer.resblocks
    for block in blocks[:-1]:
        x = _block(block, x, queries=x.shape[1])
    x = _block(blocks[-1], x, queries=1)
    return vision.ln_post(x[:, 0]) @ vision.proj


def embed_texts(model: Clip, tokens: Tensor) -> Tensor:
    """Text embeddings (b, e), not normalized, of token ids (b, n); n may be less than the context length."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    for block in model.transformer.resblocks:
        x = _block(block, x, queries=length, mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)
    return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ model.text_projection


def _block(block: Any, x: Tensor, queries: int, mask: Tensor | None = None) -> Tensor:
    """`block` applied to the first `queries` tokens of x (b, n, d), which attend to all n."""
    kept = x[:, :queries]
    kept = kept + _attention(block.attn, block.ln_1(x), queries, mask)
    return kept + block.mlp(block.ln_2(kept))


def _attention(layer: nn.MultiheadAttention, x: Tensor, queries: int, mask: Tensor | None) -> Tensor:
    width = layer.embed_dim
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    if queries == x.shape[1]:
        q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    else:
        q = F.linear(x[:, :queries], weight[:width], bias[:width])
        k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
    q, k, v = (part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = (q * layer.head_dim**-0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    # Under autocast softmax would run in float32; bfloat16 halves its memory traffic and is accurate enough here.
    with torch.autocast("cpu", enabled=False):
        shares = scores.softmax(dim=-1)
    mixed = (shares @ v).transpose(1, 2).flatten(-2)
    return layer.out_proj(mixed)
