"""Decodes in separate processes: only a process can be stopped, and PIL's decoders know no deadline and no limit.

    with Decoder(workers=2) as decoder:
        image = decoder.read(data, seconds=10)       # as read_image(data): RGB, upright; or an ImageError

Each process imports Pillow and NumPy but not torch: it has 34 MB and is ready after 0.13 s. It asks the system to end
it (SIGALRM) when a decode takes too long, limits its own address space by the image's size, and leaves when its
standard input closes, which the system does however the parent ends. What it sends back are lines of JSON and raw
pixels, never objects.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from PIL import AvifImagePlugin, Image

from open_gem.errors import ImageError
from open_gem.files import to_json
from open_gem.images.read import MAX_PIXELS, Header, ImageWarning, read_header, read_image, size_of
from open_gem.types import Size

START_SECONDS = 60.0
"""Timeout in seconds until a process is ready: its imports, on a busy machine."""

GRACE_SECONDS = 5.0
"""Seconds after the deadline until the parent ends a process that did not end itself."""

PIXEL_BYTES = 40
"""Memory allowed a pixel of the image. Measured: 8 for a JPEG, 12 if it is progressive, 16 with transparency, 20 for an
AVIF, 30 for a JPEG2000 or an animated WebP with transparency."""

SPARE_BYTES = 64 << 20
"""Memory allowed in addition, which decoders need for images of any size."""

STRIP_BYTES = 1 << 18


class Decoder:
    """At most `workers` processes that decode, started when they are needed. Threads may share it."""

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.workers)
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        self._end = weakref.finalize(self, _end_all, self._children, self._pid)

    def read(
        self, source: bytes | str | os.PathLike[str], *, seconds: float, max_pixels: int = MAX_PIXELS
    ) -> Image.Image:
        """Return what `read_image` makes of the bytes of a file, or of a path, within a timeout in seconds.

        Waiting for a process does not count; reading a path does.

        Raises:
            ImageError: as `read_image` does, and for an image that takes too long or too much memory to decode, or
                whose decoder crashes.
        """
        return self._ask("read", source, seconds, max_pixels)

    def read_header(
        self, source: bytes | str | os.PathLike[str], *, seconds: float, max_pixels: int = MAX_PIXELS
    ) -> Header:
        """Return what `read.read_header` does, within the same limits: a header can be made to take long, too. Raises
        ImageError."""
        return self._ask("read_header", source, seconds, max_pixels)

    def _ask(self, what: str, source: bytes | str | os.PathLike[str], seconds: float, max_pixels: int) -> Any:
        if not isinstance(source, bytes | str | os.PathLike):
            raise ImageError(f"expected a path or the bytes of a file, not {type(source).__name__}")
        seconds = min(max(seconds, 0.001), 86_400.0)  # a timeout of zero sets no alarm
        if self._pid != os.getpid():  # after a fork: the processes answer the parent
            self._start()
        with self._slots:
            child = self._take()
            try:
                reply = child.ask(what, source, seconds, max_pixels)
            except BaseException:  # an interrupt too: the next answer of the process would be undefined
                self._drop(child)
                raise
            with self._lock:
                self._idle.append(child)
        if isinstance(reply, ImageError):
            raise reply
        return reply

    def close(self) -> None:
        """End all processes; pending calls get an ImageError."""
        with self._lock:  # while no other process is starting
            self._end()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> "_Child":
        """Return a waiting process, or a new one."""
        while True:
            with self._lock:
                if not self._end.alive:
                    raise ImageError("the image was not decoded: the decoder is closed")
                if not self._idle:
                    child = _Child()
                    self._children.add(child)
                    return child
                child = self._idle.pop()
            if child.alive():
                return child
            self._drop(child)

    def _drop(self, child: "_Child") -> None:
        child.end()
        with self._lock:
            self._children.discard(child)


def _end_all(children: "set[_Child]", pid: int) -> None:
    if pid == os.getpid():
        for child in list(children):
            child.end()


class _Child:
    """One process, seen from the parent."""

    def __init__(self) -> None:
        code = "import sys; sys.path[:] = sys.argv[1:]; from open_gem.images.decoder import serve; serve()"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, *map(str, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
                start_new_session=True,  # the parent handles Ctrl-C in a terminal
            )
        except OSError as error:
            raise ImageError(f"the image was not decoded: no process could be started ({error.strerror})") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._ready = False

    def ask(
        self, what: str, source: bytes | str | os.PathLike[str], seconds: float, max_pixels: int
    ) -> Image.Image | Header | ImageError:
        name = "image bytes" if isinstance(source, bytes) else repr(os.fsdecode(source))
        try:
            if not self._ready:
                self._line(START_SECONDS)
                self._ready = True
            self._send(what, source, seconds, max_pixels)
            reply = json.loads(self._line(seconds + GRACE_SECONDS))
            for text in reply["warnings"]:
                warnings.warn(text, ImageWarning, stacklevel=4)
            if "error" in reply:
                return ImageError(reply["error"])
            header = Header(reply["format"], Size(*reply["size"]), reply["pages"])
            return header if what == "read_header" else self._pixels(header, max_pixels)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            raise ImageError(f"{name} {self._fate(seconds, isinstance(error, TimeoutError))}") from error

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with suppress(OSError):  # ignore unsent bytes
                pipe.close()

    def _send(self, what: str, source: bytes | str | os.PathLike[str], seconds: float, max_pixels: int) -> None:
        request: dict[str, Any] = {"what": what, "seconds": seconds, "max_pixels": max_pixels}
        if isinstance(source, bytes):
            request["bytes"] = len(source)
        else:
            path = os.fsdecode(source)
            request |= {"path": path} if Path(path).is_absolute() else {"path": path, "folder": str(Path.cwd())}
        self._requests.write(to_json(request, ascii=True).encode() + b"\n")
        if isinstance(source, bytes):
            self._requests.write(source)
        self._requests.flush()

    def _line(self, seconds: float) -> bytes:
        """Return the next line, if its first byte comes in time."""
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise TimeoutError
        line = self._replies.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line

    def _pixels(self, header: Header, max_pixels: int) -> Image.Image:
        size = header.size
        if size.height * size.width > max_pixels:  # an intact process does not send this
            raise ValueError
        image = Image.new("RGB", (size.width, size.height))
        for top, bottom in _strips(size):
            strip = self._replies.read((bottom - top) * size.width * 3)
            if len(strip) < (bottom - top) * size.width * 3:
                raise EOFError
            image.paste(Image.frombuffer("RGB", (size.width, bottom - top), strip, "raw", "RGB", 0, 1), (0, top))
        if header.pages > 1:
            image.info["pages"] = header.pages
        return image

    def _fate(self, seconds: float, late: bool) -> str:
        """Return the error that says what became of the image, once the process has ended or must be ended."""
        if not late:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        if late or self._process.returncode == -signal.SIGALRM:
            return f"was not decoded within {seconds:g} seconds"
        ended = self._process.returncode
        how = "sent nonsense" if ended is None else f"signal {-ended}" if ended < 0 else f"exit code {ended}"
        return f"cannot be read: the process that decoded it ended ({how}), out of memory or by a fault of the decoder"


def _strips(size: Size) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows to send at once, first and past the last: small enough for a processor's cache, which halves
    the cost."""
    rows = max(1, STRIP_BYTES // (size.width * 3))
    return ((top, min(top + rows, size.height)) for top in range(0, size.height, rows))


# ------------------------------------------------------------------------------------------------ inside the process


def serve() -> None:
    """Answer requests until standard input ends."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # output of libraries is no reply
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at any point
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    Image.init()
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each thread would have memory of its own
    limit = _Limit()
    with suppress(BrokenPipeError):  # the parent has gone
        replies.write(b"\n")
        replies.flush()
        while line := requests.readline():
            _answer(json.loads(line), requests, replies, limit)


def _answer(request: dict[str, Any], requests: BinaryIO, replies: BinaryIO, limit: "_Limit") -> None:
    if "folder" in request:
        os.chdir(request["folder"])
    source = requests.read(request["bytes"]) if "bytes" in request else request["path"]
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    image, reply = None, {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            limit.allow(source, request["max_pixels"])
            if request["what"] == "read":
                image = read_image(
                    source,
                    max_pixels=request["max_pixels"],
                    before_decoding=lambda pixels: limit.allow(source, pixels),
                )
                header = Header("", size_of(image), image.info.get("pages", 1))
            else:
                header = read_header(source)
            reply = header._asdict()
        except ImageError as error:
            reply["error"] = str(error)
    signal.setitimer(signal.ITIMER_REAL, 0)
    limit.lift()
    reply["warnings"] = [str(warning.message) for warning in caught if warning.category is ImageWarning]
    replies.write(to_json(reply, ascii=True).encode() + b"\n")
    if image is not None:
        for top, bottom in _strips(size_of(image)):
            replies.write(image.crop((0, top, image.width, bottom)).tobytes())
    replies.flush()


class _Limit:
    """The limit of this process's address space, if the system has such limits and says how large it is."""

    def __init__(self) -> None:
        self._start = self._hard = self._most = 0
        self._set: Callable[[tuple[int, int]], None] = lambda limits: None  # macOS: only the deadline holds
        with suppress(ImportError, OSError):
            import resource

            self._start = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
            self._hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            self._most = sys.maxsize if self._hard == resource.RLIM_INFINITY else self._hard
            self._set = partial(resource.setrlimit, resource.RLIMIT_AS)

    def allow(self, source: bytes | str, pixels: int) -> None:
        """Allow memory for the file and so many pixels, beyond that of the process at its start."""
        file = len(source) if isinstance(source, bytes) else _size(source)
        self._set((min(self._start + file + pixels * PIXEL_BYTES + SPARE_BYTES, self._most), self._hard))

    def lift(self) -> None:
        self._set((self._hard, self._hard))


def _size(path: str) -> int:
    """Return the size in bytes of a file, which PIL may map into memory; 0 for a missing one, since reading it gives
    the error."""
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return 0
