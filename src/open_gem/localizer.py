"""Encode a picture once, ask as often as you like."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor

from open_gem import backbones, readout
from open_gem.backbones import Backbone
from open_gem.errors import ImageError, InputError, PromptError
from open_gem.imaging import ImageLike, check_size_rule, read_image, size_of, target_size, to_pixels
from open_gem.pathway import Features, Pathway, check_depth, find_pathway, run
from open_gem.prompts import TEMPLATE, TextCache, check_prompts, check_template
from open_gem.readout import Boxes
from open_gem.types import Size

BATCH = 16  # images encoded at a time: bounds memory when there are many

Prompts = str | Iterable[str] | Iterable[Iterable[str]]  # one phrase, phrases for all images, or phrases an image


class Maps(Sequence[Tensor]):
    """One map `(y, x)` a prompt, made when asked for: index by number or prompt, iterate, or `stack()` them all.

    A thousand prompts on a four-megapixel image are 16 GB as one tensor, so nothing is kept here.
    """

    def __init__(self, prompts: tuple[str, ...], make: Callable[[int], Tensor]):
        self.prompts, self._make = prompts, make

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, which: int | str) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice) -> "Maps": ...
    def __getitem__(self, which: int | str | slice) -> "Tensor | Maps":
        if isinstance(which, slice):
            chosen = range(len(self))[which]
            return Maps(self.prompts[which], lambda index: self._make(chosen[index]))
        return self._make(range(len(self))[_prompt_index(self.prompts, which)])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._make, range(len(self)))

    def __contains__(self, prompt: object) -> bool:
        return prompt in self.prompts

    def __repr__(self) -> str:
        return f"Maps({', '.join(map(repr, self.prompts))})"

    def stack(self) -> Tensor:
        """All maps at once, `(p, y, x)`."""
        return torch.stack(list(self))


def _prompt_index(prompts: tuple[str, ...], which: int | str) -> int:
    if isinstance(which, str):
        if which not in prompts:
            raise PromptError(f"no prompt {which!r} here; there are: {', '.join(prompts)}")
        return prompts.index(which)
    return which


@dataclass(frozen=True, eq=False)
class Localization:
    """What was found for one image and its prompts.

    prompts      as asked
    similarity   `(p, r, k)` cosine of each patch with each prompt, in [-1, 1]: small, keep this one
    size         height and width of the original image, at which all views are given
    scores       `(p,)` image-level cosine of each prompt with the pooled embedding, as the model was trained:
                 *whether* it is there, where the maps say *where*; None where the features were encoded without it
    logit_scale  what cosines are multiplied by before a softmax over prompts

    Maps, masks and label maps are on the device of `similarity`; boxes and points are on the CPU.
    """

    prompts: tuple[str, ...]
    similarity: Tensor
    size: Size
    scores: Tensor | None = None
    logit_scale: float = 100.0

    def heatmaps(self, scale: str = "minmax") -> Maps:
        """One map `(y, x)` a prompt.

        scale: "minmax" stretches each to [0, 1] (to look at; it makes an absent thing look present); "cosine" leaves
        raw values in [-1, 1]. Raises InputError for another scale.
        """
        stretch = _find_scale(scale)
        return Maps(self.prompts, lambda index: stretch(self._cosine(index)))

    def masks(self, threshold: float = 0.5, scale: str = "minmax") -> Maps:
        """One bool mask `(y, x)` a prompt: heatmap above `threshold` (the paper on OpenImages: min-max above 0.5)."""
        heatmaps = self.heatmaps(scale)
        return Maps(self.prompts, lambda index: heatmaps[index] > threshold)

    def boxes(self, threshold: float = 0.5, scale: str = "minmax", *, per: str = "component") -> list[Boxes]:
        """Boxes of each prompt, best first: one a connected component of the mask, or one a prompt.

        per: "component" or "prompt". Scores are raw cosines, so boxes of different prompts and images compare.
        """
        make = {"component": readout.component_boxes, "prompt": readout.whole_box}.get(per)
        if make is None:
            raise InputError(f"per is {per!r}, expected 'component' or 'prompt'")
        stretch = _find_scale(scale)
        cosines = map(self._cosine, range(len(self.prompts)))
        return [make(stretch(cosine) > threshold, cosine) for cosine in cosines]

    def points(self) -> Tensor:
        """The pixel where each prompt's map is highest: `(p, 2)` int, `xy`."""
        return torch.tensor([readout.peak(self._cosine(index)) for index in range(len(self.prompts))])

    def segment(self, background: float | None = None) -> Tensor:
        """The most probable prompt of each pixel: `(y, x)` int64, an index into `prompts`, −1 for background.

        A pixel is background where the best softmax probability (of logit_scale × cosine over the prompts) is below
        `background`, a number in [0, 1]; None has no background. The paper uses 0.8 with PascalVOC's 20 classes. With
        one prompt the softmax is 1 everywhere: use `masks` there.
        """
        if background is not None and not 0 <= background <= 1:
            raise InputError(f"background is {background}, expected a probability in [0, 1] or None")
        return readout.segment(self.logit_scale * self.similarity, self.size, background)

    def _cosine(self, index: int) -> Tensor:
        return readout.upsample(self.similarity[index], self.size)


_SCALES: Mapping[str, Callable[[Tensor], Tensor]] = {"minmax": readout.min_max, "cosine": lambda heatmap: heatmap}


def _find_scale(scale: str) -> Callable[[Tensor], Tensor]:
    if scale not in _SCALES:
        raise InputError(f"scale is {scale!r}, expected one of {', '.join(_SCALES)}")
    return _SCALES[scale]


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
        prepared = [self._prepare_listed(index, image) for index, image in enumerate(images)]
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

    def _prepare_listed(self, index: int, image: ImageLike) -> tuple[Tensor, Size]:
        try:
            return self._prepare(image)
        except ImageError as error:
            raise ImageError(f"image {index}: {error}") from error

    def _prepare(self, image: ImageLike) -> tuple[Tensor, Size]:
        picture = read_image(image)
        original = size_of(picture)
        size = target_size(self.size_rule, original, self.backbone.patch)
        return to_pixels(picture, size, self.backbone.preprocess), original


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
    name: str = backbones.EMBEDDED,
    pretrained: str | None = None,
    *,
    pathway: str | Pathway = "gem",
    size: str | None = None,
    template: str = TEMPLATE,
    device: str | torch.device = "auto",
    cache_dir: str | None = None,
) -> Localizer:
    """A `Localizer` on pretrained weights: `load()` for the model in the package, `load("ViT-B-16", "openai")`,
    `load("hf-hub:org/repo")`, `load("local-dir:folder")`.

    pathway, size, template as `Localizer`, checked before anything is loaded; the rest, and errors, as
    `backbones.load`.
    """
    if isinstance(pathway, str):
        find_pathway(pathway)
    if size is not None:
        check_size_rule(size)
    check_template(template)
    backbone = backbones.load(name, pretrained, device=device, cache_dir=cache_dir)
    return Localizer(backbone, pathway, size, template)


def adapt(
    model: Any, tokenizer: Any, *, pathway: str | Pathway = "gem", size: str | None = None, template: str = TEMPLATE
) -> Localizer:
    """A `Localizer` on a model already in memory, which it reads and never changes. Errors as `backbones.adapt`."""
    return Localizer(backbones.adapt(model, tokenizer), pathway, size, template)
