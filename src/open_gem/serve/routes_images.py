"""Routes that upload an image once and locate prompts in it repeatedly."""

from typing import Annotated

from fastapi import APIRouter, File, Path, Response

from open_gem.serve.cache import CachedImage
from open_gem.serve.errors import RequestError
from open_gem.serve.schemas import Ask, Compared, ImageForm, ImageInfo, Like, Located
from open_gem.serve.service import Service
from open_gem.serve.uploads import LimitedRoute
from open_gem.text import Exemplar

Id = Annotated[str, Path(description="Of an uploaded image.", max_length=64)]


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/images", tags=["images"], route_class=LimitedRoute)

    @router.post("", status_code=201)
    async def upload(form: Annotated[ImageForm, File()]) -> ImageInfo:
        """Encode an image. It stays in the cache until others need its place."""
        return _info(service, await service.upload(await form.file.read()))

    @router.get("/{id}")
    async def look_up(id: Id) -> ImageInfo:
        """Report whether an image is in the cache, with the answer of its upload."""
        return _info(service, _cached(service, id))

    @router.delete("/{id}", status_code=204)
    async def drop(id: Id) -> Response:
        """Remove an image from the cache."""
        if not service.drop(id):
            raise _unknown(id)
        return Response(status_code=204)

    @router.post("/{id}/ground", response_model_exclude_unset=True)
    async def ground(id: Id, ask: Ask) -> Located | Compared:
        """Locate prompts in an uploaded image. 404: it, or the image of an exemplar, is no longer in the cache, upload
        it again."""
        image, prompts = _cached(service, id), ask.prompts
        if isinstance(prompts, dict):
            prompts = {label: [prompt(entry) for entry in own] for label, own in prompts.items()}
        return await service.ground(image, service.check(prompts, ask), ask)

    def prompt(entry: str | Like) -> str | Exemplar:
        if isinstance(entry, str):
            return entry
        left, top, right, bottom = entry.box
        return Exemplar(_cached(service, entry.like), (left, top, right, bottom), f"{entry.like}:{entry.box}")

    return router


def _cached(service: Service, id: str) -> CachedImage:
    if (image := service.find(id)) is None:
        raise _unknown(id)
    return image


def _unknown(id: str) -> RequestError:
    return RequestError(404, f"image {id!r} is not in the cache: upload it again")


def _info(service: Service, image: CachedImage) -> ImageInfo:
    return ImageInfo(
        id=image.id,
        height=image.size.height,
        width=image.size.width,
        grid=None if image.grid is None else list(image.grid),
        model=service.localizer.name,
        methods=list(service.methods),
        warnings=service.warnings,
    )
