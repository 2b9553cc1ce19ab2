"""What steps, rules for absent classes and refinement change on held-out scenes, all 120 concepts asked of each.

    python benchmarks/absent.py [images] [additions …]

Each row is a method with one thing added; differences to the method alone have paired 95 % intervals over images.
Additions: scga, lposs, and those of `ADDITIONS`; all by default. LPOSS+ takes about 15 s an image and method.
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
from open_gem.method.text_steps import Cass
from open_gem.refine.lposs import LpossPlus
from open_gem.refine.pamr import Pamr

NAMES = ("mean_iou", "mask_iou", "pointing_game")
STEPS = {"scga": (Scga(),), "lposs": (Lposs(),)}
ADDITIONS = {
    "presence": {"absent": "presence"},
    "denoise": {"absent": "denoise"},
    "pamr": {"refinement": Pamr()},
    "lposs+": {"refinement": LpossPlus()},
    "cass": {"text_step": Cass()},
    "cass weight": {"text_step": Cass(alpha=0)},
    "cass prompts": {"text_step": Cass(weight=0)},
}


def main(count: int, *names: str) -> None:
    localizer, paper = load("embedded", device="cpu").acknowledge(), PROTOCOLS["paper"]
    data = scenes(range(HELD_OUT, HELD_OUT + count), SCENE_SIZE)
    bases = {name: localizer.resolve(name) for name in ("gem", "clip_surgery", "sc-clip")}
    chosen = names or (*STEPS, *ADDITIONS)
    stepped = {
        f"{name} + {step}": method.replace(steps=STEPS[step])
        for name, method in bases.items()
        for step in chosen
        if step in STEPS and not method.steps
    }
    plain = evaluate(localizer, bases | stepped, data, paper)
    rows = dict(plain)
    for addition in (name for name in chosen if name in ADDITIONS):
        changed = evaluate(localizer, bases, data, replace(paper, **ADDITIONS[addition]))
        rows |= {f"{name} + {addition}": counts for name, counts in changed.items()}
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
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, *sys.argv[2:])
