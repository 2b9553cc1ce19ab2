"""Image and labels in one request, in the shapes of Hugging Face's inference API."""

from collections.abc import Callable
from itertools import chain
from typing import Any

from fastapi import APIRouter, Request

from open_gem.errors import OpenGemError
from open_gem.localization import Localization
from open_gem.serve.answers import as_png, objects, value
from open_gem.serve.errors import RequestError, documented
from open_gem.serve.schemas import Batch, BatchItem, Corners, Detection, Inference, Parameters, Segment
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

IMAGE = {"type": "string", "format": "binary"}
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
    single = {"multipart/form-data": _form("file", IMAGE), "application/json": {"schema": INFERENCE}}
    batch = {"multipart/form-data": _form("files", {"type": "array", "items": IMAGE})}

    @router.post("", responses=BODY, openapi_extra={"requestBody": {"required": True, "content": single}})
    async def ground(request: Request) -> list[Detection] | list[Segment]:
        """Where the labels are: a box per object, or a mask per label, best score first."""
        if content_type(request) == "application/json":
            inference = checked(Inference, await request.json())
            data = await service.in_thread(from_base64, inference.inputs)
            return await _ground(service, data, inference.parameters)
        async with form_of(request, files=1) as form:
            [data] = await files_of(form, "file")
            parameters = _parameters(fields_of(form, ("candidate_labels",)))
        return await _ground(service, data, parameters)

    @router.post(
        "/batch",
        response_model_exclude_none=True,
        responses=BODY,
        openapi_extra={"requestBody": {"required": True, "content": batch}},
    )
    async def ground_batch(request: Request) -> Batch:
        """As `/v1/ground`, for several images. One that cannot be read has an error; the others have results."""
        async with form_of(request, files=service.settings.max_files) as form:
            images = await files_of(form, "files")
            parameters = _parameters(fields_of(form, ("candidate_labels",)))
        service.check(parameters.candidate_labels, service.named(parameters.method))
        return Batch(results=await service.side_by_side(lambda data: _batch_item(service, data, parameters), images))

    return router


def _parameters(fields: dict[str, Any]) -> Parameters:
    if "candidate_labels" in fields:
        fields["candidate_labels"] = labels_of(fields["candidate_labels"])
    return checked(Parameters, fields)


async def _batch_item(service: Service, data: bytes, parameters: Parameters) -> BatchItem:
    try:
        return BatchItem(found=await _ground(service, data, parameters))
    except (OpenGemError, RequestError) as error:
        return BatchItem(error=str(error))


async def _ground(service: Service, data: bytes, parameters: Parameters) -> list[Detection] | list[Segment]:
    method = service.named(parameters.method)
    service.check(parameters.candidate_labels, method)
    image = await service.encode(data, keep=False)
    located = await service.locate(image, parameters.candidate_labels, method)
    by_label = await service.each_prompt(TASKS[parameters.task], located, parameters=parameters)
    return sorted(chain.from_iterable(by_label), key=lambda answer: -answer.score)


def detections(label: Localization, parameters: Parameters) -> list[Detection]:
    """A box around each object of a label whose score reaches the threshold."""
    presence = value(label.presence)
    return [
        Detection(
            label=one.label,
            score=one.score,
            presence=presence,
            box=Corners(**dict(zip(CORNERS, one.box, strict=True))),
        )
        for one in objects(label, threshold=parameters.mask_threshold, presence=parameters.threshold)
        if presence is None or one.score >= parameters.threshold
    ]


CORNERS = ("xmin", "ymin", "xmax", "ymax")


def segments(label: Localization, parameters: Parameters) -> list[Segment]:
    """The mask of a label that is in the image, scored by its presence; for models without, by its cosine."""
    presence = value(label.presence)
    if presence is not None and presence < parameters.threshold:
        return []
    score = value(label.scores) if presence is None else presence
    mask = as_png(label.masks(parameters.mask_threshold)[0])
    return [Segment(label=label.labels[0], score=score or 0.0, presence=presence, mask=mask)]


TASKS: dict[str, Callable[..., list[Any]]] = {"object-detection": detections, "image-segmentation": segments}
