"""LabelMe: a JSON file an image."""

from collections.abc import Iterator
from posixpath import isabs, relpath
from typing import Any

from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.output import Output, path_of
from open_gem.export.polygons import polygons
from open_gem.files import to_json


def write_labelme(labelled: Labelled, output: Output) -> None:
    """Write `<image>.json`, to be put next to the images, or with them: `imagePath` is relative to it.

    One polygon per connected component of an object, which share a group; a rectangle if it has no mask or is too thin
    for a polygon. The score and the prompt are in its description.
    """
    for image in labelled:
        paths = output.places(image, (".", ".json"), images=".")
        if paths is not None:
            path, *linked = paths
            beside = path.parent.relative_to(output.folder).as_posix()
            address = linked[0].name if linked else _address(path_of(image.id), beside)
            path.write_text(to_json(_document(image, address)), "utf-8")


def _address(path: str, folder: str) -> str:
    """Return the path of an image as a file in `folder` names it."""
    return path if isabs(path) else relpath(path, folder)


def _document(image: LabelledImage, address: str) -> dict[str, Any]:
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [shape for group, obj in enumerate(image.objects) for shape in _shapes(obj, group)],
        "imagePath": address,
        "imageData": None,
        "imageHeight": image.size.height,
        "imageWidth": image.size.width,
    }


def _shapes(obj: Object, group: int) -> Iterator[dict[str, Any]]:
    mask = obj.mask
    parts = [] if mask is None else polygons(mask)
    together = group if len(parts) > 1 else None
    for corners in parts:
        yield _shape(obj, "polygon", corners.astype(float).tolist(), together)
    if not parts:
        left, top, right, bottom = map(float, obj.box)
        yield _shape(obj, "rectangle", [[left, top], [right, bottom]], None)


def _shape(obj: Object, kind: str, points: list[list[float]], group: int | None) -> dict[str, Any]:
    return {
        "label": obj.label,
        "points": points,
        "group_id": group,
        "description": f"{obj.prompt}: {obj.score:.4f}",
        "shape_type": kind,
        "flags": {},
        "mask": None,
    }
