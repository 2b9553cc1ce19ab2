"""OpenImages V7's point labels: CSV files as published, and images `{ImageID}.jpg` in folders of any depth.

The points' columns are ImageId, X, Y, Label, EstimatedYesNo, Source, YesVotes, NoVotes, UnsureVotes, TextLabel; X and Y
are shares of width and height. A point's class is its Label, named as in the class descriptions (LabelName,
DisplayName, with or without that header), else its TextLabel. Points that people were unsure of are dropped.
"""

import csv
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from open_gem.data.base import Points, Source, Survey, first_few
from open_gem.errors import DatasetError

COLUMNS = ("ImageId", "X", "Y", "Label", "EstimatedYesNo", "TextLabel")  # columns that are read
DESCRIPTIONS = "oidv7-class-descriptions.csv"
CHUNK = 65_536  # rows that are held as Python objects at a time
POINT = np.dtype([("image", "i4"), ("label", "i4"), ("xy", "f8", 2), ("yes", "?")])
_ANSWERS = {"yes": True, "no": False, "unsure": None}


@dataclass(frozen=True, kw_only=True)
class PointSource(Source):
    """Point labels; `own`: split → names that its image folder may have."""

    own: Mapping[str, tuple[str, ...]]

    def open(self, root: str | Path | None = None, split: str | None = None) -> Points:
        """See `Source.open`; warns if images are missing, whose points are dropped."""
        data = self._read(self.folder(root), self.split_of(split))
        if not data.ids:
            raise self.error(f"none of {len(data.missing)} images exists, e.g. {first_few(data.missing)}")
        if data.missing:
            warnings.warn(
                f"{self.name}: {len(data.missing)} of {len(data.missing) + len(data)} images are missing, their points "
                f"are dropped: {first_few(data.missing)}",
                stacklevel=2,
            )
        return data

    def check(self, root: str | Path | None = None, split: str | None = None) -> Survey:
        """See `Source.check`."""
        folder, split = self.folder(root), self.split_of(split)
        data = self._read(folder, split)
        notes = [f"{len(data.label)} points of {len(data.names)} classes in the images that exist"]
        notes += [f"{count} points dropped: {why}" for why, count in data.dropped.items()]
        missing = tuple(f"{id}.jpg" for id in data.missing)
        return Survey(folder, len(data) + len(missing), self.splits[split], missing, tuple(notes))

    def _read(self, root: Path, split: str) -> Points:
        points = self._file(root, f"oidv7-{split}-annotations-point-labels.csv")
        names = read_descriptions(self._file(root, DESCRIPTIONS))
        folders = [root / path for own in self.own[split] for path in (own, f"images/{own}")]
        images = next((folder for folder in (*folders, root / "images", root) if folder.is_dir()), root)
        return read_points(points, names, find_images(images), self.name, split)

    def _file(self, root: Path, name: str) -> Path:
        folders = ("", "annotations", "labels", "metadata", "csv")
        file = next((path for folder in folders if (path := root / folder / name).is_file()), None)
        if file is None:
            raise self.error(f"no {name!r} in {str(root)!r} or its {', '.join(folders[1:])}")
        return file


OPEN_IMAGES = PointSource(
    name="openimages",
    about="OpenImages V7, points at which people said whether a class is present",
    page="https://storage.googleapis.com/openimages/web/download_v7.html",
    tree=f"""\
openimages/
    oidv7-val-annotations-point-labels.csv          (or in annotations/, labels/, metadata/, csv/)
    {DESCRIPTIONS}
    validation/0001eeaf4aed83f9.jpg                 (or images/validation/, images/, or any folders below those)""",
    splits={"val": 36702, "test": None, "train": None},  # as the paper says; the split has 41,620 images in all
    own={"val": ("validation", "val"), "test": ("test",), "train": ("train",)},
)


def find_images(folder: Path) -> dict[str, Path]:
    """Return all .jpg files below `folder`: name without ending → path."""
    return {
        name[:-4]: Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name[-4:].lower() == ".jpg"
    }


