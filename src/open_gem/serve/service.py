"""From the bytes of an upload to a localization: decoding in a few threads, the model in one, its results cached.

The limits in `Settings` bound what a request takes of any of these. Long work is done in pieces (a pass of the model,
the maps of a prompt), and other requests have their turn in between.
"""

import asyncio
import hashlib
import secrets
import warnings
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from open_gem.errors import NotFiniteError
from open_gem.exemplars import check_exemplar
from open_gem.images.decoder import Decoder
from open_gem.images.read import Header
from open_gem.localization import Localization
from open_gem.locate import AnyLocalizer, Prepared
from open_gem.method.table import GRADIENTS, METHODS
from open_gem.serve.answers import by_label, describe
from open_gem.serve.cache import Cache, CachedImage
from open_gem.serve.errors import RequestError
from open_gem.serve.metrics import Metrics
from open_gem.serve.schemas import SQUARE, Like, Located, Options
from open_gem.serve.settings import Settings
from open_gem.serve.uploads import parse_json
from open_gem.serve.worker import JobKind, Worker
from open_gem.text import Exemplar, Prompts, Vocabulary
from open_gem.types import Size

Item = TypeVar("Item")
Result = TypeVar("Result")

PROMPTS = 32  # prompts that count as much as one image in a batch
LARGE = 4_000_000  # pixels: larger images are decoded, and their maps made, one at a time
STRIP = 6  # default limit of patches, as a multiple of a square image's


class EncodeJob(NamedTuple):
    """An image to be encoded by some methods, and the number of its patches."""

    prepared: Prepared
    methods: tuple[str, ...]
    patches: int

    @property
    def key(self) -> Any:
        """Jobs with equal keys share a pass; an image that fills batches by itself has a key of its own."""
        return self.prepared.shape or object(), self.methods


class LocateJob(NamedTuple):
    """Prompts to be located in an encoded image."""

    encoded: Any
    vocabulary: Vocabulary


