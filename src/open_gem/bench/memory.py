"""Peak memory of one case, in a process that does nothing else: `python -m open_gem.bench.memory CASE SETTING`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from open_gem.bench.subject import Setting, Subject
from open_gem.errors import InputError
from open_gem.files import to_json

STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory(NamedTuple):
    """MiB with the model loaded, and at the peak."""

    rest: float
    peak: float


def resident() -> Memory:
    """Return the memory of this process now, and its peak. Raises InputError on systems without /proc."""
    if not STATUS.is_file():
        raise InputError("memory is measured on Linux only")
    lines = dict(line.split(":", 1) for line in STATUS.read_text("utf-8").splitlines() if ":" in line)
    return Memory(*(int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")))


def measure_memory(case: str, setting: Setting) -> Memory:
    """Measure the memory of `case` in a new process. Raises InputError if that fails."""
    return run_alone([sys.executable, "-m", "open_gem.bench.memory", case, to_json(asdict(setting))])


def run_alone(command: Sequence[str]) -> Memory:
    """Run a command and return the `Memory` that it prints as JSON. Raises InputError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = f"killed by signal {-done.returncode}" if done.returncode < 0 else done.stderr.strip().splitlines()[-1]
        raise InputError(f"memory could not be measured: {last}")
    return Memory(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    import torch

    from open_gem.bench.cases import CASES, GROUPS

    case, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    with torch.no_grad():
        subject = Subject(setting)
        work = CASES[case].make(subject)
        _ = subject.tower if CASES[case].counts else subject.localizer if case in GROUPS["answers"] else None  # loaded
        rest = resident().rest
        RESET_PEAK.write_text("5")  # importing and building do not count
        work()
    print(to_json([rest, resident().peak]))


if __name__ == "__main__":
    main()
