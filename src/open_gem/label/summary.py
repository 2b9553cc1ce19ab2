"""Counts of all rows in the parts, whichever runs wrote them."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_gem.files import to_json, write_file
from open_gem.label.parts import LabelRow, Parts, Place
from open_gem.label.paths import PassedOver

PASSED_OVER = ".passed-over.json"  # beside the parts: what the last listing of the source left out


@dataclass
class LabelCounts:
    """Images with a label, objects of it, and their mean score, a raw cosine."""

    images: int = 0
    objects: int = 0
    total: float = 0.0

    @property
    def score(self) -> float | None:
        return self.total / self.objects if self.objects else None


@dataclass
class Summary:
    """`labeled` images without error, of which `empty` have no object; `errors` by kind, of which `examples` has the
    first of each; `seconds` spent on all; `left`: what was passed over, by the last listing of
    the source and in files of several pages."""

    labels: dict[str, LabelCounts]
    labeled: int = 0
    empty: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    left: PassedOver = field(default_factory=PassedOver)

    @property
    def images(self) -> int:
        return self.labeled + self.errors.total()

    def add(self, row: dict[str, Any]) -> None:
        self.seconds += row["seconds"]
        if row["status"] == "error":
            self.errors[kind := kind_of(row["error"])] += 1
            self.examples.setdefault(kind, row["error"])
            return
        self.labeled += 1
        if row["pages"]:
            self.left.add("further pages", row["pages"] - 1)
        self.empty += not row["objects"]
        for label in {stored["label"] for stored in row["objects"]}:
            self.labels[label].images += 1
        for stored in row["objects"]:
            self.labels[stored["label"]].objects += 1
            self.labels[stored["label"]].total += stored["score"]

    def document(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        labels = {
            name: {"images": counts.images, "objects": counts.objects, "score": counts.score}
            for name, counts in self.labels.items()
        }
        return {
            "images": self.images,
            "labeled": self.labeled,
            "empty": self.empty,
            "errors": {self.examples[kind]: count for kind, count in self.errors.most_common()},
            "passed_over": self.left.ordered(),
            "seconds": round(self.seconds, 3),
            "labels": labels,
        }


def summarize(parts: Parts, also: Callable[[Place, LabelRow], None] = lambda place, row: None) -> Summary:
    """All rows counted, and shown to `also`: reads what that needs alone, not masks or maps. Raises OutputError."""
    summary = Summary({label: LabelCounts() for label in parts.manifest.labels}, left=_read_left(parts.folder))
    within = [f"objects.list.element.{name}" for name in ("label", "score", "presence")]
    for place, row in parts.placed("id", "status", "error", "pages", "seconds", *within):
        summary.add(row)
        also(place, row)
    return summary


def write_left(folder: Path, left: PassedOver) -> None:
    """Note what a listing left out, for summaries. Raises OutputError."""
    write_file(folder / PASSED_OVER, to_json(left).encode())


def _read_left(folder: Path) -> PassedOver:
    try:
        return PassedOver(json.loads((folder / PASSED_OVER).read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # no run has listed everything yet
        return PassedOver()


def kind_of(error: str) -> str:
    """An error without what is of one image alone: names in quotes, bytes, and numbers."""
    plain = re.sub(r"b?'(?:[^'\\]|\\.)*'|b?\"(?:[^\"\\]|\\.)*\"", "…", error)
    return re.sub(r"\d+", "n", plain).strip()[:120]
