"""Labels a source in a process of its own, which tests kill: `python label_child.py SOURCE OUT MODEL LOG [engine]`.

Every image that the model sees is a line in LOG with the process's id, so that what was done twice can be counted.
"""

import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import set_num_threads  # not torch: cloudpickle would take `.classes` in `make` for torch.classes

from open_gem.label import control, local
from open_gem.label.done import writing
from open_gem.label.labeling import Labeling, LocatedImage, PreparedImage, load_labeling
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Parts
from open_gem.label.sources import Columns, open_source

PART = 50
PAUSE = float(os.environ.get("PAUSE", "0"))  # seconds a batch, for tests that need time to act


class Logged(Labeling):
    log = ""

    def locate(self, group: Sequence[PreparedImage]) -> list[LocatedImage]:
        time.sleep(PAUSE)
        located = super().locate(group)
        with Path(self.log).open("a") as file:
            file.write("".join(f"{os.getpid()} {one.item.id}\n" for one in group))
        return located


def make(model: str, log: str) -> Labeling:
    set_num_threads(1)
    plain = load_labeling(Ontology.of(["cat", "dog"], presence=0.0), model, device="cpu")
    logged = Logged(plain.localizer, plain.classes, plain.outputs)
    object.__setattr__(logged, "log", log)
    return logged


def main(images: str, out: str, model: str, log: str, engine: str = "local") -> None:
    source = open_source(images, Columns(id="id" if images.endswith(".csv") else None))
    labeling, folder = make(model, log), Path(out)
    with control.stopping(print) as stop, writing(folder):
        parts = Parts.claim(folder, labeling.manifest(source))
        if engine == "local":
            tally = local.run(parts, labeling, source, images_per_part=PART, workers=2, stop=stop.event)
        else:
            from open_gem.label import on_ray

            workers = int(os.environ.get("ACTORS", "1"))
            made = partial(make, model, log)
            tally = on_ray.run(
                parts, labeling, source, make=made, images_per_part=PART, workers=workers, stop=stop.event
            )
    print(f"done {tally.labeled} {tally.failed} {tally.done}")


if __name__ == "__main__":
    main(*sys.argv[1:])
