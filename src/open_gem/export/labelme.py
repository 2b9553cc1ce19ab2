"""LabelMe: a JSON file an image."""

from collections.abc import Iterator
from posixpath import isabs, relpath
from typing import Any

from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.output import Output, path_of
from open_gem.export.polygons import polygons
from open_gem.files import to_json


def write_labelme(found: Labelled, output: Output) -> None:
    """`<image>.json`, to lie beside the pictures: `imagePath` is relative to it.

    An object is a polygon a connected part, which share a group; without a mask, or too thin for a polygon, it is a
    rectangle. The score and the prompt are in its description.
    """
    for image in found:
        path = output.place(".", image.id, ".json")
        if path is not None:
            beside = path.parent.relative_to(output.folder).as_posix()
            path.write_text(to_json(_document(image, beside)), "utf-8")


def _document(image: LabelledImage, folder: str) -> dict[str, Any]:
    picture = path_of(image.id)
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [shape for group, one in enumerate(image.objects) for shape in _shapes(one, group)],
        "imagePath": picture if isabs(picture) else relpath(picture, folder),
        "imageData": None,
        "imageHeight": image.size.height,
        "imageWidth": image.size.width,
    }


def _shapes(one: Object, group: int) -> Iterator[dict[str, Any]]:
    mask = one.mask()
    parts = [] if mask is None else polygons(mask)
    together = group if len(parts) > 1 else None
    for corners in parts:
        yield _shape(one, "polygon", corners.astype(float).tolist(), together)
    if not parts:
        left, top, right, bottom = map(float, one.xyxy)
        yield _shape(one, "rectangle", [[left, top], [right, bottom]], None)


def _shape(one: Object, kind: str, points: list[list[float]], group: int | None) -> dict[str, Any]:
    return {
        "label": one.name,
        "points": points,
        "group_id": group,
        "description": f"{one.prompt}: {one.score:.4f}",
        "shape_type": kind,
        "flags": {},
        "mask": None,
    }
