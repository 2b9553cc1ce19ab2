"""What keeping costs and loses: bytes an image, and how masks and scores change, beside float16.

    python benchmarks/kept.py [--images 20]

The model in the package on scenes of 480 × 640 pixels at short:448, a grid of 28 × 37 patches.
"""

import argparse
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import torch

import open_gem
from open_gem.data.scenes import CONCEPTS, scene
from open_gem.label.kept import keep, restore
from open_gem.label.parts import encode_kept
from open_gem.localization import Localization
from open_gem.text import Vocabulary

PRESENCE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    images = [scene(seed, (480, 640)).image for seed in range(parser.parse_args().images)]
    localizer = open_gem.load("embedded", size="short:448", device="cpu").acknowledge()
    encoded = [localizer.encode(image) for image in images]

    few = Vocabulary.of(list(CONCEPTS[:12]))
    many = Vocabulary.of([" ".join(pair) for pair in product(CONCEPTS, CONCEPTS)][:1000])
    for name, vocabulary in (("12 labels", few), ("1000 labels", many)):
        with torch.no_grad():
            results = [localizer.locate(one, vocabulary) for one in encoded]
        for floor in (0.0, 0.1, 0.5):
            rows = [{"id": f"{number:08}.jpg", "kept": keep(one, floor)} for number, one in enumerate(results)]
            print(f"{name}, floor {floor}: {len(encode_kept(rows)) / len(rows):,.0f} bytes an image")
        if vocabulary is few:
            half = [replace(one, maps=one.similarity.half().float()) for one in results]
            compare("float16", results, half)
            compare("kept", results, [restore(keep(one, 0.0), few, one.size) for one in results])


def compare(name: str, results: list[Localization], others: list[Localization]) -> None:
    """Print how far values, objects and masks of others are from those of results."""
    worst, counts = 0.0, Counter[str]()
    for result, other in zip(results, others, strict=True):
        worst = max(worst, (result.similarity - other.similarity).abs().max().item())
        before, after = (one.objects(presence=PRESENCE) for one in (result, other))
        counts["images with other objects"] += [one.box for one in before] != [one.box for one in after]
        present = result.present(PRESENCE)
        for index in np.flatnonzero(present).tolist():
            masks = [one.masks()[index] for one in (result, other)]
            counts["pixels of masks"] += int(masks[0].sum())
            counts["changed"] += int((masks[0] ^ masks[1]).sum())
    print(f"{name}: largest difference of a cosine {worst:.1e}; {dict(counts)}")


if __name__ == "__main__":
    main()
