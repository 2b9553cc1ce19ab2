"""Bytes of remote files, in one request if the store allows it, and only those requested.

The libraries' own files ask for the size first and read ahead (50 MB of S3, for one image of a tar), and an abandoned
read keeps its connection, of which there are few. So reads and listings here end after their timeout.
"""

import re
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from open_gem.errors import ImageError

BLOCK = 2**22  # bytes that are read ahead of sequential reads
MAX_BYTES = 2**30  # of one file: a larger one is no image, and would fill the memory
WHOLE = "the server gives files as a whole only (no range requests)"


def fetch(url: str, seconds: float) -> bytes:
    """Return all bytes behind a URL. Raises ImageError if they are too many, and any error of a library."""
    files, path = _at(url)
    content = _part(files, path, 0, MAX_BYTES + 1, seconds)
    if len(content) > MAX_BYTES:
        raise ImageError(f"has more than {MAX_BYTES} bytes, expected an image")
    return content


def fetch_part(url: str, offset: int, size: int, seconds: float) -> bytes:
    """Return `size` bytes from `offset` on, fewer at the end of the file. Raises ImageError if the store serves no
    ranges."""
    if size == 0:
        return b""  # there is no such range: a store would send everything
    files, path = _at(url)
    content = _part(files, path, offset, size, seconds)
    if len(content) > size:
        raise ImageError(WHOLE)
    return content


def open_remote(url: str) -> Any:
    """Open a file that is read from its start to its end, or nearly so."""
    files, path = _at(url)
    return files.open(path, "rb", block_size=BLOCK)


def folder(url: str, seconds: float) -> list[tuple[str, bool]]:
    """Return the names in a remote folder, in order, and whether each is a folder. Raises any error of a library."""
    files, path = _at(url)
    path = path.rstrip("/")
    entries = _listed(files, path, seconds)
    files.invalidate_cache(path)  # drop the listing: the next look must be fresh, and memory is bounded
    split = ((*entry["name"].rstrip("/").rpartition("/"), entry["type"] == "directory") for entry in entries)
    return sorted((name, is_folder) for top, _, name, is_folder in split if name and top == path)


WEB = re.compile(r"(https?)://([^/?#]*)(.*)", re.DOTALL)


def encoded(url: str) -> str:
    """Return a web address as it is sent: illegal characters are quoted, all else stays byte for byte, for a signature
    may cover it."""
    if (match := WEB.fullmatch(url)) is None:
        return url
    scheme, host, rest = match.groups()
    if not host.isascii():
        from yarl import URL

        host = str(URL(f"{scheme}://{host}")).partition("://")[2].rstrip("/")
    rest = quote(rest, safe="!#$%&'()*+,/:;=?@[]~", errors="surrogateescape")
    return f"{scheme}://{host}{re.sub('%(?![0-9A-Fa-f]{2})', '%25', rest)}"


def _at(url: str) -> tuple[Any, str]:
    """Return the file system and path by which fsspec reaches a URL. fsspec and its packages send web addresses
    unchanged."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    before, chain, last = url.rpartition("::")
    if (match := WEB.fullmatch(last)) is None:
        return url_to_fs(url)
    client = conf.get(match[1], {}).get("client_kwargs", {})
    options = {"encoded": True, "client_kwargs": {"requote_redirect_url": False, **client}}
    return url_to_fs(before + chain + encoded(last), **{match[1]: options})


def _part(files: Any, path: str, offset: int, size: int, seconds: float) -> bytes:
    from fsspec.asyn import AsyncFileSystem

    if not isinstance(files, AsyncFileSystem):
        return files.cat_file(path, offset, offset + size)
    work = _get if path.startswith(("http://", "https://")) else _cat
    return _within(files, seconds, work, files, path, offset, offset + size)


def _listed(files: Any, path: str, seconds: float) -> list[dict[str, Any]]:
    from fsspec.asyn import AsyncFileSystem

    if not isinstance(files, AsyncFileSystem):
        return files.ls(path, detail=True)
    return _within(files, seconds, files._ls, path, detail=True)


def _within(files: Any, seconds: float, work: Any, *arguments: Any, **settings: Any) -> Any:
    from fsspec.asyn import sync

    return sync(files.loop, work, *arguments, timeout=seconds + 1, **settings)  # the caller has given up by then


async def _cat(files: Any, path: str, start: int, end: int) -> bytes:
    try:
        return await files._cat_file(path, start=start, end=end)
    except Exception:
        with suppress(Exception):
            if start == 0 and (await files._info(path))["size"] == 0:  # no part of an empty file exists
                return b""
        raise


async def _get(files: Any, url: str, start: int, end: int) -> bytes:
    """Get bytes in one request. fsspec's own way asks twice, takes any amount into memory, and drops the reason of an
    error."""
    session = await files.set_session()
    options = dict(files.kwargs)
    if start:
        wanted = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        options["headers"] = {**options.get("headers", {}), **wanted}
    async with session.get(files.encode_url(url), **options) as answer:
        if not answer.ok:
            raise ImageError(f"the server answered {answer.status} {answer.reason}")
        if start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ImageError(WHOLE)
        content = bytearray()
        async for chunk in answer.content.iter_chunked(2**16):
            content += chunk
            if len(content) >= end - start:
                break
    del content[end - start :]
    return bytes(content)
