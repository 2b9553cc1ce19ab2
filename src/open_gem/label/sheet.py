"""A page with samples of every label, to look at before trusting the labels: random ones, and the least confident."""

import base64
import heapq
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_gem.errors import ImageError
from open_gem.images.draw import overlay
from open_gem.images.pixels import read_image
from open_gem.label.done import key
from open_gem.label.parts import LabelRow, Parts, Place
from open_gem.label.reading import read
from open_gem.label.sources import Item
from open_gem.rle import mask_of

SIDE = 256  # pixels of a sample's longer side
MOST = 1200  # images on a page by chance: with many labels, each has fewer
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222 }
section { margin-bottom: 2rem } .row { display: flex; flex-wrap: wrap; gap: 8px }
figure { margin: 0; width: 240px } img { max-width: 100% } figcaption { overflow-wrap: anywhere; font-size: 12px }
"""


@dataclass
class Lowest:
    """The `count` entries with the lowest numbers of any stream."""

    count: int
    _heap: list[tuple[float, str, Any]] = field(default_factory=list)

    def add(self, number: float, id: str, entry: Any) -> None:
        if len(self._heap) < self.count:
            heapq.heappush(self._heap, (-number, id, entry))
        elif self.count and -number > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-number, id, entry))

    @property
    def entries(self) -> list[Any]:
        """Lowest first."""
        return [entry for _, _, entry in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))]


@dataclass(frozen=True)
class Sample:
    """One image to look at, and the objects of one label in it."""

    id: str
    source: str
    objects: Sequence[dict[str, Any]]


class Sheet:
    """Chooses rows as they come by, and makes a page of them.

    Of each label up to `count` random images (the same every time) and half as many with the lowest presence; then
    images without any object.
    """

    def __init__(self, labels: Sequence[str], count: int):
        count = min(count, max(1, MOST // len(labels)))
        self.chance = {label: Lowest(count) for label in labels}
        self.unsure = {label: Lowest(count // 2) for label in labels}
        self.empty = Lowest(count)

    def add(self, place: Place, row: LabelRow) -> None:
        """A row's id, status, and labels and presence of its objects."""
        if row["status"] != "ok":
            return
        number = key(row["id"])
        if not row["objects"]:
            self.empty.add(number, row["id"], place)
        presence: dict[str, float] = {}
        for stored in row["objects"]:
            presence[stored["label"]] = min(stored["presence"] or 0, presence.get(stored["label"], 1))
        for label, least in presence.items():
            self.chance[label].add(number, row["id"], place)
            self.unsure[label].add(least, row["id"], place)

    def write(self, parts: Parts) -> bytes:
        """A page of HTML with the images inside, read now; missing ones are named. Raises OutputError."""
        chosen = [*self.chance.values(), *self.unsure.values(), self.empty]
        places = {place for lowest in chosen for place in lowest.entries}
        rows = {place: _by_now(row, parts.manifest.root) for place, row in parts.at(places, "id", "source", "objects")}
        sections = [_section(label, *self._samples(label, rows)) for label in self.chance]
        sections.append(_part("Nothing found in these", [_sample(rows[place]) for place in self.empty.entries]))
        head = f"<!doctype html><meta charset='utf-8'><title>Labels</title><style>{STYLE}</style>\n<h1>Labels</h1>\n"
        return (head + "\n".join(sections) + "\n").encode()

    def _samples(self, label: str, rows: Mapping[Place, LabelRow]) -> Iterator[list[Sample]]:
        for lowest in (self.chance[label], self.unsure[label]):
            yield [_sample(rows[place], label) for place in lowest.entries]


def _by_now(row: LabelRow, root: str | None) -> LabelRow:
    """The row with its image where it is now: the folder may have been moved."""
    moved = Path(root or "", row["id"])
    return row if root is None or "://" in root or not moved.is_file() else {**row, "source": str(moved)}


def _sample(row: LabelRow, label: str | None = None) -> Sample:
    return Sample(row["id"], row["source"], [stored for stored in row["objects"] if stored["label"] == label])


def _section(label: str, chance: Sequence[Sample], unsure: Sequence[Sample]) -> str:
    if not chance:
        return f"<section><h2>{html.escape(label)}</h2><p>Found nowhere.</p></section>"
    parts = [_part("By chance", chance), _part("Least sure", unsure)]
    return f"<section><h2>{html.escape(label)}</h2>{''.join(parts)}</section>"


def _part(title: str, samples: Sequence[Sample]) -> str:
    figures = "".join(map(_figure, samples))
    return f"<h3>{title}</h3><div class='row'>{figures}</div>" if samples else ""


def _figure(sample: Sample) -> str:
    try:
        image = read_image(read(Item(sample.id, sample.source)))
    except ImageError as error:
        return f"<figure>{html.escape(str(error))}<figcaption>{html.escape(sample.id)}</figcaption></figure>"
    file = io.BytesIO()
    draw(image, sample.objects).save(file, format="JPEG", quality=80)
    shown = base64.b64encode(file.getvalue()).decode()
    scores = ", ".join(f"{stored['score']:.3f}" for stored in sample.objects[:4])
    sure = f" · present {sample.objects[0]['presence']:.2f} · {scores}" if sample.objects else ""
    caption = f"<figcaption>{html.escape(sample.id)}{sure}</figcaption>"
    return f"<figure><img src='data:image/jpeg;base64,{shown}' alt=''>{caption}</figure>"


def draw(image: Image.Image, objects: Iterable[dict[str, Any]]) -> Image.Image:
    """A small copy with the outlines and boxes of objects; the outline is the box if there is no mask."""
    size = (image.height, image.width)
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    covered = np.zeros((small.height, small.width), dtype=bool)
    boxes = []
    for stored in objects:
        mask = Image.fromarray(_mask(stored, size)).resize(small.size, Image.Resampling.NEAREST)
        covered |= np.asarray(mask)
        boxes.append([side * small.width / image.width for side in stored["xyxy"]])
    return overlay(small, np.zeros(covered.shape), mask=covered, boxes=boxes) if boxes else small


def _mask(stored: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The mask `(y, x)` of an object."""
    if stored["rle"] is not None:
        return mask_of(stored["rle"])
    mask = np.zeros(size, dtype=bool)
    left, top, right, bottom = stored["xyxy"]
    mask[top:bottom, left:right] = True
    return mask
