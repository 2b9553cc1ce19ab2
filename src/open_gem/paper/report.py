"""All stored runs as one table, beside the paper's values."""

import csv
import html
import io
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from open_gem.checks import did_you_mean, listed
from open_gem.errors import InputError
from open_gem.evaluation.store import Store
from open_gem.evaluation.tasks import Estimate, differences, scores
from open_gem.files import digest, to_json
from open_gem.method.table import METHODS
from open_gem.paper import numbers as paper

# Methods → rows of Table 3.
TABLE_3 = {
    "clip": "CLIP",
    "maskclip": "MaskCLIP",
    "clip_surgery": "CLIPSurgery",
    "gem": "GEM",
    "as trained": "as trained",
}


@dataclass(frozen=True)
class Line:
    """One method of one run.

    images   number of images that count
    failed   number of images that could not be read
    total    number of images of the split
    size     size rule
    run      name of the run's folder
    tuned    whether the method's settings are not the usual ones
    scores   every score, or its difference to that of the method `against` on the same images
    """

    dataset: str
    split: str
    images: int
    failed: int
    total: int
    model: str
    protocol: str
    size: str
    run: str
    method: str
    tuned: bool
    scores: Mapping[str, Estimate]
    against: str | None = None

    def paper(self, score: str) -> float | None:
        """The value of the paper's Table 3 in [0, 1]; None if it has none for the same model, data, split, settings and
        protocol, if images are missing, and for differences."""
        if (
            self.against is not None
            or self.tuned
            or self.images < self.total
            or paper.DATASETS.get(self.dataset) != score
        ):
            return None
        row = TABLE_3.get(self.method, "")
        published = paper.value("table3", self.model, row, self.dataset, self.split, self.protocol)
        return None if published is None else published / 100

    def document(self) -> dict[str, Any]:
        """The line as values that JSON can hold; a score without a value is null."""
        numbers = {
            name: {part: None if math.isnan(number) else number for part, number in estimate._asdict().items()}
            for name, estimate in self.scores.items()
        }
        fields = {name: value for name, value in asdict(self).items() if name != "against" or value is not None}
        return fields | {"scores": numbers}


def summary(store: Store, ids: Collection[str] | None = None, against: str | None = None) -> list[Line]:
    """A line for each method of a run, over these images or over all that were measured so far.

    With `against`, a line for each other method, with the differences to that one; none if the run does not have it.
    """
    settings, results = store.settings, store.read()
    names = _names(settings["methods"])
    done = results.done if ids is None else results.done.intersection(ids)
    failed = results.failed if ids is None else results.failed.keys() & set(ids)
    counts, other = {names[method]: counted for method, counted in results.counts(ids).items()}, None
    if against is not None and (other := counts.pop(against, None)) is None:
        return []
    usual = _usual()
    tuned = {names[name]: method != usual.get(name, method) for name, method in settings["methods"].items()}
    return [
        Line(
            settings["dataset"],
            settings["split"],
            len(done),
            len(failed),
            results.total,
            settings["model"],
            settings["protocol"]["name"],
            settings["size_rule"],
            store.folder.name,
            name,
            tuned[name],
            scores(counted) if other is None else differences(counted, other),
            None if against is None else _marked(against, tuned[against]),
        )
        for name, counted in counts.items()
    ]


def _marked(method: str, tuned: bool) -> str:
    return f"{method} (tuned)" if tuned else method


