"""Label Studio: tasks with predictions, and the labelling configuration that shows them. Owns label_studio_sdk."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np

from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.output import Output, json_array, xml_text
from open_gem.export.polygons import polygons
from open_gem.images.colors import voc_color

TAGS = {"box": "RectangleLabels", "polygon": "PolygonLabels", "brush": "BrushLabels"}  # names of controls -> their kind

Regions = Callable[
    [Object, LabelledImage], Iterator[tuple[str, dict[str, Any]]]
]  # the controls of an object and their values


def write_polygons(labelled: Labelled, output: Output) -> None:
    """Write `tasks.json`, to import, and `config.xml`, to paste into the project's settings.

    One polygon per connected component of an object; a box if it has no mask or is too thin for a polygon. Images with
    a URL keep it; the others are `/data/local-files/?d=<folder>/<id>`, which Label Studio serves when its
    LOCAL_FILES_DOCUMENT_ROOT is the folder above the one that was labelled, and that is a local storage of the project.
    The set of an image is `split` among the task's data.
    """
    _write(labelled, output, polygon_regions, ("box", "polygon"))


def write_brush(labelled: Labelled, output: Output) -> None:
    """Write as `write_polygons` does, with exact masks in Label Studio's own run-length encoding; a box if there is no
    mask."""
    _write(labelled, output, brush_regions, ("box", "brush"))


def _write(labelled: Labelled, output: Output, regions: Regions, controls: tuple[str, ...]) -> None:
    (output.folder / "config.xml").write_bytes(_config(labelled.labels, controls))
    version = f"open_gem {labelled.parts.manifest.fingerprint}"
    with json_array(output.folder / "tasks.json") as tasks:
        for image in labelled:
            result = [
                region(f"{number}.{part}", obj, image, control, value)
                for number, obj in enumerate(image.objects, start=1)
                for part, (control, value) in enumerate(regions(obj, image), start=1)
            ]
            prediction = {"model_version": version, "score": _score(image), "result": result}
            data = {"image": _address(image), "id": image.id}
            if set_name := output.split.of(image.id):
                data["split"] = set_name
            tasks.add({"data": data, "predictions": [prediction]})


def _config(labels: tuple[str, ...], controls: tuple[str, ...]) -> bytes:
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image", zoom="true")
    for control in controls:
        group = ElementTree.SubElement(view, TAGS[control], name=control, toName="image")
        for index, label in enumerate(labels):
            color = "#" + bytes(voc_color(index)).hex()
            ElementTree.SubElement(group, "Label", value=xml_text(label), background=color)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="utf-8")


def _score(image: LabelledImage) -> float:
    """Return the score of the image as a whole: the confidence of its best object."""
    return image.objects[0].confidence if image.objects else 0.0


def _address(image: LabelledImage) -> str:
    """Return the address at which Label Studio serves the image. It serves no file right in its document root, only
    files in folders there: the root is the folder above that of the ids, or / if ids are not paths in one folder."""
    if re.match(r"https?://", image.source, re.IGNORECASE):
        return quoted(image.source)
    if re.match(r"\w+://", image.source):  # a store, which Label Studio asks by the names themselves
        return image.source
    path = str(Path(image.source).absolute())
    folder = path.removesuffix(f"/{image.id}")
    place = path.lstrip("/") if folder == path else f"{Path(folder).name}/{image.id}"
    return f"/data/local-files/?d={quote(place)}"


def quoted(address: str) -> str:
    """Escape characters that addresses cannot have (spaces, accents); existing escapes stay."""
    host = host_of(address)
    path = quote(address.removeprefix(host), safe="%/:?#[]@!$&'()*+,;=")
    return host + re.sub("%(?![0-9A-Fa-f]{2})", "%25", path)


def host_of(address: str) -> str:
    """Return the scheme and host of an address; "" for a path."""
    match = re.match(r"\w+://[^/?#]*", address)
    return match[0] if match else ""


def region(
    id: str,
    obj: Object,
    image: LabelledImage,
    control: str,
    value: dict[str, Any],
    from_name: str | None = None,
    to_name: str = "image",
    is_labelled: bool = True,
) -> dict[str, Any]:
    """Return an object as a region: `control` is a key of `TAGS`, `value` a value that a member of `Regions` gives.
    `from_name` and `to_name` name the tags in the configuration; the defaults are those of the one that is written
    here. `is_labelled` False leaves the label to a person."""
    kind = TAGS[control].lower()
    return {
        "id": id,
        "type": kind,
        "from_name": control if from_name is None else from_name,
        "to_name": to_name,
        "original_width": image.size.width,
        "original_height": image.size.height,
        "image_rotation": 0,
        "score": obj.confidence,
        "value": {**value, kind: [xml_text(obj.label)] if is_labelled else []},  # as the configuration spells it
        "meta": {"text": [obj.prompt]},
    }


def polygon_regions(obj: Object, image: LabelledImage) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield one polygon per connected component of the mask; a box if there is no mask."""
    mask = obj.mask
    parts = [] if mask is None else polygons(mask)
    for corners in parts:
        yield "polygon", {"points": _percent(corners, image).tolist(), "closed": True}
    if not parts:
        yield box_region(obj, image)


def brush_regions(obj: Object, image: LabelledImage) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the exact mask; a box if there is none."""
    from label_studio_sdk.converter.brush import mask2rle  # pyright: ignore[reportMissingImports]

    mask = obj.mask
    if mask is None:
        yield box_region(obj, image)
    else:
        yield "brush", {"format": "rle", "rle": mask2rle(mask.astype(np.uint8) * 255)}


def box_region(obj: Object, image: LabelledImage) -> tuple[str, dict[str, Any]]:
    """Return an object's box as the kind and value of a region."""
    left, top, right, bottom = _percent(np.reshape(obj.box, (2, 2)), image).ravel().tolist()
    return "box", {"x": left, "y": top, "width": right - left, "height": bottom - top, "rotation": 0}


def _percent(points: np.ndarray, image: LabelledImage) -> np.ndarray:
    """Convert pixels `(n, 2)`, `xy`, to percent of the width and height."""
    return points * 100 / [image.size.width, image.size.height]
