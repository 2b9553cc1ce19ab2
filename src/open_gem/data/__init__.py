"""Images with annotations: readers of the usual data sets, and synthetic scenes that need no download.

    >>> data = open_dataset("voc2012", "VOCdevkit", "val")
    >>> for sample in data: sample.read_image(), sample.labels()

`DATASETS` lists the data sets; `find_dataset("voc2012").tree` describes the expected files.
"""

from os import PathLike
from pathlib import Path

from open_gem.checks import did_you_mean
from open_gem.data.base import IGNORE, LabelFile, Points, PointSample, Sample, Segmentation, Source, Survey
from open_gem.data.context import ContextImage, read_context
from open_gem.data.maps import MAP_SOURCES, MapSource
from open_gem.data.openimages import OPEN_IMAGES
from open_gem.data.scene_source import SCENES, SceneSample, scenes, write_scenes
from open_gem.data.scenes import CONCEPTS, Scene, scene
from open_gem.errors import DatasetError

__all__ = [
    "ALIASES",
    "CONCEPTS",
    "DATASETS",
    "IGNORE",
    "ContextImage",
    "LabelFile",
    "MapSource",
    "PointSample",
    "Points",
    "Sample",
    "Scene",
    "SceneSample",
    "Segmentation",
    "Source",
    "Survey",
    "find_dataset",
    "open_dataset",
    "read_context",
    "scene",
    "scenes",
    "write_scenes",
]

DATASETS: dict[str, Source] = {source.name: source for source in (*MAP_SOURCES, OPEN_IMAGES, SCENES)}
"""All data sets that can be read, by name."""

ALIASES = {
    "voc21": "voc2012",
    "voc20": "voc2012-20",
    "context": "context59",
    "ade": "ade20k",
    "openimages-v7": "openimages",
}
"""Other common names → those of `DATASETS`."""


def find_dataset(name: str) -> Source:
    """Return the row of `DATASETS` with this name or alias; case does not count, and _ equals -. Raises
    DatasetError."""
    plain = name.strip().lower().replace("_", "-")
    if (source := DATASETS.get(ALIASES.get(plain, plain))) is not None:
        return source
    hint = did_you_mean(plain, [*DATASETS, *ALIASES])
    raise DatasetError(f"unknown data set {name!r}, expected one of {', '.join(DATASETS)}{hint}")


def open_dataset(name: str, root: str | PathLike[str] | None = None, split: str | None = None) -> Segmentation | Points:
    """Open the data set `name` below the folder `root` (scenes need none); `split` None: its default split.

    Raises DatasetError for an unknown name or split, and for missing files: it says which and where.
    """
    return find_dataset(name).open(None if root is None else Path(root), split)
