"""The block of the guide makes nginx a proxy in front of the server: nginx runs it as it is but for its addresses."""

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import Server, encoded, png, wait_until

from open_gem.serve.settings import Settings, hosts_of

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "behind-nginx.md"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
AROUND = """daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {block}
}}
"""
TOKEN = {"Authorization": "Bearer secret"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx-light"),
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def seen() -> list[Any]:
    """Who asked the server, and by which scheme, request by request."""
    return []


@pytest.fixture(scope="module")
def proxy(tiny_localizer, seen, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A server as `open-gem serve --root-path /gem` has it, and nginx in front."""
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()

    def watched(application: Any) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                seen.append((scope["client"][0], scope["scheme"]))
            await application(scope, receive, send)

        return answer

    settings = Settings(token="secret", hosts=hosts_of("127.0.0.1"))
    server = Server(tiny_localizer, settings, watched, root_path="/gem", forwarded_allow_ips="127.0.0.1")
    [block] = re.findall(r"```nginx\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    here = {"listen 80;": f"listen 0.0.0.0:{port};", "127.0.0.1:8000": f"127.0.0.1:{server.port}"}
    for documented, used in here.items():
        assert block.count(documented) == 1
        block = block.replace(documented, used)
    (folder / "nginx.conf").write_text(AROUND.format(folder=folder, block=block))
    process = subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")])
    base = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (folder / "error.log").read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers)
        yield SimpleNamespace(base=base, server=server)
    finally:
        process.terminate()
        process.wait(10)
        server.stop()


def client_at(proxy: SimpleNamespace, address: str) -> httpx.Client:
    """A client with an address of its own, which has limits of its own."""
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=f"{proxy.base}/gem", transport=transport, timeout=60)


def test_the_page_its_files_and_the_health_check_are_below_the_path(proxy):
    with client_at(proxy, "127.0.0.2") as client:
        page = client.get("/")
        assert page.status_code == 200 and "open_gem" in page.text
        files = re.findall(r'(?:href|src)="(static/[^"]+)"', page.text)
        assert files
        assert [client.get(f"/{file}").status_code for file in files] == [200] * len(files)
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers=TOKEN).status_code == 200
        moved = httpx.get(f"{proxy.base}/gem")
        assert (moved.status_code, moved.headers["location"].endswith("/gem/")) == (301, True)


def test_images_are_grounded_small_and_large(proxy):
    pixels = np.random.default_rng(0).integers(0, 256, (2600, 2600, 3), dtype=np.uint8)
    large = encoded(Image.fromarray(pixels), "PNG")
    assert 19e6 < len(large) < 25e6
    with client_at(proxy, "127.0.0.3") as client:
        for image in (png(), large):
            answer = client.post(
                "/v1/ground", headers=TOKEN, files={"file": image}, data={"prompts": "a cat", "objects": "false"}
            )
            assert answer.status_code == 200, answer.text
            assert [label["label"] for label in answer.json()["labels"]] == ["a cat"]


@pytest.mark.parametrize("size", [32.5, 40], ids=["by the server", "by nginx"])
def test_what_is_too_large_is_refused_in_the_same_form(size, proxy):
    with client_at(proxy, "127.0.0.4") as client:
        answer = client.post("/v1/images", headers=TOKEN, files={"file": bytes(int(size * 2**20))})
    assert answer.status_code == 413
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json().keys() == {"error"} and "\n" not in answer.json()["error"]


def test_the_server_knows_the_address_of_the_client_and_believes_no_other(proxy, seen):
    forged = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    with client_at(proxy, "127.0.0.5") as client:
        client.get("/health", headers=forged)
    assert seen[-1] == ("127.0.0.5", "http")


def test_a_client_that_asks_too_often_is_limited_and_others_are_not(proxy):
    with client_at(proxy, "127.0.0.6") as busy, client_at(proxy, "127.0.0.7") as other:
        answers = [busy.get("/health") for _ in range(60)]
        assert other.get("/health").status_code == 200
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused and len(answers) - len(refused) >= 30
    for answer in refused:
        assert (answer.status_code, answer.json().keys(), answer.headers["retry-after"]) == (429, {"error"}, "1")


def test_a_server_that_is_down_is_an_error_in_the_same_form(proxy):
    proxy.server.stop()
    with client_at(proxy, "127.0.0.8") as client:
        answer = client.get("/health")
    assert (answer.status_code, answer.json().keys()) == (502, {"error"})
