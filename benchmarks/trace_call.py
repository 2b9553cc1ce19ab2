"""What one call runs through: functions of the package, files, and constructions of settings.

    python benchmarks/trace_call.py

Traces `localizer(image, three prompts)` with the embedded model, after one call that warms caches up.
"""

import sys
from collections import Counter
from pathlib import Path

import open_gem
from open_gem.data.scenes import scene

PACKAGE = str(Path(open_gem.__file__).parent)


def main() -> None:
    localizer = open_gem.load("embedded", device="cpu").acknowledge()
    image = scene(0, size=512).image
    prompts = ["a cat", "a dog", "a bicycle"]
    localizer(image, prompts)
    calls: Counter[tuple[str, str]] = Counter()

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls[code.co_filename, code.co_qualname] += 1

    sys.setprofile(watch)
    localizer(image, prompts)
    sys.setprofile(None)
    named = {key for key in calls if not key[1].endswith(">")}  # without comprehensions and lambdas
    methods = sum(count for (_, name), count in calls.items() if name == "Method.__post_init__")
    print(f"{len(calls)} functions, {len(named)} of them with a name, in {len({file for file, _ in calls})} files")
    print(f"{sum(calls.values())} calls, {methods} constructions of a method")
    for (file, name), count in calls.most_common(8):
        print(f"{count:6} {Path(file).relative_to(PACKAGE)}: {name}")


if __name__ == "__main__":
    main()
