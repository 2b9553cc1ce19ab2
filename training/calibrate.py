"""Choose the temperature multiplier and the size rule that a checkpoint recommends, on validation scenes only.

    python training/calibrate.py src/open_gem/backbones/embedded

Measures GEM over a grid of both on scenes of the validation range (never the held-out ones), prints the table, and
writes the best pointing game's pair, with the table beside it, into the "open_gem" section of open_clip_config.json.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import open_gem
from open_gem import PATHWAYS, Localizer
from open_gem.evaluate import evaluate_scenes

VALIDATION = 500_000
SCALES = (2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)
SIZES = ("short:128", "short:192", "short:256")


def measure(localizer: Localizer, size: str, images: int) -> Iterator[dict]:
    """One row a temperature scale: GEM's scores at this size."""
    pathways = {str(scale): replace(PATHWAYS["gem"], temperature_scale=scale) for scale in SCALES}
    resized = replace(localizer, size=size)
    outcomes = evaluate_scenes(resized, pathways, range(VALIDATION, VALIDATION + images))
    for scale in SCALES:
        scores = outcomes[str(scale)].scores()
        yield {"size": size, "temperature_scale": scale, **{name: round(value, 4) for name, value in scores.items()}}


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
    best = max(rows, key=lambda row: row["pointing_game"])
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
