"""From the bytes of an upload to a localization: decoding in a few threads, the model in one, its results kept.

The limits in `Settings` bound what a request takes of any of these. Long work is done in pieces (a pass of the model,
the maps of a prompt), and other requests have their turn in between.
"""

import asyncio
import hashlib
import secrets
import warnings
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from open_gem.errors import NotFiniteError
from open_gem.images.decoder import Decoder
from open_gem.images.read import Header
from open_gem.localization import Localization
from open_gem.locate import AnyLocalizer, Prepared
from open_gem.method.table import METHODS
from open_gem.serve.answers import by_prompt
from open_gem.serve.cache import Cache, CachedImage
from open_gem.serve.errors import RequestError
from open_gem.serve.metrics import Metrics
from open_gem.serve.schemas import SQUARE
from open_gem.serve.settings import Settings
from open_gem.serve.uploads import parse_json
from open_gem.serve.worker import JobKind, Worker
from open_gem.text import Vocabulary
from open_gem.types import Size

Item = TypeVar("Item")
Result = TypeVar("Result")

PHRASES = 32  # that count as much as one image in a batch
LARGE = 4_000_000  # pixels: images of more are decoded, and their maps made, one at a time
STRIP = 6  # times as many patches as a square image has are allowed by default


class EncodeJob(NamedTuple):
    """An image to be encoded by some methods, and the number of its patches."""

    prepared: Prepared
    methods: tuple[str, ...]
    patches: int

    @property
    def key(self) -> Any:
        """Jobs with equal ones share a pass; an image that fills batches by itself has a key of its own."""
        return self.prepared.shape or object(), self.methods


class LocateJob(NamedTuple):
    """Phrases to be located in an encoded image."""

    encoded: Any
    vocabulary: Vocabulary


