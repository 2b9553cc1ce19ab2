"""Steps: what is done to patch features after the attention, once the windows of an image are merged.

A step is a frozen dataclass with settings of its own; a `Method` holds a tuple of them. To add one: a class here, and a
row of `STEPS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.checks import did_you_mean, is_positive
from open_gem.errors import MethodError
from open_gem.tensors import at_least_float32
from open_gem.types import Grid

STRIP = 1 << 22
"""Affinities that `scga` holds at a time: 16 MiB in float32, whatever the number of patches."""


@dataclass(frozen=True, eq=False)
class StepContext:
    """What a step may look at beside the features of one image.

    grid    of the patches, row by row
    taps    patch tokens of the host after each block that `Step.taps` names, `(r·k, d)`, by its number from 1
    expert  another model's patch tokens for the same image, on its own grid, if the method has one
    """

    grid: Grid
    taps: Mapping[int, Float[Tensor, "n d"]] = field(default_factory=dict)
    expert: tuple[Float[Tensor, "m f"], Grid] | None = None


@dataclass(frozen=True)
class Step(ABC):
    """Patch features of one image `(r·k, e)` → features of the same shape."""

    @abstractmethod
    def __call__(self, features: Float[Tensor, "n e"], context: StepContext) -> Float[Tensor, "n e"]:
        """The features after this step, `(r·k, e)`."""

    def taps(self, layers: int) -> range:
        """Blocks, by their numbers from 1, after which this step needs the host's tokens: `StepContext.taps`."""
        return range(0)

    def describe(self) -> dict[str, Any]:
        """The step's name and settings, as values that JSON can hold."""
        return {"step": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Scga(Step):
    """Self-correlating global aggregation of RADSeg: see `scga`.

    scale  what similarities are multiplied by before the softmax, above 0; 10 as published
    """

    scale: float = 10.0

    def __post_init__(self) -> None:
        if not is_positive(self.scale):
            raise MethodError(f"scale is {self.scale!r}, expected a number above 0")

    def __call__(self, features: Float[Tensor, "n e"], context: StepContext) -> Float[Tensor, "n e"]:
        return scga(features, self.scale)


STEPS: Mapping[str, Callable[[], Step]] = {"scga": Scga}
"""Names of steps → what makes them with their usual settings."""


def find_step(name: str) -> Step:
    """The step called `name`, with its usual settings. Raises MethodError that lists the known ones."""
    if name not in STEPS:
        raise MethodError(f"unknown step {name!r}{did_you_mean(name, STEPS)}; known: {', '.join(STEPS)}")
    return STEPS[name]()


def scga(features: Float[Tensor, "n e"], scale: float = 10.0) -> Float[Tensor, "n e"]:
    """F ← softmax(scale · (S − mean S), pairs below the mean left out) F, with S the cosines of F `(n, e)`.

    RADSeg's step on a stitched feature map. Memory grows with n, not n²: strips of at most `STRIP` affinities. The
    result has the type of `features`, computed in float32 at least.
    """
    values = at_least_float32(features)
    unit = normalize(values, dim=-1)
    mean = unit.mean(dim=0).square().sum()  # of all pairs: ‖mean F̂‖²
    rows = max(1, STRIP // len(unit))

    def strip(queries: Tensor) -> Tensor:
        excess = queries @ unit.T - mean
        return (scale * excess).masked_fill_(excess < 0, -torch.inf).softmax(dim=-1) @ values

    return torch.cat([strip(queries) for queries in unit.split(rows)]).to(features.dtype)
