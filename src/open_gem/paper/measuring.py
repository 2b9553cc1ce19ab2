"""The inputs of experiments from a model and a data set, by one pass over the data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from open_gem.errors import InputError
from open_gem.evaluation.protocol import PROTOCOLS, EvalProtocol, Variant
from open_gem.evaluation.store import Store, run, settings_of
from open_gem.evaluation.tasks import Dataset, differences
from open_gem.files import digest
from open_gem.locate import AnyLocalizer
from open_gem.method.table import Method
from open_gem.paper.rows import ADDED, EXPERIMENTS
from open_gem.paper.runs import Run, Scores, read_run


class Job(NamedTuple):
    """One pass over one split with one model, for all experiments that need it.

    model  a key of `paper.MODELS`, or None for the user's own
    """

    model: str | None
    split: str | None
    experiments: tuple[str, ...]


def jobs(names: Sequence[str], own: bool, splits: Sequence[str], split: str | None) -> list[Job]:
    """Return the jobs that these experiments need.

    own     on the user's own model only, otherwise on all models that the paper has in them
    splits  those of the data set
    split   the one to use; None: each experiment's own, if the data set has it
    """
    needed: dict[tuple[str | None, str | None], list[str]] = {}
    for name in names:
        experiment = EXPERIMENTS[name]
        chosen = split or (experiment.split if experiment.split in splits else None)
        for model in (None,) if own else experiment.models:
            needed.setdefault((model, chosen), []).append(name)
    return [Job(*key, tuple(experiments)) for key, experiments in needed.items()]


class Outcome(NamedTuple):
    """The results of one job.

    label      the model's name for people
    layers     number of blocks of the model; 0 for one that was trained to localize
    run        its scores, by method
    rows       by experiment: the scores of each row
    changes    by experiment: the differences of rows to those that they add to
    """

    label: str
    layers: int
    run: Run
    rows: Mapping[str, Scores]
    changes: Mapping[str, Scores] = MappingProxyType({})


def analysed_in(names: Sequence[str], layers: int) -> tuple[str, ...]:
    """Return the rows of these experiments that need the paper's analysis."""
    return tuple(union([name for name in names if EXPERIMENTS[name].analysis], layers)) if layers else ()


def union(names: Sequence[str], layers: int) -> dict[str, Method | Variant]:
    """Return every method that these experiments need, once, by a hash of its settings, sorted by it."""
    needed = {method for name in names for method in EXPERIMENTS[name].rows(layers).values()}
    return dict(sorted((digest(method.describe()), method) for method in needed))


def reproduce(
    names: Sequence[str],
    localizer: AnyLocalizer,
    dataset: Dataset,
    folder: Path,
    *,
    protocol: EvalProtocol = PROTOCOLS["paper"],
    label: str | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda images: None,
    **settings: Any,
) -> Outcome:
    """Measure every row of each experiment on one model and data set, from one pass over the data.

    A model that was trained to localize has one row in each, `TRAINED`. Counts are stored below `folder`; `settings` as
    of `evaluation.run.measure`. Raises InputError if no image could be read.
    """
    layers = localizer.layers
    methods = union(names, layers) if layers else {}
    analysed = analysed_in(names, layers)
    ids = dataset.ids[:limit]
    store = Store.at(folder, settings_of(localizer, methods, dataset, protocol, analysed))
    run(store, localizer, methods, dataset, protocol, ids=ids, progress=progress, analysed=analysed, **settings)
    measured = read_run(store, ids)
    if not measured.images:
        reason = next(iter(measured.failed.values()))
        raise InputError(f"none of {len(ids)} images of {dataset.name} could be read: {reason}")
    rows: dict[str, Scores] = dict.fromkeys(names, measured.scores)
    changes: dict[str, Scores] = {}
    for name in names if layers else ():
        places = {row: digest(method.describe()) for row, method in EXPERIMENTS[name].rows(layers).items()}
        rows[name] = {row: measured.scores[place] for row, place in places.items()}
        if EXPERIMENTS[name].added:
            counts = store.read().counts(ids)
            alone = {row: places[row.partition(ADDED)[0]] for row in places}
            changes[name] = {
                row: differences(counts[place], counts[alone[row]])
                for row, place in places.items()
                if place != alone[row]
            }
    return Outcome(label or localizer.name, layers, measured, rows, changes)
