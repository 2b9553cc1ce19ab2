"""Measure methods on a data set: one loop, one pass of the model an image for all of them, counts that add.

    counts = evaluate(localizer, {"gem": "gem", "clip": "clip"}, open_dataset("voc2012", root))
    scores(counts["gem"])["mean_iou"]          # an Estimate: value, low, high

`tasks` says what is counted; `runs` keeps counts on disk, so that a run can be interrupted anywhere, shared between
machines, and gone on with.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from open_gem.data import PointSample, Sample
from open_gem.errors import DatasetError, ImageError, InputError, NotFiniteError
from open_gem.evaluation.metrics import Records, Row
from open_gem.evaluation.protocol import EvalProtocol
from open_gem.evaluation.tasks import Dataset, EvalTask, analyse, tasks_of
from open_gem.localizer import Localizer
from open_gem.locate import AnyLocalizer, Prepared, by_shape
from open_gem.method.run import Encoded
from open_gem.method.table import Method

Counts = dict[str, Records]  # of one method, by what is counted
Rows = dict[str, dict[str, Row]]  # of one picture, by method and by what is counted


@dataclass(frozen=True, eq=False)
class ImageScores:
    """What one image gave: of each method the rows by what is counted; or why it could not be read or answered."""

    id: str
    rows: Rows
    error: str | None = None


@dataclass(frozen=True, eq=False)
class _Asked:
    """A sample, ready for the model, and what is asked of it."""

    sample: Sample | PointSample
    prepared: Prepared
    tasks: list[EvalTask]

    def rows(self) -> dict[str, Row]:
        """What it counts before any answer: an image with points but no class that is there was seen all the same."""
        return {"points": {}} if isinstance(self.sample, PointSample) else {}


def measure(
    localizer: AnyLocalizer,
    methods: Mapping[str, str | Method],
    dataset: Dataset,
    indices: Sequence[int],
    protocol: EvalProtocol,
    *,
    analysed: Collection[str] = (),
    batch: int = 8,
    workers: int = 2,
) -> Iterator[ImageScores]:
    """Every image of `indices` once, in batches of one shape; one that cannot be read, or whose truth cannot be, or for
    which the model gives no numbers, gives its error.

    Decoding runs ahead in `workers` threads. `analysed`: methods of which the paper's analysis is wanted too, see
    `tasks.analyse`. A model that was trained to localize has no methods: its counts go under `TRAINED`.
    """
    localizer = protocol.settle(localizer)
    chunks = [indices[start : start + 4 * batch] for start in range(0, len(indices), 4 * batch)]
    with ThreadPoolExecutor(workers) as pool:
        prepare = partial(_prepare, localizer, dataset, protocol)
        ahead = [pool.submit(prepare, index) for chunk in chunks[:1] for index in chunk]
        for number in range(len(chunks)):
            ready = [future.result() for future in ahead]
            ahead = [pool.submit(prepare, index) for chunk in chunks[number + 1 : number + 2] for index in chunk]
            yield from (one for one in ready if isinstance(one, ImageScores))
            asked = [one for one in ready if isinstance(one, _Asked)]
            score = partial(_score, localizer, methods, dataset, protocol, analysed)
            for group in by_shape(asked, lambda one: one.prepared.shape, batch):
                yield from _scored(score, group)


def _scored(score: Callable[[Sequence[_Asked]], list[ImageScores]], group: Sequence[_Asked]) -> Iterator[ImageScores]:
    """What a group gave; if the model gives no numbers for one of its images, the error of that one."""
    try:
        scores = score(group)
    except NotFiniteError as error:
        if len(group) == 1:
            yield ImageScores(group[0].sample.id, {}, str(error))
            return
        for one in group:
            yield from _scored(score, [one])
        return
    yield from scores


def _score(
    localizer: AnyLocalizer,
    methods: Mapping[str, str | Method],
    dataset: Dataset,
    protocol: EvalProtocol,
    analysed: Collection[str],
    group: Sequence[_Asked],
) -> list[ImageScores]:
    """What a group of images of one shape gives."""
    encoded = localizer.encode([one.prepared for one in group], methods, trace=analysed)
    return [
        ImageScores(one.sample.id, _rows(localizer, dataset, protocol, one, by_method, analysed))
        for one, by_method in zip(group, encoded, strict=True)
    ]


def _prepare(localizer: AnyLocalizer, dataset: Dataset, protocol: EvalProtocol, index: int) -> _Asked | ImageScores:
    sample = dataset[index]
    try:
        prepared = localizer.prepare(sample.picture())
        return _Asked(sample, prepared, tasks_of(dataset, sample, prepared.size, protocol))
    except (ImageError, DatasetError) as error:
        return ImageScores(sample.id, {}, str(error))


def _rows(
    localizer: AnyLocalizer,
    dataset: Dataset,
    protocol: EvalProtocol,
    asked: _Asked,
    encoded: Mapping[str, Any],
    analysed: Collection[str],
) -> Rows:
    """What is counted of one image's answers to all that is asked of it, by method."""
    rows: Rows = {}
    for name, one in encoded.items():
        rows[name] = asked.rows()
        for task in asked.tasks:
            rows[name] |= task.count(protocol.rescaled(localizer.locate(one, task.vocabulary)))
        if name in analysed and isinstance(localizer, Localizer) and isinstance(one, Encoded):
            project = localizer.backbone.vision.project
            rows[name] |= analyse(dataset, asked.sample, protocol, one, localizer.text, project)
    return rows


def gather(measured: Iterable[ImageScores]) -> dict[str, Counts]:
    """The counts of each method over the pictures that could be read."""
    rows: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for one in measured:
        for name, counted in one.rows.items():
            for what, row in counted.items():
                rows[name][what][one.id] = row
    return {name: {what: Records(some) for what, some in counted.items()} for name, counted in rows.items()}


def evaluate(
    localizer: AnyLocalizer,
    methods: Mapping[str, str | Method],
    dataset: Dataset,
    protocol: EvalProtocol = EvalProtocol(),  # noqa: B008 - frozen
    *,
    progress: Callable[[int], None] = lambda images: None,
    **settings: Any,
) -> dict[str, Counts]:
    """The counts of each method over a whole data set, in memory; `settings` as of `measure`.

    `progress` hears how many images are done. Raises ImageError for the first picture that cannot be read or
    answered, and InputError for a data set without any.
    """
    if not len(dataset):
        raise InputError(f"{dataset.name} has no images, expected at least one")

    def watched() -> Iterator[ImageScores]:
        for one in measure(localizer, methods, dataset, range(len(dataset)), protocol, **settings):
            if one.error is not None:
                raise ImageError(one.error)
            progress(1)
            yield one

    return gather(watched())
