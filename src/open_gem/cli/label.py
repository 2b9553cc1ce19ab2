"""`open-gem label`: many images into Parquet."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from open_gem.cli._app import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PretrainedOption,
    app,
    counted,
    new_console,
    print_json,
    progress_bar,
    say,
    warn_of_commas,
)
from open_gem.cli.labels import OUT, conclude
from open_gem.errors import InputError

if TYPE_CHECKING:
    from open_gem.label.control import Estimate, Stop
    from open_gem.label.done import Shard, Tally
    from open_gem.label.labeling import Labeling
    from open_gem.label.ontology import Ontology
    from open_gem.label.parts import Parts
    from open_gem.label.sources import Source

Engine = Callable[..., "Tally"]
WHAT, HOW, RUN = "What is looked for", "How", "The run"  # panels of the help


@app.command()
def label(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a pattern, a list (.txt, .csv, .tsv, .parquet) of paths or URLs, tars, Parquet with "
            "images, a data set that `datasets` saved; local or remote."
        ),
    ],
    ontology: Annotated[
        Path | None,
        typer.Option(
            "--ontology",
            "-c",
            help="Labels, their phrases and thresholds: YAML, JSON or a class file.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", help="Instead, a label that is its own phrase; repeat it.", rich_help_panel=WHAT
        ),
    ] = None,
    first_is_background: Annotated[
        bool,
        typer.Option(
            "--first-is-background", help="The class file's first line is the background.", rich_help_panel=WHAT
        ),
    ] = False,
    presence: Annotated[
        float | None,
        typer.Option(
            help="Of labels without their own: look only where the label is in the image with this probability; else "
            "the file's, or 0.9.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Likewise: a pixel belongs where the map is above; else the file's, or 0.5.", rich_help_panel=WHAT
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="Of maps under thresholds: minmax, cosine or probability.", rich_help_panel=WHAT)
    ] = "minmax",
    per: Annotated[
        str, typer.Option(help="An object is a connected component, or all of a label.", rich_help_panel=WHAT)
    ] = ("component"),
    least_area: Annotated[
        float, typer.Option(help="Share of the picture below which an object is a speck.", rich_help_panel=WHAT)
    ] = 0.0005,
    outputs: Annotated[
        str, typer.Option(help="Some of boxes, masks, points, labelmap, heatmaps, by commas.", rich_help_panel=WHAT)
    ] = "boxes,masks,points",
    out: Annotated[Path, typer.Option(help="Folder for the parts.")] = OUT,
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    method: Annotated[str, typer.Option(help="A name of `open-gem methods`.", rich_help_panel=HOW)] = "gem",
    size: Annotated[
        str | None, typer.Option(help="Size rule; else as the model recommends.", rich_help_panel=HOW)
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="What a phrase is put into, or an ensemble's name.", rich_help_panel=HOW)
    ] = None,
    window: Annotated[int | None, typer.Option(help="Side of sliding windows in pixels.", rich_help_panel=HOW)] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Let maps follow the picture's edges (PAMR).", rich_help_panel=HOW)
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    engine: Annotated[
        str, typer.Option(help="local, or ray: as many machines as its cluster has.", rich_help_panel=RUN)
    ] = "local",
    batch: Annotated[int, typer.Option(min=1, help="Images of one shape at a time.", rich_help_panel=RUN)] = 8,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that read and decode; with ray, model actors.", rich_help_panel=RUN),
    ] = None,
    part: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images of a part, which is what a kill costs; else 1000, with ray 256.", rich_help_panel=RUN
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Of a table: the column of pictures or paths.", rich_help_panel=RUN)
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Of a table: the column of ids.", rich_help_panel=RUN)] = None,
    read_timeout: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=86400,
            help="Seconds for one remote read, and for decoding one image; then it has an error.",
            rich_help_panel=RUN,
        ),
    ] = 60.0,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Try images again that had an error.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count, label a few, estimate; write nothing.", rich_help_panel=RUN)
    ] = False,
    watch: Annotated[
        float | None, typer.Option(min=0.1, help="Look for new images every so many seconds.", rich_help_panel=RUN)
    ] = None,
    settle: Annotated[
        float,
        typer.Option(
            min=0, help="With --watch: seconds since the last change of a file that is taken.", rich_help_panel=RUN
        ),
    ] = 2.0,
    samples: Annotated[
        int, typer.Option(min=0, help="Images a label on the page of samples; 0: no page.", rich_help_panel=RUN)
    ] = 8,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Label a folder, or ten million images: objects, boxes, masks and points into Parquet, one row an image.

    Interrupt it anywhere: the same command goes on where it was. An image that cannot be read is a row with the reason.
    Several graphics cards: `torchrun --nproc-per-node N --no-python open-gem label …`.
    """
    from open_gem.files import check_writable
    from open_gem.images.views import WHOLE, Views
    from open_gem.label.done import Shard
    from open_gem.label.recipe import Recipe
    from open_gem.label.sources import Columns, open_source
    from open_gem.refine.pamr import Pamr
    from open_gem.text import TEMPLATE

    if engine not in ENGINES:
        raise InputError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}")
    work = ENGINES[engine]()
    wanted = _ontology(ontology, prompt, first_is_background, presence=presence, threshold=threshold)
    images = open_source(source, Columns(column, id_column, read_timeout))
    if images.note:
        say(f"note: {images.note}")
    if watch is None:
        images.check_not_empty()
    if not dry_run:
        check_writable(out)
    shard = Shard.of_environment()
    recipe = Recipe(
        wanted,
        model,
        pretrained,
        _device(device),
        dtype,
        method,
        size,
        TEMPLATE if template is None else template,
        WHOLE if window is None else Views(window=window),
        Pamr() if refine else None,
        tuple(name.strip() for name in outputs.split(",")),
        scale,
        per,
        least_area,
        read_timeout,
    )
    if retry_errors and shard.of > 1:
        raise InputError("--retry-errors given under torchrun, expected one process: it changes parts of all")
    labeling = recipe.make()
    if dry_run:
        _show_estimate(_estimate(labeling, images, out, shard, batch, workers, retry_errors), as_json)
        return
    settings: dict[str, Any] = {"batch": batch, "workers": workers}
    if part is not None:
        settings["rows"] = part
    if engine == "ray":
        settings["make"] = recipe.make
    looks = Watched(watch, settle)
    parts, tally, stop = _run(labeling, images, out, shard, work, settings, looks, retry_errors, quiet)
    if tally.twice:
        say(f"warning: {counted(tally.twice, 'image')} listed again under an id that was there, and not labelled again")
    if shard.of == 1:
        conclude(parts, samples, as_json)
    else:
        counts = f"{counted(tally.labeled, 'image')} labelled, {tally.failed} with an error"
        say(f"process {shard.index}: {counts}; see open-gem labels {out}")
    if stop.signal is not None and watch is None:
        done = counted(tally.labeled + tally.failed, "image")
        say(f"stopped: {done} done now; the same command goes on with the rest")
        raise typer.Exit(128 + stop.signal)
    if tally.failed and shard.of == 1:  # torchrun would end all others
        raise typer.Exit(1)


