"""`scenes` as a data set of label maps, drawn on access, and as files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_gem.checks import did_you_mean, is_count
from open_gem.data.base import IGNORE, LazySamples, Sample, Segmentation, Source, Survey
from open_gem.data.scenes import CONCEPTS, HELD_OUT, MIN_SIDE, VALIDATION, Scene, scene
from open_gem.errors import InputError
from open_gem.files import to_json, whole_folder
from open_gem.rle import run_lengths
from open_gem.types import Size

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


def write_scenes(folder: Path, images: int, size: int = SCENE_SIZE, showing: Sequence[str] = ()) -> None:
    """Write the first held-out scenes as `folder/images/SEED.jpg`, `size` × `size` pixels, and their objects in COCO's
    format as `folder/truth.json`.

    showing  only scenes that show one of these concepts; all if there are none

    Raises InputError for an unknown concept, an impossible size or count, or a folder that exists, and OutputError.
    """
    for concept in showing:
        if concept not in CONCEPTS:
            raise InputError(f"no scene shows {concept!r}{did_you_mean(concept, CONCEPTS)}, see open_gem.data.CONCEPTS")
    if not is_count(images):
        raise InputError(f"images is {images!r}, expected 1 or more")
    if folder.exists():
        raise InputError(f"{str(folder)!r} exists already: remove it, or choose another folder")
    categories = [{"id": number, "name": concept} for number, concept in enumerate(CONCEPTS, start=1)]
    truth: dict[str, list[Any]] = {"images": [], "categories": categories, "annotations": []}
    with whole_folder(folder) as place:
        (place / "images").mkdir()
        for seed in islice(_seeds(showing), images):
            drawn, name = scene(seed, size), f"{seed}.jpg"
            Image.fromarray(drawn.image).save(place / "images" / name, quality=95)
            truth["images"].append({"id": seed, "file_name": name, "height": size, "width": size})
            truth["annotations"] += [
                {"id": len(truth["annotations"]) + number, "image_id": seed, **true}
                for number, true in enumerate(_instances(drawn), start=1)
            ]
        (place / "truth.json").write_text(to_json(truth), "utf-8")


def _seeds(showing: Sequence[str]) -> Iterator[int]:
    """Yield the seeds of held-out scenes, of those that show one of these concepts. A scene is the same at all sizes,
    and fastest at the smallest."""
    return (seed for seed in count(HELD_OUT) if not showing or set(showing) & set(scene(seed, MIN_SIDE).names))


def _instances(drawn: Scene) -> Iterator[dict[str, Any]]:
    """Yield the objects of a scene in COCO's format, without ids."""
    size, every = Size(*drawn.image.shape[:2]), slice(None)
    for name, mask, (left, top, right, bottom) in zip(drawn.names, drawn.masks, drawn.boxes.tolist(), strict=True):
        yield {
            "category_id": CONCEPTS.index(name) + 1,
            "bbox": [left, top, right - left, bottom - top],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": run_lengths(mask, (every, slice(0, size.width)), size),
        }


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
