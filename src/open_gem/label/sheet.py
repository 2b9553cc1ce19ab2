"""A page to look at before trusting the labels: what made them, every label in numbers, and samples of each.

What needs a look comes first. Labels are ordered by the mean confidence of their objects, lowest first. Of each label
there are, in this order:

1. images with the objects nearest to the label's thresholds, by `margin`: a small change decides whether they exist
2. images in which labels compete: those where the label's least probable object has the lowest softmax probability,
   below `CONTESTED`: another prompt is likelier there
3. more, at random: they show what is usual
"""

import base64
import heapq
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_gem.errors import ImageError
from open_gem.images.draw import overlay
from open_gem.images.pixels import read_image
from open_gem.label.done import key
from open_gem.label.ontology import DEFAULTS
from open_gem.label.parts import LabelRow, Manifest, Parts
from open_gem.label.reading import Item, read
from open_gem.label.summary import COLUMNS, LabelCounts, Summary, decimals, describe
from open_gem.rle import mask_of

SIDE = 384  # pixels of a sample's longer side
CONTESTED = 0.5  # softmax probability of an object below which other prompts compete with its label
MAX_SAMPLES = 1200  # random images on a page: with many labels, each has fewer
STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #656d76; --line: #d0d7de; --page: #fff; --alert: #fff8c5 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117; --alert: #3b2e00 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1240px; color: var(--text);
  background: var(--page); overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 0 .5rem } h2 { font-size: 1.2rem; margin: 2rem 0 0 } a { color: inherit }
h3 { font-size: 1rem; margin: .75rem 0 .25rem } p { margin: .25rem 0 } .soft { color: var(--soft) }
.warning { background: var(--alert); padding: .5rem .75rem; border-radius: 6px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .75rem 0 }
dt { color: var(--soft) } dd { margin: 0 }
table { border-collapse: collapse; width: 100%; max-width: 46rem; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .4rem; border-bottom: 1px solid var(--line); text-align: right; overflow-wrap: normal }
th { font-weight: 600; font-size: .85rem } th:first-child, td:first-child { text-align: left; min-width: 7em;
  overflow-wrap: anywhere }
