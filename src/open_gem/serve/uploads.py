"""What comes in a request's body, as its sender says it: multipart forms, or JSON. Never a path or an address."""

import json
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from open_gem.serve.errors import RequestError, describe

Form = TypeVar("Form", bound=BaseModel)

FIELDS = 128  # of a form, beside its files
DATA_URI = "data:image/"


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@asynccontextmanager
async def form_of(request: Request, files: int) -> AsyncIterator[FormData]:
    """The request's form, with so many files at most. Raises RequestError for a body that is no such form."""
    if content_type(request) != "multipart/form-data":
        raise RequestError(415, "expected a body of multipart/form-data")
    try:
        form = await request.form(max_files=files, max_fields=FIELDS)
    except HTTPException as error:
        raise RequestError(400, f"cannot read the form: {error.detail}") from error
    except Exception as error:  # such as text in an unknown character set
        raise RequestError(400, f"cannot read the form: {type(error).__name__}") from error
    try:
        yield form
    finally:
        await form.close()


async def files_of(form: FormData, name: str) -> list[bytes]:
    """The content of each file of that name. Raises RequestError if there is none."""
    files = [file for file in form.getlist(name) if isinstance(file, UploadFile)]
    if not files:
        raise RequestError(422, f"the form has no file {name!r}")
    return [await file.read() for file in files]


def fields_of(form: FormData, lists: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a form that are no files; those named in `lists` with all their values."""
    texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    fields: dict[str, Any] = dict(texts)
    return fields | {name: [value for key, value in texts if key == name] for name in lists if name in fields}


def checked(form: type[Form], values: Mapping[str, Any]) -> Form:
    """The values as a `form`. Raises RequestError for values that do not fit it."""
    try:
        return form.model_validate(values)
    except ValidationError as error:
        raise RequestError(422, describe(error.errors(include_url=False))) from error


def parse_json(body: bytes, most: int) -> Any:
    """A JSON document of at most so many values. Raises RequestError.

    Values are counted by the punctuation before them, without parsing: `[[],[],…` takes a hundred times its bytes, and
    the parser holds up all threads. Commas in texts count too.
    """
    values = sum(map(body.count, (b",", b"[", b"{")))
    if values > most:
        raise RequestError(413, f"the JSON has about {values} values, expected {most} at most")
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise RequestError(400, f"the body is no JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {error}") from error


class JsonRoute(APIRoute):
    """A route whose JSON body is parsed in the service's thread for it, not on the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def parsed(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return parsed


class _JsonRequest(Request):
    async def json(self) -> Any:
        try:
            return await self.app.state.service.parse(await self.body())
        except RequestError as error:  # FastAPI lets no other error of this method through
            raise HTTPException(error.status, error.reason) from error


def labels_of(fields: list[str]) -> list[str]:
    """Labels as forms have them: a field each, or one field with a JSON list or commas."""
    if len(fields) != 1:
        return fields
    text = fields[0].strip()
    if text.startswith("["):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(422, f"candidate_labels are no JSON list: {error}") from error
        if not all(isinstance(label, str) for label in listed):
            raise RequestError(422, "candidate_labels hold something else than text")
        return listed
    return [label.strip() for label in text.split(",")]


def from_base64(text: str) -> bytes:
    """The bytes of an image in base64, or of a data: URI. Raises RequestError for anything else, such as an address,
    which is never fetched."""
    encoded = text.partition(",")[2] if text[: len(DATA_URI)].lower() == DATA_URI else text
    try:
        return b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        raise RequestError(422, "inputs are no image in base64; an address is not fetched") from None
