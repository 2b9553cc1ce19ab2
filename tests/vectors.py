"""Vectors for the tests of clusters, and loops over them that a student could write."""

import math

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bunches(bunch_count: int, size: int, width: int, spread: float, seed: int = 0) -> Tensor:
    """Points around so many random directions, of random lengths, bunch by bunch."""
    centers = normal(bunch_count, 1, width, seed=seed)
    centers /= centers.norm(dim=-1, keepdim=True)
    points = centers + spread * normal(bunch_count, size, width, seed=seed + 1) / math.sqrt(width)
    return (points * normal(bunch_count, size, 1, seed=seed + 2).exp()).flatten(0, 1)


def to_unit(vector: list[float]) -> list[float]:
    length = math.hypot(*vector)
    return [entry / length for entry in vector] if length else vector


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def units_of(points: Tensor) -> list[list[float]]:
    return [to_unit(point) for point in points.double().tolist()]


def same(ours: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)
