"""Experiments as tables and curves."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev

from PIL import Image

from open_gem.evaluation.tasks import Estimate
from open_gem.paper import numbers
from open_gem.paper.figures import plot
from open_gem.paper.measuring import Outcome
from open_gem.paper.report import cell_of, markdown_table, paper_cell
from open_gem.paper.rows import EXPERIMENTS, Plot
from open_gem.paper.runs import LABELS, Scores

SEED = ", seed "


def title(name: str) -> str:
    """Return "Table 1" for "table1"."""
    word = name.rstrip("0123456789")
    return f"{word.capitalize()} {name.removeprefix(word)}".rstrip()


def markdown(name: str, outcomes: Sequence[Outcome]) -> str:
    """Return an experiment as a table: per cent with 95 % intervals, and the paper's values with the difference. A row
    that adds to another has the change with its paired interval instead.

    The paper's values are shown for the same model, data, split and protocol only; those of Table 3 that it quotes from
    others are quoted.
    """
    experiment = EXPERIMENTS[name]
    outcomes = [outcome for outcome in outcomes if name in outcome.rows]
    shown = _shown_scores(name, outcomes)
    head = f"## {title(name)}: {experiment.about}\n"
    if not shown:
        data = " and ".join(dict.fromkeys(outcome.run.dataset for outcome in outcomes)) or "this data"
        expected = ", ".join(LABELS[score] for score in experiment.shown)
        return f"{head}\n{data} has no scores of the kind that this needs: {expected}.\n"
    rows = [
        row
        for outcome in outcomes
        for row in (
            _over_seeds(outcome.rows[name], shown)
            if experiment.seeds
            else _rows(name, outcome, shown, f"{outcome.label} · " if len(outcomes) > 1 else "")
        )
    ]
    if name == "table3":
        rows += _quoted(outcomes[0].run.dataset, shown)
    columns = ["", *(LABELS[score] for score in shown), "paper"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return f"{head}\n{markdown_table(columns, rows)}"


def _shown_scores(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    measured = {score for outcome in outcomes for row in outcome.rows[name].values() for score in row}
    return [score for score in EXPERIMENTS[name].shown if score in measured]


def _rows(name: str, outcome: Outcome, shown: Sequence[str], prefix: str) -> Iterator[list[str]]:
    for row, scores in outcome.rows[name].items():
        compared = scores.get(numbers.DATASETS.get(outcome.run.dataset, ""))
        paper = paper_cell(outcome.run.published(name, row), compared)
        change = outcome.changes.get(name, {}).get(row, {})
        cells = [
            _changed(scores.get(score), change[score]) if score in change else str(cell_of(scores.get(score)))
            for score in shown
        ]
        yield [prefix + row, *cells, str(paper)]


def _changed(estimate: Estimate | None, change: Estimate) -> str:
    """Return a score and how much it differs from that of the row that this one adds to."""
    return f"{cell_of(estimate).value}, {cell_of(change, '+')}"


def _over_seeds(rows: Scores, shown: Sequence[str]) -> Iterator[list[str]]:
    """Merge rows that differ in their seed alone: mean and standard deviation over seeds."""
    by_seed: dict[str, list[Mapping[str, Estimate]]] = {}
    for row, scores in rows.items():
        by_seed.setdefault(row.partition(SEED)[0], []).append(scores)
    for row, seeds in by_seed.items():
        if len(seeds) == 1:
            yield [row, *(str(cell_of(seeds[0][score])) for score in shown), ""]
            continue
        columns = [[100 * scores[score].value for scores in seeds] for score in shown]
        yield [f"{row} ({len(seeds)} seeds)", *(f"{mean(column):.1f} ± {stdev(column):.1f}" for column in columns), ""]


def _quoted(dataset: str, shown: Sequence[str]) -> Iterator[list[str]]:
    for row, values in numbers.QUOTED.items():
        if dataset in values:
            yield [f"{row} (quoted by the paper, not measured)", *[""] * len(shown), f"{values[dataset]:.1f}"]


def curves(name: str, outcomes: Sequence[Outcome]) -> dict[str, Image.Image]:
    """Return a figure's plots by the names of their files; none for a table."""
    outcomes = [outcome for outcome in outcomes if name in outcome.rows]
    return {
        ".".join(filter(None, (name, plotted.name, score))): _draw(name, plotted, score, outcomes)
        for plotted in EXPERIMENTS[name].plots
        for score in _shown_scores(name, outcomes)
    }


def _draw(name: str, plotted: Plot, score: str, outcomes: Sequence[Outcome]) -> Image.Image:
    series = {
        f"{outcome.label} · {curve}" if len(outcomes) > 1 else curve: [
            (point.x, outcome.rows[name][point.row][point.score(score)]) for point in points
        ]
        for outcome in outcomes
        for curve, points in plotted.curves(outcome.layers).items()
    }
    return plot(series, title=f"{title(name)}: {LABELS[score]}", axis=plotted.axis)
