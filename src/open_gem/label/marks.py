"""Marks: which detections a person found right or wrong, and the page on which they are marked.

    write_page(Path("marks.html"), Parts.open("labels"), 100)   # open it in a browser, mark, download marks.csv
    read_marks(Path("marks.csv"))

A line of `marks.csv` is a detection, `id,label,left,top,right,bottom`, and its mark, `right` or `wrong`. A detection is
known by its image, label and box, so marks stay valid for labels made again with another presence.
"""

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from open_gem.errors import ImageError, InputError
from open_gem.files import digest, to_json, write_file
from open_gem.images.pixels import read_image
from open_gem.label.done import key
from open_gem.label.parts import LabelRow, Parts, rows_in
from open_gem.label.reading import Item, read
from open_gem.label.sheet import Lowest, crop, draw, moved

COLUMNS = ("id", "label", "left", "top", "right", "bottom", "mark")
MARKS = {"right": True, "wrong": False}
PAGE, HOLE = "marks.html", "__DETECTIONS__"  # the template beside this module, and where its JSON goes
SIDE = 640  # pixels of the longer side of a crop


class Detection(NamedTuple):
    """What tells a detection from all others of a folder."""

    id: str
    label: str
    box: tuple[int, ...]

    @classmethod
    def of(cls, id: str, stored: Mapping[str, Any]) -> "Detection":
        """Return the detection that is a stored object of an image."""
        return cls(id, stored["label"], tuple(stored["xyxy"]))


# The file -------------------------------------------------------------------------------------------------------------


def read_marks(path: Path) -> dict[Detection, bool]:
    """Return whether each marked detection is right. Raises InputError, with the line, for a file without
    marks."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise InputError(f"{str(path)!r} has no column {missing[0]!r}, expected {', '.join(COLUMNS)}")
            marks = dict(_mark(line, f"{str(path)!r}, line {reader.line_num}") for line in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not CSV in UTF-8"
        raise InputError(f"cannot read marks from {str(path)!r}: {reason}") from error
    if not marks:
        raise InputError(f"{str(path)!r} has no mark, expected a line for each marked detection")
    return marks


def _mark(line: dict[str, Any], place: str) -> tuple[Detection, bool]:
    try:
        box = tuple(int(line[side]) for side in COLUMNS[2:6])
    except (TypeError, ValueError):
        raise InputError(f"{place} has no box, expected whole numbers left, top, right and bottom") from None
    if (mark := line["mark"]) not in MARKS:
        raise InputError(f"{place} has the mark {mark!r}, expected right or wrong")
    return Detection(line["id"], line["label"], box), MARKS[mark]


# The page -------------------------------------------------------------------------------------------------------------


def write_page(
    path: Path, parts: Parts, count: int, skip: Callable[[str, str], None] = lambda image_id, reason: None
) -> int:
    """Write a page on which about `count` detections are marked, crops of their images inside; return their
    number.

    They are random, the same every time, and as many of each label; labels with fewer leave their share to others.

    skip  called with the id of each image that cannot be read, and the reason

    Raises InputError if there is no detection, OutputError if the page or a part cannot be written or read.
    """
    chosen = choose(parts, count)
    rows = parts.find({detection.id: part for detection, part in chosen.items()}, "id", "source", "objects")
    shown = [entry for row in rows for entry in _entries(moved(row, parts.manifest.root), chosen, skip)]
    if not shown:
        raise InputError(f"no detection in {str(parts.folder)!r} can be shown, expected labels with objects and images")
    shown.sort(key=lambda entry: key(f"{entry['id']} {entry['box']} {entry['label']}"))  # labels and images mixed
    name = digest({"detections": [[entry["id"], entry["label"], entry["box"]] for entry in shown]})
    document = to_json({"name": name, "columns": COLUMNS, "detections": shown}).replace("<", "\\u003c")
    template = resources.files("open_gem.label").joinpath(PAGE).read_text("utf-8")
    write_file(path, template.replace(HOLE, document).encode())
    return len(shown)


def choose(parts: Parts, count: int) -> dict[Detection, Path]:
    """Return `count` random detections, or all if there are fewer, and the parts that hold them."""
    by_label = {label: Lowest(count) for label in parts.manifest.labels}
    for part in parts.paths():
        for id, stored in _stored(part):
            name = to_json([id, stored["label"], stored["xyxy"]])
            by_label[stored["label"]].add(key(name), name, part)
    queues = [iter(lowest.ids.items()) for lowest in by_label.values()]
    turns = (entry for turn in range(count) for queue in queues if (entry := next(queue, None)) is not None)
    return {_parsed(name): part for _, (name, part) in zip(range(count), turns, strict=False)}


def _parsed(name: str) -> Detection:
    id, label, box = json.loads(name)
    return Detection(id, label, tuple(box))


def _stored(part: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in rows_in(part, "id", "objects.list.element.label", "objects.list.element.xyxy"):
        yield from ((row["id"], stored) for stored in row["objects"] or ())


def _entries(
    row: LabelRow, chosen: Mapping[Detection, Path], skip: Callable[[str, str], None]
) -> Iterator[dict[str, Any]]:
    """Yield what the page shows of the chosen detections of an image."""
    try:
        image = read_image(read(Item(row["id"], row["source"])))
    except ImageError as error:
        skip(row["id"], str(error))
        return
    for stored in row["objects"]:
        if Detection.of(row["id"], stored) in chosen:
            shown = _data_uri(draw(*crop(image, stored), side=SIDE))
            yield {"id": row["id"], "label": stored["label"], "box": stored["xyxy"], "image": shown}


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
