"""Upload once, ask as often as you like."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from open_gem.serve import answers
from open_gem.serve.cache import CachedImage
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
                "properties": {"file": {"type": "string", "format": "binary", "description": "The image."}},
            }
        }
    },
}
BODY = documented(400, 408, 413, 415, 422, 429, 503)


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/images", tags=["images"], route_class=JsonRoute)

    @router.post("", status_code=201, responses=BODY, openapi_extra={"requestBody": FILE})
    async def upload(request: Request) -> ImageInfo:
        """Encode an image. It stays in the cache until others need its place."""
        async with form_of(request, files=1) as form:
            [data] = await files_of(form, "file")
        return _info(service, await service.encode(data, keep=True))

    @router.get("/{id}", responses=documented(404, 422))
    async def look_up(id: Id) -> ImageInfo:
        """Whether it is in the cache; answers as the upload did."""
        return _info(service, _find(service, id))

    @router.delete("/{id}", status_code=204, responses=documented(404, 422))
    async def drop(id: Id) -> Response:
        """Forget it."""
        if not service.drop(id):
            raise _unknown(id)
        return Response(status_code=204)

    @router.post("/{id}/ground", responses=documented(400, 404, 408, 413, 415, 422, 429, 503))
    async def ground(id: Id, ask: Ask) -> Grounded:
        """Where each phrase is. 404: the image is no longer in the cache, upload it again."""
        image, method = _find(service, id), service.named(ask.method)
        located = await service.locate(image, ask.prompts, method)
        results = await service.each_prompt(
            answers.result, located, places=ask.place or ask.mask != "none",
            threshold=ask.threshold, mask=ask.mask, similarity=ask.similarity, place=ask.place,
        )  # fmt: skip
        about = {
            "id": id,
            "height": image.size.height,
            "width": image.size.width,
            "grid": list(located.maps.shape[-2:]),
        }
        return Grounded(**about, method=method, model=service.localizer.name, results=results)

    return router


def _find(service: Service, id: str) -> CachedImage:
    if (image := service.find(id)) is None:
        raise _unknown(id)
    return image


def _unknown(id: str) -> RequestError:
    return RequestError(404, f"no image {id!r} here, or no longer: upload it again")


def _info(service: Service, image: CachedImage) -> ImageInfo:
    return ImageInfo(
        id=image.id,
        height=image.size.height,
        width=image.size.width,
        grid=None if image.grid is None else list(image.grid),
        model=service.localizer.name,
        methods=list(service.methods),
    )
