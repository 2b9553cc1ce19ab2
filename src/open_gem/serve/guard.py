"""The checks before every request: its Host, origin and token, capacity, the size and time of its body, its deadline.

Plain ASGI, in front of the application, so that nothing is read of a request that will not be served.
"""

import asyncio
import hmac
import logging
import time
from base64 import b64decode
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from open_gem.serve.errors import RequestError, error_response
from open_gem.serve.metrics import Metrics
from open_gem.serve.settings import Settings, seconds_to_wait

LOG = logging.getLogger(__name__)
PAGES = ("/", "/docs")  # need no token, like their parts: they ask users for it
DRAIN_SECONDS = 2  # seconds to read the rest of a refused body
BODIES = ("POST", "PUT", "PATCH")  # methods whose requests have one

SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """The application behind these checks."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics
        self.requests, self.bodies = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Request(self, scope, receive, send)
        try:
            await request.answer()
        finally:
            request.leave()

    def changed(self) -> None:
        self.metrics.pending(self.requests, self.bodies)


class _Request:
    """One request in progress."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send):
        self.guard, self.scope, self.settings = guard, scope, guard.settings
        self._receive, self._send = receive, send
        self.headers = Headers(scope=scope)
        self.start = time.perf_counter()
        self.counted, self.bytes = False, 0
        self.max_bytes = (
            guard.settings.max_body if _is_form(self.headers) else guard.settings.max_json
        )  # bytes of the body
        self.arrived = asyncio.Event()  # set once its body is here, or has been refused
        self.refusal: RequestError | None = None
        self.gone = False  # the client
        self.status: int | None = None
        if scope["method"] not in BODIES:
            self.arrived.set()

    async def answer(self) -> None:
        try:
            self._check()
            await self._serve()
        except RequestError as error:
            await self._refuse(error)
        except Exception as error:
            if self.status is not None:
                raise  # too late to answer
            LOG.exception("while answering %s %s", self.scope["method"], self._route())
            await self._refuse(RequestError(500, f"internal server error: {type(error).__name__}"))

    def leave(self) -> None:
        """Release its share of the capacity, once."""
        self.guard.requests -= self.counted
        self.guard.bodies -= self.bytes
        self.counted, self.bytes = False, 0
        self.guard.changed()

    # Before ---------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if not _is_known_host(self.headers.get("host", ""), self.settings.hosts):
            expected = ", ".join(self.settings.hosts or ())
            raise RequestError(400, f"the Host header is {self.headers.get('host')!r}, expected one of {expected}")
        path = self.scope["path"].removeprefix(self.scope.get("root_path", ""))
        is_open = self.settings.token is None or path in (*PAGES, "/health") or path.startswith("/static/")
        if not is_open and not _is_allowed(self.headers.get("authorization", ""), self.settings.token or ""):
            raise RequestError(
                401, "expected the server's token: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"}
            )
        is_known = self.headers.get("origin") in self.settings.origins
        if self.settings.token is None and not is_known and (page := _foreign_page(self.headers, path)) is not None:
            raise RequestError(
                403,
                f"the request comes from {page}, a page of another site, expected this server's own page or a program: "
                "see --cors-origin and --token",
            )
        if self._declared() > self.max_bytes:
            raise self._too_large()
        if self.scope["method"] in BODIES:
            if self.guard.requests >= self.settings.max_queue:
                raise _too_many(f"the server is at capacity: {self.guard.requests} requests are pending")
            self.guard.requests += 1
            self.counted = True
            self.guard.changed()

    def _declared(self) -> int:
        length = self.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(400, "Content-Length is not a number")
        return int(length[:18])  # a longer number is too large as well

    def _too_large(self) -> RequestError:
        form = "" if _is_form(self.headers) else "; images may have more as files of a multipart/form-data body"
        return RequestError(413, f"the request has more than {self.max_bytes} bytes, the limit{form}")

    # The application, watched ---------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        work = asyncio.ensure_future(self.guard.app(self.scope, self.receive, self.send))
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                await watch  # raises why the work must end, or returns once nobody waits for it
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _watch(self) -> None:
        """Wait until the client has left; raise RequestError when one of the two times is over."""
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                await self.arrived.wait()
        except TimeoutError:
            raise RequestError(
                408, f"the request did not arrive within {self.settings.body_seconds:g} seconds"
            ) from None
        if self.refusal is not None:
            raise self.refusal
        try:
            async with asyncio.timeout(self.settings.seconds):
                while not self.gone:
                    self.gone = (await self._receive())["type"] == "http.disconnect"
        except TimeoutError:
            reason = f"no answer within {self.settings.seconds:g} seconds"
            raise RequestError(503, reason, {"Retry-After": seconds_to_wait(self.settings.seconds / 10)}) from None

    async def receive(self) -> Message:
        """Return what the application reads: chunks of the body, counted. After its end nothing comes: `_watch`
        listens."""
        if not self.arrived.is_set():
            message = await self._receive()
            self.gone = message["type"] == "http.disconnect"
            self.refusal = self._count(len(message.get("body", b"")))
            if self.gone or self.refusal is not None or not message.get("more_body", False):
                self.arrived.set()
            if not self.gone and self.refusal is None:
                return message
        return await asyncio.get_running_loop().create_future()  # until it is cancelled

    def _count(self, more: int) -> RequestError | None:
        self.bytes += more
        self.guard.bodies += more
        self.guard.changed()
        if self.bytes > self.max_bytes:
            return self._too_large()
        if self.guard.bodies > self.settings.max_bodies:
            return _too_many("the server is at capacity: the bodies of pending requests are too many bytes")
        return None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            have = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *_encoded(SECURITY.items(), have)]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.leave()  # before the client gets its answer, and may ask again
            self.guard.metrics.answered(self._route(), self.status or 0, time.perf_counter() - self.start)
        await self._send(message)

    async def _refuse(self, error: RequestError) -> None:
        if self.status is None:
            if error.status_code != 408:
                await self._drain()
            await error_response(error)(self.scope, self._receive, self.send)

    async def _drain(self) -> None:
        """Receive the rest of a body, within bounds, and discard it: a client that is still sending does not listen."""
        left = self.settings.max_body
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while left > 0 and not self.arrived.is_set():
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _route(self) -> str:
        """Return the pattern of the path, since paths themselves are unbounded."""
        return getattr(self.scope.get("route"), "path", "other")


