"""What evaluation costs: nine rows of Table 1 from one pass, CLIP alone, and where the time goes.

    python benchmarks/evaluation.py [turns] [images]

A full-size ViT-B/16 with random weights on images of 375 × 500 in PascalVOC's layout, by the paper's protocol. Times
depend on the machine and its load: cases take turns; compare medians of their ratios.
"""

import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import open_clip
from PIL import Image

from open_gem import towers
from open_gem.data import open_dataset
from open_gem.evaluation.protocol import PROTOCOLS
from open_gem.evaluation.run import measure
from open_gem.localizer import Localizer
from open_gem.paper.rows import EXPERIMENTS


def write_voc(root: Path, images: int) -> None:
    """Smooth random images, since a JPEG of noise decodes more slowly than a photograph."""
    random, home = np.random.default_rng(0), root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    ids = [f"2007_{index:06d}" for index in range(images)]
    for id in ids:
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(home / f"JPEGImages/{id}.jpg")
        labels = Image.fromarray(random.choice([0, 3, 12, 255], (6, 8)).astype(np.uint8))
        labels.resize((500, 375), Image.Resampling.NEAREST).save(home / f"SegmentationClass/{id}.png")
    (home / "ImageSets/Segmentation/val.txt").write_text("".join(f"{id}\n" for id in ids))


def load() -> Localizer:
    model = open_clip.create_model("ViT-B-16-quickgelu").eval()
    return TimedLocalizer(towers.adapt(model, open_clip.get_tokenizer("ViT-B-16")))


class TimedLocalizer(Localizer):
    """A localizer that adds up the seconds in `prepare` and `encode`, in whichever threads they are called."""

    seconds: ClassVar[dict[str, float]] = {}


def _timed(name: str) -> Any:
    def call(self: TimedLocalizer, *args: Any, **settings: Any) -> Any:
        start = perf_counter()
        try:
            return getattr(super(TimedLocalizer, self), name)(*args, **settings)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    return call


for name in ("prepare", "encode"):
    setattr(TimedLocalizer, name, _timed(name))


def main(turns: int = 3, images: int = 8) -> None:
    rows = EXPERIMENTS["table1"].rows(12)
    nine = {name: method for name, method in rows.items() if "K = 1" not in name}
    deeper = {name: method for name, method in rows.items() if "K = 0" not in name}
    cases = {"CLIP alone": {"CLIP": rows["CLIP"]}, "Table 1, K = 0": nine, "Table 1, K = 1": deeper}
    with TemporaryDirectory() as folder:
        write_voc(Path(folder), images)
        data, model = open_dataset("voc2012", folder), load()
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        parts: dict[str, dict[str, float]] = {}
        for turn in range(turns + 1):
            for name, methods in cases.items():
                TimedLocalizer.seconds.clear()
                start = perf_counter()
                for _ in measure(model, methods, data, range(len(data)), PROTOCOLS["paper"], batch_size=4):
                    pass
                if turn:  # the first warms up
                    seconds[name].append((perf_counter() - start) / images)
                    parts[name] = {part: spent / images for part, spent in TimedLocalizer.seconds.items()}
                    parts[name]["count"] = seconds[name][-1] - parts[name]["encode"]
    print("| case | rows | s an image | × CLIP alone | reading (threads) | model | locating and counting |")
    print("|---|---|---|---|---|---|---|")
    for name, times in seconds.items():
        ratio = median(time / alone for time, alone in zip(times, seconds["CLIP alone"], strict=True))
        shares = " | ".join(f"{1000 * parts[name][part]:.0f} ms" for part in ("prepare", "encode", "count"))
        print(f"| {name} | {len(cases[name])} | {median(times):.2f} | {ratio:.2f} | {shares} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
