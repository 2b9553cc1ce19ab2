"""Models that were trained to localize, behind the same door: what to compare a `Localizer` with."""

from dataclasses import dataclass, field
from os import PathLike
from typing import Any, cast, overload

import torch
from torch import Tensor

from open_gem.images.pixels import ImageLike, read_image, size_of
from open_gem.localization import Localization
from open_gem.localizer import Prompts, prepare_all, prompts_by_image
from open_gem.readout import merge_boxes
from open_gem.text import Phrases, Template, TextCache, Vocabulary, check_template
from open_gem.trained import registry as trained
from open_gem.trained.registry import Trained
from open_gem.types import Size


@dataclass(frozen=True, eq=False)
class TrainedLocalizer:
    """Phrases in, localizations out, by a model that was trained to localize: what to compare a `Localizer` with.

    model     from `backbones.trained.load_trained` or `adapt_trained`
    template  what a phrase is put into, see `prompts.fill`; by default the one that the model is used with

    Raises PromptError for a malformed template.
    """

    model: Trained
    template: Template | None = None
    text: TextCache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        template = self.model.template if self.template is None else self.template
        object.__setattr__(self, "text", TextCache(self.model, template))

    @overload
    def __call__(self, images: ImageLike, prompts: Phrases) -> Localization: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], prompts: Prompts) -> list[Localization]: ...
    def __call__(
        self, images: ImageLike | list[Any] | tuple[Any, ...], prompts: Prompts
    ) -> Localization | list[Localization]:
        """Localize `prompts` in one image or in a list of them, as `Localizer` does; the same prompts and errors."""
        if isinstance(images, list | tuple):
            by_image = prompts_by_image(prompts, len(images))
            prepared = prepare_all(images, self._prepare)
            return [self._locate(*one, asked) for one, asked in zip(prepared, by_image, strict=True)]
        vocabulary = Vocabulary.of(cast(Phrases, prompts))
        return self._locate(*self._prepare(images), vocabulary)

    def describe(self) -> dict[str, Any]:
        """Everything that decides a result, but for the prompts: values that JSON can hold."""
        return {
            "model": self.model.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "size_rule": self.model.size_rule,
            "template": self.text.template,
        }

    def _prepare(self, image: ImageLike) -> tuple[Tensor, Size]:
        picture = read_image(image)
        return self.model.prepare(picture), size_of(picture)

    def _locate(self, pixels: Tensor, size: Size, vocabulary: Vocabulary) -> Localization:
        similarity, scores, detections = self.model.ground(pixels, size, self.text(vocabulary.phrases))
        best, scale = vocabulary.best(scores), self.model.logit_scale
        presence = best if scale is None else None
        boxes = None if detections is None else tuple(map(merge_boxes, vocabulary.by_label(detections)))
        return Localization(vocabulary.labels, similarity, size, best, scale, boxes, presence, vocabulary)


def load_trained(
    name: str | PathLike[str],
    *,
    template: Template | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    cache_dir: str | None = None,
) -> TrainedLocalizer:
    """A `TrainedLocalizer` on a model that was trained to localize: `load_trained("nvidia/groupvit-gcc-yfcc")`,
    "CIDAS/clipseg-rd64-refined", "google/owlv2-base-patch16-ensemble".

    template as `TrainedLocalizer`, checked before anything is loaded; the rest, and errors, as
    `backbones.trained.load_trained`.
    """
    if template is not None:
        check_template(template)
    return TrainedLocalizer(trained.load_trained(name, device=device, dtype=dtype, cache_dir=cache_dir), template)
