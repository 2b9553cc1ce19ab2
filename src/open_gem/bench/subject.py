"""The subject of a measurement: a model with random weights, and its inputs."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_gem import towers
from open_gem.localizer import Localizer
from open_gem.towers.check import random_images
from open_gem.towers.loading import ModuleTower, find_device, find_dtype
from open_gem.types import Size

IMAGE_SIZE = Size(480, 640)


@dataclass(frozen=True)
class Setting:
    """The settings of a measurement.

    model    an architecture of `open-gem models`
    side     of the square that the model sees, in pixels
    batch    images at a time
    prompts  number of prompts
    threads  of the CPU; 0 for torch's default
    """

    model: str = "ViT-B-16"
    side: int = 448
    batch: int = 1
    prompts: int = 20
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0


@dataclass(eq=False)
class Subject:
    """The model and inputs of a setting, each made on first use."""

    setting: Setting
    size: Size = field(init=False)

    def __post_init__(self) -> None:
        self.size = Size(self.setting.side, self.setting.side)
        if self.setting.threads:
            torch.set_num_threads(self.setting.threads)

    @cached_property
    def localizer(self) -> Localizer:
        """The whole model. Raises InputError if its tokenizer cannot be loaded without a network."""
        backbone = towers.build(self.setting.model)
        backbone.model.to(*self._placement)
        return Localizer(backbone, size=f"square:{self.setting.side}")

    @cached_property
    def tower(self) -> ModuleTower:
        """The vision tower alone, of any supported architecture."""
        tower = towers.build_tower(self.setting.model)
        tower.module.to(*self._placement)
        return tower

    @property
    def _placement(self) -> tuple[torch.device, torch.dtype]:
        device = find_device(self.setting.device)
        return device, find_dtype(self.setting.dtype, device)

    @cached_property
    def pixels(self) -> Tensor:
        """Images as the model expects them, `(b, 3, side, side)`."""
        return random_images(self.size, self.setting.batch).to(
            self.tower.patch_weight.device, self.tower.patch_weight.dtype
        )

    @cached_property
    def photographs(self) -> list[Image.Image]:
        """Smooth images of 480 × 640 pixels, like photographs."""
        random = np.random.default_rng(0)
        small = random.integers(0, 256, (self.setting.batch, 12, 16, 3), dtype=np.uint8)
        size = IMAGE_SIZE.width, IMAGE_SIZE.height
        return [Image.fromarray(values).resize(size, Image.Resampling.BICUBIC) for values in small]

    @cached_property
    def prompts(self) -> list[str]:
        """Different prompts."""
        return [f"thing number {index}" for index in range(self.setting.prompts)]
