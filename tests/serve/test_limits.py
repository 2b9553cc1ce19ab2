"""The limits of `open-gem serve`: requests that are too large, too many, too slow, or not allowed."""

import asyncio
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from serving import Server, encoded, png, wait_until
from typer.testing import CliRunner

from open_gem.cli import app
from open_gem.errors import InputError
from open_gem.locate import Prepared
from open_gem.method.run import Encoded
from open_gem.serve.cache import Cache, CachedImage
from open_gem.serve.errors import RequestError
from open_gem.serve.settings import Settings, hosts_of
from open_gem.serve.worker import JobKind, Worker
from open_gem.types import Grid, Size

LIMITS = Settings(
    max_queue=4, max_body=300_000, max_bodies=700_000, max_pixels=40_000, max_prompts=5, max_prompt=300, max_files=2
)


@pytest.fixture(scope="module")
def server(tiny_localizer):
    server = Server(tiny_localizer, LIMITS)
    yield server
    server.stop()


@pytest.fixture
def client(server):
    return server.client


LONG = "ignore:prompt .* is longer than the model's context"
FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'  # and then the file
HEAD = "POST /v1/images HTTP/1.1\nHost: x\nContent-Type: multipart/form-data; boundary=x\nContent-Length: {}"
SCHEMATHESIS = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
OPEN_GEM = [sys.executable, "-c", "from open_gem.cli import main; main()"]


