"""`open-gem evaluate` and `open-gem report`: methods measured on a data set, and the tables of all runs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from open_gem.cli.app import app, new_console, new_table, print_json, progress_bar, resumable, say
from open_gem.cli.options import (
    DataOptions,
    ImageSizeOption,
    JsonOption,
    ModelOptions,
    QuietOption,
    RefineOption,
    TextStepOption,
    absent_option,
    parse_methods,
    parse_refinement,
    with_options,
)
from open_gem.errors import InputError

if TYPE_CHECKING:
    from open_gem.localizer import Localizer
    from open_gem.method.table import Method
    from open_gem.paper.report import Cell
    from open_gem.paper.runs import Run

OUT = Path("open_gem_results")
DEFAULT = "clip,maskclip,clip_surgery,gem"
MIN_COLUMNS = 3  # columns of a table on a narrow terminal


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
    absent: Annotated[str | None, absent_option("the protocol's: none")] = None,
    refine: RefineOption = None,
    text_step: TextStepOption = None,
    model: ModelOptions,
    image_size: ImageSizeOption = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs; each has a folder of its own in it.")] = OUT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure methods on a data set. The model sees each image once for all methods. Models that were trained to
    localize are measured as they are.

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
    from open_gem.method.text_steps import find_text_step
    from open_gem.paper.runs import read_run

    # Checked before a model is loaded.
    names, protocol = parse_methods(method or DEFAULT), find_protocol(data.protocol)
    with_temperature_scale(METHODS["gem"], temperature_scale)
    index, count = parse_shard(shard)
    if image_size is not None:
        protocol = replace(protocol, size=check_size_rule(image_size))
    if absent is not None:
        protocol = replace(protocol, absent=absent)
    if refine is not None:
        protocol = replace(protocol, refinement=parse_refinement(refine))
    if text_step is not None:
        protocol = replace(protocol, text_step=find_text_step(text_step))
    images = open_dataset(dataset, data.data_root, data.split)
    ids = runs.shard(images.ids[: data.limit], index, count)
    if not ids:
        say(f"warning: shard {shard} has none of the {len(images.ids[: data.limit])} images")
        return
    check_writable(out)
    options = {
        "--method": method,
        "--image-size": image_size,
        "--temperature-scale": temperature_scale,
        "--refine": refine,
        "--text-step": text_step,
    }
    model.check_untrained(option for option, value in options.items() if value is not None)
    localizer = model.or_embedded().load_any().acknowledge() if dataset == "scenes" else model.load_any()
    methods = chosen_methods(localizer, names, temperature_scale) if isinstance(localizer, Localizer) else {}
    store = runs.Store.at(out, runs.settings_of(localizer, methods, images, protocol))
    with resumable(), progress_bar(len(ids), quiet) as advance:
        runs.run(store, localizer, methods, images, protocol, ids=ids, progress=advance, **data.loop)
    results = read_run(store, ids)
    for image, error in results.failed.items():
        say(f"error: {image}: {error}")
    if as_json:
        for document in results.documents():
            print_json(document)
    elif results.scores:
        print_runs([results])
        typer.echo(f"All runs so far: open-gem report {out}")
    if results.failed:
        raise typer.Exit(1)


def chosen_methods(localizer: "Localizer", names: list[str], temperature_scale: float | None) -> "dict[str, Method]":
    """Return the methods on this model, by name."""
    return {name: with_temperature_scale(localizer.resolve(name), temperature_scale) for name in names}


def with_temperature_scale(method: "Method", scale: float | None) -> "Method":
    """Return the method with another temperature scale, if its temperature is adaptive. Raises MethodError."""
    from open_gem.method.table import Tempered

    is_adaptive = isinstance(method.attention, Tempered) and method.attention.is_adaptive
    return method.replace(temperature_scale=scale) if is_adaptive and scale is not None else method


def parse_shard(text: str) -> tuple[int, int]:
    """Parse "0/4" as the numbers 0 and 4. Raises InputError."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"shard is {text!r}, expected i/n with i from 0 to n - 1, such as 0/4")
    return int(index), int(count)


def print_runs(runs: "Sequence[Run]") -> None:
    """Print a table for each run; scores that do not fit are named below it."""
    from open_gem.paper.report import tables

    console = new_console()
    for title, about, head, rows in tables(runs):
        shown, unlimited = len(head), console.options.update(max_width=1000)
        while console.measure(table := _table(head[:shown], rows), options=unlimited).maximum > console.width:
            if shown == MIN_COLUMNS:
                break  # the table wraps
            shown -= 1
        console.print(Text(title, style="bold"))
        console.print(Text(", ".join(f"{name} {value}" for name, value in about.items()), style="dim"))
        console.print(table)
        if hidden := head[shown:]:
            console.print(Text(f"No room for {', '.join(hidden)}: see --out report.html", style="dim"))
        console.print()


def _table(head: Sequence[str], rows: "Sequence[tuple[str, list[Cell]]]") -> Table:
    """Return a table of the columns in `head`: the first score with its interval, the others without."""
    table = new_table()
    for index, name in enumerate(head):
        # A name of several words is split over as many lines.
        heading = name if index < 2 else name.replace(" ", "\n")
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for name, cells in rows:
        first, *others = cells[: len(head) - 1]
        table.add_row(name, str(first), *(cell.value for cell in others))
    return table


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `open-gem evaluate` or `reproduce`.")] = OUT,
    format: Annotated[
        str | None,
        typer.Option(
            help="markdown, html or csv.",
            show_default="that of --out's name; without --out, a table on a terminal and Markdown elsewhere",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A method: how much better each other method of its runs is, with paired intervals."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the report: .html, .csv or .md.", show_default="stdout")
    ] = None,
) -> None:
    """Print the scores of all runs, a table each: per cent, 95 % intervals, and the paper's values if it has any; or
    the differences between methods of one run."""
    from open_gem.files import write_file
    from open_gem.paper.report import ENDINGS, render
    from open_gem.paper.runs import collect

    runs = collect(folder, against)
    if out is not None:
        write_file(out, render(runs, format or ENDINGS.get(out.suffix.lower(), "markdown")).encode())
    elif format is None and new_console().is_terminal:
        print_runs(runs)
    else:
        typer.echo(render(runs, format or "markdown"), nl=False)
