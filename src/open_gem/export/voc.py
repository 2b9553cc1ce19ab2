"""Pascal VOC: boxes as XML, both kinds of segmentation as palette PNG."""

import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.maps import MOST, VOID, check_labels, colors_of_labels, pixels, write_labels
from open_gem.export.output import OF_A_LINE, Output, name_lists, path_of, save_map, xml_text
from open_gem.images.colors import voc_color

DEVKIT = "VOCdevkit/VOC2012"
FILES = {
    "Annotations": ".xml",
    "SegmentationClass": ".png",
    "SegmentationObject": ".png",
}  # folder → ending of each image's file


def write_voc(labelled: Labelled, output: Output) -> None:
    """Write `VOCdevkit/VOC2012`, which readers expect: Annotations, SegmentationClass, SegmentationObject, ImageSets,
    whose one set is `trainval` unless images are split; `labelmap.txt`, the colours of labels, which datumaro and CVAT
    need; and `labels.txt`, whose lines are the values of SegmentationClass. Images, if they are linked, are
    `JPEGImages/<image>.jpg`, the name that readers make up, whatever their format.

    Both maps are those of `maps.pixels`: an object has its own label in all its pixels. An image with a label map but
    without masks has no SegmentationObject. With more objects than it has values, pixels of the rest are 255 there,
    which is ignored, and `output.note` is called. Boxes are 1-based and inclusive, as the devkit has them.
    """
    check_labels(labelled)
    labels = names_of(labelled.labels)
    write_labels(output, labels)
    colors = colors_of_labels()
    devkit = output.folder / DEVKIT
    sets = {name: name or "trainval" for name in output.split.names}
    with name_lists(devkit / "ImageSets" / "Main", sets.values()) as lists:
        for image in labelled.each("labelmap"):
            kinds = [(f"{DEVKIT}/{kind}", ending) for kind, ending in FILES.items()]
            paths = output.places(image, *kinds, odd=OF_A_LINE, images=f"{DEVKIT}/JPEGImages", ending=".jpg")
            if paths is None:
                continue
            linked = [path.relative_to(devkit / "JPEGImages") for path in paths[len(kinds) :]]
            _write_xml(paths[0], image, labels, PurePosixPath(*linked or [path_of(image.id)]))
            if len(image.objects) > MOST:
                output.note(
                    image.id, f"has {len(image.objects)} objects, of which SegmentationObject holds the {MOST} best"
                )
            classes, objects = pixels(image)
            save_map(paths[1], classes, colors)
            if objects.any() or not classes.any():
                save_map(paths[2], np.where(objects <= MOST, objects, VOID), colors)
            lists[sets[output.split.of(image.id)]](paths[0].relative_to(devkit / "Annotations"))
    shutil.copytree(devkit / "ImageSets" / "Main", devkit / "ImageSets" / "Segmentation")
    (devkit / "labelmap.txt").write_text("".join(_label_lines(labels)), "utf-8")


def names_of(labels: Sequence[str]) -> list[str]:
    """Return the names of labels in all files of the format: each fits a line of `labelmap.txt`, in which a colon
    separates fields and # begins a comment, and differs from all others and from the background. Warns of changed
    names."""
    names = ["background"]
    for number, label in enumerate(labels, start=1):
        name = re.sub(r"[:\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff]|^#", "_", label.strip())
        while name in names:
            name = f"{name}-{number}"
        names.append(name)
    if changed := [f"{label!r} {name!r}" for label, name in zip(labels, names[1:], strict=True) if label != name]:
        warnings.warn(f"Pascal VOC's files call {', '.join(changed[:3])}{' …' if changed[3:] else ''}", stacklevel=2)
    return names[1:]


def _label_lines(labels: Sequence[str]) -> Iterator[str]:
    yield "# label:color_rgb:parts:actions\n"
    for index, name in enumerate(["background", *labels], start=-1):
        yield f"{name}:{','.join(map(str, voc_color(index)))}::\n"


def _write_xml(path: Path, image: LabelledImage, labels: Sequence[str], file: PurePosixPath) -> None:
    root = _element(
        "annotation",
        folder=str(file.parent),
        filename=file.name,
        source={"database": "open_gem", "image": image.source},
        size={"width": image.size.width, "height": image.size.height, "depth": 3},
        segmented=1,
    )
    root.extend(_object(obj, image, labels[obj.index]) for obj in image.objects)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8")


def _object(obj: Object, image: LabelledImage, name: str) -> ElementTree.Element:
    left, top, right, bottom = obj.box
    at_edge = left == 0 or top == 0 or right == image.size.width or bottom == image.size.height
    return _element(
        "object",
        name=name,
        pose="Unspecified",
        truncated=int(at_edge),
        difficult=0,
        score=obj.confidence,
        bndbox={"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom},
    )


def _element(tag: str, **children: Any) -> ElementTree.Element:
    element = ElementTree.Element(tag)
    for name, value in children.items():
        child = _element(name, **value) if isinstance(value, dict) else ElementTree.Element(name)
        if not isinstance(value, dict):
            child.text = xml_text(str(value))
        element.append(child)
    return element
