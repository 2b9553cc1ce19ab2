"""Methods that follow another vision model, such as a DINO: made by name, "proxyclip:facebook/dino-vitb8".

A `Guide` is that model as the host's pixels show it; `towers.dino` makes it. To add a method: a row of `GUIDED`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn.functional import interpolate, normalize, scaled_dot_product_attention

from open_gem.checks import is_positive, require
from open_gem.errors import MethodError
from open_gem.method.attention import Heads, external, resize_values
from open_gem.method.calibration import STRIP
from open_gem.method.steps import Lposs
from open_gem.method.table import METHODS, Attention, BlockContext, Method, TokenGrid, find_method
from open_gem.method.tower import Block, Guide
from open_gem.tensors import at_least_float32
from open_gem.types import Grid, Size


@dataclass(frozen=True)
class _Guided(Attention):
    """The host's values, mixed on the grid of a guide, without the tokens before the patches. A `Method` needs
    residual=False and depth=1 with it."""

    guide: Guide

    @property
    def stands_alone(self) -> bool:
        return True

    def layout(self, size: Size) -> TokenGrid:
        """Return the guide's grid for the host's pixels, of this `size`, and no token before the patches."""
        return TokenGrid(self.guide.grid_for(size), 0)

    def _grid(self, context: BlockContext) -> Grid:
        return self.guide.grid_for(Size(*context.pixels.shape[-2:]))

    def _values(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h m c"]:
        return resize_values(heads.v[:, :, context.prefix :], context.grid, self._grid(context))


def _is_share(value: object) -> bool:
    return is_positive(value) or (value == 0 and not isinstance(value, bool))


@dataclass(frozen=True)
class External(_Guided):
    """ProxyCLIP: the host's values, mixed by the affinity of a guide's tokens on the guide's grid.

    `attention.external` says how.

    gamma  γ, above 0
    beta   β, 0 or more
    """

    gamma: float = 3.0
    beta: float = 1.2

    def __post_init__(self) -> None:
        require(self, "gamma", is_positive, "a number above 0")
        require(self, "beta", _is_share, "a number, 0 or more")

    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h m c"]:
        """Return the mixed values `(b, h, r·k, c)` on the grid of `layout`."""
        tokens = context.cached(self.guide, lambda: self.guide.tokens(context.pixels))
        values = self._values(heads, context)
        return external(tokens.to(values.device), values, gamma=float(self.gamma), beta=float(self.beta))


@dataclass(frozen=True)
class Correlated(_Guided):
    """CorrCLIP, with class-agnostic masks from elsewhere (`BlockContext.regions`) and without a memory bank.

    A patch attends by softmax(scale · S) within its region, S the cosines of q + k of the guide's last block; patches
    of no region attend to all, and all to them, where S is above its mean. Regions whose mean q + k are alike count as
    the same. Mixed are the values of the last block, on the guide's grid. To these features come, each after the final
    norm, `spatial` times the same of the mean stream of earlier blocks, and `semantic` times a [CLS] token for each
    region that attended to the region's patches and the host's [CLS] in every block. Without regions the image is one.

    scale     of the cosines, above 0
    spatial   0 or more
    semantic  0 or more; without effect on hosts that have no token before the patches
    alike     regions are the same whose means have a cosine at most this below the highest, 0 or more
    """

    scale: float = 4.0
    spatial: float = 1.0
    semantic: float = 0.5
    alike: float = 0.2

    def __post_init__(self) -> None:
        require(self, "scale", is_positive, "a number above 0")
        for share in ("spatial", "semantic", "alike"):
            require(self, share, _is_share, "a number, 0 or more")

    def taps(self, layers: int) -> range:
        if layers < 2:
            raise MethodError(f"CorrCLIP reads earlier blocks, but the model has {layers}: use another method")
        return range(layers)

    def merge(self, features: Float[Tensor, "b n e"], count: int) -> Float[Tensor, "b m e"]:
        main, spatial, *semantic = features.split(count, dim=1)
        return main + self.spatial * spatial + sum(self.semantic * part for part in semantic)

    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h m c"]:
        """Return the mixed values `(b, h, r·k, c)` on the grid of `layout`."""
        values = self._values(heads, context)
        return torch.stack([self._mix(context, index, own) for index, own in enumerate(values)])

    def update(self, block: Block, heads: Heads, context: BlockContext) -> Float[Tensor, "b n d"]:
        """Return the update of the last block, of earlier blocks, and of the regions, one after another."""
        first, end = _earlier(context.layers)
        earlier = torch.stack([context.taps[number] for number in range(first, end + 1)]).mean(dim=0)
        parts = [super().update(block, heads, context), super().update(block, block.qkv(block.norm(earlier)), context)]
        if context.prefix:
            parts.append(torch.stack([self._summaries(context, index) for index in range(len(earlier))]))
        return torch.cat(parts, dim=1)

    def _regions(self, context: BlockContext, index: int, grid: Grid) -> Int[Tensor, " m"]:
        """Return the region of each patch of a grid, by its centre."""
        if context.regions is None:
            return torch.ones(grid.patches, dtype=torch.int64, device=context.pixels.device)
        numbers = context.regions[index, None, None].to(context.pixels.device, torch.float64)
        return interpolate(numbers, size=tuple(grid), mode="nearest-exact").flatten().long()

    def _mix(self, context: BlockContext, index: int, values: Float[Tensor, "h m c"]) -> Float[Tensor, "h m c"]:
        """Mix the values of one image."""

        def compute() -> Tensor:
            query, key, _ = self.guide.projections(context.pixels)
            return normalize(at_least_float32(query) + at_least_float32(key), dim=-1)

        unit = context.cached((self.guide, "q + k"), compute)[index].to(values.device)
        regions = _joined(self._regions(context, index, self._grid(context)), unit, self.alike)
        flat = at_least_float32(values).transpose(0, 1).flatten(1)
        mean = unit.mean(dim=0).square().sum()  # of all pairs: ‖mean of unit vectors‖²

        def strip(rows: Tensor) -> Tensor:
            cosines, own = unit[rows] @ unit.T, regions[rows, None]
            free = (own == 0) | (regions == 0)
            kept = torch.where(free, cosines > mean, own == regions)
            kept[torch.arange(len(rows), dtype=torch.int64, device=rows.device), rows] = True
            return (self.scale * cosines).masked_fill_(~kept, -torch.inf).softmax(dim=-1) @ flat

        rows = torch.arange(len(unit), dtype=torch.int64, device=unit.device)
        mixed = torch.cat([strip(part) for part in rows.split(max(1, STRIP // len(unit)))])
        return mixed.unflatten(-1, (len(values), -1)).transpose(0, 1).to(values.dtype)

    def _summaries(self, context: BlockContext, index: int) -> Float[Tensor, "m d"]:
        """Return for each patch of the guide's grid the [CLS] token of its region after the last block."""
        inside = self._regions(context, index, context.grid)
        numbers = inside.unique()
        member = torch.cat(
            [numbers.new_ones(len(numbers), context.prefix, dtype=torch.bool), inside == numbers[:, None]], dim=1
        )
        summaries = context.taps[0][index, :1].expand(len(numbers), 1, -1)  # as [CLS] begins
        for number, block in enumerate(context.blocks):
            host = block.qkv(block.norm(context.taps[number][index : index + 1]))
            query = block.qkv(block.norm(summaries)).q
            key, value = (part.expand(len(numbers), -1, -1, -1) for part in (host.k, host.v))
            mixed = scaled_dot_product_attention(query, key, value, attn_mask=member[:, None, None])
            summaries = summaries + block.out(mixed)
            summaries = summaries + block.mlp(summaries)
        where = interpolate(
            inside.view(1, 1, *context.grid).double(), size=tuple(self._grid(context)), mode="nearest-exact"
        )
        return summaries[torch.searchsorted(numbers, where.flatten().long()), 0]


