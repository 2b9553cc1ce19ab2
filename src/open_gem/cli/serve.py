"""`open-gem serve`: the HTTP API and the page."""

import math
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Timer
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_gem.cli.app import app, say
from open_gem.cli.options import ImageSizeOption, ModelOptions, RefineOption, refinement, with_options
from open_gem.errors import InputError

if TYPE_CHECKING:
    from types import FrameType

    from open_gem.serve.settings import Settings

TOKEN = "OPEN_GEM_TOKEN"


@app.command()
@with_options
def serve(
    *,
    model: ModelOptions,
    image_size: ImageSizeOption = None,
    refine: RefineOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar=TOKEN, help="Token that clients send as `Authorization: Bearer`.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of pages that may ask, such as https://example.com (repeatable)."),
    ] = None,
    root_path: Annotated[str, typer.Option(help="URL path under which a proxy serves it, such as /gem.")] = "",
    forwarded_from: Annotated[
        str, typer.Option(help="Addresses of proxies whose X-Forwarded headers are trusted, comma-separated.")
    ] = "127.0.0.1",
    cache_mb: Annotated[int, typer.Option(min=1, help="MiB for encoded images.")] = 512,
    max_queue: Annotated[int, typer.Option(min=1, help="Maximum pending requests; further ones get HTTP 429.")] = 32,
    max_patches: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum patches per image.", show_default="6 times a square image's"),
    ] = None,
    label_studio_url: Annotated[
        str | None, typer.Option(help="A Label Studio whose images are fetched to predict its tasks.")
    ] = None,
    label_studio_token: Annotated[
        str, typer.Option(envvar="LABEL_STUDIO_API_KEY", help="Token of a user of that Label Studio.")
    ] = "",
) -> None:
    """Serve a model over HTTP: an API for programs, a page for people. Listens on this machine alone by default.

    SIGTERM and Ctrl-C finish pending requests, within 10 seconds. Routes: /openapi.json.
    """
    try:
        import uvicorn  # noqa: F401

        from open_gem.serve.app import create_app
    except ImportError as error:
        raise InputError(f'the server needs {error.name}: pip install "open_gem[serve]"') from error
    from open_gem.serve.label_studio import Source
    from open_gem.serve.memory import limit_arenas
    from open_gem.serve.settings import MIB, Settings, hosts_of

    settings = Settings(
        token=token or None,
        hosts=hosts_of(host),
        origins=tuple(cors_origin or ()),
        cache_bytes=cache_mb * MIB,
        max_queue=max_queue,
        max_patches=max_patches,
        label_studio=None if label_studio_url is None else Source(label_studio_url, label_studio_token),
    )
    if settings.hosts is None and settings.token is None:
        say(f"warning: everyone who can reach {host} may use this server: set --token, or {TOKEN}")
    _check_free(host, port)
    sharpened = refinement(refine)
    limit_arenas()
    run(
        create_app(model.load(size=image_size, refinement=sharpened), settings),
        settings,
        host,
        port,
        root_path=root_path,
        forwarded_allow_ips=forwarded_from,
    )


def run(app: Callable[..., Any], settings: "Settings", host: str, port: int, **options: Any) -> None:
    """Serve until a signal comes. Pending requests then have `stop_seconds`, after which the process ends, even if its
    threads still work; a second signal ends it at once. `options` as of `uvicorn.Config`."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: "FrameType | None") -> None:
            if self.should_exit:
                _end(sig)
            super().handle_exit(sig, frame)
            watch = Timer(settings.stop_seconds, _end, (sig,))
            watch.daemon = True
            watch.start()

    options |= {"host": host, "port": port, "access_log": False, "server_header": False}
    server = Server(uvicorn.Config(app, timeout_graceful_shutdown=math.ceil(settings.stop_seconds), **options))
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise typer.Exit(1)


def _end(sig: int) -> None:
    """End the process without waiting for threads: one in C code cannot be stopped."""
    print("stopped before all requests were answered", file=sys.stderr, flush=True)
    os._exit(128 + sig)


def _check_free(host: str, port: int) -> None:
    """Raise InputError if the address cannot be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a host name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at {host}, port {port}: {reason}; see --host and --port") from error
