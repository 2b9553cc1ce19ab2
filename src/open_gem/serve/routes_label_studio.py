"""Routes of a machine-learning backend of Label Studio: `/predict`, `/setup`, `/versions`; `/health` is shared."""

from itertools import chain
from secrets import token_hex
from typing import Any

from fastapi import APIRouter

from open_gem.export.label_studio import box_region, brush_regions, polygon_regions, region
from open_gem.export.labelled import LabelledImage
from open_gem.objects import Object
from open_gem.serve.answers import objects_of
from open_gem.serve.cache import CachedImage
from open_gem.serve.label_studio import Control, controls_of, image_of, prompts_of, typed_prompts
from open_gem.serve.schemas import Options, Prediction, Predictions, Task, Tasks, Version, Versions
from open_gem.serve.service import Service
from open_gem.serve.uploads import LimitedRoute
from open_gem.text import Vocabulary

OPTIONS = Options(mask="rle")
REGIONS = {"brush": brush_regions, "polygon": polygon_regions, "box": lambda obj, image: iter([box_region(obj, image)])}
"""Kinds of controls, best first: a label that several have gets regions of the first."""


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["Label Studio"], route_class=LimitedRoute)
    version = f"open_gem {service.localizer.name} {service.default}"

    @router.post("/predict", response_model_exclude_none=True)
    async def predict(body: Tasks) -> Predictions:
        """Return regions of each task's image, in the order of the tasks; an error for an image that cannot be read."""
        controls = controls_of(body.label_config)
        typed = typed_prompts(controls, body.params or {})
        if typed is not None and not typed:
            nothing = Prediction(result=[], score=0.0, model_version=version)
            return Predictions(results=[nothing] * len(body.tasks), model_version=version)
        vocabulary = service.check(prompts_of(controls) if typed is None else typed, OPTIONS)

        async def fetch(task: Task) -> bytes:
            settings, address = service.settings, task.data.get(controls[0].key)
            return await service.fetch(image_of, address, settings.label_studio, settings.max_body)

        results = await service.answer_all(
            body.tasks, fetch, (service.default,), lambda image: _predict(service, image, vocabulary, controls, version)
        )
        predictions = [
            Prediction(result=[], score=0.0, model_version=version, error=str(result))
            if isinstance(result, Exception)
            else result
            for result in results
        ]
        return Predictions(results=predictions, model_version=version)

    @router.post("/setup")
    async def setup(body: dict[str, Any]) -> Version:
        """Accept a project: nothing has to be set up, since the labels come with each request."""
        return Version(model_version=version)

    @router.get("/versions")
    async def versions() -> Versions:
        """Return the only version of the model."""
        return Versions(versions=[version])

    return router


async def _predict(
    service: Service, image: CachedImage, vocabulary: Vocabulary, controls: list[Control], version: str
) -> Prediction:
    located = await service.locate(image, vocabulary, OPTIONS, service.default)

    def work(index: int) -> list[Object]:
        """Return the objects of a label from the presence of its control."""
        limit = _best_control(located.labels[index], controls).presence
        return objects_of(located[index], OPTIONS) if located.present(limit)[index] else []

    by_label = await service.each_label(work, located, alone=service.is_heavy(OPTIONS))
    objects = tuple(chain.from_iterable(by_label))
    labelled = LabelledImage("", "", located.size, objects, lambda: None, dict)
    regions = await service.in_thread(_regions, labelled, controls)
    score = max((obj.confidence for obj in objects), default=0.0)
    return Prediction(result=regions, score=score, model_version=version)


def _having(label: str, controls: list[Control]) -> dict[str, Control]:
    """Return the controls that a label's regions can come from, by their kinds; all, if it is in none of them."""
    every = {control.kind: control for control in controls}
    return {control.kind: control for control in controls if label in control.labels} or every


def _best_control(label: str, controls: list[Control]) -> Control:
    having = _having(label, controls)
    return next(having[kind] for kind in REGIONS if kind in having)


def _regions(image: LabelledImage, controls: list[Control]) -> list[dict[str, Any]]:
    known, answer = prompts_of(controls), token_hex(4)  # ids of one annotation are of several answers
    return [
        region(
            f"{answer}.{number}.{part}", obj, image, control.kind, value, control.name, control.to, obj.label in known
        )
        for number, obj in enumerate(image.objects, start=1)
        for part, (control, value) in enumerate(_shapes(obj, image, controls), start=1)
    ]


def _shapes(obj: Object, image: LabelledImage, controls: list[Control]) -> list[tuple[Control, dict[str, Any]]]:
    """Return the regions of an object, each with the control that has them."""
    having = _having(obj.label, controls)
    shapes = REGIONS[_best_control(obj.label, controls).kind](obj, image)
    return [(having[kind], value) for kind, value in shapes if kind in having]
