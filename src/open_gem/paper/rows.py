"""The paper's tables and figures with numbers, and what can be added to a method: models, rows and curves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from open_gem.evaluation.protocol import Variant
from open_gem.localization import ABSENT
from open_gem.method.steps import STEPS
from open_gem.method.table import METHODS, Method
from open_gem.paper.numbers import B16, B32, GROUPVIT, TABLE_4
from open_gem.refine import find_refinement, names_alone

GEM = METHODS["gem"]
RAW = METHODS["gem-raw"]
Rows = Mapping[str, Method | Variant]
ADDED = " + "
"""Before each thing that a row adds to the method of its name."""


class Point(NamedTuple):
    """A point of a curve: x, and the row whose score is y; of a single `block` if it is not None."""

    x: float
    row: str
    block: int | None = None

    def score(self, name: str) -> str:
        """Return the name of that score in the row."""
        return name if self.block is None else f"{name}@{self.block}"


class Plot(NamedTuple):
    """A plot for each score.

    axis    the label of the x axis
    curves  number of blocks of the model → points of each curve
    name    a part of the file's name
    """

    axis: str
    curves: Callable[[int], Mapping[str, Sequence[Point]]]
    name: str = ""


@dataclass(frozen=True)
class Experiment:
    """One table or figure.

    about     what the paper shows with it
    rows      number of blocks of the model → the methods it needs, by row
    models    keys of `numbers.MODELS` that the paper has in it
    shown     the scores to show, if a data set has them
    plots     of a figure
    split     that the paper used, if the data set has it
    analysis  whether it needs the paper's analysis of patch features
    seeds     whether rows that differ only in their seed are merged into mean and standard deviation
    added     whether rows are compared with the row of their name before the first `ADDED`
    """

    about: str
    rows: Callable[[int], Rows]
    models: tuple[str, ...] = (B16,)
    shown: tuple[str, ...] = ("mean_iou", "class_pooled", "pointing_game", "mask_iou")
    plots: tuple[Plot, ...] = ()
    split: str = "val"
    analysis: bool = False
    seeds: bool = False
    added: bool = False


PROJECTIONS = {"value": "v", "key": "k", "query": "q", "qkv": "qkv"}


def _table_1(layers: int) -> Rows:
    depth = min(4, layers)  # the paper's, A.3; K = 0 is what its numbers agree with, K = 1 what its text says
    rows: dict[str, Method | Variant] = {"CLIP": METHODS["clip"]}
    rows |= {f"{name}, raw": RAW.replace(projections=p, depth=depth) for name, p in PROJECTIONS.items()}
    for k in (0, 1):
        rows |= {
            f"{name}, norm, K = {k}": GEM.replace(projections=p, iterations=k, depth=depth)
            for name, p in PROJECTIONS.items()
        }
    return rows


CLUSTERS, SEEDS = (2, 3, 4, 5, 6, 7, 8, 10, 15, 20), (0, 1, 2)


def _table_2(layers: int) -> Rows:
    base = METHODS["gem-kmeans"].fitted(layers)
    rows = {f"k-means, {k}, seed {seed}": base.replace(clusters=k, seed=seed) for k in CLUSTERS for seed in SEEDS}
    return {"GEM": GEM.fitted(layers), **rows}


def _table_3(layers: int) -> Rows:
    names = {"CLIP": "clip", "MaskCLIP": "maskclip", "MaskCLIP, reduced": "maskclip-reduced"}
    names |= {"CLIPSurgery": "clip_surgery", "GEM": "gem"}
    best = {f"GEM, K = {k}": GEM.fitted(layers).replace(iterations=k) for k in (0, 2, 3)}
    return {label: METHODS[name].fitted(layers) for label, name in names.items()} | best


def _table_4(layers: int) -> Rows:
    return {"CLIP": METHODS["clip"], "GEM": GEM.fitted(layers)}


def _table_5(layers: int) -> Rows:
    return {
        f"{depth} block{'s' if depth > 1 else ''}{', MLP' if mlp else ''}": GEM.replace(depth=depth, mlp=mlp)
        for mlp in (False, True)
        for depth in range(1, layers)
    }


ITERATIONS = range(5)
FIGURE_3 = {"CLIP": "clip", "CLIPSurgery": "clip_surgery"}


def _figure_3(layers: int) -> Mapping[str, Method]:
    rows = {f"GEM, K = {k}": GEM.fitted(layers).replace(iterations=k) for k in ITERATIONS}
    return {label: METHODS[name].fitted(layers) for label, name in FIGURE_3.items()} | rows


def _over_iterations(layers: int) -> Mapping[str, Sequence[Point]]:
    others = {name: [Point(ITERATIONS[0], name), Point(ITERATIONS[-1], name)] for name in FIGURE_3}
    return {"GEM": [Point(k, f"GEM, K = {k}") for k in ITERATIONS], **others}


def _over_blocks(layers: int) -> Mapping[str, Sequence[Point]]:
    rows = _figure_3(layers)
    first = {name: 1 if method.is_host else layers - method.depth + 1 for name, method in rows.items()}
    shown = (*FIGURE_3, "GEM, K = 0", "GEM, K = 1", "GEM, K = 3")
    return {name: [Point(block, name, block) for block in range(first[name], layers + 1)] for name in shown}


MULTIPLIERS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
UNTEMPERED = "no norm, trained τ"


def _figure_5(layers: int) -> Rows:
    rows = {f"τ × {m:g}": GEM.fitted(layers).replace(temperature_scale=m) for m in MULTIPLIERS}
    return rows | {UNTEMPERED: RAW.fitted(layers)}


def _over_temperatures(layers: int) -> Mapping[str, Sequence[Point]]:
    flat = [Point(m, UNTEMPERED) for m in (MULTIPLIERS[0], MULTIPLIERS[-1])]
    return {"GEM": [Point(m, f"τ × {m:g}") for m in MULTIPLIERS], UNTEMPERED: flat}


SLOW = ("lposs+",)
"""Refinements that take so long for a map that 120 labels of an image take most of a minute."""


def _additions(layers: int) -> Rows:
    rows: dict[str, Method | Variant] = {}
    for name in ("gem", "clip_surgery", "sc-clip"):
        method = METHODS[name].fitted(layers)
        steps = {} if method.steps else {step: method.replace(steps=(make(),)) for step, make in STEPS.items()}
        rules = {f"absent: {rule}": Variant(method, absent=rule) for rule in ABSENT if rule != "none"}
        refinements = {
            refinement: find_refinement(refinement) for refinement in names_alone() if refinement not in SLOW
        }
        refined = {refinement: Variant(method, refinement=made) for refinement, made in refinements.items()}
        both = {
            f"absent: presence{ADDED}{refinement}": Variant(method, "presence", made)
            for refinement, made in refinements.items()
        }
        rows |= {name: method} | {f"{name}{ADDED}{what}": row for what, row in (steps | rules | refined | both).items()}
    return rows


EXPERIMENTS: Mapping[str, Experiment] = {
    "table1": Experiment(
        "projections of self-self attention, with and without normalisation and adaptive temperature", _table_1
    ),
    "table2": Experiment("k-means of the values in place of self-self attention", _table_2, seeds=True),
    "table3": Experiment("methods, training-free and not", _table_3, (B16, GROUPVIT)),
    "table4": Experiment("architectures", _table_4, TABLE_4),
    "table5": Experiment("how many of the last blocks have a method, with and without MLPs", _table_5, (B16, B32)),
    "figure3": Experiment(
        "how alike patches are, and how they part objects and texts, over iterations and from block to block",
        _figure_3,
        shown=("patch_similarity", "object_contrast", "text_contrast"),
        plots=(Plot("iterations K", _over_iterations), Plot("block", _over_blocks, "blocks")),
        split="train",
        analysis=True,
    ),
    "figure5": Experiment(
        "multiples of the adaptive temperature",
        _figure_5,
        (B16, B32),
        plots=(Plot("multiple of the adaptive temperature", _over_temperatures),),
    ),
    "additions": Experiment(
        "steps, rules for absent classes and refinements, each with the change that it makes to the method alone",
        _additions,
        shown=("mean_iou", "class_pooled", "mask_iou", "mask_boundary_iou", "pointing_game"),
        added=True,
    ),
}
