"""What hundreds and thousands of labels cost: texts encoded, read from disk, and the answers for one image.

    python benchmarks/vocabulary.py [turns] [labels ...]

ViT-B/16 with random weights, 448 pixels, float32; labels of one to three words. Memory is what each step adds to the
process at its peak. Encoding runs once, the rest `turns` times: medians.
"""

import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from open_gem.bench.memory import RESET_PEAK, resident
from open_gem.bench.subject import Setting, Subject
from open_gem.localizer import Localizer
from open_gem.text import TextCache
from open_gem.types import Size

SIZES = {"480 × 640": Size(480, 640), "2000 × 2000": Size(2000, 2000)}
WORDS = ("red", "old", "small", "wooden", "steel", "garden", "street", "table", "water", "bird", "dog", "ship", "lamp")


def names(count: int) -> list[str]:
    """Different labels of one to three words and a number."""
    choose = random.Random(0)
    return [" ".join([*choose.sample(WORDS, choose.randint(1, 2)), str(index)]) for index in range(count)]


def measured(work: Callable[[], object], turns: int) -> tuple[float, float]:
    """Return the median of seconds, and MiB above what is resident before."""
    seconds = []
    before = resident().rest
    RESET_PEAK.write_text("5")
    for _ in range(turns):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return median(seconds), resident().peak - before


def rows(localizer: Localizer, encoded: Any, labels: list[str], turns: int) -> dict[str, tuple[float, float]]:
    found = {
        "texts, encoded": measured(lambda: TextCache(localizer.backbone)(labels), 1),
        "texts, from disk": measured(lambda: TextCache(localizer.backbone)(labels), turns),
    }
    localizer.text(labels)
    result = localizer.locate(encoded, labels)
    found["similarities and presence"] = measured(lambda: localizer.locate(encoded, labels), turns)
    for name, size in SIZES.items():
        sized = replace(result, size=size)
        found[f"label map, {name}"] = measured(lambda sized=sized: replace(sized).segment(), turns)
        found[f"label map, present labels, {name}"] = measured(
            lambda sized=sized: replace(sized).segment(absent="presence"), turns
        )
    return found


def main() -> None:
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    counts = [int(count) for count in sys.argv[2:]] or [171, 1_000, 10_000]
    subject = Subject(Setting(model="ViT-B-16"))
    with torch.no_grad(), TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # an empty one
        encoded = subject.localizer.encode(subject.photographs[0])
        tables = {count: rows(subject.localizer, encoded, names(count), turns) for count in counts}
    print("| |" + "".join(f" {count:,} labels |" for count in counts))
    print("|---|" + "---|" * len(counts))
    for name in tables[counts[0]]:
        cells = (tables[count][name] for count in counts)
        print(f"| {name} |" + "".join(f" {1000 * seconds:.0f} ms, {mib:.0f} MiB |" for seconds, mib in cells))


if __name__ == "__main__":
    main()
