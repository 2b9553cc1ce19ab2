"""Healthy requests beside hostile ones: python benchmarks/soak.py [--seconds 600] [--clients 2] [--json]

A server is started as a process of its own, on the loopback address. Clients ask /v1/ground about scenes of 640x480
pixels, one request after another: first alone (a quarter of --seconds, 60 at most), then beside

    bombs         one at a time, as fast as they are answered: images that cost much more than their bytes
    sizes         images of 200 to 3000 pixels a side, one every half second
    slow bodies   four connections that send a byte a second

Halfway the server is killed with -9 and started again. Printed: the 95th percentile of the healthy answers alone and
beside the bombs, how each kind of request was answered, and memory.
"""

import argparse
import asyncio
import io
import json
import random
import struct
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import numpy as np
from PIL import Image
from serving import Server, images

from open_gem.data.scenes import CONCEPTS

SLOW_BODIES = 4
PAUSE = 0.5  # seconds between two requests of a client


@dataclass
class Seen:
    """Seconds of healthy answers, and statuses of all requests by kind; None: nobody answered."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: dict[str, Counter[int | None]] = field(default_factory=lambda: defaultdict(Counter))
    slowest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    memory: dict[str, float] = field(default_factory=dict)


# Hostile images -------------------------------------------------------------------------------------------------------


def resized(scenes: list[bytes], count: int = 40) -> list[bytes]:
    """Images of 200 to 3000 pixels a side."""
    bodies = []
    for _ in range(count):
        with Image.open(io.BytesIO(random.choice(scenes))) as image:
            size = random.randint(200, 3000), random.randint(200, 3000)
            bodies.append(encoded(image.resize(size), "JPEG"))
    return bodies


def strip(height: int, width: int) -> bytes:
    return encoded(Image.new("RGB", (width, height)), "PNG")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def many_scans(scans: int = 20_000, side: int = 1024) -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, comes thousands of times."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def huge_tile(side: int = 40_000) -> bytes:
    """A TIFF of 16x16 pixels in one tile of so many a side."""
    pixels = zlib.compress(bytes(16))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    start = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries += [struct.pack("<HHII", 324, 4, 1, start), struct.pack("<HHII", 325, 4, 1, len(pixels))]
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4) + pixels


def bombs() -> dict[str, dict[str, object]]:
    """What is posted, by kind: a path and the arguments of a request."""
    hostile = {
        "JPEG of 20,000 scans": many_scans(),
        "PNG of 800x16": strip(16, 800),
        "PNG of 4000x20": strip(20, 4000),
        "PNG of 6300x6300, blank": strip(6300, 6300),
        "TIFF with a tile of 40,000x40,000": huge_tile(),
    }
    labels = {"prompts": CONCEPTS[:3]}
    requests: dict[str, dict[str, object]] = {
        name: {"url": "/v1/ground", "files": {"file": data}, "data": labels} for name, data in hostile.items()
    }
    headers = {"Content-Type": "application/json"}
    for name, size in (("JSON of 30 MB", 30_000_000), ("JSON of 8 MB, empty lists", 8_000_000)):
        requests[name] = {"url": "/setup", "content": b'{"a": [' + b"[]," * (size // 3) + b"[]]}", "headers": headers}
    return requests


class Bodies:
    """Bodies of requests, made before the measurement: making them uses the processors that are measured."""

    def __init__(self) -> None:
        self.healthy = images()
        self.bombs, self.sizes = bombs(), resized(self.healthy)


# Clients --------------------------------------------------------------------------------------------------------------


async def ask(client: httpx.AsyncClient, seen: Seen, kind: str, **request: object) -> float | None:
    """Seconds until an answer of 200; None for any other."""
    start = time.perf_counter()
    status = None
    try:
        status = (await client.post(**request)).status_code  # pyright: ignore[reportArgumentType]
    except httpx.HTTPError:
        await asyncio.sleep(0.2)
    seconds = time.perf_counter() - start
    seen.statuses[kind][status] += 1
    if status is not None:
        seen.slowest[kind] = max(seen.slowest[kind], seconds)
    return seconds if status == 200 else None


async def healthy(client: httpx.AsyncClient, seen: Seen, when: str, data: list[bytes], end: float) -> None:
    while time.perf_counter() < end:
        form = {"prompts": random.sample(CONCEPTS, 3)}
        files = {"file": random.choice(data)}
        seconds = await ask(client, seen, f"healthy, {when}", url="/v1/ground", files=files, data=form)
        if seconds is not None:
            seen.seconds[when].append(seconds)
        await asyncio.sleep(PAUSE)


async def hostile(client: httpx.AsyncClient, seen: Seen, requests: dict[str, dict[str, object]], end: float) -> None:
    while time.perf_counter() < end:
        for kind, request in requests.items():
            if time.perf_counter() < end:
                await ask(client, seen, kind, **request)


async def many_sizes(client: httpx.AsyncClient, seen: Seen, sized: list[bytes], end: float) -> None:
    while time.perf_counter() < end:
        files, form = {"file": random.choice(sized)}, {"prompts": random.sample(CONCEPTS, 3)}
        await ask(client, seen, "image of 200 to 3000 pixels", url="/v1/ground", files=files, data=form)
        await asyncio.sleep(PAUSE)


async def slow_body(client: httpx.AsyncClient, seen: Seen, end: float) -> None:
    async def drops() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while time.perf_counter() < end:
            yield b"x"
            await asyncio.sleep(1)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    while time.perf_counter() < end:
        await ask(client, seen, "slow body", url="/v1/images", content=drops(), headers=headers)


async def phase(client: httpx.AsyncClient, seen: Seen, bodies: Bodies, clients: int, when: str, seconds: float) -> None:
    end = time.perf_counter() + seconds
    tasks = [healthy(client, seen, when, bodies.healthy, end) for _ in range(clients)]
    if when != "alone":
        tasks += [hostile(client, seen, bodies.bombs, end), many_sizes(client, seen, bodies.sizes, end)]
        tasks += [slow_body(client, seen, end) for _ in range(SLOW_BODIES)]
    await asyncio.gather(*tasks)


async def soak(options: argparse.Namespace) -> dict[str, object]:
    seen, bodies = Seen(), Bodies()
    server = Server("--model", options.model)
    alone = min(60.0, options.seconds / 4)
    beside = (options.seconds - alone) / 2
    try:
        async with httpx.AsyncClient(base_url=server.address, timeout=90) as client:
            await server.ready(client)
            seen.memory["started"] = await server.memory(client)
            await phase(client, seen, bodies, options.clients, "alone", alone)
            seen.memory["after healthy requests"] = await server.memory(client)
            await phase(client, seen, bodies, options.clients, "beside", beside)
            seen.memory["beside bombs"] = await server.memory(client)
            await asyncio.to_thread(server.kill)
            await server.ready(client)
            await phase(client, seen, bodies, options.clients, "beside", beside)
            seen.memory["beside bombs, after a kill"] = await server.memory(client)
            await asyncio.sleep(6)  # in which the server returns free memory
            seen.memory["at rest"] = await server.memory(client)
        code = server.stop()
    finally:
        with suppress(ProcessLookupError):
            server.process.kill()
    p95 = {when: float(np.quantile(seconds, 0.95)) for when, seconds in seen.seconds.items()}
    return {
        "seconds": options.seconds,
        "p95": p95,
        "ratio": p95["beside"] / p95["alone"],
        "answers": {
            kind: {"statuses": {str(status): count for status, count in counts.items()}, "slowest": seen.slowest[kind]}
            for kind, counts in seen.statuses.items()
        },
        "memory": seen.memory,
        "exit_code": code,
    }


def show(report: dict) -> None:
    print("| request | answers by status | slowest |\n|---|---|---|")
    for kind, row in report["answers"].items():
        statuses = ", ".join(f"{status}: {count}" for status, count in row["statuses"].items())
        print(f"| {kind} | {statuses} | {row['slowest']:.2f} s |")
    p95 = report["p95"]
    print(f"healthy p95: alone {p95['alone']:.3f} s, beside {p95['beside']:.3f} s: {report['ratio']:.2f} times")
    print("resident memory in MiB:", ", ".join(f"{when} {value:.0f}" for when, value in report["memory"].items()))
    print(f"exit code {report['exit_code']}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = asyncio.run(soak(options))
    print(json.dumps(report)) if options.json else show(report)


if __name__ == "__main__":
    main()