def _names(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names for people of the methods of a run. Runs of `reproduce` name methods by the hash of their settings: these
    get a description, such as "gem, iterations 0"."""
    return {name: _description(method) if name == digest(method) else name for name, method in methods.items()}


def _description(method: Mapping[str, Any]) -> str:
    """The known method with the fewest different settings, and these settings."""
    changed = {name: [key for key in method if method[key] != usual.get(key)] for name, usual in _usual().items()}
    name = min(changed, key=lambda name: len(changed[name]))
    return ", ".join([name, *(f"{key} {method[key]}" for key in changed[name])])


@cache
def _usual() -> Mapping[str, Mapping[str, Any]]:
    """The settings of all known methods, as read from JSON."""
    return {name: json.loads(to_json(method.describe())) for name, method in METHODS.items()}


def collect(folder: Path, against: str | None = None) -> list[Line]:
    """The lines of all runs in or below a folder; with `against`, the differences to that method in each run that has
    it. Raises InputError if there are none."""
    stores = [Store.open(path.parent) for path in sorted(folder.rglob("run.json"))]
    lines = [line for store in stores for line in summary(store, against=against)]
    names = {name for store in stores for name in _names(store.settings["methods"]).values()}
    if stores and against is not None and against not in names:
        raise InputError(
            f"no run has method {against!r}{did_you_mean(against, names)}, expected one of {listed(sorted(names))}"
        )
    if stores and not lines and against is not None:
        raise InputError(f"no run below {str(folder)!r} has counts of {against!r} and of another method")
    if not lines:
        what = f"{len(stores)} runs without any counts" if stores else "no runs"
        raise InputError(
            f"{what} in {str(folder)!r}, expected folders with a run.json and parts, as open-gem evaluate makes them"
        )
    return lines


Table = tuple[list[str], list[list[str]]]


def _subject(line: Line) -> list[str]:
    """The cells before the scores of a line."""
    images = f"{line.images} of {line.total}" + (f", {line.failed} failed" if line.failed else "")
    method = _marked(line.method, line.tuned)
    return [line.dataset, line.split, images, line.model, line.protocol, line.size, line.run, method]


SUBJECT = ["data set", "split", "images", "model", "protocol", "size", "run", "method"]


def table(lines: Sequence[Line]) -> Table:
    """Head and rows of a table for people: per cent, the 95 % interval, and the paper's value with the difference.
    Scores of single blocks are not shown."""
    names = _score_names(lines)
    rows = []
    for line in lines:
        *run, method = _subject(line)
        compared = method if line.against is None else f"{method} − {line.against}"
        rows.append([*run, compared, *(_cell(line, name) if name in line.scores else "" for name in names)])
    return [*SUBJECT, *names], rows


def numbers(lines: Sequence[Line]) -> Table:
    """Head and rows of a table for programs: one column for each number, in [0, 1] and in full precision."""
    names = _score_names(lines)
    head = [part for name in names for part in (name, f"{name} low", f"{name} high", f"{name} paper")]
    rows = [
        [*_subject(line), line.against or "", *(cell for name in names for cell in _numbers(line, name))]
        for line in lines
    ]
    return [*SUBJECT, "against", *head], rows


def _score_names(lines: Sequence[Line]) -> list[str]:
    return [name for name in dict.fromkeys(name for line in lines for name in line.scores) if "@" not in name]


def _cell(line: Line, name: str) -> str:
    value, low, high = (100 * number for number in line.scores[name])
    if math.isnan(value):
        return "nothing counted"
    sign = "" if line.against is None else "+"
    text = f"{value:{sign}z.1f} [{low:{sign}z.1f}, {high:{sign}z.1f}]"
    published = line.paper(name)
    return text if published is None else f"{text}; paper {100 * published:.1f} ({value - 100 * published:+.1f})"


def _numbers(line: Line, name: str) -> list[str]:
    if name not in line.scores:
        return [""] * 4
    published = line.paper(name)
    values = [*line.scores[name], math.nan if published is None else published]
    return ["" if math.isnan(number) else repr(number) for number in values]


def _markdown(lines: Sequence[Line]) -> str:
    head, rows = table(lines)
    printed = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in printed) + "\n"


def _html(lines: Sequence[Line]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    head, rows = table(lines)
    body = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<!doctype html><meta charset="utf-8"><title>open_gem</title>\n<table>\n{body}</table>\n'


def _csv(lines: Sequence[Line]) -> str:
    file = io.StringIO()
    head, rows = numbers(lines)
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    return file.getvalue()


FORMATS: Mapping[str, Callable[[Sequence[Line]], str]] = {"markdown": _markdown, "html": _html, "csv": _csv}


def render(lines: Sequence[Line], format: str = "markdown") -> str:
    """The table of these lines as text. Raises InputError for an unknown format."""
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[format](lines)
