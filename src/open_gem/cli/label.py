"""`open-gem label`: objects of many images into Parquet."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_gem.cli.app import app, counted, new_console, print_json, progress_bar, say
from open_gem.cli.options import (
    ClassOptions,
    ExclusiveOption,
    JsonOption,
    ModelOptions,
    NmsOption,
    QuietOption,
    ViewOptions,
    split_commas,
    with_options,
)
from open_gem.cli.summary import OUT, SamplesOption, conclude
from open_gem.errors import InputError

if TYPE_CHECKING:
    from open_gem.label.control import Estimate, Stop
    from open_gem.label.done import Shard, Tally
    from open_gem.label.labeling import Labeling
    from open_gem.label.parts import Parts
    from open_gem.label.sources import Source

Engine = Callable[..., "Tally"]
OBJECTS, SOURCE, RUN = "Objects", "Source", "Run"  # panels of the help


@dataclass(frozen=True)
class ObjectOptions:
    """Which objects count, and what is stored of them."""

    presence: Annotated[
        float | None,
        typer.Option(
            help="Presence below which a label is absent and has no objects; for labels without their own.",
            show_default="the class file's, or 0.5",
            rich_help_panel=OBJECTS,
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Heatmaps above it are the mask; for labels without their own.",
            show_default="the class file's, or 0.5",
            rich_help_panel=OBJECTS,
        ),
    ] = None
    heatmap_scale: Annotated[
        str | None,
        typer.Option(
            help="Scale of the maps that are thresholded: minmax, cosine or probability.",
            show_default="minmax",
            rich_help_panel=OBJECTS,
        ),
    ] = None
    instances: Annotated[
        str | None,
        typer.Option(
            help='One object per connected "component", or one per "label".',
            show_default="component",
            rich_help_panel=OBJECTS,
        ),
    ] = None
    min_area: Annotated[
        float | None,
        typer.Option(
            help="Smallest object, as a share of the image's pixels.", show_default="0.0005", rich_help_panel=OBJECTS
        ),
    ] = None
    absent: Annotated[
        str | None,
        typer.Option(
            help="Which labels are absent and have no objects: by presence; by denoise, those that win no patch "
            "clearly; or none.",
            show_default="presence",
            rich_help_panel=OBJECTS,
        ),
    ] = None
    exclusive: ExclusiveOption = None
    nms: NmsOption = None
    outputs: Annotated[
        str | None,
        typer.Option(
            help="What to store, comma-separated: boxes, masks, points, labelmap.",
            show_default="boxes,masks,points",
            rich_help_panel=OBJECTS,
        ),
    ] = None

    def rules(self) -> dict[str, Any]:
        """Return the options that are set, except thresholds, as settings of `label.rules.ObjectRules`."""
        names = ("heatmap_scale", "instances", "min_area", "absent", "exclusive", "nms")
        rules = {name: value for name in names if (value := getattr(self, name)) is not None}
        return rules if self.outputs is None else {**rules, "outputs": tuple(split_commas(self.outputs))}


@dataclass(frozen=True)
class KeepOptions:
    """What is kept for other thresholds later."""

    keep: Annotated[
        bool,
        typer.Option(
            "--keep/--no-keep",
            help="Keep what the model saw: `open-gem relabel` then changes thresholds without the model.",
            rich_help_panel=OBJECTS,
        ),
    ] = True
    keep_floor: Annotated[
        float | None,
        typer.Option(
            help="Keep only maps of labels with this presence or more: with many labels most of the size.",
            show_default="0, all maps",
            rich_help_panel=OBJECTS,
        ),
    ] = None

    def floor(self) -> float | None:
        """Return the floor of presence, None if nothing is kept. Raises InputError for a floor of nothing."""
        if self.keep_floor is not None and not self.keep:
            raise InputError("--keep-floor and --no-keep given, expected one of them")
        return (self.keep_floor or 0.0) if self.keep else None


@dataclass(frozen=True)
class SourceOptions:
    """How images are read."""

    column: Annotated[
        str | None, typer.Option(help="Table column holding images or paths.", rich_help_panel=SOURCE)
    ] = None
    id_column: Annotated[str | None, typer.Option(help="Table column holding ids.", rich_help_panel=SOURCE)] = None
    read_timeout: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=86400,
            help="Timeout in seconds for one remote read, and for decoding one image; on expiry the row records an "
            "error.",
            rich_help_panel=SOURCE,
        ),
    ] = 60.0
    watch: Annotated[
        float | None, typer.Option(min=0.1, help="Look for new images every N seconds.", rich_help_panel=SOURCE)
    ] = None
    settle: Annotated[
        float,
        typer.Option(
            min=0, help="With --watch: seconds without a change before a file is read.", rich_help_panel=SOURCE
        ),
    ] = 2.0

    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop after N new images; the same command without it labels the rest.", rich_help_panel=SOURCE
        ),
    ] = None
    sample: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Only N images of the source, chosen at random: the same for the same --seed in whichever order they "
            "are listed, and a larger N adds to them.",
            rich_help_panel=SOURCE,
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(help="With --sample: another number gives other images.", rich_help_panel=SOURCE)
    ] = 0

    def open(self, source: str) -> "Source":
        """Open the source of images, or a sample of it. Raises InputError for an empty source, unless it is watched,
        and for a part of one that is watched."""
        from open_gem.label.sampling import sample
        from open_gem.label.sources import Columns, open_source

        for name, value in (("limit", self.limit), ("sample", self.sample)):
            if value is not None and self.watch is not None:
                raise InputError(f"--{name} and --watch given, expected one of them: a source that grows has no end")

        images = open_source(source, Columns(self.column, self.id_column, self.read_timeout))
        if images.note:
            say(f"note: {images.note}")
        if self.watch is None:
            images.check_not_empty()
        return images if self.sample is None else sample(images, self.sample, self.seed)


@dataclass(frozen=True)
class RunOptions:
    """How the work is done."""

    engine: Annotated[str, typer.Option(help="local, or ray: on all machines of its cluster.", rich_help_panel=RUN)] = (
        "local"
    )
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one shape at a time.", rich_help_panel=RUN)] = 8
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that read and decode; with ray, model actors.", rich_help_panel=RUN),
    ] = None
    images_per_part: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per output file: the most that a crash can lose.",
            show_default="1000, with ray 256",
            rich_help_panel=RUN,
        ),
    ] = None
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Retry images that had an error.", rich_help_panel=RUN)
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count, label a few, estimate; write nothing.", rich_help_panel=RUN)
    ] = False

    def find_engine(self) -> Engine:
        """Return the function that runs a labelling. Raises InputError for an unknown engine, or one that is not
        installed."""
        if self.engine not in ENGINES:
            raise InputError(f"engine is {self.engine!r}, expected one of {', '.join(ENGINES)}")
        if self.engine == "ray":
            from open_gem.label.on_ray import check_installed

            check_installed()
        return import_module(ENGINES[self.engine]).run

    def settings(self, make: "Callable[[], Labeling]") -> dict[str, Any]:
        """Return the settings of the engine."""
        settings: dict[str, Any] = {"batch_size": self.batch_size, "workers": self.workers}
        if self.images_per_part is not None:
            settings["images_per_part"] = self.images_per_part
        if self.engine == "ray":
            settings["make"] = make
        return settings


@app.command()
@with_options
def label(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a pattern, a list (.txt, .csv, .tsv, .parquet) of paths or URLs, tars, Parquet with "
            "images, a data set that `datasets` saved; local or remote."
        ),
    ],
    *,
    classes: ClassOptions,
    objects: ObjectOptions,
    keeping: KeepOptions,
    out: Annotated[Path, typer.Option(help="Folder for the Parquet files.")] = OUT,
    model: ModelOptions,
    method: Annotated[str, typer.Option(help="A name of `open-gem methods`.")] = "gem",
    views: ViewOptions,
    reading: SourceOptions,
    running: RunOptions,
    samples: SamplesOption = 8,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Label a folder, or ten million images: objects with boxes, masks and points into Parquet, one row per image.

    Rerun the same command to resume an interrupted job. Unreadable images are recorded with the error. Several GPUs:
    `torchrun --nproc-per-node N --no-python open-gem label …`.
    """
    from open_gem.files import check_writable
    from open_gem.label.done import Shard

    engine = running.find_engine()
    make = labeling_maker(classes, objects, keeping, model, method, views, reading.read_timeout)
    images, shard = reading.open(source), Shard.of_environment()
    if not running.dry_run:
        check_writable(out)
    if running.retry_errors and shard.of > 1:
        raise InputError("--retry-errors given under torchrun, expected a single process: it changes all parts")
    labeling = make()
    if (caution := labeling.localizer.acknowledge().caution) is not None:
        say(f"warning: {caution}")
    if (note := note_on_keeping(labeling, keeping)) is not None:
        say(f"note: {note}")
    limit = shard.share(reading.limit)
    if running.dry_run:
        print_estimate(estimate(labeling, images, out, shard, running, limit), as_json)
        return
    settings = {**running.settings(make), "limit": limit}
    job = LabelJob(labeling, images, out, shard, engine, settings, quiet or reading.watch is not None)
    parts, tally, stop = job.run(reading, running.retry_errors, quiet)
    report(parts, tally, shard, samples, as_json)
    if tally.is_limited:
        say("stopped at the limit: the same command without --limit labels the rest")
    elif reading.sample is not None and stop.signal is None:
        say("a sample is labelled: the same command without --sample labels the rest")
    if stop.signal is not None and reading.watch is None:
        finished = counted(tally.labeled + tally.failed, "image")
        say(f"stopped: {finished} done now; rerun the same command to resume")
        raise typer.Exit(128 + stop.signal)
    if tally.failed and shard.of == 1:  # under torchrun it would end all other processes
        raise typer.Exit(1)


