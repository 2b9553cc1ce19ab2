"""transformers' CLIP: OpenAI, LAION, MetaCLIP 1 and 2, TinyCLIP."""

from typing import ClassVar

from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2Attention, MetaClip2EncoderLayer

from open_gem.towers.hf import HfTower
from open_gem.types import Grid


class HfClipTower(HfTower):
    """`CLIPModel` and `MetaClip2Model`: a norm before the blocks; a norm and a projection of the class token."""

    reads = (
        "transformers.models.clip.modeling_clip.CLIPModel",
        "transformers.models.metaclip_2.modeling_metaclip_2.MetaClip2Model",
    )
    plain: ClassVar = {CLIPEncoderLayer: CLIPAttention, MetaClip2EncoderLayer: MetaClip2Attention}
    prefix = 1

    def embed_patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        return self.vision.pre_layrnorm(super().embed_patches(pixels, grid))

    def project(self, tokens: Tensor) -> Tensor:
        return self.module.visual_projection(self.vision.post_layernorm(tokens))
