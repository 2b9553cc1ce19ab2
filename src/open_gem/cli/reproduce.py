"""`open-gem reproduce`: the paper's tables and figures, each a list of pathways and a renderer."""

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.text import Text

from open_gem.checks import did_you_mean
from open_gem.cli._app import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    PretrainedOption,
    app,
    load_localizer,
    new_console,
    progress_bar,
)
from open_gem.errors import InputError

PROBE = 4  # images that a plan is timed on


@app.command()
def reproduce(
    what: Annotated[
        list[str] | None, typer.Argument(help="table1, table2 …, figure5, or all.", show_default="all")
    ] = None,
    dataset: Annotated[str, typer.Option(help="A name of `open-gem data`.")] = "scenes",
    data_root: Annotated[Path | None, typer.Option(help="The folder that holds its files; scenes need none.")] = None,
    split: Annotated[str | None, typer.Option(help="Which part; else the usual one.")] = None,
    protocol: Annotated[str, typer.Option(help="How it is asked: paper, official or field.")] = "paper",
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first images only.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would run, and about how long; run four images.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images of one shape at a time.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode ahead.")] = 2,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path, typer.Option(help="Folder for the report, its plots and the counts.")] = Path(
        "open_gem_paper"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure tables and figures of the paper on one model and data set, all from one pass over the data.

    Without a network: on synthetic scenes, with the model in the package. Interrupted, the same command goes on where
    it was.
    """
    from open_gem.datasets import open_dataset
    from open_gem.evaluate import measure
    from open_gem.experiments import EXPERIMENTS, PICTURES, curves, markdown, union
    from open_gem.experiments import reproduce as measure_all
    from open_gem.files import check_writable, write_file
    from open_gem.protocols import find_protocol
    from open_gem.save import save_picture

    known = [*EXPERIMENTS, *PICTURES]
    wanted = known if not what or what == ["all"] else what
    for name in wanted:
        if name not in known:
            raise InputError(f"unknown experiment {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    names, drawn = ([name for name in wanted if name in some] for some in (EXPERIMENTS, PICTURES))
    asked, data = find_protocol(protocol), open_dataset(dataset, data_root, split)
    check_writable(out)
    localizer = load_localizer(model, pretrained, device, dtype)
    count, layers = min(limit or len(data), len(data)), localizer.backbone.layers
    console, loop = new_console(), {"batch": batch, "workers": workers}
    if plan:
        if drawn:
            console.print(Text(f"{', '.join(drawn)}: seconds"))
        if not names:
            return
        pathways, start = union(names, layers), perf_counter()
        few = range(min(PROBE, count))
        for _ in measure(localizer, pathways, data, few, asked, **loop):
            pass
        minutes = (perf_counter() - start) / len(few) * count / 60
        over = f"one pass over {count} images of {data.name} with {localizer.backbone.name}"
        console.print(Text(f"{', '.join(names)}: {len(pathways)} pathways from {over}, about {minutes:.0f} minutes"))
        return
    found = {}
    if names:
        with progress_bar(count, quiet) as advance:
            settings = {"protocol": asked, "limit": limit, "progress": advance, **loop}
            found = measure_all(names, localizer, data, out / "runs", **settings)
    parts = [f"# {localizer.backbone.name} on {data.name} ({data.split}), {count} images, protocol {protocol}\n"]
    for name in names:
        parts.append(markdown(name, found[name], data.name))
        for score, picture in curves(name, found[name], layers).items():
            file = f"{name}.{score}.png"
            save_picture(out / file, picture)
            parts.append(f"![{name}, {score}]({file})\n")
    for name in drawn:
        about, draw = PICTURES[name]
        save_picture(out / f"{name}.png", draw(localizer, data, asked))
        parts.append(f"## {name.capitalize()}: {about}\n\n![{name}]({name}.png)\n")
    write_file(out / "report.md", "\n".join(parts).encode())
    console.print(Text(f"Look at {out / 'report.md'}"))