@media (max-width: 480px) { table { font-size: 13px } th, td { padding: .25rem .2rem } }
.absent td { color: var(--soft) } .absent td:first-child { text-decoration: line-through }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 12px }
figure { margin: 0 } img { width: 100%; border-radius: 4px; display: block }
figcaption { font-size: 12px; line-height: 1.35; margin-top: 3px }
"""


@dataclass
class Lowest:
    """The `count` entries with the lowest numbers of any stream."""

    count: int
    _heap: list[tuple[float, str, Path]] = field(default_factory=list)

    def add(self, number: float, id: str, part: Path) -> None:
        if len(self._heap) < self.count:
            heapq.heappush(self._heap, (-number, id, part))
        elif self.count and -number > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-number, id, part))

    @property
    def ids(self) -> dict[str, Path]:
        """Return their ids and parts, lowest first."""
        return {id: part for _, id, part in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))}


def margin_of(manifest: Manifest) -> Callable[[Mapping[str, Any]], float]:
    """Return a function of a stored object: by how much it is above the nearer of its label's two thresholds.

    They are compared with its presence and with its value on the scale of the heatmaps: its peak with "minmax", its
    score with "cosine", its probability with "probability". What is not known has no margin.
    """
    thresholds = manifest.settings.get("classes", {}).get("labels", {})
    scale = {"cosine": "score", "probability": "probability"}.get(manifest.settings.get("heatmap_scale", ""), "peak")

    def margin(stored: Mapping[str, Any]) -> float:
        limits = {**DEFAULTS, **thresholds.get(stored["label"], {})}
        values = (stored["presence"], limits["presence"]), (stored[scale], limits["threshold"])
        return min((value - limit for value, limit in values if value is not None), default=math.inf)

    return margin


class Sheet:
    """Chooses rows as they pass, and makes a page of them.

    Of each label half of `count` images near its thresholds, as many in which labels compete, and up to `count` random
    ones, the same every time; then images without any object.
    """

    def __init__(self, manifest: Manifest, count: int):
        labels = manifest.labels
        count = min(count, max(1, MAX_SAMPLES // len(labels)))
        self.random, self.near, self.contested = (
            {label: Lowest(most) for label in labels} for most in (count, count // 2, count // 2)
        )
        self.margin = margin_of(manifest)
        self.empty = Lowest(count)

    def add(self, part: Path, row: LabelRow) -> None:
        """Consider a row of a part: its id, status, and the labels and `MEASURES` of its objects."""
        if row["status"] != "ok":
            return
        number = key(row["id"])
        if not row["objects"]:
            self.empty.add(number, row["id"], part)
        objects = sorted(row["objects"], key=lambda stored: stored["label"])
        for label, group in groupby(objects, key=lambda stored: stored["label"]):
            own = list(group)
            self.random[label].add(number, row["id"], part)
            self.near[label].add(min(map(self.margin, own)), row["id"], part)
            least = min(1.0 if stored["probability"] is None else stored["probability"] for stored in own)
            if least < CONTESTED:
                self.contested[label].add(least, row["id"], part)

    def write(self, parts: Parts, totals: Summary) -> bytes:
        """Write a page of HTML with the images inside, which are read now; it names missing ones. Raises
        OutputError."""
        chosen = [*self.random.values(), *self.near.values(), *self.contested.values(), self.empty]
        places = {id: part for lowest in chosen for id, part in lowest.ids.items()}
        rows = {row["id"]: moved(row, parts.manifest.root) for row in parts.find(places, "id", "source", "objects")}
        ordered = sorted(
            totals.labels.items(), key=lambda pair: math.inf if (mean := pair[1].confidence) is None else mean
        )
        sections = [
            self._section(index, label, counts, rows) for index, (label, counts) in enumerate(ordered) if counts.images
        ]
        sections.append(_samples("Images without any object", "h2", (rows[id] for id in self.empty.ids), None))
        title = f"{totals.labeled} images, {len(totals.labels)} labels"
        head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"
        head += f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style>\n<h1>{title}</h1>\n"
        return "\n".join([head, _facts(parts, totals), _table(ordered), *sections, ""]).encode()

    def _section(self, index: int, label: str, counts: LabelCounts, rows: Mapping[str, LabelRow]) -> str:
        near, contested = self.near[label].ids, self.contested[label].ids
        random = [id for id in self.random[label].ids if id not in near and id not in contested]
        return (
            f"<section id='label-{index}'><h2>{html.escape(label)}</h2>"
            f"<p class='soft'>Images: {counts.images} · objects: {counts.objects}</p>"
            + _samples("Nearest to the thresholds", "h3", (rows[id] for id in near), label)
            + _samples("Another prompt is likelier", "h3", (rows[id] for id in contested if id not in near), label)
            + _samples("More, at random", "h3", (rows[id] for id in random), label)
            + "</section>"
        )


def moved(row: LabelRow, root: str | None) -> LabelRow:
    """Return the row, with its image below `root` if it exists there: the folder may have been moved."""
    moved = Path(root or "", row["id"])
    return row if root is None or "://" in root or not moved.is_file() else {**row, "source": str(moved)}


def _facts(parts: Parts, totals: Summary) -> str:
    """Describe what made the labels, and what to know before reading on."""
    facts = [*describe(parts.manifest).items(), ("Images", totals.text)]
    pairs = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    warnings = [f"<p class='warning'>{html.escape(warning)}</p>" for warning in parts.manifest.warnings]
    errors = [f"{count} × {html.escape(totals.examples[kind])}" for kind, count in totals.errors.most_common(10)]
    shown = "".join(f"<p class='soft'>{error}</p>" for error in errors)
    return f"{''.join(warnings)}<dl>{pairs}</dl>{shown and f'<h3>Errors</h3>{shown}'}"


def _table(labels: Sequence[tuple[str, LabelCounts]]) -> str:
    rows = ""
    for index, (label, counts) in enumerate(labels):
        name = html.escape(label)
        name = f"<a href='#label-{index}'>{name}</a>" if counts.images else name
        numbers = (
            str(counts.images),
            str(counts.objects),
            *map(decimals, (counts.presence, counts.confidence, counts.score)),
        )
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        rows += f"<tr{'' if counts.images else ' class=absent'}><td>{name}</td>{cells}</tr>\n"
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    return f"<table><tr>{head}</tr>\n{rows}</table>"


def _samples(title: str, heading: str, rows: Iterable[LabelRow], label: str | None) -> str:
    """Draw images with the objects of a label, under a heading; nothing if there is no image."""
    figures = "".join(_figure(row, [obj for obj in row["objects"] if obj["label"] == label]) for row in rows)
    return figures and f"<{heading}>{title}</{heading}><div class='row'>{figures}</div>"


def _figure(row: LabelRow, objects: Sequence[dict[str, Any]]) -> str:
    caption = html.escape(row["id"])
    if objects:
        confidences = ", ".join(decimals(stored["confidence"], 2) for stored in objects[:4])
        caption += f"<br>presence {decimals(objects[0]['presence'], 2)} · confidence {confidences}"
    try:
        image = read_image(read(Item(row["id"], row["source"])))
    except ImageError as error:
        return f"<figure>{html.escape(str(error))}<figcaption>{caption}</figcaption></figure>"
    file = io.BytesIO()
    draw(image, objects).save(file, format="JPEG", quality=80)
    content = base64.b64encode(file.getvalue()).decode()
    return f"<figure><img src='data:image/jpeg;base64,{content}' alt=''><figcaption>{caption}</figcaption></figure>"


def crop(image: Image.Image, stored: dict[str, Any]) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Cut an image to an object and as much around it as it is large, a quarter of the image at least; return it with
    the object in it, as `draw` takes them."""
    left, top, right, bottom = stored["xyxy"]
    margin = max(right - left, bottom - top, min(image.size) // 4) // 2
    edges = max(0, left - margin), max(0, top - margin), right + margin, bottom + margin
    x, y, x_end, y_end = edges[0], edges[1], min(image.width, edges[2]), min(image.height, edges[3])
    mask = _mask(stored, (image.height, image.width))[y:y_end, x:x_end]
    inside = {"xyxy": [left - x, top - y, right - x, bottom - y], "mask": mask}
    return image.crop((x, y, x_end, y_end)), [inside]


def draw(image: Image.Image, objects: Iterable[dict[str, Any]], side: int = SIDE) -> Image.Image:
    """Draw a small copy, of `side` pixels at most, with the outlines and boxes of objects; the outline is the box if
    there is no mask."""
    size = (image.height, image.width)
    small = image.copy()
    small.thumbnail((side, side))
    covered = np.zeros((small.height, small.width), dtype=bool)
    boxes = []
    for stored in objects:
        mask = Image.fromarray(_mask(stored, size)).resize(small.size, Image.Resampling.NEAREST)
        covered |= np.asarray(mask)
        boxes.append([side * small.width / image.width for side in stored["xyxy"]])
    if boxes:
        small = overlay(small, np.zeros(covered.shape), mask=covered, boxes=boxes)
        small.thumbnail((side, side))  # it was enlarged, so that its marks are legible
    return small


def _mask(stored: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return the mask `(y, x)` of an object."""
    if "mask" in stored:
        return stored["mask"]
    if stored["rle"] is not None:
        return mask_of(stored["rle"])
    mask = np.zeros(size, dtype=bool)
    left, top, right, bottom = stored["xyxy"]
    mask[top:bottom, left:right] = True
    return mask