def error_of(answer: httpx.Response, status: int) -> str:
    """The line of an error that has this status."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"] and "\n" not in answer.json()["error"]
    return answer.json()["error"]


# Who may ask ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tiny_localizer):
    server = Server(tiny_localizer, Settings(token="secret", hosts=hosts_of("127.0.0.1")))
    yield server
    server.stop()


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "secret", "Basic !!", "Bearer sécret", "Digest secret"]
)
def test_without_the_token_nothing_is_answered(guarded, header):
    headers = [] if header is None else [(b"authorization", header.encode())]
    for method, path in [("GET", "/v1/models"), ("POST", "/v1/images"), ("GET", "/metrics"), ("GET", "/openapi.json")]:
        answer = guarded.client.request(method, path, headers=headers)
        assert "token" in error_of(answer, 401) and answer.headers["www-authenticate"] == "Bearer"
    assert guarded.client.get("/health").status_code == 200


def test_with_the_token_everything_is_answered(guarded):
    basic = b64encode(b"anyone:secret").decode()  # what Label Studio can send
    for header in ("Bearer secret", f"Basic {basic}", "bearer secret"):
        assert guarded.client.get("/v1/models", headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:1"},
    ],
)
def test_pages_of_other_sites_are_refused_without_a_token(server, client, guarded, headers):
    held = len(server.service.cache)
    for path in ("/v1/images", "/v1/ground", "/setup"):
        error = error_of(client.post(path, files={"file": png(seed=400)}, headers=headers), 403)
        assert headers.get("Origin", "a browser") in error and "--token" in error
    assert len(server.service.cache) == held
    assert client.get("/v1/models", headers=headers).status_code == 403
    authorized = headers | {"Authorization": "Bearer secret"}
    assert guarded.client.post("/v1/images", files={"file": png()}, headers=authorized).status_code == 201


ELSEWHERE = "http://shop.example:3000"


@pytest.mark.parametrize("token", [None, "secret"])
def test_pages_of_a_known_origin_are_answered(tiny_localizer, token):
    server = Server(tiny_localizer, Settings(origins=(ELSEWHERE,), token=token))
    authorized = {} if token is None else {"Authorization": f"Bearer {token}"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    try:
        for origin, status in [(ELSEWHERE, 200), ("http://evil.example", 400)]:
            preflight = server.client.options("/v1/ground", headers={"Origin": origin, **asked})
            assert preflight.status_code == status
            assert preflight.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
        page = {"Origin": ELSEWHERE, "Sec-Fetch-Site": "cross-site"}
        form = {"files": {"file": png()}, "data": {"prompts": "a cat"}}
        answer = server.client.post("/v1/ground", **form, headers=page | authorized)
        refused = server.client.post("/v1/ground", headers=page | authorized)
        assert (answer.status_code, refused.status_code) == (200, 415)
        assert {one.headers["access-control-allow-origin"] for one in (answer, refused)} == {ELSEWHERE}
        other = server.client.post("/v1/ground", **form, headers=page | authorized | {"Origin": "http://evil.example"})
        assert other.status_code == (403 if token is None else 200)
        assert "access-control-allow-origin" not in other.headers
        if token is not None:
            assert "token" in error_of(server.client.post("/v1/ground", **form, headers=page), 401)
    finally:
        server.stop()


def test_a_proxy_may_have_the_server_at_a_path(guarded):
    async def statuses(*paths: str) -> list[int]:
        transport = httpx.ASGITransport(guarded.app, root_path="/gem")
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [(await client.get(path)).status_code for path in paths]

    paths = ("/gem/", "/gem/health", "/gem/static/constants.js", "/gem/v1/models")
    assert asyncio.run(statuses(*paths)) == [200, 200, 200, 401]


def test_the_servers_own_page_links_to_it_and_programs_are_answered(server, client):
    own, link = f"http://127.0.0.1:{server.port}", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    for headers in [{}, {"Origin": own}, {"Origin": own, "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}]:
        assert client.post("/v1/images", files={"file": png()}, headers=headers).status_code == 201
    behind_a_proxy = {"Origin": "https://labels.example", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/images", files={"file": png()}, headers=behind_a_proxy).status_code == 201
    assert client.get("/", headers=link).status_code == 200


def test_other_host_names_are_refused_on_a_loopback_address(guarded):
    for host, status in [
        ("evil.example", 400),
        ("evil.example:80", 400),
        ("", 400),
        ("LOCALHOST:1", 200),
        ("[::1]:8", 200),
    ]:
        assert guarded.client.get("/health", headers={"Host": host}).status_code == status


def test_the_error_for_an_unknown_host_lists_the_known_ones(guarded):
    error = error_of(guarded.client.get("/health", headers={"Host": "evil.example"}), 400)
    assert "'evil.example'" in error and "localhost" in error


def test_a_client_that_is_still_sending_gets_the_error(guarded):
    """Without reading on, a server that ends the connection resets it, and its answer with it."""
    body = bytes(8_000_000)
    with guarded.raw(HEAD.format(len(body)) + "\nConnection: close", body) as connection:
        assert b" 400 " in connection.recv(1000)


def test_a_server_listens_on_the_loopback_address_by_default():
    from typer.main import get_command

    from open_gem.cli import app

    parameters = get_command(app).commands["serve"].params  # pyright: ignore[reportAttributeAccessIssue]
    assert {one.name: one.default for one in parameters}["host"] == "127.0.0.1"
    assert hosts_of("0.0.0.0") is None


@pytest.mark.parametrize(
    "settings",
    [
        {"token": "a b"},
        {"token": ""},
        {"token": "é"},
        {"max_queue": 0},
        {"seconds": 0.0},
        {"methods": ("gme",)},
        {"origins": ("*",)},
        {"origins": ("http://a/b",)},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InputError):
        Settings(**settings)


# How much -------------------------------------------------------------------------------------------------------------


def test_a_request_that_is_too_large_is_refused(server, client):
    large = {"file": b"x" * 2_000_000}
    assert "300000 bytes" in error_of(client.post("/v1/images", files=large), 413)

    def chunks():
        yield FORM
        for _ in range(40):
            yield b"x" * 10_000

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert "300000 bytes" in error_of(client.post("/v1/images", content=chunks(), headers=headers), 413)
    assert server.metric("open_gem_body_bytes") == 0
    end = b"\r\n--x--\r\n"
    for more, words in [(0, ""), (1, "300000 bytes")]:
        body = FORM + bytes(300_000 + more - len(FORM + end)) + end
        assert words in error_of(client.post("/v1/images", content=body, headers=headers), 413 if more else 422)


@pytest.mark.parametrize("length", [b"\xb2", b"-1", b"x"])
def test_a_malformed_content_length_is_refused(server, length):
    """Uvicorn itself lets none pass; other servers may."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://any") as client:
            return await client.post("/v1/images", headers=[(b"content-length", length)])

    assert "Content-Length" in error_of(asyncio.run(ask()), 400)


def test_an_error_of_the_servers_own_is_one_line_and_logged(server, client, monkeypatch, caplog):
    monkeypatch.setattr(server.service, "find", lambda id: 1 / 0)
    assert "ZeroDivisionError" in error_of(client.get("/v1/images/any"), 500)
    assert "Traceback" in caplog.text and "GET /v1/images/{id}" in caplog.text


def test_an_image_of_too_many_pixels_is_refused(client):
    assert client.post("/v1/images", files={"file": encoded(Image.new("RGB", (200, 200)), "PNG")}).status_code == 201
    image = encoded(Image.new("RGB", (201, 200)), "PNG")
    assert "200x201" in error_of(client.post("/v1/images", files={"file": image}), 413)


