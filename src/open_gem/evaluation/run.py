"""Measure methods on a data set: one loop, one pass of the model an image for all of them, counts that add.

    counts = evaluate(localizer, {"gem": "gem", "clip": "clip"}, open_dataset("voc2012", root))
    scores(counts["gem"])["mean_iou"]          # an Estimate: value, low, high

`questions` says what is counted; `runs` keeps counts on disk, so that a run can be interrupted anywhere, shared between
machines, and gone on with.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from open_gem.data import PointSample, Sample
from open_gem.errors import DatasetError, ImageError, InputError, NotFiniteError
from open_gem.evaluation.metrics import Records, Row
from open_gem.evaluation.protocol import Protocol
from open_gem.evaluation.tasks import Dataset, Question, analyse, questions
from open_gem.images.pixels import size_of
from open_gem.localization import Localization
from open_gem.localizer import Localizer
from open_gem.method.run import Features
from open_gem.method.table import Method
from open_gem.trained.localizer import TrainedLocalizer
from open_gem.views import Tiles

Counts = dict[str, Records]  # of one method, by what is counted
Rows = dict[str, dict[str, Row]]  # of one picture, by method and by what is counted

TRAINED = "as trained"
"""What stands for a method where a model was trained to localize."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What one picture gave: of each method the rows by what is counted; or why it could not be read or answered."""

    id: str
    rows: Rows
    error: str | None = None


@dataclass(frozen=True, eq=False)
class _Ready:
    sample: Sample | PointSample
    picture: Image.Image
    asked: list[Question]
    pixels: Tensor | None  # None where the picture is looked at in several views

    def blank(self) -> dict[str, Row]:
        """What it counts before any answer: a picture with points but no class that is there was seen all the same."""
        return {"points": {}} if isinstance(self.sample, PointSample) else {}


def measure(
    localizer: Localizer | TrainedLocalizer,
    methods: Mapping[str, str | Method],
    dataset: Dataset,
    indices: Sequence[int],
    protocol: Protocol,
    *,
    analysed: Collection[str] = (),
    batch: int = 8,
    workers: int = 2,
) -> Iterator[Measured]:
    """Every picture of `indices` once, in batches of one shape; one that cannot be read, or whose truth cannot be,
    or for which the model gives no numbers, gives its error.

    Decoding runs ahead in `workers` threads. `analysed`: methods of which the paper's analysis is wanted too, see
    `questions.analyse`. A model that was trained to localize has no methods: `TRAINED` then.
    """
    localizer = protocol.settle(localizer)
    chunks = [indices[start : start + 4 * batch] for start in range(0, len(indices), 4 * batch)]
    with ThreadPoolExecutor(workers) as pool:
        prepare = partial(_prepare, localizer, dataset, protocol)
        ahead = [pool.submit(prepare, index) for chunk in chunks[:1] for index in chunk]
        for number in range(len(chunks)):
            ready = [future.result() for future in ahead]
            ahead = [pool.submit(prepare, index) for chunk in chunks[number + 1 : number + 2] for index in chunk]
            yield from (one for one in ready if isinstance(one, Measured))
            for group in _by_shape([one for one in ready if isinstance(one, _Ready)], batch):
                if isinstance(localizer, TrainedLocalizer):
                    find = partial(_measure_trained, localizer, protocol)
                else:
                    find = partial(_measure_group, localizer, methods, dataset, protocol, analysed)
                yield from _measured(find, group)


def _measured(find: Callable[[Sequence[_Ready]], list[Rows]], group: Sequence[_Ready]) -> Iterator[Measured]:
    """What a group gave; where that is no number for one of its pictures, the error of that one."""
    try:
        found = find(group)
    except NotFiniteError as error:
        if len(group) == 1:
            yield Measured(group[0].sample.id, {}, str(error))
            return
        for one in group:
            yield from _measured(find, [one])
        return
    yield from (Measured(one.sample.id, rows) for one, rows in zip(group, found, strict=True))


