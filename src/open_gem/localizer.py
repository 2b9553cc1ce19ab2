"""Encode a picture once, ask as often as you like."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from open_gem import backbones, readout
from open_gem.backbones import Backbone
from open_gem.errors import ImageError, InputError, PromptError
from open_gem.imaging import ImageLike, check_size_rule, read_image, size_of, target_size, to_pixels
from open_gem.localization import Localization
from open_gem.pathway import Features, Pathway, check_depth, find_pathway, run
from open_gem.prompts import TEMPLATE, TextCache, check_prompts, check_template
from open_gem.types import Size

if TYPE_CHECKING:
    from open_gem.backbones.trained import Trained

BATCH = 16  # images encoded at a time: bounds memory when there are many

Prompts = str | Iterable[str] | Iterable[Iterable[str]]  # one phrase, phrases for all images, or phrases an image


@dataclass(frozen=True, eq=False)
class Localizer:
    """Phrases in, localizations out; the model behind it stays as it is and may be shared between threads.

    backbone  the model, from `backbones.load` or `backbones.adapt`
    pathway   a name of `PATHWAYS`, or settings; a *name* follows the temperature the checkpoint recommends, settings
              are taken as they are
    size      how images are resized: "short:448", "long:N", "square:N", "native"; by default what the checkpoint
              recommends
    template  what a phrase is put into, see `prompts.fill`

    Raises PathwayError, InputError and PromptError for an unknown pathway, a malformed size rule or template.
    """

    backbone: Backbone
    pathway: str | Pathway = "gem"
    size: str | None = None
    template: str = TEMPLATE
    text: TextCache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Complain now, not at the first image.
        check_depth(self.settings(self.pathway), self.backbone)
        check_size_rule(self.size_rule)
        object.__setattr__(self, "text", TextCache(self.backbone, self.template))

    @overload
    def __call__(self, images: ImageLike, prompts: Prompts) -> Localization: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], prompts: Prompts) -> list[Localization]: ...
    def __call__(
        self, images: ImageLike | list[Any] | tuple[Any, ...], prompts: Prompts
    ) -> Localization | list[Localization]:
        """Localize `prompts` in one image, or in a list of them (then a list comes back, in order).

        For a list, `prompts` may be one list for all or one list an image. Images that come to the same size are
        encoded together. Raises ImageError, PromptError or InputError, before anything is computed.
        """
        if isinstance(images, list | tuple):
            return self._locate_images(images, _prompts_by_image(prompts, len(images)))
        asked = check_prompts(prompts)
        pixels, original = self._prepare(images)
        return self.locate(self.encode(pixels[None]), asked, [original])[0]

    def describe(self) -> dict[str, Any]:
        """Everything that decides a result, but for the prompts: values that JSON can hold."""
        return {
            "model": self.backbone.name,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "resampling": self.backbone.tower.resampling,
            "pathway": asdict(self.settings(self.pathway)),
            "size_rule": self.size_rule,
            "template": self.template,
        }

    @property
    def size_rule(self) -> str:
        """How images are resized, see `imaging.SIZE_RULES`."""
        return self.backbone.recommended.size if self.size is None else self.size

    def settings(self, pathway: str | Pathway) -> Pathway:
        """The settings a pathway has on this backbone, see `resolve`."""
        return resolve(self.backbone, pathway)

    def pixels(self, image: ImageLike) -> Tensor:
        """One image as the backbone wants it: `(3, y, x)`, resized by the size rule, normalised by the checkpoint."""
        return self._prepare(image)[0]

    def encode(self, pixels: Tensor, pathway: str | Pathway | None = None, *, pooled: bool = True) -> Features:
        """Features of preprocessed `pixels` `(b, 3, y, x)`; without `pooled`, no image-level scores later."""
        chosen = self.pathway if pathway is None else pathway
        return self.read(pixels, {"chosen": chosen}, pooled=pooled)["chosen"]

    def read(
        self, pixels: Tensor, pathways: Mapping[str, str | Pathway] | Iterable[str], *, pooled: bool = True
    ) -> dict[str, Features]:
        """Features by several pathways from one pass: names, or a mapping of labels to names and settings."""
        labelled = pathways if isinstance(pathways, Mapping) else {name: name for name in pathways}
        chosen = {label: self.settings(pathway) for label, pathway in labelled.items()}
        return run(self.backbone, pixels, chosen, pooled=pooled)

    def locate(
        self,
        features: Features,
        prompts: Prompts,
        sizes: Sequence[Size] | None = None,
    ) -> list[Localization]:
        """One localization an encoded image. `sizes`: of the original images, by default that of the pixels encoded."""
        count = len(features.tokens)
        sizes = [features.size] * count if sizes is None else sizes
        if isinstance(sizes, Size) or len(sizes) != count:
            given = "one size" if isinstance(sizes, Size) else f"{len(sizes)} sizes"
            raise InputError(f"{given} for {count} images, expected a list with one an image")
        by_image = _prompts_by_image(prompts, count)
        return [self._locate_one(features, index, by_image[index], sizes[index]) for index in range(count)]

    def _locate_one(self, features: Features, index: int, prompts: tuple[str, ...], size: Size) -> Localization:
        text = self.text(prompts)
        similarity = readout.similarity(features.patches[index], text).unflatten(-1, tuple(features.grid))
        pooled = features.pooled
        scores = None if pooled is None else readout.similarity(pooled[index, None], text)[:, 0]
        return Localization(prompts, similarity, size, scores, self.backbone.logit_scale)

    def _locate_images(self, images: Sequence[ImageLike], by_image: Sequence[tuple[str, ...]]) -> list[Localization]:
        prepared = _prepare_all(images, self._prepare)
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        for index, (pixels, _) in enumerate(prepared):
            groups[pixels.shape].append(index)
        results: dict[int, Localization] = {}
        batches = (
            indices[start : start + BATCH] for indices in groups.values() for start in range(0, len(indices), BATCH)
        )
        for indices in batches:
            features = self.encode(torch.stack([prepared[index][0] for index in indices]))
            located = self.locate(features, [by_image[i] for i in indices], [prepared[i][1] for i in indices])
            results.update(zip(indices, located, strict=True))
        return [results[index] for index in range(len(images))]

    def _prepare(self, image: ImageLike) -> tuple[Tensor, Size]:
        picture = read_image(image)
        original = size_of(picture)
        size = target_size(self.size_rule, original, self.backbone.patch)
        return to_pixels(picture, size, self.backbone.preprocess), original


@dataclass(frozen=True, eq=False)
class TrainedLocalizer:
    """Phrases in, localizations out, by a model that was trained to localize: what to compare a `Localizer` with.

    model     from `backbones.trained.load_trained` or `adapt_trained`
    template  what a phrase is put into, see `prompts.fill`; by default the one that the model is used with

    Raises PromptError for a malformed template.
    """

    model: "Trained"
    template: str | None = None
    text: TextCache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        template = self.model.template if self.template is None else self.template
        object.__setattr__(self, "text", TextCache(self.model, template))

    @overload
    def __call__(self, images: ImageLike, prompts: Prompts) -> Localization: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], prompts: Prompts) -> list[Localization]: ...
    def __call__(
        self, images: ImageLike | list[Any] | tuple[Any, ...], prompts: Prompts
    ) -> Localization | list[Localization]:
        """Localize `prompts` in one image or in a list of them, as `Localizer` does; the same prompts and errors."""
        if isinstance(images, list | tuple):
            by_image = _prompts_by_image(prompts, len(images))
            prepared = _prepare_all(images, self._prepare)
            return [self._locate(*one, asked) for one, asked in zip(prepared, by_image, strict=True)]
        asked = check_prompts(prompts)
        return self._locate(*self._prepare(images), asked)

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

    def _locate(self, pixels: Tensor, size: Size, prompts: tuple[str, ...]) -> Localization:
        similarity, scores, detections = self.model.ground(pixels, size, self.text(prompts))
        return Localization(prompts, similarity, size, scores, self.model.logit_scale, detections)


def _prepare_all(
    images: Sequence[ImageLike], prepare: Callable[[ImageLike], tuple[Tensor, Size]]
) -> list[tuple[Tensor, Size]]:
    """Each image prepared; an error says which it was."""
    prepared = []
    for index, image in enumerate(images):
        try:
            prepared.append(prepare(image))
        except ImageError as error:
            raise ImageError(f"image {index}: {error}") from error
    return prepared


def resolve(backbone: Backbone, pathway: str | Pathway) -> Pathway:
    """The settings of a pathway on a backbone: a name with the temperature that the checkpoint recommends for adaptive
    ones, settings as they are. Raises PathwayError for an unknown name."""
    if isinstance(pathway, Pathway):
        return pathway
    found = find_pathway(pathway)
    scale = backbone.recommended.temperature_scale if found.is_adaptive else 1.0
    return replace(found, temperature_scale=found.temperature_scale * scale)


def _prompts_by_image(prompts: Prompts, count: int) -> list[tuple[str, ...]]:
    """One tuple of prompts an image, from one list for all or one list each."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        return [check_prompts(prompts)] * count
    listed = list(prompts)
    if not listed or any(isinstance(one, str) or not isinstance(one, Iterable) for one in listed):
        return [check_prompts(listed)] * count
    if len(listed) != count:
        raise PromptError(
            f"{len(listed)} lists of prompts for {count} images, expected one an image or one list for all"
        )
    return [check_prompts(some) for some in listed]


