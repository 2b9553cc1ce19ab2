"""Counts of all rows in the parts, whichever runs wrote them, and the settings that made them, for people."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_gem.files import to_json, write_file
from open_gem.label.parts import LabelRow, Manifest, Parts, rows_in
from open_gem.label.paths import PassedOver

PASSED_OVER = ".passed-over.json"  # file beside the parts: what the last listing of the source skipped
COLUMNS = ("label", "images", "objects", "presence", "confidence", "score")
"""Columns of the table of labels; presence is a mean over images, confidence and score are means over objects."""


MEASURES = ("presence", "peak", "probability", "confidence")
"""Fields of objects that say how sure they are."""


@dataclass
class LabelCounts:
    """Images with a label and objects of it; sums of presence over images, of confidence and of scores, raw
    cosines, over objects."""

    images: int = 0
    objects: int = 0
    total_presence: float = 0.0
    total_confidence: float = 0.0
    total_score: float = 0.0

    @property
    def presence(self) -> float | None:
        """Mean presence where the label is present, in [0, 1]; None if no image has it, or the model gives none."""
        return self.total_presence / self.images if self.images and not math.isnan(self.total_presence) else None

    @property
    def confidence(self) -> float | None:
        """Mean confidence of the objects, in [0, 1]; None if there are none."""
        return self.total_confidence / self.objects if self.objects else None

    @property
    def score(self) -> float | None:
        """Mean score of the objects; None if there are none."""
        return self.total_score / self.objects if self.objects else None

    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in COLUMNS[1:]}


@dataclass
class Summary:
    """Counts of rows.

    labels    counts by label, in the order of the manifest
    labeled   images without an error
    empty     those of them that have no object
    errors    images with an error, by kind
    examples  the first error of each kind
    seconds   spent on all images
    passed_over      files that were passed over: by the last listing of the source, and in files of several pages
    """

    labels: dict[str, LabelCounts]
    labeled: int = 0
    empty: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def text(self) -> str:
        """Describe the counts of images, for people."""
        return f"{self.labeled} labelled, {self.empty} of them without any object, {self.errors.total()} with an error"

    def add(self, row: LabelRow) -> None:
        self.seconds += row["seconds"]
        if row["status"] == "error":
            self.errors[kind := kind_of(row["error"])] += 1
            self.examples.setdefault(kind, row["error"])
            return
        self.labeled += 1
        if row["pages"]:
            self.passed_over.add("further pages", row["pages"] - 1)
        self.empty += not row["objects"]
        for label, presence in {stored["label"]: stored["presence"] for stored in row["objects"]}.items():
            counts = self.labels[label]
            counts.images += 1
            counts.total_presence += math.nan if presence is None else presence
        for stored in row["objects"]:
            counts = self.labels[stored["label"]]
            counts.objects += 1
            counts.total_confidence += stored["confidence"]
            counts.total_score += stored["score"]

    def document(self) -> dict[str, Any]:
        """Return values that JSON can hold."""
        return {
            "images": self.labeled + self.errors.total(),
            "labeled": self.labeled,
            "empty": self.empty,
            "errors": {self.examples[kind]: count for kind, count in self.errors.most_common()},
            "passed_over": self.passed_over.ordered(),
            "seconds": round(self.seconds, 3),
            "labels": {name: counts.document() for name, counts in self.labels.items()},
        }


def summarize(parts: Parts, also: Callable[[Path, LabelRow], None] = lambda part, row: None) -> Summary:
    """Count all rows, and pass each with its part to `also`; reads neither masks nor maps. Raises OutputError."""
    summary = Summary(
        {label: LabelCounts() for label in parts.manifest.labels}, passed_over=read_passed_over(parts.folder)
    )
    fields = [f"objects.list.element.{name}" for name in ("label", "score", *MEASURES)]
    for part in parts.paths():
        for row in rows_in(part, "id", "status", "error", "pages", "seconds", *fields):
            summary.add(row)
            also(part, row)
    return summary


def describe(manifest: Manifest) -> dict[str, str]:
    """Return the model, the method and the thresholds that made labels, for people."""
    settings = manifest.settings
    labels = settings.get("classes", {}).get("labels", {}).values()

    def values(name: str) -> str:
        levels = sorted({entry[name] for entry in labels})
        return " to ".join(f"{level:g}" for level in dict.fromkeys((levels[0], levels[-1]))) if levels else "unknown"

    method = settings.get("method", {})  # a model that was trained to localize has none
    depth = f", depth {method['depth']}" if "depth" in method else ""
    return {
        "Model": f"{settings.get('model', 'unknown')} (weights {settings.get('weights', 'unknown')})",
        "Method": f"{method['attention']} attention{depth}" if method else "the model's own",
        "Presence threshold": values("presence"),
        "Map threshold": f"{values('threshold')} ({settings.get('heatmap_scale', 'minmax')})",
        "Smallest object": f"{100 * settings.get('min_area', 0):g} % of the image",
    }


def decimals(value: float | None, digits: int = 3) -> str:
    """Format a number for a table; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def write_passed_over(folder: Path, passed_over: PassedOver) -> None:
    """Write down what a listing skipped, for summaries. Raises OutputError."""
    write_file(folder / PASSED_OVER, to_json(passed_over).encode())


def read_passed_over(folder: Path) -> PassedOver:
    """Return what the last complete listing skipped."""
    try:
        return PassedOver(json.loads((folder / PASSED_OVER).read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # no run has listed the whole source yet
        return PassedOver()


def kind_of(error: str) -> str:
    """Return an error without what concerns one image alone: names in quotes, bytes, and numbers."""
    plain = re.sub(r"b?'(?:[^'\\]|\\.)*'|b?\"(?:[^\"\\]|\\.)*\"", "…", error)
    return re.sub(r"\d+", "n", plain).strip()[:120]
