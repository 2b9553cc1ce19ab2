"""The images of `open-gem demo --gallery`: every method side by side, refinements and label maps, with a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from open_gem.cli.demo import BACKGROUND, colored_heads, scene_and_prompts
from open_gem.files import write_file
from open_gem.images.draw import plain, segmentation
from open_gem.images.sheet import Head, png, sheet
from open_gem.localization import PRESENCE
from open_gem.localization.drawing import BARS, head_of, overlay_of
from open_gem.method.table import METHODS
from open_gem.refine import find_refinement, names_alone

if TYPE_CHECKING:
    from open_gem.localization import Localization
    from open_gem.localizer import Localizer

TILE = 200  # pixels of a drawing
COLUMNS = 6  # columns of a sheet of many methods

PAGE = """# Gallery

Made by `open-gem demo --gallery` with the model {model}. The scenes were chosen because GEM locates their objects; the
model's card has the numbers over 500 scenes that were not chosen.

Each heatmap is stretched to its own range. Presence is a probability of the whole image, the same for every method;
labels below {presence} are absent. In a label map the prompts compete at every pixel; if the best probability is below
{background}, the pixel is background.
"""

SCENE = """
## Scene {seed}: {names}

![{first} by every method](methods-{seed}.png)

![Refined, and label maps](maps-{seed}.png)
"""


def write_gallery(localizer: "Localizer", seeds: Sequence[int], out: Path) -> Path:
    """Write sheets and a page in Markdown into a folder; returns the path of the page."""
    page = PAGE.format(model=localizer.name, presence=PRESENCE, background=BACKGROUND)
    for seed in seeds:
        drawn, prompts = scene_and_prompts(seed)
        image = Image.fromarray(drawn.image)
        encoded = localizer.encode(image, list(METHODS))
        results = {name: localizer.locate(features, prompts) for name, features in encoded.items()}
        write_file(out / f"methods-{seed}.png", png(_methods(image, results)))
        write_file(out / f"maps-{seed}.png", png(_maps(image, results)))
        page += SCENE.format(seed=seed, names=", ".join(drawn.names), first=drawn.names[0])
    write_file(out / "gallery.md", page.encode())
    return out / "gallery.md"


def _methods(image: Image.Image, results: "dict[str, Localization]") -> Image.Image:
    """Draw the first object of a scene by every method."""
    tiles = [plain(image, "image")]
    tiles += [overlay_of(result, image, 0, result.objects(), caption=name) for name, result in results.items()]
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    return sheet(rows, columns=[head_of(results["gem"], 0)], bar=BARS["minmax"], tile=TILE)


def _maps(image: Image.Image, results: "dict[str, Localization]") -> Image.Image:
    """Draw the first object with and without refinements, and label maps."""
    gem = results["gem"]
    refined = {f"gem, {name}": find_refinement(name).refine(image, gem) for name in names_alone()}
    tiles = {
        "image": plain(image),
        **{name: overlay_of(result, image, 0, caption="") for name, result in {"gem": gem, **refined}.items()},
        **{
            f"labels, {name}": segmentation(image, result.segment(BACKGROUND), result.labels, legend=False)
            for name, result in {"clip": results["clip"], "gem": gem, **refined}.items()
        },
    }
    return sheet([[*tiles.values()]], columns=[Head(name) for name in tiles], names=[colored_heads(gem)], tile=TILE)
