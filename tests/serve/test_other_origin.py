"""A page of another origin asks the server, in a real browser: the example of the documentation."""

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from browser import chromium, serving

pytest.importorskip("fastapi", reason="the server is not installed: pip install open_gem[serve]")

EXAMPLES = Path(__file__).parents[2] / "examples"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """The origin of a server that has the example."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=EXAMPLES))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def ask(browser: Any, elsewhere: str, address: str, picture: Path, token: str = "") -> Any:
    page = browser.new_page()
    page.goto(f"{elsewhere}/other_origin.html")
    page.fill("[name=server]", address)
    page.fill("[name=token]", token)
    page.set_input_files("[name=file]", picture)
    page.fill("[name=prompts]", "snail, rabbit, fire engine")
    page.click("button")
    page.wait_for_function("!['', 'Locating …'].includes(document.querySelector('#status').textContent)")
    return page


def test_a_page_of_another_origin_locates_objects(elsewhere, picture, embedded):
    from open_gem.serve.app import create_app
    from open_gem.serve.settings import Settings

    with (
        chromium() as browser,
        serving(create_app(embedded, Settings(origins=(elsewhere,), token="secret"))) as address,
    ):
        page = ask(browser, elsewhere, address, picture, "secret")
        objects = embedded(picture, ["snail", "rabbit", "fire engine"]).objects()
        assert page.inner_text("#status").startswith(f"{len(objects)} objects. Absent: fire engine.")
        assert page.evaluate("[document.querySelector('canvas').width, document.querySelector('canvas').height]") == [
            448,
            336,
        ]
        page = ask(browser, elsewhere, address, picture, "wrong")
        assert "expected the server's token" in page.inner_text("#status")


def test_without_its_origin_a_browser_lets_no_answer_through(elsewhere, picture, address):
    with chromium() as browser:
        assert "Failed to fetch" in ask(browser, elsewhere, address, picture).inner_text("#status")
