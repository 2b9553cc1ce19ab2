"""The published GEM (`gem_torch`), run by another interpreter: it wants an old open_clip, in an environment of its own.

    python -m venv published && published/bin/pip install gem_torch==1.0.1 open_clip_torch==2.23.0
    open-gem bench --against published/bin/python

This file is run by that interpreter as it is, so it imports nothing of this package at its top; here it is imported for
`Published`, which talks to it.
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
def published(interpreter: str, model: str, side: int, batch: int, threads: int) -> Iterator["Published"]:
    """The published code at work in `interpreter`, until this ends. Raises InputError where it cannot be run there."""
    command = [interpreter, __file__, *map(str, (model, side, batch, threads))]
    from open_gem.errors import InputError

    with TemporaryFile("w+") as said:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        except OSError as error:
            raise InputError(f"{interpreter!r} could not be run: {error.strerror}") from error
        try:
            yield Published(process, interpreter, said)
        finally:
            process.kill()
            process.communicate()


class Published:
    """One turn a call, in seconds, of what `gem_torch` makes of a batch of random pictures: both of its streams."""

    def __init__(self, process: subprocess.Popen[str], interpreter: str, said: IO[str]):
        self.process, self.interpreter, self.said = process, interpreter, said
        self.rest, self.peak = self._ask("")[0], 0.0

    def __call__(self) -> float:
        seconds, self.peak = self._ask("go\n")
        return seconds

    def _ask(self, word: str) -> "list[float]":
        from open_gem.errors import InputError

        try:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(word)
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            self.process.communicate()
            self.said.seek(0)
            lines = self.said.read().strip().splitlines() or ["nothing"]
            code = self.process.returncode
            end = f"it was killed by signal {-code}" if code < 0 else f"it said: {lines[-1]}"
            raise InputError(f"gem_torch did not run with {self.interpreter!r}: {end}") from error


def memory(field: str) -> float:
    """MiB of this process, by a name of Linux's /proc/self/status."""
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024


def serve(model: str, side: int, batch: int, threads: int) -> None:
    import gem  # pyright: ignore[reportMissingImports]
    import torch

    if threads:
        torch.set_num_threads(threads)
    visual = gem.create_gem_model(model_name=model, pretrained=None, device="cpu").eval().model.visual
    pixels = torch.randn(batch, 3, side, side, dtype=torch.float32, device="cpu")
    print(json.dumps([memory("VmRSS")]), flush=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    with torch.no_grad():
        for _ in sys.stdin:
            start = perf_counter()
            visual(pixels)
            print(json.dumps([perf_counter() - start, memory("VmHWM")]), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:5]))
