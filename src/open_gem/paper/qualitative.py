"""The paper's figures without numbers: clusterings, methods side by side, and where GEM fails."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_gem.data import IGNORE, PointSample, Sample, Segmentation
from open_gem.errors import DatasetError, ImageError, InputError
from open_gem.evaluation.metrics.points import point_counts
from open_gem.evaluation.protocol import EvalProtocol
from open_gem.evaluation.tasks import Dataset
from open_gem.images.draw import overlay
from open_gem.images.sheet import contact_sheet
from open_gem.localization import Localization
from open_gem.locate import AnyLocalizer
from open_gem.paper.clustering import random_vectors
from open_gem.paper.figures import clustering_figure

METHODS = ("clip", "maskclip", "clip_surgery", "gem")
CLASSES = 2  # shown of each image
SEARCHED, FAILURES = 64, 6  # images in which failures are searched for, and number of failures shown


class NamedImage(NamedTuple):
    """An image and the names of its classes, each with a function that says how well a mask `(y, x)` fits: 0 to 1."""

    image: Image.Image
    fits: Mapping[str, Callable[[Tensor], float]]


def named_images(dataset: Dataset, indices: Sequence[int]) -> Iterator[NamedImage]:
    """Yield the images that can be read and show at least one named class."""
    for index in indices:
        sample = dataset[index]
        try:
            named = NamedImage(sample.read_image(), _fits(dataset, sample))
        except (ImageError, DatasetError):  # reported by the evaluation
            continue
        if named.fits:
            yield named


def _fits(dataset: Dataset, sample: Sample | PointSample) -> dict[str, Callable[[Tensor], float]]:
    """Return the present classes by name; the largest first if sizes are known."""
    if isinstance(sample, PointSample):
        xy, of, yes = (torch.from_numpy(values) for values in (sample.xy, sample.of, sample.yes))
        return {
            sample.names[index]: lambda mask, index=index: _iou(
                *point_counts(mask, xy[of == index], yes[of == index])[:3]
            )
            for index in sample.positive
        }
    assert isinstance(dataset, Segmentation)
    label_of = dict(zip(dataset.foreground, dataset.vocabulary().labels, strict=True))
    labels = torch.from_numpy(sample.labels())
    present, counts = np.unique(labels.numpy(), return_counts=True)
    largest = present[np.argsort(-counts, kind="stable")].tolist()

    def fit(mask: Tensor, index: int) -> float:
        counted = mask & (labels != IGNORE) if dataset.background is not None else mask
        hits = int((counted & (labels == index)).sum())
        return _iou(hits, int(counted.sum()) - hits, int((labels == index).sum()) - hits)

    return {label_of[index]: lambda mask, index=index: fit(mask, index) for index in largest if index in label_of}


def _iou(hits: float, false: float, missed: float) -> float:
    return hits / max(hits + false + missed, 1)


def _locate(
    localizer: AnyLocalizer, image: Image.Image, labels: Sequence[str], methods: Sequence[str] = METHODS
) -> dict[str, Localization]:
    encoded = localizer.encode(image, methods)
    return {method: localizer.locate(encoded[method], labels) for method in methods}


def qualitative(
    localizer: AnyLocalizer, dataset: Dataset, protocol: EvalProtocol, *, first: int = 0, count: int = 4
) -> Image.Image:
    """Draw the classes of some images, by four methods side by side, a row for each class."""
    localizer, panels = protocol.settle(localizer), []
    for named in named_images(dataset, range(len(dataset))[first : first + count]):
        labels = list(named.fits)[:CLASSES]
        results = _locate(localizer, named.image, labels)
        for label in labels:
            panels += [
                overlay(named.image, result.heatmaps()[label], caption=f"{method} · {label}")
                for method, result in results.items()
            ]
    return _sheet(panels, dataset)


def failures(localizer: AnyLocalizer, dataset: Dataset, protocol: EvalProtocol) -> Image.Image:
    """Draw where GEM fails: the classes whose masks fit worst in the first images, worst first, by four methods.

    The paper shows two images that it does not name; these are the worst that were measured.
    """
    localizer = protocol.settle(localizer)
    worst: list[tuple[float, int, str]] = []
    searched = list(named_images(dataset, range(min(SEARCHED, len(dataset)))))
    for index, named in enumerate(searched):
        masks = _locate(localizer, named.image, list(named.fits), ["gem"])["gem"].masks(protocol.threshold)
        worst += [(fit(masks[label].cpu()), index, label) for label, fit in named.fits.items()]
    panels = []
    for iou, index, label in sorted(worst)[:FAILURES]:
        image = searched[index].image
        for method, result in _locate(localizer, image, [label]).items():
            caption = f"{method} · {label}" + (f" · IoU {iou:.2f}" if method == "gem" else "")
            panels.append(overlay(image, result.heatmaps()[label], caption=caption))
    return _sheet(panels, dataset)


def _sheet(panels: Sequence[Image.Image], dataset: Dataset) -> Image.Image:
    if not panels:
        raise InputError(f"no image of {dataset.name} can be read and shows a named class")
    return contact_sheet(panels, columns=len(METHODS))


QUALITATIVE: Mapping[str, tuple[str, Callable[[AnyLocalizer, Dataset, EvalProtocol], Image.Image]]] = {
    "figure2": (
        "self-self attention is clustering",
        lambda *_: clustering_figure(random_vectors(), temperatures=(0.2,), clusters=(7,)),
    ),
    "figure4": ("four methods on the first images of the data set", qualitative),
    "figure7": (
        "self-self attention beside k-means, over iterations and temperatures",
        lambda *_: clustering_figure(random_vectors()),
    ),
    "figure8": ("where GEM fails: the prompts whose masks fit worst", failures),
    "figure9": ("four methods on more images", partial(qualitative, first=4, count=8)),
}
"""Figures without numbers."""
