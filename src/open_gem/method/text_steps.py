"""Steps on text embeddings: what an image says about the prompts, once both are encoded.

A step is a frozen dataclass with settings of its own. To add one: a class here, and a row of `TEXT_STEPS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, ward
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.checks import did_you_mean, is_positive, require
from open_gem.errors import MethodError
from open_gem.method.steps import settings_of
from open_gem.tensors import at_least_float32

TOP = 2
"""Patches that a winner of CASS moves towards."""


class TextStep(ABC):
    """Changes the embeddings of prompts and their maps by what the image shows. A frozen dataclass."""

    @abstractmethod
    def adapt(
        self, text: Float[Tensor, "q e"], patches: Float[Tensor, "n e"], cosines: Float[Tensor, " q"]
    ) -> Float[Tensor, "q e"]:
        """Return the embeddings of the prompts for patches of the image, or of one of its windows; `cosines` are those
        of the prompts with the image-level embedding."""

    @abstractmethod
    def mix(self, maps: Float[Tensor, "*w q r k"], cosines: Float[Tensor, " q"]) -> Float[Tensor, "*w q r k"]:
        """Return maps of cosines of the adapted prompts, changed by `cosines`."""

    def describe(self) -> dict[str, Any]:
        """Return the step's name and settings, as values that JSON can hold."""
        return {"text_step": type(self).__name__.lower(), **settings_of(self)}


@dataclass(frozen=True)
class Cass(TextStep):
    """The text half of CASS, which needs no other model.

    Prompts are clustered by name. In each cluster, the prompt that is most like the image as a whole moves towards the
    patches that are most like it: t ← norm((1 − α) t + α · norm(mean of its top 2)). Then maps ← (1 − w) · maps + w ·
    cosine with the image. The published code sets all three for each data set: α 0.01 to 0.05, w 0.1 to 0.4, distance
    0.02 to 0.14.

    alpha     α, in [0, 1)
    weight    w, in [0, 1)
    distance  Ward's, of cosine distances, up to which prompts are in a cluster; 0 or more
    """

    alpha: float = 0.03
    weight: float = 0.25
    distance: float = 0.1

    def __post_init__(self) -> None:
        for share in ("alpha", "weight"):
            require(self, share, lambda value: _is_share(value) and value < 1, "a number in [0, 1)")
        require(self, "distance", _is_share, "a number, 0 or more")

    def adapt(
        self, text: Float[Tensor, "q e"], patches: Float[Tensor, "n e"], cosines: Float[Tensor, " q"]
    ) -> Float[Tensor, "q e"]:
        unit, features = (at_least_float32(vectors) for vectors in (normalize(text, dim=-1), patches))
        directions, adapted = normalize(features, dim=-1), unit.clone()
        groups = self._clusters(unit)
        for group in groups.unique():
            members = (groups == group).nonzero()[:, 0].to(cosines.device)
            winner = members[cosines[members].argmax()]
            nearest = (directions @ unit[winner]).topk(min(TOP, len(features))).indices
            mean = normalize(directions[nearest].mean(dim=0), dim=0)
            adapted[winner] = normalize((1 - self.alpha) * unit[winner] + self.alpha * mean, dim=0)
        return adapted.to(text.dtype)

    def mix(self, maps: Float[Tensor, "*w q r k"], cosines: Float[Tensor, " q"]) -> Float[Tensor, "*w q r k"]:
        return (1 - self.weight) * maps + self.weight * cosines.to(maps)[:, None, None]

    def _clusters(self, unit: Float[Tensor, "q e"]) -> Int[Tensor, " q"]:
        """Return the cluster of each prompt."""
        if len(unit) < 2:
            return torch.zeros(len(unit), dtype=torch.int64, device="cpu")
        distances = (1 - unit.double() @ unit.double().T).clamp(min=0).fill_diagonal_(0).cpu().numpy()
        tree = ward(squareform(distances, checks=False))
        return torch.from_numpy(fcluster(tree, self.distance, "distance")).long()


def _is_share(value: object) -> bool:
    return is_positive(value) or (value == 0 and not isinstance(value, bool))


TEXT_STEPS: Mapping[str, Callable[[], TextStep]] = {"cass": Cass}
"""Names of steps on text → functions that make them with their usual settings."""


def find_text_step(name: str) -> TextStep:
    """Return the step called `name`, with its usual settings. Raises MethodError that lists the known ones."""
    if name not in TEXT_STEPS:
        raise MethodError(f"unknown text step {name!r}{did_you_mean(name, TEXT_STEPS)}; known: {', '.join(TEXT_STEPS)}")
    return TEXT_STEPS[name]()
