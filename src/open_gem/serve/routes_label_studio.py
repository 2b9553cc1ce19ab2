"""What Label Studio asks of a machine-learning backend: `/predict`, `/setup`, `/versions`; `/health` is everyone's."""

from itertools import chain
from typing import Any

from fastapi import APIRouter

from open_gem.errors import OpenGemError
from open_gem.export.label_studio import box_region, brush_regions, polygon_regions, region
from open_gem.export.labelled import LabelledImage
from open_gem.objects import Object
from open_gem.serve.answers import objects
from open_gem.serve.errors import RequestError, documented
from open_gem.serve.label_studio import Control, controls_of, image_of, phrases_of
from open_gem.serve.schemas import Prediction, Predictions, Tasks, Version, Versions
from open_gem.serve.service import Service
from open_gem.serve.uploads import JsonRoute

REGIONS = {"brush": brush_regions, "polygon": polygon_regions, "box": lambda one, image: iter([box_region(one, image)])}
"""Kinds of controls, best first: a label that several have gets regions of the first."""

PRESENCE = 0.5  # the least presence of labels with regions, unless their control sets another


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["Label Studio"], route_class=JsonRoute)
    version = f"open_gem {service.localizer.name} {service.default}"

    @router.post("/predict", response_model_exclude_none=True, responses=documented(400, 408, 413, 422, 429, 503))
    async def predict(body: Tasks) -> Predictions:
        """Regions of each task's image, in the order of the tasks; an error for an image that cannot be read."""
        controls = controls_of(body.label_config)
        service.check(phrases_of(controls), service.default)
        addresses = [task.data.get(controls[0].key) for task in body.tasks]
        results = await service.side_by_side(lambda address: _predict(service, address, controls, version), addresses)
        return Predictions(results=results, model_version=version)

    @router.post("/setup", responses=documented(400, 408, 413, 422, 429, 503))
    async def setup(body: dict[str, Any]) -> Version:
        """Nothing has to be set up: the labels come with each request."""
        return Version(model_version=version)

    @router.get("/versions", responses=documented())
    async def versions() -> Versions:
        """There is one."""
        return Versions(versions=[version])

    return router


async def _predict(service: Service, address: Any, controls: list[Control], version: str) -> Prediction:
    settings = service.settings
    try:
        data = await service.fetch(image_of, address, settings.label_studio, settings.max_body)
        cached = await service.encode(data, keep=False)
        located = await service.locate(cached, phrases_of(controls), service.default)
        by_label = await service.each_prompt(objects, located, presence=min(map(_least_presence, controls)))
        image = LabelledImage("", "", located.size, tuple(chain.from_iterable(by_label)), lambda: None, dict)
        regions = await service.in_thread(_regions, image, controls)
    except (OpenGemError, RequestError) as error:
        return Prediction(result=[], score=0.0, model_version=version, error=str(error))
    score = max((one.presence or 0.0 for one in image.objects), default=0.0)
    return Prediction(result=regions, score=score, model_version=version)


def _regions(image: LabelledImage, controls: list[Control]) -> list[dict[str, Any]]:
    return [
        region(f"{number}.{part}", one, image, control.kind, value, control.name, control.to)
        for number, one in enumerate(image.objects, start=1)
        for part, (control, value) in enumerate(_shapes(one, image, controls), start=1)
    ]


def _shapes(one: Object, image: LabelledImage, controls: list[Control]) -> list[tuple[Control, dict[str, Any]]]:
    """The regions of an object, each with its control; none if no control has its label, or the label is too
    improbable."""
    having = {control.kind: control for control in controls if one.label in control.labels}
    best = next((kind for kind in REGIONS if kind in having), None)
    if best is None or (one.presence is not None and one.presence < _least_presence(having[best])):
        return []
    return [(having[kind], value) for kind, value in REGIONS[best](one, image) if kind in having]


def _least_presence(control: Control) -> float:
    return PRESENCE if control.presence is None else control.presence
