"""Clusters of tokens by direction, and self-self attention seen as a way to make them (paper section 4.2, A.1, A.2).

Points are `(..., n, c)`: n vectors of width c; leading axes such as images and heads are batches whose elements do not
know of each other. Only directions count, lengths do not: the similarity of two points is their cosine. scipy wakes in
the functions that need it, for k-means does not.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.errors import InputError
from open_gem.numerics import without_autocast

TINY = 1e-12  # length below which a sum of unit vectors has no direction
LARGEST = 4096  # simulated vectors, and their width

# k-means --------------------------------------------------------------------------------------------------------------


class Clusters(NamedTuple):
    """Points in k clusters.

    labels      `(..., n)` int64, the cluster of each point, 0 to k − 1; no cluster is empty
    directions  `(..., k, c)` normalised sum of each cluster's unit-norm points: unit norm, or 0 where all points are 0
    objective   `(...)` Σ over points of the cosine with their own direction; k-means makes it large
    """

    labels: Tensor
    directions: Tensor
    objective: Tensor


@without_autocast()
def spherical_kmeans(points: Tensor, clusters: int, *, seed: int = 0, iterations: int = 20) -> Clusters:
    """k-means by cosine of points `(..., n, c)`, from k-means++ seeds, until no label changes or `iterations` are over.

    The random numbers are the same for every element of the batch, so an image has the same clusters in any batch; the
    global random state is left alone. A cluster that loses all its points takes the one least similar to its own
    direction. Computes, and answers, in float32 at least, on the device of the points. Raises InputError for more
    clusters than points, none, or no iteration.
    """
    if points.ndim < 2:
        raise InputError(f"points have shape {tuple(points.shape)}, expected (..., points, width)")
    count = points.shape[-2]
    if not (isinstance(clusters, int) and 1 <= clusters <= count):
        raise InputError(f"clusters is {clusters!r}, expected a whole number from 1 to {count}, the number of points")
    if not (isinstance(iterations, int) and iterations >= 1):
        raise InputError(f"iterations is {iterations!r}, expected a whole number, 1 or more")
    draws = torch.empty(clusters, count, dtype=torch.float64, device="cpu").exponential_(generator=_generator(seed))
    units = _unit(points)
    batch = units.flatten(0, -3) if units.ndim > 2 else units[None]
    found = _lloyd(batch, _seeds(batch, draws.to(batch)), iterations)
    return Clusters(*(part.reshape(points.shape[:-2] + part.shape[1:]) for part in found))


@without_autocast()
def means(values: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """The mean μ of each cluster's values as they are (eq. 10): `(..., n, c)`, labels `(..., n)` → `(..., k, c)`.

    Values need not be what was clustered. A label without values has mean 0. Summed in float32 at least and given back
    in the type of the values.
    """
    members = _members(labels, clusters).to(_wide(values.dtype))
    return (members @ values.to(members.dtype) / members.sum(dim=-1, keepdim=True).clamp(min=1)).to(values.dtype)


def _seeds(units: Tensor, draws: Tensor) -> Tensor:
    """k-means++: directions `(b, k, c)` of points drawn in turn.

    The chance of each is in proportion to 1 − cosine with the nearest drawn before, half its squared distance. `draws`
    `(k, n)` are exponentially distributed: of weights w, argmax(w / draw) is i with chance wᵢ / Σw.
    """
    lengths = units.norm(dim=-1)  # 1, or 0 for a vector of zeros, which is no direction to start from
    nearest = torch.full_like(lengths, -1)
    directions = []
    for draw in draws:
        chosen = ((1 - nearest).clamp(min=0) * lengths / draw).argmax(dim=-1)
        directions.append(units.gather(1, chosen[:, None, None].expand(-1, 1, units.shape[-1])))
        nearest = torch.maximum(nearest, (units @ directions[-1].transpose(1, 2)).squeeze(-1))
    return torch.cat(directions, dim=1)


def _lloyd(units: Tensor, directions: Tensor, iterations: int) -> Clusters:
    """Assign and average in turn: unit-norm points `(b, n, c)` from directions `(b, k, c)`."""
    labels = torch.empty(0, dtype=torch.int64, device=units.device)
    for _ in range(iterations):
        nearest = _assign(units, directions)
        if torch.equal(nearest, labels):
            break
        labels, directions = nearest, _directions(units, nearest, directions)
    own = directions.gather(1, labels[..., None].expand_as(units))
    return Clusters(labels, directions, (units * own).sum(dim=(1, 2)))


def _assign(units: Tensor, directions: Tensor) -> Tensor:
    """The most similar direction of each point, the first among equals, as labels `(b, n)` with no cluster empty."""
    cosines, labels = (directions @ units.transpose(1, 2)).max(dim=1)
    members = _members(labels, directions.shape[1])
    empty = ~members.any(dim=-1)
    return _fill(units, cosines, labels, members, empty) if empty.any() else labels


def _fill(units: Tensor, cosines: Tensor, labels: Tensor, members: Tensor, empty: Tensor) -> Tensor:
    """Labels with one point moved to each empty cluster: those least similar to their own direction go first.

    The most similar point of every cluster stays, so that none is emptied to fill another. What an element of the batch
    that has no empty cluster gets is its own labels.
    """
    clusters = members.shape[1]
    best = torch.where(members, cosines[:, None], -torch.inf).argmax(dim=-1)
    stays = torch.zeros_like(cosines).scatter_add(1, best, (~empty).to(cosines.dtype)) > 0
    loss = ((1 - cosines) * units.norm(dim=-1)).masked_fill(stays, -torch.inf)  # a vector of zeros is of no use
    movers = loss.argsort(dim=-1, descending=True, stable=True)[:, :clusters]
    vacant = empty.int().argsort(dim=-1, descending=True, stable=True)
    moves = torch.arange(clusters, dtype=torch.int64, device=labels.device) < empty.sum(dim=-1, keepdim=True)
    return labels.scatter(1, movers, torch.where(moves, vacant, labels.gather(1, movers)))


def _directions(units: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """The normalised sum of each cluster's points; what it was `before` where they cancel out."""
    sums = _members(labels, before.shape[1]).to(units.dtype) @ units
    lengths = sums.norm(dim=-1, keepdim=True)
    return torch.where(lengths > TINY, sums / lengths.clamp(min=TINY), before)


