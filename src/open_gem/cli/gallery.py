"""The pictures of `open-gem demo --gallery`: every method side by side, refinements and label maps, with a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from open_gem.cli.demo import BACKGROUND, scene_and_prompts
from open_gem.files import write_file
from open_gem.images.draw import plain, segmentation
from open_gem.images.sheet import Head, png, sheet
from open_gem.localization.drawing import BARS, head_of, overlay_of
from open_gem.method.table import METHODS
from open_gem.refine import REFINEMENTS, find_refinement

if TYPE_CHECKING:
    from open_gem.localization import Localization
    from open_gem.localizer import Localizer

TILE = 200  # pixels of a drawing
COLUMNS = 6  # of a sheet of many methods

PAGE = """# Gallery

Made by `open-gem demo --gallery` with the model {model}, from synthetic scenes {seeds}. The scenes were chosen because
GEM locates their objects; the model's card has the numbers over 500 scenes that were not chosen.

Each heatmap is stretched to its own range. Presence is a probability of the whole image, the same for every method: a
label below {presence} is absent and crossed out.

"""


def write_gallery(localizer: "Localizer", seeds: Sequence[int], out: Path) -> Path:
    """Write sheets and a page in Markdown into a folder; returns the path of the page."""
    from open_gem.localization import PRESENCE

    page = PAGE.format(model=localizer.name, seeds=", ".join(map(str, seeds)), presence=PRESENCE)
    label_maps, refined = [], []
    for seed in seeds:
        drawn, prompts = scene_and_prompts(seed)
        image = Image.fromarray(drawn.image)
        encoded = localizer.encode(image, list(METHODS))
        results = {name: localizer.locate(features, prompts) for name, features in encoded.items()}
        write_file(out / f"methods-{seed}.png", png(_methods(image, results)))
        names = ", ".join(drawn.names)
        page += f"## Scene {seed}: {names}\n\n![Every method on scene {seed}: {names}](methods-{seed}.png)\n\n"
        label_maps.append(
            [plain(image), *(_label_map(image, results[name]) for name in ("gem", "clip_surgery", "clip"))]
        )
        refined.append(_refined(image, results["gem"]))
    heads = [Head("image"), Head("gem"), Head("clip_surgery"), Head("clip")]
    write_file(out / "label-maps.png", png(sheet(label_maps, columns=heads, tile=TILE)))
    heads = [Head("image"), Head("gem"), *(Head(f"gem, {name}") for name in REFINEMENTS)]
    write_file(out / "refinements.png", png(sheet(refined, columns=heads, bar=BARS["minmax"], tile=TILE)))
    page += f"""## Label maps

Prompts compete at every pixel; below a probability of {BACKGROUND} a pixel is background.

![Label maps by three methods](label-maps.png)

## Refinements

![GEM alone and refined](refinements.png)
"""
    write_file(out / "gallery.md", page.encode())
    return out / "gallery.md"


def _methods(image: Image.Image, results: "dict[str, Localization]") -> Image.Image:
    """The first object of a scene by every method."""
    first = next(iter(results.values()))
    tiles = [plain(image, "image")]
    tiles += [overlay_of(result, image, 0, result.objects(), caption=name) for name, result in results.items()]
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    head = head_of(first, 0)
    return sheet(rows, columns=[head], bar=BARS["minmax"], tile=TILE)


def _label_map(image: Image.Image, result: "Localization") -> Image.Image:
    return segmentation(image, result.segment(BACKGROUND), result.labels)


def _refined(image: Image.Image, result: "Localization") -> list[Image.Image]:
    refinements = [find_refinement(name).refine(image, result) for name in REFINEMENTS]
    return [plain(image), *(overlay_of(each, image, 0, each.objects()) for each in (result, *refinements))]
