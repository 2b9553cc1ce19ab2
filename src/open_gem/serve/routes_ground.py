"""Picture and labels in one request, in the shapes of Hugging Face's inference API."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request

from open_gem.errors import OpenGemError
from open_gem.export.localized import image_of
from open_gem.localization import Localization
from open_gem.serve.answers import as_png, object_scores, value
from open_gem.serve.errors import RequestError, documented
from open_gem.serve.schemas import Batch, Corners, Detection, Inference, OneOf, Parameters, Segment
from open_gem.serve.service import Service
from open_gem.serve.uploads import (
    JsonRoute,
    checked,
    content_type,
    fields_of,
    files_of,
    form_of,
    from_base64,
    labels_of,
)

PICTURE = {"type": "string", "format": "binary"}
FIELDS = {
    "candidate_labels": {
        "type": "array",
        "items": {"type": "string"},
        "description": "A field each; or one with labels by commas, or a JSON list.",
    },
    **{
        name: schema
        for name, schema in Parameters.model_json_schema()["properties"].items()
        if name != "candidate_labels"
    },
}
INFERENCE = Inference.model_json_schema()
INFERENCE["properties"]["parameters"] = INFERENCE.pop("$defs")["Parameters"]  # a document has no other place for it
BODY = documented(400, 408, 413, 415, 422, 429, 503)


def _form(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    fields = {name: schema, **FIELDS}
    return {"schema": {"type": "object", "required": [name, "candidate_labels"], "properties": fields}}


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/ground", tags=["ground"], route_class=JsonRoute)
    one = {"multipart/form-data": _form("file", PICTURE), "application/json": {"schema": INFERENCE}}
    several = {"multipart/form-data": _form("files", {"type": "array", "items": PICTURE})}

    @router.post("", responses=BODY, openapi_extra={"requestBody": {"required": True, "content": one}})
    async def ground(request: Request) -> list[Detection] | list[Segment]:
        """Where the labels are: a box an object, or a mask a label, best score first."""
        if content_type(request) == "application/json":
            asked = checked(Inference, await request.json())
            data = await service.in_thread(from_base64, asked.inputs)
            return await _grounded(service, data, asked.parameters)
        async with form_of(request, files=1) as form:
            [data] = await files_of(form, "file")
            parameters = _parameters(fields_of(form, ("candidate_labels",)))
        return await _grounded(service, data, parameters)

    @router.post(
        "/batch",
        response_model_exclude_none=True,
        responses=BODY,
        openapi_extra={"requestBody": {"required": True, "content": several}},
    )
    async def ground_batch(request: Request) -> Batch:
        """The same for several pictures. One that cannot be read has its reason, and the others are there."""
        async with form_of(request, files=service.settings.max_files) as form:
            pictures = await files_of(form, "files")
            parameters = _parameters(fields_of(form, ("candidate_labels",)))
        service.check(parameters.candidate_labels, service.named(parameters.method))
        return Batch(results=await service.side_by_side(lambda data: _one_of(service, data, parameters), pictures))

    return router


def _parameters(fields: dict[str, Any]) -> Parameters:
    if "candidate_labels" in fields:
        fields["candidate_labels"] = labels_of(fields["candidate_labels"])
    return checked(Parameters, fields)


async def _one_of(service: Service, data: bytes, parameters: Parameters) -> OneOf:
    try:
        return OneOf(found=await _grounded(service, data, parameters))
    except (OpenGemError, RequestError) as error:
        return OneOf(error=str(error))


async def _grounded(service: Service, data: bytes, parameters: Parameters) -> list[Detection] | list[Segment]:
    method = service.named(parameters.method)
    service.check(parameters.candidate_labels, method)
    seen = await service.see(data, keep=False)
    found = await service.ask(seen, parameters.candidate_labels, method)
    by_label = await service.each_prompt(TASKS[parameters.task], found, parameters=parameters)
    return sorted((one for made in by_label for one in made), key=lambda one: -one.score)


def detections(label: Localization, parameters: Parameters) -> list[Detection]:
    """A box around each connected part of a label's mask, if its score is high enough."""
    image = image_of(label, threshold=parameters.mask_threshold, presence=parameters.threshold)
    if not image.objects:
        return []
    scores = object_scores(label, [one.score for one in image.objects])
    return [
        Detection(
            label=one.name,
            score=score,
            presence=value(label.presence),
            box=Corners(**dict(zip(CORNERS, one.xyxy, strict=True))),
        )
        for one, score in zip(image.objects, scores, strict=True)
        if label.presence is None or score >= parameters.threshold
    ]


CORNERS = ("xmin", "ymin", "xmax", "ymax")


def segments(label: Localization, parameters: Parameters) -> list[Segment]:
    """The mask of a label that is in the image, scored by its presence; for models without, by its cosine."""
    presence = value(label.presence)
    if presence is not None and presence < parameters.threshold:
        return []
    score = next((one for one in (presence, value(label.scores)) if one is not None), 0.0)
    mask = as_png(label.masks(parameters.mask_threshold)[0])
    return [Segment(label=label.prompts[0], score=score, presence=presence, mask=mask)]


TASKS: dict[str, Callable[..., list[Any]]] = {"object-detection": detections, "image-segmentation": segments}
