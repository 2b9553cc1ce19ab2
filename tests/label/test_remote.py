"""What is elsewhere: few requests, connections that come back, and one line about whatever goes wrong."""

import asyncio
import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from time import sleep
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.asyn import AsyncFileSystem
from pyarrow import parquet

from open_gem.errors import ImageError, InputError
from open_gem.images.pixels import read_image
from open_gem.label.paths import PassedOver
from open_gem.label.reading import Item, describe_error, read
from open_gem.label.remote import encoded
from open_gem.label.sources import Columns, Source, open_source


class Store(AsyncFileSystem):
    """Objects by path; notes what it is asked, answers few at a time, "hang" never, and lets nobody list "closed"."""

    protocol = "store"
    cachable = False
    objects: dict[str, bytes]
    asked: list[tuple[str, Any, Any]]
    connections: asyncio.Semaphore

    async def _cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self.asked.append((path, start, end))
        async with self.connections:
            if "hang" in path:
                await asyncio.Event().wait()
        content = self.objects[path]
        if start is not None and start >= len(content):
            raise OSError("the range is not satisfiable")
        return content[start:end]

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.objects[path]), "type": "file"}

    async def _ls(self, path: str, detail: bool = True, **options: Any) -> list[dict[str, Any]]:
        if "closed" in path:
            raise PermissionError("Access Denied")
        below = {name.removeprefix(f"{path}/").split("/")[0] for name in self.objects if name.startswith(f"{path}/")}
        if not below:
            raise FileNotFoundError(path)
        kinds = {True: "file", False: "directory"}
        return [{"name": f"{path}/{name}", "type": kinds[f"{path}/{name}" in self.objects]} for name in below]

    def _open(self, path: str, *given: Any, **options: Any) -> Any:
        return io.BytesIO(self.objects[path])


@pytest.fixture
def store() -> type[Store]:
    fsspec.register_implementation("store", Store, clobber=True)
    Store.objects, Store.asked, Store.connections = {}, [], asyncio.Semaphore(4)
    return Store


def tar(**pictures: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for name, content in pictures.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return file.getvalue()


def ids(source: Source) -> list[str]:
    return [item.id for item in source.items()]


def test_an_image_is_one_request_for_its_own_bytes(store):
    store.objects = {"b/s.tar": tar(x=b"one", y=b"second"), "b/z.png": b"third"}
    items = [*open_source("store://b/s.tar").items(), *open_source("store://b/").items()]
    store.asked.clear()
    assert [read(item) for item in items] == [b"one", b"second", b"third"]
    parts = [(path, end - start) for path, start, end in store.asked]
    assert parts == [("b/s.tar", 3), ("b/s.tar", 6), ("b/z.png", 2**30 + 1)]


def test_an_object_without_bytes_is_reported_and_one_that_is_not_there(store):
    store.objects = {"b/empty.png": b""}
    with pytest.raises(ImageError, match="is empty"):
        read_image(read(Item("x", "store://b/empty.png")))
    with pytest.raises(ImageError, match=r"cannot be read: 'b/none\.png'"):
        read(Item("x", "store://b/none.png"))


def test_reads_that_hang_give_their_connections_back(store):
    store.objects = {"b/a.png": b"x"}

    def reason(number: int) -> str:
        with pytest.raises(ImageError) as raised:
            read(Item("x", f"store://b/hang{number}.png"), 0.1)
        return str(raised.value)

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(reason, range(4))) == {"was not read within 0.1 seconds"}
    assert read(Item("x", "store://b/a.png"), 5) == b"x"


def test_a_remote_folder_that_cannot_be_listed_is_an_item_and_its_neighbours_are_there(store):
    store.objects = dict.fromkeys(("b/a.png", "b/closed/b.png", "b/d/c.png", "b/.hid/d.png", "b/e.txt"), b"x")
    items = {item.id: item.error for item in open_source("store://b/").items()}
    assert items == {"a.png": None, "closed": "cannot list this folder: Access Denied", "d/c.png": None}
    assert ids(open_source("store://b/**/*.png")) == list(items)


