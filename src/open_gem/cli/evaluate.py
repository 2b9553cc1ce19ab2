"""`open-gem evaluate` and `open-gem report`: methods measured on a data set, and the tables of all runs."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_gem.cli.app import app, new_console, new_table, print_json, progress_bar, resumable, say
from open_gem.cli.options import (
    DataOptions,
    ImageSizeOption,
    JsonOption,
    ModelOptions,
    QuietOption,
    parse_methods,
    with_options,
)
from open_gem.errors import InputError

if TYPE_CHECKING:
    from open_gem.localizer import Localizer
    from open_gem.method.table import Method

OUT = Path("open_gem_results")
DEFAULT = "clip,maskclip,clip_surgery,gem"


@app.command()
@with_options
def evaluate(
    dataset: Annotated[str, typer.Argument(help="A name of `open-gem data`.")] = "scenes",
    *,
    data: DataOptions,
    shard: Annotated[
        str, typer.Option(help="i/n: the i-th of n shares of the images, by their names; 0/1 is all.")
    ] = "0/1",
    method: Annotated[
        str | None,
        typer.Option(help="Names of `open-gem methods`, comma-separated, or all.", show_default=DEFAULT),
    ] = None,
    temperature_scale: Annotated[
        float | None,
        typer.Option(
            help="Temperature scale of methods with an adaptive temperature; 1 is the paper's.",
            show_default="the model's recommendation",
        ),
    ] = None,
    model: ModelOptions,
    image_size: ImageSizeOption = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs; each has a folder of its own in it.")] = OUT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure methods on a data set. The model sees each image once for all methods. GroupViT, CLIPSeg and OWL, which
    were trained to localize, are measured as they are.

    Rerun the same command to resume an interrupted run. Shards may run anywhere, with the same --out or one that is
    copied there; together they give the same result as one run, bit for bit.
    """
    from open_gem.data import open_dataset
    from open_gem.evaluation import store as runs
    from open_gem.evaluation.protocol import find_protocol
    from open_gem.files import check_writable
    from open_gem.images.pixels import check_size_rule
    from open_gem.localizer import Localizer
    from open_gem.method.table import METHODS
    from open_gem.paper.report import summary

    # Checked before a model is loaded.
    names, protocol = parse_methods(method or DEFAULT), find_protocol(data.protocol)
    with_temperature_scale(METHODS["gem"], temperature_scale)
    index, count = parse_shard(shard)
    if image_size is not None:
        protocol = replace(protocol, size=check_size_rule(image_size))
    images = open_dataset(dataset, data.data_root, data.split)
    ids = runs.shard(images.ids[: data.limit], index, count)
    if not ids:
        say(f"warning: shard {shard} of {len(images.ids[: data.limit])} images has none")
        return
    check_writable(out)
    options = {"--method": method, "--image-size": image_size, "--temperature-scale": temperature_scale}
    model.check_untrained(option for option, value in options.items() if value is not None)
    localizer = model.or_embedded().load_any().acknowledge() if dataset == "scenes" else model.load_any()
    methods = chosen_methods(localizer, names, temperature_scale) if isinstance(localizer, Localizer) else {}
    store = runs.Store.at(out, runs.settings_of(localizer, methods, images, protocol))
    with resumable(), progress_bar(len(ids), quiet) as advance:
        runs.run(store, localizer, methods, images, protocol, ids=ids, progress=advance, **data.loop)
    lines = summary(store, ids)
    failed = {image: error for image, error in store.read().failed.items() if image in set(ids)}
    for image, error in failed.items():
        say(f"error: {image}: {error}")
    if as_json:
        for line in lines:
            print_json(line.document())
    elif lines:
        print_scores(lines, f"{images.name} {images.split}", len(failed), out)
    if failed:
        raise typer.Exit(1)


def chosen_methods(localizer: "Localizer", names: list[str], temperature_scale: float | None) -> "dict[str, Method]":
    """The methods on this model, by name."""
    return {name: with_temperature_scale(localizer.resolve(name), temperature_scale) for name in names}


def with_temperature_scale(method: "Method", scale: float | None) -> "Method":
    """The method with another temperature scale, if its temperature is adaptive. Raises MethodError."""
    from open_gem.method.table import Tempered

    is_adaptive = isinstance(method.attention, Tempered) and method.attention.is_adaptive
    return method.replace(temperature_scale=scale) if is_adaptive and scale is not None else method


def parse_shard(text: str) -> tuple[int, int]:
    """The numbers of "0/4". Raises InputError."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"shard is {text!r}, expected i/n with i from 0 to n - 1, such as 0/4")
    return int(index), int(count)


def print_scores(lines: list[Any], data: str, failed: int, out: Path) -> None:
    """Print a row of scores for each method."""
    images = f"{lines[0].images} of {lines[0].total} images" + (f", {failed} failed" if failed else "")
    table = new_table("method", *lines[0].scores, title=f"{data}, {images}")
    for line in lines:
        table.add_row(line.method, *(f"{estimate.value:.3f}" for estimate in line.scores.values()))
    console = new_console()
    console.print(table)
    console.print(f"With intervals and all other runs: open-gem report {out}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `open-gem evaluate` or `reproduce`.")] = OUT,
    format: Annotated[str, typer.Option(help="markdown, html or csv.")] = "markdown",
    against: Annotated[
        str | None,
        typer.Option(help="A method: how much better each other method of its runs is, with paired intervals."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the table.", show_default="stdout")] = None,
) -> None:
    """Print the scores of all runs in one table: per cent, 95 % intervals, and the paper's values if it has any; or the
    differences between methods of one run."""
    from open_gem.files import write_file
    from open_gem.paper.report import collect, render

    text = render(collect(folder, against), format)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_file(out, text.encode())