def _members(labels: Tensor, clusters: int) -> Tensor:
    """Who is in which cluster: labels `(..., n)` → `(..., k, n)` bool."""
    return labels[..., None, :] == torch.arange(clusters, dtype=torch.int64, device=labels.device)[:, None]


# Self-self attention as clustering ------------------------------------------------------------------------------------


class SelfSelf(NamedTuple):
    """Where self-self attention takes vectors: `moved` `(n, c)` p^K of eq. 3, unit norm; `attention` `(n, n)`
    softmax(p^K p^Kᵀ / τ) of eq. 4, rows add up to 1."""

    moved: Tensor
    attention: Tensor


@without_autocast()
def self_self_clustering(points: Tensor, iterations: int, temperature: float) -> SelfSelf:
    """K steps of normalised self-self attention (eq. 3) at temperature τ (eq. 5) of points `(n, c)`.

    More iterations and a higher temperature make fewer, larger clusters. Computes in float32 at least. Raises
    InputError for points that are no matrix of finite numbers, a negative number of iterations, or a temperature that
    is not above 0.
    """
    _check_vectors(points)
    if not (isinstance(iterations, int) and iterations >= 0):
        raise InputError(f"iterations is {iterations!r}, expected a whole number, 0 or more")
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise InputError(f"temperature is {temperature!r}, expected a number above 0")
    moved = _unit(points)
    for _ in range(iterations):
        moved = normalize(_attention(moved, temperature) @ moved, dim=-1)
    return SelfSelf(moved, _attention(moved, temperature))


def _attention(units: Tensor, temperature: float) -> Tensor:
    return (units @ units.T / temperature).softmax(dim=-1)


def random_vectors(count: int = 20, width: int = 16, seed: int = 0) -> Tensor:
    """The vectors of the paper's simulation (section 4.2): x ~ N(0, I) through a random linear map, at unit norm.

    `(count, width)`, in float64 so that what becomes of them does not hang on a machine's rounding. The entries of the
    map are ~ N(0, 1 / width). Raises InputError for sizes that are not 1 to 4096, or an impossible seed.
    """
    for name, size in (("count", count), ("width", width)):
        if not (isinstance(size, int) and 1 <= size <= LARGEST):
            raise InputError(f"{name} of vectors is {size!r}, expected a whole number from 1 to {LARGEST}")
    generator = _generator(seed)
    x = torch.randn(count, width, dtype=torch.float64, device="cpu", generator=generator)
    projection = torch.randn(width, width, dtype=torch.float64, device="cpu", generator=generator) * width**-0.5
    return normalize(x @ projection, dim=-1)


@without_autocast()
def components(vectors: Tensor, similarity: float = 0.95) -> Tensor:
    """Clusters as what hangs together: labels `(n,)` int64 of vectors `(n, c)`, numbered from 0 as they come.

    Two vectors are in one cluster where steps of a cosine above `similarity` lead from one to the other. Raises
    InputError for vectors that are no matrix of finite numbers.
    """
    from scipy.sparse.csgraph import connected_components

    _check_vectors(vectors)
    units = _unit(vectors)
    _, labels = connected_components((units @ units.T > similarity).cpu().numpy(), directed=False)
    return torch.from_numpy(labels).long()


@without_autocast()
def block_order(vectors: Tensor) -> Tensor:
    """An order `(n,)` int64 of vectors `(n, c)` in which similar ones are neighbours, for a block-diagonal matrix.

    The leaves of single linkage by cosine, so each cluster of `components` is one stretch of it. Raises InputError for
    vectors that are no matrix of finite numbers.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    _check_vectors(vectors)
    if len(vectors) == 1:
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    units = _unit(vectors).double()
    distances = (1 - units @ units.T).clamp(min=0).cpu().numpy()
    leaves = leaves_list(linkage(squareform(distances, checks=False), "single", optimal_ordering=True))
    return torch.from_numpy(leaves).long()


# Checks and numbers ---------------------------------------------------------------------------------------------------


def _check_vectors(vectors: Tensor) -> None:
    if vectors.ndim != 2 or not vectors.numel():
        raise InputError(f"vectors have shape {tuple(vectors.shape)}, expected (vectors, width), 1 or more of each")
    if not vectors.isfinite().all():
        raise InputError("vectors have entries that are infinite or not a number, expected finite ones")


def _generator(seed: int) -> torch.Generator:
    if not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise InputError(f"seed is {seed!r}, expected a whole number from 0 to 2^63 - 1")
    return torch.Generator("cpu").manual_seed(seed)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _unit(points: Tensor) -> Tensor:
    return normalize(points.to(_wide(points.dtype)), dim=-1)