def _prepare(
    localizer: Localizer | TrainedLocalizer, dataset: Dataset, protocol: Protocol, index: int
) -> _Ready | Measured:
    sample = dataset[index]
    try:
        picture = sample.picture()
        asked = questions(dataset, sample, size_of(picture), protocol)
        if isinstance(localizer, Localizer) and localizer.views.is_plain:
            return _Ready(sample, picture, asked, localizer.pixels(picture))
        return _Ready(sample, picture, asked, None)
    except (ImageError, DatasetError) as error:
        return Measured(sample.id, {}, str(error))


def _by_shape(ready: Sequence[_Ready], batch: int) -> Iterator[list[_Ready]]:
    groups: dict[Any, list[_Ready]] = defaultdict(list)
    for one in ready:
        groups[one.sample.id if one.pixels is None else one.pixels.shape].append(one)
    for group in groups.values():
        yield from (group[start : start + batch] for start in range(0, len(group), batch))


def _measure_trained(localizer: TrainedLocalizer, protocol: Protocol, group: Sequence[_Ready]) -> list[Rows]:
    found: list[Rows] = []
    for one in group:
        rows = one.blank()
        for question in one.asked:
            rows |= question.count(_by_protocol(localizer(one.picture, question.vocabulary), protocol, one.picture))
        found.append({TRAINED: rows})
    return found


def _measure_group(
    localizer: Localizer,
    methods: Mapping[str, str | Method],
    dataset: Dataset,
    protocol: Protocol,
    analysed: Collection[str],
    group: Sequence[_Ready],
) -> list[Rows]:
    pixels = [one.pixels for one in group if one.pixels is not None]
    seen = (
        localizer.read(torch.stack(pixels), methods, trace=analysed)
        if pixels
        else localizer.look(group[0].picture, methods)
    )
    found: list[Rows] = [{} for _ in group]
    for name, features in seen.items():
        for index, one in enumerate(group):
            alone = features.image(index) if isinstance(features, Features) else features
            rows = found[index][name] = _answers(localizer, protocol, one, alone)
            if name in analysed and isinstance(alone, Features):
                project = localizer.backbone.project
                rows |= analyse(dataset, one.sample, protocol, alone, localizer.text, project)
    return found


def _answers(localizer: Localizer, protocol: Protocol, one: _Ready, seen: Features | Tiles) -> dict[str, Row]:
    """What is counted of one picture's answers to all that is asked of it."""
    rows = one.blank()
    for question in one.asked:
        [found] = localizer.locate(seen, question.vocabulary, [size_of(one.picture)])
        rows |= question.count(_by_protocol(found, protocol, one.picture))
    return rows


def _by_protocol(found: Localization, protocol: Protocol, picture: Image.Image) -> Localization:
    scale = found.logit_scale if None in (protocol.logit_scale, found.logit_scale) else protocol.logit_scale
    answer = replace(found, logit_scale=scale)
    return answer if protocol.refinement is None else answer.refined(picture, protocol.refinement)


def gather(measured: Iterable[Measured]) -> dict[str, Counts]:
    """The counts of each method over the pictures that could be read."""
    rows: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for one in measured:
        for name, counted in one.rows.items():
            for what, row in counted.items():
                rows[name][what][one.id] = row
    return {name: {what: Records(some) for what, some in counted.items()} for name, counted in rows.items()}


def evaluate(
    localizer: Localizer | TrainedLocalizer,
    methods: Mapping[str, str | Method],
    dataset: Dataset,
    protocol: Protocol = Protocol(),  # noqa: B008 - frozen
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

    def watched() -> Iterator[Measured]:
        for one in measure(localizer, methods, dataset, range(len(dataset)), protocol, **settings):
            if one.error is not None:
                raise ImageError(one.error)
            progress(1)
            yield one

    return gather(watched())
