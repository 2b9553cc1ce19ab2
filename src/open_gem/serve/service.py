"""From the bytes of an upload to a localization: decoding in a few threads, the model in one, features kept between."""

import asyncio
import hashlib
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from open_gem.errors import InputError, NotFiniteError
from open_gem.imaging import read_header, read_image, size_of
from open_gem.localization import Localization
from open_gem.localizer import Localizer
from open_gem.methods import PATHWAYS
from open_gem.pathway import Features
from open_gem.prompts import Vocabulary
from open_gem.serve.cache import Cache, Seen
from open_gem.serve.errors import RequestError
from open_gem.serve.metrics import Metrics
from open_gem.serve.settings import Settings
from open_gem.serve.worker import Kind, Worker
from open_gem.types import Size

Made = TypeVar("Made")

PHRASES = 32  # that count as much as one image in a batch


class Look(NamedTuple):
    """An image to be read by some pathways."""

    pixels: Tensor
    pathways: tuple[str, ...]


class Question(NamedTuple):
    """Phrases asked of an image that was read."""

    features: Features
    vocabulary: Vocabulary
    size: Size


@dataclass(frozen=True, eq=False)
class Decoded:
    """An uploaded picture: its size upright, and the pixels the model shall see."""

    size: Size
    pixels: Tensor


