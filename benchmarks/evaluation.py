"""What evaluating costs: nine rows of Table 1 from one pass beside CLIP alone, and where the time goes.

    python benchmarks/evaluation.py [turns] [images]

A full-size ViT-B/16 of random weights on pictures of 375 × 500 in PascalVOC's layout, by the paper's protocol. Times
are of one machine at one moment: cases take turns, medians of their ratios are what to read.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import open_clip
from PIL import Image

import open_gem
from open_gem.data import open_dataset
from open_gem.evaluation import run as evaluate
from open_gem.evaluation.protocol import PROTOCOLS
from open_gem.evaluation.run import measure
from open_gem.localizer import Localizer
from open_gem.paper import EXPERIMENTS


def write_voc(root: Path, images: int) -> None:
    """Smooth random pictures, for a JPEG of noise is slower to decode than a photograph."""
    random, home = np.random.default_rng(0), root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    ids = [f"2007_{index:06d}" for index in range(images)]
    for one in ids:
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(home / f"JPEGImages/{one}.jpg")
        labels = Image.fromarray(random.choice([0, 3, 12, 255], (6, 8)).astype(np.uint8))
        labels.resize((500, 375), Image.Resampling.NEAREST).save(home / f"SegmentationClass/{one}.png")
    (home / "ImageSets/Segmentation/val.txt").write_text("".join(f"{one}\n" for one in ids))


def localizer() -> Localizer:
    model = open_clip.create_model("ViT-B-16-quickgelu").eval()
    return open_gem.adapt(model, open_clip.get_tokenizer("ViT-B-16"))


@contextmanager
def timed(owner: Any, names: list[str], spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds in some functions of a module or class while this lasts, whichever threads call them."""

    def watched(name: str, function: Any) -> Any:
        def call(*given: Any, **settings: Any) -> Any:
            start = perf_counter()
            try:
                return function(*given, **settings)
            finally:
                spent[name] = spent.get(name, 0.0) + perf_counter() - start

        return call

    kept = {name: getattr(owner, name) for name in names}
    for name, function in kept.items():
        setattr(owner, name, watched(name, function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(owner, name, function)


def main(turns: int = 3, images: int = 8) -> None:
    rows = EXPERIMENTS["table1"].rows(12)
    nine = {name: method for name, method in rows.items() if "K = 1" not in name}
    deeper = {name: method for name, method in rows.items() if "K = 0" not in name}
    cases = {"CLIP alone": {"CLIP": rows["CLIP"]}, "Table 1, K = 0": nine, "Table 1, K = 1": deeper}
    with TemporaryDirectory() as folder:
        write_voc(Path(folder), images)
        data, model = open_dataset("voc2012", folder), localizer()
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        parts: dict[str, dict[str, float]] = {}
        for turn in range(turns + 1):
            for name, methods in cases.items():
                spent: dict[str, float] = {}
                start = perf_counter()
                with timed(evaluate, ["_prepare", "_answers"], spent), timed(Localizer, ["read"], spent):
                    for _ in measure(model, methods, data, range(len(data)), PROTOCOLS["paper"], batch=4):
                        pass
                if turn:  # the first warms up
                    seconds[name].append((perf_counter() - start) / images)
                    parts[name] = {part: 1000 * one / images for part, one in spent.items()}
    print("| case | rows | s an image | × CLIP alone | reading (threads) | model | answers and counts |")
    print("|---|---|---|---|---|---|---|")
    for name, times in seconds.items():
        ratio = median(one / other for one, other in zip(times, seconds["CLIP alone"], strict=True))
        shares = " | ".join(f"{parts[name][part]:.0f} ms" for part in ("_prepare", "read", "_answers"))
        print(f"| {name} | {len(cases[name])} | {median(times):.2f} | {ratio:.2f} | {shares} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
