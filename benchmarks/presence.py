"""How sure to be that a label is in an image before looking for it: `python benchmarks/presence.py`."""

import numpy as np

import open_gem
from open_gem.data.scenes import CONCEPTS, scene

SCENES, SIDE = 60, 256

if __name__ == "__main__":
    localizer = open_gem.load(device="cpu")
    presence, there = [], []
    for seed in range(SCENES):
        picture = scene(seed, SIDE)
        found = localizer(picture.image, CONCEPTS)
        assert found.presence is not None
        presence.append(found.presence.numpy())
        there.append([concept in picture.names for concept in CONCEPTS])
    given, true = np.array(presence), np.array(there)
    print(f"{len(CONCEPTS)} concepts, {true.sum() / SCENES:.1f} in a scene")
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        told = given >= threshold
        precision, recall = (told & true).sum() / told.sum(), (told & true).sum() / true.sum()
        print(f"{threshold:.2f}: of what is reported {precision:.0%} is there, of what is there {recall:.0%} reported")
