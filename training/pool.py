"""A pool of rendered training scenes on disk: images and which concepts they show, nothing about where."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from open_gem.data.scenes import CONCEPTS, scene

_CHUNK = 500  # scenes rendered by one task


class Pool(NamedTuple):
    """N scenes: `images` (N, 3, side, side) uint8 and `shown` (N, concepts) bool."""

    images: np.ndarray
    shown: np.ndarray


def render(first_seed: int, count: int, side: int) -> Pool:
    """The scenes of `count` consecutive seeds."""
    images = np.empty((count, 3, side, side), dtype=np.uint8)
    shown = np.zeros((count, len(CONCEPTS)), dtype=bool)
    for index in range(count):
        drawn = scene(first_seed + index, side)
        images[index] = drawn.image.transpose(2, 0, 1)
        shown[index, [CONCEPTS.index(name) for name in drawn.names]] = True
    return Pool(images, shown)


def pool_on_disk(folder: Path, first_seed: int, count: int, side: int) -> Pool:
    """The same scenes, rendered by all processors into `folder` unless they are there, memory-mapped."""
    images_path = folder / f"images-{first_seed}-{count}-{side}.npy"
    shown_path = folder / f"shown-{first_seed}-{count}-{side}.npy"
    if not shown_path.exists():  # written last: its presence says that the pool is complete
        shape = (count, 3, side, side)
        images = np.lib.format.open_memmap(images_path, mode="w+", dtype=np.uint8, shape=shape)
        shown = np.zeros((count, len(CONCEPTS)), dtype=bool)
        starts = range(0, count, _CHUNK)
        lengths = [min(_CHUNK, count - start) for start in starts]
        with ProcessPoolExecutor() as workers:
            chunks = workers.map(render, (first_seed + start for start in starts), lengths, [side] * len(starts))
            for start, chunk in zip(starts, chunks, strict=True):
                images[start : start + len(chunk.images)] = chunk.images
                shown[start : start + len(chunk.shown)] = chunk.shown
        images.flush()
        np.save(shown_path, shown)
    return Pool(np.load(images_path, mmap_mode="r"), np.load(shown_path))
