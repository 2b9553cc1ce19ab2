"""Stored runs with their scores, and the paper's values for the same setting."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from open_gem.checks import did_you_mean, listed
from open_gem.errors import InputError
from open_gem.evaluation.store import Store
from open_gem.evaluation.tasks import Estimate, differences, scores
from open_gem.files import digest, to_json
from open_gem.method.table import METHODS
from open_gem.paper import numbers

Scores = Mapping[str, Mapping[str, Estimate]]
"""By method or row, then by score."""

LABELS: Mapping[str, str] = {
    "mean_iou": "mIoU",
    "class_pooled": "point IoU",
    "pointing_game": "pointing game",
    "mask_iou": "mask IoU",
    "mask_boundary_iou": "mask boundary IoU",
    "box_iou": "box IoU",
    "boundary_iou": "boundary IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "weighted IoU",
    "top1": "top-1",
    "image_mean": "point IoU by image",
    "pair_mean": "point IoU by pair",
    "micro": "point IoU, pooled",
    "point_accuracy": "point accuracy",
    "patch_similarity": "patch similarity",
    "object_contrast": "object contrast",
    "text_contrast": "text contrast",
}
"""Names of scores for people, the most important first."""

TABLE_3 = {"clip": "CLIP", "maskclip": "MaskCLIP", "clip_surgery": "CLIPSurgery", "gem": "GEM"}
"""Method → its row of Table 3; other rows have the name of the method."""


@dataclass(frozen=True, eq=False)
class Run:
    """The scores of a run over some of its images.

    folder    name of its folder
    settings  see `evaluation.store.settings_of`
    images    number of images that count
    failed    images that could not be read, and why
    total     number of images of the split
    scores    of each method; with `against`, their differences to those of that method on the same images
    against   name of that method, as `name_of` gives it
    """

    folder: str
    settings: Mapping[str, Any]
    images: int
    failed: Mapping[str, str]
    total: int
    scores: Scores
    against: str | None = None

    @property
    def dataset(self) -> str:
        return self.settings["dataset"]

    @property
    def split(self) -> str:
        return self.settings["split"]

    @property
    def model(self) -> str:
        return self.settings["model"]

    @property
    def protocol(self) -> str:
        """Name of the protocol."""
        return self.settings["protocol"]["name"]

    def name_of(self, method: str) -> str:
        """Return the name of a method of this run, for people. `reproduce` stores methods by the hash of their
        settings: these become a description, such as "gem, iterations 0"."""
        settings = self.settings["methods"][method]
        return _description(settings) if method == digest(settings) else method

    def is_tuned(self, method: str) -> bool:
        """Return True if a method of this run has other settings than the row of `METHODS` with its name."""
        settings = self.settings["methods"][method]
        return settings != _usual().get(self.name_of(method), settings)

    def title_of(self, method: str) -> str:
        """Return the name of a method, marked if it is tuned."""
        return self.name_of(method) + (" (tuned)" if self.is_tuned(method) else "")

    def published(self, table: str, row: str) -> float | None:
        """Return the paper's value for this setting, in per cent; None if it has none, or if images of the split are
        missing: then values are not comparable."""
        if self.against is not None or self.images < self.total:
            return None
        return numbers.value(table, self.model, row, self.dataset, self.split, self.protocol)

    def published_of(self, method: str) -> float | None:
        """Return the value of Table 3 for a method of this run, if its settings are the usual ones."""
        name = self.name_of(method)
        return None if self.is_tuned(method) else self.published("table3", TABLE_3.get(name, name))

    def documents(self) -> Iterator[dict[str, Any]]:
        """Yield each method with its scores as values that JSON can hold; a score without a value is null."""
        for method, row in self.scores.items():
            numbers = {
                name: {part: None if math.isnan(number) else number for part, number in estimate._asdict().items()}
                for name, estimate in row.items()
            }
            document = {
                "dataset": self.dataset,
                "split": self.split,
                "images": self.images,
                "failed": len(self.failed),
                "total": self.total,
                "model": self.model,
                "protocol": self.protocol,
                "size": self.settings["size_rule"],
                "run": self.folder,
                "method": self.name_of(method),
                "tuned": self.is_tuned(method),
                "scores": numbers,
            }
            yield document if self.against is None else document | {"against": self.against}


def read_run(store: Store, ids: Collection[str] | None = None, against: str | None = None) -> Run:
    """Read a stored run, over these images or over all that were measured so far.

    With `against`, the name of a method, the differences of all others to it; no scores if the run does not have it.
    """
    results = store.read()
    done = results.done if ids is None else results.done.intersection(ids)
    failed = {image: why for image, why in results.failed.items() if ids is None or image in set(ids)}
    run, counts = Run(store.folder.name, store.settings, len(done), failed, results.total, {}), results.counts(ids)
    if against is None:
        return replace(run, scores={method: scores(counted) for method, counted in counts.items()})
    reference = next((method for method in counts if run.name_of(method) == against), None)
    if reference is None:
        return run
    other = counts.pop(reference)
    measured = {method: differences(counted, other) for method, counted in counts.items()}
    return replace(run, scores=measured, against=run.title_of(reference))


def collect(folder: Path, against: str | None = None) -> list[Run]:
    """Return all runs in or below a folder that have scores; with `against`, see `read_run`. Raises InputError for
    none."""
    stores = [Store.open(path.parent) for path in sorted(folder.rglob("run.json"))]
    runs = [read_run(store, against=against) for store in stores]
    names = {run.name_of(method) for run in runs for method in run.settings["methods"]}
    if runs and against is not None and against not in names:
        raise InputError(
            f"no run has method {against!r}{did_you_mean(against, names)}, expected one of {listed(sorted(names))}"
        )
    with_scores = [run for run in runs if run.scores]
    if runs and not with_scores and against is not None:
        raise InputError(f"no run below {str(folder)!r} has counts of {against!r} and of another method")
    if not with_scores:
        what = f"{len(runs)} runs without any counts" if runs else "no runs"
        raise InputError(
            f"{what} in {str(folder)!r}, expected folders with a run.json and parts, as open-gem evaluate makes them"
        )
    return with_scores


def _description(settings: Mapping[str, Any]) -> str:
    """Return the known method with the fewest different settings, and these settings."""
    changed = {name: [key for key in settings if settings[key] != usual.get(key)] for name, usual in _usual().items()}
    name = min(changed, key=lambda name: len(changed[name]))
    return ", ".join([name, *(f"{key} {settings[key]}" for key in changed[name])])


@cache
def _usual() -> Mapping[str, Mapping[str, Any]]:
    """Return the settings of all known methods, as read from JSON."""
    return {name: json.loads(to_json(method.describe())) for name, method in METHODS.items()}
