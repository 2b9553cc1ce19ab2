"""The paper's tables and figures as lists of pathways and renderers: `open-gem reproduce`.

Every experiment names its rows as values; `reproduce` reads all rows of all experiments that share a model and a data
set from one pass over the data, and then draws each.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_gem.clustering import random_vectors
from open_gem.datasets import PointSample, Sample, Segmentation
from open_gem.evaluate import Dataset, Estimate, scores
from open_gem.figures import clustering_figure, plot
from open_gem.localizer import Localizer
from open_gem.methods import PATHWAYS, KMeans, Pathway
from open_gem.protocols import PROTOCOLS, Protocol
from open_gem.runs import Store, run, settings_of
from open_gem.viz import contact_sheet, overlay

GEM = PATHWAYS["gem"]
RAW = PATHWAYS["gem-raw"]
Rows = Mapping[str, Pathway]
Scores = Mapping[str, Mapping[str, Estimate]]  # of each row of an experiment, each score


@dataclass(frozen=True)
class Experiment:
    """One table or figure.

    about     what the paper shows with it
    rows      number of blocks of the model → the pathways it needs, by what they are called in it
    shown     the scores that are shown of each row, where a data set has them
    sweep     of a figure: each curve → its points, (x, row); none for a table
    axis      of a figure: what x is
    paper     row → what the paper has, by data set, in per cent
    analysis  whether the paper's analysis of patch features is needed
    """

    about: str
    rows: Callable[[int], Rows]
    shown: tuple[str, ...] = ("mean_iou", "class_pooled", "pointing_game", "mask_iou")
    sweep: Callable[[int], Mapping[str, Sequence[tuple[float, str]]]] | None = None
    axis: str = ""
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    analysis: bool = False


PROJECTIONS = {"value": "v", "key": "k", "query": "q", "qkv": "qkv"}


def _table_1(layers: int) -> Rows:
    depth = min(4, layers)  # the paper's, A.3; K = 0 is what its numbers agree with, K = 1 what its text says
    rows: dict[str, Pathway] = {"CLIP": PATHWAYS["clip"]}
    rows |= {f"{name}, raw": replace(RAW, projections=p, depth=depth) for name, p in PROJECTIONS.items()}
    for k in (0, 1):
        rows |= {
            f"{name}, norm, K = {k}": replace(GEM, projections=p, iterations=k, depth=depth)
            for name, p in PROJECTIONS.items()
        }
    return rows


CLUSTERS, SEEDS = (2, 3, 4, 5, 6, 7, 8, 10, 15, 20), (0, 1, 2)


def _table_2(layers: int) -> Rows:
    base = _fit(PATHWAYS["gem-kmeans"], layers)
    rows = {f"k-means, {k}, seed {seed}": replace(base, mix=KMeans(k, seed)) for k in CLUSTERS for seed in SEEDS}
    return {"GEM": _fit(GEM, layers), **rows}


def _table_3(layers: int) -> Rows:
    names = {"CLIP": "clip", "MaskCLIP": "maskclip", "MaskCLIP, reduced": "maskclip-reduced"}
    names |= {"CLIPSurgery": "clip_surgery", "GEM": "gem"}
    best = {f"GEM, K = {k}": replace(_fit(GEM, layers), iterations=k) for k in (0, 2, 3)}
    return {label: _fit(PATHWAYS[name], layers) for label, name in names.items()} | best


def _table_4(layers: int) -> Rows:
    return {"CLIP": PATHWAYS["clip"], "GEM": _fit(GEM, layers)}


def _table_5(layers: int) -> Rows:
    depths = range(1, layers)
    return {
        f"{depth} block{'s' if depth > 1 else ''}{', MLP' if mlp else ''}": replace(GEM, depth=depth, mlp=mlp)
        for mlp in (False, True)
        for depth in depths
    }


MULTIPLIERS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


def _figure_5(layers: int) -> Rows:
    rows = {f"τ × {m:g}": replace(_fit(GEM, layers), temperature_scale=m) for m in MULTIPLIERS}
    return rows | {"no norm, trained τ": _fit(RAW, layers)}


def _curves_5(layers: int) -> Mapping[str, Sequence[tuple[float, str]]]:
    flat = [(m, "no norm, trained τ") for m in (MULTIPLIERS[0], MULTIPLIERS[-1])]
    return {"GEM": [(m, f"τ × {m:g}") for m in MULTIPLIERS], "no norm, trained τ": flat}


def _figure_3(layers: int) -> Rows:
    rows = {f"GEM, K = {k}": replace(_fit(GEM, layers), iterations=k) for k in range(5)}
    return {"CLIP": PATHWAYS["clip"], "CLIPSurgery": _fit(PATHWAYS["clip_surgery"], layers), **rows}


def _curves_3(layers: int) -> Mapping[str, Sequence[tuple[float, str]]]:
    others = {name: [(0.0, name), (4.0, name)] for name in ("CLIP", "CLIPSurgery")}
    return {"GEM": [(float(k), f"GEM, K = {k}") for k in range(5)], **others}


def _fit(pathway: Pathway, layers: int) -> Pathway:
    return replace(pathway, depth=min(pathway.depth, layers))


def _paper(**columns: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Values by data set and row → by row and data set."""
    rows: dict[str, dict[str, float]] = {}
    for dataset, values in columns.items():
        for row, value in values.items():
            rows.setdefault(row, {})[dataset] = value
    return rows


