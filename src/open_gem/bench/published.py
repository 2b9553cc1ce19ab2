"""The published GEM (`gem_torch`), run by another interpreter: it needs an old open_clip in its own environment.

    python -m venv published && published/bin/pip install gem_torch==1.0.1 open_clip_torch==2.23.0
    open-gem bench --against published/bin/python

That interpreter runs this file as a script, so it imports nothing of this package at its top. This package imports it
for `Published`, which communicates with the script.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter
from typing import IO

NAME = "gem_torch, published"


@contextmanager
def published(
    interpreter: str, model: str, side: int, batch: int, threads: int, device: str = "cpu"
) -> Iterator["Published"]:
    """Run the published code in a process of `interpreter` inside a `with` block. Raises InputError if it cannot be
    run."""
    command = [interpreter, __file__, *map(str, (model, side, batch, threads)), device]
    from open_gem.errors import InputError

    with TemporaryFile("w+") as stderr:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
        except OSError as error:
            raise InputError(f"{interpreter!r} could not be run: {error.strerror}") from error
        try:
            yield Published(process, interpreter, stderr)
        finally:
            process.kill()
            process.communicate()


class Published:
    """Each call is one turn of `gem_torch` on a batch of random images, both of its streams; returns its seconds."""

    def __init__(self, process: subprocess.Popen[str], interpreter: str, stderr: IO[str]):
        self.process, self.interpreter, self.stderr = process, interpreter, stderr
        self.rest, self.peak = self._request("")[0], 0.0

    def __call__(self) -> float:
        seconds, self.peak = self._request("go\n")
        return seconds

    def _request(self, line: str) -> "list[float]":
        from open_gem.errors import InputError

        try:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(line)
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            self.process.communicate()
            self.stderr.seek(0)
            lines = self.stderr.read().strip().splitlines() or ["nothing"]
            code = self.process.returncode
            end = f"it was killed by signal {-code}" if code < 0 else f"it said: {lines[-1]}"
            raise InputError(f"gem_torch did not run with {self.interpreter!r}: {end}") from error


def memory(field: str) -> float:
    """Return MiB of this process, by a name of Linux's /proc/self/status."""
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024


def serve(model: str, side: int, batch: int, threads: int, device: str) -> None:
    import gem  # pyright: ignore[reportMissingImports]
    import torch

    if threads:
        torch.set_num_threads(threads)
    visual = gem.create_gem_model(model_name=model, pretrained=None, device=device).eval().model.visual
    pixels = torch.randn(batch, 3, side, side, dtype=torch.float32, device=device)
    print(json.dumps([memory("VmRSS")]), flush=True)
    Path("/proc/self/clear_refs").write_text("5")  # importing and building do not count
    with torch.no_grad():
        for _ in sys.stdin:
            start = perf_counter()
            visual(pixels)
            if pixels.is_cuda:
                torch.cuda.synchronize()
            print(json.dumps([perf_counter() - start, memory("VmHWM")]), flush=True)


if __name__ == "__main__":
    name, sides, images, count, place = sys.argv[1:]
    serve(name, int(sides), int(images), int(count), place)
