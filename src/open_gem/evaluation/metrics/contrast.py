"""The paper's analysis of patch features (section 5, Figure 3): how alike patches are, and how well they separate
objects.

The formulas as the paper has them slip in places; here they are what the text around them says:

* S_pp lacks the norms: x_i · x_j is a cosine, of either sign, nothing is clamped;
* equation 8 averages "CS^M" for the C^M it defines; equation 9 mixes TS and S for the same thing;
* patches are x_i in one and p_i in the other: in both all patches, without [CLS];
* "within each layer" goes for S_pp; texts live in the joint space, so equation 9 needs projected features. The other
  two take features of any block.

The paper does not say what becomes of tiny masks, of void pixels or of a contrast 0/0: see `to_grid` and
`object_contrast`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from open_gem.errors import InputError
from open_gem.numerics import without_autocast
from open_gem.types import Grid

ROWS = 1024
"""Maximum number of rows of cosines between patches that `object_contrast` holds at a time."""


class Sides(NamedTuple):
    """Patches inside and outside of each mask, both `(p, n)` bool; void patches are in neither."""

    inside: Tensor
    outside: Tensor

    @property
    def usable(self) -> Tensor:
        """Masks that count, `(p,)` bool: at least two patches inside, and one outside."""
        return (self.inside.sum(1) >= 2) & (self.outside.sum(1) >= 1)


def to_grid(masks: Tensor, grid: Grid, void: Tensor | None = None) -> Sides:
    """Resample pixel masks `(p, y, x)` bool to the patch grid, which covers the whole image.

    A patch is inside if more than half of its area is. If more than half of it is `void` `(y, x)` bool, it is neither
    inside nor outside. Areas are exact, even if pixels straddle patches. Raises InputError if shapes differ, or types
    are not bool.
    """
    if masks.ndim != 3 or (void is not None and void.shape != masks.shape[1:]):
        shapes = f"masks {tuple(masks.shape)}" + ("" if void is None else f" and void {tuple(void.shape)}")
        raise InputError(f"{shapes} given, expected (p, y, x) and (y, x)")
    if masks.dtype != torch.bool or (void is not None and void.dtype != torch.bool):
        raise InputError("masks or void of another type than bool given, expected bool")
    inside = _mostly(masks, grid)
    if void is None:
        return Sides(inside, ~inside)
    counted = ~_mostly(void[None], grid)
    return Sides(inside & counted, ~inside & counted)


def _mostly(masks: Tensor, grid: Grid) -> Tensor:
    height, width = masks.shape[1:]
    area = _shares(height, grid.rows) @ masks.cpu().double() @ _shares(width, grid.cols).T  # whole numbers, exact
    return (2 * area > height * width).flatten(1).to(masks.device)


def _shares(pixels: int, cells: int) -> Tensor:
    """Return how much of each pixel is in each cell, `(cells, pixels)`, if a pixel is `cells` and a cell `pixels`
    long."""
    pixel, cell = (torch.arange(count, dtype=torch.int64, device="cpu") for count in (pixels, cells))
    pixel, cell = pixel * cells, cell[:, None] * pixels
    shared = torch.minimum(pixel + cells, cell + pixels) - torch.maximum(pixel, cell)
    return shared.clamp(min=0).double()


def patch_similarity(patches: Tensor) -> Tensor:
    """Return S_pp, the mean cosine of two different patches: `(..., n, e)` → `(...)` float64, in [-1, 1].

    In closed form, (‖Σ x̂‖² − Σ ‖x̂‖²) / n(n−1), without the n × n cosines. Raises InputError for fewer than two
    patches.
    """
    if patches.ndim < 2 or patches.shape[-2] < 2:
        raise InputError(f"patches of shape {tuple(patches.shape)} given, expected (..., n, e) with n of 2 or more")
    points = unit(patches.double(), dim=-1)
    n = points.shape[-2]
    return (points.sum(dim=-2).square().sum(-1) - points.square().sum((-2, -1))) / (n * (n - 1))


@without_autocast()
def object_contrast(patches: Tensor, sides: Sides) -> Tensor:
    """Return C^M of each mask (eqs. 7–8): `(n, e)` → `(p,)` float64, in [-1, 1].

    C = (S_in,in − S_in,out) / (S_in,in + S_in,out) from the mean cosine, negative ones as 0, of two different patches
    inside and of one inside with one outside; 0 where both are 0. NaN for a mask that is not `usable`. MC is the mean
    over masks. Cosines are in float32 at least, their sums in float64. Raises InputError where the
    numbers of patches differ.
    """
    inside, outside = _checked(patches, sides)
    points = unit(patches.to(torch.promote_types(patches.dtype, torch.float32)), dim=-1)
    columns = torch.cat([inside, outside]).double().T
    sums = torch.zeros(2 * len(inside), dtype=torch.float64, device=patches.device)
    for rows in inside.any(dim=0).nonzero()[:, 0].split(ROWS):
        cosines = (points[rows] @ points.T).clamp(min=0)
        cosines[torch.arange(len(rows), dtype=torch.int64, device=rows.device), rows] = 0
        sums += ((cosines.double() @ columns) * inside[:, rows].T.double().repeat(1, 2)).sum(dim=0)
    m, others = inside.sum(1), outside.sum(1)
    within, across = sums.chunk(2)
    return _contrast(within / (m * (m - 1)), across / (m * others), sides)


def text_contrast(patches: Tensor, text: Tensor, sides: Sides) -> Tensor:
    """Return TC^M of each mask (eq. 9): `(n, e)`, the text of each mask's class `(p, e)` → `(p,)` float64, in [-1, 1].

    The mean cosines, negative ones as 0, are those of the text with patches inside and with patches outside; otherwise
    as `object_contrast`, on the same masks. MTC is the mean over masks; below 0, the background is more like the text
    than the object is.
    """
    inside, outside = _checked(patches, sides)
    if text.shape != (len(inside), patches.shape[-1]):
        expected = (len(inside), patches.shape[-1])
        raise InputError(f"texts of shape {tuple(text.shape)} given, expected one for each mask, {expected}")
    cosines = (unit(text.double(), dim=-1) @ unit(patches.double(), dim=-1).T).clamp(min=0)
    within, across = ((cosines * side).sum(1) / side.sum(1) for side in (inside, outside))
    return _contrast(within, across, sides)


def _contrast(within: Tensor, across: Tensor, sides: Sides) -> Tensor:
    total = within + across
    return torch.where(total == 0, 0.0, (within - across) / total).masked_fill(~sides.usable, torch.nan)


def _checked(patches: Tensor, sides: Sides) -> Sides:
    if patches.ndim != 2 or sides.inside.shape[1:] != patches.shape[:1] or sides.outside.shape != sides.inside.shape:
        shapes = f"patches {tuple(patches.shape)} and masks {tuple(sides.inside.shape)}, {tuple(sides.outside.shape)}"
        raise InputError(f"{shapes} given, expected (n, e) and twice (p, n)")
    return Sides(sides.inside.to(patches.device), sides.outside.to(patches.device))
