"""What bfloat16 costs in answers, on held-out scenes of the model in the package, with paired 95 % intervals.

    python benchmarks/half.py [images]

Also how many of the points, one a label of each scene, are on the same patch in both types.
"""

import sys

from open_gem.data.scene_source import SCENE_SIZE, scenes
from open_gem.data.scenes import HELD_OUT, scene
from open_gem.evaluation.protocol import PROTOCOLS
from open_gem.evaluation.run import evaluate
from open_gem.evaluation.tasks import differences, scores
from open_gem.localizer import load

METHODS = ("gem", "clip_surgery", "maskclip-reduced")
NAMES = ("mean_iou", "mask_iou", "pointing_game")
POINTED = 120


def main(count: int) -> None:
    exact, half = (load("embedded", device="cpu", dtype=dtype).acknowledge() for dtype in ("float32", "bfloat16"))
    data = scenes(range(HELD_OUT, HELD_OUT + count), SCENE_SIZE)
    methods = {name: exact.resolve(name) for name in METHODS}
    before, after = (evaluate(localizer, methods, data, PROTOCOLS["paper"]) for localizer in (exact, half))
    print(f"| {count} scenes | {' | '.join(NAMES)} |")
    print("|---|---|---|---|")
    for name in METHODS:
        own, change = scores(before[name]), differences(after[name], before[name])
        cells = [
            f"{100 * own[score].value:.1f}, {100 * change[score].value:+.2f} "
            f"[{100 * change[score].low:.2f}, {100 * change[score].high:.2f}]"
            for score in NAMES
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    pairs = [
        tuple(localizer(shown.image, list(shown.names)).points() for localizer in (exact, half))
        for shown in (scene(seed, SCENE_SIZE) for seed in range(HELD_OUT, HELD_OUT + POINTED))
    ]
    patch = exact.backbone.vision.patch[0] * SCENE_SIZE / 160
    apart = [bool(((a - b).abs() > patch / 2).any()) for one, other in pairs for a, b in zip(one, other, strict=True)]
    print(f"{sum(apart)} of {len(apart)} points moved by more than half a patch")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
