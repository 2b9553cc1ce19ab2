"""Time and memory of a set of ten million ids: `python benchmarks/ids.py`."""

import time
from pathlib import Path

from open_gem.label.done import HashedIdSet

COUNT = 10_000_000


def resident() -> float:
    """Memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


if __name__ == "__main__":
    before, start = resident(), time.perf_counter()
    ids = HashedIdSet(f"folder/{number}/image-{number}.jpg" for number in range(COUNT))
    print(f"{len(ids)} ids: {time.perf_counter() - start:.0f} s, {resident() - before:.0f} MB")
