"""`open-gem demo`: the main job, offline, on synthetic scenes."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from open_gem.cli.app import app, comma_separated, new_console, new_table, print_json
from open_gem.cli.ground import settings_of
from open_gem.cli.options import JsonOption, ModelOptions, with_options
from open_gem.files import check_writable, write_file

if TYPE_CHECKING:
    from PIL import Image

    from open_gem.cli.save import ImageResult
    from open_gem.data.scenes import Scene
    from open_gem.images.sheet import Head
    from open_gem.localization import Localization
    from open_gem.localizer import Localizer

SEED, SIZE, BACKGROUND = 126, 512, 0.8  # of the scene; its side in pixels; of the label map, as in the paper
# Scenes of the gallery whose objects GEM locates; the model's card has the numbers over 500 scenes without selection.
SEEDS = (19, 44, 46, 58, 83, 85, 126, 351)
NAMES = {"clip": "CLIP's own patches", "gem": "GEM"}


@app.command()
@with_options
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("open_gem_demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which scene.")] = SEED,
    gallery: Annotated[
        bool,
        typer.Option("--gallery", help="Draw every method on eight scenes, refinements and label maps, with a page."),
    ] = False,
    model: ModelOptions,
    as_json: JsonOption = False,
) -> None:
    """Make a scene of known objects, locate them and one that is absent, and draw the result. Needs no network."""
    check_writable(out)
    localizer = model.or_embedded().load().acknowledge()
    if gallery:
        from open_gem.cli.gallery import write_gallery

        page = write_gallery(localizer, SEEDS, out)
        new_console(as_json).print(Text(f"Look at {page}"))
        return
    document = _demo(localizer, seed, out)
    if as_json:
        print_json(document)
    _print_demo(document, out, to_stderr=as_json)


def scene_and_prompts(seed: int) -> "tuple[Scene, list[str]]":
    """Return a scene, the names of its objects, and a name that it does not show."""
    from open_gem.data.scenes import CONCEPTS, scene

    drawn = scene(seed, size=SIZE)
    return drawn, [*drawn.names, next(name for name in CONCEPTS if name not in drawn.names)]


def _demo(localizer: "Localizer", seed: int, out: Path) -> dict[str, Any]:
    """Write the files of the demo; returns its document."""
    from PIL import Image

    from open_gem.cli.save import ImageResult, save_image, slugs, write_json
    from open_gem.images.sheet import png

    drawn, prompts = scene_and_prompts(seed)
    image = Image.fromarray(drawn.image)
    encoded = localizer.encode(image, list(NAMES))
    by_method = {
        method: ImageResult(str(out / "scene.png"), image, localizer.locate(features, prompts))
        for method, features in encoded.items()
    }
    located = by_method["gem"]
    save_image(out / "scene.png", image)
    for index, slug in enumerate(slugs(prompts)):
        save_image(out / f"scene.{slug}.overlay.png", located.overlay(index, bar=True))
    write_file(out / "demo.png", png(demo_sheet(by_method)))

    settings = settings_of(localizer, {"gem": localizer.resolve("gem")})["gem"]
    document = {"seed": seed, **located.document(settings)}
    for entry, mask, box in zip(document["labels"], drawn.masks, drawn.boxes, strict=False):
        x, y = entry["point"]
        entry.update(object_box=box.tolist(), point_in_object=bool(mask[y, x]))
    document["labels"][-1].update(object_box=None, point_in_object=None)
    write_file(out / "result.json", partial(write_json, document))
    return document


def demo_sheet(by_method: "Mapping[str, ImageResult]") -> "Image.Image":
    """Return a sheet: the image and its label map, and each prompt by CLIP's own patches above GEM."""
    from open_gem.images.draw import draw_caption, plain, segmentation
    from open_gem.images.sheet import Head, sheet
    from open_gem.localization.drawing import BARS

    located = by_method["gem"]
    result = located.result
    label_map = segmentation(located.image, result.segment(BACKGROUND), result.labels, legend=False)
    draw_caption(label_map, "GEM, prompts compete")
    heads = colored_heads(result)
    first = {"clip": plain(located.image, "image"), "gem": label_map}
    rows = [
        [first[method], *(by_method[method].overlay(index, caption=name) for index in range(len(heads)))]
        for method, name in NAMES.items()
    ]
    return sheet(rows, columns=[Head(""), *heads], bar=BARS["minmax"], tile=420)


def colored_heads(result: "Localization") -> "list[Head]":
    """Return labels with their presence and their colours in label maps."""
    from open_gem.images.colors import label_color
    from open_gem.localization.drawing import head_of

    return [head_of(result, index)._replace(color=label_color(index)) for index in range(len(result.labels))]


def _print_demo(document: dict[str, Any], out: Path, *, to_stderr: bool) -> None:
    verdicts = {True: "yes", False: "no", None: "not in the image"}
    table = new_table(
        "prompt", "presence", "score", "point x, y", "best box x, y, x, y", "point in object", title="demo"
    )
    boxes = {obj["label"]: obj["box"] for obj in reversed(document["objects"])}
    for entry in document["labels"]:
        verdict = verdicts[entry["point_in_object"]]
        presence, score = f"{entry['presence']:.2f}", f"{entry['score']:.3f}"
        if entry["present"]:
            place = comma_separated(entry["point"]), comma_separated(boxes.get(entry["label"]))
            table.add_row(*map(Text, (entry["label"], presence, score, *place, verdict)))
        else:
            table.add_row(Text(entry["label"], "strike"), f"{presence} absent", score, "", "", verdict, style="dim")
    console = new_console(to_stderr)
    console.print(table)
    console.print(Text(f"Look at {out / 'demo.png'}; everything is in {out}"))
    label = document["labels"][0]["label"]
    console.print(Text(f'Try: open-gem ground {out / "scene.png"} -p "{label}" --model embedded'))
