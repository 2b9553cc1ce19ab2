"""Upload once, ask as often as you like."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from open_gem.serve import answers
from open_gem.serve.cache import Seen
from open_gem.serve.errors import RequestError, documented
from open_gem.serve.schemas import Ask, Grounded, ImageInfo
from open_gem.serve.service import Service
from open_gem.serve.uploads import JsonRoute, files_of, form_of

Id = Annotated[str, Path(description="Of an uploaded image.", max_length=64)]

FILE = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary", "description": "The picture."}},
            }
        }
    },
}
BODY = documented(400, 408, 413, 415, 422, 429, 503)


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/images", tags=["images"], route_class=JsonRoute)

    @router.post("", status_code=201, responses=BODY, openapi_extra={"requestBody": FILE})
    async def upload(request: Request) -> ImageInfo:
        """Encode a picture; its features are kept as long as there is room."""
        async with form_of(request, files=1) as form:
            [data] = await files_of(form, "file")
        return _info(service, await service.see(data, keep=True))

    @router.get("/{id}", responses=documented(404, 422))
    async def look_up(id: Id) -> ImageInfo:
        """Whether it is still there, and what was said of it."""
        return _info(service, _find(service, id))

    @router.delete("/{id}", status_code=204, responses=documented(404, 422))
    async def drop(id: Id) -> Response:
        """Forget it."""
        if not service.drop(id):
            raise _unknown(id)
        return Response(status_code=204)

    @router.post("/{id}/ground", responses=documented(400, 404, 408, 413, 415, 422, 429, 503))
    async def ground(id: Id, ask: Ask) -> Grounded:
        """Where each phrase is: 404 where the image is no longer there; upload it again then."""
        seen, method = _find(service, id), service.named(ask.method)
        found = await service.ask(seen, ask.prompts, method)
        results = await service.each_prompt(
            answers.result, found, places=ask.place or ask.mask != "none",
            threshold=ask.threshold, mask=ask.mask, similarity=ask.similarity, place=ask.place,
        )  # fmt: skip
        about = {
            "id": id,
            "height": seen.size.height,
            "width": seen.size.width,
            "grid": list(found.similarity.shape[-2:]),
        }
        return Grounded(**about, method=method, model=service.name, results=results)

    return router


def _find(service: Service, id: str) -> Seen:
    if (seen := service.find(id)) is None:
        raise _unknown(id)
    return seen


def _unknown(id: str) -> RequestError:
    return RequestError(404, f"no image {id!r} here, or no longer: upload it again")


def _info(service: Service, seen: Seen) -> ImageInfo:
    size = {"height": seen.size.height, "width": seen.size.width}
    return ImageInfo(id=seen.id, **size, grid=list(seen.grid), model=service.name, methods=list(service.methods))
