"""The common parts of open_clip's towers from timm: patch embedding, learned positions, and the head; not the
blocks."""

from abc import abstractmethod
from copy import deepcopy
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from open_gem.towers.base import ModuleTower, has_hooks, off_mps, watch
from open_gem.types import Grid, Size


class TimmTower(ModuleTower):
    """A transformer of timm in open_clip's `TimmModel`: `trunk`, then `head`, which may be empty.

    The trunk's parts are called, never its forward, which insists on images of the size it was made for.
    """

    resampling = "bicubic, antialiased (timm)"

    trunk: Any

    def __init__(self, module: Any):
        super().__init__(module)
        self.trunk = module.trunk
        self.patch = self.trunk.patch_embed.feat_ratio(as_scalar=False)
        self.prefix = self.trunk.num_prefix_tokens
        self.trained = Size(*self.trunk.patch_embed.img_size)  # `module.image_size` may be another (ViTamin-XL-384)
        self.layers = len(self.trunk.blocks)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if type(module) is not TimmModel:
            return "its vision tower is timm's, but not in open_clip's TimmModel"
        trunk: Any = module.trunk
        if type(trunk.patch_embed) not in (PatchEmbed, HybridEmbed) or has_hooks(trunk.patch_embed):
            return "its patch embedding is not timm's plain PatchEmbed or HybridEmbed, without hooks"
        if trunk.attn_pool is not None and not _is_plain(trunk.attn_pool):
            return "its attention pool is not timm's plain AttentionPoolLatent, without hooks"
        if not trunk.global_pool or hasattr(module.head, "pool"):
            return "its trunk does not pool its tokens"
        return next((reason for block in trunk.blocks if (reason := cls.unsupported_reason_in(block))), None)

    @classmethod
    @abstractmethod
    def unsupported_reason_in(cls, block: Any) -> str | None:
        """Return why this block cannot be read; None if it can."""

    @property
    def patch_weight(self) -> Tensor:
        return next(self.trunk.patch_embed.parameters())

    @property
    def trained_positions(self) -> Tensor:
        return self.trunk.pos_embed

    def resample_positions(self, grid: Grid) -> Tensor:
        prefix = 0 if self.trunk.no_embed_class else self.prefix
        trained = list(self.trunk.patch_embed.grid_size)
        positions = off_mps(self.trained_positions.detach())
        resampled = resample_abs_pos_embed(positions, list(grid), trained, num_prefix_tokens=prefix)[0]
        return resampled.to(self.patch_weight.device)

    def embed_patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        trunk, tokens = self.trunk, self._patches(pixels)
        positions = 0 if trunk.pos_embed is None else self.positions(grid)  # ViTamin-XL leaves them to convolutions
        if trunk.no_embed_class:
            tokens, positions = tokens + positions, 0
        prefix = [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        tokens = torch.cat([*(token.expand(len(pixels), -1, -1) for token in prefix), tokens], dim=1)
        return trunk.norm_pre(tokens + positions)

    def project(self, tokens: Tensor) -> Tensor:
        trunk = self.trunk
        tokens = trunk.norm(tokens)
        if trunk.attn_pool is not None:
            tokens = _pool_each(trunk.attn_pool, tokens)
        return self.module.head(trunk.head(trunk.fc_norm(tokens)))

    def pool(self, tokens: Tensor) -> Tensor:
        return self.module.head(self.trunk.forward_head(self.trunk.norm(tokens)))

    def library_forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        sized = deepcopy(self.module, {id(weight): weight for weight in self.module.parameters()})  # shares the weights
        sized.trunk.set_input_size(tuple(pixels.shape[-2:]))
        return watch(sized.trunk.blocks[-1], lambda: sized(pixels))

    def _patches(self, pixels: Tensor) -> Tensor:
        embed = self.trunk.patch_embed
        if isinstance(embed, HybridEmbed):  # takes any size
            return embed(pixels).flatten(1, -2)
        return embed.norm(embed.proj(pixels).flatten(2).transpose(1, 2))


def _is_plain(pool: Any) -> bool:
    """Return True if `_pool_each` computes what the pool would."""
    return type(pool) is AttentionPoolLatent and pool.pos_embed is None and pool.mlp is not None and not has_hooks(pool)


def _pool_each(pool: Any, tokens: Tensor) -> Tensor:
    """Return what an attention pool makes of each token alone: over one key the softmax is 1, for any latent."""
    _, values = pool.kv(tokens).chunk(2, dim=-1)
    pooled = pool.proj(values)
    return pooled + pool.mlp(pool.norm(pooled))
