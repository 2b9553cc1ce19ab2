"""Encode an image once, locate prompts in it as often as you like: the localizer without training."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from open_gem import readout, towers
from open_gem.errors import InputError, MethodError, NotFiniteError, PromptError
from open_gem.exemplars import ExemplarCache, ExemplarFeatures
from open_gem.gradients import BeforeLastBlocks, is_gradient, run_to_last_blocks
from open_gem.images.pixels import ImageLike, check_size_rule, read_image, size_of, to_pixels
from open_gem.images.regions import RegionsLike, check_regions
from open_gem.images.views import WHOLE, Canvas, Views, check_views, crops, plan, stacked
from open_gem.localization import Localization
from open_gem.locate import AnyLocalizer, Methods, Prepared
from open_gem.method.guided import GUIDED, check_name, guided_by
from open_gem.method.run import Encoded, check_depth, run
from open_gem.method.table import Method, find_method
from open_gem.method.text_steps import TextStep, find_text_step
from open_gem.numerics import autocast
from open_gem.refine import Refinement, find_refinement
from open_gem.tensors import similarity
from open_gem.text import TEMPLATE, Exemplar, Prompts, Template, TextCache, Vocabulary, check_template
from open_gem.towers import Backbone
from open_gem.types import Size
from open_gem.windows import EncodedWindows, merge_features

if TYPE_CHECKING:
    from open_gem.towers.dino import Expert, ExpertGuide

SQUARE = 448  # pixels: smallest side of the square image that stands for any in `patches`


@dataclass(frozen=True, eq=False, repr=False)
class Localizer(AnyLocalizer):
    """Prompts in, localizations out; the model behind it stays as it is and may be shared between threads.

    backbone    the model, from `towers.load` or `towers.adapt`
    method      a name of `METHODS`, or settings; a *name* follows the temperature the checkpoint recommends and is no
                deeper than the model, settings are taken as they are
    size        how images are resized: "short:448", "long:N", "square:N", "native"; by default what the checkpoint
                recommends
    template    what a prompt is put into: a template, templates, or an ensemble by name, see `text.check_template`
    views       how an image is looked at: at once, through sliding windows, at several scales, mirrored too
    refinement  makes maps follow the edges of the image, such as `Pamr()`; or the name of one of `REFINEMENTS`
    remove_redundancy
                subtract what all prompts share (CLIP Surgery's "feature surgery"): with several prompts by
                `readout.remove_redundancy`; with one prompt, subtract the cosines of the empty prompt
    text_step   changes the prompts' embeddings and maps by what the image shows, such as `Cass()`; or the name of one
                of `TEXT_STEPS`

    Presence is the probability as trained for models trained with a sigmoid (SigLIP). For others it is the probability
    of the prompt against the empty prompt ("a photo of a .") and those of the background, whichever is likelier:
    1 / (1 + exp(logit_scale · (highest cosine of these − cosine of the prompt))).

    An exemplar is compared by patches alone: its presence is that of the most similar patch, calibrated on its own
    image, see `exemplars`.

    Raises MethodError, InputError and PromptError for an unknown method, a malformed size rule or template, or
    windows that do not fit the patches.
    """

    backbone: Backbone
    method: str | Method = "gem"
    size: str | None = None
    template: Template = TEMPLATE
    views: Views = WHOLE
    refinement: Refinement | None = None
    remove_redundancy: bool = False
    text_step: TextStep | None = None
    text: TextCache = field(init=False, repr=False)
    _exemplars: ExemplarCache = field(default_factory=ExemplarCache, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.refinement, str):
            object.__setattr__(self, "refinement", find_refinement(self.refinement))
        if isinstance(self.text_step, str):
            object.__setattr__(self, "text_step", find_text_step(self.text_step))
        # Raise now, not at the first image.
        check_depth(self.resolve(self.method), self.backbone.vision.layers)
        check_size_rule(self.size_rule)
        check_views(self.views, self.backbone.vision.patch)
        object.__setattr__(self, "text", TextCache(self.backbone, self.template))
        if self.refinement is not None:
            self.refinement.load(self.device)

    @property
    def name(self) -> str:
        return self.backbone.name

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def caution(self) -> str | None:
        return self.backbone.caution

    @property
    def size_rule(self) -> str:
        """How images are resized, see `images.pixels.SIZE_RULES`."""
        return self.backbone.recommended.size if self.size is None else self.size

    @property
    def layers(self) -> int:
        return self.backbone.vision.layers

    @property
    def patch(self) -> tuple[int, int]:
        return self.backbone.vision.patch

    def patches(self, size: Size | None = None) -> int:
        if size is None:
            side = max(SQUARE, *self.backbone.preprocess.image_size)
            size = Size(side, side)
        rows, columns = self.patch
        windows = (window for canvas in plan(self.views, self.size_rule, size, self.patch) for window in canvas.windows)
        return sum((window.height // rows) * (window.width // columns) for window in windows)

    @property
    def merges_maps(self) -> bool:
        return not self.views.sees_whole and self.views.merge == "logits"

    def configured(self, **settings: Any) -> "Localizer":
        other = replace(self, **settings)
        return other.acknowledge() if self._is_acknowledged else other

    def fingerprint(self) -> str:
        return self.backbone.fingerprint()

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.backbone.name,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "resampling": self.backbone.vision.resampling,
            "method": self.resolve(self.method).describe(),
            "size_rule": self.size_rule,
            "template": self.text.template,
            "views": asdict(self.views),
            "refinement": None if self.refinement is None else self.refinement.describe(),
            "remove_redundancy": self.remove_redundancy,
            "text_step": None if self.text_step is None else self.text_step.describe(),
        }

    def _traits(self) -> list[str]:
        attention = type(self.resolve(self.method).attention).__name__
        return [self.method if isinstance(self.method, str) else f"{attention} of the last {self.method.depth} blocks"]

    def resolve(self, method: str | Method) -> Method:
        """Return the settings that a method has on this backbone, see `resolve`."""
        return resolve(self.backbone, method)

    def methods(self, methods: Methods | None) -> dict[str, Method]:
        if methods is None or isinstance(methods, str | Method):
            return {"": self.resolve(self.method if methods is None else methods)}
        labelled = methods if isinstance(methods, Mapping) else {name: name for name in methods}
        if unlabelled := [label for label in labelled if not isinstance(label, str)]:
            raise MethodError(f"{unlabelled[0]!r} has no label, expected names, or a mapping of labels to settings")
        return {label: self.resolve(method) for label, method in labelled.items()}

    def prepare(self, image: ImageLike, regions: RegionsLike | None = None) -> Prepared:
        """Prepare one image for the model, and the `regions` in it for methods that take class-agnostic masks
        (CorrCLIP): `(y, x)` whole numbers of the image's size, 0 where there is none.

        Raises ImageError if the image cannot be read, or is too small or too large; InputError for other regions.
        """
        decoded, backbone = read_image(image), self.backbone
        original = size_of(decoded)
        canvases = plan(self.views, self.size_rule, original, backbone.vision.patch)
        pixels = to_pixels(decoded, canvases[0].size, backbone.preprocess) if self.views.sees_whole else None
        keep = not self.views.sees_whole or self.refinement is not None
        numbers = None if regions is None else check_regions(regions, original)
        return Prepared(original, canvases, pixels, decoded if keep else None, numbers)

    def _encode(
        self, group: Sequence[Prepared], methods: Mapping[str, Method], trace: Collection[str], batch_size: int
    ) -> list[dict[str, Encoded | EncodedWindows | BeforeLastBlocks]]:
        crop_by_crop = (
            crop
            for prepared in group
            for canvas in prepared.canvases
            for crop in crops(self._pixels_and_regions(prepared, canvas), canvas)
        )
        windows = self._run(crop_by_crop, methods, trace, batch_size)
        encoded = []
        for prepared in group:
            own = [[next(windows) for _ in canvas.windows] for canvas in prepared.canvases]
            encoded.append({label: self._merged(prepared, own, label, method) for label, method in methods.items()})
        return encoded

    def _run(
        self, windows: Iterable[Tensor], methods: Mapping[str, Method], trace: Collection[str], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """Encode each window, by the methods' labels; neighbours of one size share a pass."""
        vision, scale = self.backbone.vision, self.backbone.logit_scale
        gradients = {label: method for label, method in methods.items() if is_gradient(method)}
        plain = {label: method for label, method in methods.items() if label not in gradients}
        if gradients and not self.views.sees_whole:
            raise MethodError("gradients follow one view of the whole image: expected no windows, scales or flips")
        if gradients and (self.remove_redundancy or self.text_step is not None):
            changed = "redundancy removal is" if self.remove_redundancy else "steps on text are"
            raise MethodError(f"{changed} for cosines, expected a method without gradients")
        for batch in stacked(windows, batch_size):
            try:
                pixels, regions = batch[:, :3], batch[:, 3] if batch.shape[1] > 3 else None
                by_label: dict[str, Any] = {}
                if plain or not gradients:  # none at all is an error of `run`
                    by_label |= run(vision, pixels, plain, pooled=True, trace=trace, regions=regions)
                for label, method in gradients.items():
                    by_label[label] = run_to_last_blocks(vision, pixels, method, scale)
            except NotFiniteError as error:
                raise NotFiniteError(f"{self.name}: {error}") from error
            for index in range(len(batch)):
                yield {label: encoded.image(index) for label, encoded in by_label.items()}

    def _merged(
        self, prepared: Prepared, windows: Sequence[Sequence[Mapping[str, Any]]], label: str, method: Method
    ) -> Encoded | EncodedWindows | BeforeLastBlocks:
        """Merge the windows of one image by one method, canvas by canvas, and apply the method's steps."""
        source = prepared.image if self.refinement is not None else None
        if is_gradient(method):
            return replace(windows[0][0][label], original=prepared.original, source=source)
        own = [[by_label[label] for by_label in row] for row in windows]
        if self.merges_maps:
            own = [[window.stepped(method.steps) for window in row] for row in own]
            return EncodedWindows(prepared.canvases, own, prepared.original, source)
        whole = own[0][0] if prepared.pixels is not None else merge_features(prepared.canvases, own)
        return replace(whole.stepped(method.steps), original=prepared.original, source=source)

    def _pixels_and_regions(self, prepared: Prepared, canvas: Canvas) -> Tensor:
        """Return the pixels of a canvas, `(3, y, x)`, with regions as a fourth channel if they are known."""
        pixels = self._pixels(prepared, canvas)
        if prepared.regions is None:
            return pixels
        numbers = interpolate(prepared.regions[None, None].to(pixels), tuple(canvas.size), mode="nearest-exact")
        return torch.cat([pixels, numbers[0]])

    def _pixels(self, prepared: Prepared, canvas: Canvas) -> Tensor:
        if prepared.pixels is not None:
            return prepared.pixels
        assert prepared.image is not None, "kept by `prepare`"
        return to_pixels(prepared.image, canvas.size, self.backbone.preprocess)

    def check(self, prompts: Prompts) -> Vocabulary:
        vocabulary = Vocabulary.of(prompts)
        self.check_texts(vocabulary)
        for exemplar in vocabulary.exemplars:
            self._exemplar(exemplar, self.resolve(self.method))
        return vocabulary

    def check_texts(self, vocabulary: Vocabulary) -> None:
        self.text.check(prompt for prompt in vocabulary.all_prompts if not isinstance(prompt, Exemplar))
        if vocabulary.exemplars and self.remove_redundancy:
            raise PromptError("redundancy removal compares texts, expected no exemplar with it")

    def locate(self, encoded: Encoded | EncodedWindows | BeforeLastBlocks, prompts: Prompts) -> Localization:
        if not isinstance(encoded, Encoded | EncodedWindows | BeforeLastBlocks):
            kind = type(encoded).__name__
            raise InputError(f"encoded is a {kind}, expected what `encode` gives for one image and one method")
        vocabulary = Vocabulary.of(prompts)
        embeddings, exemplars = self._embed(vocabulary, encoded)
        pooled = encoded.pooled
        cosines = None if pooled is None else similarity(pooled, embeddings)[:, 0]
        highest: dict[int, list[Tensor]] = {index: [] for index in exemplars}

        step = self.text_step
        if step is not None and cosines is None:
            raise InputError("no pooled embedding, which the text step needs: run with pooled=True")

        texts = [index for index in range(len(embeddings) - 1) if index not in exemplars]

        def adapt(patches: Tensor) -> Tensor:
            """Adapt all texts but the empty one to `patches`."""
            assert step is not None and cosines is not None
            adapted = embeddings.clone()
            adapted[texts] = step.adapt(embeddings[texts], patches, cosines[texts])
            return adapted

        def adjust(maps: Tensor) -> Tensor:
            """Adjust cosines `(..., q + 1, r, k)` with all prompts and the empty one → `(..., q, r, k)`."""
            own = without_redundancy(maps)
            if step is not None and cosines is not None:
                own[..., texts, :, :] = step.mix(own[..., texts, :, :], cosines[texts])
            return own

        def without_redundancy(maps: Tensor) -> Tensor:
            own, empty = maps[..., :-1, :, :], maps[..., -1:, :, :]
            for index, calibrate in exemplars.items():
                own[..., index, :, :] = calibrate(own[..., index, :, :])
                highest[index].append(own[..., index, :, :].max())
            if not self.remove_redundancy:
                return own
            if len(embeddings) == 2:
                return own - empty
            if cosines is None:
                raise InputError("no pooled embedding, which redundancy removal needs: run with pooled=True")
            return readout.remove_redundancy(own, cosines[:-1])

        maps = encoded.maps(embeddings if step is None else adapt, adjust)
        if cosines is not None:
            for index, values in highest.items():
                cosines[index] = torch.stack(values).max()
        located = Localization(
            vocabulary.labels,
            maps,
            encoded.original or encoded.size,
            None if cosines is None else vocabulary.best(cosines[:-1]),
            None if isinstance(encoded, BeforeLastBlocks) else self.backbone.logit_scale,
            presence=None if cosines is None else self._presence(vocabulary, cosines, exemplars),
            vocabulary=vocabulary,
        )
        if self.refinement is None:
            return located
        if encoded.source is None:
            raise InputError("encoded without the image, which the refinement needs: encode images by this localizer")
        return self.refinement.refine(encoded.source, located)

    def _embed(
        self, vocabulary: Vocabulary, encoded: Encoded | EncodedWindows | BeforeLastBlocks
    ) -> tuple[Tensor, dict[int, "Calibration"]]:
        """Return embeddings `(q + 1, e)` of all prompts and of the empty one, with which others are compared; and for
        each exemplar among them what brings its cosines to a text's scale."""
        prompts = vocabulary.all_prompts
        text = self.text(["" if isinstance(prompt, Exemplar) else prompt for prompt in (*prompts, "")])
        if not vocabulary.exemplars:
            return text, {}
        self.check_texts(vocabulary)
        if encoded.method is None:
            raise InputError("encoded by an unknown method, so exemplars cannot be: encode images by this localizer")
        calibrations = {}
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, Exemplar):
                features = self._exemplar(prompt, encoded.method)
                calibrations[index] = Calibration(
                    features, self._neutral(features, text[-1:]), self.backbone.logit_scale
                )
                text[index] = features.embedding.to(text)
        return text, calibrations

    def _exemplar(self, exemplar: Exemplar, method: Method) -> ExemplarFeatures:
        """Return an exemplar's features by a method, seen at once if windows are merged as maps."""
        if is_gradient(method):
            raise PromptError(f"gradients follow texts, not the exemplar {exemplar.name!r}: use another method")
        viewer = self.configured(views=WHOLE) if self.merges_maps else self
        how = method, self.backbone.weights_version, frozenset(autocast().items())
        return self._exemplars(exemplar, how, lambda image: viewer.encode(image, method))

    def _neutral(self, features: ExemplarFeatures, empty: Tensor) -> float:
        """Return the cosine at which a text's presence is ½: that of the sigmoid's bias, or of the patches with the
        empty prompt `(1, e)`."""
        if (bias := self.backbone.logit_bias) is not None:
            return -bias / self.backbone.logit_scale
        return similarity(features.patches, empty.to(features.patches.device)).mean().item()

    def _presence(self, vocabulary: Vocabulary, cosines: Tensor, exemplars: Mapping[int, "Calibration"]) -> Tensor:
        """Return presence `(p,)` from the `cosines` `(q + 1,)` of the whole image with all prompts and the empty
        one."""
        scale, bias = self.backbone.logit_scale, self.backbone.logit_bias
        own = cosines[:-1].clone()
        if bias is None:
            background = [
                index
                for index, group in enumerate(vocabulary.groups)
                if group < 0 and index not in exemplars  # its value is no image-level cosine
            ]
            own -= cosines[[*background, -1]].max()
        else:
            own += bias / scale
        for index, calibration in exemplars.items():
            own[index] = cosines[index] - calibration.neutral
        return (scale * vocabulary.best(own)).sigmoid()


