"""The common parts of the vision transformers of the package transformers."""

from collections.abc import Sequence
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from open_gem.method.attention import Heads
from open_gem.method.kernels.linear import apply, feed_forward
from open_gem.method.tower import Block
from open_gem.towers.base import ModuleTower, join_heads, split_heads, watch
from open_gem.types import Grid, Size


class HfTower(ModuleTower):
    """A whole model whose `vision_model` has plain layers; `plain` maps their class to that of their attention, which
    is the part of a layer called `attention`.

    The parts of a layer are called as modules, so that low-rank adapters in their places count.
    """

    resampling = "bicubic, not antialiased (transformers)"
    plain: ClassVar[dict[type, type]]
    attention: ClassVar[str] = "self_attn"

    def __init__(self, module: Any):
        super().__init__(module)
        self.vision = module.vision_model
        self.embeddings, layers = self.vision.embeddings, self.layers_of(module)
        patch, count = self.patches_of(self.embeddings)
        self.patch = (patch, patch)
        side = isqrt(count) * patch  # 378 of 384 pixels with patches of 14
        self.trained, self.layers = Size(side, side), len(layers)
        self._blocks = tuple(self._read(layer) for layer in layers)

    @classmethod
    def layers_of(cls, module: Any) -> Sequence[Any]:
        """Return the layers of the vision transformer."""
        return module.vision_model.encoder.layers

    @classmethod
    def patches_of(cls, embeddings: Any) -> tuple[int, int]:
        """Return the side of a patch in pixels and the number of patches in training."""
        return embeddings.patch_size, embeddings.num_patches

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        for layer in cls.layers_of(module):
            attention = getattr(layer, cls.attention)
            plain = type(layer) in cls.plain and type(attention) is cls.plain[type(layer)]
            if not plain or _has_foreign_hooks(layer) or _has_foreign_hooks(attention):
                return "its layers are not transformers' own, without wrappers or hooks"
        if _has_foreign_hooks(module.vision_model.embeddings):
            return "there are hooks on its embeddings, which are read past"
        return None

    @property
    def patch_weight(self) -> Tensor:
        return self.embeddings.patch_embedding.weight

    @property
    def trained_positions(self) -> Tensor:
        return self.embeddings.position_embedding.weight

    def resample_positions(self, grid: Grid) -> Tensor:
        """Resample positions as `interpolate_pos_encoding` does: `(prefix + n, d)`."""
        positions = self.trained_positions.detach().flatten(0, -2)
        side = isqrt(len(positions) - self.prefix)
        if grid == (side, side):
            return positions
        image = positions[self.prefix :].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        resized = interpolate(image, size=tuple(grid), mode="bicubic", align_corners=False)
        return torch.cat([positions[: self.prefix], resized.permute(0, 2, 3, 1).flatten(0, 2)])

    def pool(self, tokens: Tensor) -> Tensor:
        return self.project(tokens[:, 0])

    def library_forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        def forward() -> Tensor:
            return self.module.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output

        return watch(self.vision.encoder.layers[-1], forward)

    def embed_patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        tokens = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        if self.prefix:
            class_token = self.embeddings.class_embedding.expand(len(pixels), 1, -1)
            tokens = torch.cat([class_token, tokens], dim=1)
        return tokens + self.positions(grid)

    def blocks(self, grid: Grid) -> Sequence[Block]:
        return self._blocks

    @staticmethod
    def qkv(attn: Any, normed: Tensor) -> Heads:
        """Return queries, keys and values that the attention `attn` makes of normed tokens."""
        projected = (apply(layer, normed) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        return Heads(*(split_heads(part, attn.num_heads) for part in projected))

    @staticmethod
    def out(attn: Any, mixed: Tensor) -> Tensor:
        """Return the output projection of the attention `attn`, of joined heads."""
        return apply(attn.out_proj, mixed)

    @classmethod
    def _read(cls, layer: Any) -> Block:
        mlp = feed_forward(layer.mlp)
        return Block(
            norm=layer.layer_norm1,
            qkv=lambda normed: cls.qkv(layer.self_attn, normed),
            out=lambda mixed: cls.out(layer.self_attn, join_heads(mixed)),
            mlp=lambda tokens: mlp(layer.layer_norm2(tokens)),
            forward=lambda tokens: layer(tokens, attention_mask=None),
        )


def _has_foreign_hooks(module: nn.Module) -> bool:
    """Return True if `module` has hooks other than transformers' own, which stay once a model was asked for hidden
    states or attention, and do nothing until it is asked again."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
