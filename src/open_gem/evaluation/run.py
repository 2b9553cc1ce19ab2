"""Evaluate methods on a data set: each image passes through the model once for all methods, and counts add up.

    counts = evaluate(localizer, {"gem": "gem", "clip": "clip"}, open_dataset("voc2012", root))
    scores(counts["gem"])["mean_iou"]          # an Estimate: value, low, high

`tasks` says what is counted; `store` keeps counts on disk, so that a run can be interrupted, resumed and shared between
machines.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from open_gem.data import PointSample, Sample
from open_gem.errors import DatasetError, ImageError, InputError, NotFiniteError
from open_gem.evaluation.metrics.counts import ImageCounts, Records
from open_gem.evaluation.protocol import EvalProtocol, Variant
from open_gem.evaluation.tasks import Dataset, EvalTask, analyse, tasks_of
from open_gem.localizer import Localizer
from open_gem.locate import AnyLocalizer, Prepared, by_shape
from open_gem.method.run import Encoded
from open_gem.method.table import Method
from open_gem.refine import Refinement

Counts = dict[str, Records]  # of one method, by what is counted

Row = str | Method | Variant
"""What is measured: a name of `METHODS`, a method, or one with something of the protocol changed."""


@dataclass(frozen=True, eq=False)
class ImageScores:
    """The counts of one image.

    rows   by method and by what is counted
    error  why the image could not be read or localized; then there are no rows
    """

    id: str
    rows: dict[str, dict[str, ImageCounts]]
    error: str | None = None


@dataclass(frozen=True, eq=False)
class _PreparedSample:
    """A sample, ready for the model, and its tasks."""

    sample: Sample | PointSample
    prepared: Prepared
    tasks: list[EvalTask]


@dataclass(frozen=True, eq=False)
class _Evaluator:
    """The settings of one `measure`."""

    localizer: AnyLocalizer
    rows: Mapping[str, Row]
    dataset: Dataset
    protocol: EvalProtocol
    analysed: Collection[str]

    @cached_property
    def located_by(self) -> dict[Refinement | None, AnyLocalizer]:
        """The model with each refinement that rows need, the protocol's own first."""
        variants = [row.refinement for row in self.rows.values() if isinstance(row, Variant)]
        refinements = dict.fromkeys([self.protocol.refinement, *filter(None, variants)])
        return {own: replace(self.protocol, refinement=own).settle(self.localizer) for own in refinements}

    @cached_property
    def encoder(self) -> AnyLocalizer:
        """The model that keeps what any row needs: with a refinement, the image itself."""
        refining = [model for refinement, model in self.located_by.items() if refinement is not None]
        return refining[0] if refining else self.located_by[None]

    @cached_property
    def methods(self) -> dict[str, str | Method]:
        """What is encoded, each method once: variants share the label of their method."""
        plain = {label: row for label, row in self.rows.items() if not isinstance(row, Variant)}
        known = {method: label for label, method in plain.items()}
        for label, row in self.rows.items():
            if isinstance(row, Variant):
                known.setdefault(row.method, label)
        return plain | {label: method for method, label in known.items()}

    def prepare(self, index: int) -> _PreparedSample | ImageScores:
        """Prepare one sample; return the error if it cannot be read."""
        sample = self.dataset[index]
        try:
            prepared = self.encoder.prepare(sample.read_image())
            return _PreparedSample(sample, prepared, tasks_of(self.dataset, sample, prepared.original, self.protocol))
        except (ImageError, DatasetError) as error:
            return ImageScores(sample.id, {}, str(error))

    def score(self, group: Sequence[_PreparedSample]) -> Iterator[ImageScores]:
        """Score a group of samples of one shape; a sample for which the model's output is not finite gives the
        error."""
        try:
            encoded = self.encoder.encode([item.prepared for item in group], self.methods, trace=self.analysed)
            scores = [
                ImageScores(item.sample.id, dict(self._rows(item, by_label)))
                for item, by_label in zip(group, encoded, strict=True)
            ]
        except NotFiniteError as error:
            if len(group) == 1:
                yield ImageScores(group[0].sample.id, {}, str(error))
                return
            for item in group:
                yield from self.score([item])
            return
        yield from scores

    def _rows(self, item: _PreparedSample, by_label: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, ImageCounts]]]:
        """Yield what each row's results for one image add to each count."""
        label_of = {method: label for label, method in self.methods.items()}
        for name, row in (self.rows or dict.fromkeys(by_label)).items():
            is_variant = isinstance(row, Variant)
            encoded = by_label[label_of[row.method] if is_variant else name]
            protocol = row.protocol(self.protocol) if is_variant else self.protocol
            yield name, self._counts(item, encoded, protocol, name in self.analysed)

    def _counts(
        self, item: _PreparedSample, encoded: Any, protocol: EvalProtocol, is_analysed: bool
    ) -> dict[str, ImageCounts]:
        """Return what one row's results for one image add to each count."""
        localizer = self.located_by[protocol.refinement]
        # An image with points but without any class that is present counts as seen.
        rows: dict[str, ImageCounts] = {"points": {}} if isinstance(item.sample, PointSample) else {}
        for task in item.tasks:
            rows |= task.count(protocol.rescaled(localizer.locate(encoded, task.vocabulary)), protocol)
        if is_analysed and isinstance(localizer, Localizer) and isinstance(encoded, Encoded):
            project = localizer.backbone.vision.project
            rows |= analyse(self.dataset, item.sample, protocol, encoded, localizer.text, project)
        return rows