def read_descriptions(path: Path) -> dict[str, str]:
    """Read class descriptions: LabelName → DisplayName. A first row that does not start with "/" is a header.

    Raises DatasetError that names the line for a row without two columns or a name.
    """
    names: dict[str, str] = {}
    with _reading(path) as file:
        reader = csv.reader(file)
        for row in reader:
            if not row or (not names and not row[0].startswith("/")):
                continue
            if len(row) < 2 or not row[0].startswith("/") or not row[1].strip():
                raise DatasetError(
                    f"line {reader.line_num} of {str(path)!r} is {row!r}, expected LabelName,DisplayName"
                )
            names[row[0]] = row[1].strip()
    if not names:
        raise DatasetError(f"{str(path)!r} describes no class, expected rows such as /m/01g317,Person")
    return names


def read_points(path: Path, names: Mapping[str, str], files: Mapping[str, Path], name: str, split: str) -> Points:
    """Read the points of a CSV file as published, `names` of classes as in their descriptions.

    Rows are read a chunk at a time and kept as arrays; points of missing images are dropped. Images come in the order
    in which the file first names them, points in the file's order.

    Raises DatasetError that names the line for rows that are not as published.
    """
    images: dict[str, int] = {}  # images that exist
    missing: dict[str, None] = {}
    classes: dict[str, int] = {}  # label → class
    class_names: list[str] = []
    dropped: Counter[str] = Counter()
    chunks = [np.empty(0, POINT)]
    with _reading(path) as file:
        reader = csv.reader(file)
        header = [column.strip().lower() for column in next(reader, [])]
        if absent := [column for column in COLUMNS if column.lower() not in header]:
            raise DatasetError(
                f"{str(path)!r} has no column {absent[0]} in its first line, expected {','.join(COLUMNS)}"
            )
        pick = itemgetter(*(header.index(column.lower()) for column in COLUMNS))

        def broken(row: list[str], expected: str) -> DatasetError:
            return DatasetError(f"line {reader.line_num} of {str(path)!r} is {row!r}, expected {expected}")

        def parsed() -> Iterator[tuple[int, int, tuple[float, float], bool]]:
            for row in reader:
                if not row:
                    continue
                try:
                    image, x, y, label, answer, text = pick(row)
                    yes = _ANSWERS[answer.lower()]
                    point = float(x), float(y)
                except IndexError as error:
                    raise broken(row, f"{len(header)} columns") from error
                except KeyError as error:
                    raise broken(row, "EstimatedYesNo to be yes, no or unsure") from error
                except ValueError as error:
                    raise broken(row, "X and Y to be numbers") from error
                if not (0 <= point[0] <= 1 and 0 <= point[1] <= 1):
                    raise broken(row, "X and Y in 0 to 1")
                if yes is None:
                    dropped["people were unsure"] += 1
                    continue
                class_name = names.get(label)
                if class_name is None and not (class_name := text.strip()):
                    dropped["their class has no name"] += 1
                    continue
                if image not in files:
                    missing[image] = None
                    dropped["their image is missing"] += 1
                    continue
                key = label if label in names else f" {class_name}"  # a free text is a class of its own
                if key not in classes:
                    classes[key] = len(class_names)
                    class_names.append(class_name)
                yield images.setdefault(image, len(images)), classes[key], point, yes

        rows = parsed()
        while chunk := list(islice(rows, CHUNK)):
            chunks.append(np.array(chunk, POINT))
    if not images and not missing:
        raise DatasetError(f"{str(path)!r} holds no points, expected rows of {','.join(COLUMNS)}")
    points = np.concatenate(chunks)
    points = points[np.argsort(points["image"], kind="stable")]
    return Points(
        name=name,
        split=split,
        names=tuple(class_names),
        ids=tuple(images),
        images=tuple(files[image] for image in images),
        starts=np.searchsorted(points["image"], np.arange(len(images) + 1)),
        xy=points["xy"].copy(),
        label=points["label"].copy(),
        yes=points["yes"].copy(),  # copies have no gaps between values
        missing=tuple(missing),
        dropped=dict(dropped),
    )


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"cannot read {str(path)!r}: {reason}") from error
