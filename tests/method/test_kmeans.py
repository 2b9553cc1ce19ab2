"""K-means against loops that a student could write, and against scikit-learn."""

import math
import subprocess
import sys
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from vectors import bunches, dot, normal, same, to_unit, units_of

from open_gem.errors import InputError
from open_gem.method import kmeans
from open_gem.method.kmeans import means, spherical_kmeans

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def lloyd(units: list[list[float]], directions: list[list[float]], iterations: int) -> tuple[list[int], list, float]:
    """Assign, fill what is empty, average, until nothing changes: one list of points at a time."""
    labels: list[int] = []
    count = len(directions)
    for _ in range(iterations):
        cosines = [[dot(point, direction) for direction in directions] for point in units]
        nearest = [row.index(max(row)) for row in cosines]
        own = [max(row) for row in cosines]
        keepers = set()
        for cluster in set(nearest):
            members = [index for index, label in enumerate(nearest) if label == cluster]
            keepers.add(max(members, key=lambda index: own[index]))
        spare = sorted(set(range(len(units))) - keepers, key=lambda index: own[index])
        for cluster in sorted(set(range(count)) - set(nearest)):
            nearest[spare.pop(0)] = cluster
        if nearest == labels:
            break
        labels = nearest
        for cluster in range(count):
            members = [point for point, label in zip(units, labels, strict=True) if label == cluster]
            directions[cluster] = to_unit([sum(column) for column in zip(*members, strict=True)])
    return labels, directions, sum(dot(p, directions[label]) for p, label in zip(units, labels, strict=True))


@pytest.mark.parametrize("iterations", [1, 2, 3, 50])
@pytest.mark.parametrize("clusters", [1, 2, 5, 9])
def test_kmeans_equals_lloyds_loop(clusters: int, iterations: int):
    points = normal(3, 30, 4, seed=clusters)
    starts = [clusters, 17, 3]  # the seeds: where in each list of points
    seeds = torch.stack([points[i, start : start + clusters] for i, start in enumerate(starts)])
    found = kmeans.lloyd(kmeans.to_unit(points), kmeans.to_unit(seeds), iterations)
    for element in range(3):
        expected = lloyd(units_of(points[element]), units_of(seeds[element]), iterations)
        assert found.labels[element].tolist() == expected[0]
        same(found.directions[element], expected[1])
        same(found.objective[element], expected[2])


def test_empty_clusters_are_filled_as_in_the_loop():
    """Starts that nobody is near: in the batch some elements have several empty clusters, some one, some none."""
    points = normal(40, 12, 3, seed=5) + torch.tensor([3.0, 0, 0])
    far = kmeans.to_unit(normal(40, 5, 3, seed=6))
    empties = []
    for element in range(40):
        units, starts = units_of(points[element]), far[element].tolist()
        cosines = [[dot(point, start) for start in starts] for point in units]
        empties.append(5 - len({row.index(max(row)) for row in cosines}))
    assert {1, 2, 3} <= set(empties)
    found = kmeans.lloyd(kmeans.to_unit(points), far, 30)
    for element in range(40):
        labels, directions, objective = lloyd(units_of(points[element]), far[element].tolist(), 30)
        assert found.labels[element].tolist() == labels
        same(found.directions[element], directions)
        same(found.objective[element], objective)


def test_two_empty_clusters_take_the_two_most_distant_points():
    angles = torch.tensor([0.0, 0.1, -0.1, 0.9, 1.3], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], dim=-1)
    starts = torch.tensor([[-1.0, 0], [1, 0], [-1, 0]], dtype=torch.float64)  # all points are nearest to the second
    assert kmeans.assign(points[None], starts[None]).tolist() == [[1, 1, 1, 2, 0]]  # 1.3 is farther than 0.9


def scikit_learns(units: Tensor, clusters: int, **options: Any) -> np.ndarray:
    """Labels by Euclidean k-means on unit vectors."""
    return np.asarray(KMeans(clusters, tol=0, **options).fit_predict(units.numpy()))


def test_from_the_same_seeds_as_scikit_learn():
    """Euclidean and spherical k-means agree where means of unit vectors have about one length: in bunches."""
    moved = 0
    for seed in range(12):
        points = bunches(5, 20, 8, 0.6, seed=10 * seed)
        units = kmeans.to_unit(points[torch.from_numpy(np.random.default_rng(seed).permutation(100))])
        start = kmeans.to_unit(points[seed::20])
        ours = kmeans.lloyd(units[None], start[None], 100)
        assert ours.labels[0].tolist() == scikit_learns(units, 5, init=start.numpy(), n_init=1).tolist()
        moved += int((ours.labels[0] != (units @ start.T).argmax(dim=-1)).sum())
    assert moved > 20, "the seeds were the answer already"


