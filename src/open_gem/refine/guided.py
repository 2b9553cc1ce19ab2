"""Refinements by weights that are made once an image and used for each of its maps."""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from open_gem.errors import InputError
from open_gem.images.pixels import Preprocess, size_of, to_pixels
from open_gem.localization import Localization
from open_gem.refine import Refinement, check_image
from open_gem.types import Size

_UNCHANGED = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest", image_size=Size(1, 1))  # in [0, 1]


@dataclass(frozen=True)
class Guided(Refinement):
    """A refinement by `weights`, functions of the image alone.

    A refined localization keeps a reference to its image, and once a map was made also the weights. They go with the
    localization; pickles have none.
    """

    @abstractmethod
    def weights(self, image: Tensor) -> Any:
        """Return the weights of an image `(3, y, x)`, floats in [0, 1] say."""

    @abstractmethod
    def __call__(self, weights: Any, heatmap: Tensor) -> Tensor:
        """Refine a map `(y, x)` by `weights` of an image of its size: the same shape, float32 at least."""

    def refine(self, image: Image.Image, localization: Localization) -> Localization:
        check_image(image, localization)
        return replace(localization, refiner=_Refiner(self, image))


def check_channels(image: Tensor) -> None:
    """Raise InputError unless an image is floats `(3, y, x)`."""
    if image.ndim != 3 or not image.is_floating_point():
        kind = f"{str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}"
        raise InputError(f"image is {kind}, expected floats of shape (3, y, x)")


def check_size(heatmap: Tensor, size: tuple[int, ...]) -> None:
    """Raise InputError unless a map has the `size` of its image, height and width."""
    if tuple(heatmap.shape[-2:]) != size:
        raise InputError(f"heatmap is {tuple(heatmap.shape[-2:])} pixels, expected the image's {size}")


@dataclass(eq=False)
class _Refiner:
    """Refines maps `(y, x)` of one image."""

    refinement: Guided
    image: Image.Image
    _weights: tuple[torch.device, Any] | None = field(default=None, init=False, repr=False)

    def __call__(self, heatmap: Tensor) -> Tensor:
        made = self._weights  # another thread may put its own there
        if made is None or made[0] != heatmap.device:
            pixels = to_pixels(self.image, size_of(self.image), _UNCHANGED).to(heatmap.device)
            made = self._weights = heatmap.device, self.refinement.weights(pixels)
        return self.refinement(made[1], heatmap)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_weights": None}
