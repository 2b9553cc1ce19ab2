"""The path from images and prompts to localizations, for every kind of model:

    prepared = localizer.prepare(image)                   # decoded, resized, normalised
    encoded  = localizer.encode(prepared, "gem")          # one pass of the model; windows merged, steps applied
    result   = localizer.locate(encoded, ["a cat"])       # a `Localization`, refined

Calling the localizer does all three. Labelling, evaluation and serving call the same functions.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast, overload

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from open_gem.errors import ImageError, MethodError, OpenGemWarning, PromptError
from open_gem.images.pixels import ImageLike
from open_gem.images.views import Canvas
from open_gem.localization import Localization
from open_gem.method.table import Method
from open_gem.text import Exemplar, Prompts, TextCache, Vocabulary
from open_gem.types import Size

BATCH = 16  # images or windows encoded at a time: bounds memory when there are many

ImagePrompts = Prompts | Iterable[Prompts]  # for all images; or a list, one per image
Methods = str | Method | Mapping[str, str | Method] | Iterable[str]  # one; or several, by their names or own labels
T = TypeVar("T")
L = TypeVar("L", bound="AnyLocalizer")


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image made ready for a model: decoded once, then only this travels.

    original  size of the image itself, upright
    canvases  the image at each scale, with the windows through which the model sees it
    pixels    `(3, y, x)` float32, normalised, if there is a single window; others are made when they are encoded
    image     the RGB image, if windows or a refinement need it
    regions   `(y, x)` int32, the numbers of class-agnostic masks in the image itself, if they are known
    """

    original: Size
    canvases: tuple[Canvas, ...] = ()
    pixels: Float[Tensor, "3 y x"] | None = None
    image: Image.Image | None = None
    regions: Int[Tensor, "y x"] | None = None

    @property
    def shape(self) -> Hashable:
        """Images with equal shapes can be encoded together; None for an image that fills batches by itself."""
        return None if self.pixels is None else tuple(self.pixels.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors and of the image."""
        image = 0 if self.image is None else 3 * self.image.height * self.image.width
        return image + sum(tensor.nbytes for tensor in (self.pixels, self.regions) if tensor is not None)


class AnyLocalizer(ABC):
    """Images and prompts in, localizations out. Subclasses say how images are prepared, encoded and located in."""

    text: TextCache
    _is_acknowledged = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's name, for people."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def caution(self) -> str | None:
        """What the model is not for, in one line; None if there is nothing to say.

        The first image that is encoded gives it as an `OpenGemWarning`, unless `acknowledge` was called.
        """
        return None

    @property
    @abstractmethod
    def layers(self) -> int:
        """Number of blocks that methods can read; 0 for a model that was trained to localize."""

    @property
    @abstractmethod
    def patch(self) -> tuple[int, int] | None:
        """Height and width of a patch in pixels; None for a model that was trained to localize."""

    @abstractmethod
    def patches(self, size: Size | None = None) -> int:
        """Return the number of patches that the model sees of an image of `size`, in all views: encoding costs this.

        None stands for a square image, such as the model was trained on. Raises ImageError as `prepare`.
        """

    @property
    def merges_maps(self) -> bool:
        """True if similarity maps are merged at pixel size: there is no patch grid then."""
        return False

    @property
    def predicts_boxes(self) -> bool:
        """True if the model predicts boxes itself: objects are these, and do not follow from its maps."""
        return False

    def acknowledge(self: L) -> L:
        """Return the same localizer without warnings of its `caution`: for callers that report it themselves, or whose
        images it does not concern."""
        object.__setattr__(self, "_is_acknowledged", True)
        return self

    def _warn(self) -> None:
        """Give the caution once, as a warning about the line that calls the caller."""
        if self.caution is not None and not self._is_acknowledged:
            self.acknowledge()
            warnings.warn(self.caution, OpenGemWarning, stacklevel=3)

    @abstractmethod
    def configured(self, **settings: Any) -> "AnyLocalizer":
        """Return the same model with other settings of a `Localizer`; a model that was trained to localize keeps its
        own."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return 12 hex digits for the weights: the same for equal names, shapes, types and values, on any device."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return everything that decides a result, except the prompts, as values that JSON can hold."""

    @abstractmethod
    def prepare(self, image: ImageLike) -> Prepared:
        """Prepare one image for the model. Raises ImageError if it cannot be read, or is too small or too large."""

    @abstractmethod
    def methods(self, methods: Methods | None) -> dict[str, Any]:
        """Return settings by label, for one method, or for several by name or by label. A trained model has a single
        one without a name.

        Raises MethodError for an unknown name, or settings without a label.
        """

    def check(self, prompts: Prompts) -> Vocabulary:
        """Return prompts as a vocabulary. Raises PromptError for those that this model cannot locate, and for exemplars
        that cannot be read."""
        vocabulary = Vocabulary.of(prompts)
        self.check_texts(vocabulary)
        return vocabulary

    def check_texts(self, vocabulary: Vocabulary) -> None:
        """Raise PromptError for texts that this model cannot locate, and for exemplars if it takes none; nothing is
        computed."""
        self.text.check(vocabulary.all_prompts)

    @abstractmethod
    def locate(self, encoded: Any, prompts: Prompts) -> Localization:
        """Locate prompts in one encoded image. Prompts and errors as when called.

        The result does not know the image: call `result.plot(image)` to draw it.
        """

    @abstractmethod
    def _encode(
        self, group: Sequence[Prepared], methods: Mapping[str, Any], trace: Collection[str], batch_size: int
    ) -> list[dict[str, Any]]:
        """Encode images of one shape, by every method."""

    @overload
    def __call__(self, images: ImageLike, prompts: Prompts, *, progress: bool = False) -> Localization: ...
    @overload
    def __call__(
        self, images: list[Any] | tuple[Any, ...], prompts: ImagePrompts, *, progress: bool = False
    ) -> list[Localization]: ...
    def __call__(
        self, images: ImageLike | list[Any] | tuple[Any, ...], prompts: ImagePrompts, *, progress: bool = False
    ) -> Localization | list[Localization]:
        """Localize `prompts` in one image, or in a list of them (then a list comes back, in order).

        `prompts` is a prompt (a text or an `Exemplar`), several, a mapping of labels to them, or a `Vocabulary`; for a
        list of images, the same for all or a list with one per image. Images that come to the same size are encoded
        together. Raises ImageError, PromptError or InputError, before anything is computed. `progress` shows a bar for
        a list, in a terminal or a notebook.

        Each result keeps a reference to its image, as it came here, to be drawn on: see `Localization.image`.
        """
        self._warn()
        if not isinstance(images, list | tuple):
            vocabulary = Vocabulary.of(cast(Prompts, prompts))
            return replace(self.locate(self.encode(images), vocabulary), image=images)
        vocabularies = prompts_by_image(prompts, len(images))
        prepared = prepare_all(images, self.prepare)
        results: dict[int, Localization] = {}
        with tqdm(total=len(images), unit="image", disable=not progress) as bar:
            for group in by_shape(range(len(prepared)), lambda index: prepared[index].shape, BATCH):
                for index, encoded in zip(group, self.encode([prepared[index] for index in group]), strict=True):
                    results[index] = replace(self.locate(encoded, vocabularies[index]), image=images[index])
                    bar.update()
        return [results[index] for index in range(len(images))]

    def __repr__(self) -> str:
        settings = [self.describe()["size_rule"], self.describe()["dtype"], f"on {self.device}"]
        return f"<{type(self).__name__} {self.name}: {', '.join([*self._traits(), *settings])}>"

    def _traits(self) -> list[str]:
        """Return what `repr` says first, such as the method."""
        return []

    def encode(
        self,
        images: Any,
        methods: Methods | None = None,
        *,
        trace: Collection[str] = (),
        batch_size: int = BATCH,
    ) -> Any:
        """Encode images by one or several methods, before any prompt: keep the result, and call `locate` as often as
        you like.

        images      an image, or what `prepare` made of it; or a list of them, then a list comes back, in order
        methods     None for the localizer's own, one name or `Method`: an `Encoded` per image. Several names, or a
                    mapping of labels to names and settings: a dict of them, read from one pass of the model
        trace       labels of methods whose stream after each block is wanted too, see `run`
        batch_size  images or windows in a pass

        Raises ImageError and MethodError.
        """
        self._warn()
        several = methods is not None and not isinstance(methods, str | Method)
        chosen = self.methods(methods)
        if unknown := set(trace) - chosen.keys():
            raise MethodError(
                f"trace names {sorted(unknown)[0]!r}, expected labels of `methods`, given as a list or mapping"
            )
        is_list = isinstance(images, list | tuple)
        prepared = prepare_all(images, self._prepared) if is_list else [self._prepared(images)]
        results: dict[int, Any] = {}
        for group in by_shape(range(len(prepared)), lambda index: prepared[index].shape, batch_size):
            encoded = self._encode([prepared[index] for index in group], chosen, trace, batch_size)
            results |= dict(zip(group, encoded, strict=True))
        ordered = [results[index] for index in range(len(prepared))]
        if not several:
            ordered = [next(iter(encoded.values())) for encoded in ordered]
        return ordered if is_list else ordered[0]

    def _prepared(self, image: ImageLike | Prepared) -> Prepared:
        return image if isinstance(image, Prepared) else self.prepare(image)


def prepare_all(images: Sequence[ImageLike], prepare: Callable[[ImageLike], T]) -> list[T]:
    """Prepare each image. Raises ImageError that says which image it was."""
    prepared = []
    for index, image in enumerate(images):
        try:
            prepared.append(prepare(image))
        except ImageError as error:
            raise ImageError(f"image {index}: {error}") from error
    return prepared


def by_shape(
    items: Iterable[T], shape: Callable[[T], Hashable], limit: int | Callable[[], int], waiting: int | None = None
) -> Iterator[list[T]]:
    """Group items by shape, `limit` at most; an item whose shape is None is a group by itself.

    waiting  with so many items waiting the largest group goes, full or not; None: only full groups go
    """
    groups: dict[Hashable, list[T]] = {}
    count = 0
    for item in items:
        if (key := shape(item)) is None:
            yield [item]
            continue
        groups.setdefault(key, []).append(item)
        count += 1
        full = len(groups[key]) >= (limit if isinstance(limit, int) else limit())
        if full or (waiting is not None and count >= waiting):
            group = groups.pop(key if full else max(groups, key=lambda key: len(groups[key])))
            count -= len(group)
            yield group
    yield from groups.values()


def prompts_by_image(prompts: ImagePrompts, count: int) -> list[Vocabulary]:
    """Return a vocabulary for each image, from prompts for all or a list of prompts per image."""
    listed = prompts
    if isinstance(prompts, Iterable) and not isinstance(prompts, str | Exemplar | Mapping | Vocabulary):
        listed = list(prompts)
        if listed and all(isinstance(entry, Iterable | Vocabulary) and not isinstance(entry, str) for entry in listed):
            if len(listed) != count:
                raise PromptError(
                    f"{len(listed)} lists of prompts for {count} images, expected one per image or one list for all"
                )
            return [Vocabulary.of(entry) for entry in listed]
    return [Vocabulary.of(cast(Prompts, listed))] * count
