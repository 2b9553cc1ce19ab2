"""The application: a localizer, limits, and the routes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import open_gem
from open_gem.locate import AnyLocalizer
from open_gem.serve import routes_about, routes_ground, routes_images, routes_label_studio
from open_gem.serve.errors import DOCUMENTED, add_handlers
from open_gem.serve.guard import Guard
from open_gem.serve.memory import keep_trimmed
from open_gem.serve.metrics import Metrics
from open_gem.serve.service import Service
from open_gem.serve.settings import Settings

ABOUT = """Where things are in an image, by a pretrained vision-language model without training.

Rows come before columns; boxes are left, top, right, bottom in pixels, right and bottom exclusive; points are x, y.
Every error is `{"error": "one line"}`."""


def create_app(localizer: AnyLocalizer, settings: Settings | None = None) -> FastAPI:
    """Make an ASGI application that serves the localizer; its threads end with its lifespan."""
    settings = Settings() if settings is None else settings
    metrics = Metrics()
    service = Service(localizer, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.warm_up()
        trimming = asyncio.create_task(keep_trimmed(lambda: service.worker.batches))
        yield
        trimming.cancel()
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="open_gem",
        version=open_gem.__version__,
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=DOCUMENTED,
    )
    app.state.service = service
    add_handlers(app)
    for routes in (routes_images, routes_ground, routes_label_studio, routes_about):
        app.include_router(routes.routes(service))
    routes_about.add_page(app)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=["Retry-After"],
    )
    return app
