"""transformers' BLIP for retrieval, its contrastive half."""

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.blip.modeling_blip import BlipAttention, BlipEncoderLayer

from open_gem.method.attention import Heads
from open_gem.method.kernels.linear import apply
from open_gem.towers.base import split_heads, watch
from open_gem.towers.hf import HfTower


class BlipTower(HfTower):
    """`BlipForImageTextRetrieval`: packed projections; a norm and `vision_proj` of the class token.

    Positions are always resampled. The library's own forward, by default, cuts them off for smaller images.
    """

    reads = ("transformers.models.blip.modeling_blip.BlipForImageTextRetrieval",)
    plain: ClassVar = {BlipEncoderLayer: BlipAttention}
    prefix = 1

    @property
    def trained_positions(self) -> Tensor:
        return self.embeddings.position_embedding

    @staticmethod
    def qkv(attn: Any, normed: Tensor) -> Heads:
        return Heads(*(split_heads(part, attn.num_heads) for part in apply(attn.qkv, normed).chunk(3, dim=-1)))

    @staticmethod
    def out(attn: Any, mixed: Tensor) -> Tensor:
        return apply(attn.projection, mixed)

    def project(self, tokens: Tensor) -> Tensor:
        return self.module.vision_proj(self.vision.post_layernorm(tokens))

    def library_forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        def forward() -> Tensor:  # not `pooler_output`, which is normed twice
            tokens = self.vision(pixels, interpolate_pos_encoding=True).last_hidden_state
            return self.module.vision_proj(tokens[:, 0])

        return watch(self.vision.encoder.layers[-1], forward)
