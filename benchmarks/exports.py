"""Images a second and peak memory of exports, by numbers of images: python benchmarks/exports.py 1000 10000 [FORMAT...]

Each image is 640x480 with three objects of some 10,000 pixels; each export is a process of its own.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import cast

import numpy as np
from scipy import ndimage

from open_gem.export import FORMATS, export
from open_gem.label.parts import Manifest, Parts, row_of
from open_gem.types import Size

SIZE, PART, KINDS = Size(480, 640), 64, 50  # pixels; images of a part; different images, which repeat


def objects(seed: int) -> list[dict]:
    """Three smooth blobs, such as a heatmap above a threshold has."""
    random = np.random.default_rng(seed)
    heat = ndimage.gaussian_filter(random.normal(size=SIZE), 25)
    components, count = cast(tuple[np.ndarray, int], ndimage.label(heat > np.quantile(heat, 0.85)))
    sizes = ndimage.sum_labels(components > 0, components, range(1, count + 1))
    largest = [int(index) + 1 for index in np.argsort(-sizes)[:3]]
    return [thing(components == number, f"label {index}") for index, number in enumerate(largest)]


def thing(mask: np.ndarray, label: str) -> dict:
    from open_gem.rle import run_lengths

    [(rows, columns)] = ndimage.find_objects(mask.astype(np.int32))
    box = [columns.start, rows.start, columns.stop, rows.stop]
    rle = run_lengths(mask[rows, columns], (rows, columns), SIZE)
    shared = {"prompt": label, "score": 0.3, "image_score": 0.2, "presence": 0.9, "point": box[:2]}
    return {"label": label, "xyxy": box, "rle": rle, **shared}


def write_parts(folder: Path, images: int) -> None:
    parts = Parts.claim(folder, Manifest({}, ("label 0", "label 1", "label 2")))
    kinds = [objects(seed) for seed in range(KINDS)]
    size = {"status": "ok", "height": SIZE.height, "width": SIZE.width, "seconds": 0.1}
    for start in range(0, images, PART):
        numbers = range(start, min(start + PART, images))
        parts.write(f"{start:08d}", [row_of(f"{n:08d}.jpg", "", **size, objects=kinds[n % KINDS]) for n in numbers])


def measure(labels: str, name: str, out: str) -> None:
    start = perf_counter()
    seen = 0

    def count(images: int) -> None:
        nonlocal seen
        seen += images

    export(labels, [name], out, progress=count)
    seconds = perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {name} | {seen} | {seen / seconds:.0f} | {peak:.0f} |", flush=True)


def main(*arguments: str) -> None:
    counts = [int(word) for word in arguments if word.isdigit()]
    able = [
        name for name, known in FORMATS.items() if known.missing() is None and name != "geojson"
    ]  # that has no tiles
    names = [word for word in arguments if not word.isdigit()] or able
    print("| format | images | images/s | peak MiB |\n|---|---|---|---|", flush=True)
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            alone("--write", f"{folder}/labels", str(count))
            for name in names:
                alone("--one", f"{folder}/labels", name, f"{folder}/out-{name}")


def alone(*words: str) -> None:
    """In a process of its own: a peak of memory is of a process, and of what started it."""
    subprocess.run([sys.executable, __file__, *words], check=True)


ENTRIES = {"--one": measure, "--write": lambda folder, images: write_parts(Path(folder), int(images))}

if __name__ == "__main__":
    entry = ENTRIES.get(sys.argv[1])
    entry(*sys.argv[2:]) if entry else main(*sys.argv[1:])