class Calibration(NamedTuple):
    """Brings cosines with an exemplar to the scale of those with texts."""

    features: ExemplarFeatures
    neutral: float
    logit_scale: float

    def __call__(self, cosines: Tensor) -> Tensor:
        return self.features.calibrate(cosines, self.neutral, self.logit_scale)


def resolve(backbone: Backbone, method: str | Method) -> Method:
    """Return the settings of a method on a backbone. A name has the temperature that the checkpoint recommends for
    adaptive methods, and no more depth than the model; settings are returned unchanged, but for the names of experts in
    their steps. Experts, such as NAME of "proxyclip:NAME", are loaded then.

    Raises MethodError for an unknown name, and errors as `towers.dino.load_expert`.
    """
    if isinstance(method, Method):
        return method.guided(lambda expert: _guide(expert, backbone))
    if (guided := guided_by(method)) is not None:
        kind, expert = guided
        return GUIDED[kind](_guide(expert, backbone))
    known = find_method(method).fitted(backbone.vision.layers)
    attention = known.attention.rescaled(backbone.recommended.temperature_scale)
    return known if attention is known.attention else replace(known, attention=attention)


def _guide(expert: str, backbone: Backbone) -> "ExpertGuide":
    from open_gem.towers.dino import guide

    return guide(_expert(expert, backbone.device, backbone.dtype), backbone)


