"""Runs on disk: the counts so far, so that a run can be interrupted, resumed and shared between machines."""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import open_gem
from open_gem.errors import InputError, OutputError
from open_gem.evaluation.metrics.counts import Records
from open_gem.evaluation.protocol import EvalProtocol, Variant, name_of
from open_gem.evaluation.run import Counts, ImageScores, Row, gather, measure
from open_gem.evaluation.tasks import SCORES, Dataset
from open_gem.files import digest, to_json, write_file
from open_gem.locate import AnyLocalizer
from open_gem.method.table import Method
from open_gem.trained.localizer import TRAINED

REQUIRED = ("open_gem", "dataset", "split", "model", "size_rule", "protocol", "methods")
"""Settings that every run has."""


@dataclass(frozen=True, eq=False)
class RunResults:
    """The combined contents of all parts of a run.

    rows    by method, by what is counted and by image; an image that was measured twice counts once
    done    images that were measured
    failed  images that could not be read, and why; an image that another process could read is not among them
    total   number of images that the data set had when it was last measured
    """

    rows: Mapping[str, Mapping[str, Mapping[str, Any]]]
    done: frozenset[str]
    failed: Mapping[str, str]
    total: int

    def counts(self, ids: Collection[str] | None = None) -> dict[str, Counts]:
        """Return the counts of each method over these images, or over all that were measured."""
        wanted = self.done if ids is None else set(ids)
        return {
            method: {
                what: Records.from_json({image: row for image, row in stored.items() if image in wanted})
                for what, stored in counted.items()
            }
            for method, counted in self.rows.items()
        }


@dataclass(frozen=True)
class Store:
    """The counts of one run in a folder: its settings (`run.json`), and parts, each written atomically.

    Any number of processes and machines may add parts with their own images; together they give the same numbers as one
    process, to the bit.

    folder    of this run alone: see `at`
    settings  everything that decides its numbers, as values that JSON can hold
    """

    folder: Path
    settings: Mapping[str, Any]

    @classmethod
    def at(cls, place: Path, settings: Mapping[str, Any]) -> "Store":
        """Return the store of a run below `place`, created if it does not exist. Its name has the data set and a hash
        of the settings, so that runs with different settings are stored separately."""
        store = cls(place / f"{settings['dataset']}-{digest(settings)}", settings)
        try:
            cls.open(store.folder)
        except InputError:
            write_file(store.folder / "run.json", to_json(settings, indent=1).encode())
        return store

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Open the store in `folder`. Raises InputError if there is none."""
        try:
            settings = json.loads((folder / "run.json").read_text("utf-8"))
            missing = [name for name in REQUIRED if name not in settings]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"no run in {str(folder)!r}: {error}") from error
        if missing:
            raise InputError(f"no run in {str(folder)!r}: its run.json has no {', '.join(missing)}")
        return cls(folder, settings)

    def add(self, measured: Sequence[ImageScores], total: int) -> None:
        """Write one more part, from a data set of `total` images. Raises OutputError."""
        counts = {
            method: {what: records.to_json() for what, records in counted.items()}
            for method, counted in gather(measured).items()
        }
        failed = {image.id: image.error for image in measured if image.error is not None}
        ids = [image.id for image in measured if image.error is None]
        part = {"of": total, "ids": ids, "failed": failed, "counts": counts}
        write_file(self.folder / f"part-{uuid4().hex}.json", to_json(part).encode())

    def read(self) -> RunResults:
        """Read all parts. Raises OutputError that names a part that cannot be read."""
        rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
        done: set[str] = set()
        failed: dict[str, str] = {}
        total = 0
        for path in sorted(self.folder.glob("part-*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
            try:
                part = json.loads(path.read_text("utf-8"))
                done |= set(part["ids"])
                failed |= part["failed"]
                total = int(part["of"])
                for method, counted in part["counts"].items():
                    for what, stored in counted.items():
                        if what.partition("@")[0] not in SCORES:
                            raise ValueError(f"it counts {what!r}, which this version does not know")
                        Records.from_json(stored)
                        for image, row in stored.items():
                            rows[method][what].setdefault(image, row)
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise OutputError(
                    f"cannot read {str(path)!r}: {reason}; remove it to measure its images again"
                ) from error
        ordered = {method: rows[method] for method in self.settings["methods"] if method in rows}
        still_failed = {image: error for image, error in failed.items() if image not in done}
        return RunResults(ordered, frozenset(done), still_failed, total)


PART = 64  # images of a part: the most that an interruption can lose


def run(
    store: Store,
    localizer: AnyLocalizer,
    methods: Mapping[str, Row],
    dataset: Dataset,
    protocol: EvalProtocol,
    *,
    ids: Collection[str] | None = None,
    progress: Callable[[int], None] = lambda images: None,
    **settings: Any,
) -> None:
    """Measure those of `ids` (by default all images) that the store does not have yet; `settings` as of `measure`.

    Images that could not be read are tried again. Results so far are written even if this ends early.
    """
    index_of = {image: index for index, image in enumerate(dataset.ids)}
    wanted, done = index_of.keys() if ids is None else ids, store.read().done
    remaining = [index_of[image] for image in wanted if image not in done]
    progress(len(wanted) - len(remaining))
    unwritten: list[ImageScores] = []
    try:
        for image in measure(localizer, methods, dataset, remaining, protocol, **settings):
            unwritten.append(image)
            progress(1)
            if len(unwritten) == PART:
                part, unwritten = unwritten, []
                store.add(part, len(index_of))
    finally:
        if unwritten:
            store.add(unwritten, len(index_of))


def shard(ids: Sequence[str], index: int, count: int) -> list[str]:
    """Return the images of one of `count` shards, decided by their ids alone: the same on a machine that lacks some
    images."""
    return [image for image in ids if crc32(image.encode()) % count == index]


def settings_of(
    localizer: AnyLocalizer,
    methods: Mapping[str, Method | Variant],
    dataset: Dataset,
    protocol: EvalProtocol,
    analysed: Collection[str] = (),
) -> dict[str, Any]:
    """Return everything that decides the numbers of a run, as values that JSON can hold."""
    described = protocol.settle(localizer).describe()
    described.pop("method", None)
    return json.loads(
        to_json(
            {
                "open_gem": open_gem.__version__,
                "dataset": dataset.name,
                "split": dataset.split,
                **described,
                "weights": localizer.fingerprint(),
                "protocol": {"name": name_of(protocol), **protocol.describe()},
                "methods": {name: method.describe() for name, method in methods.items()} or {TRAINED: {}},
                "analysed": sorted(analysed),
            }
        )
    )
