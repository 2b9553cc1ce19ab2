"""`open-gem demo`: the main job, offline, on a scene made on the spot."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from open_gem.cli._app import (
    DeviceOption,
    JsonOption,
    ModelOption,
    PretrainedOption,
    app,
    load_localizer,
    new_console,
    new_table,
    numbers,
    print_json,
    settings_of,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("open_gem_demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which scene.")] = 0,
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make a scene of known objects, find them and one thing that is absent, and draw the result. Needs no network."""
    from PIL import Image

    from open_gem.cli.save import Found, draw_overlay, save_picture, slugs, write_json
    from open_gem.data.scenes import CONCEPTS, scene
    from open_gem.files import check_writable, write_file
    from open_gem.images.draw import contact_sheet

    check_writable(out)
    localizer = load_localizer(model, pretrained, device, "float32", method="gem")
    made = scene(seed, size=512)
    absent = next(name for name in CONCEPTS if name not in made.names)
    picture, phrases = Image.fromarray(made.image), [*made.names, absent]
    found = Found(str(out / "scene.png"), picture, localizer(picture, phrases))
    pictures = [draw_overlay(found, index) for index in range(len(phrases))]

    save_picture(out / "scene.png", picture)
    for slug, drawn in zip(slugs(phrases), pictures, strict=True):
        save_picture(out / f"scene.{slug}.overlay.png", drawn)
    save_picture(out / "contact-sheet.png", contact_sheet([picture, *pictures]))
    document = {"seed": seed, **found.document(settings_of(localizer, {"gem": localizer.settings("gem")})["gem"])}
    for entry, mask, box in zip(document["prompts"], made.masks, made.boxes, strict=False):
        x, y = entry["point"]
        entry.update(object_box=box.tolist(), point_in_object=bool(mask[y, x]))
    document["prompts"][-1].update(object_box=None, point_in_object=None)
    write_file(out / "result.json", partial(write_json, document))

    if as_json:
        print_json(document)
    _print_demo(document, out, to_stderr=as_json)


def _print_demo(document: dict[str, Any], out: Path, *, to_stderr: bool) -> None:
    verdicts = {True: "yes", False: "no", None: "not in the picture"}
    table = new_table("phrase", "score", "point x, y", "best box x, y, x, y", "point in object", title="demo")
    for entry in document["prompts"]:
        best = entry["boxes"][0]["xyxy"] if entry["boxes"] else None
        row = entry["prompt"], f"{entry['score']:.3f}", numbers(entry["point"]), numbers(best)
        table.add_row(*map(Text, (*row, verdicts[entry["point_in_object"]])))
    console = new_console(to_stderr)
    console.print(table)
    console.print(Text(f"Look at {out / 'contact-sheet.png'}; everything is in {out}"))
    console.print(Text(f'Try: open-gem ground {out / "scene.png"} -p "{document["prompts"][0]["prompt"]}"'))
