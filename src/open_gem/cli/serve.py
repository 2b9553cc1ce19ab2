"""`open-gem serve`: the HTTP API and the page."""

import math
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Timer
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_gem.cli.app import app, say
from open_gem.cli.ground import load
from open_gem.cli.options import (
    VIEWS,
    ModelOptions,
    RedundancyOption,
    TemplateOption,
    TuneOptions,
    ViewOptions,
    names_of_options,
    split_commas,
    with_options,
)
from open_gem.errors import InputError

if TYPE_CHECKING:
    from types import FrameType

    from open_gem.locate import AnyLocalizer
    from open_gem.method.table import Method
    from open_gem.refine import Refinement
    from open_gem.serve.settings import Settings

TOKEN = "OPEN_GEM_TOKEN"


@dataclass(frozen=True)
class ServedViewOptions(ViewOptions):
    """The views of every image, and the refinements that requests may choose."""

    refine: Annotated[
        str | None,
        typer.Option(
            help='Refinements that requests may choose, comma-separated; the first is the default: "none,pamr".',
            show_default="none",
            rich_help_panel=VIEWS,
        ),
    ] = None

    def refinements(self) -> "dict[str, Refinement | None]":
        """Return the refinements by name. Raises InputError for an unknown one."""
        from open_gem.serve.settings import NONE

        names = [] if self.refine is None else split_commas(self.refine)
        return {name: None if name == NONE else replace(self, refine=name).refinement() for name in names}


@app.command()
@with_options
def serve(
    *,
    model: ModelOptions,
    template: TemplateOption = None,
    remove_redundancy: RedundancyOption = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="Methods that requests may choose, comma-separated; the first is the default.",
            show_default="all; gem",
        ),
    ] = None,
    tuning: TuneOptions,
    views: ServedViewOptions,
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

    Options of the model, its methods and views are those of `open-gem ground`; requests choose among the methods and
    refinements. SIGTERM and Ctrl-C finish pending requests, within 10 seconds. Routes: /docs.
    """
    try:
        import uvicorn  # noqa: F401

        from open_gem.serve.app import create_app
    except ImportError as error:
        raise InputError(
            f"the server needs {error.name}: install open_gem with its extra `serve`, see the README"
        ) from error
    from open_gem.serve.label_studio import Source
    from open_gem.serve.memory import limit_arenas
    from open_gem.serve.settings import MIB, Settings, hosts_of

    if model.is_trained():
        model.check_untrained(names_of_options(views))
    settings = Settings(
        refinements=views.refinements(),
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
    limit_arenas()
    localizer, served = load_served(model, method, template, remove_redundancy, tuning, views)
    settings = replace(settings, served=served)
    run(
        create_app(localizer, settings),
        settings,
        host,
        port,
        root_path=root_path,
        forwarded_allow_ips=forwarded_from,
    )


def load_served(
    model: ModelOptions,
    method: str | None,
    template: str | None,
    remove_redundancy: bool,
    tuning: TuneOptions,
    views: ServedViewOptions,
) -> "tuple[AnyLocalizer, dict[str, Method] | None]":
    """Load the localizer, without its refinement, and its methods by name; None for all. Without `--method`, settings
    of methods are those of the default."""
    from open_gem.method.table import GRADIENTS, METHODS

    localizer, methods = load(model, method, template, remove_redundancy, tuning, replace(views, refine=None))
    if not methods or method is not None:
        return localizer, methods or None
    return localizer, localizer.methods({name: name for name in METHODS | GRADIENTS}) | methods


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