@lru_cache(maxsize=2)
def _expert(name: str, device: torch.device, dtype: torch.dtype) -> "Expert":
    from open_gem.towers.dino import load_expert

    return load_expert(name, device=device, dtype=dtype)


def load(
    name: str | PathLike[str] | None = None,
    pretrained: str | None = None,
    *,
    method: str | Method = "gem",
    size: str | None = None,
    template: Template = TEMPLATE,
    views: Views = WHOLE,
    refinement: Refinement | None = None,
    remove_redundancy: bool = False,
    text_step: TextStep | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    cache_dir: str | None = None,
) -> Localizer:
    """Load a `Localizer` with pretrained weights: `load()` for OpenAI's CLIP ViT-B/16, `load("ViT-L-14", "openai")`,
    `load("openai/clip-vit-base-patch16")`, `load("hf-hub:org/repo")`, `load("folder")`; `load("embedded")` for the
    model in the package, which knows drawn objects alone.

    The settings as of a `Localizer`, checked before anything is loaded; the rest, and errors, as `towers.load`.
    """
    if isinstance(method, str):
        check_name(method)
    if size is not None:
        check_size_rule(size)
    check_template(template)
    backbone = towers.load(name, pretrained, device=device, dtype=dtype, cache_dir=cache_dir)
    return Localizer(backbone, method, size, template, views, refinement, remove_redundancy, text_step)


def adapt(model: Any, tokenizer: Any, **settings: Any) -> Localizer:
    """Make a `Localizer` of a model already in memory, which it reads and never changes. `settings` as of a
    `Localizer`; errors as `towers.adapt`."""
    return Localizer(towers.adapt(model, tokenizer), **settings)
