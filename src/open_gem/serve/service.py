"""From the bytes of an upload to a localization: decoding in a few threads, the model in one, features kept between.

The limits in `Settings` bound what a request takes of any of these, and long work is done in pieces (a pass of the
model, the maps of a prompt), between which other requests have their turn.
"""

import asyncio
import hashlib
import secrets
import warnings
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from open_gem.errors import InputError, NotFiniteError
from open_gem.images.decoder import Decoder
from open_gem.images.pixels import size_of, target_size
from open_gem.localization import Localization
from open_gem.localizer import Localizer
from open_gem.method.run import Encoded
from open_gem.method.table import METHODS
from open_gem.serve.answers import by_prompt
from open_gem.serve.cache import Cache, Seen
from open_gem.serve.errors import RequestError
from open_gem.serve.metrics import Metrics
from open_gem.serve.schemas import SQUARE
from open_gem.serve.settings import Settings
from open_gem.serve.uploads import parse_json
from open_gem.serve.worker import Kind, Worker
from open_gem.text import Vocabulary
from open_gem.types import Grid, Size

Given = TypeVar("Given")
Made = TypeVar("Made")

PHRASES = 32  # that count as much as one image in a batch
LARGE = 4_000_000  # pixels: images of more are decoded, and their maps made, one at a time
STRIP = 6  # times as many patches as a square picture has are taken where `max_patches` is not set
SIDE = 448  # pixels: the side of that picture, of which the size rule "native" makes its patches


class Look(NamedTuple):
    """An image to be read by some methods."""

    pixels: Tensor
    methods: tuple[str, ...]


