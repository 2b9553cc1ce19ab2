"""YOLO: a text file an image, a line a polygon or box."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
import yaml

from open_gem.errors import InputError
from open_gem.export.labelled import Labelled, Object
from open_gem.export.output import Output
from open_gem.export.polygons import polygons
from open_gem.types import Size

DIGITS = 6  # decimals of a share


def write_yolo(labelled: Labelled, output: Output) -> None:
    """Write `labels/<image>.txt` and `data.yaml`; images belong in `images/` next to them, under the same names. Sets
    are folders in both: `images/train`, `labels/train`. If an image itself lies in a folder `images`, its labels are in
    a folder `labels` next to that: see `labels_of`.

    A line is the class and the corners of a polygon as shares of width and height, one line a connected part; of an
    object too thin for a polygon those of its box, for readers take a box among polygons for a polygon. An object
    without a mask is a line with its box (centre, width, height). An image without objects has an empty file.
    `data.yaml` has no path: readers then look beside it, or in their working folder.

    Raises InputError for sets without train and val, which readers ask for.
    """
    sets = output.split.names
    if output.split.shares and not {"train", "val"} <= set(sets):
        raise InputError(f"YOLO's readers need the sets train and val, got {', '.join(sets)}: name them in --split")
    folders = {name: f"images/{name}".rstrip("/") for name in sets}
    places = folders if output.split.shares else {"train": "images", "val": "images"}
    data = {**places, "names": dict(enumerate(labelled.labels))}
    (output.folder / "data.yaml").write_text(yaml.safe_dump(data, allow_unicode=True, sort_keys=False), "utf-8")
    for folder in folders.values():
        (output.folder / folder).mkdir(parents=True)
    for image in labelled:
        folder = folders[output.split.of(image.id)]
        path = output.place(folder, image, ".txt", move=labels_of, images=folder)
        if path is not None:
            lines = [line for obj in image.objects for line in _lines(obj, image.size)]
            path.write_text("".join(lines), "utf-8")


def labels_of(file: PurePosixPath) -> PurePosixPath:
    """Return where readers look for the labels of an image: the last `images` among its folders becomes `labels`."""
    parts = list(file.parts)
    last = max(index for index, part in enumerate(parts[:-1]) if part == "images")
    return PurePosixPath(*parts[:last], "labels", *parts[last + 1 :])


def _lines(obj: Object, size: Size) -> Iterator[str]:
    left, top, width, height = obj.xywh
    right, bottom = left + width, top + height
    if (mask := obj.mask) is None:
        centre = [(left + width / 2) / size.width, (top + height / 2) / size.height]
        yield _line(obj.index, [*centre, width / size.width, height / size.height])
        return
    box = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    for corners in polygons(mask) or [box]:
        shares = corners / [size.width, size.height]
        yield _line(obj.index, (np.ceil(shares * 10**DIGITS) / 10**DIGITS).ravel().tolist())  # readers truncate


def _line(label: int, shares: Sequence[float]) -> str:
    return " ".join([str(label), *(f"{share:.{DIGITS}f}" for share in shares)]) + "\n"