@pytest.mark.parametrize(("height", "width"), [(16, 800), (16, 6400), (20, 4000), (4000, 20), (8, 5000)])
def test_strips_are_refused_by_their_patches_before_they_are_decoded(careful, height, width):
    """`short:N` makes them as wide as they are long times N, and attention costs the square of that."""
    passes = careful.metric('open_gem_batch_inputs_count{work="encode"}')
    strip = encoded(Image.new("RGB", (width, height)), "PNG")
    for path, form in [("/v1/images", {}), ("/v1/ground", {"prompts": "a cat"})]:
        error = error_of(careful.client.post(path, files={"file": strip}, data=form), 422)
        assert f"{height}x{width} pixels" in error and "limit is 384" in error and "patches" in error
    assert careful.metric('open_gem_batch_inputs_count{work="encode"}') == passes


def test_the_limit_of_patches_is_a_setting(tiny_localizer):
    sizes = [(64, 64), (64, 64 * 6), (64, 64 * 8)]
    for settings, statuses in [
        (Settings(), [201, 201, 422]),
        (Settings(max_patches=64), [201, 422, 422]),
        (Settings(max_patches=512), [201, 201, 201]),
    ]:
        server = Server(tiny_localizer, settings)
        try:
            answers = [server.client.post("/v1/images", files={"file": png(*size)}) for size in sizes]
            [model] = server.client.get("/v1/models").json()["models"]
        finally:
            server.stop()
        assert [one.status_code for one in answers] == statuses
        assert model["limits"]["max_patches"] == (settings.max_patches or 6 * 64)


def test_large_images_share_a_pass_with_fewer_others(tiny_localizer):
    server = Server(tiny_localizer, Settings(max_batch=4))
    lines = [f'open_gem_batch_inputs_{what}{{work="encode"}}' for what in ("count", "sum")]
    try:
        for height, width, passes in [(64, 128, 1), (64, 256, 2), (64, 384, 4)]:
            before = list(map(server.metric, lines))
            with ThreadPoolExecutor(4) as threads, server.busy():
                data = [png(height, width, seed=seed) for seed in range(4)]
                for one in data:
                    threads.submit(server.client.post, "/v1/images", files={"file": one})
                wait_until(lambda: len(server.service.worker) == 4)
            assert list(map(server.metric, lines)) == [before[0] + passes, before[1] + 4]
    finally:
        server.stop()


def test_a_slow_decode_times_out_and_others_go_on(tiny_localizer):
    server = Server(tiny_localizer, Settings(decode_seconds=0.3, formats=("PNG", "PPM")))
    slow = b"P3 8000 5000 254 " + b"1 " * (3 * 8000 * 5000 // 8)  # numbers in text: minutes of decoding
    try:
        with ThreadPoolExecutor(4) as threads:
            begin = time.monotonic()
            answers = list(threads.map(lambda _: server.client.post("/v1/images", files={"file": slow}), range(3)))
            assert all("within 0.3 seconds" in error_of(one, 422) for one in answers)
            assert time.monotonic() - begin < 15
        assert upload(server.client, 0).status_code == 201
    finally:
        server.stop()


def test_maps_have_a_limit_of_pixels_together(tiny_localizer):
    server = Server(tiny_localizer, Settings(max_map_pixels=3 * 100 * 100))
    prompts, data = ["a", "b", "c", "d"], png(100, 100)
    try:
        path = f"/v1/images/{server.upload(data)['id']}/ground"
        error = error_of(server.client.post(path, json={"prompts": prompts}), 413)
        assert "4 prompts" in error and "40000 pixels" in error and "30000 at most: ask 3 at a time" in error
        form = {"prompts": prompts}
        assert "ask 3" in error_of(server.client.post("/v1/ground", files={"file": data}, data=form), 413)
        for asked in ({"prompts": prompts, "objects": False, "similarity": True}, {"prompts": prompts[:3]}):
            assert server.client.post(path, json=asked).status_code == 200
    finally:
        server.stop()


# JSON -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def careful(tiny_localizer):
    server = Server(tiny_localizer, Settings(max_queue=2, max_json=100_000, max_values=2000))
    yield server
    server.stop()


JSON = {"Content-Type": "application/json"}
DOCUMENTS = {  # what is large -> a document, and words of the answer
    "bytes": (b'{"a": "' + b"x" * 100_000 + b'"}', "100000 bytes"),
    "numbers": (b'{"a": [' + b"0," * 3000 + b"0]}", "expected 2000 at most"),
    "lists": (b'{"a": [' + b"[]," * 3000 + b"[]]}", "expected 2000 at most"),
    "names": (b"{" + b",".join(b'"%d":0' % number for number in range(3000)) + b"}", "expected 2000 at most"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_json_has_limits_of_its_own(careful, name):
    content, words = DOCUMENTS[name]
    for path in ("/predict", "/setup", "/v1/huggingface", f"/v1/images/{careful.upload(png())['id']}/ground"):
        assert words in error_of(careful.client.post(path, content=content, headers=JSON), 413)
    form = {"file": png(200, 200)}  # of more bytes than JSON may have
    assert careful.client.post("/v1/images", files=form).status_code == 201


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/images/{}/ground", {"prompts": ["a"] * 1001}, "List should have at most 1000 items"),
        ("/predict", {"tasks": ["a"] * 1001, "label_config": "<View/>"}, "tasks: List should have at most 1000 items"),
        ("/v1/huggingface", {"inputs": "", "parameters": {"candidate_labels": ["a"] * 1001}}, "at most 1000 items"),
    ],
)
def test_lists_have_a_limit(careful, path, body, words):
    answer = careful.client.post(path.format(careful.upload(png())["id"]), json=body)
    assert words in error_of(answer, 422)


def test_an_image_in_base64_may_have_three_quarters_of_it(careful):
    data = png(140, 140)
    assert 55_000 < len(data) < 75_000
    body = {"inputs": b64encode(data).decode(), "parameters": {"candidate_labels": ["a cat"], "threshold": 0}}
    assert careful.client.post("/v1/huggingface", json=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/setup", {"slow": 1}),
        ("/predict", {"tasks": [], "label_config": "slow"}),
        ("/v1/huggingface", {"inputs": "slow", "parameters": {"candidate_labels": ["a"]}}),
    ],
)
def test_json_is_not_parsed_on_the_event_loop(careful, monkeypatch, path, body):
    """While one document is being parsed, the event loop answers others."""
    release, begun = threading.Event(), threading.Event()
    loads = json.loads

    def slow(document, **options):
        if b"slow" in document:
            begun.set()
            assert release.wait(10), "nobody was answered meanwhile"
        return loads(document, **options)

    monkeypatch.setattr("open_gem.serve.uploads.json.loads", slow)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(careful.client.post, path, json=body)
        assert begun.wait(10)
        try:
            with careful.new_client() as other:
                assert other.get("/health", timeout=5).status_code == 200
        finally:
            release.set()
        assert answer.result().status_code in (200, 422)


