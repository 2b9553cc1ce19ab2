"""Models that were trained to localize, behind the same interface: what to compare a `Localizer` with."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from open_gem.errors import PromptError
from open_gem.images.pixels import ImageLike, read_image, size_of
from open_gem.localization import Localization
from open_gem.locate import AnyLocalizer, Methods, Prepared
from open_gem.readout import merge_boxes
from open_gem.text import Prompts, Template, TextCache, check_template
from open_gem.trained import registry as trained
from open_gem.trained.base import TrainedModel
from open_gem.types import Size

SQUARE = 448  # pixels: side of the square image that stands for any in `patches`

TRAINED = "as trained"
"""The name in place of a method's if a model was trained to localize."""


@dataclass(frozen=True, eq=False)
class Unlocated:
    """An image for a model that looks at it only together with the prompts: used like an `Encoded`."""

    pixels: Tensor
    size: Size

    @property
    def grid(self) -> None:
        """None: the grid is unknown before the prompts."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.pixels.nbytes

    def to(self, device: torch.device | str) -> "Unlocated":
        """Move to another device."""
        return replace(self, pixels=self.pixels.to(device))

    def clone(self) -> "Unlocated":
        """Return itself: its memory is its own."""
        return self


@dataclass(frozen=True, eq=False, repr=False)
class TrainedLocalizer(AnyLocalizer):
    """Prompts in, localizations out, by a model that was trained to localize: what to compare a `Localizer` with.

    model     from `trained.registry.load_trained` or `adapt_trained`
    template  what a prompt is put into, see `text.fill`; by default the one that the model is used with

    Raises PromptError for a malformed template.
    """

    model: TrainedModel
    template: Template | None = None
    text: TextCache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        template = self.model.template if self.template is None else self.template
        object.__setattr__(self, "text", TextCache(self.model, template))
        if len(self.text.templates) > 1 and not self.model.averages_templates:
            count = len(self.text.templates)
            raise PromptError(
                f"{count} templates given, but {self.model.name} takes a prompt in one: expected one template"
            )

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def layers(self) -> int:
        return 0

    @property
    def patch(self) -> None:
        return None

    @property
    def predicts_boxes(self) -> bool:
        return self.model.predicts_boxes

    def patches(self, size: Size | None = None) -> int:
        return self.model.patches(Size(SQUARE, SQUARE) if size is None else size)

    def configured(self, **settings: Any) -> "TrainedLocalizer":
        return self

    def fingerprint(self) -> str:
        return self.model.fingerprint()

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "size_rule": self.model.size_rule,
            "template": self.text.template,
        }

    def prepare(self, image: ImageLike) -> Prepared:
        rgb = read_image(image)
        return Prepared(size_of(rgb), pixels=self.model.prepare(rgb))

    def methods(self, methods: Methods | None) -> dict[str, Any]:
        return {TRAINED: None}

    def _encode(
        self, group: Sequence[Prepared], methods: Mapping[str, Any], trace: Collection[str], batch_size: int
    ) -> list[dict[str, Unlocated]]:
        return [
            {TRAINED: Unlocated(prepared.pixels, prepared.original)}
            for prepared in group
            if prepared.pixels is not None
        ]

    def locate(self, encoded: Unlocated, prompts: Prompts) -> Localization:
        vocabulary = self.check(prompts)
        similarity, scores, detections = self.model.ground(
            encoded.pixels, encoded.size, self.text(tuple(map(str, vocabulary.all_prompts)))
        )
        best, scale = vocabulary.best(scores), self.model.logit_scale
        presence = best if scale is None else None
        boxes = None if detections is None else tuple(map(merge_boxes, vocabulary.by_label(detections)))
        return Localization(vocabulary.labels, similarity, encoded.size, best, scale, boxes, presence, vocabulary)


def load_trained(
    name: str | PathLike[str],
    *,
    template: Template | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    cache_dir: str | None = None,
) -> TrainedLocalizer:
    """Load a `TrainedLocalizer`: `load_trained("nvidia/groupvit-gcc-yfcc")`, "CIDAS/clipseg-rd64-refined",
    "google/owlv2-base-patch16-ensemble".

    template as `TrainedLocalizer`, checked before anything is loaded; the rest, and errors, as
    `trained.registry.load_trained`.
    """
    if template is not None:
        check_template(template)
    return TrainedLocalizer(trained.load_trained(name, device=device, dtype=dtype, cache_dir=cache_dir), template)