class Question(NamedTuple):
    """Phrases asked of an image that was read."""

    features: Encoded
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
        self.name, self.methods = localizer.backbone.name, {name: row.about for name, row in METHODS.items()}
        self.default = "gem"
        self.cache = Cache(settings.cache_bytes)
        self.worker = Worker(metrics.saw_batch)
        self._threads = ThreadPoolExecutor(settings.threads, "open_gem pictures")
        self._decoders = ThreadPoolExecutor(settings.threads, "open_gem decoders")  # each waits for a process
        self._large = ThreadPoolExecutor(1, "open_gem large images")  # one at a time, so that small ones go past them
        self._decoder = Decoder(settings.threads + 1)
        self._parser = ThreadPoolExecutor(1, "open_gem JSON")
        side = max(SIDE, *localizer.backbone.preprocess.image_size)
        square = self._grid(target_size(localizer.size_rule, Size(side, side), localizer.backbone.patch)).patches
        self.max_patches = settings.max_patches or STRIP * square
        self._key = secrets.token_bytes(32)
        self._look = Kind(
            "look",
            self._look_at,
            lambda look: (look.pixels.shape, look.methods),
            lambda look: max(self._grid(look.pixels.shape[1:]).patches, 2 * square),
            settings.max_batch * 2 * square,
        )
        self._ask = Kind("ask", self._answer, _nothing, _phrases, settings.max_batch * PHRASES)

    def close(self) -> None:
        """End the threads, or leave behind those that have not ended after `stop_seconds`."""
        for pool in (self._threads, self._decoders, self._large, self._parser):
            pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self.worker.stop(self.settings.stop_seconds)

    async def warm_up(self) -> None:
        """The first pass of a model is slow, and so is the start of a decoder: let no client wait for them."""
        loop, square = asyncio.get_running_loop(), b64decode(SQUARE)
        starts = (loop.run_in_executor(self._decoders, self._read, square) for _ in range(self.settings.threads))
        await asyncio.gather(*starts)
        sides = (side * 4 for side in self.localizer.backbone.vision.patch)
        blank = torch.zeros(3, *sides, dtype=torch.float32, device="cpu")
        first = self._first_methods()
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

    async def parse(self, body: bytes) -> Any:
        """The JSON document of a body, in a thread that has nothing else to do. Raises RequestError."""
        return await asyncio.get_running_loop().run_in_executor(
            self._parser, parse_json, body, self.settings.max_values
        )

    async def side_by_side(self, work: Callable[[Given], Awaitable[Made]], given: Iterable[Given]) -> list[Made]:
        """What comes of each, in order. As many are worked on at once as can share a pass of the model."""
        room = asyncio.Semaphore(self.settings.max_batch)

        async def one(item: Given) -> Made:
            async with room:
                return await work(item)

        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(one(item)) for item in given]
        return [task.result() for task in started]

    async def each_prompt(
        self, work: Callable[..., Made], found: Localization, *, places: bool = True, **options: Any
    ) -> list[Made]:
        """`work(label, **options)` for each prompt, in a thread: others come between two prompts, and nothing more is
        begun once nobody waits for it. Raises RequestError for too many maps at the picture's size; `places`: whether
        work makes them."""
        pixels, most = found.size.height * found.size.width, self.settings.max_map_pixels
        if places and pixels * len(found.prompts) > most:
            raise RequestError(
                413,
                f"{len(found.prompts)} prompts on a picture of {found.size.height}x{found.size.width} pixels make maps "
                f"of {pixels * len(found.prompts)} pixels, expected {most} at most: ask {most // pixels} at a time",
            )
        pool, loop = self._large if places and is_large(found.size) else self._threads, asyncio.get_running_loop()
        return [await loop.run_in_executor(pool, partial(work, label, **options)) for label in by_prompt(found)]

    async def see(self, data: bytes, *, keep: bool) -> Seen:
        """The image of an upload, read by the settings' methods; from the cache where the same bytes are there. `keep`
        it there. Raises RequestError and ImageError for what is no picture that is taken."""
        id = await self.in_thread(self._id_of, data)
        if (known := self.find(id)) is not None:
            return known
        loop = asyncio.get_running_loop()
        size = await loop.run_in_executor(self._decoders, self._check_header, data)
        decoded = await loop.run_in_executor(self._large if is_large(size) else self._decoders, self._decode, data)
        features = await self.worker.do(self._look, Look(decoded.pixels, self._first_methods()))
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

    async def ask(self, seen: Seen, prompts: Sequence[str] | Mapping[str, Sequence[str]], method: str) -> Localization:
        """What a method makes of phrases. Raises RequestError and PromptError for phrases beyond the limits, or a
        method that is not served."""
        vocabulary = self.check(prompts, method)
        if method not in seen.features:
            seen = seen.with_features(await self.worker.do(self._look, Look(seen.pixels, (method,))))
            if (kept := self.cache.get(seen.id)) is not None:
                self._keep(kept.with_features(seen.features))
        return await self.worker.do(self._ask, Question(seen.features[method], vocabulary, seen.size))

    # Checks -----------------------------------------------------------------------------------------------------------

    def named(self, method: str | None) -> str:
        """The method that is meant: the default where none is named."""
        return self.default if method is None else method

    def check(self, prompts: Sequence[str] | Mapping[str, Sequence[str]], method: str) -> Vocabulary:
        """The phrases, as labels. Raises as `ask`, before anything is computed."""
        if method not in self.methods:
            raise RequestError(422, f"method {method!r} is not served; there are: {', '.join(self.methods)}")
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

    def _check_header(self, data: bytes) -> Size:
        """The image's size as stored. Raises RequestError and ImageError for one that is not to be decoded."""
        header = self._decoder.read_header(data, seconds=self.settings.decode_seconds)
        if header.format not in self.settings.formats:
            raise RequestError(415, f"a picture of format {header.format}, expected {', '.join(self.settings.formats)}")
        if header.size.height * header.size.width > self.settings.max_pixels:
            given, limit = "x".join(map(str, header.size)), self.settings.max_pixels
            raise RequestError(413, f"the picture is {given} pixels, expected {limit} pixels at most")
        rule, patch = self.localizer.size_rule, self.localizer.backbone.patch
        target_size(rule, header.size, patch, max_patches=self.max_patches)
        return header.size

    def _decode(self, data: bytes) -> Decoded:
        picture = self._read(data)
        return Decoded(size_of(picture), self.localizer.pixels(picture))

    def _read(self, data: bytes) -> Image.Image:
        return self._decoder.read(data, seconds=self.settings.decode_seconds, max_pixels=self.settings.max_pixels)

    def _grid(self, size: Sequence[int]) -> Grid:
        return Grid(*(pixels // side for pixels, side in zip(size, self.localizer.backbone.patch, strict=True)))

    def _keep(self, seen: Seen) -> None:
        self.cache.put(seen)
        self.metrics.holds(self.cache)

    def _first_methods(self) -> tuple[str, ...]:
        return tuple(name for name in self.settings.methods if name in self.methods) or (self.default,)

    # The model, in its own thread -------------------------------------------------------------------------------------

    def _look_at(self, looks: Sequence[Look]) -> list[dict[str, Encoded]]:
        found = self.localizer.read(torch.stack([look.pixels for look in looks]), looks[0].methods)
        return [{name: _alone(features, index) for name, features in found.items()} for index in range(len(looks))]

    def _answer(self, questions: Sequence[Question]) -> list[Localization]:
        localizer = self.localizer
        localizer.text(tuple(dict.fromkeys(_all_phrases(questions))))  # all new ones in one pass
        return [
            _on_cpu(localizer.locate(_on(features, localizer.backbone.device), vocabulary, [size])[0])
            for features, vocabulary, size in questions
        ]


def is_large(size: Size) -> bool:
    """Whether work at the image's own size takes so long that others should not wait behind it."""
    return size.height * size.width > LARGE


def _all_phrases(questions: Iterable[Question]) -> Iterable[str]:
    for question in questions:
        yield from question.vocabulary.phrases


def _nothing(question: Question) -> None:
    return None


def _phrases(question: Question) -> int:
    return len(question.vocabulary.phrases)


def _alone(features: Encoded, index: int) -> Encoded:
    """Those of one image, on the CPU, and not a view that keeps its whole batch alive."""
    one = features.image(index)
    pooled = None if one.pooled is None else one.pooled.cpu().clone()
    return replace(one, tokens=one.tokens.cpu().clone(), pooled=pooled)


def _on(features: Encoded, device: torch.device) -> Encoded:
    pooled = None if features.pooled is None else features.pooled.to(device)
    return replace(features, tokens=features.tokens.to(device), pooled=pooled)


def _on_cpu(result: Localization) -> Localization:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float().cpu()

    return replace(result, maps=result.maps.to("cpu"), scores=moved(result.scores), presence=moved(result.presence))
