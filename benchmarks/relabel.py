"""How fast thresholds change without the model, beside labelling with it.

    python benchmarks/relabel.py [--images 16] [--copies 8]

The model in the package labels scenes of 480 × 640 pixels at short:448 for 12 labels, presence 0.5. The parts are then
copied, so that relabelling has work for some seconds, and their objects are made again by other thresholds, in one
process. Processor time is compared, which depends little on what else the machine does.
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from time import process_time

from PIL import Image

from open_gem.data.scenes import CONCEPTS, scene
from open_gem.label.labeling import load_labeling
from open_gem.label.local import run
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Parts
from open_gem.label.relabel import relabel
from open_gem.label.rules import ObjectRules
from open_gem.label.sources import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 16), ("copies", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    classes = Ontology.of(list(CONCEPTS[:12]), presence=0.5)
    labeling = load_labeling(classes, "embedded", device="cpu", size="short:448")
    labeling.localizer.acknowledge()
    with tempfile.TemporaryDirectory() as place:
        photos, folder = Path(place, "photos"), Path(place, "labels")
        photos.mkdir()
        for seed in range(options.images):
            Image.fromarray(scene(seed, (480, 640)).image).save(photos / f"{seed}.jpg", quality=90)
        source = open_source(str(photos))
        parts = Parts.claim(folder, labeling.manifest(source))
        start = process_time()
        run(parts, labeling, source)
        cost = (process_time() - start) / options.images
        objects = sum(len(row["objects"]) for row in parts.rows("objects.list.element.label")) / options.images
        print(f"label: {cost:.3f} s of processor time an image, {objects:.1f} objects an image")
        for path in parts.paths():
            for copy in range(1, options.copies):
                other = parts.path(f"{copy:04}-{path.stem.removeprefix('part-')}")
                shutil.copyfile(path, other)
                shutil.copyfile(parts.kept_path(path), parts.kept_path(other))
        rules = replace(ObjectRules.of(parts.manifest.settings), min_area=0.001)
        start = process_time()
        relabel(parts, rules, workers=1)
        again = (process_time() - start) / (options.images * options.copies)
        print(f"relabel: {again:.3f} s, {cost / again:.0f} times less")


if __name__ == "__main__":
    main()
