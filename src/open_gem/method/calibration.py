"""Tokens averaged by similarities that are not the host's attention: what SC-CLIP and RADSeg are made of.

Nothing here stores an n×n matrix: similarities are made a strip of rows at a time.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import conv2d, normalize

from open_gem.types import Grid

STRIP = 1 << 22
"""Similarities held at a time: 16 MiB in float32, whatever the number of patches."""

TIE = 1e-4
"""Relative difference below which two outlier factors are equal: two tokens farthest from each other have the same."""


def by_strips(compute: Callable[[Tensor], Tensor], rows: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
    """Return `compute(rows)`, computed a few rows at a time, so that n values for each row fit into `STRIP`."""
    return torch.cat([compute(strip) for strip in rows.split(max(1, STRIP // len(rows)))])


def outliers(tokens: Float[Tensor, "n d"], neighbors: int = 30, share: float = 0.05) -> Bool[Tensor, " n"]:
    """Return the `share` of tokens with the largest local outlier factor, on squared distances to `neighbors` others.

    A token is an outlier if its surroundings are much less dense than those of its neighbours. Equal tokens have
    factor 1. Fewer tokens than `neighbors` are all neighbours of each other.
    """
    count = min(neighbors, len(tokens) - 1)
    if count < 1:
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    pairs = [
        torch.cdist(strip, tokens, compute_mode="donot_use_mm_for_euclid_dist").square().topk(count + 1, largest=False)
        for strip in tokens.split(max(1, STRIP // len(tokens)))
    ]
    farthest = torch.cat([distances[:, -1] for distances, _ in pairs])  # the nearest token is the token itself
    nearest = torch.cat([indices[:, 1:] for _, indices in pairs])
    density = 1 / farthest.clamp(min=torch.finfo(farthest.dtype).tiny)
    factor = (density[nearest] / density[:, None]).mean(dim=1)
    return factor > factor.quantile(1 - share) * (1 + TIE)


def repair(tokens: Float[Tensor, "n d"], grid: Grid, wrong: Bool[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Return tokens with each of the `wrong` ones replaced by the mean of its good neighbours in 3×3 patches, if
    any."""
    good = (~wrong).to(tokens)
    kernel = tokens.new_ones(1, 1, 3, 3)
    values = (tokens * good[:, None]).T.unflatten(-1, tuple(grid))[:, None]
    total = conv2d(values, kernel, padding=1)[:, 0].flatten(1).T
    count = conv2d(good.view(1, 1, *grid), kernel, padding=1).flatten()
    return torch.where((wrong & (count > 0))[:, None], total / count.clamp(min=1)[:, None], tokens)


def aggregate(tokens: Float[Tensor, "n d"], guide: Float[Tensor, "n f"], least: float = 0.4) -> Float[Tensor, "n d"]:
    """Return each token's mean over all tokens, weighted by the cosines of `guide`; those below `least` have no
    weight."""
    unit = normalize(guide, dim=-1)

    def strip(queries: Tensor) -> Tensor:
        weights = queries @ unit.T
        weights = weights.masked_fill_(weights < least, 0)
        return weights @ tokens / (weights.sum(dim=-1, keepdim=True) + 1e-6)

    return by_strips(strip, unit)


def correlate(values: Float[Tensor, "n d"], guide: Float[Tensor, "n f"], scale: float) -> Float[Tensor, "n d"]:
    """Return softmax(scale · (S − mean S), pairs below the mean left out) `values`, with S the cosines of `guide`."""
    unit = normalize(guide, dim=-1)
    mean = unit.mean(dim=0).square().sum()  # of all pairs: ‖mean of unit vectors‖²

    def strip(queries: Tensor) -> Tensor:
        excess = queries @ unit.T - mean
        return (scale * excess).masked_fill_(excess < 0, -torch.inf).softmax(dim=-1) @ values

    return by_strips(strip, unit)


def attend_by_direction(
    tokens: Float[Tensor, "b h n c"], values: Float[Tensor, "b h n c"], scale: float
) -> Float[Tensor, "b h n c"]:
    """Return softmax(scale · S, negatives left out) `values`, with S the cosines of `tokens`, head by head."""
    unit = normalize(tokens, dim=-1)
    keys = unit.transpose(-2, -1)

    def strip(queries: Tensor) -> Tensor:
        cosines = queries @ keys
        return (scale * cosines).masked_fill_(cosines < 0, -torch.inf).softmax(dim=-1) @ values

    rows = max(1, STRIP // keys[..., 0, :].numel())
    return torch.cat([strip(queries) for queries in unit.split(rows, dim=-2)], dim=-2)
