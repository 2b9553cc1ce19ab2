"""Picture and labels in one request, in the shapes of Hugging Face's inference API."""

from threading import Event
from typing import Any

from fastapi import APIRouter, Request

from open_gem.errors import OpenGemError
from open_gem.export.localized import image_of
from open_gem.localization import Localization
from open_gem.serve.answers import as_png, by_prompt, value
from open_gem.serve.errors import RequestError, documented
from open_gem.serve.schemas import Batch, Corners, Detection, Inference, OneOf, Parameters, Segment
from open_gem.serve.service import Service
from open_gem.serve.uploads import (
    checked,
    content_type,
    fields_of,
    files_of,
    form_of,
    from_base64,
    json_object,
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
    router = APIRouter(prefix="/v1/ground", tags=["ground"])
    one = {"multipart/form-data": _form("file", PICTURE), "application/json": {"schema": INFERENCE}}
    several = {"multipart/form-data": _form("files", {"type": "array", "items": PICTURE})}

    @router.post("", responses=BODY, openapi_extra={"requestBody": {"required": True, "content": one}})
    async def ground(request: Request) -> list[Detection] | list[Segment]:
        """Where the labels are: a box an object, or a mask a label, best score first."""
        if content_type(request) == "application/json":
            asked = checked(Inference, await service.in_thread(json_object, await request.body()))
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
        service.check(parameters.candidate_labels, service.named(parameters.pathway))
        return Batch(results=[await _one_of(service, data, parameters) for data in pictures])

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
    pathway = service.named(parameters.pathway)
    service.check(parameters.candidate_labels, pathway)
    seen = await service.see(data, keep=False)
    found = await service.ask(seen, parameters.candidate_labels, pathway)
    return await service.told(TASKS[parameters.task], found, parameters=parameters)


def detections(found: Localization, gone: Event, parameters: Parameters) -> list[Detection]:
    """A box a connected part, of the labels that are in the image; most probable label first."""
    told = []
    for label in by_prompt(found, gone):
        image = image_of(label, threshold=parameters.mask_threshold, presence=parameters.threshold)
        for one in image.objects:
            box = Corners(**dict(zip(CORNERS, one.xyxy, strict=True)))
            told.append(Detection(label=one.name, score=_score(label), box=box))
    return sorted(told, key=lambda one: -one.score)


CORNERS = ("xmin", "ymin", "xmax", "ymax")


def segments(found: Localization, gone: Event, parameters: Parameters) -> list[Segment]:
    """A mask a label that is in the image, most probable first."""
    told = []
    for label in by_prompt(found, gone):
        presence = value(label.presence)
        if presence is None or presence >= parameters.threshold:
            mask = as_png(label.masks(parameters.mask_threshold)[0])
            told.append(Segment(label=label.prompts[0], score=_score(label), mask=mask))
    return sorted(told, key=lambda one: -one.score)


TASKS = {"object-detection": detections, "image-segmentation": segments}


def _score(label: Localization) -> float:
    """How probable it is that the label is in the image; of models that do not say, its cosine."""
    known = (value(label.presence), value(label.scores))
    return next((one for one in known if one is not None), 0.0)