@pytest.mark.parametrize("clusters", [2, 4, 7])
@pytest.mark.parametrize("kind", ["bunches", "noise"])
def test_the_best_of_several_seeds_is_as_good_as_scikit_learns(kind: str, clusters: int):
    points = bunches(6, 25, 12, 1.2) if kind == "bunches" else normal(150, 5)
    units = kmeans.to_unit(points)
    labels = scikit_learns(units, clusters, n_init=10, random_state=0)
    sums = [units.numpy()[labels == cluster].sum(axis=0) for cluster in range(clusters)]
    theirs = sum(float(np.linalg.norm(total)) for total in sums)  # Σ cos with the normalised sum is the sum's length
    ours = max(spherical_kmeans(points, clusters, seed=seed, iterations=100).objective.item() for seed in range(10))
    assert ours >= theirs * (1 - 2e-3)


def test_kmeans_finds_bunches():
    points = bunches(4, 30, 16, 0.3)
    labels = spherical_kmeans(points, 4, seed=1).labels.reshape(4, 30)
    assert (labels == labels[:, :1]).all()
    assert len(labels[:, 0].unique()) == 4


@pytest.mark.parametrize("clusters", [1, 3, 8])
def test_labels_directions_and_objective_are_consistent(clusters: int):
    points = normal(2, 3, 40, 6, seed=3)
    found = spherical_kmeans(points, clusters)
    assert found.labels.shape == (2, 3, 40) and found.labels.dtype == torch.int64
    assert found.directions.shape == (2, 3, clusters, 6)
    assert found.objective.shape == (2, 3)
    for image, head in product(range(2), range(3)):
        units, labels = units_of(points[image, head]), found.labels[image, head].tolist()
        assert set(labels) == set(range(clusters))
        total = 0.0
        for cluster in range(clusters):
            members = [unit for unit, label in zip(units, labels, strict=True) if label == cluster]
            direction = to_unit([sum(column) for column in zip(*members, strict=True)])
            same(found.directions[image, head, cluster], direction)
            total += sum(dot(member, direction) for member in members)
        same(found.objective[image, head], total)


def test_more_iterations_never_make_it_worse():
    points = normal(8, 60, 5)
    objectives = torch.stack([spherical_kmeans(points, 6, iterations=count).objective for count in range(1, 12)])
    assert (objectives.diff(dim=0) >= -1e-9).all()
    assert (objectives[-1] > objectives[0]).all()


def test_an_image_has_the_same_clusters_in_any_batch():
    points = normal(4, 3, 50, 8, dtype=torch.float32)
    together = spherical_kmeans(points, 5)
    for image, head in product(range(4), range(3)):
        alone = spherical_kmeans(points[image, head], 5)
        assert torch.equal(alone.labels, together.labels[image, head])
        torch.testing.assert_close(alone.directions, together.directions[image, head])
        torch.testing.assert_close(alone.objective, together.objective[image, head])
    assert spherical_kmeans(points[:0], 5).directions.shape == (0, 3, 5, 8)


def test_lengths_do_not_matter():
    points = normal(50, 8)
    lengths = normal(50, 1, seed=1).exp() * 1e3
    assert torch.equal(spherical_kmeans(points, 5).labels, spherical_kmeans(points * lengths, 5).labels)


def test_seeds_decide_and_global_randomness_stays():
    points = normal(60, 8)
    state = torch.get_rng_state()
    labels = [spherical_kmeans(points, 5, seed=seed).labels for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_seeding_has_the_chances_of_kmeans_plus_plus():
    angles = [0.0, 0.3, 1.2, 3.0]
    units = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])
    tries = 3000
    draws = torch.empty(tries, 3, 4).exponential_(generator=torch.Generator().manual_seed(0))
    counts = dict.fromkeys(permutations(range(4), 3), 0)
    for draw in draws:
        chosen = kmeans.draw_seeds(units[None], draw)[0]
        counts[tuple((chosen @ units.T).argmax(dim=-1).tolist())] += 1
    for (first, second, third), count in counts.items():
        apart = [1 - math.cos(angle - angles[first]) for angle in angles]
        chance = apart[second] / sum(apart) / 4
        nearest = [min(was, 1 - math.cos(angle - angles[second])) for was, angle in zip(apart, angles, strict=True)]
        chance *= nearest[third] / sum(nearest)
        assert abs(count / tries - chance) < 4 * math.sqrt(chance * (1 - chance) / tries) + 1e-3


