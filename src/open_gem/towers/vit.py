"""timm's plain vision transformer, as open_clip takes it: SigLIP, SigLIP 2, MobileCLIP-B and -L, ViTamin …"""

from collections.abc import Sequence
from typing import Any

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor

from open_gem.method.attention import Heads
from open_gem.method.kernels.linear import apply, feed_forward
from open_gem.method.tower import Block
from open_gem.towers.base import has_hooks, join_heads, split_heads
from open_gem.towers.timm import TimmTower
from open_gem.types import Grid


class VitTower(TimmTower):
    """`timm.models.vision_transformer.VisionTransformer`, with stems of patches or of convolutions, and any pooling."""

    reads = ("timm.models.vision_transformer.VisionTransformer",)

    def __init__(self, module: Any):
        super().__init__(module)
        self._blocks = tuple(_read(block) for block in self.trunk.blocks)

    @classmethod
    def unsupported_reason_in(cls, block: Any) -> str | None:
        if type(block) is not TimmBlock or type(block.attn) is not Attention or has_hooks(block, block.attn):
            return "its blocks are not timm's plain Block with plain Attention, without wrappers or hooks"
        if getattr(block.attn, "gate", None) is not None:
            return "its attention has gates, which are not read"
        return None

    def blocks(self, grid: Grid) -> Sequence[Block]:
        return self._blocks


def _read(block: TimmBlock) -> Block:
    attn: Any = block.attn

    def qkv(normed: Tensor) -> Heads:
        q, k, v = (split_heads(part, attn.num_heads) for part in apply(attn.qkv, normed).chunk(3, dim=-1))
        return Heads(attn.q_norm(q), attn.k_norm(k), v)

    def out(mixed: Tensor) -> Tensor:
        return block.ls1(apply(attn.proj, attn.norm(join_heads(mixed))))

    mlp = feed_forward(block.mlp)
    return Block(norm=block.norm1, qkv=qkv, out=out, mlp=lambda x: block.ls2(mlp(block.norm2(x))), forward=block)
