"""A real browser and a real server for the tests of the page: Chromium through Playwright, uvicorn in a thread."""

import io
import shutil
import socket
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 30_000  # milliseconds: machines that test are often busy


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, while the block lasts; where there is none, the test is skipped."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address at which an application answers, while the block lasts."""
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server ended before it began"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


FRAME = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"  # what is pending is painted


class Visit:
    """An opened page. `complaints` are errors of the browser, and requests that went elsewhere."""

    def __init__(self, context: Any, address: str):
        self.page, self.address = context.new_page(), address
        self.complaints: list[str] = []
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._note_message)
        self.page.on("request", self._note_request)
        self.page.goto(address)

    def _note_message(self, message: Any) -> None:
        if message.type == "error" and "status of 422" not in message.text:  # a prompt that is half typed is refused
            self.complaints.append(message.text)

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "blob:", "data:")):
            self.complaints.append(f"asked for {request.url}")

    def forgive(self, complaint: str) -> None:
        """What the test itself brought about."""
        self.complaints[:] = [one for one in self.complaints if complaint not in one]

    def open(self) -> "Visit":
        """Wait until the page knows the model."""
        self.page.wait_for_selector("#model:not(:empty)")
        return self

    def look_at(self, path: Path, *prompts: str) -> "Visit":
        """Pick a file, and wait until the page shows it, or says why not."""
        self.page.evaluate("delete document.querySelector('#panels').dataset.image")
        self.page.set_input_files("#file", path)
        self.page.wait_for_function(
            "(name) => document.querySelector('#panels').dataset.image === name"
            " || document.querySelector('#trouble:not([hidden]) p')?.textContent.includes(name)",
            arg=path.name,
        )
        for prompt in prompts:
            self.page.fill("#prompt", prompt)
            self.page.press("#prompt", "Enter")
        return self.shows(prompts[-1]) if prompts else self

    def shows(self, prompt: str, panels: int = 1) -> "Visit":
        """Wait until that many panels have painted `prompt`."""
        self.page.wait_for_function(
            "([prompt, panels]) => panels ==="
            " document.querySelectorAll(`canvas[data-shows=${JSON.stringify(prompt)}]`).length",
            arg=[prompt, panels],
        )
        return self

    def settled(self) -> "Visit":
        """Wait until every prompt has its answer, or nothing more is asked, and the table of results is filled."""
        self.page.evaluate(FRAME)
        self.page.wait_for_selector("#results[aria-busy=false]")
        return self

    def click(self, selector: str) -> "Visit":
        """Click on what the table of results moves while it is filled: between press and release, that is no click."""
        self.settled().page.click(selector)
        return self

    def switch(self, **wanted: bool) -> "Visit":
        for name, on in wanted.items():
            self.page.set_checked(f"input[name={name}]", on)
        return self

    def slide(self, name: str, value: float) -> "Visit":
        self.page.fill(f"#{name}", str(value))
        return self

    def pixels(self, panel: int = 0) -> np.ndarray:
        """What a panel has painted by the next frame: `(y, x, 3)` int."""
        self.page.evaluate(FRAME)
        data = self.page.evaluate("(panel) => document.querySelectorAll('canvas')[panel].toDataURL()", panel)
        image = Image.open(io.BytesIO(b64decode(data.partition(",")[2]))).convert("RGB")
        return np.asarray(image).astype(int)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def rows(self) -> list[list[str]]:
        """The cells of the table of results."""
        self.settled()
        return [row.split("\t") for row in self.texts("#results tbody tr")]

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()