def test_remote_patterns_mean_what_local_ones_do(store):
    store.objects = dict.fromkeys(("b/a/1.png", "b/a/2.png", "b/c/1.png", "b/a/d/1.png", "b/a/12.png"), b"x")
    assert ids(open_source("store://b/{a,c}/?.png")) == ["a/1.png", "a/2.png", "c/1.png"]
    assert ids(open_source("store://b/*/1.png")) == ["a/1.png", "c/1.png"]
    assert ids(open_source("store://b/a/**/[1]*.png")) == ["1.png", "12.png", "d/1.png"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("store://closed/", "no image in .*: cannot list this folder: Access Denied"),
        ("store://closed/*.png", "no image in .*: cannot list this folder: Access Denied"),
        ("store://none/", "no image in .*: cannot list this folder: no such file: none"),
        ("store://b/none.tar", "no image in .*: cannot be read to its end: "),
        ("store://b/none.txt", "cannot read 'store://b/none.txt': "),
        ("hanging://b/", "no image in .*: cannot list this folder: was not read within 0.2 seconds"),
        ("hanging://b.txt", "cannot read 'hanging://b.txt': was not read within 0.2 seconds"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_in_one_line(given, reason, store):
    import hanging

    hanging.register()
    with pytest.raises(InputError, match=reason):
        open_source(given, Columns(read_timeout=0.2)).check_not_empty()


def test_what_is_new_in_a_remote_folder_is_seen_at_the_next_look():
    files = fsspec.filesystem("memory")
    files.pipe("/looks/a.png", b"x")
    source = open_source("memory://looks/")
    assert ids(source) == ["a.png"]
    files.pipe("/looks/b.png", b"x")
    assert ids(source) == ["a.png", "b.png"]


def test_the_reason_behind_a_file_that_is_said_not_to_be_there():
    error = FileNotFoundError("http://host/x")
    assert describe_error(error) == "no such file: http://host/x"
    error.__cause__ = PermissionError("403, Forbidden")
    assert describe_error(error) == "403, Forbidden"


def test_an_image_without_bytes_in_a_tar_is_not_asked_for(store):
    store.objects = {"b/s.tar": tar(empty=b"", full=b"full")}
    items = list(open_source("store://b/s.tar").items())
    store.asked.clear()
    assert [read(item) for item in items] == [b"", b"full"]
    assert len(store.asked) == 1


def test_a_store_that_gives_everything_for_a_part_is_reported(store, monkeypatch):
    async def everything(self, path: str, **options: Any) -> bytes:
        return self.objects[path]

    store.objects = {"b/s.tar": tar(x=b"one")}
    (item,) = open_source("store://b/s.tar").items()
    monkeypatch.setattr(Store, "_cat_file", everything)
    with pytest.raises(ImageError, match="gives files as a whole only"):
        read(item)


def test_a_local_table_of_images_that_hang_elsewhere_is_not_waited_for(store, tmp_path):
    parquet.write_table(pa.table({"image": [{"bytes": None, "path": "store://b/hang.png"}]}), tmp_path / "t.parquet")
    (item,) = open_source(str(tmp_path / "t.parquet")).items()
    with pytest.raises(ImageError, match=r"was not read within 0\.2 seconds"):
        read(item, 0.2)


def test_listing_that_hangs_gives_its_connection_back(store, monkeypatch):
    list_all, held = Store._ls, asyncio.Semaphore(1)

    async def hanging(self, path: str, detail: bool = True, **options: Any) -> Any:
        async with held:
            if "hang" in path:
                await asyncio.Event().wait()
            return await list_all(self, path, detail, **options)

    monkeypatch.setattr(Store, "_ls", hanging)
    store.objects = {"hang/a.png": b"x", "good/a.png": b"x"}
    assert [item.error for item in open_source("store://hang/", Columns(read_timeout=0.1)).items()] != [None]
    sleep(1.2)  # a second more than who waits
    assert ids(open_source("store://good/", Columns(read_timeout=1))) == ["a.png"]


def test_patterns_in_other_files_are_refused():
    with pytest.raises(InputError, match="is a pattern in another file"):
        open_source("zip://*.png::memory://b/x.zip")


def test_relative_paths_in_a_remote_table_are_relative_to_it(store, tmp_path):
    parquet.write_table(pa.table({"image": [{"bytes": None, "path": "p/a.png"}]}), tmp_path / "t.parquet")
    store.objects = {"b/d/t.parquet": (tmp_path / "t.parquet").read_bytes(), "b/d/p/a.png": b"right", "p/a.png": b"no"}
    (item,) = open_source("store://b/d/t.parquet").items()
    assert read(item) == b"right"


def test_what_a_remote_folder_has_beside_images_is_counted(store):
    store.objects = dict.fromkeys(("b/a.png", "b/d/c.tar", "b/.hid/d.png", "b/e.txt"), b"x")
    left = PassedOver()
    assert [item.id for item in open_source("store://b/").items(left)] == ["a.png"]
    assert left.ordered() == {".tar": 1, ".txt": 1, "hidden": 1}


# HTTP -----------------------------------------------------------------------------------------------------------------


class Web(BaseHTTPRequestHandler):
    """/ranges/ gives parts of files, /short/ less than is asked, /shifted/ others, /whole/ none; /moved/ leads to it,
    and numbers are what they say."""

    files: dict[str, bytes]
    asked: list[tuple[str, str]]
    lines: list[str]
    encodings: list[str]

    def log_message(self, format: str, *given: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        how, _, name = self.path.strip("/").partition("/")
        self.asked.append((self.command, self.path))
        self.lines.append(self.requestline)
        content, status, wanted = self.files.get(name, b""), 200, self.headers.get("Range", "")
        if how.isdigit():
            status = int(how)
        elif how == "moved":
            status = 302
        elif how in ("ranges", "short", "shifted") and wanted:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            first, last = first + (how == "shifted"), last - 2 * (how == "short")
            status, content, wanted = 206, content[first : last + 1], f"bytes {first}-{last}/*"
        self.encodings.append(self.headers["Accept-Encoding"])
        self.send_response(status)
        self.send_header("Content-Range", wanted)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Location", f"/whole/{self.path.removeprefix('/moved/')}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def web():
    pytest.importorskip("aiohttp")
    Web.files, Web.asked, Web.lines, Web.encodings = {}, [], [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_of_the_web_is_one_request(web):
    Web.files = {"a.png": b"picture", "s.tar": tar(x=b"one", y=b"second")}
    assert read(Item("x", f"{web}/whole/a.png")) == b"picture"
    assert read(Item("x", f"{web}/moved/a.png")) == b"picture"
    assert Web.asked == [("GET", "/whole/a.png"), ("GET", "/moved/a.png"), ("GET", "/whole/a.png")]
    items = list(open_source(f"{web}/ranges/s.tar").items())
    Web.asked.clear()
    assert [read(item) for item in items] == [b"one", b"second"]
    assert Web.asked == [("GET", "/ranges/s.tar")] * 2
    assert Web.encodings[-2:] == ["identity"] * 2, "a part of what is packed is of no use"


def test_parts_that_are_not_what_was_asked_for_are_reported(web):
    Web.files = {"s.tar": tar(x=b"one")}
    (item,) = open_source(f"{web}/ranges/s.tar").items()
    for how, reason in (("short", "1 bytes read, expected 3"), ("shifted", "as a whole only")):
        with pytest.raises(ImageError, match=reason):
            read(item._replace(container=f"{web}/{how}/s.tar"))


def test_what_the_web_refuses_is_reported(web):
    Web.files = {"s.tar": tar(x=b"one")}
    for status, reason in ((404, "404 Not Found"), (403, "403 Forbidden"), (500, "500 Internal Server Error")):
        with pytest.raises(ImageError, match=f"^the server answered {reason}$"):
            read(Item("x", f"{web}/{status}/a.png"))
    with pytest.raises(ImageError, match="Connect call failed"):
        read(Item("x", "http://127.0.0.1:1/a.png"))
    with pytest.raises(InputError, match=r"the server gives files as a whole only \(no range requests\)"):
        open_source(f"{web}/whole/s.tar").check_not_empty()
    with pytest.raises(InputError, match=r"cannot read .*: 403, message='Forbidden'"):
        open_source(f"{web}/403/list.txt")


SIGNED = "/whole/a%26b%40c%2Bd%7E/x.png?X-Sig=a%2Fb%3D%26%20+y@z&e=%7e"


def test_signed_addresses_are_sent_byte_for_byte(web):
    """A picture's, one that a server sends elsewhere, and a list's: the signature is over these bytes."""
    for address in (SIGNED, SIGNED.replace("/whole", "/moved")):
        read(Item("x", web + address))
    listed = SIGNED.replace("x.png", "l.txt")
    list(open_source(web + listed).items())
    assert Web.lines[0] == f"GET {SIGNED} HTTP/1.1"
    assert Web.lines[2] == f"GET {SIGNED} HTTP/1.1", "where it was sent to"
    assert {line.split(" ", 1)[1] for line in Web.lines[3:]} == {f"{listed} HTTP/1.1"}


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("/whole/a b/100%.png", "/whole/a%20b/100%25.png"),
        ("/whole/\u00e9.png?q=\u00e9", "/whole/%C3%A9.png?q=%C3%A9"),
        ("/whole/[a]|b.png", "/whole/[a]%7Cb.png"),
    ],
)
def test_addresses_that_are_not_encoded_are(given, sent, web):
    read(Item("x", web + given))
    assert Web.lines == [f"GET {sent} HTTP/1.1"]


def test_hosts_with_accents_are_encoded_as_names_are():
    pytest.importorskip("yarl")
    assert (
        encoded("https://a%40b:c@b\u00fccher.example:81/x%26?y z")
        == "https://a%40b:c@xn--bcher-kva.example:81/x%26?y%20z"
    )
    assert encoded("s3://bucket/a b.png") == "s3://bucket/a b.png"
