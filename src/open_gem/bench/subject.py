"""What is measured: a model of random weights, and what it is given."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_gem import towers
from open_gem.localizer import Localizer
from open_gem.towers.check import pictures
from open_gem.towers.loading import ModuleTower, find_device, find_dtype
from open_gem.types import Size

PICTURE = Size(480, 640)


@dataclass(frozen=True)
class Setting:
    """A model's name, sides of its pictures in pixels, pictures at a time, phrases, device, type, threads (0: as many
    as torch takes)."""

    model: str = "ViT-B-16"
    side: int = 448
    batch: int = 1
    prompts: int = 20
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0


@dataclass(eq=False)
class Subject:
    """A setting come to life; what a case does not need is not made."""

    setting: Setting
    size: Size = field(init=False)

    def __post_init__(self) -> None:
        self.size = Size(self.setting.side, self.setting.side)
        if self.setting.threads:
            torch.set_num_threads(self.setting.threads)

    @cached_property
    def localizer(self) -> Localizer:
        """The whole model. Raises InputError where its texts cannot be had without a network."""
        backbone = towers.build(self.setting.model)
        backbone.model.to(find_device(self.setting.device), find_dtype(self.setting.dtype))
        return Localizer(backbone, size=f"square:{self.setting.side}")

    @cached_property
    def tower(self) -> ModuleTower:
        """Its vision half, of any architecture that is read."""
        tower = towers.build_tower(self.setting.model)
        tower.module.to(find_device(self.setting.device), find_dtype(self.setting.dtype))
        return tower

    @cached_property
    def pixels(self) -> Tensor:
        """Pictures as the model wants them, `(b, 3, side, side)`."""
        return pictures(self.size, self.setting.batch).to(self.tower.patch_weight.device, self.tower.patch_weight.dtype)

    @cached_property
    def photographs(self) -> list[Image.Image]:
        """Smooth pictures of 480 × 640 pixels, as people have them."""
        random = np.random.default_rng(0)
        small = random.integers(0, 256, (self.setting.batch, 12, 16, 3), dtype=np.uint8)
        return [Image.fromarray(one).resize((PICTURE.width, PICTURE.height), Image.Resampling.BICUBIC) for one in small]

    @cached_property
    def phrases(self) -> list[str]:
        """Different words."""
        return [f"thing number {index}" for index in range(self.setting.prompts)]
