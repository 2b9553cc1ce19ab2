"""Stored runs as tables for people (a terminal, Markdown, a page) and for programs (CSV)."""

import csv
import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from open_gem.data import DATASETS, MapSource
from open_gem.errors import InputError
from open_gem.evaluation.tasks import Estimate
from open_gem.paper.runs import LABELS, Run

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #656d76; --line: #d0d7de; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1240px; color: var(--text);
  background: var(--page) }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 0 } p { margin: .25rem 0 }
.soft, dt, small { color: var(--soft) }
dl { display: flex; flex-wrap: wrap; gap: .1rem 1.5rem; margin: .4rem 0; font-size: .9rem }
dl div { display: flex; gap: .4rem } dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { font-weight: 600; font-size: .85rem; vertical-align: bottom; min-width: 3.5rem }
small { display: block; font-size: .72rem; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page);
  min-width: 6rem; max-width: 16rem; overflow-wrap: anywhere }
td:nth-child(2) { font-weight: 600; min-width: 6.5rem } td:nth-child(2) small { font-weight: 400 }
"""


class Cell(NamedTuple):
    """A number for people, and its interval behind or below it; both may be empty."""

    value: str = ""
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} [{self.interval}]" if self.interval else self.value


class RunTable(NamedTuple):
    """A run for people.

    title  data set, split and model
    about  what decides the numbers: images, protocol, thresholds …
    head   "method", the most important score, "paper" if the paper has a value, the other scores
    rows   a name and the cells behind it for each method, the best first
    """

    title: str
    about: Mapping[str, str]
    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def tables(runs: Iterable[Run]) -> list[RunTable]:
    """Return a table for each run, in per cent with 95 % intervals; the best run of each data set first. Scores of
    single blocks are not shown."""
    ordered = sorted(runs, key=lambda run: (run.dataset, run.split, -max(_best_first(run).values())))
    return [_table(run) for run in ordered]


def score_names(runs: Iterable[Run]) -> list[str]:
    """Return the scores that any of these runs has, the most important first, without those of single blocks."""
    measured = {name for run in runs for scores in run.scores.values() for name in scores}
    return [name for name in LABELS if name in measured]


def cell_of(estimate: Estimate | None, sign: str = "") -> Cell:
    """Return an estimate in per cent; `sign` "+" for a difference."""
    if estimate is None:
        return Cell()
    value, low, high = (100 * number for number in estimate)
    if math.isnan(value):
        return Cell("nothing counted")
    return Cell(f"{value:{sign}z.1f}", f"{low:{sign}z.1f}, {high:{sign}z.1f}")


def paper_cell(published: float | None, estimate: Estimate | None) -> Cell:
    """Return the paper's value in per cent, and how much the measured one is above it."""
    if published is None or estimate is None:
        return Cell()
    return Cell(f"{published:.1f} ({100 * estimate.value - published:+.1f})")


def _best_first(run: Run) -> dict[str, float]:
    """Return the most important score of each method, the highest first; −∞ where there is none."""
    [main, *_] = [*score_names([run]), ""]
    estimates = {method: scores.get(main) for method, scores in run.scores.items()}
    values = {
        method: -math.inf if estimate is None or math.isnan(estimate.value) else estimate.value
        for method, estimate in estimates.items()
    }
    return dict(sorted(values.items(), key=lambda item: -item[1]))


def _table(run: Run) -> RunTable:
    names, sign = score_names([run]), "" if run.against is None else "+"
    published = {method: run.published_of(method) for method in run.scores}
    is_compared = any(value is not None for value in published.values())
    rows = []
    for method in _best_first(run):
        cells = [cell_of(run.scores[method].get(name), sign) for name in names]
        if is_compared:
            cells.insert(1, paper_cell(published[method], run.scores[method].get(names[0])))
        title = run.title_of(method)
        rows.append((title if run.against is None else f"{title} − {run.against}", cells))
    labels = [LABELS[name] for name in names]
    head = ["method", *labels[:1], *(["paper"] if is_compared else []), *labels[1:]]
    return RunTable(f"{run.dataset} {run.split}: {run.model}", _about(run), head, rows)