def _earlier(layers: int) -> tuple[int, int]:
    """Return the first and last of CorrCLIP's earlier blocks, by their numbers from 1: the last 5 of 12, 12 of 24 or 28
    of 32 that come two before the end, and as many as 5 of 12 for others."""
    count = {24: 12, 32: 28}.get(layers, round(layers * 5 / 12))
    return max(1, layers - 1 - count), max(1, layers - 2)


def _joined(regions: Int[Tensor, " m"], unit: Float[Tensor, "m e"], alike: float) -> Int[Tensor, " m"]:
    """Return regions, numbered anew from 1, with those joined whose mean directions are alike."""
    numbers, own = regions.unique(return_inverse=True)
    proper = numbers[numbers != 0]
    if len(proper) < 2:
        return regions
    means = torch.stack([unit[regions == number].mean(dim=0) for number in proper])
    cosines = normalize(means, dim=-1) @ normalize(means, dim=-1).T
    close = (cosines.max() - cosines <= alike).cpu().numpy()
    _, groups = connected_components(close, directed=False)
    joined = regions.new_zeros(len(numbers))
    joined[numbers != 0] = torch.from_numpy(groups).to(joined) + 1
    return joined[own]


def proxyclip(guide: Guide, gamma: float = 3.0, beta: float = 1.2) -> Method:
    """Make ProxyCLIP: the last block's values, mixed by the guide's attention; nothing else of that block.

    Raises MethodError for impossible settings.
    """
    about = "ProxyCLIP: attention taken from another backbone"
    return Method(External(guide, gamma, beta), depth=1, residual=False, about=about)


def _lposs(guide: Guide) -> Method:
    about = "LPOSS: MaskCLIP, labels propagated over patches that another backbone finds alike"
    return METHODS["maskclip"].replace(steps=(Lposs(guide),), about=about)


def _corrclip(guide: Guide) -> Method:
    about = "CorrCLIP: attention taken from another backbone, within masks that you give"
    return Method(Correlated(guide), depth=1, residual=False, about=about)


GUIDED: Mapping[str, Callable[[Guide], Method]] = {"proxyclip": proxyclip, "lposs": _lposs, "corrclip": _corrclip}
"""Names before a colon and an expert's name (`towers.dino`) → functions that make the method."""


def check_name(name: str) -> str:
    """Return the name itself, of a row of `METHODS` or `GRADIENTS`, or of a row of `GUIDED` with an expert's. Raises
    MethodError for another."""
    guided_by(name)
    return name


def guided_by(name: str) -> tuple[str, str] | None:
    """Return the row of `GUIDED` and the expert that a name consists of; None for a row of `METHODS` or
    `GRADIENTS`. Raises MethodError for another name."""
    kind, _, expert = name.partition(":")
    if kind not in GUIDED:
        find_method(name)
        return None
    if not expert:
        raise MethodError(f'{name!r} names no expert, expected for example "{kind}:facebook/dino-vitb8"')
    return kind, expert
