"""Self-self attention as clustering (paper section 4.2, A.1, A.2): the moved vectors, and their clusters."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.errors import InputError
from open_gem.method.kmeans import generator, to_unit
from open_gem.numerics import without_autocast

LARGEST = 4096  # simulated vectors, and their width


class SelfSelf(NamedTuple):
    """The result of self-self attention on vectors.

    moved      `(n, c)` p^K of eq. 3, unit norm
    attention  `(n, n)` softmax(p^K p^Kᵀ / τ) of eq. 4; rows sum to 1
    """

    moved: Tensor
    attention: Tensor


@without_autocast()
def self_self_clustering(points: Tensor, iterations: int, temperature: float) -> SelfSelf:
    """Run K steps of normalised self-self attention (eq. 3) at temperature τ (eq. 5) on points `(n, c)`.

    More iterations and a higher temperature make fewer, larger clusters. Computes in float32 at least. Raises
    InputError for points that are no matrix of finite numbers, a negative number of iterations, or a temperature that
    is not above 0.
    """
    _check_vectors(points)
    if not (isinstance(iterations, int) and iterations >= 0):
        raise InputError(f"iterations is {iterations!r}, expected a whole number, 0 or more")
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise InputError(f"temperature is {temperature!r}, expected a number above 0")
    moved = to_unit(points)
    for _ in range(iterations):
        moved = normalize(_attention(moved, temperature) @ moved, dim=-1)
    return SelfSelf(moved, _attention(moved, temperature))


def _attention(units: Tensor, temperature: float) -> Tensor:
    return (units @ units.T / temperature).softmax(dim=-1)


def random_vectors(count: int = 20, width: int = 16, seed: int = 0) -> Tensor:
    """Return the vectors of the paper's simulation (section 4.2): x ~ N(0, I) through a random linear map, at unit
    norm.

    `(count, width)`, in float64, so that results do not depend on a machine's rounding. The entries of the map are
    ~ N(0, 1 / width). Raises InputError for sizes that are not 1 to 4096, or an impossible seed.
    """
    for name, size in (("count", count), ("width", width)):
        if not (isinstance(size, int) and 1 <= size <= LARGEST):
            raise InputError(f"{name} of vectors is {size!r}, expected a whole number from 1 to {LARGEST}")
    random = generator(seed)
    x = torch.randn(count, width, dtype=torch.float64, device="cpu", generator=random)
    projection = torch.randn(width, width, dtype=torch.float64, device="cpu", generator=random) * width**-0.5
    return normalize(x @ projection, dim=-1)


@without_autocast()
def components(vectors: Tensor, similarity: float = 0.95) -> Tensor:
    """Return clusters as connected components: labels `(n,)` int64 of vectors `(n, c)`, numbered by first appearance.

    Two vectors are connected if their cosine is above `similarity`. Raises InputError for vectors that are no matrix of
    finite numbers.
    """
    from scipy.sparse.csgraph import connected_components

    _check_vectors(vectors)
    units = to_unit(vectors)
    _, labels = connected_components((units @ units.T > similarity).cpu().numpy(), directed=False)
    return torch.from_numpy(labels).long()


@without_autocast()
def block_order(vectors: Tensor) -> Tensor:
    """Return an order `(n,)` int64 of vectors `(n, c)` in which similar ones are neighbours, for a block-diagonal
    matrix.

    The leaves of single linkage by cosine, so that each cluster of `components` is contiguous in it. Raises
    InputError for vectors that are no matrix of finite numbers.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    _check_vectors(vectors)
    if len(vectors) == 1:
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    units = to_unit(vectors).double()
    distances = (1 - units @ units.T).clamp(min=0).cpu().numpy()
    leaves = leaves_list(linkage(squareform(distances, checks=False), "single", optimal_ordering=True))
    return torch.from_numpy(leaves).long()


def _check_vectors(vectors: Tensor) -> None:
    if vectors.ndim != 2 or not vectors.numel():
        raise InputError(f"vectors have shape {tuple(vectors.shape)}, expected (vectors, width), 1 or more of each")
    if not vectors.isfinite().all():
        raise InputError("vectors have entries that are infinite or not a number, expected finite ones")
