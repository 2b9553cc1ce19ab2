"""Routes that take image and prompts in one request, also in the format of Hugging Face's inference API."""

from typing import Annotated

from fastapi import APIRouter, File

from open_gem.serve.schemas import (
    AskForm,
    Batch,
    BatchForm,
    Compared,
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

    async def answer(data: bytes, ask: FormOptions) -> Located | Compared:
        vocabulary = service.check(ask.prompts, ask)
        return await service.ground(await service.prepare(data), vocabulary, ask)

    @router.post("/ground", response_model_exclude_unset=True)
    async def ground(form: Annotated[AskForm, File()]) -> Located | Compared:
        """Locate prompts in an image, which is not cached."""
        return await answer(await form.file.read(), form)

    @router.post("/ground/batch", response_model_exclude_unset=True)
    async def ground_batch(form: Annotated[BatchForm, File()]) -> Batch:
        """Locate prompts in several images. An image that cannot be read has an error; the others have results."""

        vocabulary = service.check(form.prompts, form)
        results = await service.answer_all(
            form.files,
            lambda file: file.read(),
            service.methods_of(form),
            lambda image: service.ground(image, vocabulary, form),
        )
        return Batch(
            results=[Problem(error=str(result)) if isinstance(result, Exception) else result for result in results]
        )

    @router.post("/huggingface")
    async def hugging_face(body: HuggingFaceAsk) -> list[HuggingFaceObject]:
        """Detect objects in the format of Hugging Face's zero-shot object detection, best object first."""
        limit = body.parameters.threshold
        options = FormOptions(prompts=body.parameters.candidate_labels, presence=limit)
        located = await answer(await service.in_thread(from_base64, body.inputs), options)
        assert isinstance(located, Located), "of one method"
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
