"""Runs on disk: counts of what was measured so far, so that a run can be interrupted, shared and gone on with."""

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
from open_gem.evaluation.metrics import Records
from open_gem.evaluation.protocol import EvalProtocol, name_of
from open_gem.evaluation.run import Counts, ImageScores, gather, measure
from open_gem.evaluation.tasks import SCORES, Dataset
from open_gem.files import digest, to_json, write_file
from open_gem.locate import AnyLocalizer
from open_gem.method.table import Method
from open_gem.trained.localizer import TRAINED

NEEDED = ("open_gem", "dataset", "split", "model", "size_rule", "protocol", "methods")
"""Settings that a run has at least."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What all parts of a run hold together.

    rows    of each method, by what is counted and by image; an image that was measured twice counts once
    done    images that were measured
    failed  images that could not be read, and why; not those that somebody could read after all
    of      how many images the data set had when last measured
    """

    rows: Mapping[str, Mapping[str, Mapping[str, Any]]]
    done: frozenset[str]
    failed: Mapping[str, str]
    of: int

    def counts(self, ids: Collection[str] | None = None) -> dict[str, Counts]:
        """The counts of each method over these images, or over all that were measured."""
        wanted = self.done if ids is None else set(ids)
        return {
            name: {
                what: Records.from_json({image: row for image, row in stored.items() if image in wanted})
                for what, stored in counted.items()
            }
            for name, counted in self.rows.items()
        }


@dataclass(frozen=True)
class Store:
    """The counts of one run in a folder: `run.json`, its settings, and parts that are written whole or not at all.

    Any number of processes and machines may add parts of their own images; together they are one run, to the bit.

    folder    of this run alone: see `at`
    settings  all that decides its numbers, as values that JSON can hold
    """

    folder: Path
    settings: Mapping[str, Any]

    @classmethod
    def at(cls, place: Path, settings: Mapping[str, Any]) -> "Store":
        """The store of a run below `place`, made where there is none: its name has the data set and a hash of the
        settings, so that runs of other settings never meet."""
        store = cls(place / f"{settings['dataset']}-{digest(settings)}", settings)
        try:
            cls.open(store.folder)
        except InputError:
            write_file(store.folder / "run.json", to_json(settings, indent=1).encode())
        return store

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """The store that is there. Raises InputError where there is none."""
        try:
            settings = json.loads((folder / "run.json").read_text("utf-8"))
            lacking = [name for name in NEEDED if name not in settings]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"no run in {str(folder)!r}: {error}") from error
        if lacking:
            raise InputError(f"no run in {str(folder)!r}: its run.json has no {', '.join(lacking)}")
        return cls(folder, settings)

    def add(self, measured: Sequence[ImageScores], of: int) -> None:
        """One part more, of a data set `of` so many images. Raises OutputError."""
        counts = {
            name: {what: records.to_json() for what, records in counted.items()}
            for name, counted in gather(measured).items()
        }
        failed = {one.id: one.error for one in measured if one.error is not None}
        ids = [one.id for one in measured if one.error is None]
        part = {"of": of, "ids": ids, "failed": failed, "counts": counts}
        write_file(self.folder / f"part-{uuid4().hex}.json", to_json(part).encode())

    def read(self) -> Kept:
        """What all parts hold. Raises OutputError, naming it, for one that makes no sense."""
        rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
        done: set[str] = set()
        failed: dict[str, str] = {}
        of = 0
        for path in sorted(self.folder.glob("part-*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
            try:
                part = json.loads(path.read_text("utf-8"))
                done |= set(part["ids"])
                failed |= part["failed"]
                of = int(part["of"])
                for name, counted in part["counts"].items():
                    for what, stored in counted.items():
                        if what.partition("@")[0] not in SCORES:
                            raise ValueError(f"it counts {what!r}, which this version does not know")
                        Records.from_json(stored)
                        for image, row in stored.items():
                            rows[name][what].setdefault(image, row)
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise OutputError(
                    f"cannot read {str(path)!r}: {reason}; remove it to measure its images again"
                ) from error
        order = [name for name in self.settings["methods"] if name in rows]
        left = {image: error for image, error in failed.items() if image not in done}
        return Kept({name: rows[name] for name in order}, frozenset(done), left, of)


PART = 64  # images of a part: what an interruption costs at most


def run(
    store: Store,
    localizer: AnyLocalizer,
    methods: Mapping[str, str | Method],
    dataset: Dataset,
    protocol: EvalProtocol,
    *,
    ids: Collection[str] | None = None,
    progress: Callable[[int], None] = lambda images: None,
    **settings: Any,
) -> None:
    """Measure what of `ids` (by default, all images) the store does not have yet; `settings` as of `measure`.

    Images that could not be read are tried again. Whatever ends this early, what was measured until then is written.
    """
    place = {image: index for index, image in enumerate(dataset.ids)}
    wanted, done = place.keys() if ids is None else ids, store.read().done
    left = [place[image] for image in wanted if image not in done]
    progress(len(wanted) - len(left))
    waiting: list[ImageScores] = []
    try:
        for one in measure(localizer, methods, dataset, left, protocol, **settings):
            waiting.append(one)
            progress(1)
            if len(waiting) == PART:
                part, waiting = waiting, []
                store.add(part, len(place))
    finally:
        if waiting:
            store.add(waiting, len(place))


def shard(ids: Sequence[str], index: int, count: int) -> list[str]:
    """The images of one of `count` shards, by their names alone: the same on a machine that lacks some of them."""
    return [image for image in ids if crc32(image.encode()) % count == index]


def settings_of(
    localizer: AnyLocalizer,
    methods: Mapping[str, Method],
    dataset: Dataset,
    protocol: EvalProtocol,
    analysed: Collection[str] = (),
) -> dict[str, Any]:
    """All that decides the numbers of a run, as values that JSON can hold."""
    answering = protocol.settle(localizer)
    described = {name: value for name, value in answering.describe().items() if name != "method"}
    told = {name: method.describe() for name, method in methods.items()}
    return json.loads(
        to_json(
            {
                "open_gem": open_gem.__version__,
                "dataset": dataset.name,
                "split": dataset.split,
                **described,
                "weights": localizer.fingerprint(),
                "protocol": {"name": name_of(protocol), **protocol.describe()},
                "methods": told or {TRAINED: {}},
                "analysed": sorted(analysed),
            }
        )
    )