@pytest.mark.parametrize("path", ["/setup", "/predict", "/v1/ground", "/v1/huggingface", "/v1/images", "/nowhere"])
def test_every_post_counts_against_the_capacity(careful, path):
    with ThreadPoolExecutor(2) as threads, careful.busy():
        seeds = [hash(path) % 10**6, hash(path) % 10**6 + 1]  # images that no other case has left in the cache
        waiting = [threads.submit(upload, careful.client, seed) for seed in seeds]
        wait_until(lambda: careful.metric("open_gem_pending_requests") == 2)
        assert "2 requests" in error_of(careful.client.post(path, json={}), 429)
    assert [one.result().status_code for one in waiting] == [201] * 2


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(200_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [1000, 12_000, 60_000])
def test_decompression_bombs_are_not_decoded(client, side):
    assert "pixels" in error_of(
        client.post("/v1/images", files={"file": bomb(side, side)}), 422 if side > 20_000 else 413
    )


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archived:
        archived.writestr("page.html", "<script>alert(1)</script>")
    return file.getvalue()


PICTURES = {  # name -> content, and the status it gets
    "empty": (b"", 422),
    "text": (b"just text", 422),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', 422),
    "html": (b"<html><script>alert(1)</script></html>", 422),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", 422),
    "another format": (encoded(Image.new("RGB", (20, 20)), "PPM"), 415),
    "cut off": (png()[:3000], 422),
    "smaller than a patch": (encoded(Image.new("RGB", (4, 4)), "PNG"), 422),
    "image and archive": (png() + archive(), 201),
    "image and script": (encoded(Image.new("P", (20, 20)), "GIF") + b"/*<script>alert(1)</script>*/", 201),
    "two frames of a phone": (
        encoded(Image.new("RGB", (40, 30)), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))]), 201,
    ),
    "animated": (
        encoded(Image.new("P", (20, 30)), "GIF", save_all=True, append_images=[Image.new("P", (20, 30), 1)] * 2), 201,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_only_images_are_accepted(client, name):
    data, status = PICTURES[name]
    for filename in ("a.png", "../../etc/passwd", "a.html\x00.png"):
        answer = client.post("/v1/images", files={"file": (filename, data, "text/html")})
        assert answer.headers["content-type"] == "application/json"
        assert answer.status_code == status, answer.text
        assert b"alert" not in answer.content and b"passwd" not in answer.content


FORMS = {  # name -> content type, body, status
    "no boundary": ("multipart/form-data", b"abc", 400),
    "another boundary": ("multipart/form-data; boundary=x", b"--y\r\n\r\n--y--", 400),
    "cut off in a header": ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-da", 422),
    "no name": ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nv\r\n--x--", 400),
    "not a file": (
        "multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nv\r\n--x--', 422,
    ),
    "a character set that cannot be": (
        "multipart/form-data; boundary=x; charset=idna",
        b'--x\r\nContent-Disposition: form-data; name="\xff\xff"\r\n\r\n\xff\r\n--x--', 422,
    ),
    "two files": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nv\r\n' * 2 + b"--x--", 400,
    ),
    "a thousand fields": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nv\r\n' * 1000 + b"--x--", 400,
    ),
    "nothing": ("multipart/form-data; boundary=x", b"", 422),
    "another type": ("text/plain", b"abc", 415),
    "no type": ("", b"abc", 415),
    "a form by lines": ("application/x-www-form-urlencoded", b"file=abc", 415),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_malformed_forms_are_refused(client, name):
    kind, body, status = FORMS[name]
    for path in ("/v1/images", "/v1/ground", "/v1/ground/batch"):
        answer = client.post(path, content=body, headers={"Content-Type": kind})
        error_of(answer, status)


