"""`open-gem serve`: the HTTP API and the page."""

import socket
from typing import Annotated

import typer

from open_gem.cli._app import DeviceOption, DtypeOption, ModelOption, PretrainedOption, app, load_localizer, say
from open_gem.errors import InputError

TOKEN = "OPEN_GEM_TOKEN"


@app.command()
def serve(
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    size: Annotated[str | None, typer.Option(help="Size rule; else as the model recommends.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar=TOKEN, help="What clients have to send as `Authorization: Bearer`.")
    ] = None,
    cache_mb: Annotated[int, typer.Option(min=1, help="MiB for features of uploaded images.")] = 512,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests in the house; more are told 429.")] = 32,
    label_studio_url: Annotated[
        str | None, typer.Option(help="A Label Studio whose pictures are fetched to predict its tasks.")
    ] = None,
    label_studio_token: Annotated[
        str, typer.Option(envvar="LABEL_STUDIO_API_KEY", help="Of a user of that Label Studio.")
    ] = "",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Serve a model over HTTP: an API for programs, a page for people. Listens on this machine alone by default.

    SIGTERM and Ctrl-C finish what is at hand. Routes: /openapi.json, and docs/serving.md.
    """
    try:
        import uvicorn

        from open_gem.serve.app import create_app
    except ImportError as error:
        raise InputError(f'the server needs {error.name}: pip install "open_gem[serve]"') from error
    from open_gem.serve.label_studio import Source
    from open_gem.serve.settings import MIB, Settings, hosts_of

    settings = Settings(
        token=token or None,
        hosts=hosts_of(host),
        cache_bytes=cache_mb * MIB,
        max_queue=max_queue,
        label_studio=None if label_studio_url is None else Source(label_studio_url, label_studio_token),
    )
    if settings.hosts is None and settings.token is None:
        say(f"warning: everyone who can reach {host} may use this server: set --token, or {TOKEN}")
    _check_free(host, port)
    localizer = load_localizer(model, pretrained, device, dtype, size=size)
    uvicorn.run(
        create_app(localizer, settings),
        host=host,
        port=port,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.stop_seconds),
    )


def _check_free(host: str, port: int) -> None:
    """Raises InputError where one cannot listen, before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            listener.bind(address)
    except (OSError, UnicodeError) as error:  # the latter of names that are none
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at {host}, port {port}: {reason}; see --host and --port") from error
