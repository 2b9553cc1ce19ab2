"""`scenes` as a data set of label maps, drawn on access."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from open_gem.data.base import IGNORE, LazySamples, Sample, Segmentation, Source, Survey
from open_gem.data.scenes import CONCEPTS, HELD_OUT, VALIDATION, Scene, scene

SCENE_SIZE = 256  # pixels a side
_FIRST = {"held-out": HELD_OUT, "validation": VALIDATION}
_COUNT = 500


@dataclass(frozen=True, eq=False)
class SceneSample(Sample):
    """A sample with its `scene`: the names, masks and boxes of its objects."""

    scene: Scene


class _Scenes(LazySamples):
    def __init__(self, seeds: range, size: int):
        self.seeds, self.size = seeds, size
        self.ids = tuple(f"scene-{seed}" for seed in seeds)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> SceneSample:  # pyright: ignore[reportIncompatibleMethodOverride] - no slices
        drawn = scene(self.seeds[index], self.size)
        labels = np.full(drawn.image.shape[:2], IGNORE, dtype=np.uint8)
        for name, mask in zip(drawn.names, drawn.masks, strict=True):
            labels[mask] = CONCEPTS.index(name)
        return SceneSample(self.ids[index], drawn.image, labels, drawn)


def scenes(seeds: range = range(HELD_OUT, HELD_OUT + _COUNT), size: int = SCENE_SIZE, split: str = "") -> Segmentation:
    """Return the scenes of `seeds` at `size` × `size` pixels, as `SceneSample`s: classes are `CONCEPTS`, background is
    IGNORE."""
    from open_gem.text import Vocabulary

    split = split or f"{seeds.start}-{seeds.stop}"
    return Segmentation("scenes", split, CONCEPTS, None, {"official": Vocabulary.of(CONCEPTS)}, _Scenes(seeds, size))


@dataclass(frozen=True, kw_only=True)
class SceneSource(Source):
    """Scenes drawn on access; no folder is needed."""

    def open(self, root: str | Path | None = None, split: str | None = None) -> Segmentation:
        """See `Source.open`; `root` is ignored."""
        split = self.split_of(split)
        return scenes(range(_FIRST[split], _FIRST[split] + _COUNT), split=split)

    def check(self, root: str | Path | None = None, split: str | None = None) -> Survey:
        """See `Source.check`."""
        return Survey(Path(), len(self.open(root, split)), _COUNT, (), ("drawn by seed, no file is read",))


SCENES = SceneSource(
    name="scenes",
    about="synthetic scenes with exact masks, drawn on access",
    page="no download",
    tree="nothing: scenes are drawn by seed",
    splits=dict.fromkeys(_FIRST, _COUNT),
    names=("official",),
)