def measure(
    localizer: AnyLocalizer,
    methods: Mapping[str, Row],
    dataset: Dataset,
    indices: Sequence[int],
    protocol: EvalProtocol,
    *,
    analysed: Collection[str] = (),
    batch_size: int = 8,
    workers: int = 2,
) -> Iterator[ImageScores]:
    """Evaluate each image of `indices` once, in batches of one shape.

    An image whose file or truth cannot be read, or for which the model's output is not finite, gives its error.

    analysed  methods for which the paper's analysis is wanted too, see `tasks.analyse`
    workers   threads that decode images ahead of the model

    A model that was trained to localize has no methods: its counts go under `TRAINED`.
    """
    evaluator = _Evaluator(localizer, methods, dataset, protocol, analysed)
    chunks = [indices[start : start + 4 * batch_size] for start in range(0, len(indices), 4 * batch_size)]
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(evaluator.prepare, index) for chunk in chunks[:1] for index in chunk]
        for number in range(len(chunks)):
            items = [future.result() for future in ahead]
            ahead = [pool.submit(evaluator.prepare, index) for chunk in chunks[number + 1 :][:1] for index in chunk]
            yield from (item for item in items if isinstance(item, ImageScores))
            samples = [item for item in items if isinstance(item, _PreparedSample)]
            for group in by_shape(samples, lambda item: item.prepared.shape, batch_size):
                yield from evaluator.score(group)


def gather(measured: Iterable[ImageScores]) -> dict[str, Counts]:
    """Return the counts of each method over the images without an error."""
    rows: dict[str, dict[str, dict[str, ImageCounts]]] = defaultdict(lambda: defaultdict(dict))
    for image in measured:
        for method, counted in image.rows.items():
            for what, row in counted.items():
                rows[method][what][image.id] = row
    return {method: {what: Records(by_image) for what, by_image in counted.items()} for method, counted in rows.items()}


def evaluate(
    localizer: AnyLocalizer,
    methods: Mapping[str, Row],
    dataset: Dataset,
    protocol: EvalProtocol = EvalProtocol(),  # noqa: B008 - frozen
    *,
    progress: Callable[[int], None] = lambda images: None,
    **settings: Any,
) -> dict[str, Counts]:
    """Count each method over a whole data set, in memory; `settings` as of `measure`.

    `progress` is called with the number of images that were just finished. Raises ImageError for the first image that
    cannot be read or localized, and InputError for a data set without images.
    """
    if not len(dataset):
        raise InputError(f"{dataset.name} has no images, expected at least one")

    def watched() -> Iterator[ImageScores]:
        for image in measure(localizer, methods, dataset, range(len(dataset)), protocol, **settings):
            if image.error is not None:
                raise ImageError(image.error)
            progress(1)
            yield image

    return gather(watched())
