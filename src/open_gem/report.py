"""Runs as tables: what was measured, beside what the paper printed."""

import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from open_gem.errors import InputError
from open_gem.evaluate import Estimate, scores
from open_gem.runs import Store

# Grounding Everything, Table 3 (CLIP ViT-B/16), in per cent: data set -> its score there, and of each pathway.
PAPER: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "voc2012": ("mean_iou", {"clip": 10.4, "maskclip": 28.6, "clip_surgery": 41.2, "gem": 46.2}),
    "context59": ("mean_iou", {"clip": 7.7, "maskclip": 23.8, "clip_surgery": 30.5, "gem": 32.6}),
    "openimages": ("class_pooled", {"clip": 27.6, "maskclip": 42.0, "clip_surgery": 47.8, "gem": 50.9}),
}
PAPER_MODELS = ("ViT-B-16/openai", "openai/clip-vit-base-patch16")


@dataclass(frozen=True)
class Line:
    """One pathway of one run: `images` that count, `failed` that could not be read, every score as an `Estimate`."""

    dataset: str
    split: str
    images: int
    failed: int
    model: str
    protocol: str
    run: str
    pathway: str
    scores: Mapping[str, Estimate]

    def paper(self, score: str) -> float | None:
        """What the paper has for this, as a share; None where it has nothing, or the protocol is not the paper's."""
        name, values = PAPER.get(self.dataset, ("", {}))
        if score != name or self.model not in PAPER_MODELS or self.protocol == "field" or self.pathway not in values:
            return None
        return values[self.pathway] / 100

    def document(self) -> dict[str, Any]:
        """All of it as values that JSON can hold."""
        return asdict(self) | {"scores": {name: found._asdict() for name, found in self.scores.items()}}


def summary(store: Store) -> list[Line]:
    """A line for each pathway of a run, over what was measured so far."""
    settings, failed = store.settings, len(store.failed())
    found = []
    for name, counts in store.counts().items():
        images = len(next(iter(counts.values())).rows)
        kept = settings["dataset"], settings["split"], images, failed, settings["model"]
        found.append(Line(*kept, settings["protocol"]["name"], store.folder.name, name, scores(counts)))
    return found


def collect(place: Path) -> list[Line]:
    """The lines of all runs below a folder. Raises InputError where there are none."""
    folders = sorted(path.parent for path in place.glob("*/run.json"))
    if not folders:
        raise InputError(
            f"no runs in {str(place)!r}, expected folders with a run.json, as open-gem evaluate makes them"
        )
    return [line for folder in folders for line in summary(Store.open(folder))]


def table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one table: per cent, with the 95 % interval, and the paper's value with the difference."""
    names = list(dict.fromkeys(name for line in lines for name in line.scores))
    head = ["data set", "split", "images", "model", "protocol", "pathway", *names]
    rows = []
    for line in lines:
        cells = [line.dataset, line.split, str(line.images), line.model, line.protocol, line.pathway]
        rows.append(cells + [_cell(line, name) if name in line.scores else "" for name in names])
    return head, rows


def _cell(line: Line, name: str) -> str:
    value, low, high = (100 * number for number in line.scores[name])
    text = f"{value:.1f} [{low:.1f}, {high:.1f}]"
    paper = line.paper(name)
    return text if paper is None else f"{text}; paper {100 * paper:.1f} ({value - 100 * paper:+.1f})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    body = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<!doctype html><meta charset="utf-8"><title>open_gem</title>\n<table>\n{body}</table>\n'


def _csv(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    return file.getvalue()


FORMATS: Mapping[str, Callable[[Sequence[str], Sequence[Sequence[str]]], str]] = {
    "markdown": _markdown,
    "html": _html,
    "csv": _csv,
}


def render(lines: Sequence[Line], format: str = "markdown") -> str:
    """The table of these lines as text. Raises InputError for an unknown format."""
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[format](*table(lines))
