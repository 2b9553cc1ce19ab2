"""From the bytes of an upload to a localization: decoding in a few threads, the model in one, its results cached.

The limits in `Settings` bound what a request takes of any of these. Long work is done in pieces (a pass of the model,
the maps of a prompt), and other requests have their turn in between.
"""

import asyncio
import hashlib
import secrets
import warnings
from base64 import b64decode
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from open_gem.errors import NotFiniteError, OpenGemError
from open_gem.exemplars import check_exemplar
from open_gem.images.decoder import Decoder
from open_gem.images.read import Header, read_image
from open_gem.localization import MIN_AREA, Localization
from open_gem.locate import AnyLocalizer, Prepared
from open_gem.method.table import GRADIENTS, METHODS
from open_gem.objects import Object
from open_gem.refine import Refinement
from open_gem.serve.answers import describe, objects_of
from open_gem.serve.cache import Cache, CachedImage
from open_gem.serve.errors import RequestError
from open_gem.serve.metrics import Metrics
from open_gem.serve.schemas import SQUARE, Compared, Located, LocatedLabel, LocatedObject, Options
from open_gem.serve.settings import NONE, Settings
from open_gem.serve.uploads import parse_json
from open_gem.serve.worker import JobKind, Worker
from open_gem.text import Exemplar, Prompts, Vocabulary
from open_gem.types import Size

Item = TypeVar("Item")
Result = TypeVar("Result")

PROMPTS = 32  # prompts that count as much as one image in a batch
LARGE = 4_000_000  # pixels: larger images are decoded, and their maps made, one at a time
OWN = "own"  # the name of a localizer's method that has none
STRIP = 6  # default limit of patches, as a multiple of a square image's


class EncodeJob(NamedTuple):
    """An image to be encoded by methods, and the number of its patches."""

    prepared: Prepared
    methods: tuple[str, ...]
    patches: int

    @property
    def key(self) -> Any:
        """Jobs with equal keys share a pass; an image that fills batches by itself has a key of its own."""
        return self.prepared.shape or object(), self.methods


class LocateJob(NamedTuple):
    """Prompts to be located in an encoded image, and the image itself for the refinement of their maps."""

    encoded: Any
    vocabulary: Vocabulary
    refinement: Refinement | None = None
    image: Image.Image | None = None


