"""Self-self attention as clustering, against loops that a student could write."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from vectors import bunches, dot, normal, same, to_unit, units_of

from open_gem.errors import InputError
from open_gem.paper.clustering import block_order, components, random_vectors, self_self_clustering

ITERATIONS, TEMPERATURES = (1, 3, 10), (0.1, 0.2, 0.3, 0.5)


def softmax_of_cosines(vectors: list[list[float]], temperature: float) -> list[list[float]]:
    rows = []
    for one in vectors:
        weights = [math.exp(dot(one, other) / temperature) for other in vectors]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


@pytest.mark.parametrize("temperature", [0.05, 0.3, 2])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_self_self_clustering_is_equation_3(iterations: int, temperature: float):
    points = normal(9, 5) * 7
    vectors = units_of(points)
    for _ in range(iterations):
        mixed = [
            [dot(row, list(column)) for column in zip(*vectors, strict=True)]
            for row in softmax_of_cosines(vectors, temperature)
        ]
        vectors = [to_unit(vector) for vector in mixed]
    ours = self_self_clustering(points, iterations, temperature)
    same(ours.moved, vectors, 1e-12)
    same(ours.attention, softmax_of_cosines(vectors, temperature), 1e-12)


def test_self_self_clustering_computes_in_full_precision():
    points = normal(9, 5).half()
    ours = self_self_clustering(points, 3, 0.2)
    assert ours.moved.dtype == ours.attention.dtype == torch.float32
    expected = self_self_clustering(points.double(), 3, 0.2)
    same(ours.moved, expected.moved.tolist(), 1e-5)
    same(ours.attention, expected.attention.tolist(), 1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_iterations_and_temperature_make_fewer_and_larger_clusters(seed: int):
    """Section 4.2 on the default grid: row by row and column by column."""
    points = random_vectors(seed=seed)
    moved = [[self_self_clustering(points, count, at).moved for at in TEMPERATURES] for count in ITERATIONS]
    counts = np.array([[len(components(vectors).unique()) for vectors in row] for row in moved])
    assert (np.diff(counts, axis=0) <= 0).all()
    assert (np.diff(counts, axis=1) <= 0).all()
    assert counts[0, 0] >= 18 and counts[-1, -1] == 1
    assert len(np.unique(counts)) >= 5


def test_random_vectors():
    vectors = random_vectors(30, 8, seed=2)
    assert vectors.shape == (30, 8) and vectors.dtype == torch.float64
    same(vectors.norm(dim=-1), [1.0] * 30)
    assert torch.equal(vectors, random_vectors(30, 8, seed=2))
    assert not torch.equal(vectors, random_vectors(30, 8, seed=3))
    state = torch.get_rng_state()
    random_vectors()
    assert torch.equal(torch.get_rng_state(), state)


def test_random_vectors_share_a_map():
    """Vectors of one map spread as W Wᵀ does: not evenly, as those without a map would."""
    spread = [torch.linalg.svdvals(random_vectors(4000, 16, seed)) for seed in range(3)]
    even = torch.linalg.svdvals(normal(4000, 16) / normal(4000, 16).norm(dim=-1, keepdim=True))
    assert even[0] / even[-1] < 1.3
    assert all(values[0] / values[-1] > 3 for values in spread)


@pytest.mark.parametrize("seed", range(5))
def test_components_equal_a_flood_fill(seed: int):
    vectors = bunches(6, 4, 3, 0.5, seed=seed)
    units = units_of(vectors)
    expected, count = [-1] * len(units), 0
    for first in range(len(units)):
        if expected[first] < 0:
            front = [first]
            while front:
                one = front.pop()
                expected[one] = count
                front += [i for i in range(len(units)) if expected[i] < 0 and dot(units[one], units[i]) > 0.95]
            count += 1
    labels = components(vectors)
    assert labels.dtype == torch.int64
    assert labels.tolist() == expected
    assert 1 < count < len(units)


@pytest.mark.parametrize("seed", range(5))
def test_every_component_is_contiguous_in_the_order(seed: int):
    vectors = bunches(6, 4, 3, 0.5, seed=seed)
    shuffled = vectors[torch.tensor(random.Random(seed).sample(range(24), 24))]
    order = block_order(shuffled)
    assert sorted(order.tolist()) == list(range(24))
    labels = components(shuffled)
    ordered = labels[order].tolist()
    changes = sum(one != other for one, other in pairwise(ordered))
    assert changes == int(labels.max())


def test_long_clusters_side_by_side_are_not_mixed():
    """Two chains of steps of 0.25 radians, 0.4 radians apart: each hangs together, though its ends are far apart."""
    longitude = torch.arange(0, 2.5, 0.25, dtype=torch.float64).repeat_interleave(2)
    latitude = torch.tensor([0, 0.4], dtype=torch.float64).repeat(10)
    vectors = torch.stack([latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], dim=-1)
    assert components(vectors).tolist() == [0, 1] * 10
    assert len(components(vectors)[block_order(vectors)].unique_consecutive()) == 2


def test_few_and_equal_vectors():
    assert components(torch.ones(1, 3)).tolist() == block_order(torch.ones(1, 3)).tolist() == [0]
    assert components(torch.ones(4, 3)).tolist() == [0] * 4
    assert sorted(block_order(torch.ones(4, 3)).tolist()) == [0, 1, 2, 3]
    assert components(torch.zeros(3, 2)).tolist() == [0, 1, 2]  # a zero vector is like nothing
    assert sorted(block_order(torch.zeros(3, 2)).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: self_self_clustering(normal(2, 3, 4), 1, 0.1), r"shape \(2, 3, 4\)"),
        (lambda: self_self_clustering(normal(0, 4), 1, 0.1), r"shape \(0, 4\)"),
        (lambda: self_self_clustering(normal(3, 4), -1, 0.1), "iterations is -1"),
        (lambda: self_self_clustering(normal(3, 4), 1, 0.0), "temperature is 0"),
        (lambda: self_self_clustering(normal(3, 4), 1, math.nan), "temperature is nan"),
        (lambda: self_self_clustering(normal(3, 4) * math.inf, 1, 1.0), "infinite"),
        (lambda: components(normal(4)), r"shape \(4,\)"),
        (lambda: block_order(normal(3, 0)), r"shape \(3, 0\)"),
        (lambda: random_vectors(0), "count of vectors is 0"),
        (lambda: random_vectors(3, 0), "width of vectors is 0"),
        (lambda: random_vectors(3, 10**9), "from 1 to 4096"),
        (lambda: random_vectors(seed=-1), "seed is -1"),
    ],
)
def test_impossible_vectors_are_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()