def labeling_maker(
    classes: ClassOptions,
    objects: ObjectOptions,
    keeping: KeepOptions,
    model: ModelOptions,
    method: str,
    views: ViewOptions,
    read_timeout: float,
) -> "Callable[[], Labeling]":
    """Return a function that loads the model, here or in another process. Raises InputError and PromptError for invalid
    settings; the function raises those of the model, too."""
    from open_gem.label.labeling import load_labeling
    from open_gem.text import TEMPLATE

    return partial(
        load_labeling,
        classes.read(presence=objects.presence, threshold=objects.threshold),
        model.model,
        model.pretrained,
        device=find_device(model.device),
        dtype=model.dtype,
        method=method,
        size=views.image_size,
        template=TEMPLATE if classes.template is None else classes.template,
        views=views.views(),
        refinement=views.refinement(),
        text_step=views.step_on_text(),
        objects={**objects.rules(), "keep": keeping.floor(), "read_timeout": read_timeout},
    )


MANY_PROMPTS = 100  # of which maps are kept without a floor, and a note says what they take


def note_on_keeping(labeling: "Labeling", keeping: KeepOptions) -> str | None:
    """Return what to know about what is kept, None if it is as usual."""
    if keeping.keep and labeling.keep is None:
        return "views merged as logits have no patch grid: nothing is kept for `open-gem relabel`"
    prompts = len(labeling.classes.vocabulary.all_prompts)
    if labeling.keep == 0 and prompts > MANY_PROMPTS:
        size = 2e-6 * prompts * labeling.localizer.patches()
        return (
            f"maps of {prompts} prompts are kept, about {size:.1f} MB an image: --keep-floor 0.1 keeps those of likely "
            "labels, --no-keep none"
        )
    return None


