"""FiftyOne: a data set to look at, with objects, points and heatmaps. Owns fiftyone, which only `to_fiftyone` needs."""

import io
import re
import zlib
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from open_gem.errors import InputError
from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.output import Output, json_arrays
from open_gem.files import to_json
from open_gem.types import Size


def write_fiftyone(labelled: Labelled, output: Output) -> None:
    """Write `samples.json` and `metadata.json`, which `Dataset.from_dir` reads as a FiftyOneDataset; images stay where
    they are. The set of an image is its tag. See `sample_of` for the contents; heatmaps need `to_fiftyone`."""
    info = {"description": "labelled by open_gem", "default_classes": labelled.labels}
    (output.folder / "metadata.json").write_text(to_json({"media_type": "image", "info": info}), "utf-8")
    with json_arrays(output.folder / "samples.json", info, "samples") as (samples,):
        for image in labelled:
            set_name = output.split.of(image.id)
            samples.add({**sample_of(image), "tags": [set_name] if set_name else []})


def to_fiftyone(labelled: Labelled, name: str | None = None, heatmaps: bool = False) -> Any:
    """Make a `fiftyone.Dataset` called `name`, filled a few images at a time; see `sample_of` for the contents.

    heatmaps  also cosines on the patch grid, where labelling has written similarities

    Raises InputError if FiftyOne is not installed.
    """
    fo = _fiftyone()
    dataset = fo.Dataset(name)
    dataset.default_classes = list(labelled.labels)
    dataset.add_samples(samples(labelled, heatmaps), num_samples=labelled.count()["ok"])
    return dataset


def samples(labelled: Labelled, heatmaps: bool = False) -> Iterator[Any]:
    """Yield a `fiftyone.Sample` for each image."""
    fo = _fiftyone()
    for image in labelled.each("similarity") if heatmaps else labelled:
        yield fo.Sample.from_dict(sample_of(image, labelled.labels if heatmaps else ()))


def sample_of(image: LabelledImage, heatmaps: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a sample as JSON can hold it: `objects` (Detections, their masks cut to the boxes), `points` (Keypoints)
    and, for the labels in `heatmaps`, `heatmap_<position>_<label>`: cosines -1 to 1 on the patch grid."""
    return {
        "filepath": image.source if "://" in image.source else str(Path(image.source).absolute()),
        "tags": [],
        "_media_type": "image",
        "open_gem_id": image.id,
        "objects": _label("Detections", detections=[_detection(obj, image.size) for obj in image.objects]),
        "points": _label("Keypoints", keypoints=[_keypoint(obj, image.size) for obj in image.objects if obj.point]),
        **(_heatmaps(image, heatmaps) if heatmaps else {}),
    }


def _fiftyone() -> Any:
    try:
        import fiftyone  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError('fiftyone is not installed: pip install "open_gem[fiftyone]"') from error
    return fiftyone


def _label(kind: str, **fields: Any) -> dict[str, Any]:
    return {"_cls": kind, **fields}


def _detection(obj: Object, size: Size) -> dict[str, Any]:
    left, top, right, bottom = obj.box
    height, width = size
    mask = obj.mask
    return _label(
        "Detection",
        tags=[],
        label=obj.label,
        bounding_box=[left / width, top / height, (right - left) / width, (bottom - top) / height],
        mask=None if mask is None else _packed(mask[top:bottom, left:right]),
        confidence=obj.confidence,
        prompt=obj.prompt,
        score=obj.score,
        presence=obj.presence,
    )


def _keypoint(obj: Object, size: Size) -> dict[str, Any]:
    assert obj.point is not None
    x, y = obj.point
    middle = [(x + 0.5) / size.width, (y + 0.5) / size.height]  # centre of the pixel
    return _label("Keypoint", tags=[], label=obj.label, points=[middle], confidence=[obj.confidence])


def _heatmaps(image: LabelledImage, labels: tuple[str, ...]) -> dict[str, Any]:
    maps = {}
    for label, cosines in image.similarity().items():
        field = f"heatmap_{labels.index(label)}_{re.sub('[^0-9A-Za-z]+', '_', label).lower()}".rstrip("_")
        maps[field] = _label("Heatmap", tags=[], map=_packed(cosines), range=[-1, 1])
    return maps


def _packed(values: np.ndarray) -> str:
    """Encode an array as FiftyOne does in JSON: NumPy's own format, zlib, base64."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return b64encode(zlib.compress(file.getvalue())).decode()
