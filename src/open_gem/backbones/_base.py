"""The one narrow interface between a pretrained vision-language model and everything open_gem does with it."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_gem.imaging import Preprocess
from open_gem.pathway import Block
from open_gem.types import Grid


@dataclass(frozen=True)
class Recommended:
    """What a checkpoint's own configuration may recommend.

    `size`: a size rule of `imaging`. `temperature_scale`: multiplies the adaptive temperature of named pathways.
    """

    size: str = "short:448"
    temperature_scale: float = 1.0


class Backbone(ABC):
    """A frozen vision-language transformer. Axes as in `types`; nothing here changes the model.

    `name` for people; `blocks` of the vision tower; `prefix` tokens before the patches; `patch` (rows, cols) in pixels;
    `preprocess` and `recommended` from the checkpoint's configuration.
    """

    name: str
    blocks: Sequence[Block]
    prefix: int
    patch: tuple[int, int]
    preprocess: Preprocess
    recommended: Recommended

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the vision tower computes in."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """What the model multiplies cosines by before a softmax over prompts (about 100 for CLIP)."""

    @property
    @abstractmethod
    def weights_version(self) -> Hashable:
        """Changes whenever the weights do (moved, cast, tuned), so that what was computed from them can be kept.

        Writes through `tensor.data` go unnoticed: make a new `Localizer` after those.
        """

    @abstractmethod
    def embed(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        """Pixels `(b, 3, y, x)`, whole patches a side → tokens `(b, n, d)` for the first block, and their grid.

        Pixels come from any device and in any float type. Raises InputError where they do not fit.
        """

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Final norm and projection of each token: `(b, n, d)` → `(b, n, e)`, not normalised."""

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """The image-level embedding as trained: `(b, n, d)` → `(b, e)`, not normalised."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings `(p, e)` of unit norm; at least one prompt."""

    @abstractmethod
    def truncated(self, prompt: str) -> str:
        """The end of `prompt` that the text tower's context has no room for; empty if it fits."""