class Service:
    """What routes ask. One event loop owns it; `close` ends its threads.

    Raises InputError for a localizer whose views or refinement need the picture itself, of which a server keeps only
    what the model sees.
    """

    def __init__(self, localizer: Localizer, settings: Settings, metrics: Metrics):
        if not localizer.views.is_plain or localizer.refinement is not None:
            raise InputError("a server keeps features, not pictures: expected a localizer without views and refinement")
        self.localizer, self.settings, self.metrics = localizer, settings, metrics
        self.name, self.pathways = localizer.backbone.name, {name: row.about for name, row in PATHWAYS.items()}
        self.default = "gem"
        self.cache = Cache(settings.cache_bytes)
        self.worker = Worker(metrics.saw_batch)
        self._threads = ThreadPoolExecutor(settings.threads, "open_gem pictures")
        self._key = secrets.token_bytes(32)
        self._look = Kind(
            "look", self._look_at, lambda look: (look.pixels.shape, look.pathways), _one, settings.max_batch
        )
        self._ask = Kind("ask", self._answer, _nothing, _phrases, settings.max_batch * PHRASES)

    def close(self) -> None:
        self.worker.stop()
        self._threads.shutdown()

    async def warm_up(self) -> None:
        """The first pass of a model is slow: let no client wait for it."""
        sides = (side * 4 for side in self.localizer.backbone.patch)
        blank = torch.zeros(3, *sides, dtype=torch.float32, device="cpu")
        first = self._first_pathways()
        phrase = next(iter(self.localizer.backbone.concepts), "a photo")
        try:
            features = await self.worker.do(self._look, Look(blank, first))
            question = Question(features[first[0]], Vocabulary.of(phrase), Size(*blank.shape[1:]))
            await self.worker.do(self._ask, question)
        except NotFiniteError as error:  # clients are told the same
            warnings.warn(str(error), stacklevel=1)

    async def in_thread(self, work: Callable[..., Made], *given: object) -> Made:
        """Run what takes a processor's time, where it holds up neither the event loop nor the model."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)

    async def fetch(self, work: Callable[..., Made], *given: object) -> Made:
        """Run what waits for another machine, where it holds up no thread that others need."""
        return await asyncio.to_thread(work, *given)

    async def told(self, work: Callable[..., Made], found: Localization, **options: Any) -> Made:
        """`work(found, gone, **options)` in a thread; `gone` is set when nobody waits for it any more."""
        gone = Event()
        try:
            return await self.in_thread(partial(work, found, gone, **options))
        finally:
            gone.set()

    async def see(self, data: bytes, *, keep: bool) -> Seen:
        """The image of an upload, read by the settings' pathways; from the cache where the same bytes are there. `keep`
        it there. Raises RequestError and ImageError for what is no picture that is taken."""
        id = await self.in_thread(self._id_of, data)
        if (known := self.find(id)) is not None:
            return known
        decoded = await self.in_thread(self._decode, data)
        features = await self.worker.do(self._look, Look(decoded.pixels, self._first_pathways()))
        grid = next(iter(features.values())).grid
        seen = Seen(id, decoded.size, grid, decoded.pixels, features)
        if keep:
            self._keep(seen)
        return seen

    def find(self, id: str) -> Seen | None:
        """The image in the cache."""
        seen = self.cache.get(id)
        self.metrics.looked_up(found=seen is not None)
        return seen

    def drop(self, id: str) -> bool:
        dropped = self.cache.drop(id)
        self.metrics.holds(self.cache)
        return dropped

    async def ask(self, seen: Seen, prompts: Sequence[str] | Mapping[str, Sequence[str]], pathway: str) -> Localization:
        """What a pathway makes of phrases. Raises RequestError and PromptError for phrases beyond the limits, or a
        pathway that is not served."""
        vocabulary = self.check(prompts, pathway)
        if pathway not in seen.features:
            seen = seen.with_features(await self.worker.do(self._look, Look(seen.pixels, (pathway,))))
            if (kept := self.cache.get(seen.id)) is not None:
                self._keep(kept.with_features(seen.features))
        return await self.worker.do(self._ask, Question(seen.features[pathway], vocabulary, seen.size))

    # Checks -----------------------------------------------------------------------------------------------------------

    def named(self, pathway: str | None) -> str:
        """The pathway that is meant: the default where none is named."""
        return self.default if pathway is None else pathway

    def check(self, prompts: Sequence[str] | Mapping[str, Sequence[str]], pathway: str) -> Vocabulary:
        """The phrases, as labels. Raises as `ask`, before anything is computed."""
        if pathway not in self.pathways:
            raise RequestError(422, f"pathway {pathway!r} is not served; there are: {', '.join(self.pathways)}")
        vocabulary, limits = Vocabulary.of(prompts), self.settings
        if len(vocabulary.phrases) > limits.max_prompts:
            raise RequestError(422, f"{len(vocabulary.phrases)} phrases, expected {limits.max_prompts} at most")
        longest = max(map(len, vocabulary.phrases))
        if longest > limits.max_prompt:
            raise RequestError(422, f"a phrase has {longest} characters, expected {limits.max_prompt} at most")
        self.localizer.text.check(vocabulary.phrases)  # here, for later it would befall all that are asked with it
        return vocabulary

    # Pictures ---------------------------------------------------------------------------------------------------------

    def _id_of(self, data: bytes) -> str:
        """The same for the same bytes, and not to be guessed from outside."""
        return hashlib.blake2b(data, digest_size=16, key=self._key).hexdigest()

    def _decode(self, data: bytes) -> Decoded:
        header = read_header(data)
        if header.format not in self.settings.formats:
            raise RequestError(415, f"a picture of format {header.format}, expected {', '.join(self.settings.formats)}")
        if header.size.height * header.size.width > self.settings.max_pixels:
            given, limit = "x".join(map(str, header.size)), self.settings.max_pixels
            raise RequestError(413, f"the picture is {given} pixels, expected {limit} pixels at most")
        picture = read_image(data)
        return Decoded(size_of(picture), self.localizer.pixels(picture))

    def _keep(self, seen: Seen) -> None:
        self.cache.put(seen)
        self.metrics.holds(self.cache)

    def _first_pathways(self) -> tuple[str, ...]:
        return tuple(name for name in self.settings.pathways if name in self.pathways) or (self.default,)

    # The model, in its own thread -------------------------------------------------------------------------------------

    def _look_at(self, looks: Sequence[Look]) -> list[dict[str, Features]]:
        found = self.localizer.read(torch.stack([look.pixels for look in looks]), looks[0].pathways)
        return [{name: _alone(features, index) for name, features in found.items()} for index in range(len(looks))]

    def _answer(self, questions: Sequence[Question]) -> list[Localization]:
        localizer = self.localizer
        localizer.text(tuple(dict.fromkeys(_all_phrases(questions))))  # all new ones in one pass
        return [
            _on_cpu(localizer.locate(_on(features, localizer.backbone.device), vocabulary, [size])[0])
            for features, vocabulary, size in questions
        ]


def _all_phrases(questions: Iterable[Question]) -> Iterable[str]:
    for question in questions:
        yield from question.vocabulary.phrases


def _one(look: Look) -> int:
    return 1


def _nothing(question: Question) -> None:
    return None


def _phrases(question: Question) -> int:
    return len(question.vocabulary.phrases)


def _alone(features: Features, index: int) -> Features:
    """Those of one image, on the CPU, and not a view that keeps its whole batch alive."""
    one = features.image(index)
    pooled = None if one.pooled is None else one.pooled.cpu().clone()
    return replace(one, tokens=one.tokens.cpu().clone(), pooled=pooled)


def _on(features: Features, device: torch.device) -> Features:
    pooled = None if features.pooled is None else features.pooled.to(device)
    return replace(features, tokens=features.tokens.to(device), pooled=pooled)


def _on_cpu(result: Localization) -> Localization:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float().cpu()

    return replace(result, maps=result.maps.to("cpu"), scores=moved(result.scores), presence=moved(result.presence))
