"""Errors as answers: one line, and a status."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from open_gem.errors import InputError, ModelError, OpenGemError
from open_gem.files import to_json
from open_gem.serve.schemas import Problem

STATUSES = {
    400: "The request makes no sense.",
    401: "The token is missing or wrong.",
    403: "Sent by a page of another site that may not use this server.",
    404: "It does not exist, or no longer: upload the image again.",
    408: "The request did not arrive in time.",
    413: "Something is larger than the limits.",
    415: "A kind of content, or of image, that is not accepted.",
    422: "Something in the request does not exist, or makes no sense.",
    429: "Too many requests at once: try again after Retry-After.",
    500: "The model, or the server itself, has failed.",
    503: "The answer took too long, or the server is stopping.",
}

DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description} for status, description in STATUSES.items()
}
"""The errors of every route, for the OpenAPI document."""


class RequestError(HTTPException):
    """A request that is refused: a status of `STATUSES` and one line."""

    def __str__(self) -> str:
        return self.detail


def error_response(error: HTTPException) -> Response:
    """Return `{"error": "one line"}`; in ASCII, whatever characters the client sent."""
    body = to_json({"error": " ".join(error.detail.split())}, ascii=True)
    return Response(body, error.status_code, error.headers, media_type="application/json")


def add_handlers(app: FastAPI) -> None:
    """Answer every error of the application in this form."""

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        return error_response(error)

    @app.exception_handler(OpenGemError)
    async def _(request: Request, error: OpenGemError) -> Response:
        status = 422 if isinstance(error, InputError) else 500 if isinstance(error, ModelError) else 503
        return error_response(RequestError(status, str(error)))

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return error_response(RequestError(422, "; ".join(map(_describe, error.errors()[:3]))))


def _describe(problem: Mapping[str, Any]) -> str:
    """Describe a validation error of pydantic."""
    place = ".".join(str(part) for part in problem["loc"] if part != "body")
    if not place:
        return "the body is not a JSON object, expected one, sent as Content-Type: application/json"
    return f"{place}: {problem['msg']}"