class Service:
    """The work behind the routes. One event loop owns it; `close` ends its threads."""

    def __init__(self, localizer: AnyLocalizer, settings: Settings, metrics: Metrics):
        self.refinements = _refinements(localizer, settings)
        plain = localizer if set(self.refinements) == {NONE} else localizer.configured(refinement=None)
        self.localizer = plain.acknowledge()
        self.settings, self.metrics = settings, metrics
        self.warnings = [] if localizer.caution is None else [localizer.caution]
        self.methods = _methods(localizer, settings)
        self.default = next(iter(self.methods))
        self.cache = Cache(settings.cache_bytes)
        self.worker = Worker(metrics.saw_batch)
        self._threads = ThreadPoolExecutor(settings.threads, "open_gem images")
        self._decoders = ThreadPoolExecutor(settings.threads, "open_gem decoders")  # each thread waits for a process
        self._large = ThreadPoolExecutor(1, "open_gem large images")  # one at a time, so that small ones overtake them
        self._decoder = Decoder(settings.threads + 1)
        self._parser = ThreadPoolExecutor(1, "open_gem JSON")
        square = localizer.patches()
        self.max_patches = settings.max_patches or STRIP * square
        self._key = secrets.token_bytes(32)
        self._encode = JobKind(
            "encode",
            self._encode_all,
            lambda job: job.key,
            lambda job: max(job.patches, 2 * square) * max(1, len(job.methods) - 1),
            settings.max_batch * 2 * square,
        )
        self._locate = JobKind(
            "locate",
            self._locate_all,
            lambda job: None,
            lambda job: len(job.vocabulary.all_prompts),
            settings.max_batch * PROMPTS,
        )
        self._alone = asyncio.Semaphore(1)  # for maps that take much memory

    def close(self) -> None:
        """End the threads, or abandon those that have not ended after `stop_seconds`."""
        for pool in (self._threads, self._decoders, self._large, self._parser):
            pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self.worker.stop(self.settings.stop_seconds)

    async def warm_up(self) -> None:
        """Run a first pass of the model and start a decoder, which are slow: no client should wait for them."""
        loop, square = asyncio.get_running_loop(), b64decode(SQUARE)
        starts = (loop.run_in_executor(self._decoders, self._read, square) for _ in range(self.settings.threads))
        image, *_ = await asyncio.gather(*starts)
        side = max(image.height, *(self.localizer.patch or (1, 1)))
        prepared = await self.in_thread(self.localizer.prepare, image.resize((side, side)))
        prompt = next(iter(self.localizer.text.model.text.concepts), "a photo")
        try:
            encoded = await self.worker.do(self._encode, EncodeJob(prepared, (self.default,), 1))
            await self.worker.do(self._locate, LocateJob(encoded[self.default], Vocabulary.of(prompt)))
        except NotFiniteError as error:  # clients get the same error
            warnings.warn(str(error), stacklevel=1)

    async def in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Run CPU-bound work in a thread that holds up neither the event loop nor the model."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def fetch(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Run work that waits for another machine in a thread that others do not need."""
        return await asyncio.to_thread(work, *arguments)

    async def parse(self, body: bytes) -> Any:
        """Parse the JSON document of a body, in a thread of its own. Raises RequestError."""
        return await asyncio.get_running_loop().run_in_executor(
            self._parser, parse_json, body, self.settings.max_values
        )

    async def each_label(
        self, work: Callable[[int], Result], located: Localization, *, maps: bool = True, alone: bool = False
    ) -> list[Result]:
        """Return `work(index)` for each label, computed in a thread. Other requests run between two labels, and work
        ends once the client has disconnected.

        maps   whether `work` makes maps of the image's size
        alone  whether these take so much memory that no other request should have such at the same time
        """
        pool, loop = self._large if maps and is_large(located.size) else self._threads, asyncio.get_running_loop()
        async with self._alone if alone else nullcontext():
            return [await loop.run_in_executor(pool, work, index) for index in range(len(located.labels))]

    # Requests ---------------------------------------------------------------------------------------------------------

    def check(self, prompts: Prompts, options: Options) -> Vocabulary:
        """Return the prompts as a vocabulary. Raises RequestError and PromptError, before anything is computed, for
        prompts beyond the limits, and for methods and refinements that are not served."""
        limits = self.settings
        if options.method is not None and options.methods is not None:
            raise RequestError(422, "method and methods given, expected one of them")
        _check_served("method", self.methods_of(options), self.methods)
        _check_served("refinement", (self.refinement_of(options),), self.refinements)
        if len(self.methods_of(options)) > limits.max_methods:
            raise RequestError(422, f"{len(self.methods_of(options))} methods, expected {limits.max_methods} at most")
        if self.refinements[self.refinement_of(options)] is not None and options.min_area < MIN_AREA:
            raise RequestError(422, f"min_area is {options.min_area} with a refinement, expected {MIN_AREA} or more")
        vocabulary = Vocabulary.of(prompts)
        if options.negative:
            vocabulary = vocabulary.with_background(options.negative)
        texts = tuple(map(str, vocabulary.all_prompts))
        if len(texts) > limits.max_prompts:
            raise RequestError(422, f"{len(texts)} prompts, expected {limits.max_prompts} at most")
        if (longest := max(map(len, (*texts, *vocabulary.labels)))) > limits.max_prompt:
            raise RequestError(422, f"a prompt has {longest} characters, expected {limits.max_prompt} at most")
        self.localizer.check_texts(vocabulary)  # later the error would fail all requests of its batch
        return vocabulary

    def methods_of(self, options: Options) -> tuple[str, ...]:
        """Return the methods that a request wants."""
        return tuple(dict.fromkeys(options.methods or (options.method or self.default,)))

    def refinement_of(self, options: Options) -> str:
        """Return the name of the refinement that a request wants."""
        return next(iter(self.refinements)) if options.refine is None else options.refine

    async def ground(self, image: CachedImage, vocabulary: Vocabulary, options: Options) -> Located | Compared:
        """Return the answer to checked prompts on an image; images of exemplars are a `CachedImage`. Raises as
        `locate`, and PromptError for exemplars that leave their image, or fill it, or that a method does not take."""
        methods = self.methods_of(options)
        images = {shown.id: shown for shown in (image, *(exemplar.image for exemplar in vocabulary.exemplars))}
        encoded = {id: await self.encode(shown, methods) for id, shown in images.items()}
        by_method = {method: self._as_seen(vocabulary, encoded, method) for method in methods}
        for exemplar in chain.from_iterable(own.exemplars for own in by_method.values()):
            await self.in_thread(check_exemplar, exemplar)
        image = encoded[image.id]
        answers = [await self._ground(image, own, options, method) for method, own in by_method.items()]
        return answers[0] if options.methods is None else Compared(results=answers)

    def _as_seen(self, vocabulary: Vocabulary, images: Mapping[str, CachedImage], method: str) -> Vocabulary:
        """Return the vocabulary with exemplars as a method sees them; it has encoded the images."""

        def see(prompt: str | Exemplar) -> str | Exemplar:
            return prompt if isinstance(prompt, str) else replace(prompt, image=images[prompt.image.id].encoded[method])

        return replace(vocabulary, prompts=tuple(tuple(map(see, own)) for own in vocabulary.prompts))

    async def _ground(self, image: CachedImage, vocabulary: Vocabulary, options: Options, method: str) -> Located:
        located = await self.locate(image, vocabulary, options, method)
        present = await self.in_thread(partial(located.present, options.presence, absent=options.absent))

        @cache  # made for the first label
        def compared() -> list[Object]:
            return objects_of(located, options, options.absent)

        def work(index: int) -> tuple[LocatedLabel, list[LocatedObject]]:
            label, objects = located[index], []
            if options.objects and present[index]:
                objects = (
                    [obj for obj in compared() if obj.index == index]
                    if options.compares
                    else objects_of(label, options)
                )
            return describe(label, present[index], objects, options, self.settings.max_map_pixels)

        described = await self.each_label(work, located, maps=options.objects, alone=self.is_heavy(options))
        return Located(
            height=image.size.height,
            width=image.size.width,
            grid=list(located.maps.shape[-2:]),
            model=self.localizer.name,
            method=method,
            warnings=self.warnings,
            labels=[label for label, _ in described],
            objects=[obj for _, objects in described for obj in objects],
        )

    def is_heavy(self, options: Options) -> bool:
        """Return True if maps need more memory than one of them takes."""
        return options.objects and (options.scale == "probability" or self.refinement_of(options) != NONE)

    async def answer_all(
        self,
        items: Sequence[Item],
        fetch: Callable[[Item], Awaitable[bytes]],
        methods: Sequence[str],
        answer: Callable[[CachedImage], Awaitable[Result]],
    ) -> list[Result | Exception]:
        """Return the answer about the image of each item, in order, or the error of that image alone. Images of one
        shape share passes of the model, `max_batch` at a time; none is cached."""

        async def prepare(item: Item) -> CachedImage:
            return await self.prepare(await fetch(item))

        step, results = self.settings.max_batch, []
        for start in range(0, len(items), step):
            prepared = await self._side_by_side(prepare, items[start : start + step])
            encoded = await self._encode_missing(prepared, methods)
            results += await self._side_by_side(answer, encoded)
        return results

    async def _side_by_side(
        self, work: Callable[[Item], Awaitable[Result]], items: Iterable[Item | Exception]
    ) -> list[Result | Exception]:
        """Return the result of each item, or its error; items that are errors stay."""

        async def attempt(item: Item | Exception) -> Result | Exception:
            try:
                return item if isinstance(item, Exception) else await work(item)
            except (OpenGemError, RequestError) as error:
                return error

        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(attempt(item)) for item in items]
        return [task.result() for task in started]

    async def prepare(self, data: bytes) -> CachedImage:
        """Return the image of an upload, ready for the model; from the cache if it holds the same bytes. Raises
        RequestError and ImageError if it is no image that is accepted."""
        id = await self.in_thread(self._id_of, data)
        if (known := self.find(id)) is not None:
            return known
        loop = asyncio.get_running_loop()
        header = await loop.run_in_executor(self._decoders, self._check_header, data)
        pool = self._large if is_large(header.size) else self._decoders
        return CachedImage(id, await loop.run_in_executor(pool, self._prepare, data), {})

    async def upload(self, data: bytes) -> CachedImage:
        """Encode an image by the settings' methods and put it into the cache. Raises as `prepare`."""
        first = tuple(name for name in dict.fromkeys((self.default, *self.settings.methods)) if name in self.methods)
        image = await self.encode(await self.prepare(data), first)
        self._keep(image)
        return image

    async def encode(self, image: CachedImage, methods: Sequence[str]) -> CachedImage:
        """Return the image, encoded by `methods` too; one pass for all that are missing."""
        [encoded] = await self._encode_missing([image], methods)
        if isinstance(encoded, Exception):
            raise encoded
        return encoded

    async def _encode_missing(
        self, images: Sequence[CachedImage | Exception], methods: Sequence[str]
    ) -> list[CachedImage | Exception]:
        """Encode images by `methods`; those of one shape share passes. An error stands in the place of its image."""
        results, jobs = list(images), {}
        for index, image in enumerate(images):
            if isinstance(image, Exception):
                continue
            if missing := tuple(name for name in methods if name not in image.encoded):
                patches = self.localizer.patches(image.prepared.original)
                jobs[index] = EncodeJob(image.prepared, missing, patches)
        encoded = await self.worker.do_all(self._encode, list(jobs.values()))
        for index, more in zip(jobs, encoded, strict=True):
            image = images[index]
            if isinstance(more, OpenGemError):
                results[index] = more
            elif isinstance(more, BaseException):
                raise more
            elif isinstance(image, CachedImage):
                results[index] = image.with_encoded(more)
                if (cached := self.cache.get(image.id)) is not None:
                    self._keep(cached.with_encoded(more))
        return results

    def find(self, id: str) -> CachedImage | None:
        """Return the image in the cache."""
        image = self.cache.get(id)
        self.metrics.looked_up(hit=image is not None)
        return image

    def drop(self, id: str) -> bool:
        dropped = self.cache.drop(id)
        self.metrics.holds(self.cache)
        return dropped

    async def locate(self, image: CachedImage, vocabulary: Vocabulary, options: Options, method: str) -> Localization:
        """Locate checked prompts in an image that `method` has encoded, on the CPU. Raises RequestError for more pixels
        of maps than the limits."""
        refinement = self.refinements[self.refinement_of(options)]
        self._check_maps(image.size, len(vocabulary.all_prompts), options)
        source = None if refinement is None else image.prepared.image
        return await self.worker.do(self._locate, LocateJob(image.encoded[method], vocabulary, refinement, source))

    def _check_maps(self, size: Size, prompts: int, options: Options) -> None:
        """Raise RequestError if the maps of a request have too many pixels together."""
        if not options.objects:
            return
        name = "max_map_pixels" if self.refinement_of(options) == NONE else "max_refined_pixels"
        limit, pixels = getattr(self.settings, name), size.height * size.width
        each = pixels * len(self.methods_of(options)) * (1 + (options.scale == "probability") + options.exclusive)
        if each * prompts > limit:
            most = limit // each
            advice = f"ask {most} at a time" if most else "send a smaller image, or ask without objects"
            raise RequestError(
                413,
                f"{prompts} prompts on an image of {size.height}x{size.width} pixels make maps of {each * prompts} "
                f"pixels, expected {limit} at most: {advice}",
            )

    # Images -----------------------------------------------------------------------------------------------------------

    def _id_of(self, data: bytes) -> str:
        """Return an id: the same for the same bytes, and not to be guessed from outside."""
        return hashlib.blake2b(data, digest_size=16, key=self._key).hexdigest()

    def _check_header(self, data: bytes) -> Header:
        """Return the image's header. Raises RequestError and ImageError for an image that must not be decoded."""
        header = self._decoder.read_header(data, seconds=self.settings.decode_seconds)
        if header.format not in self.settings.formats:
            raise RequestError(415, f"an image of format {header.format}, expected {', '.join(self.settings.formats)}")
        size, limit = f"{header.size.height}x{header.size.width}", self.settings.max_pixels
        if header.size.height * header.size.width > limit:
            raise RequestError(413, f"the image is {size} pixels, expected {limit} pixels at most")
        if (patches := self.localizer.patches(header.size)) > self.max_patches:
            raise RequestError(
                422, f"the image of {size} pixels needs {patches} patches, the limit is {self.max_patches}: crop it"
            )
        return header

    def _prepare(self, data: bytes) -> Prepared:
        image = read_image(self._read(data))
        prepared = self.localizer.prepare(image)
        return replace(prepared, image=image) if len(self.refinements) > 1 else prepared

    def _read(self, data: bytes) -> Any:
        return self._decoder.read(data, seconds=self.settings.decode_seconds, max_pixels=self.settings.max_pixels)

    def _keep(self, image: CachedImage) -> None:
        self.cache.put(image)
        self.metrics.holds(self.cache)

    # The model, in its own thread -------------------------------------------------------------------------------------

    def _encode_all(self, jobs: Sequence[EncodeJob]) -> list[dict[str, Any]]:
        """Encode each image by each method: on the CPU, and not views that keep their whole batch alive."""
        methods = {name: self.methods[name] for name in jobs[0].methods}
        batch = self.localizer.encode([job.prepared for job in jobs], methods)
        return [{name: encoded.to("cpu").clone() for name, encoded in image.items()} for image in batch]

    def _locate_all(self, jobs: Sequence[LocateJob]) -> list[Localization]:
        prompts = (prompt for job in jobs for prompt in job.vocabulary.all_prompts if isinstance(prompt, str))
        if texts := tuple(dict.fromkeys(prompts)):
            self.localizer.text(texts)  # all new ones in one pass
        return [self._locate_job(job) for job in jobs]

    def _locate_job(self, job: LocateJob) -> Localization:
        located = self.localizer.locate(job.encoded.to(self.localizer.device), job.vocabulary)
        if job.refinement is not None and job.image is not None:
            located = job.refinement.refine(job.image, located)
        return located.to("cpu")


def _methods(localizer: AnyLocalizer, settings: Settings) -> dict[str, Any]:
    """Return the methods that are served, the default first, with their settings on this model."""
    if settings.served is not None:
        return localizer.methods(settings.served)
    own = getattr(localizer, "method", "gem")
    return localizer.methods({own if isinstance(own, str) else OWN: own} | {name: name for name in METHODS | GRADIENTS})


def _refinements(localizer: AnyLocalizer, settings: Settings) -> dict[str, Refinement | None]:
    """Return the refinements that are served, the default first, and none."""
    own = getattr(localizer, "refinement", None)
    served = {} if own is None else {own.describe()["refinement"]: own}
    return {**served, **(settings.refinements or {}), **served, NONE: None}


def _check_served(what: str, names: Iterable[str], served: Collection[str]) -> None:
    for name in names:
        if name not in served:
            raise RequestError(422, f"{what} {name!r} is not served; served are: {', '.join(served)}")


def is_large(size: Size) -> bool:
    """Return True if work at the image's own size takes so long that others should not wait for it."""
    return size.height * size.width > LARGE
