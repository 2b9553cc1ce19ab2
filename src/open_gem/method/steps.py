"""Steps: functions on patch features after the attention, once the windows of an image are merged.

A step is a frozen dataclass with settings of its own; a `Method` holds a tuple of them. To add one: a class here, and a
row of `STEPS`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.checks import did_you_mean, is_count, is_positive, require
from open_gem.errors import MethodError
from open_gem.files import to_json
from open_gem.method.calibration import STRIP, correlate
from open_gem.method.tower import Guide
from open_gem.numerics import without_autocast
from open_gem.tensors import at_least_float32
from open_gem.types import Grid

VALUES = "values"
"""What a step taps to read the values of the host's last block, all heads side by side."""

DENSE = 4096
"""Patches up to which `lposs` keeps its graph as a dense matrix, which is faster: 64 MiB in float32."""


@dataclass(frozen=True, eq=False)
class StepContext:
    """What a step may read in addition to the features of one image.

    grid    of the patches, row by row
    taps    what `Step.taps` names, `(r·k, d)` each; resized (bilinear) to this grid if it lies on another
    """

    grid: Grid
    taps: Mapping[Hashable, Float[Tensor, "n d"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step(ABC):
    """A function on patch features of one image: `(r·k, e)` → features of the same shape."""

    @abstractmethod
    def __call__(self, features: Float[Tensor, "n e"], context: StepContext) -> Float[Tensor, "n e"]:
        """Return the features after this step, `(r·k, e)`."""

    def taps(self, layers: int) -> Collection[Hashable]:
        """Return what this step reads, of a host with `layers` blocks: numbers of blocks from 1 for the host's tokens
        after them, `VALUES`, or a guide for the values of its last block."""
        return ()

    def guided(self, find: Callable[[str], Guide]) -> "Step":
        """Return the step with a guide in place of its name, if it has that; `find` loads it."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return the step's name and settings, as values that JSON can hold."""
        return {"step": type(self).__name__, **settings_of(self)}


def settings_of(owner: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as values that JSON can hold: a NumPy number as Python's, other objects as their
    `repr`."""
    return {setting.name: _json_value(getattr(owner, setting.name)) for setting in fields(owner)}


def _json_value(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    try:
        return json.loads(to_json(value))
    except TypeError:
        return repr(value)


@dataclass(frozen=True)
class Scga(Step):
    """Self-correlating global aggregation of RADSeg: see `scga`.

    scale  what similarities are multiplied by before the softmax, above 0; 10 as published
    """

    scale: float = 10.0

    def __post_init__(self) -> None:
        require(self, "scale", is_positive, "a number above 0")

    def __call__(self, features: Float[Tensor, "n e"], context: StepContext) -> Float[Tensor, "n e"]:
        return scga(features, self.scale)


@dataclass(frozen=True)
class Lposs(Step):
    """Label propagation of LPOSS: see `lposs`. It works on features, which all prompts then share.

    Propagation is linear, so the best label of a patch is the one that propagated logits give; cosines are on another
    scale, for the propagated features are compared by their direction. One graph spans the merged windows of an image.
    Affinities are cosines of the values of the last block, of a guide such as the DINO that LPOSS takes, or else of the
    host itself.

    guide       or the name of an expert, which a `Localizer` loads; None: the host's own values
    neighbors   of each patch in the graph, 1 or more
    gamma       power of the cosines, above 0
    sigma       fall of affinities by pixel of distance, for patches of 16 pixels, 0 or more
    alpha       share of the neighbours' labels, in (0, 1)
    iterations  most steps of conjugate gradients, 1 or more
    """

    guide: Guide | str | None = None
    neighbors: int = 400
    gamma: float = 3.0
    sigma: float = 0.01
    alpha: float = 0.95
    iterations: int = 10

    def __post_init__(self) -> None:
        for count in ("neighbors", "iterations"):
            require(self, count, lambda number: is_count(number, 1), "a whole number, 1 or more")
        require(self, "gamma", is_positive, "a number above 0")
        require(self, "sigma", lambda sigma: sigma == 0 or is_positive(sigma), "a number, 0 or more")
        require(self, "alpha", lambda alpha: is_positive(alpha) and alpha < 1, "a number above 0 and below 1")

    def taps(self, layers: int) -> Collection[Hashable]:
        if isinstance(self.guide, str):
            raise MethodError(f"guide is the name {self.guide!r}, which only a Localizer loads: pass the method to it")
        return (VALUES if self.guide is None else self.guide,)

    def guided(self, find: Callable[[str], Guide]) -> Step:
        return replace(self, guide=find(self.guide)) if isinstance(self.guide, str) else self

    def __call__(self, features: Float[Tensor, "n e"], context: StepContext) -> Float[Tensor, "n e"]:
        guide = context.taps[VALUES if self.guide is None else self.guide]
        windows = torch.tensor([tuple(context.grid)], dtype=torch.int64, device=features.device)
        locations = torch.zeros(1, 4, dtype=torch.float32, device=features.device)
        propagated = lposs(
            normalize(at_least_float32(guide), dim=-1),
            windows,
            locations,
            normalize(at_least_float32(features), dim=-1),
            k=self.neighbors,
            gamma=self.gamma,
            sigma=self.sigma,
            alpha=self.alpha,
            iterations=self.iterations,
        )
        return propagated.to(features.dtype)


STEPS: Mapping[str, Callable[[], Step]] = {"scga": Scga, "lposs": Lposs}
"""Names of steps → functions that make them with their usual settings."""


def find_step(name: str) -> Step:
    """Return the step called `name`, with its usual settings; "lposs:EXPERT" has that expert for its guide.

    Raises MethodError that lists the known ones, or says that a step takes no expert.
    """
    kind, colon, expert = name.partition(":")
    if kind not in STEPS:
        raise MethodError(f"unknown step {name!r}{did_you_mean(kind, STEPS)}; known: {', '.join(STEPS)}")
    step = STEPS[kind]()
    if not colon:
        return step
    if "guide" not in {setting.name for setting in fields(step)} or not expert:
        raise MethodError(f'{name!r} names no step with an expert, expected for example "lposs:facebook/dino-vitb16"')
    return replace(step, guide=expert)  # pyright: ignore[reportCallIssue]


def scga(features: Float[Tensor, "n e"], scale: float = 10.0) -> Float[Tensor, "n e"]:
    """Return softmax(scale · (S − mean S), pairs below the mean left out) F, with S the cosines of F `(n, e)`.

    RADSeg's step on a stitched feature map. Memory grows with n, not n². The
    result has the type of `features`, computed in float32 at least.
    """
    values = at_least_float32(features)
    return correlate(values, values, scale).to(features.dtype)


@without_autocast()
def lposs(
    features: Float[Tensor, "n f"],
    windows: Int[Tensor, "w 2"],
    locations: Float[Tensor, "w 4"],
    logits: Float[Tensor, "n c"],
    *,
    k: int = 400,
    gamma: float = 3.0,
    sigma: float = 0.01,
    alpha: float = 0.95,
    patch: int = 16,
    iterations: int = 10,
    tolerance: float = 1e-6,
) -> Float[Tensor, "n c"]:
    """Propagate labels over one graph of the patches of all windows: (I − α W) P = `logits`, as LPOSS does.

    W is symmetric and normalised, D^-½ (A + Aᵀ) D^-½ without its diagonal, and A holds max(0, cosine)^γ ·
    exp(−σ · distance in pixels) for the `k` patches most similar to each. Conjugate gradients from 0, every column by
    itself, end after `iterations` steps or once the residual is below `tolerance` of the logits, and so give what the
    published code gives, not the exact solution. Memory grows with n·k: similarities are made by strips.

    features   unit vectors of all patches, window after window, row by row
    windows    rows and columns of each window, in patches
    locations  top, bottom, left and right of each window in pixels
    logits     similarities with each class, or any other columns
    patch      side of a patch in pixels
    """
    places = []
    for (rows, cols), (top, _, left, _) in zip(windows.tolist(), locations.tolist(), strict=True):
        y, x = (torch.arange(count, dtype=torch.float32, device=features.device) * patch for count in (rows, cols))
        places.append(torch.cartesian_prod(y + top, x + left))
    graph = _graph(features, torch.cat(places), min(k, len(features)), gamma, sigma)
    degrees = graph @ features.new_ones(len(features), 1)
    scale = torch.where(degrees > 0, degrees, 1).rsqrt()
    return conjugate_gradients(
        lambda columns: columns - alpha * scale * (graph @ (scale * columns)), logits, iterations, tolerance
    )


def _graph(features: Tensor, places: Float[Tensor, "n 2"], k: int, gamma: float, sigma: float) -> Tensor:
    """Return A + Aᵀ of `lposs` without its diagonal, `(n, n)`; sparse for more than `DENSE` patches."""
    count = len(features)
    every = torch.arange(count, dtype=torch.int64, device=features.device)

    def strip(rows: Tensor) -> tuple[Tensor, Tensor]:
        cosines, nearest = (features[rows] @ features.T).topk(k, sorted=False)
        distances = (places[rows, None] - places[nearest]).norm(dim=-1)
        affinities = cosines.clamp(min=0) ** gamma * torch.exp(-sigma * distances)
        return affinities.masked_fill_(rows[:, None] == nearest, 0), nearest

    affinities, nearest = map(torch.cat, zip(*map(strip, every.split(max(1, STRIP // count))), strict=True))
    if count <= DENSE:
        graph = affinities.new_zeros(count, count).scatter_(1, nearest, affinities)
        return graph + graph.T
    indices = torch.stack([every.repeat_interleave(k), nearest.flatten()])
    values = affinities.flatten()
    return torch.sparse_coo_tensor(
        torch.cat([indices, indices.flip(0)], dim=1), values.repeat(2), (count, count), check_invariants=False
    ).coalesce()


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor], target: Float[Tensor, "n c"], iterations: int, tolerance: float
) -> Float[Tensor, "n c"]:
    """Solve by conjugate gradients from 0, each column with step sizes of its own; a column that has converged
    stays."""
    solution, residual = torch.zeros_like(target), target.clone()
    direction, energy = residual.clone(), residual.square().sum(dim=0)
    enough = tolerance**2 * energy
    for _ in range(iterations):
        moving = energy > enough
        if not moving.any():
            break
        image = operator(direction)
        size = torch.where(moving, energy / (direction * image).sum(dim=0), 0)
        solution += size * direction
        residual -= size * image
        before, energy = energy, residual.square().sum(dim=0)
        direction = residual + torch.where(moving, energy / before, 0) * direction
    return solution
