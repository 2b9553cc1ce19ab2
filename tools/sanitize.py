"""Run the kernels in C under sanitizers, at odd shapes and strides: `python tools/sanitize.py`, some minutes.

Each kernel is compiled with `tools/sanitize.c` by the C compiler that `open_gem` would choose, for this processor:
once for addresses and undefined behaviour, once for data races between threads. A finding ends the command with the
sanitizer's report and status 1. A kernel that this processor or compiler cannot have is skipped, with the reason.
Sanitizers do not see tiles or masked vectors; all memory is therefore also laid out once before a page that cannot be
read, where one number too many ends the program.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"attention.c": "float", "attention_amx.c": "uint16_t"}
SANITIZERS = ("address,undefined", "thread")
SKIPPED = 77


def sanitize(kernel: str, sanitizers: str, folder: Path) -> bool:
    """Compile and run one kernel; print what was found, and return True if that is nothing."""
    program = folder / "sanitized"
    command = (
        *(shlex.split(os.environ.get("CC", "")) or ["cc"]),
        *("-O1", "-g", "-march=native", "-ffp-contract=fast", "-fno-omit-frame-pointer", "-pthread"),
        *(f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-Wno-psabi"),
        *(f'-DKERNEL="{ROOT / "src/open_gem/method/kernels" / kernel}"', f"-DNUMBER={KERNELS[kernel]}"),
        *("-o", str(program), str(ROOT / "tools/sanitize.c"), "-lm"),
    )
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    label = f"{kernel}, {sanitizers}"
    if built.returncode:
        lines = built.stderr.strip().splitlines()
        is_unsupported = "#error" in built.stderr
        print(f"{label}: {'skipped' if is_unsupported else 'not built'}: {lines[-1] if lines else built.returncode}")
        return is_unsupported
    # threads are placed where this sanitizer expects them only without random addresses
    run = (*(("setarch", "-R") if sanitizers == "thread" else ()), str(program))
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode == SKIPPED:
        print(f"{label}: skipped: the system does not grant the processor's tiles")
        return True
    print(f"{label}: {done.stdout.strip() if done.returncode == 0 else done.stderr.strip() or done.returncode}")
    return done.returncode == 0


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        clean = [sanitize(kernel, kinds, Path(scratch)) for kernel in KERNELS for kinds in SANITIZERS]
    sys.exit(not all(clean))


if __name__ == "__main__":
    main()