def _encoded(headers: Iterable[tuple[str, str]], have: set[bytes]) -> list[tuple[bytes, bytes]]:
    pairs = ((name.encode(), value.encode()) for name, value in headers)
    return [(name, value) for name, value in pairs if name not in have]


def _too_many(reason: str) -> RequestError:
    return RequestError(429, reason, {"Retry-After": "1"})


def _is_known_host(header: str, hosts: tuple[str, ...] | None) -> bool:
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdigit() else header
    return hosts is None or name.strip("[]").lower() in hosts


def _is_form(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


def _foreign_page(headers: Headers, path: str) -> str | None:
    """Return the page of another site that made a browser send this request; None for our own page and for programs.

    A browser names the page's origin in `Origin` (always when it posts), and to trustworthy addresses says in
    `Sec-Fetch-Site` whether it is ours, even if a proxy has changed our Host. Links to the pages themselves are
    welcome.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site == "same-origin":
        return None
    if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
        return repr(origin)
    follows_link = path in PAGES and headers.get("sec-fetch-mode") == "navigate"
    return "a browser" if site == "cross-site" and not follows_link else None


def _is_allowed(header: str, token: str) -> bool:
    """Return True for the right token: Bearer, or Basic with the token as its password, which is what Label Studio
    sends."""
    kind, _, value = header.partition(" ")
    readers: dict[str, Any] = {"bearer": str.strip, "basic": _password}
    read = readers.get(kind.lower())
    return read is not None and hmac.compare_digest(read(value).encode("utf-8", "replace"), token.encode())


def _password(encoded: str) -> str:
    try:
        return b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""
