"""Maps that follow the edges of the image: pixel-adaptive mask refinement (PAMR).

N. Araslanov and S. Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020. Neither model nor
training: each pixel's value becomes, a few times over, a mean of its neighbours', weighted by how alike they look.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from open_gem.checks import is_count, is_positive
from open_gem.errors import InputError
from open_gem.refine.guided import Guided, check_channels, check_size
from open_gem.tensors import at_least_float32

_AROUND = tuple((down, right) for down, right in product((-1, 0, 1), repeat=2) if (down, right) != (0, 0))


@dataclass(frozen=True)
class Pamr(Guided):
    """Pixel-adaptive mask refinement.

    A pixel i has neighbours j: the 8 around it, at each of the dilations. Each has the weight

        α_ij = softmax over j of k_ij,    k_ij = mean over channels c of −|I_ic − I_jc| / (1e-8 + w σ_ic)

    with σ_ic the standard deviation (of a sample, with n − 1) of channel c over i and its neighbours, where i counts
    once a dilation, as in the authors' code. Then m_i ← Σ_j α_ij m_j, `iterations` times. Beyond the border lie copies
    of it. Weights add up to 1, so values stay in their range and a constant map stays as it is. As differences are
    divided by their deviation, brightness and contrast of a channel do not matter: normalised pixels give the same.

    iterations  0 or more; 10 in the paper's code and in those of SCLIP and NACLIP
    dilations   in pixels, each 1 or more: (8, 16) as in SCLIP and NACLIP; the paper has (1, 2, 4, 8, 12, 24)
    std_weight  w, above 0: smaller follows edges more sharply; 0.1 in all of them

    Raises:
        InputError: for settings outside these, and images or maps of other shapes.

    Weights take 32 bytes per pixel and dilation, 64 MB per megapixel with two: see `Guided`.
    """

    iterations: int = 10
    dilations: tuple[int, ...] = (8, 16)
    std_weight: float = 0.1

    def __post_init__(self) -> None:
        if not is_count(self.iterations, 0):
            raise InputError(f"iterations is {self.iterations!r}, expected a whole number, 0 or more")
        dilations = self.dilations
        if (
            not isinstance(dilations, list | tuple)
            or not dilations
            or not all(is_count(dilation, 1) for dilation in dilations)
        ):
            raise InputError(f"dilations are {dilations!r}, expected one or several whole numbers of pixels, 1 or more")
        if not is_positive(self.std_weight):
            raise InputError(f"std_weight is {self.std_weight!r}, expected a number above 0")
        object.__setattr__(self, "dilations", tuple(dilations))  # a list, as JSON has it, would not hash

    def weights(self, image: Tensor) -> Tensor:
        """Return α of an image `(3, y, x)`, floats in [0, 1] say: `(8·dilations, y, x)`, adding up to 1 at each pixel.

        One dilation after another, the neighbours of each in reading order. In float32 at least.
        """
        check_channels(image)
        image = at_least_float32(image)
        # Deviation by way of differences to the pixel itself, which is then a sample of 0: nothing large cancels.
        total, squares = torch.zeros_like(image), torch.zeros_like(image)
        for neighbour in self._neighbours(image):
            difference = neighbour - image
            total += difference
            squares.addcmul_(difference, difference)
        samples = 9 * len(self.dilations)
        deviation = squares.sub_(total.square_().div_(samples)).div_(samples - 1).clamp_(min=0).sqrt_()
        inverse = deviation.mul_(self.std_weight).add_(1e-8).reciprocal_()

        weights = image.new_empty(8 * len(self.dilations), *image.shape[-2:])
        for weight, neighbour in zip(weights, self._neighbours(image), strict=True):
            torch.mean((neighbour - image).abs_().mul_(inverse), dim=0, out=weight)
        weights.neg_()
        weights.sub_(weights.amax(dim=0)).exp_()
        return weights.div_(weights.sum(dim=0))

    def __call__(self, weights: Tensor, heatmap: Tensor) -> Tensor:
        """Refine a map `(y, x)`, or several `(p, y, x)`: the same shape, float32 at least.

        `weights` of an image of the maps' size, from `weights`.
        """
        count = 8 * len(self.dilations)
        if weights.ndim != 3 or len(weights) != count or heatmap.ndim not in (2, 3):
            raise InputError(
                f"weights and heatmap are {tuple(weights.shape)} and {tuple(heatmap.shape)}, "
                f"expected ({count}, y, x) and (y, x) or (p, y, x)"
            )
        check_size(heatmap, tuple(weights.shape[-2:]))
        refined = heatmap.to(torch.promote_types(heatmap.dtype, torch.float32), copy=True)
        for values in refined.reshape(-1, *heatmap.shape[-2:]):  # a view, written in place
            for _ in range(self.iterations):
                mean = torch.zeros_like(values)
                for weight, neighbour in zip(weights, self._neighbours(values[None]), strict=True):
                    mean.addcmul_(weight, neighbour[0])
                values.copy_(mean)
        return refined

    def _neighbours(self, values: Tensor) -> Iterator[Tensor]:
        """Yield values `(c, y, x)` shifted to each neighbour's place, `(c, y, x)` each: views of one padded copy."""
        height, width = values.shape[-2:]
        reach = max(self.dilations)
        padded = pad(values, [reach] * 4, mode="replicate")
        for dilation, (down, right) in product(self.dilations, _AROUND):
            top, left = reach + dilation * down, reach + dilation * right
            yield padded[:, top : top + height, left : left + width]