# What was asked for ---------------------------------------------------------------------------------------------------


def _ontology(
    path: Path | None, prompts: list[str] | None, first_is_background: bool, **thresholds: float | None
) -> "Ontology":
    from open_gem.label.ontology import Ontology

    if (path is None) == (not prompts):
        given = "neither" if path is None else "both"
        raise InputError(f"--ontology and --prompt: {given} given, expected one of them")
    if path is None:
        warn_of_commas("-p", prompts or [])
        return Ontology.of(prompts, **thresholds)
    return Ontology.read(path, first_is_background, **thresholds)


def _device(given: str) -> str:
    """Under torchrun each process has the graphics card of its own number."""
    if given == "auto" and (local := os.environ.get("LOCAL_RANK")) is not None:
        import torch

        return f"cuda:{local}" if torch.cuda.is_available() else given
    return given


class Watched(NamedTuple):
    """Seconds between looks, None for one only; and since the last change of a file that is taken."""

    every: float | None
    settle: float


# Running --------------------------------------------------------------------------------------------------------------


def _run(
    labeling: "Labeling",
    source: "Source",
    out: Path,
    shard: "Shard",
    engine: Engine,
    settings: dict[str, Any],
    watched: "Watched",
    retry_errors: bool,
    quiet: bool,
) -> "tuple[Parts, Tally, Stop]":
    """Label, once or again and again; what there is in the end, and what came of the last time."""
    from open_gem.label import control
    from open_gem.label.done import Ids, Tally, done_in, writing
    from open_gem.label.parts import Parts
    from open_gem.label.summary import write_left
    from open_gem.label.watching import watch

    with control.stopping(say) as stop, _leaving(stop), writing(out, shard):
        parts = Parts.claim(out, labeling.manifest(source))
        if retry_errors and (forgotten := parts.forget_errors()):
            say(f"trying {counted(len(forgotten), 'image')} with an error again")

        def once(images: "Source", done: Ids) -> Tally:
            total = 0 if quiet or watched.every is not None or shard.of > 1 else _count(images)
            with progress_bar(total, quiet) as advance:
                advance(min(total, len(done)))
                tally = engine(
                    parts, labeling, images, shard=shard, stop=stop.event, done=done, progress=advance, **settings
                )
            if tally.is_whole:
                write_left(parts.folder, tally.left)
            return tally

        if watched.every is None:
            return parts, once(source, done_in(parts)), stop
        tally = Tally()
        alone = shard.of == 1
        for tally in watch(once, parts, source, watched.every, stop.event, settle=watched.settle, retry=alone):
            if not quiet and tally.labeled + tally.failed:
                counts = f"{counted(tally.labeled, 'image')} labelled, {tally.failed} with an error"
                say(f"{counts}; looking for more, Ctrl-C ends it")
        return parts, tally, stop


