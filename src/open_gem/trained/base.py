"""The interface of models that were trained to localize."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from open_gem.numerics import check_finite, cpu_by_default
from open_gem.readout import Boxes
from open_gem.tensors import at_least_float32
from open_gem.text import FrozenModel
from open_gem.towers.hf_text import HfText
from open_gem.types import Size


class Grounding(NamedTuple):
    """A model's answer about one image.

    similarity  `(p, r, k)` float32, as in `Localization`
    scores      `(p,)`, says *whether* each prompt is in the image
    boxes       boxes that it predicts itself, one `Boxes` a prompt, or None
    """

    similarity: Float[Tensor, "p r k"]
    scores: Float[Tensor, " p"]
    boxes: tuple[Boxes, ...] | None = None


@dataclass(eq=False, repr=False)
class TrainedModel(FrozenModel, ABC):
    """A frozen model that was trained to localize.

    processor           the library's image processor
    template            of the class: what its authors put prompts into
    predicts_boxes      of the class: `Grounding.boxes` are there, and objects are these
    text_reader         of the class: what encodes texts
    averages_templates  of the class: whether a prompt may be encoded as the mean over several templates
    """

    processor: Any

    template: ClassVar[str] = "a photo of a {}."
    predicts_boxes: ClassVar[bool] = False
    text_reader: ClassVar[type[HfText]] = HfText
    averages_templates: ClassVar[bool] = True

    @property
    @abstractmethod
    def size_rule(self) -> str:
        """How images are resized for the model, for people."""

    @property
    def logit_scale(self) -> float | None:
        """The factor of similarities before a softmax over prompts; None if they are probabilities."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in; single numbers, such as the logit scale, stay float32."""
        return next(weight.dtype for weight in self.model.parameters() if weight.ndim > 1)

    def prepare(self, image: Image.Image) -> Float[Tensor, "3 y x"]:
        """Prepare an RGB image with the image processor: `(3, y, x)` float32 on the CPU.

        Raises ImageError for one that is too small or too large.
        """
        return self._pixels(image)

    def patches(self, size: Size) -> int:
        """Return the cost of encoding an image of `size`: patches, or 1 if all sizes cost the same. Raises
        ImageError."""
        return 1

    @torch.no_grad()
    @cpu_by_default()
    def ground(self, pixels: Float[Tensor, "3 y x"], size: Size, text: Float[Tensor, "p e"]) -> Grounding:
        """Locate the prompts that `text` `(p, e)` encodes, in prepared `pixels` of an image of `size`.

        Raises NotFiniteError if the model gives no numbers.
        """
        grounding = self._ground(pixels[None].to(self.device, self.dtype), size, text)
        check_finite("maps", self, grounding.similarity, grounding.scores)
        return grounding._replace(
            similarity=at_least_float32(grounding.similarity), scores=at_least_float32(grounding.scores)
        )

    @abstractmethod
    def _ground(self, pixels: Tensor, size: Size, text: Tensor) -> Grounding: ...

    @cpu_by_default()
    def _pixels(self, image: Image.Image, **settings: Any) -> Tensor:
        """Return the pixels of an image; `settings` overrule the image processor's own."""
        return self.processor(images=image, return_tensors="pt", **settings)["pixel_values"][0]
