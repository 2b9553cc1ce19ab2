"""timm's Eva, as open_clip takes it: EVA01-CLIP, EVA02-CLIP, Perception Encoder (PE-Core)."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from open_gem.method.attention import Heads
from open_gem.method.kernels.linear import apply, feed_forward, linear
from open_gem.method.tower import Block
from open_gem.tensors import version
from open_gem.towers.base import GridCache, has_hooks, join_heads, split_heads
from open_gem.towers.timm import TimmTower
from open_gem.types import Grid


class EvaTower(TimmTower):
    """`timm.models.eva.Eva`: rotary positions beside the learned ones, norms before or after the branches."""

    reads = ("timm.models.eva.Eva",)

    def __init__(self, module: Any):
        super().__init__(module)
        self._rotations: GridCache[Tensor] = GridCache()

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        reason, rope = super().unsupported_reason(module), module.trunk.rope
        if reason is None and rope is not None and type(rope) is not RotaryEmbeddingCat:
            return f"its rotary positions are timm's {type(rope).__name__}, which is not read"
        return reason

    @classmethod
    def unsupported_reason_in(cls, block: Any) -> str | None:
        plain = type(block) in (EvaBlock, EvaBlockPostNorm) and type(block.attn) in (EvaAttention, AttentionRope)
        if not plain or has_hooks(block, block.attn):
            return "its blocks are not timm's EvaBlock or EvaBlockPostNorm, without wrappers or hooks on attention"
        if getattr(block.attn, "gate", None) is not None:
            return "its attention has gates, which are not read"
        if getattr(block.attn, "num_kv_groups", 1) != 1:
            return "its attention shares keys among queries, which is not read"
        if getattr(block.attn, "rotate_half", False):
            return "its rotary positions rotate halves, which is not read"
        return None

    def blocks(self, grid: Grid) -> Sequence[Block]:
        rope = self.trunk.rope
        rotations = None if rope is None else self._rotations(grid, version(rope.buffers()), self._rotate_to)
        return tuple(_read(block, rotations) for block in self.trunk.blocks)

    def _rotate_to(self, grid: Grid) -> Tensor:
        """Return sines and cosines `(r·k, 2c)` for `grid`, as the library itself makes them when it is resized."""
        rope: Any = deepcopy(self.trunk.rope)
        rope.update_feat_shape(tuple(grid))
        return rope.get_embed(list(grid))


def _read(block: Any, rotations: Tensor | None) -> Block:
    attn = block.attn

    def rotate(x: Tensor) -> Tensor:
        if rotations is None or x.shape[2] <= attn.num_prefix_tokens:
            return x
        prefix, patches = x[:, :, : attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rotations).type_as(x)], dim=2)

    def qkv(normed: Tensor) -> Heads:
        q, k, v = (split_heads(part, attn.num_heads) for part in _projected(attn, normed))
        return Heads(rotate(attn.q_norm(q)), rotate(attn.k_norm(k)), v)

    def branch(x: Tensor) -> Tensor:
        return apply(attn.proj, attn.norm(join_heads(x)))

    forward, mlp = partial(block, rope=rotations), feed_forward(block.mlp)
    if isinstance(block, EvaBlockPostNorm):
        return Block(
            norm=nn.Identity(),
            qkv=qkv,
            out=lambda mixed: block.norm1(branch(mixed)),
            mlp=lambda x: block.norm2(mlp(x)),
            forward=forward,
        )
    return Block(
        norm=block.norm1,
        qkv=qkv,
        out=lambda mixed: _scaled(branch(mixed), block.gamma_1),
        mlp=lambda x: _scaled(mlp(block.norm2(x)), block.gamma_2),
        forward=forward,
    )


def _projected(attn: Any, normed: Tensor) -> Sequence[Tensor]:
    """Return queries, keys and values, each `(b, n, h·c)`, from one matrix or three; keys may have no bias."""
    if attn.qkv is None:
        return tuple(apply(layer, normed) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    if getattr(attn, "q_bias", None) is None:
        return apply(attn.qkv, normed).chunk(3, dim=-1)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return linear(normed, attn.qkv.weight, bias).chunk(3, dim=-1)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Return the layer scale, if there is one."""
    return x if gamma is None else gamma * x
