"""Many clients at once: python benchmarks/serving.py [--clients 64] [--seconds 60] [--kill 10] [--model NAME] [--json]

A server is started as a process of its own. Each client goes on and on: it uploads a scene of 640x480 pixels (JPEG) of
its own choice among 50, asks it six times for three phrases, most of them new, and once asks /v1/ground. On 404 it
uploads again; on 429 it waits as it is told. With --kill the server is killed with -9 and started again every so many
seconds of service; clients try again meanwhile, and what matters is what they are told before and after.
"""

import argparse
import asyncio
import io
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import httpx
import numpy as np
from PIL import Image

from open_gem.data.scenes import CONCEPTS, scene
from open_gem.files import to_json

IMAGES, ASKS = 50, 6
COMMAND = [sys.executable, "-c", "from open_gem.cli import main; main()", "serve"]
ROUTES = {"upload": "POST /v1/images", "ask": "POST /v1/images/{id}/ground", "ground": "POST /v1/ground"}


@dataclass
class Seen:
    """What clients saw: statuses by route, seconds of answers, and how often nobody answered."""

    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    unanswered: int = 0
    end: float = 0.0  # of the clock, moved on by the time that no server was there
    kills: int = 0


class Server:
    """The process that serves, on one port whatever happens to it."""

    def __init__(self, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.options = options
        self.process = self._start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen([*COMMAND, "--port", str(self.port), "--device", "cpu", *self.options])

    def kill(self) -> None:
        """With -9, and start again."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    async def ready(self, client: httpx.AsyncClient) -> None:
        for _ in range(3000):
            try:
                await client.get("/health")
                return
            except httpx.HTTPError:
                await asyncio.sleep(0.1)
        raise SystemExit("the server did not start")

    async def memory(self, client: httpx.AsyncClient) -> float:
        """Resident MiB."""
        lines = (await client.get("/metrics")).text.splitlines()
        return (
            float(next(line for line in lines if line.startswith("process_resident_memory_bytes")).split()[1]) / 2**20
        )


def images() -> list[bytes]:
    """Scenes of 640x480 pixels as JPEG."""
    encoded = []
    for seed in range(IMAGES):
        file = io.BytesIO()
        Image.fromarray(scene(seed, (480, 640)).image).save(file, format="JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


async def ask(client: httpx.AsyncClient, seen: Seen, what: str, path: str, **body: object) -> httpx.Response | None:
    start = time.perf_counter()
    try:
        answer = await client.post(path, **body)  # pyright: ignore[reportArgumentType]
    except httpx.HTTPError:
        seen.unanswered += 1
        await asyncio.sleep(0.2)
        return None
    seen.statuses[what][answer.status_code] += 1
    if answer.is_success:
        seen.seconds[what].append(time.perf_counter() - start)
    elif answer.status_code == 429:
        await asyncio.sleep(float(answer.headers["retry-after"]) * random.uniform(0.5, 1.5))
    return answer


async def one_client(client: httpx.AsyncClient, seen: Seen, data: list[bytes]) -> None:
    while time.perf_counter() < seen.end:
        image = random.choice(data)
        answer = await ask(client, seen, "upload", "/v1/images", files={"file": image})
        if answer is None or not answer.is_success:
            continue
        path = f"/v1/images/{answer.json()['id']}/ground"
        for _ in range(ASKS):
            phrases = [f"{random.choice(CONCEPTS)} {random.randrange(1000)}" for _ in range(3)]
            asked = {"prompts": phrases, "method": random.choice(["gem", "clip"]), "mask": "rle", "similarity": True}
            answer = await ask(client, seen, "ask", path, json=asked)
            if answer is None or answer.status_code == 404 or time.perf_counter() > seen.end:
                break
        labels = {"prompts": random.sample(CONCEPTS, 3)}
        await ask(client, seen, "ground", "/v1/ground", files={"file": image}, data=labels)


async def killer(server: Server, client: httpx.AsyncClient, seen: Seen, every: float) -> None:
    while time.perf_counter() + every < seen.end:
        await asyncio.sleep(every)
        await asyncio.to_thread(server.kill)
        seen.kills += 1
        killed = time.perf_counter()
        await server.ready(client)
        seen.end += time.perf_counter() - killed


async def load(options: argparse.Namespace) -> dict[str, object]:
    data, seen = images(), Seen()
    server = Server("--model", options.model, "--cache-mb", str(options.cache_mb), *options.serve)
    limits = httpx.Limits(max_connections=options.clients + 4)
    try:
        async with httpx.AsyncClient(base_url=server.address, timeout=90, limits=limits) as client:
            await server.ready(client)
            memory = {"started": await server.memory(client)}
            begin = time.perf_counter()
            seen.end = begin + options.seconds
            clients = [one_client(client, seen, data) for _ in range(options.clients)]
            tasks = [asyncio.create_task(one) for one in clients]
            if options.kill:
                tasks.append(asyncio.create_task(killer(server, client, seen, options.kill)))
            for share in (0.25, 0.5, 0.75):
                await asyncio.sleep(max(0.0, begin + share * options.seconds - time.perf_counter()))
                if not options.kill:
                    memory[f"after {share * options.seconds:.0f} s"] = await server.memory(client)
            await asyncio.gather(*tasks)
            seconds = time.perf_counter() - begin
            await server.ready(client)
            memory["at the end"] = await server.memory(client)
            metrics = (await client.get("/metrics")).text
        code = server.stop()
    finally:
        server.process.kill()
    return document(seen, memory, seconds, metrics, code)


def document(seen: Seen, memory: dict[str, float], seconds: float, metrics: str, code: int) -> dict[str, object]:
    times = {what: np.array(seconds_each) for what, seconds_each in seen.seconds.items()}
    return {
        "seconds": seconds,
        "routes": {
            what: {
                "statuses": dict(sorted(seen.statuses[what].items())),
                "per_second": len(seconds_each) / seconds,
                "p50": float(np.quantile(seconds_each, 0.5)),
                "p95": float(np.quantile(seconds_each, 0.95)),
            }
            for what, seconds_each in times.items()
        },
        "unanswered": seen.unanswered,
        "kills": seen.kills,
        "memory": memory,
        "pending": _value(metrics, "open_gem_pending_requests"),
        "processor_seconds": _value(metrics, "process_cpu_seconds_total"),  # of the last process, its start included
        "exit_code": code,
    }


def _value(metrics: str, name: str) -> float:
    return next(float(line.split()[1]) for line in metrics.splitlines() if line.startswith(name + " "))


def show(report: dict) -> None:
    print("| route | answers by status | a second | p50 | p95 |\n|---|---|---|---|---|")
    for what, row in report["routes"].items():
        statuses = ", ".join(f"{status}: {count}" for status, count in row["statuses"].items())
        print(f"| `{ROUTES[what]}` | {statuses} | {row['per_second']:.1f} | {row['p50']:.2f} s | {row['p95']:.2f} s |")
    print("resident memory in MiB:", ", ".join(f"{when} {value:.0f}" for when, value in report["memory"].items()))
    print(f"processor time {report['processor_seconds']:.0f} s in {report['seconds']:.0f} s")
    print(
        f"kills: {report['kills']}; requests without an answer: {report['unanswered']}; exit code {report['exit_code']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kill", type=float, default=0, help="kill -9 and restart every so many seconds")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--cache-mb", type=int, default=16, help="small, so that images are evicted")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("serve", nargs="*", help="more options of open-gem serve")
    options = parser.parse_args()
    report = asyncio.run(load(options))
    print(to_json(report)) if options.json else show(report)


if __name__ == "__main__":
    main()
