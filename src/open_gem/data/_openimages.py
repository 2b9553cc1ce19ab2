"""OpenImages V7's point labels: CSV files as published, and pictures `{ImageID}.jpg` in a folder of any depth.

The points' columns are ImageId, X, Y, Label, EstimatedYesNo, Source, YesVotes, NoVotes, UnsureVotes, TextLabel; X and Y
are shares of width and height. A point's class is its Label, called as in the class descriptions (LabelName,
DisplayName, with or without that header), else its TextLabel. Points that people were unsure of do not count.
"""

import csv
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from open_gem.data._base import Points, Source, Survey, some
from open_gem.errors import DatasetError

COLUMNS = ("ImageId", "X", "Y", "Label", "EstimatedYesNo", "TextLabel")  # those that are read
DESCRIPTIONS = "oidv7-class-descriptions.csv"
CHUNK = 65_536  # rows that are Python objects at any one time
_ANSWERS = {"yes": True, "no": False, "unsure": None}


@dataclass(frozen=True, kw_only=True)
class PointSource(Source):
    """Point labels; `own`: what pictures' folders of a split may be called."""

    own: Mapping[str, tuple[str, ...]]

    def open(self, root: str | Path | None = None, split: str | None = None) -> Points:
        """See `Source.open`; warns where pictures are missing, whose points are left out."""
        data = self._read(self.folder(root), self.split_of(split))
        if not data.ids:
            raise self.error(f"none of {len(data.missing)} pictures is there, e.g. {some(data.missing)}")
        if data.missing:
            warnings.warn(
                f"{self.name}: {len(data.missing)} of {len(data.missing) + len(data)} pictures are missing and left "
                f"out: {some(data.missing)}",
                stacklevel=2,
            )
        return data

    def check(self, root: str | Path | None = None, split: str | None = None) -> Survey:
        """See `Source.check`."""
        folder, split = self.folder(root), self.split_of(split)
        data = self._read(folder, split)
        notes = [f"{len(data.label)} points of {len(data.names)} classes in the pictures that are there"]
        notes += [f"{count} points left out: {why}" for why, count in data.dropped.items()]
        missing = tuple(f"{one}.jpg" for one in data.missing)
        return Survey(folder, len(data) + len(missing), self.splits[split], missing, tuple(notes))

    def _read(self, root: Path, split: str) -> Points:
        points = self._file(root, f"oidv7-{split}-annotations-point-labels.csv")
        names = read_descriptions(self._file(root, DESCRIPTIONS))
        folders = [root / place for own in self.own[split] for place in (own, f"images/{own}")]
        pictures = next((one for one in (*folders, root / "images", root) if one.is_dir()), root)
        return read_points(points, names, find_pictures(pictures), self.name, split)

    def _file(self, root: Path, name: str) -> Path:
        folders = ("", "annotations", "labels", "metadata", "csv")
        found = next((path for folder in folders if (path := root / folder / name).is_file()), None)
        if found is None:
            raise self.error(f"no {name!r} in {str(root)!r} or its {', '.join(folders[1:])}")
        return found


OPEN_IMAGES = PointSource(
    name="openimages",
    about="OpenImages V7, points that people answered yes or no for",
    page="https://storage.googleapis.com/openimages/web/download_v7.html",
    tree=f"""\
openimages/
    oidv7-val-annotations-point-labels.csv          (or in annotations/, labels/, metadata/, csv/)
    {DESCRIPTIONS}
    validation/0001eeaf4aed83f9.jpg                 (or images/validation/, images/, or any folders below those)""",
    splits={"val": 36702, "test": None, "train": None},  # as the paper says; the split has 41,620 pictures in all
    own={"val": ("validation", "val"), "test": ("test",), "train": ("train",)},
)


def find_pictures(folder: Path) -> dict[str, Path]:
    """All .jpg below `folder`: name without ending -> path."""
    return {
        name[:-4]: Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name[-4:].lower() == ".jpg"
    }


