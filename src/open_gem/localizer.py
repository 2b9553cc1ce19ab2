"""Encode a picture once, ask as often as you like."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
from PIL import Image
from torch import Tensor

from open_gem import readout, towers
from open_gem.errors import ImageError, InputError, MethodError, PromptError
from open_gem.images.pixels import ImageLike, check_size_rule, read_image, size_of, target_size, to_pixels
from open_gem.localization import Localization
from open_gem.method.run import Features, check_depth, run
from open_gem.method.table import PROXYCLIP, Method, check_name, find_method
from open_gem.refine.pamr import Pamr
from open_gem.text import TEMPLATE, Phrases, Template, TextCache, Vocabulary, check_template
from open_gem.towers.loading import Backbone
from open_gem.types import Size
from open_gem.views import WHOLE, Mosaic, Tiles, Views, batches, check_views, plan

if TYPE_CHECKING:
    from open_gem.towers.dino import Expert

BATCH = 16  # images or windows encoded at a time: bounds memory when there are many

Prompts = Phrases | Iterable[Phrases]  # for all images: phrases or a vocabulary; or such an image


@dataclass(frozen=True, eq=False)
class Localizer:
    """Phrases in, localizations out; the model behind it stays as it is and may be shared between threads.

    backbone    the model, from `towers.load` or `towers.adapt`
    method     a name of `METHODS`, or settings; a *name* follows the temperature the checkpoint recommends and is
                no deeper than the model, settings are taken as they are
    size        how images are resized: "short:448", "long:N", "square:N", "native"; by default what the checkpoint
                recommends
    template    what a phrase is put into: a template, templates, or an ensemble by name, see `prompts.check_template`
    views       how an image is looked at: at once, through sliding windows, at several scales, mirrored too
    refinement  makes maps follow the edges of the image, such as `Pamr()`
    remove_redundancy
                take away what all phrases have in common (CLIP Surgery's "feature surgery"): with several phrases by
                `readout.remove_redundancy`; of one phrase, the cosines of the empty phrase

    What is called `presence` is, of models trained with a sigmoid (SigLIP), the probability as trained, and of others
    that of the phrase against the empty phrase ("a photo of a .") and those of the background, whichever is likelier:
    1 / (1 + exp(logit_scale · (highest cosine of these − cosine of the phrase))).

    Raises MethodError, InputError and PromptError for an unknown method, a malformed size rule or template, or
    windows that do not fit the patches.
    """

    backbone: Backbone
    method: str | Method = "gem"
    size: str | None = None
    template: Template = TEMPLATE
    views: Views = WHOLE
    refinement: Pamr | None = None
    remove_redundancy: bool = False
    text: TextCache = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Complain now, not at the first image.
        check_depth(self.settings(self.method), self.backbone)
        check_size_rule(self.size_rule)
        check_views(self.views, self.backbone.patch)
        object.__setattr__(self, "text", TextCache(self.backbone, self.template))

    @overload
    def __call__(self, images: ImageLike, prompts: Phrases) -> Localization: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], prompts: Prompts) -> list[Localization]: ...
    def __call__(
        self, images: ImageLike | list[Any] | tuple[Any, ...], prompts: Prompts
    ) -> Localization | list[Localization]:
        """Localize `prompts` in one image, or in a list of them (then a list comes back, in order).

        Prompts are a phrase, phrases, labels with phrases each (a mapping), or a `Vocabulary`; for a list of images,
        the same for all or a list with one an image. Images that come to the same size are encoded together. Raises
        ImageError, PromptError or InputError, before anything is computed.
        """
        if isinstance(images, list | tuple):
            return self._locate_images(images, prompts_by_image(prompts, len(images)))
        return self.compare(images, cast(Phrases, prompts), {"": self.method})[""]

    def compare(
        self, image: ImageLike, prompts: Phrases, methods: Mapping[str, str | Method] | Iterable[str]
    ) -> dict[str, Localization]:
        """What each of several methods makes of an image, from one pass of the model: names, or a mapping of labels to
        names and settings. Prompts and errors as when called."""
        vocabulary, picture = Vocabulary.of(prompts), read_image(image)
        seen = self.look(picture, methods)
        return {
            name: self._refined(self._locate_one(one, vocabulary, size_of(picture)), picture)
            for name, one in seen.items()
        }

    def look(
        self, image: ImageLike, methods: Mapping[str, str | Method] | Iterable[str]
    ) -> dict[str, Features | Tiles]:
        """What several methods show of one image, seen through `views`: to keep, and ask again with `locate`.

        Methods as for `compare`.
        """
        chosen, picture = self._labelled(methods), read_image(image)
        if self.views.is_plain:
            found = run(self.backbone, self._prepare(picture)[1][None], chosen, pooled=True)
            return {name: replace(features, original=size_of(picture)) for name, features in found.items()}
        canvases = plan(self.views, self.size_rule, size_of(picture), self.backbone.patch)
        seen: dict[str, list[list[Features]]] = {name: [] for name in chosen}
        for canvas in canvases:
            pixels = to_pixels(picture, canvas.size, self.backbone.preprocess)
            parts = [run(self.backbone, some, chosen, pooled=True) for some in batches(pixels, canvas, BATCH)]
            for name, features in seen.items():
                features.append([part[name] for part in parts])
        merge: Callable[[Tiles], Features | Tiles] = (
            Tiles.merged if self.views.merge == "features" else lambda tiles: tiles
        )
        return {name: merge(Tiles(canvases, features, size_of(picture))) for name, features in seen.items()}

    def describe(self) -> dict[str, Any]:
        """Everything that decides a result, but for the prompts: values that JSON can hold."""
        return {
            "model": self.backbone.name,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "resampling": self.backbone.tower.resampling,
            "method": self.settings(self.method).describe(),
            "size_rule": self.size_rule,
            "template": self.text.template,
            "views": asdict(self.views),
            "refinement": None if self.refinement is None else asdict(self.refinement),
            "remove_redundancy": self.remove_redundancy,
        }

    @property
    def size_rule(self) -> str:
        """How images are resized, see `imaging.SIZE_RULES`."""
        return self.backbone.recommended.size if self.size is None else self.size

    def settings(self, method: str | Method) -> Method:
        """The settings a method has on this backbone, see `resolve`."""
        return resolve(self.backbone, method)

    def pixels(self, image: ImageLike) -> Tensor:
        """One image as the backbone wants it: `(3, y, x)`, resized by the size rule, normalised by the checkpoint."""
        return self._prepare(image)[1]

    def encode(self, pixels: Tensor, method: str | Method | None = None, *, pooled: bool = True) -> Features:
        """Features of preprocessed `pixels` `(b, 3, y, x)`; without `pooled`, no image-level scores later.

        The exact height, where what happens is what was asked for: `views` have no part in this.
        """
        chosen = self.method if method is None else method
        return self.read(pixels, {"chosen": chosen}, pooled=pooled)["chosen"]

    def read(
        self,
        pixels: Tensor,
        methods: Mapping[str, str | Method] | Iterable[str],
        *,
        pooled: bool = True,
        trace: Collection[str] = (),
    ) -> dict[str, Features]:
        """Features by several methods from one pass: names, or a mapping of labels to names and settings. `trace`: see
        `run`."""
        return run(self.backbone, pixels, self._labelled(methods), pooled=pooled, trace=trace)

    def locate(
        self,
        features: Features | Tiles,
        prompts: Prompts,
        sizes: Sequence[Size] | None = None,
    ) -> list[Localization]:
        """One localization an encoded image. `sizes`: of the original images; by default what `look` saw, else that of
        the pixels encoded.

        `refinement`, which needs the image itself, has no part in this: see `Localization.refined`.
        """
        count = 1 if isinstance(features, Tiles) else len(features.tokens)
        sizes = [features.original or features.size] * count if sizes is None else sizes
        if isinstance(sizes, Size) or len(sizes) != count:
            given = "one size" if isinstance(sizes, Size) else f"{len(sizes)} sizes"
            raise InputError(f"{given} for {count} images, expected a list with one an image")
        by_image = prompts_by_image(prompts, count)
        return [self._locate_one(features, by_image[index], sizes[index], index) for index in range(count)]

    def _labelled(self, methods: Mapping[str, str | Method] | Iterable[str]) -> dict[str, Method]:
        if isinstance(methods, str):
            methods = [methods]
        labelled = methods if isinstance(methods, Mapping) else {name: name for name in methods}
        if unlabelled := [label for label in labelled if not isinstance(label, str)]:
            raise MethodError(f"{unlabelled[0]!r} has no label, expected names, or a mapping of labels to settings")
        return {label: self.settings(method) for label, method in labelled.items()}

    def _locate_one(self, seen: Features | Tiles, vocabulary: Vocabulary, size: Size, index: int = 0) -> Localization:
        text = self.text((*vocabulary.phrases, ""))  # the empty phrase is what others are compared with
        maps, pooled = (seen.maps(text), seen.pooled) if isinstance(seen, Tiles) else _of_image(seen, index, text)
        cosines = None if pooled is None else readout.similarity(pooled, text)[:, 0]
        if not self.remove_redundancy:
            maps = [one[..., :-1, :, :] for one in maps]
        elif len(text) == 2:
            maps = [one[..., :1, :, :] - one[..., 1:, :, :] for one in maps]
        elif cosines is None:
            raise InputError(
                "features have no pooled embedding, which redundancy removal needs: encode with pooled=True"
            )
        else:
            maps = [readout.remove_redundancy(one[..., :-1, :, :], cosines[:-1]) for one in maps]
        return Localization(
            vocabulary.labels,
            Mosaic(seen.canvases, maps) if isinstance(seen, Tiles) else maps[0],
            size,
            None if cosines is None else vocabulary.best(cosines[:-1]),
            self.backbone.logit_scale,
            presence=None if cosines is None else self._presence(vocabulary, cosines),
            vocabulary=vocabulary,
        )

    def _presence(self, vocabulary: Vocabulary, cosines: Tensor) -> Tensor:
        """`cosines` `(q + 1,)` of the whole image with all phrases and the empty one."""
        scale, scores = self.backbone.logit_scale, vocabulary.best(cosines[:-1])
        if (bias := self.backbone.logit_bias) is not None:
            return (scale * scores + bias).sigmoid()
        rivals = cosines[len(cosines) - 1 - len(vocabulary.background) :]
        return (scale * (scores - rivals.max())).sigmoid()

    def _locate_images(self, images: Sequence[ImageLike], by_image: Sequence[Vocabulary]) -> list[Localization]:
        if not self.views.is_plain:  # windows of one image are a batch already
            pictures = prepare_all(images, self._check_plan)
            return [self(picture, asked) for picture, asked in zip(pictures, by_image, strict=True)]
        prepared = prepare_all(images, self._prepare)
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        for index, (_, pixels) in enumerate(prepared):
            groups[pixels.shape].append(index)
        results: dict[int, Localization] = {}
        batches = (
            indices[start : start + BATCH] for indices in groups.values() for start in range(0, len(indices), BATCH)
        )
        for indices in batches:
            features = self.encode(torch.stack([prepared[index][1] for index in indices]))
            for at, index in enumerate(indices):
                picture = prepared[index][0]
                found = self._locate_one(features, by_image[index], size_of(picture), at)
                results[index] = self._refined(found, picture)
        return [results[index] for index in range(len(images))]

    def _check_plan(self, image: ImageLike) -> Image.Image:
        """The picture, which can be looked at. Raises ImageError where it cannot."""
        picture = read_image(image)
        plan(self.views, self.size_rule, size_of(picture), self.backbone.patch)
        return picture

    def _prepare(self, image: ImageLike) -> tuple[Image.Image, Tensor]:
        picture = read_image(image)
        size = target_size(self.size_rule, size_of(picture), self.backbone.patch)
        return picture, to_pixels(picture, size, self.backbone.preprocess)

    def _refined(self, found: Localization, picture: Image.Image) -> Localization:
        return found if self.refinement is None else found.refined(picture, self.refinement)


def _of_image(features: Features, index: int, text: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Cosines `(p, r, k)` of one image of a batch with `text` `(p, e)`, and its pooled embedding `(1, e)`."""
    cosines = readout.similarity(features.patches[index], text).unflatten(-1, tuple(features.grid))
    return [cosines], None if features.pooled is None else features.pooled[index, None]


P = TypeVar("P")


def prepare_all(images: Sequence[ImageLike], prepare: Callable[[ImageLike], P]) -> list[P]:
    """Each image prepared; an error says which it was."""
    prepared = []
    for index, image in enumerate(images):
        try:
            prepared.append(prepare(image))
        except ImageError as error:
            raise ImageError(f"image {index}: {error}") from error
    return prepared


def resolve(backbone: Backbone, method: str | Method) -> Method:
    """The settings of a method on a backbone: a name with the temperature that the checkpoint recommends for adaptive
    ones, and on a model of few blocks no deeper than these; settings as they are. "proxyclip:NAME" is ProxyCLIP with
    the expert NAME, which is loaded then.

    Raises MethodError for an unknown name, and errors as `backbones.experts.load_expert`.
    """
    if isinstance(method, Method):
        return method
    if method.startswith(PROXYCLIP):
        from open_gem.towers.dino import proxyclip

        name = check_name(method).removeprefix(PROXYCLIP)
        return proxyclip(_expert(name, backbone.device, backbone.dtype), backbone)
    found = find_method(method).fitted(backbone.layers)
    scale = backbone.recommended.temperature_scale if found.is_adaptive else 1.0
    return replace(found, temperature_scale=found.temperature_scale * scale)


@lru_cache(maxsize=1)
def _expert(name: str, device: torch.device, dtype: torch.dtype) -> "Expert":
    from open_gem.towers.dino import load_expert

    return load_expert(name, device=device, dtype=dtype)


def prompts_by_image(prompts: Prompts, count: int) -> list[Vocabulary]:
    """A vocabulary for each image, from prompts for all or a list with some for each."""
    listed = prompts
    if isinstance(prompts, Iterable) and not isinstance(prompts, str | Mapping | Vocabulary):
        listed = list(prompts)
        if listed and not any(isinstance(one, str) or not isinstance(one, Iterable | Vocabulary) for one in listed):
            if len(listed) != count:
                raise PromptError(
                    f"{len(listed)} lists of prompts for {count} images, expected one an image or one list for all"
                )
            return [Vocabulary.of(some) for some in listed]
    return [Vocabulary.of(cast(Phrases, listed))] * count


def load(
    name: str | PathLike[str] = towers.EMBEDDED,
    pretrained: str | None = None,
    *,
    method: str | Method = "gem",
    size: str | None = None,
    template: Template = TEMPLATE,
    views: Views = WHOLE,
    refinement: Pamr | None = None,
    remove_redundancy: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    cache_dir: str | None = None,
) -> Localizer:
    """A `Localizer` on pretrained weights: `load()` for the model in the package, `load("ViT-B-16", "openai")`,
    `load("openai/clip-vit-base-patch16")`, `load("hf-hub:org/repo")`, `load("folder")`.

    The settings as of a `Localizer`, checked before anything is loaded; the rest, and errors, as `towers.load`.
    """
    if isinstance(method, str):
        check_name(method)
    if size is not None:
        check_size_rule(size)
    check_template(template)
    backbone = towers.load(name, pretrained, device=device, dtype=dtype, cache_dir=cache_dir)
    return Localizer(backbone, method, size, template, views, refinement, remove_redundancy)


def adapt(model: Any, tokenizer: Any, **settings: Any) -> Localizer:
    """A `Localizer` on a model already in memory, which it reads and never changes. `settings` as of a `Localizer`;
    errors as `towers.adapt`."""
    return Localizer(towers.adapt(model, tokenizer), **settings)
