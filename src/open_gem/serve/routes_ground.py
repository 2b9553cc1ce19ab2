"""Routes that take image and prompts in one request, also in the format of Hugging Face's inference API."""

from typing import Annotated

from fastapi import APIRouter, File

from open_gem.errors import OpenGemError
from open_gem.serve.errors import RequestError
from open_gem.serve.schemas import (
    AskForm,
    Batch,
    BatchForm,
    Corners,
    FormOptions,
    HuggingFaceAsk,
    HuggingFaceObject,
    Located,
    Problem,
)
from open_gem.serve.service import Service
from open_gem.serve.uploads import LimitedRoute, from_base64


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["ground"], route_class=LimitedRoute)

    async def answer(data: bytes, ask: FormOptions) -> Located:
        service.check(ask.prompts, ask.method)
        return await service.ground(await service.encode(data, keep=False), ask.prompts, ask)

    @router.post("/ground", response_model_exclude_unset=True)
    async def ground(form: Annotated[AskForm, File()]) -> Located:
        """Locate prompts in an image, which is not cached."""
        return await answer(await form.file.read(), form)

    @router.post("/ground/batch", response_model_exclude_unset=True)
    async def ground_batch(form: Annotated[BatchForm, File()]) -> Batch:
        """Locate prompts in several images. An image that cannot be read has an error; the others have results."""

        async def answer_or_error(data: bytes) -> Located | Problem:
            try:
                return await answer(data, form)
            except (OpenGemError, RequestError) as error:
                return Problem(error=str(error))

        service.check(form.prompts, form.method)
        images = [await file.read() for file in form.files]
        return Batch(results=await service.side_by_side(answer_or_error, images))

    @router.post("/huggingface")
    async def hugging_face(body: HuggingFaceAsk) -> list[HuggingFaceObject]:
        """Detect objects in the format of Hugging Face's zero-shot object detection, best object first."""
        limit = body.parameters.threshold
        options = FormOptions(prompts=body.parameters.candidate_labels, presence=limit)
        located = await answer(await service.in_thread(from_base64, body.inputs), options)
        answers = [
            HuggingFaceObject(
                label=obj.label,
                score=obj.confidence,
                box=Corners(**dict(zip(Corners.model_fields, obj.box, strict=True))),
            )
            for obj in located.objects
            if obj.presence is None or obj.confidence >= limit
        ]
        return sorted(answers, key=lambda obj: -obj.score)

    return router
