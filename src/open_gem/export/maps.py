"""Label maps as PNG: semantic segmentation and Pascal VOC's two folders of them."""

import numpy as np

from open_gem.errors import InputError
from open_gem.export.coco import segment_ids
from open_gem.export.labelled import Labelled, LabelledImage
from open_gem.export.output import Output, save_map
from open_gem.viz import palette

MOST, VOID = 254, 255  # values of an 8-bit map beside 0, the background, and the one that does not count


def write_semantic(found: Labelled, output: Output) -> None:
    """One PNG an image, 0 background and otherwise 1 + the label's position, and `labels.txt`, background first.

    The map that labelling wrote where it did; otherwise, and where objects are left out by their scores, the objects'
    masks, the highest score on top. Up to 254 labels 8 bits in Pascal VOC's colours, beyond them 16 bits.
    """
    (output.folder / "labels.txt").write_text("\n".join(["background", *found.labels, ""]), "utf-8")
    colors = colors_of_labels() if len(found.labels) <= MOST else None
    for image in found.each("labelmap"):
        path = output.place("maps", image.id, ".png")
        if path is not None:
            save_map(path, label_map(image), colors)


def label_map(image: LabelledImage) -> np.ndarray:
    """`(y, x)` int64: 0 background, otherwise 1 + the label's position."""
    stored = image.labelmap()
    if stored is not None:
        return stored
    return np.array([0, *(one.label + 1 for one in image.objects)])[segment_ids(image)]


def colors_of_labels() -> bytes:
    """Pascal VOC's 256 colours."""
    return bytes(channel for index in range(-1, 255) for channel in palette(index))


def check_labels(found: Labelled) -> None:
    """Raises InputError where an 8-bit map has no room for the labels."""
    if len(found.labels) > MOST:
        raise InputError(
            f"Pascal VOC's maps hold {MOST} labels, here are {len(found.labels)}: choose some with --labels, "
            "or use semantic or panoptic"
        )
