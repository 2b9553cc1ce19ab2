"""Runs on disk: counts of what was measured so far, so that a run can be interrupted, shared and gone on with."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import open_gem
from open_gem.errors import InputError, OutputError
from open_gem.evaluate import TRAINED, Counts, Dataset, Measured, gather, measure
from open_gem.files import digest, write_file
from open_gem.localizer import Localizer
from open_gem.methods import Pathway
from open_gem.metrics import Records
from open_gem.protocols import Protocol, name_of
from open_gem.trained import TrainedLocalizer


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
        if not (store.folder / "run.json").exists():
            write_file(store.folder / "run.json", json.dumps(settings, indent=1).encode())
        return store

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """The store that is there. Raises InputError where there is none."""
        try:
            return cls(folder, json.loads((folder / "run.json").read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"no run in {str(folder)!r}: {error}") from error

    def add(self, measured: Sequence[Measured]) -> None:
        """One part more. Raises OutputError."""
        counts = {
            name: {what: records.to_json() for what, records in counted.items()}
            for name, counted in gather(measured).items()
        }
        failed = {one.id: one.error for one in measured if one.error is not None}
        part = {"indices": [one.index for one in measured], "failed": failed, "counts": counts}
        name = f"part-{measured[0].index:07d}-{uuid4().hex[:8]}.json"
        write_file(self.folder / name, json.dumps(part).encode())

    def parts(self) -> list[dict[str, Any]]:
        """All parts. Raises OutputError for one that cannot be read."""
        found = []
        for path in sorted(self.folder.glob("part-*.json")):
            try:
                found.append(json.loads(path.read_text("utf-8")))
            except (OSError, ValueError) as error:
                raise OutputError(
                    f"cannot read {str(path)!r}: {error}; remove it to measure its images again"
                ) from error
        return found

    def done(self) -> set[int]:
        """The indices of the images that are in some part."""
        return {index for part in self.parts() for index in part["indices"]}

    def failed(self) -> dict[str, str]:
        """The images that could not be read, and why."""
        return {image: error for part in self.parts() for image, error in part["failed"].items()}

    def counts(self) -> dict[str, Counts]:
        """The counts of each pathway over all parts. An image that two processes have measured counts once."""
        rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
        for part in self.parts():
            for name, counted in part["counts"].items():
                for what, stored in counted.items():
                    rows[name][what] = stored | rows[name][what]  # who was first stays
        order = [name for name in self.settings["pathways"] if name in rows]
        return {name: {what: Records.from_json(some) for what, some in rows[name].items()} for name in order}


PART = 64  # images of a part: what an interruption costs at most


def run(
    store: Store,
    localizer: Localizer | TrainedLocalizer,
    pathways: Mapping[str, str | Pathway],
    dataset: Dataset,
    protocol: Protocol,
    *,
    indices: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda images: None,
    **settings: Any,
) -> None:
    """Measure what of `indices` (by default, all) is in no part of the store yet; `settings` as of `measure`.

    Whatever ends this early, what was measured until then is written.
    """
    done = store.done()
    wanted = range(len(dataset)) if indices is None else indices
    left = [index for index in wanted if index not in done]
    progress(len(wanted) - len(left))
    waiting: list[Measured] = []
    try:
        for one in measure(localizer, pathways, dataset, left, protocol, **settings):
            waiting.append(one)
            progress(1)
            if len(waiting) == PART:
                part, waiting = waiting, []
                store.add(part)
    finally:
        if waiting:
            store.add(waiting)


def settings_of(
    localizer: Localizer | TrainedLocalizer, pathways: Mapping[str, Pathway], dataset: Dataset, protocol: Protocol
) -> dict[str, Any]:
    """All that decides the numbers of a run, as values that JSON can hold."""
    answering = protocol.settle(localizer)
    described = {name: value for name, value in answering.describe().items() if name != "pathway"}
    model = localizer.model if isinstance(localizer, TrainedLocalizer) else localizer.backbone
    told = {name: pathway.describe() for name, pathway in pathways.items()}
    return json.loads(
        json.dumps(
            {
                "open_gem": open_gem.__version__,
                "dataset": dataset.name,
                "split": dataset.split,
                **described,
                "weights": model.fingerprint(),
                "protocol": {"name": name_of(protocol), **protocol.describe()},
                "pathways": told or {TRAINED: {}},
            }
        )
    )
