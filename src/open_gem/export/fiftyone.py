"""FiftyOne: a data set to look at, with objects, points and heatmaps. Owns fiftyone."""

import re
from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from open_gem.errors import InputError
from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.output import save_map, stem_of
from open_gem.files import write_file

if TYPE_CHECKING:
    from fiftyone import Dataset, Sample  # pyright: ignore[reportMissingImports]


def to_fiftyone(found: Labelled, name: str | None = None, heatmaps: str | PathLike[str] | None = None) -> "Dataset":
    """A FiftyOne data set called `name`, filled a few images at a time: `samples` says what of each.

    heatmaps  folder for a PNG a label and image, where labelling has written similarities; None: without them

    Raises InputError where FiftyOne is not installed.
    """
    fo = _fiftyone()
    dataset = fo.Dataset(name)
    dataset.default_classes = list(found.labels)
    dataset.add_samples(samples(found, heatmaps), num_samples=found.count()["ok"])
    return dataset


def samples(found: Labelled, heatmaps: str | PathLike[str] | None = None) -> Iterator["Sample"]:
    """A sample an image: `objects` (Detections, their masks cut to the boxes), `points` (Keypoints) and, by label,
    `heatmap_<position>_<label>`: cosines -1 to 1 on the patch grid, as a 16-bit PNG in `heatmaps`."""
    fo = _fiftyone()
    for image in found.each("similarity") if heatmaps else found:
        objects = [_detection(one, image) for one in image.objects]
        points = [_keypoint(one, image) for one in image.objects if one.point]
        maps = _heatmaps(image, found.labels, Path(heatmaps)) if heatmaps else {}
        yield fo.Sample(
            filepath=image.source if "://" in image.source else str(Path(image.source).absolute()),
            open_gem_id=image.id,
            objects=fo.Detections(detections=objects),
            points=fo.Keypoints(keypoints=points),
            **maps,
        )


def _fiftyone() -> Any:
    try:
        import fiftyone  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError('fiftyone is not installed: pip install "open_gem[fiftyone]"') from error
    return fiftyone


def _detection(one: Object, image: LabelledImage) -> Any:
    left, top, right, bottom = one.xyxy
    height, width = image.size
    mask = one.mask()
    return _fiftyone().Detection(
        label=one.name,
        bounding_box=[left / width, top / height, (right - left) / width, (bottom - top) / height],
        mask=None if mask is None else mask[top:bottom, left:right],
        confidence=one.score,
        prompt=one.prompt,
        presence=one.presence,
    )


def _keypoint(one: Object, image: LabelledImage) -> Any:
    assert one.point is not None
    x, y = ((place + 0.5) / side for place, side in zip(one.point, (image.size.width, image.size.height), strict=True))
    return _fiftyone().Keypoint(label=one.name, points=[(x, y)], confidence=[one.score])


def _heatmaps(image: LabelledImage, labels: tuple[str, ...], folder: Path) -> dict[str, Any]:
    maps = {}
    for label, cosines in image.similarity().items():
        field = f"heatmap_{labels.index(label)}_{re.sub('[^0-9A-Za-z]+', '_', label).lower()}".rstrip("_")
        path = folder.absolute() / stem_of(image.id) / f"{field}.png"
        write_file(path, partial(save_map, labels=np.rint((cosines.astype(np.float32).clip(-1, 1) + 1) / 2 * 65535)))
        maps[field] = _fiftyone().Heatmap(map_path=str(path), range=[0, 65535])
    return maps
