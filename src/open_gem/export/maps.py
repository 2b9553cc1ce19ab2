"""Label maps as PNG: semantic segmentation and Pascal VOC's two folders of them."""

from collections.abc import Sequence

import numpy as np

from open_gem.errors import InputError
from open_gem.export.labelled import Labelled, LabelledImage
from open_gem.export.output import OF_A_LINE, Output, name_lists, save_map
from open_gem.images.colors import voc_color

MOST, VOID = 254, 255  # values of an 8-bit map beside 0, the background, and the one that does not count


def write_semantic(labelled: Labelled, output: Output) -> None:
    """Write one PNG an image, 0 background and otherwise 1 + the label's position, and `labels.txt`, background first.

    The label of a pixel is that of `pixels`. Up to 254 labels 8 bits in Pascal VOC's colours, beyond them 16 bits.
    Each set is a list of names, `sets/train.txt`.
    """
    write_labels(output, labelled.labels)
    colors = colors_of_labels() if len(labelled.labels) <= MOST else None
    with name_lists(output.folder / "sets", output.split.shares) as lists:
        for image in labelled.each("labelmap"):
            path = output.place("maps", image, ".png", odd=OF_A_LINE)
            if path is not None:
                save_map(path, pixels(image)[0], colors)
                if lists:
                    lists[output.split.of(image.id)](path.relative_to(output.folder / "maps"))


def write_labels(output: Output, labels: Sequence[str]) -> None:
    """Write `labels.txt`: the label of a value in the line of that number, counted from 0."""
    lines = ["background", *(" ".join(label.splitlines()) for label in labels)]
    (output.folder / "labels.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def pixels(image: LabelledImage) -> tuple[np.ndarray, np.ndarray]:
    """Return which label and which object has each pixel: two maps `(y, x)` that agree, 0 for none.

    labels   otherwise 1 + the label's position: from the map that labelling wrote; if it wrote none, or objects are
             left out by their scores, from the object
    objects  otherwise 1 + the object's index: of those that have the pixel in their mask and this label, the one of the
             highest confidence
    """
    labels, objects = image.labelmap(), np.zeros(image.size, np.int32)
    for index, obj in reversed(list(enumerate(image.objects, start=1))):
        if (mask := obj.mask) is not None:
            objects[mask if labels is None else mask & (labels == obj.index + 1)] = index
    if labels is None:
        labels = np.array([0, *(obj.index + 1 for obj in image.objects)])[objects]
    return labels, objects


def colors_of_labels() -> bytes:
    """Return Pascal VOC's 256 colours."""
    return bytes(channel for index in range(-1, 255) for channel in voc_color(index))


def check_labels(labelled: Labelled) -> None:
    """Raise InputError if there are more labels than an 8-bit map holds."""
    if len(labelled.labels) > MOST:
        raise InputError(
            f"Pascal VOC's maps hold {MOST} labels, got {len(labelled.labels)}: choose some with --labels, "
            "or use semantic or panoptic"
        )
