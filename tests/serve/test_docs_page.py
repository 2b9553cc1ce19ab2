"""The page of the HTTP API at /docs, in a real browser: all of the OpenAPI document, nothing from elsewhere."""

import json
import shlex
import subprocess
from typing import Any

import pytest
from browser import serving

pytest.importorskip("fastapi", reason="the server is not installed: pip install open_gem[serve]")


def test_the_docs_page_shows_every_route_and_field_of_the_openapi_document(visit, address):
    page = visit(viewport={"width": 360, "height": 740}).page
    page.goto(f"{address}docs")
    page.wait_for_selector("#docs[aria-busy=false]")
    document = page.evaluate("fetch('openapi.json').then((answer) => answer.json())")
    shown = page.locator("details.route summary code:first-child").all_inner_texts()
    assert shown == [f"{method.upper()} {path}" for path, own in document["paths"].items() for method in own]
    fields = set(page.locator("tbody th").all_text_contents())
    assert {name for schema in document["components"]["schemas"].values() for name in schema["properties"]} <= fields
    assert {"absent", "min_area", "methods"} <= fields
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_request_of_the_docs_page_can_be_sent_as_it_is(visit, address, picture, tmp_path):
    page = visit().page
    page.goto(f"{address}docs")
    page.wait_for_selector("#docs[aria-busy=false]")
    lines = page.locator("details.route pre").all_text_contents()
    command = shlex.split(next(line for line in lines if line.startswith(f"curl {address}v1/images ")))
    (tmp_path / "image.png").write_bytes(picture.read_bytes())
    ran = subprocess.run([command[0], "-s", *command[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(ran.stdout)["height"] == 336
    [asked] = [line for line in lines if line.startswith(f"curl {address}v1/images/ID/ground ")]
    assert shlex.split(asked)[-2:] == ["-d", '{"prompts":["a cat","remote control"]}']


def test_the_docs_page_works_below_a_path_of_a_proxy_and_asks_for_the_token(browser, embedded):
    from open_gem.serve.app import create_app
    from open_gem.serve.settings import Settings

    app = create_app(embedded, Settings(token="secret"))

    async def below(scope: Any, receive: Any, send: Any) -> None:
        """As uvicorn --root-path has it."""
        await app({**scope, "root_path": "/gem"} if scope["type"] == "http" else scope, receive, send)

    with serving(below) as address:
        page = browser.new_page()
        page.goto(f"{address}gem/docs")
        page.fill("#token input", "secret")
        page.click("#token button")
        page.wait_for_selector("#docs[aria-busy=false]")
        line = page.locator("details.route pre").first.text_content()
        assert f'-H "Authorization: Bearer $OPEN_GEM_TOKEN" {address}gem/v1/images ' in line
        page.click("text=The page")
        page.wait_for_selector("#model:not(:empty)")
        page.close()
