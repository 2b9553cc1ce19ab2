"""The paper's figures without numbers: clusterings, methods side by side, and where GEM fails."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_gem.data import IGNORE, PointSample, Sample, Segmentation
from open_gem.errors import DatasetError, ImageError, InputError
from open_gem.evaluation.metrics import point_counts
from open_gem.evaluation.protocol import EvalProtocol
from open_gem.evaluation.tasks import Dataset
from open_gem.images.draw import contact_sheet, overlay
from open_gem.localizer import Localizer
from open_gem.method.clustering import random_vectors
from open_gem.paper.figures import clustering_figure

METHODS = ("clip", "maskclip", "clip_surgery", "gem")
PHRASES = 2  # of a picture
SEARCHED, FAILURES = 64, 6  # pictures in which failures are looked for, and how many are shown


class Shown(NamedTuple):
    """A picture, and its phrases with what tells how well a mask `(y, x)` of each fits, in [0, 1]."""

    picture: Image.Image
    phrases: Mapping[str, Callable[[Tensor], float]]


def shown(dataset: Dataset, indices: Sequence[int]) -> Iterator[Shown]:
    """The pictures of these indices that can be read and have something in them that has a name."""
    for index in indices:
        sample = dataset[index]
        try:
            one = Shown(sample.picture(), _phrases(dataset, sample))
        except (ImageError, DatasetError):  # measuring tells of them
            continue
        if one.phrases:
            yield one


def _phrases(dataset: Dataset, sample: Sample | PointSample) -> dict[str, Callable[[Tensor], float]]:
    """What is there by its name, the largest first where sizes are known."""
    if isinstance(sample, PointSample):
        xy, of, yes = (torch.from_numpy(values) for values in (sample.xy, sample.of, sample.yes))
        return {
            sample.names[one]: lambda mask, one=one: _iou(*point_counts(mask, xy[of == one], yes[of == one])[:3])
            for one in sample.positive
        }
    assert isinstance(dataset, Segmentation)
    label_of = dict(zip(dataset.foreground, dataset.vocabulary().labels, strict=True))
    labels = torch.from_numpy(sample.labels())
    present, counts = np.unique(labels.numpy(), return_counts=True)
    largest = [int(present[one]) for one in np.argsort(-counts, kind="stable")]

    def fit(mask: Tensor, label: int) -> float:
        counted = mask & (labels != IGNORE) if dataset.background is not None else mask
        hits = int((counted & (labels == label)).sum())
        return _iou(hits, int(counted.sum()) - hits, int((labels == label).sum()) - hits)

    return {label_of[one]: lambda mask, one=one: fit(mask, one) for one in largest if one in label_of}


def _iou(hits: float, false: float, missed: float) -> float:
    return hits / max(hits + false + missed, 1)


def _settled(localizer: Localizer, protocol: EvalProtocol) -> Localizer:
    answering = protocol.settle(localizer)
    assert isinstance(answering, Localizer)
    return answering


def qualitative(
    localizer: Localizer, dataset: Dataset, protocol: EvalProtocol, *, first: int = 0, count: int = 4
) -> Image.Image:
    """Pictures of a data set and what is in them, by four methods side by side, a row a phrase."""
    answering, drawn = _settled(localizer, protocol), []
    for one in shown(dataset, range(len(dataset))[first : first + count]):
        phrases = list(one.phrases)[:PHRASES]
        found = answering.compare(one.picture, phrases, METHODS)
        for phrase in phrases:
            drawn += [
                overlay(one.picture, result.heatmaps()[phrase], caption=f"{name} · {phrase}")
                for name, result in found.items()
            ]
    return _sheet(drawn, dataset)


def failures(localizer: Localizer, dataset: Dataset, protocol: EvalProtocol) -> Image.Image:
    """Where GEM fails: of the first pictures, the phrases whose masks fit worst, worst first, by four methods.

    The paper shows two pictures that it does not name; these are found by measuring.
    """
    answering = _settled(localizer, protocol)
    found: list[tuple[float, int, str]] = []
    some = list(shown(dataset, range(min(SEARCHED, len(dataset)))))
    for index, one in enumerate(some):
        masks = answering.compare(one.picture, list(one.phrases), ["gem"])["gem"].masks(protocol.threshold)
        found += [(fits(masks[phrase].cpu()), index, phrase) for phrase, fits in one.phrases.items()]
    drawn = []
    for fit, index, phrase in sorted(found)[:FAILURES]:
        for name, result in answering.compare(some[index].picture, [phrase], METHODS).items():
            caption = f"{name} · {phrase}" + (f" · IoU {fit:.2f}" if name == "gem" else "")
            drawn.append(overlay(some[index].picture, result.heatmaps()[phrase], caption=caption))
    return _sheet(drawn, dataset)


def _sheet(drawn: Sequence[Image.Image], dataset: Dataset) -> Image.Image:
    if not drawn:
        raise InputError(f"no picture of {dataset.name} that can be read has anything with a name in it")
    return contact_sheet(drawn, columns=len(METHODS))


def clustering(localizer: Localizer, dataset: Dataset, protocol: EvalProtocol) -> Image.Image:
    """Section 4.2 on random vectors, all panels: needs neither model nor data."""
    return clustering_figure(random_vectors())


def clustering_in_short(localizer: Localizer, dataset: Dataset, protocol: EvalProtocol) -> Image.Image:
    """One temperature of the same."""
    return clustering_figure(random_vectors(), temperatures=(0.2,), clusters=(7,))


def more_pictures(localizer: Localizer, dataset: Dataset, protocol: EvalProtocol) -> Image.Image:
    """The pictures after those of `qualitative`."""
    return qualitative(localizer, dataset, protocol, first=4, count=8)


PICTURES: Mapping[str, tuple[str, Callable[[Localizer, Dataset, EvalProtocol], Image.Image]]] = {
    "figure2": ("self-self attention is clustering", clustering_in_short),
    "figure4": ("four methods on the first pictures of the data set", qualitative),
    "figure7": ("self-self attention beside k-means, over iterations and temperatures", clustering),
    "figure8": ("where GEM fails: the phrases whose masks fit worst", failures),
    "figure9": ("four methods on more pictures", more_pictures),
}
"""Figures without numbers."""
