"""What steps, rules for absent classes and refinement change on held-out scenes, all 120 concepts asked of each.

    python benchmarks/absent.py [images]

Each row is a method with one thing added; differences to the method alone have paired 95 % intervals over images.
"""

import sys
from dataclasses import replace

from open_gem.data.scene_source import SCENE_SIZE, scenes
from open_gem.data.scenes import HELD_OUT
from open_gem.evaluation.protocol import PROTOCOLS
from open_gem.evaluation.run import evaluate
from open_gem.evaluation.tasks import differences, scores
from open_gem.localizer import load
from open_gem.method.steps import Lposs, Scga
from open_gem.refine.pamr import Pamr

NAMES = ("mean_iou", "mask_iou", "pointing_game")


def main(count: int = 100) -> None:
    localizer, paper = load("embedded", device="cpu").acknowledge(), PROTOCOLS["paper"]
    data = scenes(range(HELD_OUT, HELD_OUT + count), SCENE_SIZE)
    bases = {name: localizer.resolve(name) for name in ("gem", "clip_surgery", "sc-clip")}
    steps = {"scga": (Scga(),), "lposs": (Lposs(),)}
    stepped = {
        f"{name} + {step}": method.replace(steps=value)
        for name, method in bases.items()
        if not method.steps
        for step, value in steps.items()
    }
    plain = evaluate(localizer, bases | stepped, data, paper)
    rows = dict(plain)
    for rule in ("presence", "denoise"):
        ruled = evaluate(localizer, bases, data, replace(paper, absent=rule))
        rows |= {f"{name} + absent: {rule}": counts for name, counts in ruled.items()}
    refined = evaluate(localizer, bases, data, replace(paper, refinement=Pamr()))
    rows |= {f"{name} + pamr": counts for name, counts in refined.items()}
    print(f"| | {' | '.join(NAMES)} |")
    print("|---|---|---|---|")
    for name in sorted(rows, key=lambda name: (list(bases).index(name.split(" + ")[0]), len(name) > 12, name)):
        base = name.split(" + ")[0]
        own, change = scores(rows[name]), differences(rows[name], plain[base])
        cells = []
        for score in NAMES:
            value, delta = own[score], change[score]
            cell = f"{100 * value.value:.1f}"
            if name != base:
                cell += f" ({100 * delta.value:+.1f}, {100 * delta.low:+.1f} to {100 * delta.high:+.1f})"
            cells.append(cell)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
