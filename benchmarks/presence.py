"""Precision and recall of presence thresholds on scenes: `python benchmarks/presence.py`."""

import numpy as np

import open_gem
from open_gem.data.scenes import CONCEPTS, scene

SCENES, SIDE = 60, 256

if __name__ == "__main__":
    localizer = open_gem.load("embedded", device="cpu")
    probabilities, present = [], []
    for seed in range(SCENES):
        drawn = scene(seed, SIDE)
        presence = localizer(drawn.image, CONCEPTS).presence
        assert presence is not None
        probabilities.append(presence.numpy())
        present.append([concept in drawn.names for concept in CONCEPTS])
    probability, true = np.array(probabilities), np.array(present)
    print(f"{len(CONCEPTS)} concepts, {true.sum() / SCENES:.1f} in a scene")
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        reported = probability >= threshold
        correct = (reported & true).sum()
        print(f"{threshold:.2f}: precision {correct / reported.sum():.0%}, recall {correct / true.sum():.0%}")