def _images(run: Run) -> str:
    return f"{run.images} of {run.total}" + (f", {len(run.failed)} failed" if run.failed else "")


def _about(run: Run) -> dict[str, str]:
    protocol, source = run.settings["protocol"], DATASETS.get(run.dataset)
    about = {"images": _images(run), "protocol": run.protocol, "image size": run.settings["size_rule"]}
    if "template" in run.settings:
        about["template"] = repr(run.settings["template"])
    if isinstance(source, MapSource) and source.background:
        thresholds = protocol["background"]
        about["background threshold"] = str(thresholds.get(run.dataset, thresholds[""]))
    if {"mask_iou", "class_pooled"} & set(score_names([run])):
        about["mask threshold"] = str(protocol["threshold"])
    return about | {"run": run.folder}


# Formats --------------------------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _markdown(runs: Sequence[Run]) -> str:
    parts = []
    for table in tables(runs):
        about = ", ".join(f"{name} {value}" for name, value in table.about.items())
        rows = [[name, *map(str, cells)] for name, cells in table.rows]
        parts.append(f"## {table.title}\n\n{about}\n\n{markdown_table(table.head, rows)}")
    return "\n".join(parts)


def _html(runs: Sequence[Run]) -> str:
    """Render one page without scripts: readable at any width, in light and dark."""
    sections = []
    for title, about, head, rows in tables(runs):
        pairs = "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in about.items())
        heads = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
        body = "".join(
            f"<tr><td>{html.escape(name)}</td>{''.join(map(_html_cell, cells))}</tr>\n" for name, cells in rows
        )
        sections.append(
            f"<h2>{html.escape(title)}</h2>\n<dl>{pairs}</dl>\n"
            f"<div class='scroll' tabindex='0'><table><thead><tr>{heads}</tr></thead>\n"
            f"<tbody>{body}</tbody></table></div>\n"
        )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>open_gem: scores</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{STYLE}</style>\n<h1>Scores</h1>\n"
        "<p class='soft'>In per cent, with 95 % intervals over images; the best method of a run is first.</p>\n"
        + "".join(sections)
    )


def _html_cell(cell: Cell) -> str:
    interval = f"<small>{cell.interval.replace(', ', ' to ')}</small>" if cell.interval else ""
    return f"<td>{cell.value}{interval}</td>"


def _csv(runs: Sequence[Run]) -> str:
    """Render one line a method, with a column for each number: in [0, 1] and in full precision."""
    names, file = score_names(runs), io.StringIO()
    subject = ["data set", "split", "images", "model", "protocol", "size", "run", "method", "against"]
    parts = [part for name in names for part in (name, f"{name} low", f"{name} high", f"{name} paper")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*subject, *parts])
    for run in runs:
        setting = [run.dataset, run.split, _images(run), run.model, run.protocol, run.settings["size_rule"], run.folder]
        for method in run.scores:
            cells = [cell for name in names for cell in _numbers(run, method, name)]
            writer.writerow([*setting, run.title_of(method), run.against or "", *cells])
    return file.getvalue()


def _numbers(run: Run, method: str, name: str) -> list[str]:
    if name not in run.scores[method]:
        return [""] * 4
    published = run.published_of(method) if name == score_names([run])[0] else None
    values = [*run.scores[method][name], math.nan if published is None else published / 100]
    return ["" if math.isnan(number) else repr(number) for number in values]


FORMATS: Mapping[str, Callable[[Sequence[Run]], str]] = {"markdown": _markdown, "html": _html, "csv": _csv}
ENDINGS = {".html": "html", ".htm": "html", ".csv": "csv"}
"""End of a file's name → format; others are Markdown."""


def render(runs: Sequence[Run], format: str = "markdown") -> str:
    """Render these runs as text. Raises InputError for an unknown format."""
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[format](runs)
