"""Peak memory of labelling large files: `python benchmarks/label_memory.py`, see docs/validation/performance.md.

Makes the files, labels each by `open-gem label` in a process of its own, and prints the most that process had.
"""

import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from open_gem.data.scenes import CONCEPTS, scene

CHILD = """
import atexit
from pathlib import Path
from open_gem.cli import main
lines = lambda: Path("/proc/self/status").read_text().splitlines()
atexit.register(lambda: print([line.split()[1] for line in lines() if line.startswith("VmHWM")][0]))
main()
"""


def peak(source: Path, out: Path, *arguments: str) -> int:
    """MB of `open-gem label`, resident at most."""
    command = [sys.executable, "-c", CHILD, "label", str(source), "--out", str(out), "--device", "cpu", "-q"]
    done = subprocess.run([*command, "--samples", "0", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) // 1024


def images(folder: Path, count: int, side: int) -> Path:
    folder.mkdir()
    image = Image.fromarray(scene(3, 300).image).resize((side, side))
    for number in range(count):
        image.save(folder / f"{number}.jpg", quality=90)
    return folder


def table(path: Path, count: int, side: int, dictionary: bool) -> Path:
    """Images of noise, so that nothing makes them small, in one row group."""
    chance = np.random.default_rng(0)
    cells = []
    for _ in range(count):
        file = io.BytesIO()
        noise = chance.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, format="PNG", compress_level=0)
        cells.append({"bytes": file.getvalue(), "path": None})
    parquet.write_table(pa.table({"image": cells}), path, use_dictionary=dictionary, row_group_size=10**6)
    return path


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        two, twenty = place / "two.json", place / "twenty.json"
        for path, count in ((two, 2), (twenty, 20)):
            path.write_text(json.dumps({"labels": CONCEPTS[:count], "presence": 0.0}))
        small = images(place / "small", 1, 300)
        large = images(place / "one", 1, 9000)
        for title, source, arguments in (
            ("300 x 300, twenty labels", small, ["-c", str(twenty)]),
            ("9000 x 9000, two labels", large, ["-c", str(two)]),
            ("9000 x 9000, twenty labels", large, ["-c", str(twenty)]),
            ("Parquet, 300 images in its dictionary", table(place / "a.parquet", 300, 830, True), ["-p", "cat"]),
            ("Parquet, 3900 images, no dictionary", table(place / "b.parquet", 3900, 230, False), ["-p", "cat"]),
        ):
            out = place / f"out-{len(title)}-{source.name}"
            print(f"{title:40} {peak(source, out, *arguments):6} MB", flush=True)


if __name__ == "__main__":
    main()
