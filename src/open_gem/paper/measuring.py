"""What experiments need of a model and a data set, from one pass over the data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_gem.errors import InputError
from open_gem.evaluation.protocol import PROTOCOLS, EvalProtocol, name_of
from open_gem.evaluation.store import Store, run, settings_of
from open_gem.evaluation.tasks import Dataset, Estimate, scores
from open_gem.files import digest
from open_gem.locate import AnyLocalizer
from open_gem.method.table import Method
from open_gem.paper.numbers import GROUPVIT, MODELS
from open_gem.paper.rows import EXPERIMENTS
from open_gem.trained.localizer import TRAINED

Scores = Mapping[str, Mapping[str, Estimate]]  # of each row of an experiment, each score


class Job(NamedTuple):
    """One pass over one split with one model, for all experiments that want it: `model` of `paper.MODELS`, or None for
    the one that was asked for."""

    model: str | None
    split: str | None
    experiments: tuple[str, ...]


def jobs(names: Sequence[str], own: bool, splits: Sequence[str], split: str | None) -> list[Job]:
    """What has to be run for these experiments: on one's `own` model only, or on all that the paper has in them.

    `splits` are those that the data set has, `split` the one asked for; else each experiment's own, where it is there.
    """
    wanted: dict[tuple[str | None, str | None], list[str]] = {}
    for name in names:
        experiment = EXPERIMENTS[name]
        chosen = split or (experiment.split if experiment.split in splits else None)
        for model in (None,) if own else experiment.models:
            wanted.setdefault((model, chosen), []).append(name)
    return [Job(*key, tuple(some)) for key, some in wanted.items()]


class Outcome(NamedTuple):
    """What one job gave.

    model     as runs call it; `label` for people
    counted   how many images count, and how many of them were asked for; `of` all that the split has
    failed    images that could not be read, and why
    rows      of each experiment, the scores of each row
    """

    model: str
    label: str
    dataset: str
    split: str
    protocol: str
    counted: int
    asked: int
    of: int
    failed: Mapping[str, str]
    rows: Mapping[str, Scores]

    @property
    def complete(self) -> bool:
        """Whether every image of the split counts: only then the paper's values are of the same thing."""
        return self.counted == self.of


def union(names: Sequence[str], layers: int) -> dict[str, Method]:
    """Every method that these experiments need of a model, once, by a hash of its settings: in any order the same."""
    needed = {method for name in names for method in EXPERIMENTS[name].rows(layers).values()}
    return dict(sorted((digest(method.describe()), method) for method in needed))


def reproduce(
    names: Sequence[str],
    localizer: AnyLocalizer,
    dataset: Dataset,
    place: Path,
    *,
    protocol: EvalProtocol = PROTOCOLS["paper"],
    label: str | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda images: None,
    **settings: Any,
) -> Outcome:
    """The scores of every row of each experiment on one model and data set, from one pass over the data.

    A model that was trained to localize has one row in each, `TRAINED`. Counts are kept below `place`, as `runs.run`
    does; `settings` as of `evaluate.measure`. Raises InputError where no image could be read.
    """
    layers = localizer.layers
    methods = union(names, layers) if layers else {}
    analysed = () if not layers else tuple(union([name for name in names if EXPERIMENTS[name].analysis], layers))
    ids = dataset.ids[:limit]
    store = Store.at(place, settings_of(localizer, methods, dataset, protocol, analysed))
    run(store, localizer, methods, dataset, protocol, ids=ids, progress=progress, analysed=analysed, **settings)
    kept = store.read()
    failed = {image: error for image, error in kept.failed.items() if image in set(ids)}
    if not kept.done.intersection(ids):
        raise InputError(f"none of {len(ids)} images of {dataset.name} could be read: {next(iter(failed.values()))}")
    found = {name: scores(counts) for name, counts in kept.counts(ids).items()}
    return Outcome(
        localizer.name,
        label or localizer.name,
        dataset.name,
        dataset.split,
        name_of(protocol),
        len(kept.done.intersection(ids)),
        len(ids),
        len(dataset),
        failed,
        {
            name: {TRAINED: found[TRAINED]}
            if not layers
            else {row: found[digest(method.describe())] for row, method in EXPERIMENTS[name].rows(layers).items()}
            for name in names
        },
    )


def load_of(label: str) -> tuple[str, str | None, bool]:
    """Name and tag of a model of the paper, and whether it was trained to localize."""
    model = MODELS[label]
    return model.name, model.pretrained, label == GROUPVIT