def read_descriptions(path: Path) -> dict[str, str]:
    """Class descriptions: LabelName -> DisplayName. A first row that is no name ("/m/…") is a header.

    Raises DatasetError, with the line, for a row without two columns or a name.
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


@dataclass
class _Columns:
    """What has been read, one entry a point."""

    image: list[np.ndarray] = field(default_factory=list)
    label: list[np.ndarray] = field(default_factory=list)
    xy: list[np.ndarray] = field(default_factory=list)
    yes: list[np.ndarray] = field(default_factory=list)


def read_points(path: Path, names: Mapping[str, str], pictures: Mapping[str, Path], name: str, split: str) -> Points:
    """The points of a CSV file as published, `names` of classes as in their descriptions.

    Rows are read a chunk at a time and kept as arrays; those of pictures that are missing are not kept. Pictures come
    in the order in which the file first names them, points in the file's order.

    Raises DatasetError, with the line, for rows that are not as published.
    """
    images: dict[str, int] = {}  # of pictures that are there
    missing: dict[str, None] = {}
    classes: dict[str, int] = {}  # label -> class
    called: list[str] = []
    dropped: Counter[str] = Counter()
    kept = _Columns()
    with _reading(path) as file:
        reader = csv.reader(file)
        header = [one.strip().lower() for one in next(reader, [])]
        if absent := [one for one in COLUMNS if one.lower() not in header]:
            raise DatasetError(
                f"{str(path)!r} has no column {absent[0]} in its first line, expected {','.join(COLUMNS)}"
            )
        pick = itemgetter(*(header.index(one.lower()) for one in COLUMNS))

        def broken(row: list[str], expected: str) -> DatasetError:
            return DatasetError(f"line {reader.line_num} of {str(path)!r} is {row!r}, expected {expected}")

        def parsed() -> Iterator[tuple[int, int, float, float, bool]]:
            for row in reader:
                if not row:
                    continue
                try:
                    image, x, y, label, answer, text = pick(row)
                    yes = _ANSWERS[answer.lower()]
                    place = float(x), float(y)
                except IndexError as error:
                    raise broken(row, f"{len(header)} columns") from error
                except KeyError as error:
                    raise broken(row, "EstimatedYesNo to be yes, no or unsure") from error
                except ValueError as error:
                    raise broken(row, "X and Y to be numbers") from error
                if not (0 <= place[0] <= 1 and 0 <= place[1] <= 1):
                    raise broken(row, "X and Y in 0 to 1")
                if yes is None:
                    dropped["people were unsure"] += 1
                    continue
                known = names.get(label)
                if known is None and not (known := text.strip()):
                    dropped["their class has no name"] += 1
                    continue
                if image not in pictures:
                    missing[image] = None
                    dropped["their picture is missing"] += 1
                    continue
                key = label if label in names else f" {known}"  # a free text is a class of its own
                if key not in classes:
                    classes[key] = len(called)
                    called.append(known)
                yield images.setdefault(image, len(images)), classes[key], *place, yes

        rows = parsed()
        while chunk := list(islice(rows, CHUNK)):
            image, label, x, y, yes = zip(*chunk, strict=True)
            kept.image.append(np.array(image, dtype=np.int32))
            kept.label.append(np.array(label, dtype=np.int32))
            kept.xy.append(np.stack([np.array(x), np.array(y)], axis=1))
            kept.yes.append(np.array(yes))
    if not images and not missing:
        raise DatasetError(f"{str(path)!r} holds no points, expected rows of {','.join(COLUMNS)}")
    image = _joined(kept.image, np.zeros(0, np.int32))
    order = np.argsort(image, kind="stable")
    return Points(
        name=name,
        split=split,
        names=tuple(called),
        ids=tuple(images),
        images=tuple(pictures[one] for one in images),
        starts=np.searchsorted(image[order], np.arange(len(images) + 1)),
        xy=_joined(kept.xy, np.zeros((0, 2)))[order],
        label=_joined(kept.label, np.zeros(0, np.int32))[order],
        yes=_joined(kept.yes, np.zeros(0, bool))[order],
        missing=tuple(missing),
        dropped=dict(dropped),
    )


def _joined(parts: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    """The parts behind each other; they are gone then, so that not all columns are there twice at once."""
    whole = np.concatenate([empty, *parts])
    parts.clear()
    return whole


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"cannot read {str(path)!r}: {reason}") from error