def _paper_1(clip: float, raw: Sequence[float], normed: Sequence[float]) -> dict[str, float]:
    values = {"CLIP": clip}
    for name, without, having in zip(PROJECTIONS, raw, normed, strict=True):
        values |= {f"{name}, raw": without, f"{name}, norm, K = 0": having}
    return values


_DEPTHS = [f"{depth} block{'s' if depth > 1 else ''}" for depth in range(1, 12)]

EXPERIMENTS: Mapping[str, Experiment] = {
    "table1": Experiment(
        "projections of self-self attention, with and without normalisation and adaptive temperature",
        _table_1,
        paper=_paper(
            voc2012=_paper_1(10.4, (41.9, 43.9, 43.8, 43.1), (44.4, 44.8, 44.7, 45.1)),
            context59=_paper_1(7.7, (30.5, 31.0, 30.8, 30.7), (31.9, 32.0, 31.5, 32.3)),
        ),
    ),
    "table2": Experiment("k-means of the values in place of self-self attention", _table_2),
    "table3": Experiment(
        "the four training-free methods; other rows of the paper's table are quoted there, and not measured here",
        _table_3,
        paper=_paper(
            voc2012={"CLIP": 10.4, "MaskCLIP": 28.6, "CLIPSurgery": 41.2, "GEM": 46.2},
            context59={"CLIP": 7.7, "MaskCLIP": 23.8, "CLIPSurgery": 30.5, "GEM": 32.6},
            openimages={"CLIP": 27.6, "MaskCLIP": 42.0, "CLIPSurgery": 47.8, "GEM": 50.9},
        ),
    ),
    "table4": Experiment(
        "architectures: the same command for each model; open-gem report shows them together", _table_4
    ),
    "table5": Experiment(
        "how many of the last blocks have a pathway, with and without MLPs",
        _table_5,
        paper=_paper(
            voc2012=dict(zip(_DEPTHS, (4.8, 43.8, 45.2, 45.5, 45.6, 45.3, 45.5, 45.5, 45.4, 45.4, 45.1), strict=True))
            | {
                f"{depth}, MLP": value
                for depth, value in zip(
                    _DEPTHS, (26.2, 38.8, 42.4, 42.1, 42.2, 42.3, 41.9, 41.6, 41.7, 42.0, 41.6), strict=True
                )
            }
        ),
    ),
    "figure3": Experiment(
        "how alike patches are, and how they part objects and texts, over iterations",
        _figure_3,
        ("patch_similarity", "object_contrast", "text_contrast"),
        _curves_3,
        "iterations K",
        analysis=True,
    ),
    "figure5": Experiment(
        "multiples of the adaptive temperature", _figure_5, sweep=_curves_5, axis="multiple of the adaptive temperature"
    ),
}


# Measuring ------------------------------------------------------------------------------------------------------------


def union(names: Sequence[str], layers: int) -> dict[str, Pathway]:
    """Every pathway that these experiments need of a model, once, by some name."""
    once: dict[Pathway, str] = {}
    for name in names:
        for label, pathway in EXPERIMENTS[name].rows(layers).items():
            once.setdefault(pathway, f"{name}: {label}")
    return {label: pathway for pathway, label in once.items()}


