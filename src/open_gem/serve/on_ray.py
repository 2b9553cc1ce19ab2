"""The same application as a deployment of Ray Serve: replicas on as many machines as its cluster has.

    serve run deployment:app        # deployment.py: app = open_gem.serve.on_ray.deployment(replicas=4)

Only the replica that received an upload knows the image. Requests with the same `serve_multiplexed_model_id` header,
any word that the client chooses, go to one replica as long as it lives; after a 404 the client uploads again.
"""

from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from open_gem.errors import InputError
from open_gem.localizer import load
from open_gem.serve.app import create_app
from open_gem.serve.settings import Settings

if TYPE_CHECKING:
    from ray.serve import Application

SESSIONS = 1000  # sessions that a replica keeps as its own


def deployment(
    model: str | None = None,
    pretrained: str | None = None,
    *,
    replicas: int = 2,
    settings: Settings | None = None,
    gpus: float = 0,
    **load_settings: Any,
) -> "Application":
    """Make an application for `serve.run`, or to name to `serve run`.

    model, pretrained, load_settings  as of `open_gem.load`; each replica loads the model
    replicas                          processes with a model each
    gpus                              GPUs of a replica, or a share of a GPU

    Raises InputError without Ray Serve.
    """
    serve = _serve()
    limits = Settings() if settings is None else settings

    def build() -> ASGIApp:
        return _Sticky(create_app(load(model, pretrained, **load_settings), limits))

    replicated = serve.deployment(
        serve.ingress(build)(),
        name="open_gem",
        num_replicas=replicas,
        max_ongoing_requests=2 * limits.max_queue,  # the application itself answers 429 beyond its queue
        graceful_shutdown_timeout_s=limits.stop_seconds,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )
    return replicated.bind()


class _Sticky:
    """Tells Ray which sessions this replica has seen, so that their requests come here."""

    def __init__(self, app: ASGIApp):
        self.app = app
        serve = _serve()

        async def known(session: str) -> str:
            return session

        self._known = serve.multiplexed(max_num_models_per_replica=SESSIONS)(known)
        self._session = serve.get_multiplexed_model_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (session := self._session()):
            await self._known(session)
        await self.app(scope, receive, send)


def _serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise InputError('Ray Serve is not installed: pip install "open_gem[ray-serve]"') from error
    return serve
