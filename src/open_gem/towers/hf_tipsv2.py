"""transformers' TIPSv2: a DINOv2 with one register, whose tokens are in the joint space after its final norm."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from open_gem.method.attention import Heads
from open_gem.method.kernels.linear import apply, feed_forward
from open_gem.method.tower import Block
from open_gem.towers.base import join_heads, split_heads, watch
from open_gem.towers.hf import HfTower
from open_gem.types import Grid

try:
    from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2VisionAttention, Tipsv2VisionLayer
except ImportError:  # an earlier release, which knows no such model
    PLAIN: dict[type, type] = {}
else:
    PLAIN = {Tipsv2VisionLayer: Tipsv2VisionAttention}


class Tipsv2Tower(HfTower):
    """`Tipsv2Model`: two class tokens (the second is the register), layer scale, no projection."""

    reads = ("transformers.models.tipsv2.modeling_tipsv2.Tipsv2Model",)
    resampling = "bilinear, antialiased (transformers)"
    plain: ClassVar = PLAIN
    attention = "attention"

    def __init__(self, module: Any):
        super().__init__(module)
        self.prefix = 1 + module.config.vision_config.num_register_tokens

    @classmethod
    def layers_of(cls, module: Any) -> Sequence[Any]:
        return module.vision_model.encoder.layer

    @classmethod
    def patches_of(cls, embeddings: Any) -> tuple[int, int]:
        return embeddings.patch_size, embeddings.patch_embeddings.num_patches

    @property
    def patch_weight(self) -> Tensor:
        return self.embeddings.patch_embeddings.projection.weight

    @property
    def trained_positions(self) -> Tensor:
        return self.embeddings.position_embeddings

    def resample_positions(self, grid: Grid) -> Tensor:
        """Resample positions of the first class token and the patches, as the library does: `(1 + n, d)`."""
        tokens = self.trained_positions.new_empty(1, 1 + grid.patches, self.trained_positions.shape[-1])
        height, width = grid.rows * self.patch[0], grid.cols * self.patch[1]
        return self.embeddings.interpolate_pos_encoding(tokens, height, width)[0].detach()

    def embed_patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        embeddings, count = self.embeddings, len(pixels)
        tokens = torch.cat([embeddings.cls_token.expand(count, -1, -1), embeddings.patch_embeddings(pixels)], dim=1)
        tokens = tokens + self.positions(grid)
        return torch.cat([tokens[:, :1], embeddings.register_tokens.expand(count, -1, -1), tokens[:, 1:]], dim=1)

    def project(self, tokens: Tensor) -> Tensor:
        return self.vision.layernorm(tokens)

    def library_forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return watch(self.vision.encoder.layer[-1], lambda: self.module.get_image_features(pixels).pooler_output)

    @classmethod
    def _read(cls, layer: Any) -> Block:
        attn, mlp = layer.attention, feed_forward(layer.mlp)

        def qkv(normed: Tensor) -> Heads:
            projected = (apply(part, normed) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
            return Heads(*(split_heads(part, attn.num_attention_heads) for part in projected))

        return Block(
            norm=layer.norm1,
            qkv=qkv,
            out=lambda mixed: layer.layer_scale1(apply(attn.o_proj, join_heads(mixed))),
            mlp=lambda tokens: layer.layer_scale2(mlp(layer.norm2(tokens))),
            forward=lambda tokens: layer(tokens, attention_mask=None),
        )
