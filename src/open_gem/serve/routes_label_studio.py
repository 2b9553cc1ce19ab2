"""Routes of a machine-learning backend of Label Studio: `/predict`, `/setup`, `/versions`; `/health` is shared."""

from dataclasses import replace
from itertools import chain
from typing import Any

from fastapi import APIRouter

from open_gem.errors import OpenGemError
from open_gem.export.label_studio import box_region, brush_regions, polygon_regions, region
from open_gem.export.labelled import LabelledImage
from open_gem.localization import Localization
from open_gem.objects import Object
from open_gem.serve.answers import confidence, objects_of
from open_gem.serve.errors import RequestError
from open_gem.serve.label_studio import Control, controls_of, image_of, prompts_of
from open_gem.serve.schemas import Options, Prediction, Predictions, Tasks, Version, Versions
from open_gem.serve.service import Service
from open_gem.serve.uploads import LimitedRoute

REGIONS = {"brush": brush_regions, "polygon": polygon_regions, "box": lambda obj, image: iter([box_region(obj, image)])}
"""Kinds of controls, best first: a label that several have gets regions of the first."""


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["Label Studio"], route_class=LimitedRoute)
    version = f"open_gem {service.localizer.name} {service.default}"

    @router.post("/predict", response_model_exclude_none=True)
    async def predict(body: Tasks) -> Predictions:
        """Return regions of each task's image, in the order of the tasks; an error for an image that cannot be read."""
        controls = controls_of(body.label_config)
        service.check(prompts_of(controls))
        addresses = [task.data.get(controls[0].key) for task in body.tasks]
        results = await service.side_by_side(lambda address: _predict(service, address, controls, version), addresses)
        return Predictions(results=results, model_version=version)

    @router.post("/setup")
    async def setup(body: dict[str, Any]) -> Version:
        """Accept a project: nothing has to be set up, since the labels come with each request."""
        return Version(model_version=version)

    @router.get("/versions")
    async def versions() -> Versions:
        """Return the only version of the model."""
        return Versions(versions=[version])

    return router


async def _predict(service: Service, address: Any, controls: list[Control], version: str) -> Prediction:
    try:
        data = await service.fetch(image_of, address, service.settings.label_studio, service.settings.max_body)
        image = await service.encode(data, keep=False)
        located = await service.locate(image, prompts_of(controls))
        by_label = await service.each_label(_objects, located, controls)
        objects = tuple(chain.from_iterable(by_label))
        labelled = LabelledImage("", "", located.size, objects, lambda: None, dict)
        regions = await service.in_thread(_regions, labelled, controls)
    except (OpenGemError, RequestError) as error:
        return Prediction(result=[], score=0.0, model_version=version, error=str(error))
    score = max((obj.presence or 0.0 for obj in objects), default=0.0)
    return Prediction(result=regions, score=score, model_version=version)


def _objects(label: Localization, controls: list[Control]) -> list[Object]:
    """Return the objects of a label from the presence of the control that shows it, scored by their confidence."""
    options = Options(presence=_best_control(label.labels[0], controls).presence, mask="rle")
    return [replace(obj, score=confidence(obj)) for obj in objects_of(label, options)]


def _best_control(label: str, controls: list[Control]) -> Control:
    having = {control.kind: control for control in controls if label in control.labels}
    return next(having[kind] for kind in REGIONS if kind in having)


def _regions(image: LabelledImage, controls: list[Control]) -> list[dict[str, Any]]:
    return [
        region(f"{number}.{part}", obj, image, control.kind, value, control.name, control.to)
        for number, obj in enumerate(image.objects, start=1)
        for part, (control, value) in enumerate(_shapes(obj, image, controls), start=1)
    ]


def _shapes(obj: Object, image: LabelledImage, controls: list[Control]) -> list[tuple[Control, dict[str, Any]]]:
    """Return the regions of an object, each with the control that has them."""
    having = {control.kind: control for control in controls if obj.label in control.labels}
    shapes = REGIONS[_best_control(obj.label, controls).kind](obj, image)
    return [(having[kind], value) for kind, value in shapes if kind in having]