@pytest.mark.parametrize("dtype", FLOATS)
def test_kmeans_of_any_float_type(dtype: torch.dtype):
    points = (bunches(4, 20, 16, 0.3) * 100).to(dtype)
    found = spherical_kmeans(points, 4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.directions.dtype == found.objective.dtype == wide
    same(found.directions.norm(dim=-1), [1.0] * 4, 1e-6)
    assert torch.equal(found.labels, spherical_kmeans(points.double(), 4).labels)
    mean = means(points, found.labels, 4)
    assert mean.dtype == dtype
    expected = means(points.double(), found.labels, 4)
    torch.testing.assert_close(mean.double(), expected, rtol=float(torch.finfo(dtype).eps), atol=1e-4)


HARD = {
    "one point": torch.ones(1, 3),
    "all alike": torch.ones(6, 3),
    "zeros": torch.zeros(6, 3),
    "zeros and one other": torch.cat([torch.zeros(5, 3), torch.ones(1, 3)]),
    "opposites": torch.tensor([[1.0, 0, 0], [-1, 0, 0], [1, 0, 0], [-1, 0, 0]]),
    "two of each": normal(4, 3, dtype=torch.float32).repeat(2, 1),
    "tiny": 1e-20 * normal(6, 3, dtype=torch.float32),
    "huge": 1e18 * normal(6, 3, dtype=torch.float32),
    "width 1": normal(6, 1, dtype=torch.float32),
    "nearly alike": torch.ones(6, 3) + 1e-7 * normal(6, 3, dtype=torch.float32),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HARD)
def test_degenerate_points(name: str, seed: int):
    points = HARD[name]
    for clusters in range(1, len(points) + 1):
        found = spherical_kmeans(points, clusters, seed=seed)
        assert found.labels.unique().tolist() == list(range(clusters)), f"{clusters} clusters, one of them empty"
        assert found.directions.isfinite().all() and found.objective.isfinite()
        lengths = found.directions.norm(dim=-1)
        assert (((lengths - 1).abs() < 1e-5) | (lengths <= 1e-5)).all()
        assert means(points, found.labels, clusters).isfinite().all()


def test_a_zero_vector_is_no_seed_while_there_are_others():
    points = torch.zeros(20, 4)
    points[7], points[13] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    for seed in range(20):
        draws = torch.empty(2, 20).exponential_(generator=torch.Generator().manual_seed(seed))
        chosen = kmeans.draw_seeds(points[None], draws)[0]
        assert sorted(chosen.argmax(dim=-1).tolist()) == [0, 1]
        assert spherical_kmeans(points, 2, seed=seed).objective == 2


def test_an_empty_cluster_prefers_points_to_zero_vectors():
    points = torch.tensor([[1.0, 0], [0, 0], [0.8, 0.6], [0, 0]])
    starts = torch.tensor([[1.0, 0], [-1, 0]])
    assert kmeans.assign(points[None], starts[None])[0, 2] == 1


@pytest.mark.parametrize("seed", range(4))
def test_as_many_clusters_as_points(seed: int):
    points = normal(9, 5)
    found = spherical_kmeans(points, 9, seed=seed)
    assert sorted(found.labels.tolist()) == list(range(9))
    same(found.objective, 9.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((normal(4, 2), 5), "clusters is 5, expected a whole number from 1 to 4"),
        ((normal(3, 4, 2), 0), "clusters is 0"),
        ((normal(4, 2), 1.5), r"clusters is 1\.5"),
        ((normal(4), 1), r"shape \(4,\)"),
        ((normal(0, 4), 1), "from 1 to 0"),
    ],
)
def test_impossible_clusters_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        spherical_kmeans(*arguments)


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match="iterations is 0"):
        spherical_kmeans(normal(4, 2), 2, iterations=0)
    with pytest.raises(InputError, match="seed is -1"):
        spherical_kmeans(normal(4, 2), 2, seed=-1)


def test_means_are_of_the_raw_values():
    values, labels = normal(2, 3, 10, 4), torch.from_numpy(np.random.default_rng(0).integers(0, 3, (2, 3, 10)))
    labels[labels == 1] = 2  # nobody is in 1
    ours = means(values, labels, 4)
    assert ours.shape == (2, 3, 4, 4)
    for image, head, cluster in product(range(2), range(3), range(4)):
        members = values[image, head][labels[image, head] == cluster].tolist()
        expected = [sum(column) / len(members) for column in zip(*members, strict=True)] if members else [0.0] * 4
        same(ours[image, head, cluster], expected)


def test_kmeans_does_not_import_scipy():
    code = "import sys, open_gem.method.kmeans; print('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
