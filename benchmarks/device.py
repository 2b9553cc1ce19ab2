"""Correctness and speed on a GPU in one command, eight minutes at most, without a network.

    python benchmarks/device.py --out device/ [--against published/bin/python]
    python benchmarks/device.py --out device/ --device cpu --quick      the same on a CPU, in small

Writes device.md and device.json into the folder after every row, so that a run that is cut short leaves what it has:

    parity      the numbers of the published code (tests/parity), TF32 off: to 2e-5
    methods     every method against float32 on a CPU: to 1e-4 of the largest value; bfloat16 and float16: 1 - cosine
    attention   the kernel in Triton against scaled_dot_product_attention: errors and times
    times       open_clip's plain pass, published gem_torch, GEM: as it is and as CUDA graphs; peak memory
    label       images a second of the labelling engine, with decoding
    compiled    open_clip's plain pass and GEM through torch.compile, last; not with --quick

Each section has a share of the time; what does not fit is listed as skipped. Ends with 1 if a number is wrong.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from labelling import by_engine, random_vit
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from open_gem import towers
from open_gem.bench.measuring import interleave, machine, turn_of
from open_gem.bench.published import published
from open_gem.bench.subject import Setting, Subject
from open_gem.data.scenes import CONCEPTS, scene
from open_gem.files import to_json, write_file
from open_gem.label import local
from open_gem.label.labeling import load_labeling
from open_gem.label.ontology import Ontology
from open_gem.method import attention, kernels
from open_gem.method.run import run
from open_gem.method.table import METHODS

PARITY = Path(__file__).resolve().parents[1] / "tests" / "parity"
PARITY_LIMIT, METHODS_LIMIT = 2e-5, 1e-4
SHARES = {"parity": 0.06, "methods": 0.2, "attention": 0.14, "times": 0.35, "label": 0.12, "compiled": 0.13}
GRACE = 20  # seconds after which a call that cannot be interrupted ends the process
TYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SETTINGS = ((448, 1), (448, 16), (224, 64), (224, 1), (896, 4), (448, 64), (896, 1), (224, 16), (448, 4), (896, 16))
Row = dict[str, Any]


class OutOfTimeError(Exception):
    """The section's time is over."""


