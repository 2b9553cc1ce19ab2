"""Choose the size rule and the temperature multiplier that a checkpoint recommends, on validation scenes only.

    python training/calibrate.py src/open_gem/backbones/embedded

The size is the one with the best image-level accuracy (top-1), the multiplier the one with GEM's best pointing game at
that size, both on scenes of the validation range, never the held-out ones. Writes the pair into the "open_gem" section
of open_clip_config.json, and all that was measured into calibration.json beside it.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import open_gem
from open_gem import PATHWAYS, Localizer
from open_gem.datasets.scenes import VALIDATION
from open_gem.evaluate import evaluate_scenes

SCALES = (2.0, 1.0, 0.5, 0.25, 0.125)
SIZES = ("short:128", "short:160", "short:192", "short:224")
OTHERS = ("clip", "maskclip", "clip_surgery")  # measured beside GEM at each size, so that the size favours no one


def measure(localizer: Localizer, size: str, images: int) -> Iterator[dict]:
    """Scores at this size: one row a temperature scale of GEM, and one for each of `OTHERS`."""
    pathways = {scale: replace(PATHWAYS["gem"], temperature_scale=scale) for scale in SCALES}
    labelled = {f"gem {scale:g}": pathway for scale, pathway in pathways.items()} | {name: name for name in OTHERS}
    outcomes = evaluate_scenes(replace(localizer, size=size), labelled, range(VALIDATION, VALIDATION + images))
    for label, outcome in outcomes.items():
        name, _, scale = label.partition(" ")
        scores = {score: round(value, 4) for score, value in outcome.scores().items()}
        yield {"size": size, "pathway": name, "temperature_scale": float(scale) if scale else None, **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoint with open_clip_config.json, which is updated")
    parser.add_argument("--images", type=int, default=200, help="validation scenes (default 200)")
    options = parser.parse_args()

    localizer = open_gem.load(f"local-dir:{options.folder}")
    rows = []
    for size in SIZES:
        for row in measure(localizer, size, options.images):
            print(json.dumps(row), flush=True)
            rows.append(row)
    accurate = max(rows, key=lambda row: row["top1"])["size"]
    candidates = [row for row in rows if row["pathway"] == "gem" and row["size"] == accurate]
    best = max(candidates, key=lambda row: row["pointing_game"])
    write(options.folder / "open_clip_config.json", best)
    write_table(options.folder / "calibration.json", rows)


def write(config: Path, best: dict) -> None:
    """Put the recommendation into the checkpoint's configuration, which is replaced as a whole or not at all."""
    content = json.loads(config.read_text("utf-8"))
    content["open_gem"] = {key: best[key] for key in ("size", "temperature_scale")}
    replace_text(config, json.dumps(content, indent=2) + "\n")


def write_table(file: Path, rows: list[dict]) -> None:
    """Keep what was measured beside the checkpoint, one row a line."""
    replace_text(file, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def replace_text(file: Path, text: str) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    main()