def find_device(device: str) -> str:
    """Return the device; under torchrun, "auto" is the GPU of the process's own number."""
    if device == "auto" and (local_rank := os.environ.get("LOCAL_RANK")) is not None:
        import torch

        return f"cuda:{local_rank}" if torch.cuda.is_available() else device
    return device


# Running --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelJob:
    """A labelling job and the folder of its rows."""

    labeling: "Labeling"
    source: "Source"
    out: Path
    shard: "Shard"
    engine: Engine
    settings: dict[str, Any]
    hides_progress: bool

    def run(self, reading: SourceOptions, retry_errors: bool, quiet: bool) -> "tuple[Parts, Tally, Stop]":
        """Label once, or repeatedly while the source is watched; return the parts, and the counts of the last round."""
        from open_gem.label import control
        from open_gem.label.done import Tally, done_in, writing
        from open_gem.label.parts import Parts
        from open_gem.label.watching import watch

        with control.stopping(say) as stop, _exit_on_second_signal(stop), writing(self.out, self.shard):
            parts = Parts.claim(self.out, self.labeling.manifest(self.source))
            if retry_errors and (forgotten := parts.forget_errors()):
                say(f"retrying {counted(len(forgotten), 'image')} with an error")

            def label_new(images: "Source", done: Any) -> Tally:
                return self.label_new(parts, images, done, stop)

            if reading.watch is None:
                return parts, label_new(self.source, done_in(parts)), stop
            tally, is_alone = Tally(), self.shard.of == 1
            rounds = watch(
                label_new, parts, self.source, reading.watch, stop.event, settle=reading.settle, retry=is_alone
            )
            for tally in rounds:
                if not quiet and tally.labeled + tally.failed:
                    say(f"{counts_of(tally)}; waiting for more, Ctrl-C ends it")
            return parts, tally, stop

    def label_new(self, parts: "Parts", images: "Source", done: Any, stop: "Stop") -> "Tally":
        """Label the images that are not `done`."""
        from open_gem.label.summary import write_passed_over

        total = 0 if self.hides_progress or self.shard.of > 1 else _count(images)
        if (limit := self.settings.get("limit")) is not None:
            total = min(total, len(done) + limit)
        with progress_bar(total, self.hides_progress) as advance:
            advance(min(total, len(done)))
            tally = self.engine(
                parts,
                self.labeling,
                images,
                shard=self.shard,
                stop=stop.event,
                done=done,
                progress=advance,
                **self.settings,
            )
        if tally.is_whole:
            write_passed_over(parts.folder, tally.passed_over)
        return tally


