"""A server of our own to ask: uvicorn in a thread on a free port, and ways to keep its model busy."""

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from open_gem.locate import AnyLocalizer
from open_gem.serve.app import create_app
from open_gem.serve.service import Service
from open_gem.serve.settings import Settings
from open_gem.serve.worker import JobKind


class Server:
    """A running server: its address, its service, a client. `around` makes what is asked of the application; options as
    of `uvicorn.Config`."""

    def __init__(
        self,
        localizer: AnyLocalizer,
        settings: Settings,
        around: Callable[[Any], Any] = lambda app: app,
        **options: Any,
    ):
        self.app = create_app(localizer, settings)
        self.service: Service = self.app.state.service
        options = {"port": 0, "log_level": "error", "timeout_graceful_shutdown": 5, **options}
        self.uvicorn = uvicorn.Server(uvicorn.Config(around(self.app), **options))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.uvicorn.started)
        self.port: int = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.client = self.new_client()

    def new_client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, **settings)

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(15)
        self.client.close()

    def upload(self, data: bytes) -> dict[str, Any]:
        answer = self.client.post("/v1/images", files={"file": ("any.png", data)})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def metric(self, name: str) -> float:
        """The value of one line of /metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The model at work on something that takes as long as this block."""
        release, begun = threading.Event(), threading.Event()

        def wait(inputs: Any) -> list[None]:
            begun.set()
            release.wait(20)
            return [None]

        self.service.worker.submit(JobKind("busy", wait, lambda input: None, lambda input: 1, 1), None)
        assert begun.wait(10)
        try:
            yield
        finally:
            release.set()

    def raw(self, head: str, body: bytes = b"") -> socket.socket:
        """A connection on which a request's head and some of its body were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return connection


def wait_until(reached: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def png(height: int = 60, width: int = 90, seed: int = 0, **save: Any) -> bytes:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "PNG", **save)


def encoded(image: Image.Image, format: str, **save: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **save)
    return file.getvalue()
