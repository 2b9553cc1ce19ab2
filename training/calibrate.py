"""Choose the size rule and the temperature multiplier that a checkpoint recommends, on validation scenes only.

    python training/calibrate.py src/open_gem/towers/embedded

It uses scenes of the validation range, never the held-out ones. The size is the one with the best pointing game of the
baselines (CLIP, MaskCLIP and CLIP Surgery, averaged), so that it does not favour GEM. The multiplier is the one nearest
to 1, the paper's, for which GEM's pointing game at that size is within one standard error of the best. Writes the pair
into the "open_gem" section of open_clip_config.json, and all measurements into calibration.json beside it.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import open_gem
from open_gem import METHODS, Localizer
from open_gem.data import scenes
from open_gem.data.scenes import VALIDATION
from open_gem.evaluation.protocol import EvalProtocol
from open_gem.evaluation.run import evaluate
from open_gem.evaluation.tasks import scores
from open_gem.files import to_json
from open_gem.method.table import Method

SCALES = (2.0, 1.0, 0.5, 0.25, 0.125)
SIZES = ("short:128", "short:160", "short:192")
BASELINES = ("clip", "maskclip", "clip_surgery")


def measure(localizer: Localizer, size: str, images: int) -> Iterator[dict]:
    """Scores at this size: one row a temperature scale of GEM, and one for each of `BASELINES`."""
    gem: dict[str, str | Method] = {f"gem {s:g}": METHODS["gem"].replace(temperature_scale=s) for s in SCALES}
    methods = gem | {name: name for name in BASELINES}
    protocol = EvalProtocol(size=size)
    outcomes = evaluate(localizer, methods, scenes(range(VALIDATION, VALIDATION + images)), protocol)
    for label, counts in outcomes.items():
        name, _, scale = label.partition(" ")
        measured = {score: round(estimate.value, 4) for score, estimate in scores(counts).items()}
        yield {"size": size, "method": name, "temperature_scale": float(scale) if scale else None, **measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoint with open_clip_config.json, which is updated")
    parser.add_argument("--images", type=int, default=250, help="validation scenes (default 250)")
    options = parser.parse_args()

    localizer = open_gem.load(f"local-dir:{options.folder}")
    rows = []
    for size in SIZES:
        for row in measure(localizer, size, options.images):
            print(to_json(row), flush=True)
            rows.append(row)
    write(options.folder / "open_clip_config.json", choose(rows, options.images))
    write_table(options.folder / "calibration.json", rows)


def choose(rows: list[dict], images: int) -> dict:
    """The row to recommend; `images` is the number of scenes that each was measured on."""

    def of_baselines(size: str) -> float:
        return sum(row["pointing_game"] for row in rows if row["method"] in BASELINES and row["size"] == size)

    size = max(SIZES, key=of_baselines)
    gem = [row for row in rows if row["method"] == "gem" and row["size"] == size]
    best = max(row["pointing_game"] for row in gem)
    error = math.sqrt(best * (1 - best) / images)  # objects of one scene are not independent, so scenes are counted
    nearly_best = [row for row in gem if row["pointing_game"] >= best - error]
    return min(nearly_best, key=lambda row: abs(math.log(row["temperature_scale"])))


def write(config: Path, best: dict) -> None:
    """Write the recommendation into the checkpoint's configuration, atomically."""
    content = json.loads(config.read_text("utf-8"))
    content["open_gem"] = {key: best[key] for key in ("size", "temperature_scale")}
    replace_text(config, to_json(content, indent=2) + "\n")


def write_table(file: Path, rows: list[dict]) -> None:
    """Write all measurements beside the checkpoint, one row a line."""
    replace_text(file, "[\n" + ",\n".join(to_json(row) for row in rows) + "\n]\n")


def replace_text(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    main()
