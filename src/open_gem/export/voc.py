"""Pascal VOC: boxes as XML, both kinds of segmentation as palette PNG."""

from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from open_gem.export.coco import segment_ids
from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.maps import MOST, VOID, check_labels, colors_of_labels, label_map
from open_gem.export.output import Output, path_of, save_map

DEVKIT = "VOCdevkit/VOC2012"


def write_voc(found: Labelled, output: Output) -> None:
    """`VOCdevkit/VOC2012`, where readers look, but for the pictures (JPEGImages): Annotations, SegmentationClass,
    SegmentationObject and ImageSets, whose one set is `trainval`; and `labels.txt`: its lines are the values of
    SegmentationClass.

    Boxes are 1-based and inclusive, as the devkit has them. Of more objects than SegmentationObject has values, pixels
    of the others are 255, which does not count, and `output.note` is told.
    """
    check_labels(found)
    (output.folder / "labels.txt").write_text("\n".join(["background", *found.labels, ""]), "utf-8")
    colors = colors_of_labels()
    sets = [output.folder / DEVKIT / "ImageSets" / kind / "trainval.txt" for kind in ("Main", "Segmentation")]
    for path in sets:
        path.parent.mkdir(parents=True)
    with sets[0].open("x", encoding="utf-8") as names:
        for image in found.each("labelmap"):
            path = output.place(f"{DEVKIT}/Annotations", image.id, ".xml")
            if path is None:
                continue
            _write_xml(path, image)
            if len(image.objects) > MOST:
                output.note(
                    image.id, f"has {len(image.objects)} objects, of which SegmentationObject holds the {MOST} best"
                )
            for kind, values in (("SegmentationClass", label_map(image)), ("SegmentationObject", _objects(image))):
                place = output.place(f"{DEVKIT}/{kind}", image.id, ".png")
                if place is not None:
                    save_map(place, values, colors)
            names.write(f"{path.relative_to(output.folder / DEVKIT / 'Annotations').with_suffix('')}\n")
    sets[1].write_bytes(sets[0].read_bytes())


def _objects(image: LabelledImage) -> np.ndarray:
    ids = segment_ids(image)
    return np.where(ids <= MOST, ids, VOID)


def _write_xml(path: Path, image: LabelledImage) -> None:
    picture = PurePosixPath(path_of(image.id))
    root = _element(
        "annotation",
        folder=str(picture.parent),
        filename=picture.name,
        source={"database": "open_gem", "image": image.source},
        size={"width": image.size.width, "height": image.size.height, "depth": 3},
        segmented=1,
    )
    root.extend(_object(one, image) for one in image.objects)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8")


def _object(one: Object, image: LabelledImage) -> ElementTree.Element:
    left, top, right, bottom = one.xyxy
    at_edge = left == 0 or top == 0 or right == image.size.width or bottom == image.size.height
    return _element(
        "object",
        name=one.name,
        pose="Unspecified",
        truncated=int(at_edge),
        difficult=0,
        score=one.score,
        bndbox={"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom},
    )


def _element(tag: str, **children: Any) -> ElementTree.Element:
    element = ElementTree.Element(tag)
    for name, value in children.items():
        child = _element(name, **value) if isinstance(value, dict) else ElementTree.Element(name)
        if not isinstance(value, dict):
            child.text = _printable(str(value))
        element.append(child)
    return element


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(letter if letter >= " " or letter in "\t\n\r" else "�" for letter in text)
