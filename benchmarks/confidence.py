"""Which confidence ranks right detections of a label above wrong ones, on scenes.

    python benchmarks/confidence.py [scenes] [first seed]

All 120 concepts are asked of each scene; objects are those of labels with a presence of 0.3 or more, with all other
defaults. A detection is right if its mask has an IoU of 0.5 or more with the mask of its label; in the second pair of
columns, if its most confident pixel is in that mask. Every candidate ranks the same detections: the numbers are the
average precision of the ranking, the mean over labels that have right and wrong ones, and of all labels in one
ranking; of the latter also the 95 % interval of its difference to the confidence of objects, over 200 draws of scenes.
"""

import sys
from collections.abc import Callable

import numpy as np
from sklearn.metrics import average_precision_score

import open_gem
from open_gem.data.scenes import CONCEPTS, HELD_OUT, Scene, scene
from open_gem.evaluation.metrics.intervals import interval
from open_gem.localization import Localization
from open_gem.objects import Object

SIDE, PRESENCE, IOU, DRAWS = 256, 0.3, 0.5, 200

Values = dict[str, np.ndarray]

CANDIDATES: dict[str, Callable[[Values], np.ndarray]] = {
    "score: highest cosine": lambda of: of["score"],
    "presence": lambda of: of["presence"],
    "peak: highest min-max value": lambda of: of["peak"],
    "probability: softmax over labels at the point": lambda of: of["probability"],
    "contrast: mean cosine inside − outside": lambda of: of["contrast"],
    "presence × peak": lambda of: of["presence"] * of["peak"],
    "presence × mean min-max value inside": lambda of: of["presence"] * of["mean"],
    "presence × max(0, score)": lambda of: of["presence"] * of["score"].clip(min=0),
    "presence × peak × max(0, score)": lambda of: of["presence"] * of["peak"] * of["score"].clip(min=0),
    "presence × contrast": lambda of: of["presence"] * of["contrast"].clip(min=0),
    "presence × probability": lambda of: of["presence"] * of["probability"],
    "presence × peak × probability": lambda of: of["presence"] * of["peak"] * of["probability"],
}


def measure(obj: Object, result: Localization, drawn: Scene) -> tuple[float, ...]:
    """What candidates are made of, and whether the object is right: by its mask, and by its point."""
    cosines, mask = result.heatmaps("cosine")[obj.index].numpy(), obj.mask
    assert (
        mask is not None
        and obj.point is not None
        and obj.presence is not None
        and obj.peak is not None
        and obj.probability is not None
    )
    low, high, inside = cosines.min(), cosines.max(), cosines[mask]
    true = drawn.masks[drawn.names.index(obj.label)] if obj.label in drawn.names else np.zeros_like(mask)
    is_right = (mask & true).sum() >= IOU * (mask | true).sum(), true[obj.point[1], obj.point[0]]
    mean, contrast = (inside.mean() - low) / (high - low), inside.mean() - cosines[~mask].mean()
    return (obj.score, obj.presence, obj.peak, obj.probability, contrast, mean, *is_right)


def per_label(truth: np.ndarray, ranks: np.ndarray, label: np.ndarray) -> float:
    own = (label == index for index in np.unique(label))
    return float(np.mean([average_precision_score(truth[of], ranks[of]) for of in own if 0 < truth[of].mean() < 1]))


def main(count: int = 300, first: int = HELD_OUT) -> None:
    localizer = open_gem.load("embedded", device="cpu")
    rows: list[tuple[float, ...]] = []
    for seed in range(first, first + count):
        drawn = scene(seed, SIDE)
        result = localizer(drawn.image, CONCEPTS)
        rows += [(seed, obj.index, *measure(obj, result, drawn)) for obj in result.objects(presence=PRESENCE)]
    names = ("seed", "label", "score", "presence", "peak", "probability", "contrast", "mean", "mask", "point")
    of = dict(zip(names, np.array(rows, dtype=float).T, strict=True))
    print(f"{len(rows)} detections: {of['mask'].mean():.0%} are right by mask, {of['point'].mean():.0%} by point")
    random, places = np.random.default_rng(0), [np.flatnonzero(of["seed"] == seed) for seed in np.unique(of["seed"])]
    draws = [np.concatenate([places[at] for at in random.integers(len(places), size=count)]) for _ in range(DRAWS)]
    chosen = of["presence"] * of["peak"] * of["probability"]
    print("| confidence | by mask: per label | all labels | by point: per label | all labels |\n|---|---|---|---|---|")
    for name, formula in CANDIDATES.items():
        ranks, cells = formula(of), []  # pyright: ignore[reportArgumentType]
        for truth in (of["mask"], of["point"]):
            gains = [
                average_precision_score(truth[at], ranks[at]) - average_precision_score(truth[at], chosen[at])
                for at in draws
            ]
            low, high = interval(np.array(gains))
            cells.append(f"{100 * per_label(truth, ranks, of['label']):.1f}")
            cells.append(f"{100 * average_precision_score(truth, ranks):.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