@contextmanager
def _leaving(stop: "Stop") -> Iterator[None]:
    """A second signal ends the process at once when what is inside has written what it had."""
    from open_gem.label.control import leave

    try:
        yield
    except KeyboardInterrupt:
        if stop.signal is None:
            raise
        say("ended at once: the same command goes on with the rest")
        leave(stop.signal)


def _local() -> Engine:
    from open_gem.label.local import run

    return run


def _ray() -> Engine:
    from open_gem.label.on_ray import check_installed, run

    check_installed()
    return run


ENGINES = {"local": _local, "ray": _ray}


def _count(source: "Source") -> int:
    """How many images there are, where a person watches a bar; else nobody needs to know."""
    return sum(1 for _ in source.items()) if new_console(to_stderr=True).is_terminal else 0


def _estimate(
    labeling: "Labeling",
    source: "Source",
    out: Path,
    shard: "Shard",
    batch: int,
    workers: int | None,
    retry_errors: bool,
) -> "Estimate":
    from open_gem.label.control import estimate
    from open_gem.label.done import done_in
    from open_gem.label.parts import Parts

    manifest = labeling.manifest(source)
    Parts.check_claim(out, manifest)
    done = done_in(Parts(out, manifest), errors=not retry_errors)
    return estimate(labeling, source, done, shard=shard, batch=batch, workers=workers)


# Showing --------------------------------------------------------------------------------------------------------------


def _show_estimate(found: "Estimate", as_json: bool) -> None:
    tally = found.tally
    left = tally.listed - tally.there - tally.twice
    told = {"images": tally.listed, "done": tally.there, "twice": tally.twice, "left": left, "sampled": found.sampled}
    told |= {"passed_over": tally.left.ordered(), "seconds": found.seconds, "bytes": found.size}
    if as_json:
        print_json(told)
        return
    typer.echo(f"{counted(tally.listed, 'image')}: {tally.there} done, {left} left, {tally.twice} listed twice")
    if tally.left:
        typer.echo(f"Passed over in the source: {tally.left}")
    if found.seconds is not None and found.size is not None:
        speed = left / found.seconds
        duration, size = _duration(found.seconds), found.size / 1e6
        typer.echo(f"about {duration} at {speed:.1f} images/s, and {size:.1f} MB; by {found.sampled} of them")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
