"""`open-gem demo`: the main job, offline, on a synthetic scene."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from open_gem.cli.app import app, comma_separated, new_console, new_table, print_json
from open_gem.cli.ground import settings_of
from open_gem.cli.options import JsonOption, ModelOptions, with_options

METHOD = "gem"


@app.command()
@with_options
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("open_gem_demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which scene.")] = 0,
    model: ModelOptions,
    as_json: JsonOption = False,
) -> None:
    """Make a scene of known objects, locate them and one that is absent, and draw the result. Needs no network."""
    from PIL import Image

    from open_gem.cli.save import ImageResult, draw_overlay, save_picture, slugs, write_json
    from open_gem.data.scenes import CONCEPTS, scene
    from open_gem.files import check_writable, write_file
    from open_gem.images.draw import contact_sheet

    check_writable(out)
    localizer = model.or_embedded().load(method=METHOD).acknowledge()
    known = scene(seed, size=512)
    absent = next(name for name in CONCEPTS if name not in known.names)
    image, prompts = Image.fromarray(known.image), [*known.names, absent]
    located = ImageResult(str(out / "scene.png"), image, localizer(image, prompts))
    overlays = [draw_overlay(located, index) for index in range(len(prompts))]

    save_picture(out / "scene.png", image)
    for slug, overlay in zip(slugs(prompts), overlays, strict=True):
        save_picture(out / f"scene.{slug}.overlay.png", overlay)
    save_picture(out / "contact-sheet.png", contact_sheet([image, *overlays]))
    settings = settings_of(localizer, {METHOD: localizer.resolve(METHOD)})[METHOD]
    document = {"seed": seed, **located.document(settings)}
    for entry, mask, box in zip(document["prompts"], known.masks, known.boxes, strict=False):
        x, y = entry["point"]
        entry.update(object_box=box.tolist(), point_in_object=bool(mask[y, x]))
    document["prompts"][-1].update(object_box=None, point_in_object=None)
    write_file(out / "result.json", partial(write_json, document))

    if as_json:
        print_json(document)
    _print_demo(document, out, to_stderr=as_json)


def _print_demo(document: dict[str, Any], out: Path, *, to_stderr: bool) -> None:
    verdicts = {True: "yes", False: "no", None: "not in the image"}
    table = new_table("prompt", "score", "point x, y", "best box x, y, x, y", "point in object", title="demo")
    for entry in document["prompts"]:
        best = entry["boxes"][0]["xyxy"] if entry["boxes"] else None
        row = entry["prompt"], f"{entry['score']:.3f}", comma_separated(entry["point"]), comma_separated(best)
        table.add_row(*map(Text, (*row, verdicts[entry["point_in_object"]])))
    console = new_console(to_stderr)
    console.print(table)
    console.print(Text(f"Look at {out / 'contact-sheet.png'}; everything is in {out}"))
    console.print(Text(f'Try: open-gem ground {out / "scene.png"} -p "{document["prompts"][0]["prompt"]}"'))