class Service:
    """The work behind the routes. One event loop owns it; `close` ends its threads."""

    def __init__(self, localizer: AnyLocalizer, settings: Settings, metrics: Metrics):
        self.localizer, self.settings, self.metrics = localizer.acknowledge(), settings, metrics
        self.warnings = [] if localizer.caution is None else [localizer.caution]
        known = METHODS | GRADIENTS
        self.methods = {name: known[name].about if name in known else name for name in localizer.methods(known)}
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
            lambda job: max(job.patches, 2 * square),
            settings.max_batch * 2 * square,
        )
        self._locate = JobKind(
            "locate",
            self._locate_all,
            lambda job: None,
            lambda job: len(job.vocabulary.all_prompts),
            settings.max_batch * PROMPTS,
        )

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
        methods = self._first_methods()
        prompt = next(iter(self.localizer.text.model.text.concepts), "a photo")
        try:
            encoded = await self.worker.do(self._encode, EncodeJob(prepared, methods, 1))
            await self.worker.do(self._locate, LocateJob(encoded[methods[0]], Vocabulary.of(prompt)))
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

    async def side_by_side(self, work: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
        """Return the result of each item, in order. As many run at once as can share a pass of the model."""
        slots = asyncio.Semaphore(self.settings.max_batch)

        async def work_on(item: Item) -> Result:
            async with slots:
                return await work(item)

        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(work_on(item)) for item in items]
        return [task.result() for task in started]

    async def each_label(
        self, work: Callable[..., Result], located: Localization, *arguments: Any, maps: bool = True
    ) -> list[Result]:
        """Return `work(label, *arguments)` for each label, computed in a thread. Other requests run between two labels,
        and work ends once the client has disconnected.

        maps: whether `work` makes maps of the image's size. Raises RequestError for too many of them.
        """
        size, limit = located.size, self.settings.max_map_pixels
        pixels = size.height * size.width
        if maps and pixels * len(located.labels) > limit:
            raise RequestError(
                413,
                f"{len(located.labels)} labels on an image of {size.height}x{size.width} pixels make maps of "
                f"{pixels * len(located.labels)} pixels, expected {limit} at most: ask {limit // pixels} at a time",
            )
        pool, loop = self._large if maps and is_large(size) else self._threads, asyncio.get_running_loop()
        return [await loop.run_in_executor(pool, work, label, *arguments) for label in by_label(located)]

    async def ground(self, image: CachedImage, prompts: Prompts, options: Options) -> Located:
        """Return the answer to prompts on an encoded image. Raises as `locate` and `each_label`."""
        located = await self.locate(image, prompts, options.method)
        described = await self.each_label(describe, located, options, maps=options.objects)
        return Located(
            height=image.size.height,
            width=image.size.width,
            grid=list(located.maps.shape[-2:]),
            model=self.localizer.name,
            method=options.method or self.default,
            warnings=self.warnings,
            labels=[label for label, _ in described],
            objects=[obj for _, objects in described for obj in objects],
        )

    async def encode(self, data: bytes, *, keep: bool) -> CachedImage:
        """Return the image of an upload, encoded by the settings' methods; from the cache if it holds the same bytes.

        keep: put it there. Raises RequestError and ImageError if it is no image that is accepted.
        """
        id = await self.in_thread(self._id_of, data)
        if (known := self.find(id)) is not None:
            return known
        loop = asyncio.get_running_loop()
        header = await loop.run_in_executor(self._decoders, self._check_header, data)
        pool = self._large if is_large(header.size) else self._decoders
        prepared = await loop.run_in_executor(pool, self._prepare, data)
        job = EncodeJob(prepared, self._first_methods(), self.localizer.patches(prepared.original))
        image = CachedImage(id, prepared, await self.worker.do(self._encode, job))
        if keep:
            self._keep(image)
        return image

    def find(self, id: str) -> CachedImage | None:
        """Return the image in the cache."""
        image = self.cache.get(id)
        self.metrics.looked_up(hit=image is not None)
        return image

    def drop(self, id: str) -> bool:
        dropped = self.cache.drop(id)
        self.metrics.holds(self.cache)
        return dropped

    async def locate(self, image: CachedImage, prompts: Prompts, method: str | None = None) -> Localization:
        """Locate prompts by a method, on the CPU; None for the default method. Raises as `check`."""
        vocabulary = self.check(prompts, method)
        return await self.worker.do(self._locate, LocateJob(await self._encoded(image, method), vocabulary))

    async def exemplar(self, image: CachedImage, like: Like, method: str | None) -> Exemplar:
        """Return a region of an image in the cache as an exemplar. Raises as `check`, and PromptError for a box that
        leaves the image, or nothing around it."""
        self.check("exemplar", method)
        left, top, right, bottom = like.box
        encoded = await self._encoded(image, method)
        exemplar = Exemplar(encoded, (left, top, right, bottom), f"{like.like}:{like.box}")
        await self.in_thread(check_exemplar, exemplar)
        return exemplar

    async def _encoded(self, image: CachedImage, method: str | None) -> Any:
        """Return an image encoded by a method, None for the default one; the cache keeps it."""
        method = method or self.default
        if method not in image.encoded:
            job = EncodeJob(image.prepared, (method,), self.localizer.patches(image.prepared.original))
            image = image.with_encoded(await self.worker.do(self._encode, job))
            if (cached := self.cache.get(image.id)) is not None:
                self._keep(cached.with_encoded(image.encoded))
        return image.encoded[method]

    def check(self, prompts: Prompts, method: str | None = None) -> Vocabulary:
        """Return the prompts as a vocabulary. Raises RequestError and PromptError, before anything is computed, for
        prompts beyond the limits or a method that is not served."""
        if method is not None and method not in self.methods:
            raise RequestError(422, f"method {method!r} is not served; served are: {', '.join(self.methods)}")
        vocabulary, limits = Vocabulary.of(prompts), self.settings
        texts = tuple(map(str, vocabulary.all_prompts))
        if len(texts) > limits.max_prompts:
            raise RequestError(422, f"{len(texts)} prompts, expected {limits.max_prompts} at most")
        if (longest := max(map(len, (*texts, *vocabulary.labels)))) > limits.max_prompt:
            raise RequestError(422, f"a prompt has {longest} characters, expected {limits.max_prompt} at most")
        self.localizer.check_texts(vocabulary)  # later the error would fail all requests of its batch
        return vocabulary

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
        return self.localizer.prepare(self._read(data))

    def _read(self, data: bytes) -> Any:
        return self._decoder.read(data, seconds=self.settings.decode_seconds, max_pixels=self.settings.max_pixels)

    def _keep(self, image: CachedImage) -> None:
        self.cache.put(image)
        self.metrics.holds(self.cache)

    def _first_methods(self) -> tuple[str, ...]:
        return tuple(name for name in self.settings.methods if name in self.methods) or (self.default,)

    # The model, in its own thread -------------------------------------------------------------------------------------

    def _encode_all(self, jobs: Sequence[EncodeJob]) -> list[dict[str, Any]]:
        """Encode each image by each method: on the CPU, and not views that keep their whole batch alive."""
        batch = self.localizer.encode([job.prepared for job in jobs], jobs[0].methods)
        return [{name: encoded.to("cpu").clone() for name, encoded in image.items()} for image in batch]

    def _locate_all(self, jobs: Sequence[LocateJob]) -> list[Localization]:
        localizer = self.localizer
        prompts = (prompt for job in jobs for prompt in job.vocabulary.all_prompts if isinstance(prompt, str))
        localizer.text(tuple(dict.fromkeys(prompts)))  # all new ones in one pass
        return [localizer.locate(job.encoded.to(localizer.device), job.vocabulary).to("cpu") for job in jobs]


def is_large(size: Size) -> bool:
    """Return True if work at the image's own size takes so long that others should not wait for it."""
    return size.height * size.width > LARGE
