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
    """An experiment as a table: per cent with 95 % intervals, and the paper's values with the difference where it has
    them of the same model, data, split and protocol. Rows of Table 3 that the paper quotes are quoted."""
    experiment = EXPERIMENTS[name]
    mine = [outcome for outcome in outcomes if name in outcome.rows]
    shown = _scores_there(name, mine)
    head = f"## {title(name)}: {experiment.about}\n"
    if not shown:
        data = " and ".join(dict.fromkeys(outcome.dataset for outcome in mine)) or "this data"
        return f"{head}\n{data} has no scores of the kind that this needs: {', '.join(experiment.shown)}.\n"
    rows = [
        row
        for outcome in mine
        for row in (_seeded(name, outcome, shown) if experiment.seeds else _plain(name, outcome, shown, len(mine) > 1))
    ]
    if name == "table3":
        rows += _quoted(mine, shown)
    compared = any(row[-1] for row in rows)
    lines = [["", *shown, "paper"], ["---"] * (len(shown) + 2), *rows]
    return f"{head}\n" + "".join(f"| {' | '.join(line if compared else line[:-1])} |\n" for line in lines)


def _scores_there(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    found = {score for outcome in outcomes for row in outcome.rows[name].values() for score in row}
    return [score for score in EXPERIMENTS[name].shown if score in found]


def _plain(name: str, outcome: Outcome, shown: Sequence[str], several: bool) -> Iterator[list[str]]:
    for row, found in outcome.rows[name].items():
        label = f"{outcome.label} · {row}" if several else row
        yield [label, *(_cell(found[score]) if score in found else "" for score in shown), _paper(name, outcome, row)]


def _cell(estimate: Estimate) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * number for number in estimate))


def _paper(name: str, outcome: Outcome, row: str) -> str:
    """The paper's value, and how much more was measured."""
    known = paper.value(name, outcome.model, row, outcome.dataset, outcome.split, outcome.protocol)
    if known is None or not outcome.complete:
        return ""
    measured = outcome.rows[name][row][paper.DATASETS[outcome.dataset]].value
    return f"{known:.1f} ({100 * measured - known:+.1f})"


def _seeded(name: str, outcome: Outcome, shown: Sequence[str]) -> Iterator[list[str]]:
    """Rows that differ in their seed alone as one: mean and standard deviation over seeds."""
    together: dict[str, list[Mapping[str, Estimate]]] = {}
    for row, found in outcome.rows[name].items():
        together.setdefault(row.partition(SEED)[0], []).append(found)
    for row, some in together.items():
        if len(some) == 1:
            yield [row, *(_cell(some[0][score]) for score in shown), ""]
            continue
        values = [[100 * found[score].value for found in some] for score in shown]
        yield [f"{row} ({len(some)} seeds)", *(f"{mean(one):.1f} ± {stdev(one):.1f}" for one in values), ""]


def _quoted(outcomes: Sequence[Outcome], shown: Sequence[str]) -> Iterator[list[str]]:
    dataset = outcomes[0].dataset
    for row, values in paper.QUOTED.items():
        if dataset in values:
            yield [f"{row} (quoted by the paper, not measured)", *[""] * len(shown), f"{values[dataset]:.1f}"]


def curves(name: str, outcomes: Sequence[Outcome], layers: Mapping[str, int]) -> dict[str, Image.Image]:
    """A figure's pictures by what their files are called; none of a table. `layers`: of each model by its label."""
    mine = [outcome for outcome in outcomes if name in outcome.rows]
    return {
        ".".join(filter(None, (name, drawn.name, score))): _draw(name, drawn, score, mine, layers)
        for drawn in EXPERIMENTS[name].plots
        for score in _scores_there(name, mine)
    }


def _draw(name: str, drawn: Plot, score: str, outcomes: Sequence[Outcome], layers: Mapping[str, int]) -> Image.Image:
    series = {
        f"{outcome.label} · {curve}" if len(outcomes) > 1 else curve: [
            (point.x, outcome.rows[name][point.row][point.score(score)]) for point in points
        ]
        for outcome in outcomes
        for curve, points in drawn.curves(layers[outcome.label]).items()
    }
    return plot(series, title=f"{title(name)}: {score.replace('_', ' ')}", axis=drawn.axis)
