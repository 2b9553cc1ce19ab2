"""transformers' SigLIP 2 of variable resolution (NaFlex): images come as patches, in a grid of their own shape."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.siglip2.modeling_siglip2 import Siglip2Attention, Siglip2EncoderLayer

from open_gem.towers.base import watch
from open_gem.towers.hf_siglip import HfSiglipTower
from open_gem.types import Grid


class NaflexTower(HfSiglipTower):
    """`Siglip2Model`: as SigLIP, but its patch embedding is linear, and its positions are resized to any grid.

    The library pads a batch of images of different shapes. Here a batch has one shape, and nothing is padded.
    """

    reads = ("transformers.models.siglip2.modeling_siglip2.Siglip2Model",)
    resampling = "bilinear, antialiased (transformers)"
    plain: ClassVar = {Siglip2EncoderLayer: Siglip2Attention}

    def resample_positions(self, grid: Grid) -> Tensor:
        positions = self.trained_positions.detach()
        side = self.embeddings.position_embedding_size
        shape = torch.tensor([tuple(grid)], dtype=torch.int64, device=positions.device)
        trained = positions.reshape(side, side, -1)
        return self.embeddings.resize_positional_embeddings(trained, shape, max_length=grid.patches)[0]

    def embed_patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        return self.embeddings.patch_embedding(self._patches(pixels)) + self.positions(grid)

    def library_forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        patches = self._patches(pixels)
        rows, cols = (pixels.shape[axis] // self.patch[0] for axis in (2, 3))
        shapes = torch.tensor([[rows, cols]] * len(pixels), dtype=torch.int64, device=pixels.device)

        def forward() -> Tensor:
            mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
            return self.module.get_image_features(patches, mask, shapes).pooler_output

        return watch(self.vision.encoder.layers[-1], forward)

    def _patches(self, pixels: Tensor) -> Tensor:
        """Return pixels `(b, 3, y, x)` patch by patch, `(b, r·k, y·x·3)`: rows, columns, then channels of each."""
        side: Any = self.patch[0]
        cells = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (b, 3, r, y, k, x)
        return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
