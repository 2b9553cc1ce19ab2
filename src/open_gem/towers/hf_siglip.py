"""transformers' SigLIP: SigLIP 1, and those of SigLIP 2 that have one resolution."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer

from open_gem.towers.hf import HfTower


class HfSiglipTower(HfTower):
    """`SiglipModel`: no class token; a norm and an attention pool, whose output is in the joint space already."""

    reads = ("transformers.models.siglip.modeling_siglip.SiglipModel",)
    plain: ClassVar = {SiglipEncoderLayer: SiglipAttention}
    prefix = 0

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if not module.vision_model.use_head:
            return "its vision tower has no pooling head, so nothing takes its tokens to where the prompts are"
        if type(module.vision_model.head.attention) is not nn.MultiheadAttention:
            return "the attention of its pooling head is not torch's own"
        return super().unsupported_reason(module)

    def project(self, tokens: Tensor) -> Tensor:
        """Return what the pool makes of each token alone: over one key the softmax is 1, for any probe."""
        head, attn = self.vision.head, self.vision.head.attention
        weight, bias = attn.in_proj_weight[2 * attn.embed_dim :], attn.in_proj_bias[2 * attn.embed_dim :]
        values = linear(self.vision.post_layernorm(tokens), weight, bias)
        attended = linear(values, attn.out_proj.weight, attn.out_proj.bias)
        return attended + head.mlp(head.layernorm(attended))

    def pool(self, tokens: Tensor) -> Tensor:
        return self.vision.head(self.vision.post_layernorm(tokens))
