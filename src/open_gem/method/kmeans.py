"""Spherical k-means: clusters of points by direction.

Points are `(..., n, c)`: n vectors of width c; leading axes such as images and heads are batches whose elements are
clustered separately. The similarity of two points is their cosine; their lengths do not matter.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.errors import InputError
from open_gem.numerics import without_autocast
from open_gem.tensors import at_least_float32

TINY = 1e-12  # length below which a sum of unit vectors has no direction


class Clusters(NamedTuple):
    """Points in k clusters.

    labels      `(..., n)` int64, the cluster of each point, 0 to k − 1; no cluster is empty
    directions  `(..., k, c)` normalised sum of each cluster's unit-norm points: unit norm, or 0 if all points are 0
    objective   `(...)` Σ over points of the cosine with their own direction, which k-means maximises
    """

    labels: Tensor
    directions: Tensor
    objective: Tensor


@without_autocast()
def spherical_kmeans(points: Tensor, clusters: int, *, seed: int = 0, iterations: int = 20) -> Clusters:
    """Cluster points `(..., n, c)` by cosine, from k-means++ seeds, until no label changes or after `iterations`.

    The random numbers are the same for every element of the batch, so an image has the same clusters in any batch; the
    global random state does not change. A cluster that loses all its points takes the one least similar to its own
    direction. Computes in float32 at least, on the device of the points. Raises InputError for more clusters than
    points, for no cluster, or for no iteration.
    """
    if points.ndim < 2:
        raise InputError(f"points have shape {tuple(points.shape)}, expected (..., points, width)")
    count = points.shape[-2]
    if not (isinstance(clusters, int) and 1 <= clusters <= count):
        raise InputError(f"clusters is {clusters!r}, expected a whole number from 1 to {count}, the number of points")
    if not (isinstance(iterations, int) and iterations >= 1):
        raise InputError(f"iterations is {iterations!r}, expected a whole number, 1 or more")
    draws = torch.empty(clusters, count, dtype=torch.float64, device="cpu").exponential_(generator=generator(seed))
    units = to_unit(points)
    batch = units.flatten(0, -3) if units.ndim > 2 else units[None]
    clustered = lloyd(batch, draw_seeds(batch, draws.to(batch)), iterations)
    return Clusters(*(part.reshape(points.shape[:-2] + part.shape[1:]) for part in clustered))


@without_autocast()
def means(values: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Return the mean μ of each cluster's values as they are (eq. 10): `(..., n, c)`, labels `(..., n)` → `(..., k,
    c)`.

    Values need not be the clustered points. A label without values has mean 0. Sums are in float32 at least; the result
    has the type of the values.
    """
    sums = at_least_float32(values)
    members = _members(labels, clusters).to(sums.dtype)
    return (members @ sums / members.sum(dim=-1, keepdim=True).clamp(min=1)).to(values.dtype)


def draw_seeds(units: Tensor, draws: Tensor) -> Tensor:
    """Draw k-means++ seeds: directions `(b, k, c)` of points drawn in turn.

    Probabilities are proportional to 1 − cosine with the nearest seed so far, which is half the squared distance.
    `draws` `(k, n)` are exponentially distributed: for weights w, argmax(w / draw) is i with probability wᵢ / Σw.
    """
    lengths = units.norm(dim=-1)  # 1, or 0 for a vector of zeros, which is no direction to start from
    nearest = torch.full_like(lengths, -1)
    directions = []
    for draw in draws:
        chosen = ((1 - nearest).clamp(min=0) * lengths / draw).argmax(dim=-1)
        directions.append(units.gather(1, chosen[:, None, None].expand(-1, 1, units.shape[-1])))
        nearest = torch.maximum(nearest, (units @ directions[-1].transpose(1, 2)).squeeze(-1))
    return torch.cat(directions, dim=1)


def lloyd(units: Tensor, directions: Tensor, iterations: int) -> Clusters:
    """Run Lloyd's algorithm: assign and average in turn, unit-norm points `(b, n, c)` from directions `(b, k, c)`."""
    labels = torch.empty(0, dtype=torch.int64, device=units.device)
    for _ in range(iterations):
        nearest = assign(units, directions)
        if torch.equal(nearest, labels):
            break
        labels, directions = nearest, _directions(units, nearest, directions)
    own = directions.gather(1, labels[..., None].expand_as(units))
    return Clusters(labels, directions, (units * own).sum(dim=(1, 2)))


def assign(units: Tensor, directions: Tensor) -> Tensor:
    """Assign the most similar direction to each point, the first among equals: labels `(b, n)` with no cluster
    empty."""
    cosines, labels = (directions @ units.transpose(1, 2)).max(dim=1)
    members = _members(labels, directions.shape[1])
    empty = ~members.any(dim=-1)
    return _fill(units, cosines, labels, members, empty) if empty.any() else labels


def _fill(units: Tensor, cosines: Tensor, labels: Tensor, members: Tensor, empty: Tensor) -> Tensor:
    """Return labels with one point moved to each empty cluster: those least similar to their own direction go first.

    The most similar point of every cluster stays, so that none is emptied to fill another. Elements of the batch
    without an empty cluster keep their labels.
    """
    clusters = members.shape[1]
    best = torch.where(members, cosines[:, None], -torch.inf).argmax(dim=-1)
    stays = torch.zeros_like(cosines).scatter_add(1, best, (~empty).to(cosines.dtype)) > 0
    loss = ((1 - cosines) * units.norm(dim=-1)).masked_fill(stays, -torch.inf)  # a vector of zeros is no seed
    movers = loss.argsort(dim=-1, descending=True, stable=True)[:, :clusters]
    vacant = empty.int().argsort(dim=-1, descending=True, stable=True)
    moves = torch.arange(clusters, dtype=torch.int64, device=labels.device) < empty.sum(dim=-1, keepdim=True)
    return labels.scatter(1, movers, torch.where(moves, vacant, labels.gather(1, movers)))


def _directions(units: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """Return the normalised sum of each cluster's points; the direction `before` if they cancel out."""
    sums = _members(labels, before.shape[1]).to(units.dtype) @ units
    lengths = sums.norm(dim=-1, keepdim=True)
    return torch.where(lengths > TINY, sums / lengths.clamp(min=TINY), before)


def _members(labels: Tensor, clusters: int) -> Tensor:
    """Return the members of each cluster: labels `(..., n)` → `(..., k, n)` bool."""
    return labels[..., None, :] == torch.arange(clusters, dtype=torch.int64, device=labels.device)[:, None]


def generator(seed: int) -> torch.Generator:
    """Return a generator of random numbers on the CPU. Raises InputError for an impossible seed."""
    if not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise InputError(f"seed is {seed!r}, expected a whole number from 0 to 2^63 - 1")
    return torch.Generator("cpu").manual_seed(seed)


def to_unit(points: Tensor) -> Tensor:
    """Normalise points to unit norm, in float32 at least; a vector of zeros stays one."""
    return normalize(at_least_float32(points), dim=-1)
