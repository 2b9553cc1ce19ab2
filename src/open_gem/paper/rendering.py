"""Experiments as tables and curves."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev

from PIL import Image

from open_gem.evaluation.tasks import Estimate
from open_gem.paper import numbers as paper
from open_gem.paper.figures import plot
from open_gem.paper.measuring import Outcome
from open_gem.paper.rows import EXPERIMENTS, Plot

SEED = ", seed "


def title(name: str) -> str:
    """ "Table 1" of "table1"."""
    word = name.rstrip("0123456789")
    return f"{word.capitalize()} {name.removeprefix(word)}"


def markdown(name: str, outcomes: Sequence[Outcome]) -> str:
    """An experiment as a table: per cent with 95 % intervals, and the paper's values with the difference.

    The paper's values are shown for the same model, data, split and protocol only; those of Table 3 that it quotes from
    others are quoted.
    """
    experiment = EXPERIMENTS[name]
    outcomes = [outcome for outcome in outcomes if name in outcome.rows]
    shown = _shown_scores(name, outcomes)
    head = f"## {title(name)}: {experiment.about}\n"
    if not shown:
        data = " and ".join(dict.fromkeys(outcome.dataset for outcome in outcomes)) or "this data"
        return f"{head}\n{data} has no scores of the kind that this needs: {', '.join(experiment.shown)}.\n"
    rows = [
        row
        for outcome in outcomes
        for row in (
            _over_seeds(name, outcome, shown) if experiment.seeds else _rows(name, outcome, shown, len(outcomes) > 1)
        )
    ]
    if name == "table3":
        rows += _quoted(outcomes[0].dataset, shown)
    compared = any(row[-1] for row in rows)
    lines = [["", *shown, "paper"], ["---"] * (len(shown) + 2), *rows]
    return f"{head}\n" + "".join(f"| {' | '.join(line if compared else line[:-1])} |\n" for line in lines)


def _shown_scores(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    measured = {score for outcome in outcomes for row in outcome.rows[name].values() for score in row}
    return [score for score in EXPERIMENTS[name].shown if score in measured]


def _rows(name: str, outcome: Outcome, shown: Sequence[str], several: bool) -> Iterator[list[str]]:
    for row, scores in outcome.rows[name].items():
        label = f"{outcome.label} · {row}" if several else row
        yield [label, *(_cell(scores[score]) if score in scores else "" for score in shown), _paper(name, outcome, row)]


def _cell(estimate: Estimate) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * number for number in estimate))


def _paper(name: str, outcome: Outcome, row: str) -> str:
    """The paper's value, and the difference of ours to it."""
    published = paper.value(name, outcome.model, row, outcome.dataset, outcome.split, outcome.protocol)
    if published is None or not outcome.complete:
        return ""
    measured = outcome.rows[name][row][paper.DATASETS[outcome.dataset]].value
    return f"{published:.1f} ({100 * measured - published:+.1f})"


def _over_seeds(name: str, outcome: Outcome, shown: Sequence[str]) -> Iterator[list[str]]:
    """Rows that differ in their seed alone as one row: mean and standard deviation over seeds."""
    by_seed: dict[str, list[Mapping[str, Estimate]]] = {}
    for row, scores in outcome.rows[name].items():
        by_seed.setdefault(row.partition(SEED)[0], []).append(scores)
    for row, seeds in by_seed.items():
        if len(seeds) == 1:
            yield [row, *(_cell(seeds[0][score]) for score in shown), ""]
            continue
        columns = [[100 * scores[score].value for scores in seeds] for score in shown]
        cells = [f"{mean(column):.1f} ± {stdev(column):.1f}" for column in columns]
        yield [f"{row} ({len(seeds)} seeds)", *cells, ""]


def _quoted(dataset: str, shown: Sequence[str]) -> Iterator[list[str]]:
    for row, values in paper.QUOTED.items():
        if dataset in values:
            yield [f"{row} (quoted by the paper, not measured)", *[""] * len(shown), f"{values[dataset]:.1f}"]


def curves(name: str, outcomes: Sequence[Outcome], layers: Mapping[str, int]) -> dict[str, Image.Image]:
    """A figure's plots by the names of their files; none for a table. `layers`: number of blocks by a model's label."""
    outcomes = [outcome for outcome in outcomes if name in outcome.rows]
    return {
        ".".join(filter(None, (name, plotted.name, score))): _draw(name, plotted, score, outcomes, layers)
        for plotted in EXPERIMENTS[name].plots
        for score in _shown_scores(name, outcomes)
    }


def _draw(name: str, plotted: Plot, score: str, outcomes: Sequence[Outcome], layers: Mapping[str, int]) -> Image.Image:
    series = {
        f"{outcome.label} · {curve}" if len(outcomes) > 1 else curve: [
            (point.x, outcome.rows[name][point.row][point.score(score)]) for point in points
        ]
        for outcome in outcomes
        for curve, points in plotted.curves(layers[outcome.label]).items()
    }
    return plot(series, title=f"{title(name)}: {score.replace('_', ' ')}", axis=plotted.axis)