def reproduce(
    names: Sequence[str],
    localizer: Localizer,
    dataset: Dataset,
    place: Path,
    *,
    protocol: Protocol = PROTOCOLS["paper"],
    limit: int | None = None,
    progress: Callable[[int], None] = lambda images: None,
    **settings: Any,
) -> dict[str, Scores]:
    """The scores of every row of each experiment on one model and data set, from one pass over the data.

    Counts are kept below `place`, as `runs.run` does; `settings` as of `evaluate.measure`.
    """
    layers = localizer.backbone.layers
    pathways = union(names, layers)
    asked = replace(protocol, analysis=any(EXPERIMENTS[name].analysis for name in names))
    store = Store.at(place, settings_of(localizer, pathways, dataset, asked))
    indices = range(len(dataset) if limit is None else min(limit, len(dataset)))
    run(store, localizer, pathways, dataset, asked, indices=indices, progress=progress, **settings)
    if failed := store.failed():
        image, error = next(iter(failed.items()))
        warnings.warn(
            f"{len(failed)} images could not be read and do not count, {image} for one: {error}", stacklevel=2
        )
    found = {pathways[label]: scores(counts) for label, counts in store.counts().items()}
    return {
        name: {label: found[pathway] for label, pathway in EXPERIMENTS[name].rows(layers).items()} for name in names
    }


# Pictures -------------------------------------------------------------------------------------------------------------

QUALITATIVE = ("clip", "maskclip", "clip_surgery", "gem")
SHOWN_IMAGES, SHOWN_PHRASES = 4, 2


def qualitative(localizer: Localizer, dataset: Dataset, protocol: Protocol) -> Image.Image:
    """The first pictures of a data set and what is in them, by four methods side by side, a row a phrase."""
    answering = protocol.settle(localizer)
    assert isinstance(answering, Localizer)
    drawn = []
    for index in range(min(SHOWN_IMAGES, len(dataset))):
        sample = dataset[index]
        picture = sample.picture()
        phrases = _shown_phrases(dataset, sample)
        if not phrases:
            continue
        found = answering.compare(picture, phrases, QUALITATIVE)
        for phrase in phrases:
            for name, one in found.items():
                drawn.append(overlay(picture, one.heatmaps()[phrase], caption=f"{name} · {phrase}"))
    return contact_sheet(drawn, columns=len(QUALITATIVE))


def _shown_phrases(dataset: Dataset, sample: Sample | PointSample) -> tuple[str, ...]:
    if isinstance(sample, PointSample):
        names = dict.fromkeys(sample.names[one] for one in sample.positive)
    else:
        assert isinstance(dataset, Segmentation)
        label_of = dict(zip(dataset.foreground, dataset.vocabulary().labels, strict=True))
        labels, counts = np.unique(sample.labels(), return_counts=True)
        largest = [int(labels[one]) for one in np.argsort(-counts, kind="stable")]
        names = dict.fromkeys(label_of[one] for one in largest if one in label_of)
    return tuple(names)[:SHOWN_PHRASES]


def simulation(localizer: Localizer, dataset: Dataset, protocol: Protocol) -> Image.Image:
    """Section 4.2 on random vectors: needs neither model nor data."""
    return clustering_figure(random_vectors())


PICTURES: Mapping[str, tuple[str, Callable[[Localizer, Dataset, Protocol], Image.Image]]] = {
    "figure2": ("self-self attention is clustering", simulation),
    "figure4": ("four methods on pictures of the data set", qualitative),
    "figure7": ("the same as figure 2, which has all of its panels here", simulation),
    "figure9": ("the same as figure 4, of the first pictures", qualitative),
}
"""Figures without numbers; figure 8, of failures, is of pictures that somebody has to choose."""


# Showing --------------------------------------------------------------------------------------------------------------


def markdown(name: str, found: Scores, dataset: str) -> str:
    """An experiment as a table: per cent with 95 % intervals, and the paper's values where it has them."""
    experiment = EXPERIMENTS[name]
    shown = [score for score in experiment.shown if any(score in row for row in found.values())]
    paper = any(dataset in values for values in experiment.paper.values())
    head = ["", *shown, *(["paper"] if paper else [])]
    lines = [head, ["---"] * len(head)]
    for label, row in found.items():
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * number for number in row[score])) for score in shown]
        value = experiment.paper.get(label, {}).get(dataset)
        lines.append([label, *cells, *([("" if value is None else f"{value:.1f}")] if paper else [])])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {name.capitalize()}: {experiment.about}\n\n{table}\n"


def curves(name: str, found: Scores, layers: int) -> dict[str, Image.Image]:
    """A figure's plots, one a score; none of a table."""
    experiment = EXPERIMENTS[name]
    if experiment.sweep is None:
        return {}
    shown = [score for score in experiment.shown if any(score in row for row in found.values())]
    series = experiment.sweep(layers)
    return {
        score: plot(
            {curve: [(x, found[row][score]) for x, row in points] for curve, points in series.items()},
            title=f"{name.capitalize()}: {score.replace('_', ' ')}",
            axis=experiment.axis,
        )
        for score in shown
    }
