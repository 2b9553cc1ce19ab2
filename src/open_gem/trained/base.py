"""The seam between a model that was trained to localize and what open_gem makes of it."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from open_gem.numerics import Lock, check_finite, cpu_by_default
from open_gem.readout import Boxes
from open_gem.tensors import at_least_float32
from open_gem.towers.base import TEXT_BATCH, Version, check_has_numbers, fingerprint
from open_gem.towers.weights import cut_off
from open_gem.types import Size


class Grounding(NamedTuple):
    """What a model says of one picture.

    `similarity` `(p, r, k)` float32 as in `Localization`; `scores` `(p,)`, by which it judges *whether* each prompt is
    there; `boxes` that it predicts itself, one `Boxes` a prompt, or None.
    """

    similarity: Tensor
    scores: Tensor
    boxes: tuple[Boxes, ...] | None = None


@dataclass(eq=False)
class Trained(ABC):
    """A frozen model that was trained to localize; a `TextEncoder` of `prompts`.

    `name` for people; `model`, `tokenizer` and `images` (the image processor) the library's own. Of the class:
    `template`, what its authors put phrases into.
    """

    name: str
    model: Any
    tokenizer: Any
    images: Any
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)
    _version: Version = field(default_factory=Version, init=False, repr=False)

    template: ClassVar[str] = "a photo of a {}."

    def __post_init__(self) -> None:
        check_has_numbers(self.model)

    @property
    @abstractmethod
    def size_rule(self) -> str:
        """How pictures come to the size at which the model sees them, for people."""

    @property
    def logit_scale(self) -> float | None:
        """What similarities are multiplied by before a softmax over prompts; None where they are probabilities."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; single numbers, such as the logit scale, stay float32."""
        return next(weight.dtype for weight in self.model.parameters() if weight.ndim > 1)

    @property
    def weights_version(self) -> Hashable:
        """Changes whenever the weights do, as `Backbone.weights_version`."""
        return self._version(self.model.parameters())

    def fingerprint(self) -> str:
        """Twelve letters for the weights, as `Backbone.fingerprint`."""
        return fingerprint(self.model)

    @torch.no_grad()
    @cpu_by_default()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings `(p, e)` as the heads take them, of any norm; at least one prompt. Raises NotFiniteError."""
        batches = [list(prompts[start : start + TEXT_BATCH]) for start in range(0, len(prompts), TEXT_BATCH)]
        rows = torch.cat([self._encode(batch) for batch in batches])
        check_finite("text embeddings", self, rows)
        return rows

    def truncated(self, prompt: str) -> str:
        """The end of `prompt` that the text tower's context has no room for; empty if it fits."""
        with self._lock:
            return cut_off(self.tokenizer, prompt, self._context)

    @property
    def concepts(self) -> tuple[str, ...]:
        """None: the vocabulary is open."""
        return ()

    def knows(self, prompt: str) -> bool:
        """True, see `concepts`."""
        return True

    def prepare(self, picture: Image.Image) -> Tensor:
        """An RGB picture as the model wants it, made by the image processor: `(3, y, x)` float32 on the CPU.

        Raises ImageError where it cannot be seen at all.
        """
        return self._pixels(picture)

    def patches(self, size: Size) -> int:
        """What encoding a picture of `size` costs: patches, or 1 where all sizes cost the same. Raises ImageError."""
        return 1

    @torch.no_grad()
    @cpu_by_default()
    def ground(self, pixels: Tensor, size: Size, text: Tensor) -> Grounding:
        """Where the prompts are that `text` `(p, e)` encodes, in prepared `pixels` of a picture of `size`. Raises
        NotFiniteError where the model gives no numbers."""
        grounding = self._ground(pixels[None].to(self.device, self.dtype), size, text)
        check_finite("maps", self, grounding.similarity, grounding.scores)
        return grounding._replace(
            similarity=at_least_float32(grounding.similarity), scores=at_least_float32(grounding.scores)
        )

    @abstractmethod
    def _ground(self, pixels: Tensor, size: Size, text: Tensor) -> Grounding: ...

    @property
    @abstractmethod
    def _texts(self) -> Any:
        """The part of the model that encodes texts."""

    @property
    def _context(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def _encode(self, prompts: list[str]) -> Tensor:
        with self._lock:  # a tokenizer is one thread's at a time: how it cuts and pads is its state
            tokens = self.tokenizer(
                prompts, padding=True, truncation=True, max_length=self._context, return_tensors="pt"
            ).to(self.device)
        features = self._texts.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return features.pooler_output

    @cpu_by_default()
    def _pixels(self, picture: Image.Image, **settings: Any) -> Tensor:
        """`settings` overrule the image processor's own."""
        return self.images(images=picture, return_tensors="pt", **settings)["pixel_values"][0]
