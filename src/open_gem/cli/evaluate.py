"""`open-gem evaluate` and `open-gem report`: methods against what is known, and the tables of all runs."""

from pathlib import Path
from typing import Annotated

import typer

from open_gem.cli._app import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PretrainedOption,
    app,
    going_on,
    load_any,
    names_of,
    new_console,
    new_table,
    print_json,
    progress_bar,
    say,
    tuned,
)
from open_gem.errors import InputError

OUT = Path("open_gem_results")
DEFAULT = "clip,maskclip,clip_surgery,gem"


@app.command()
def evaluate(
    dataset: Annotated[str, typer.Argument(help="A name of `open-gem data`.")] = "scenes",
    data_root: Annotated[Path | None, typer.Option(help="The folder that holds its files; scenes need none.")] = None,
    split: Annotated[str | None, typer.Option(help="Which part; else the usual one.")] = None,
    protocol: Annotated[str, typer.Option(help="How it is asked: paper, official or field.")] = "paper",
    method: Annotated[
        str | None, typer.Option(help="Names of `open-gem methods`, by commas, or all.", show_default=DEFAULT)
    ] = None,
    temperature_scale: Annotated[
        float | None,
        typer.Option(help="Of adaptive temperatures, not the model's own; 1 is the paper's."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", "--count", min=1, help="The first images only.")] = None,
    shard: Annotated[str, typer.Option(help="i/n: the i-th of n parts, by the images' names; 0/1 is all.")] = "0/1",
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    size: Annotated[str | None, typer.Option(help="Size rule; else the protocol's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of one shape at a time.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode ahead.")] = 2,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path, typer.Option(help="Folder of all runs; each has one of its own in it.")] = OUT,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure methods on a data set. The model sees each image once for all of them. GroupViT, CLIPSeg and OWL, which
    were trained to localize, are measured as they are.

    Interrupt it anywhere: the same command goes on where it was. Shards may run anywhere, with the same --out or one
    that is copied there; together they are one run, to the bit.
    """
    from dataclasses import replace

    from open_gem.data import open_dataset
    from open_gem.evaluation import store as runs
    from open_gem.evaluation.protocol import find_protocol
    from open_gem.files import check_writable
    from open_gem.images.pixels import check_size_rule
    from open_gem.localizer import Localizer
    from open_gem.method.table import METHODS
    from open_gem.paper.report import summary

    names, asked = (
        names_of(method or DEFAULT),
        find_protocol(protocol),
    )  # what is wrong is said before a model is loaded
    tuned("gem", METHODS["gem"], temperature_scale=temperature_scale)
    index, parts = _shard(shard)
    if size is not None:
        asked = replace(asked, size=check_size_rule(size))
    data = open_dataset(dataset, data_root, split)
    ids = runs.shard(data.ids[:limit], index, parts)
    if not ids:
        say(f"warning: shard {shard} of {len(data.ids[:limit])} images has none")
        return
    check_writable(out)
    localizer = load_any(model, pretrained, device, dtype)
    chosen = {}
    if isinstance(localizer, Localizer):
        settings = {name: localizer.resolve(name) for name in names}
        chosen = {
            name: tuned(name, setting, temperature_scale=temperature_scale) if setting.is_adaptive else setting
            for name, setting in settings.items()
        }
    elif method is not None or size is not None or temperature_scale is not None:
        raise InputError(f"{model} was trained to localize: it has no --method, --size or --temperature-scale")
    store = runs.Store.at(out, runs.settings_of(localizer, chosen, data, asked))
    with going_on(), progress_bar(len(ids), quiet) as advance:
        runs.run(store, localizer, chosen, data, asked, ids=ids, progress=advance, batch_size=batch, workers=workers)
    lines, failed = summary(store, ids), store.read().failed
    for image in ids:
        if image in failed:
            say(f"error: {image}: {failed[image]}")
    if as_json:
        for line in lines:
            print_json(line.document())
    elif lines:
        images = f"{lines[0].images} of {lines[0].total} images" + (f", {lines[0].failed} failed" if failed else "")
        table = new_table("method", *lines[0].scores, title=f"{data.name} {data.split}, {images}")
        for line in lines:
            table.add_row(line.method, *(f"{found.value:.3f}" for found in line.scores.values()))
        console = new_console()
        console.print(table)
        console.print(f"With intervals and all other runs: open-gem report {out}")
    if failed.keys() & set(ids):
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `open-gem evaluate` or `reproduce` filled.")] = OUT,
    format: Annotated[str, typer.Option(help="markdown, html or csv.")] = "markdown",
    against: Annotated[
        str | None,
        typer.Option(help="A method: how much better each other one of its runs is, with paired intervals."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file; else it is printed.")] = None,
) -> None:
    """The scores of all runs in one table: per cent, 95 % intervals, and what the paper has where it has something; or
    the differences between methods of one run."""
    from open_gem.files import write_file
    from open_gem.paper.report import collect, render

    text = render(collect(folder, against), format)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_file(out, text.encode())


def _shard(given: str) -> tuple[int, int]:
    first, slash, step = given.partition("/")
    if not (slash and first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise InputError(f"shard is {given!r}, expected i/n with i from 0 to n - 1, such as 0/4")
    return int(first), int(step)