def load(
    name: str | PathLike[str] = backbones.EMBEDDED,
    pretrained: str | None = None,
    *,
    pathway: str | Pathway = "gem",
    size: str | None = None,
    template: str = TEMPLATE,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    cache_dir: str | None = None,
) -> Localizer:
    """A `Localizer` on pretrained weights: `load()` for the model in the package, `load("ViT-B-16", "openai")`,
    `load("openai/clip-vit-base-patch16")`, `load("hf-hub:org/repo")`, `load("folder")`.

    pathway, size, template as `Localizer`, checked before anything is loaded; the rest, and errors, as
    `backbones.load`.
    """
    if isinstance(pathway, str):
        find_pathway(pathway)
    if size is not None:
        check_size_rule(size)
    check_template(template)
    backbone = backbones.load(name, pretrained, device=device, dtype=dtype, cache_dir=cache_dir)
    return Localizer(backbone, pathway, size, template)


def adapt(
    model: Any, tokenizer: Any, *, pathway: str | Pathway = "gem", size: str | None = None, template: str = TEMPLATE
) -> Localizer:
    """A `Localizer` on a model already in memory, which it reads and never changes. Errors as `backbones.adapt`."""
    return Localizer(backbones.adapt(model, tokenizer), pathway, size, template)


def load_trained(
    name: str | PathLike[str],
    *,
    template: str | None = None,
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
    from open_gem.backbones import trained

    return TrainedLocalizer(trained.load_trained(name, device=device, dtype=dtype, cache_dir=cache_dir), template)
