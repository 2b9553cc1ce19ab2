"""Query by example on held-out scenes: find the concept of a box in other scenes, beside its name as a text.

python benchmarks/exemplars.py
"""

import numpy as np

import open_gem
from open_gem import Exemplar
from open_gem.data.scenes import HELD_OUT, Scene, scene

SCENES, SIDE, ABSENT, SHOWN = 60, 128, 2, 4  # scenes; pixels; scenes asked without and with the concept, at most
METHODS = ("gem", "clip_surgery", "csa")


def asked(scenes: list[Scene], index: int, name: str, random: np.random.Generator) -> list[int]:
    """Return other scenes that are asked: with the concept and without."""
    shown = [other for other, drawn in enumerate(scenes) if name in drawn.names and other != index]
    absent = [other for other, drawn in enumerate(scenes) if name not in drawn.names]
    return [*shown[:SHOWN], *random.choice(absent, ABSENT, replace=False).tolist()]


def main() -> None:
    scenes = [scene(HELD_OUT + seed, SIDE) for seed in range(SCENES)]
    localizer = open_gem.load("embedded", device="cpu").acknowledge()
    encoded = localizer.encode([drawn.image for drawn in scenes], METHODS)
    for method in METHODS:
        random, counts = np.random.default_rng(0), {}
        for index, drawn in enumerate(scenes):
            for name, box in zip(drawn.names, drawn.boxes.tolist(), strict=True):
                left, top, right, bottom = box
                prompts = {
                    "text": name,
                    "box": Exemplar(encoded[index][method], box),
                    "cut out": Exemplar(drawn.image[top:bottom, left:right]),
                }
                for other in asked(scenes, index, name, random):
                    result = localizer.locate(encoded[other][method], prompts)
                    for label, present in zip(prompts, result.present(), strict=True):
                        count = counts.setdefault(label, {"shown": [], "absent": [], "point": [], "iou": []})
                        if name not in scenes[other].names:
                            count["absent"].append(present)
                            continue
                        mask = scenes[other].masks[scenes[other].names.index(name)]
                        x, y = result[label].points()[0].tolist()
                        located = result[label].masks()[0].numpy()
                        count["shown"].append(present)
                        count["point"].append(mask[y, x])
                        count["iou"].append((mask & located).sum() / (mask | located).sum())
        for label, count in counts.items():
            recall, false, point, iou = (100 * np.mean(count[key]) for key in ("shown", "absent", "point", "iou"))
            asks = f"{len(count['shown'])} + {len(count['absent'])} scenes"
            values = f"recall {recall:.1f}  false {false:.1f}  point {point:.1f}  mask IoU {iou:.1f}"
            print(f"{method:13} {label:8} {values}  ({asks})")


if __name__ == "__main__":
    main()