@dataclass
class Report:
    """What was measured, on disk after every row."""

    folder: Path
    document: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        write_file(self.folder / "device.json", to_json(self.document, indent=1).encode())
        write_file(self.folder / "device.md", "\n".join(self._markdown()).encode())

    def add(self, section: str, row: Row) -> None:
        self.document["sections"][section]["rows"].append(row)
        self.write()
        print(section, *(f"{name} {_cell(value)}" for name, value in row.items() if value is not None), flush=True)

    def _markdown(self) -> Iterator[str]:
        yield f"{self.document['machine']}; model {self.document['model']}"
        for name, section in self.document["sections"].items():
            yield f"\n## {name}\n"
            rows = section["rows"]
            heads = list(dict.fromkeys(key for row in rows for key in row))
            if rows:
                yield f"| {' | '.join(heads)} |"
                yield f"|{'---|' * len(heads)}"
            yield from (f"| {' | '.join(_cell(row.get(head)) for head in heads)} |" for row in rows)
            if section["ended"] != "whole":
                yield f"\nNot whole: {section['ended']}"
        yield ""


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside the block when time is over; end the process if a call does not let it."""

    def raise_it(*_: Any) -> None:
        raise OutOfTimeError(f"{seconds:.0f} seconds are over")

    watchdog = threading.Timer(seconds + GRACE, os._exit, (3,))  # what is on disk stays
    watchdog.daemon = True
    watchdog.start()
    before = signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watchdog.cancel()


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let products of float32 use TF32, or not."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = on
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((ours.double().cpu() - theirs.double().cpu()).abs().max())


# Sections -------------------------------------------------------------------------------------------------------------


def parity(options: argparse.Namespace) -> Iterator[Row]:
    for folder in ("gem_square", "gem_resampled"):
        tower = towers.load(f"local-dir:{PARITY / folder}", device=options.device).vision
        with np.load(PARITY / folder / "reference.npz") as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files}
        for case in json.loads((PARITY / folder / "cases.json").read_text()):
            temperature = "adaptive" if case["inverse_temperature"] is None else 1 / case["inverse_temperature"]
            method = METHODS["gem"].replace(
                depth=case["blocks"], iterations=case["iterations"], temperature=temperature
            )
            ours = run(tower, arrays["image"].to(options.device), {"gem": method})["gem"].tokens
            difference = error(ours, arrays[f"{case['key']}__tokens"])
            yield {"case": f"{folder} {case['key']}", "error": difference, "correct": difference <= PARITY_LIMIT}


def methods(options: argparse.Namespace) -> Iterator[Row]:
    subject = Subject(Setting(options.model, side=options.side, batch=2))
    tower, pixels = subject.tower, subject.pixels
    fitted = {name: method.fitted(tower.layers) for name, method in METHODS.items()}
    exact = {name: encoded.patches for name, encoded in run(tower, pixels, fitted).items()}
    for dtype in ("float32", "bfloat16", "float16"):
        tower.module.to(options.device, TYPES[dtype])
        for name, method in fitted.items():
            row: Row = {"method": name, "type": dtype}
            try:
                ours = run(tower, pixels.to(options.device, TYPES[dtype]), {name: method})[name].patches.float().cpu()
            except OutOfTimeError:
                raise
            except Exception as problem:  # such as an operation that a device lacks in a type
                yield {**row, "problem": _line(problem), **({"correct": False} if dtype == "float32" else {})}
                continue
            distance = 1 - cosine_similarity(ours.double(), exact[name].double(), dim=-1)
            row |= {"1 - cosine, mean": float(distance.mean()), "largest": float(distance.max())}
            if dtype == "float32":
                relative = error(ours, exact[name]) / float(exact[name].abs().max())
                row |= {"error of the largest": relative, "correct": relative <= METHODS_LIMIT}
            yield row


def compare_attention(options: argparse.Namespace) -> Iterator[Row]:
    cases = [(1, 12, 197, 64), (8, 12, 785, 64), (1, 12, 3137, 64), (2, 5, 33, 80), (64, 12, 197, 64), (1, 3, 150, 16)]
    for dtype in ("bfloat16", "float16", "float32", "tf32"):
        for b, h, n, c in ((1, 2, 33, 16),) if options.quick else cases:
            generator = torch.Generator().manual_seed(n)
            packed = torch.randn(b, n, 3, h, c, generator=generator, dtype=torch.float32, device="cpu")
            q, k, v = packed.to(options.device, TYPES[dtype]).permute(2, 0, 3, 1, 4)
            mix = partial(attention.self_self, [q, k, v], v, 2.0, normalize=True, iterations=1)
            row: Row = {"type": dtype, "b h n c": f"{b} {h} {n} {c}"}
            exact = attention.self_self(
                [q[:1].double(), k[:1].double(), v[:1].double()], v[:1].double(), 2.0, normalize=True, iterations=1
            )
            with tf32(dtype == "tf32"):
                with switched(True):
                    kernel = kernels.on_gpu()
                    fits = kernel is not None and kernel.fits(2.0, q, k, v)
                works = {"torch": on_switch(mix, False), **({"triton": on_switch(mix, True)} if fits else {})}
                for name, work in works.items():
                    row[f"{name}, error"] = error(work()[:1], exact)
                seconds = interleave({name: turn_of(work) for name, work in works.items()}, options.turns)
            row |= {f"{name}, ms": 1000 * median(times) for name, times in seconds.items()}
            if fits:
                row["torch / triton"] = row["torch, ms"] / row["triton, ms"]
                limit = 2e-5 if dtype == "float32" else 1e-2 + 3 * row["torch, error"]
                row["correct"] = row["triton, error"] <= limit
            else:
                row["problem"] = "the kernel does not run on this device"
            yield row


def times(options: argparse.Namespace) -> Iterator[Row]:
    if options.quick:
        types, settings = ("float32", "bfloat16"), ((options.side, 1), (options.side, 2))
    else:
        types, settings = ("bfloat16", "float32", "tf32"), SETTINGS
    for side, batch in settings:
        for dtype in types:
            name = {"tf32": "float32"}.get(dtype, dtype)
            setting = Setting(options.model, side=side, batch=batch, device=options.device, dtype=name)
            place: Row = {"px": side, "images": batch, "type": dtype}
            with tf32(dtype == "tf32"), torch.no_grad():
                yield from ({**place, **row} for row in _times(setting, dtype, options))


def compiled(options: argparse.Namespace) -> Iterator[Row]:
    """Yield times with torch.compile. It comes last, since a compiler may not let itself be interrupted."""
    options.compiled = True
    for batch in (16, 1):
        setting = Setting(options.model, side=448, batch=batch, device=options.device, dtype="bfloat16")
        with torch.no_grad():
            yield from ({"images": batch, **row} for row in _times(setting, "bfloat16", options))


def _times(setting: Setting, dtype: str, options: argparse.Namespace) -> Iterator[Row]:
    subject = Subject(setting)
    plain = lambda: subject.tower.library_forward(subject.pixels)  # noqa: E731
    gem = partial(run, subject.tower, subject.pixels, {"gem": METHODS["gem"].fitted(subject.tower.layers)})
    makers: dict[str, Callable[[], Callable[[], object]]] = {"plain": lambda: plain, "gem": lambda: gem}
    if setting.device.startswith("cuda"):
        makers |= {
            "gem, Triton": lambda: on_switch(gem, True),
            "plain, CUDA graph": lambda: captured(plain),
            "gem, CUDA graph": lambda: captured(gem),
            "gem, Triton, CUDA graph": lambda: captured(on_switch(gem, True)),
        }
    if options.compiled:
        makers = {
            "plain": lambda: plain,
            "plain, compiled": lambda: torch.compile(plain),
            "gem, compiled": lambda: torch.compile(gem),
        }
    turns, problems, peaks = {}, {}, {}
    with ExitStack() as stack:
        for name, make in makers.items():
            try:
                work = make()
                peaks[name] = peak_of(work)
                turns[name] = turn_of(work)
            except OutOfTimeError:
                raise
            except Exception as problem:  # out of memory, or what cannot be captured or compiled
                problems[name] = _line(problem)
                free_memory()
        if options.against and not options.compiled and dtype != "bfloat16":
            subject_of = (setting.model, setting.side, setting.batch, setting.threads, setting.device)
            try:
                turns["gem_torch"] = stack.enter_context(published(options.against, *subject_of))
                turns["gem_torch"]()
            except OutOfTimeError:
                raise
            except Exception as problem:
                turns.pop("gem_torch", None)
                problems["gem_torch"] = _line(problem)
        seconds = interleave(turns, options.turns)
    for name, taken in seconds.items():
        ms = [1000 * part / setting.batch for part in (median(taken), min(taken), max(taken))]
        ratio = median(taken) / median(seconds["plain"]) if "plain" in seconds else None
        yield {"case": name, "ms an image": ms[0], "from": ms[1], "to": ms[2], "× plain": ratio, "MiB": peaks.get(name)}
    for name, problem in problems.items():
        yield {"case": name, "problem": problem}


def label(options: argparse.Namespace) -> Iterator[Row]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    count = 16 if options.quick else 1024
    with tempfile.TemporaryDirectory() as scratch:
        photos, weights = Path(scratch, "photos"), Path(scratch, "weights")
        photos.mkdir()
        weights.mkdir()
        images = [Image.fromarray(scene(seed, (480, 640)).image) for seed in range(16)]
        for index in range(count):
            images[index % 16].save(photos / f"{index:05}.jpg", quality=90 - index // 16 % 8)
        model = options.model if options.model.startswith("local-dir:") else random_vit(weights)
        for dtype, batch_size in (("float32", 4),) if options.quick else (("bfloat16", 32), ("float32", 32)):
            labels = Ontology.of(CONCEPTS[:3], presence=0.0)  # random weights: all are looked for
            labeling = load_labeling(labels, model, device=options.device, dtype=dtype)
            seconds = by_engine(labeling, photos, local.run, batch_size=batch_size)
            yield {
                "type": dtype,
                "images": count,
                "batch": batch_size,
                "cores": os.cpu_count(),
                "images/s": count / seconds,
            }


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "parity": parity,
    "methods": methods,
    "attention": compare_attention,
    "times": times,
    "label": label,
    "compiled": compiled,
}


# Work -----------------------------------------------------------------------------------------------------------------


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Switch the kernel in Triton on or off."""
    with patch.dict(os.environ, {kernels.TRITON_SWITCH: "1" if on else "0"}):
        yield