@contextmanager
def _exit_on_second_signal(stop: "Stop") -> Iterator[None]:
    """End the process at once on a second signal, once the code inside has written its results."""
    from open_gem.label.control import leave

    try:
        yield
    except KeyboardInterrupt:
        if stop.signal is None:
            raise
        say("ended at once: rerun the same command to resume")
        leave(stop.signal)


ENGINES = {"local": "open_gem.label.local", "ray": "open_gem.label.on_ray"}
"""Modules with a function `run`."""


def _count(source: "Source") -> int:
    """Return the number of images if a terminal shows a progress bar, otherwise 0."""
    return sum(1 for _ in source.items()) if new_console(to_stderr=True).is_terminal else 0


def estimate(
    labeling: "Labeling", source: "Source", out: Path, shard: "Shard", running: RunOptions, limit: int | None
) -> "Estimate":
    """Print what a run would do, extrapolated from a few images."""
    from open_gem.label import control
    from open_gem.label.done import done_in
    from open_gem.label.parts import Parts

    manifest = labeling.manifest(source)
    Parts.check_claim(out, manifest)
    done = done_in(Parts(out, manifest), errors=not running.retry_errors)
    settings = {"batch_size": running.batch_size, "workers": running.workers}
    return control.estimate(labeling, source, done, shard=shard, limit=limit, **settings)


# Reporting ------------------------------------------------------------------------------------------------------------


def report(parts: "Parts", tally: "Tally", shard: "Shard", samples: int, as_json: bool) -> None:
    """Print and write the summary; under torchrun, print only what this process did."""
    if tally.duplicates:
        say(f"warning: {counted(tally.duplicates, 'duplicate id')} in the source, labelled once")
    if shard.of == 1:
        conclude(parts, samples, as_json)
    else:
        say(f"process {shard.index}: {counts_of(tally)}; see open-gem summary {parts.folder}")


def counts_of(tally: "Tally") -> str:
    """Return "3 images labelled, 1 with an error"."""
    return f"{counted(tally.labeled, 'image')} labelled, {tally.failed} with an error"


def print_estimate(result: "Estimate", as_json: bool) -> None:
    """Print what a run would do."""
    tally = result.tally
    left = tally.listed - tally.done - tally.duplicates
    document = {"images": tally.listed, "done": tally.done, "twice": tally.duplicates, "left": left}
    document |= {"sampled": result.sampled, "passed_over": tally.passed_over.ordered()}
    document |= {"seconds": result.seconds, "bytes": result.size}
    if as_json:
        print_json(document)
        return
    typer.echo(f"{counted(tally.listed, 'image')}: {tally.done} done, {left} left, {tally.duplicates} listed twice")
    if tally.passed_over:
        typer.echo(f"Passed over in the source: {tally.passed_over}")
    if result.seconds is not None and result.size is not None:
        speed, size = left / result.seconds, result.size / 1e6
        duration = format_duration(result.seconds)
        typer.echo(f"about {duration} at {speed:.1f} images/s, and {size:.1f} MB; estimated from {result.sampled}")


def format_duration(seconds: float) -> str:
    """Return a duration in the largest unit that gives at least two of it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
