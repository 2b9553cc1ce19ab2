"""What query by example and methods with gradients cost beside one plain forward pass: ViT-B/16, random weights.

python benchmarks/questions.py
"""

from statistics import median
from time import perf_counter

import numpy as np
import torch

from open_gem import Exemplar, Localizer
from open_gem.towers.loading import build

TURNS = 3


def main() -> None:
    localizer = Localizer(build("ViT-B-16"), size="square:448").acknowledge()
    image = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    prompts = [f"thing number {index}" for index in range(20)]
    pixels = localizer.prepare(image).pixels
    assert pixels is not None
    encoded = localizer.encode(image, ["gem", "gradcam", "clip-es", "legrad"])
    localizer.text(prompts)
    cases = {
        "plain": lambda: localizer.backbone.vision.library_forward(pixels[None]),
        "gem, encoded": lambda: localizer.encode(image, "gem"),
        "gem, 20 texts located": lambda: localizer.locate(encoded["gem"], prompts),
        "an exemplar, first use": lambda: localizer.locate(encoded["gem"], Exemplar(image, (40, 40, 200, 200))),
        "gradcam, encoded": lambda: localizer.encode(image, "gradcam"),
        "gradcam, 1 text located": lambda: localizer.locate(encoded["gradcam"], prompts[:1]),
        "gradcam, 20 texts located": lambda: localizer.locate(encoded["gradcam"], prompts),
        "clip-es, encoded": lambda: localizer.encode(image, "clip-es"),
        "clip-es, 20 texts located": lambda: localizer.locate(encoded["clip-es"], prompts),
        "legrad, encoded": lambda: localizer.encode(image, "legrad"),
        "legrad, 20 texts located": lambda: localizer.locate(encoded["legrad"], prompts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for turn in range(TURNS + 1):
            for name, case in cases.items():
                start = perf_counter()
                case()
                if turn:  # the first warms up
                    seconds[name].append(perf_counter() - start)
    plain = median(seconds["plain"])
    for name, times in seconds.items():
        print(f"| {name} | {1000 * median(times):.0f} | {median(times) / plain:.2f} |")


if __name__ == "__main__":
    main()
