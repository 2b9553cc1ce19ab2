"""Routes about the server: models, samples, health, metrics, the page."""

from pathlib import Path as FilePath
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

import open_gem
from open_gem.files import to_json
from open_gem.images import colors, draw
from open_gem.localization import MIN_AREA, PRESENCE
from open_gem.method.table import GRADIENTS, METHODS
from open_gem.serve import samples
from open_gem.serve.errors import RequestError
from open_gem.serve.schemas import Health, MethodInfo, ModelInfo, Models, Sample, Samples
from open_gem.serve.service import Service

PAGE = FilePath(__file__).parent / "page"

PNG: dict[int | str, Any] = {200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}}
TEXT: dict[int | str, Any] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", tags=["about"])
    async def models() -> Models:
        """Return the model, its methods, and the limits of requests."""
        localizer = service.localizer
        settings = localizer.describe()
        known = METHODS | GRADIENTS
        return Models(
            models=[
                ModelInfo(
                    name=localizer.name,
                    size=settings["size_rule"],
                    patch=None if localizer.patch is None else list(localizer.patch),
                    dtype=settings["dtype"],
                    template=settings["template"],
                    default=service.default,
                    views=settings.get("views"),
                    methods=[
                        MethodInfo(name=name, about=known[name].about if name in known else name)
                        for name in service.methods
                    ],
                    refinements=list(service.refinements),
                    limits=service.settings.limits() | {"max_patches": service.max_patches},
                    warnings=service.warnings,
                )
            ]
        )

    @router.get("/v1/samples", tags=["about"])
    async def list_samples() -> Samples:
        """List built-in images and the names of their objects."""
        labels = [(name, await service.in_thread(samples.labels, name)) for name in samples.SAMPLES]
        return Samples(samples=[Sample(name=name, labels=listed) for name, listed in labels])

    @router.get("/v1/samples/{name}", tags=["about"], response_class=Response, responses=PNG)
    async def sample(name: str) -> Response:
        """Return a built-in image."""
        if name not in samples.SAMPLES:
            raise RequestError(404, f"no sample {name!r}; known: {', '.join(samples.SAMPLES)}")
        return Response(await service.in_thread(samples.png, name), media_type="image/png")

    @router.head("/health", include_in_schema=False)  # for uptime monitors and proxies
    @router.get("/health", tags=["about"])
    async def health() -> Health:
        """Report whether the server works; Label Studio asks this too."""
        if not service.worker.is_alive:
            raise RequestError(503, "the model's thread has ended: start the server again")
        return Health(status="UP", model_class=service.localizer.name, version=open_gem.__version__)

    @router.get("/metrics", tags=["about"], response_class=Response, responses=TEXT)
    async def metrics() -> Response:
        """Return counts for Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.media_type)

    return router


def add_page(app: FastAPI) -> None:
    """Add the page at `/`, that of the API at `/docs`, and their parts below `/static`."""

    @app.get("/static/constants.js", include_in_schema=False)
    async def page_constants() -> Response:
        return Response(constants(), media_type="text/javascript")

    app.mount("/static", StaticFiles(directory=PAGE), name="static")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")


def constants() -> str:
    """Return a module of JavaScript with the colours and defaults of the library, for the page."""
    values = {
        "HEAT": [channel for color in colors.HEAT for channel in color],
        "LABELS": colors.LABELS,
        "OPACITY": colors.OPACITY,
        "ABSENT_OPACITY": draw.ABSENT_OPACITY,
        "PRESENCE": PRESENCE,
        "MIN_AREA": MIN_AREA,
    }
    return "".join(f"export const {name} = {to_json(value)};\n" for name, value in values.items())
