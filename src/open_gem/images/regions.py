"""Class-agnostic masks of an image as one map of numbers: of a file, an array or a tensor."""

from os import PathLike

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from open_gem.errors import InputError
from open_gem.types import Size

RegionsLike = np.ndarray | Tensor | Image.Image | str | PathLike[str]
"""A map of numbers `(y, x)`, or an image or file of one with a single channel, such as a PNG with a palette."""

LARGEST = 1 << 24
"""Numbers of regions are below this, so that float32 holds them."""


def check_regions(regions: RegionsLike, size: Size) -> Int[Tensor, "y x"]:
    """Return the numbers of regions as int32, 0 for none. Raises InputError unless they are whole numbers of 0 or more,
    `(y, x)` of this size."""
    if isinstance(regions, str | PathLike):
        try:
            with Image.open(regions) as image:
                image.load()
                regions = image
        except OSError as error:
            raise InputError(f"cannot read regions from {str(regions)!r}: {error.strerror or error}") from error
    values = regions.detach().cpu().numpy() if isinstance(regions, Tensor) else np.asarray(regions)
    if values.shape != tuple(size) or values.dtype.kind not in "iub":
        raise InputError(
            f"regions are {values.dtype} of shape {values.shape}, expected whole numbers of the image's size, "
            f"{tuple(size)}: 0 where there is no region"
        )
    if values.min() < 0 or values.max() >= LARGEST:
        raise InputError(f"regions have numbers from {values.min()} to {values.max()}, expected 0 to {LARGEST - 1}")
    return torch.from_numpy(values.astype(np.int32))