def on_switch(work: Callable[[], Any], on: bool) -> Callable[[], Any]:
    """Return work that is done with the kernel in Triton, or without."""

    def switched_work() -> Any:
        with switched(on):
            return work()

    return switched_work


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """Return the work as one CUDA graph. The check for numbers that are not finite waits for the GPU, and so cannot be
    part of one."""
    module = import_module("open_gem.method.run")
    with patch.object(module, "_check_finite", lambda *_: None):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = work()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def peak_of(work: Callable[[], object]) -> float | None:
    """Do the work once; return the most MiB that torch held on the GPU, with the model."""
    if not torch.cuda.is_available():
        work()
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _line(problem: BaseException) -> str:
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for device.md and device.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--side", type=int, default=224, help="of the images of methods, and of times with --quick")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all sections; at most 8 with starting")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--against", default="", help="a Python that has the published gem_torch")
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    options = parser.parse_args()
    options.compiled = False
    chosen = [name for name in options.sections.split(",") if not (options.quick and name == "compiled")]
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}, expected some of {', '.join(SECTIONS)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch has no CUDA device here, expected one; --device cpu --quick runs the same in small")
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}, expected a number above 0")
    start = monotonic()
    report = Report(options.out, {"machine": machine(), "model": options.model, "sections": {}})
    for section in chosen:
        report.document["sections"][section] = {"rows": [], "ended": "the process ended"}
    left = sum(SHARES[section] for section in chosen)
    for section in chosen:  # what one leaves goes to those after it
        remaining = 60 * options.minutes - (monotonic() - start)
        budget, left = remaining * SHARES[section] / left, left - SHARES[section]
        outcome = report.document["sections"][section]
        try:
            with at_most(budget), tf32(False) if section != "times" else nullcontext():
                for row in SECTIONS[section](options):
                    report.add(section, row)
            outcome["ended"] = "whole"
        except OutOfTimeError as over:
            outcome["ended"] = f"{over}, the rest is skipped"
        except Exception as problem:  # the other sections are still worth having
            outcome["ended"] = _line(problem)
            outcome["failed"] = True
        free_memory()
        report.write()
    sections = report.document["sections"].values()
    wrong = [row for section in sections for row in section["rows"] if row.get("correct") is False]
    failed = [section for section in sections if section.get("failed")]
    if wrong or failed:
        print(
            f"{len(wrong)} wrong numbers, {len(failed)} failed sections: see {options.out / 'device.md'}",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
