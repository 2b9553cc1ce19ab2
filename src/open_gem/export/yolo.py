"""YOLO: a text file an image, a line a polygon or box."""

from collections.abc import Iterator, Sequence

import yaml

from open_gem.export.labelled import Labelled, Object
from open_gem.export.output import Output
from open_gem.export.polygons import polygons
from open_gem.types import Size


def write_yolo(found: Labelled, output: Output) -> None:
    """`labels/<image>.txt` and `data.yaml`; pictures belong into `images/` beside them, under the same names.

    A line is the class and the corners of a polygon as shares of width and height, one line a connected part; an object
    without a mask, or too thin for a polygon, is a line with its box (centre, width, height). An image without objects
    has an empty file.
    """
    data = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(found.labels))}
    (output.folder / "data.yaml").write_text(yaml.safe_dump(data, allow_unicode=True, sort_keys=False), "utf-8")
    for image in found:
        path = output.place("labels", image.id, ".txt")
        if path is not None:
            lines = [line for one in image.objects for line in _lines(one, image.size)]
            path.write_text("".join(lines), "utf-8")


def _lines(one: Object, size: Size) -> Iterator[str]:
    mask = one.mask()
    shapes = [] if mask is None else polygons(mask)
    for corners in shapes:
        yield _line(one.label, (corners / [size.width, size.height]).ravel().tolist())
    if not shapes:
        left, top, width, height = one.xywh
        centre = [(left + width / 2) / size.width, (top + height / 2) / size.height]
        yield _line(one.label, [*centre, width / size.width, height / size.height])


def _line(label: int, shares: Sequence[float]) -> str:
    return " ".join([str(label), *(f"{share:.6f}" for share in shares)]) + "\n"