class Service:
    """What routes ask for. One event loop owns it; `close` ends its threads."""

    def __init__(self, localizer: AnyLocalizer, settings: Settings, metrics: Metrics):
        self.localizer, self.settings, self.metrics = localizer, settings, metrics
        self.methods = {name: METHODS[name].about if name in METHODS else name for name in localizer.methods(METHODS)}
        self.default = next(iter(self.methods))
        self.cache = Cache(settings.cache_bytes)
        self.worker = Worker(metrics.saw_batch)
        self._threads = ThreadPoolExecutor(settings.threads, "open_gem images")
        self._decoders = ThreadPoolExecutor(settings.threads, "open_gem decoders")  # each waits for a process
        self._large = ThreadPoolExecutor(1, "open_gem large images")  # one at a time, so that small ones go past them
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
            settings.max_batch * PHRASES,
        )

    def close(self) -> None:
        """End the threads, or leave behind those that have not ended after `stop_seconds`."""
        for pool in (self._threads, self._decoders, self._large, self._parser):
            pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self.worker.stop(self.settings.stop_seconds)

    async def warm_up(self) -> None:
        """The first pass of a model is slow, and so is the start of a decoder: no client should wait for them."""
        loop, square = asyncio.get_running_loop(), b64decode(SQUARE)
        starts = (loop.run_in_executor(self._decoders, self._read, square) for _ in range(self.settings.threads))
        image, *_ = await asyncio.gather(*starts)
        side = max(image.height, *(self.localizer.patch or (1, 1)))
        prepared = await self.in_thread(self.localizer.prepare, image.resize((side, side)))
        methods = self._first_methods()
        phrase = next(iter(self.localizer.text.model.text.concepts), "a photo")
        try:
            encoded = await self.worker.do(self._encode, EncodeJob(prepared, methods, 1))
            await self.worker.do(self._locate, LocateJob(encoded[methods[0]], Vocabulary.of(phrase)))
        except NotFiniteError as error:  # clients get the same error
            warnings.warn(str(error), stacklevel=1)

    async def in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Run what takes a processor's time, where it holds up neither the event loop nor the model."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def fetch(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Run what waits for another machine, where it holds up no thread that others need."""
        return await asyncio.to_thread(work, *arguments)

    async def parse(self, body: bytes) -> Any:
        """The JSON document of a body, in a thread that has nothing else to do. Raises RequestError."""
        return await asyncio.get_running_loop().run_in_executor(
            self._parser, parse_json, body, self.settings.max_values
        )

    async def side_by_side(self, work: Callable[[Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
        """The result of each item, in order. As many are worked on at once as can share a pass of the model."""
        slots = asyncio.Semaphore(self.settings.max_batch)

        async def work_on(item: Item) -> Result:
            async with slots:
                return await work(item)

        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(work_on(item)) for item in items]
        return [task.result() for task in started]

    async def each_prompt(
        self, work: Callable[..., Result], located: Localization, *, places: bool = True, **options: Any
    ) -> list[Result]:
        """`work(label, **options)` for each prompt, in a thread. Others come between two prompts, and nothing more is
        begun once nobody waits for it.

        places: whether `work` makes maps of the image's size. Raises RequestError for too many of them.
        """
        size, most = located.size, self.settings.max_map_pixels
        pixels = size.height * size.width
        if places and pixels * len(located.labels) > most:
            raise RequestError(
                413,
                f"{len(located.labels)} prompts on an image of {size.height}x{size.width} pixels make maps of "
                f"{pixels * len(located.labels)} pixels, expected {most} at most: ask {most // pixels} at a time",
            )
        pool, loop = self._large if places and is_large(size) else self._threads, asyncio.get_running_loop()
        return [await loop.run_in_executor(pool, partial(work, label, **options)) for label in by_prompt(located)]

    async def encode(self, data: bytes, *, keep: bool) -> CachedImage:
        """The image of an upload, encoded by the settings' methods; from the cache if the same bytes are there.

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
        """The image in the cache."""
        image = self.cache.get(id)
        self.metrics.looked_up(hit=image is not None)
        return image

    def drop(self, id: str) -> bool:
        dropped = self.cache.drop(id)
        self.metrics.holds(self.cache)
        return dropped

    async def locate(
        self, image: CachedImage, prompts: Sequence[str] | Mapping[str, Sequence[str]], method: str
    ) -> Localization:
        """Where a method sees the prompts, on the CPU. Raises RequestError and PromptError for phrases beyond the
        limits, or a method that is not served."""
        vocabulary = self.check(prompts, method)
        if method not in image.encoded:
            job = EncodeJob(image.prepared, (method,), self.localizer.patches(image.prepared.original))
            image = image.with_encoded(await self.worker.do(self._encode, job))
            if (kept := self.cache.get(image.id)) is not None:
                self._keep(kept.with_encoded(image.encoded))
        return await self.worker.do(self._locate, LocateJob(image.encoded[method], vocabulary))

    # Checks -----------------------------------------------------------------------------------------------------------

    def named(self, method: str | None) -> str:
        """The name of a method; the default for None."""
        return self.default if method is None else method

    def check(self, prompts: Sequence[str] | Mapping[str, Sequence[str]], method: str) -> Vocabulary:
        """The phrases, as labels. Raises as `locate`, before anything is computed."""
        if method not in self.methods:
            raise RequestError(422, f"method {method!r} is not served; there are: {', '.join(self.methods)}")
        vocabulary, limits = Vocabulary.of(prompts), self.settings
        if len(vocabulary.all_prompts) > limits.max_prompts:
            raise RequestError(422, f"{len(vocabulary.all_prompts)} phrases, expected {limits.max_prompts} at most")
        longest = max(map(len, vocabulary.all_prompts))
        if longest > limits.max_prompt:
            raise RequestError(422, f"a phrase has {longest} characters, expected {limits.max_prompt} at most")
        self.localizer.text.check(vocabulary.all_prompts)  # later it would fail all requests of its batch
        return vocabulary

    # Images -----------------------------------------------------------------------------------------------------------

    def _id_of(self, data: bytes) -> str:
        """The same for the same bytes, and not to be guessed from outside."""
        return hashlib.blake2b(data, digest_size=16, key=self._key).hexdigest()

    def _check_header(self, data: bytes) -> Header:
        """The image's header. Raises RequestError and ImageError for one that is not to be decoded."""
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
        """Each image by each method: on the CPU, and not views that keep their whole batch alive."""
        batch = self.localizer.encode([job.prepared for job in jobs], jobs[0].methods)
        return [{name: encoded.to("cpu").clone() for name, encoded in image.items()} for image in batch]

    def _locate_all(self, jobs: Sequence[LocateJob]) -> list[Localization]:
        localizer = self.localizer
        phrases = (phrase for job in jobs for phrase in job.vocabulary.all_prompts)
        localizer.text(tuple(dict.fromkeys(phrases)))  # all new ones in one pass
        return [localizer.locate(encoded.to(localizer.device), prompts).to("cpu") for encoded, prompts in jobs]


def is_large(size: Size) -> bool:
    """Whether work at the image's own size takes so long that others should not wait behind it."""
    return size.height * size.width > LARGE