PROMPTS = {  # name -> prompts, status
    "none": ([], 422),
    "too many": (["a"] * 6, 422),
    "too long": (["a" * 10_000], 422),
    "empty": (["a cat", "  "], 422),
    "half a letter": (["\ud800"], 422),
    "no text": ([1], 422),
    "control characters": (["a\x00cat", "\x1b[31m\r\n\t", "\u202e\u200b\ufeff"], 200),
    "as many and as long as may be": (["a", "b", "c", "d", "e" * 300], 200),
    "every script": (["猫", "قطة", "🐈‍⬛" * 20, "é" * 200], 200),
    "places of a template": (["{}", "{0.__class__}", "%s"], 200),
}


@pytest.mark.filterwarnings(LONG)
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_all_kinds(server, client, name):
    prompts, status = PROMPTS[name]
    id = server.upload(png())["id"]
    body = json.dumps({"prompts": prompts}).encode()  # in ASCII, which can hold halves of letters
    answer = client.post(f"/v1/images/{id}/ground", content=body, headers={"Content-Type": "application/json"})
    if status == 200:
        assert [label["label"] for label in answer.json()["labels"]] == prompts
    else:
        error_of(answer, status)


BODIES = {  # name -> content, status
    "no JSON": (b"{", 400),
    "not an object": (b"[1]", 422),
    "nested": (b"[" * 100_000, 400),
    "a number without end": (b'{"prompts": ["a"], "threshold": ' + b"9" * 5000 + b"}", 400),
    "not a number": (b'{"prompts": ["a"], "threshold": NaN}', 422),
    "above one": (b'{"prompts": ["a"], "threshold": 1.5}', 422),
    "a name misspelt": (b'{"prompts": ["a"], "treshold": 0.5}', 422),
    "an unknown method": (b'{"prompts": ["a"], "method": "proxyclip:facebook/dino-vitb8"}', 422),
    "an unknown mask": (b'{"prompts": ["a"], "mask": "/etc/passwd"}', 422),
    "bytes that are no text": (b'{"prompts": ["\xff"]}', 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_malformed_bodies_are_refused(server, client, name):
    content, status = BODIES[name]
    id = server.upload(png())["id"]
    headers = {"Content-Type": "application/json"}
    error_of(client.post(f"/v1/images/{id}/ground", content=content, headers=headers), status)
    answer = client.post("/v1/ground", content=content, headers=headers)
    assert 400 <= answer.status_code < 500 and list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b'{"prompts": ["a"]}', "application/x-www-form-urlencoded", "application/json"),  # what curl sends by itself
        (b"", "application/json", "JSON object"),
        (b'{"prompts": [', "application/json", "not JSON: Expecting value at character 13"),
        (b'{"prompts": [1], "mask": "rle"}', "application/json", "prompts.list.0: "),
    ],
)
def test_the_error_says_what_is_wrong_with_a_body(server, client, content, kind, words):
    id = server.upload(png())["id"]
    answer = client.post(f"/v1/images/{id}/ground", content=content, headers={"Content-Type": kind})
    assert words in error_of(answer, 400 if "not JSON:" in words else 422)


@pytest.mark.parametrize("inputs", ["http://127.0.0.1:1/a.png", "file:///etc/passwd", "/etc/passwd", "a b c d !", ""])
def test_paths_and_addresses_of_a_client_are_never_opened(client, inputs):
    body = {"inputs": inputs, "parameters": {"candidate_labels": ["a"]}}
    error = error_of(client.post("/v1/huggingface", json=body), 422)
    assert "base64" in error or "image" in error or "picture" in error or "empty" in error


