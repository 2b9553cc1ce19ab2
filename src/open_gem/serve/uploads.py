"""Bodies of requests: multipart forms, or JSON, within limits. Never a path or an address."""

import json
from base64 import b64decode
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from open_gem.serve.errors import RequestError

FIELDS = 128  # fields of a form beside its files
DATA_URI = "data:image/"


class LimitedRoute(APIRoute):
    """A route whose bodies are read within the limits of the service, JSON in a thread of its own."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_limited(request: Request) -> Response:
            limited = _LimitedRequest(request.scope, request.receive)
            try:
                return await handle(limited)
            finally:
                for file in limited.files:
                    file.file.close()  # at once, even if the request is cancelled

        return handle_limited


class _LimitedRequest(Request):
    files: tuple[UploadFile, ...] = ()

    async def json(self) -> Any:
        return await self.app.state.service.parse(await self.body())

    async def form(self, **limits: Any) -> FormData:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise RequestError(415, "expected a body of multipart/form-data")
        files = self.app.state.service.settings.max_files
        try:
            form = await super().form(max_files=files, max_fields=FIELDS)
        except HTTPException as error:
            raise RequestError(400, f"cannot read the form: {error.detail}") from error
        except Exception as error:  # such as text in an unknown character set
            raise RequestError(400, f"cannot read the form: {type(error).__name__}") from error
        self.files = tuple(file for _, file in form.multi_items() if isinstance(file, UploadFile))
        if len(form.getlist("file")) > 1:
            raise RequestError(400, "the form has several fields 'file', expected one")
        return form


def parse_json(body: bytes, most: int) -> Any:
    """Parse a JSON document of at most so many values. Raises RequestError.

    Values are counted by the punctuation before them, without parsing: `[[],[],…` takes a hundred times its bytes, and
    the parser holds up all threads. Commas in texts count too.
    """
    values = sum(map(body.count, (b",", b"[", b"{")))
    if values > most:
        raise RequestError(413, f"the JSON has about {values} values, expected {most} at most")
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise RequestError(400, f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error


def from_base64(text: str) -> bytes:
    """Decode the bytes of an image in base64, or of a data: URI. Raises RequestError for anything else, such as an
    address, which is never fetched."""
    encoded = text.partition(",")[2] if text[: len(DATA_URI)].lower() == DATA_URI else text
    try:
        return b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        raise RequestError(422, "the image is not in base64; an address is not fetched") from None
