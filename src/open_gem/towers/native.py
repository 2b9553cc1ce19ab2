"""open_clip's own vision transformer: CLIP, OpenCLIP, MetaCLIP, DFN, DataComp, CLIPA, CoCa, NLLB-CLIP …"""

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.functional import interpolate

from open_gem.method.attention import Heads
from open_gem.method.kernels.linear import feed_forward, linear
from open_gem.method.tower import Block
from open_gem.towers.base import ModuleTower, grid_of, has_hooks, join_heads, off_mps, split_heads, watch
from open_gem.types import Grid, Size


class NativeTower(ModuleTower):
    """`open_clip.transformer.VisionTransformer`, with its class-token, average and attention pooling."""

    reads = ("open_clip.transformer.VisionTransformer",)
    resampling = "bicubic, antialiased (timm)"  # as open_clip does at loading, and the published GEM
    prefix = 1

    def __init__(self, module: Any):
        super().__init__(module)
        rows, cols = module.patch_size
        self.patch, self.trained = (rows, cols), Size(*module.image_size)
        self.layers = len(module.transformer.resblocks)
        self._blocks = tuple(_read(block) for block in module.transformer.resblocks)
        pooler = module.attn_pool
        self._alone = nn.Identity() if pooler is None else partial(_pool_each, pooler)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if module.attn_pool is not None and module.attn_pool_contrastive is not None:
            return "its vision tower has a second, contrastive attention pool, which is not read"
        if not all(_is_plain(block) for block in module.transformer.resblocks):
            return "its blocks are not open_clip's plain ResidualAttentionBlock, without wrappers or hooks"
        return None

    @property
    def patch_weight(self) -> Tensor:
        return self.module.conv1.weight

    @property
    def trained_positions(self) -> Tensor:
        return self.module.positional_embedding

    def resample_positions(self, grid: Grid) -> Tensor:
        trained = Grid(*self.module.grid_size)
        if grid == trained:
            return self.trained_positions.detach()
        positions = off_mps(self.trained_positions.detach())
        return resample_abs_pos_embed(positions[None], list(grid), list(trained))[0].to(self.patch_weight.device)

    def embed_patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        patches = self.module.conv1(pixels).flatten(2).transpose(1, 2)
        class_token = self.module.class_embedding.expand(len(pixels), 1, -1).to(patches.dtype)
        tokens = torch.cat([class_token, patches], dim=1) + self.positions(grid).to(patches.dtype)
        return self.module.ln_pre(tokens)

    def blocks(self, grid: Grid) -> Sequence[Block]:
        return self._blocks

    def project(self, tokens: Tensor) -> Tensor:
        return self._into_joint_space(self.module.ln_post(self._alone(tokens)))

    def pool(self, tokens: Tensor) -> Tensor:
        pooled, _ = self.module._pool(tokens)
        return self._into_joint_space(pooled)

    def library_forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        sized = copy(self.module)  # shares the weights, except for the position embeddings
        sized._parameters = dict(self.module._parameters)
        sized.positional_embedding = nn.Parameter(self._resized(grid_of(pixels, self.patch)), requires_grad=False)
        return watch(sized.transformer.resblocks[-1], lambda: _embedding(sized(pixels)))

    def _resized(self, grid: Grid) -> Tensor:
        """Resize positions as open_clip does at loading (`resize_pos_embed`), without its shortcuts: it assumes that
        every trained grid is square, and that grids of as many patches are equal."""
        positions, trained = self.trained_positions.detach(), Grid(*self.module.grid_size)
        if grid == trained:
            return positions
        image = positions[1:].float().unflatten(0, tuple(trained)).permute(2, 0, 1)
        resized = interpolate(image[None], size=tuple(grid), mode="bicubic", antialias=True, align_corners=False)[0]
        return torch.cat([positions[:1], resized.flatten(1).T.to(positions.dtype)])

    def _into_joint_space(self, tokens: Tensor) -> Tensor:
        return tokens if self.module.proj is None else tokens @ self.module.proj


def _embedding(result: Any) -> Tensor:
    """Return the pooled embedding of a tower that may return its tokens as well."""
    return result[0] if isinstance(result, tuple) else result


def _is_plain(block: nn.Module) -> bool:
    """Return True if the weights, read directly, compute what the modules would."""
    if type(block) is not ResidualAttentionBlock or type(block.attn) is not nn.MultiheadAttention:
        return False
    return not has_hooks(block, block.attn, block.attn.out_proj)


def _read(block: ResidualAttentionBlock) -> Block:
    attn = block.attn

    def qkv(normed: Tensor) -> Heads:
        packed = linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        return Heads(*(split_heads(part, attn.num_heads) for part in packed.chunk(3, dim=-1)))

    def out(mixed: Tensor) -> Tensor:
        return block.ls_1(linear(join_heads(mixed), attn.out_proj.weight, attn.out_proj.bias))

    mlp = feed_forward(block.mlp)
    return Block(norm=block.ln_1, qkv=qkv, out=out, mlp=lambda x: block.ls_2(mlp(block.ln_2(x))), forward=block)


def _pool_each(pooler: Any, tokens: Tensor) -> Tensor:
    """Return what an attention pool makes of each token alone: over one key the softmax is 1, for any query."""
    attn = pooler.attn
    packed = attn.v_proj_weight is None
    weight = attn.in_proj_weight[2 * attn.embed_dim :] if packed else attn.v_proj_weight
    values = linear(pooler.ln_k(tokens), weight, attn.in_proj_bias[2 * attn.embed_dim :])
    return linear(values, attn.out_proj.weight, attn.out_proj.bias)