PATHS = ["/static/../settings.py", "/static/%2e%2e/settings.py", "/static/..%2f..%2f..%2fetc/passwd", "//etc/passwd",
         "/v1/images/..%2f..%2fetc", "/v1/images/%00", "/v1/samples/%2e%2e", "/" + "a" * 5000, "/%ff%fe"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths_do_not_leave_the_page(server, path):
    with server.raw(f"GET {path} HTTP/1.1\nHost: localhost\nConnection: close") as connection:
        answer = connection.makefile("rb").read()
    assert answer.split()[1] in (b"404", b"422", b"400"), answer
    assert b"root:" not in answer and b"class Settings" not in answer


# How often, how long --------------------------------------------------------------------------------------------------


def upload(client: httpx.Client, seed: int) -> httpx.Response:
    return client.post("/v1/images", files={"file": png(seed=seed)})


def test_a_server_at_capacity_says_when_to_retry(server, client):
    with ThreadPoolExecutor(4) as threads, server.busy():
        waiting = [threads.submit(upload, client, seed) for seed in range(100, 104)]
        wait_until(lambda: server.metric("open_gem_pending_requests") == 4)
        answer = upload(client, 105)
        assert "4 requests" in error_of(answer, 429) and int(answer.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200  # those that cost nothing are answered
    assert [one.result().status_code for one in waiting] == [201] * 4
    assert upload(client, 105).status_code == 201


def test_requests_that_wait_share_a_pass_of_the_model(server, client):
    lines = [f'open_gem_batch_inputs_{what}{{work="encode"}}' for what in ("count", "sum")]
    batches, images = map(server.metric, lines)
    with ThreadPoolExecutor(4) as threads, server.busy():
        waiting = [threads.submit(upload, client, seed) for seed in range(200, 204)]
        wait_until(lambda: len(server.service.worker) == 4)
    together = [one.result().json() for one in waiting]
    assert list(map(server.metric, lines)) == [batches + 1, images + 4]

    alone = server.service.localizer(png(seed=200), ["a cat"])
    asked = {"prompts": ["a cat"]}
    [label] = client.post(f"/v1/images/{together[0]['id']}/ground", json=asked).json()["labels"]
    assert label["score"] == pytest.approx(alone.scores[0].item(), abs=1e-5)


def test_the_bodies_of_pending_requests_have_a_limit_together(server, client):
    """Four requests of 300,000 bytes each may come, and 700,000 bytes in all."""
    size = 290_000
    held = [server.raw(HEAD.format(size), FORM + bytes(size - 1000)) for _ in range(2)]
    try:
        wait_until(lambda: server.metric("open_gem_body_bytes") > 570_000)
        assert "bytes" in error_of(client.post("/v1/images", files={"file": bytes(200_000)}), 429)
    finally:
        for connection in held:
            connection.close()
    wait_until(lambda: server.metric("open_gem_body_bytes") == 0)


def test_a_client_that_leaves_is_not_worked_for(server):
    lines = [f'open_gem_batch_inputs_{what}{{work="encode"}}' for what in ("count", "sum")]
    before = list(map(server.metric, lines))
    with server.busy():
        body = FORM + png(seed=300) + b"\r\n--x--\r\n"
        connection = server.raw(HEAD.format(len(body)), body)
        wait_until(lambda: len(server.service.worker) == 1)
        connection.close()
        wait_until(lambda: server.metric("open_gem_pending_requests") == 0)
    assert upload(server.client, 301).status_code == 201  # behind it in the queue
    assert list(map(server.metric, lines)) == [before[0] + 1, before[1] + 1]


def test_requests_time_out(tiny_localizer):
    server = Server(tiny_localizer, Settings(body_seconds=0.3, seconds=0.3))
    try:
        with server.raw(HEAD.format(1000), b"--x\r\n") as connection:
            assert b" 408 " in connection.recv(1000)
        with server.busy():
            answer = upload(server.client, 0)
            assert "0.3 seconds" in error_of(answer, 503) and answer.headers["retry-after"] == "1"
        assert upload(server.client, 0).status_code == 201
    finally:
        server.stop()


def test_a_server_that_is_stopped_answers_pending_requests(tiny_localizer):
    server = Server(tiny_localizer, Settings())
    with ThreadPoolExecutor(1) as threads:
        with server.busy():
            answer = threads.submit(upload, server.client, 0)
            wait_until(lambda: len(server.service.worker) == 1)
            server.uvicorn.should_exit = True
            time.sleep(0.2)
            with pytest.raises(OSError):
                socket.create_connection(("127.0.0.1", server.port), timeout=2)
        assert answer.result().status_code == 201
    server.stop()
    assert not server.thread.is_alive() and not server.service.worker.is_alive
    with pytest.raises(RuntimeError, match="after shutdown"):
        asyncio.run(server.service.in_thread(print))


BUSY = """
import asyncio, sys, threading, time
import open_gem
from open_gem.cli.serve import run
from open_gem.serve.app import create_app
from open_gem.serve.settings import Settings
from open_gem.serve.worker import JobKind

settings = Settings(stop_seconds=1.0)
app = create_app(open_gem.load(sys.argv[1], device="cpu"), settings)
service = app.state.service

def hang(inputs):
    print("busy", flush=True)
    time.sleep(600)

def begin():
    while service.worker.batches < 2:  # of the warm-up
        time.sleep(0.01)
    {what}

threading.Thread(target=begin, daemon=True).start()
run(app, settings, "127.0.0.1", 0)
"""
HANGS = {  # what hangs -> how
    "the model": "service.worker.submit(JobKind('hang', hang, lambda input: 0, lambda input: 1, 1), None)",
    "a thread": "asyncio.run(service.in_thread(hang, None))",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "again"), [("the model", False), ("a thread", True)])
def test_sigterm_ends_a_server_whatever_it_is_doing(tiny, name, again):
    script = BUSY.format(what=HANGS[name])
    process = subprocess.Popen(
        [sys.executable, "-c", script, tiny], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        assert "running on" in next(line for line in process.stderr if "running on" in line)
        assert process.stdout.readline() == "busy\n"
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if again:
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (128 + signal.SIGTERM, -signal.SIGTERM)
        assert time.monotonic() - begin < (1 if again else 3)
    finally:
        process.kill()
        process.communicate()


def test_a_server_whose_model_has_ended_is_not_healthy(tiny_localizer):
    server = Server(tiny_localizer, Settings())
    assert server.client.get("/health").status_code == 200
    server.service.worker.stop()
    assert "start the server again" in error_of(server.client.get("/health"), 503)
    server.stop()


def test_the_command_starts_and_stops():
    command = [*OPEN_GEM, "serve", "--port", "0", "--device", "cpu", "--model", "embedded"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "running on" in line)
        address = line.split("running on ")[1].split()[0]
        assert address.startswith("http://127.0.0.1:")
        assert httpx.get(f"{address}/health").json()["status"] == "UP"
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid", "no..name"])
def test_an_unusable_address_is_an_error_before_a_model_is_loaded(host, monkeypatch):
    monkeypatch.setattr("open_gem.towers.load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "--host", host, "--port", str(port), "--token", "x"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"cannot listen at {host}, port {port}: " in result.stderr


# Memory ---------------------------------------------------------------------------------------------------------------

SCATTERED = """
import ctypes
from open_gem.serve.memory import trim

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

blocks = [libc.malloc(100_000) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:  # the last holds the heap's end where it is
    libc.free(block)
before = resident()
trim()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_free_memory_goes_back_to_the_system():
    run = subprocess.run([sys.executable, "-c", SCATTERED], capture_output=True, text=True, check=True)
    assert float(run.stdout) > 80  # MiB, of the 95 that are free


def test_a_server_that_has_worked_gives_memory_back(tiny_localizer, monkeypatch):
    trimmed = []
    monkeypatch.setattr("open_gem.serve.memory.TRIM_SECONDS", 0.05)
    monkeypatch.setattr("open_gem.serve.memory.trim", lambda: trimmed.append(None))
    server = Server(tiny_localizer, Settings())
    try:
        time.sleep(0.3)
        assert len(trimmed) <= 1  # nothing happens, nothing is trimmed
        before = len(trimmed)
        assert upload(server.client, 0).status_code == 201
        wait_until(lambda: len(trimmed) > before)
    finally:
        server.stop()


# Parts ----------------------------------------------------------------------------------------------------------------


def cached(id: str, floats: int) -> CachedImage:
    encoded = Encoded(torch.zeros(1, floats, 1), Grid(1, 1), Size(1, 1))
    return CachedImage(id, Prepared(Size(1, 1)), {"gem": encoded})


def test_the_cache_drops_the_least_recently_used():
    cache = Cache(4 * 30)
    for id in "abc":
        cache.put(cached(id, 10))
    assert cache.get("a") is not None
    cache.put(cached("d", 15))
    assert [cache.get(id) is not None for id in "abcd"] == [True, False, False, True]
    assert (len(cache), cache.nbytes) == (2, 4 * 25)
    cache.put(cached("d", 5))
    assert (cache.drop("a"), cache.drop("a"), cache.nbytes) == (True, False, 4 * 5)
    cache.put(cached("f", 30))
    assert (len(cache), cache.nbytes) == (1, 4 * 30)
    with pytest.raises(RequestError, match="124 bytes"):
        cache.put(cached("e", 31))


def test_a_bad_input_does_not_fail_its_batch():
    def halves(numbers):
        if len(numbers) > 1 or 3 in numbers:
            raise ValueError("not this one")
        return [number / 2 for number in numbers]

    worker = Worker()
    begin = threading.Event()
    wait = JobKind("wait", lambda inputs: [begin.wait(10)], lambda input: 0, lambda input: 1, 1)
    kind = JobKind("half", halves, lambda number: 0, lambda number: 1, 8)
    worker.submit(wait, None)
    asked = [worker.submit(kind, number) for number in range(5)]
    begin.set()
    assert [one.exception(10) is None for one in asked] == [True, True, True, False, True]
    assert asked[4].result() == 2
    worker.stop()
    with pytest.raises(RuntimeError):
        worker.submit(kind, 1)


def _odd(number: int) -> int:
    return number % 2


def test_batches_have_one_key_and_a_bounded_cost():
    seen: list[list[int]] = []

    def work(numbers):
        seen.append(list(numbers))
        return numbers

    worker = Worker()
    begin = threading.Event()
    worker.submit(JobKind("wait", lambda inputs: [begin.wait(10)], lambda input: 0, lambda input: 1, 1), None)
    kind = JobKind("work", work, _odd, int, 10)
    asked = [worker.submit(kind, number) for number in (4, 3, 2, 6, 5, 50, 8)]
    asked[2].cancel()
    begin.set()
    worker.stop()
    assert seen == [[4, 6], [3, 5], [50], [8]]


def test_nothing_is_lost_when_all_ask_at_once():
    async def ask_all() -> list[int]:
        worker = Worker()
        kind = JobKind("same", lambda numbers: numbers, _odd, lambda number: 1, 4)
        try:
            return await asyncio.gather(*(worker.do(kind, number) for number in range(200)))
        finally:
            worker.stop()

    assert asyncio.run(ask_all()) == list(range(200))


# The document against the server, and many clients --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings(LONG)
def test_no_request_the_document_allows_or_forbids_breaks_the_server(server, tmp_path, monkeypatch):
    """A short run of schemathesis; `-m full` has a longer one."""
    fuzz(server, tmp_path, monkeypatch, examples=8)


@pytest.mark.full
@pytest.mark.filterwarnings(LONG)
def test_no_request_breaks_the_server_in_a_long_run(server, tmp_path, monkeypatch):
    fuzz(server, tmp_path, monkeypatch, examples=300)


def fuzz(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    monkeypatch.setattr(server.service, "drop", lambda id: True)  # the image is there for other requests too
    config = folder / "schemathesis.toml"
    config.write_text(f'[parameters]\n"path.id" = "{server.upload(png())["id"]}"\n')
    asked = 'open_gem_requests_total{route="/v1/images/{id}/ground",status="200"}'
    before = server.metric(asked)
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ["--max-examples", str(examples), "--checks", checks, "--no-color"]
    document = f"http://127.0.0.1:{server.port}/openapi.json"
    command = [*SCHEMATHESIS, "--config-file", str(config), "run", document, *options]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stdout + run.stderr
    assert server.metric(asked) > before


def measured(*options: str) -> dict:
    """What benchmarks/serving.py measures."""
    tool = Path(__file__).parents[2] / "benchmarks" / "serving.py"
    run = subprocess.run([sys.executable, str(tool), "--json", *options], stdout=subprocess.PIPE, text=True, check=True)
    print(run.stdout)
    return json.loads(run.stdout)


FINE = {"200", "201", "404", "429"}  # 404: an image that was evicted, and is uploaded again


@pytest.mark.full
def test_sixty_four_clients_for_a_minute():
    report = measured("--clients", "64", "--seconds", "60")
    assert {status for row in report["routes"].values() for status in row["statuses"]} <= FINE
    assert report["unanswered"] == 0 and report["pending"] == 0
    assert report["memory"]["at the end"] < 1.1 * report["memory"]["after 15 s"]


@pytest.mark.full
def test_a_server_that_is_killed_under_load_goes_on_when_it_is_started_again():
    report = measured("--clients", "16", "--seconds", "60", "--kill", "15")
    assert report["kills"] == 3 and report["unanswered"] > 0
    assert {status for row in report["routes"].values() for status in row["statuses"]} <= FINE
    assert report["pending"] == 0
