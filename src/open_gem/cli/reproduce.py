"""`open-gem reproduce`: the paper's tables and figures, each a list of methods and a renderer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from open_gem.checks import did_you_mean
from open_gem.cli._app import (
    DeviceOption,
    DtypeOption,
    PretrainedOption,
    app,
    going_on,
    load_any,
    new_console,
    progress_bar,
    say,
)
from open_gem.errors import InputError, ModelError, OpenGemError

if TYPE_CHECKING:
    from open_gem.evaluation.tasks import Dataset
    from open_gem.locate import AnyLocalizer
    from open_gem.paper import Job, Outcome

PROBE = 4  # images that a plan is timed on
Load = Callable[[str | None], "AnyLocalizer"]


@app.command()
def reproduce(
    what: Annotated[
        list[str] | None, typer.Argument(help="table1, table2 …, figure5, or all.", show_default="all")
    ] = None,
    dataset: Annotated[str, typer.Option(help="A name of `open-gem data`.")] = "scenes",
    data_root: Annotated[Path | None, typer.Option(help="The folder that holds its files; scenes need none.")] = None,
    split: Annotated[str | None, typer.Option(help="Which part; else the paper's in each, where there is one.")] = None,
    protocol: Annotated[str, typer.Option(help="How it is asked: paper, official or field.")] = "paper",
    model: Annotated[
        str | None,
        typer.Option(
            help="One model for all, a name as for `open-gem evaluate`.",
            show_default="those of the paper in each; with scenes, embedded",
        ),
    ] = None,
    pretrained: PretrainedOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first images only.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would run, and about how long; run four images with each model.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images of one shape at a time.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode ahead.")] = 2,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[
        Path, typer.Option(help="Folder for the report and its plots; counts go to its folder runs.")
    ] = Path("open_gem_paper"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure tables and figures of the paper, with each model from one pass over the data, beside the paper's values.

    With the paper's models and data, or without a network on synthetic scenes with the model in the package.
    Interrupted, the same command goes on where it was. A model that cannot be had is named; the others are measured.
    """
    from open_gem.data import Segmentation, find_dataset, open_dataset
    from open_gem.evaluation.protocol import find_protocol
    from open_gem.files import check_writable
    from open_gem.paper import EXPERIMENTS, PICTURES, jobs
    from open_gem.paper.numbers import B16

    known = [*EXPERIMENTS, *PICTURES]
    wanted = known if not what or what == ["all"] else what
    for name in wanted:
        if name not in known:
            raise InputError(f"unknown experiment {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    names, drawn = ([name for name in wanted if name in some] for some in (EXPERIMENTS, PICTURES))
    asked, own = find_protocol(protocol), model is not None or dataset == "scenes"
    if pretrained is not None and model is None:
        raise InputError("--pretrained given without --model")
    check_writable(out)
    loop = {"batch_size": batch, "workers": workers}
    console = new_console()

    def data(of: str | None) -> "Dataset":
        return open_dataset(dataset, data_root, of)

    def load(label: str | None) -> "AnyLocalizer":
        return _load(label, model or "embedded", pretrained, device, dtype)

    shown = data(split)  # whatever is wrong with it is said before a model is loaded
    blind = [name for name in names if EXPERIMENTS[name].analysis and not isinstance(shown, Segmentation)]
    faults = [f"{name} needs the class of each pixel, which {dataset} does not know" for name in blind]
    todo = jobs([name for name in names if name not in blind], own, tuple(find_dataset(dataset).splits), split)
    if plan:
        for job in todo:
            console.print(Text(_planned(job, data(job.split), load, asked, limit, loop)))
        if drawn:
            console.print(Text(f"{', '.join(drawn)}: less than a minute"))
        for fault in faults:
            console.print(Text(fault))
        return
    outcomes, layers = [], {}
    with going_on():
        for job in todo:
            try:
                with progress_bar(min(limit or len(data(job.split)), len(data(job.split))), quiet) as advance:
                    found, depth = _measured(
                        job, data(job.split), load, out / "runs", protocol=asked, limit=limit, progress=advance, **loop
                    )
            except ModelError as error:
                faults.append(f"{job.model or model}: {error}")
                continue
            outcomes.append(found)
            layers[found.label] = depth
            faults += [f"{image}: {error}" for image, error in found.failed.items()]
        sheets = _drawn(drawn, load, None if own else B16, shown, asked, faults) if drawn else {}
    for fault in dict.fromkeys(faults):
        say(f"error: {fault}")
    if outcomes or sheets:
        _write(out, wanted, outcomes, layers, sheets, protocol, list(dict.fromkeys(faults)))
        console.print(Text(f"Look at {out / 'report.md'}; its counts are in {out / 'runs'}"))
    if faults:
        raise typer.Exit(1)


def _load(label: str | None, model: str, pretrained: str | None, device: str, dtype: str) -> "AnyLocalizer":
    """A model of the paper by its label; without a label, the user's own, which must have methods."""
    from open_gem.paper import load_of

    name, tag, may_be_trained = (model, pretrained, False) if label is None else load_of(label)
    localizer = load_any(name, tag, device, dtype)
    if not (may_be_trained or localizer.layers):
        raise InputError(f"{name} was trained to localize and has no methods: measure it with open-gem evaluate")
    return localizer


def _planned(job: "Job", data: "Dataset", load: Load, protocol: Any, limit: int | None, loop: dict[str, int]) -> str:
    """A line on what a job would do, and how long."""
    from open_gem.evaluation.run import measure
    from open_gem.paper import union

    count = min(limit or len(data), len(data))
    try:
        localizer = load(job.model)
    except ModelError as error:
        return f"{', '.join(job.experiments)}: cannot be run with {job.model}: {error}"
    methods = union(job.experiments, localizer.layers) if localizer.layers else {}
    name = job.model or localizer.name
    few, start = range(min(PROBE, count)), perf_counter()
    for _ in measure(localizer, methods, data, few, protocol, analysed=tuple(methods), **loop):
        pass
    minutes = (perf_counter() - start) / len(few) * count / 60
    what = f"{len(methods)} methods" if methods else "as trained"
    over = f"from one pass over {count} images of {data.name} {data.split} with {name}"
    return f"{', '.join(job.experiments)}: {what} {over}, about {minutes:.0f} minutes"


def _measured(job: "Job", data: "Dataset", load: Load, place: Path, **settings: Any) -> "tuple[Outcome, int]":
    """What a job gives, and how many blocks its model has."""
    from open_gem.paper import reproduce as measure_all

    localizer = load(job.model)
    return measure_all(job.experiments, localizer, data, place, label=job.model, **settings), localizer.layers


def _drawn(
    names: Sequence[str], load: Load, label: str | None, data: "Dataset", protocol: Any, faults: list[str]
) -> dict[str, Any]:
    """Each picture that can be drawn; what keeps one from it goes to `faults`."""
    from open_gem.paper import PICTURES

    drawn: dict[str, Any] = {}
    try:
        localizer = load(label)
    except ModelError as error:
        faults.append(f"{', '.join(names)}: {error}")
        return drawn
    for name in names:
        try:
            drawn[name] = PICTURES[name][1](localizer, data, protocol)
        except OpenGemError as error:
            faults.append(f"{name}: {error}")
    return drawn


def _write(
    out: Path,
    wanted: Sequence[str],
    outcomes: "Sequence[Outcome]",
    layers: dict[str, int],
    sheets: dict[str, Any],
    protocol: str,
    faults: Sequence[str],
) -> None:
    """The report and its pictures."""
    from open_gem.cli.save import save_picture
    from open_gem.files import write_file
    from open_gem.paper import EXPERIMENTS, PICTURES, curves, markdown, title

    parts = [f"# The paper's experiments, protocol {protocol}\n", "".join(map(_summary, outcomes))]
    if faults:
        parts.append("What failed:\n\n" + "".join(f"* {fault}\n" for fault in faults))
    for name in wanted:
        if name in EXPERIMENTS and any(name in outcome.rows for outcome in outcomes):
            parts.append(markdown(name, outcomes))
            for file, picture in curves(name, outcomes, layers).items():
                save_picture(out / f"{file}.png", picture)
                parts.append(f"![{title(name)}]({file}.png)\n")
        elif name in sheets:
            save_picture(out / f"{name}.png", sheets[name])
            parts.append(f"## {title(name)}: {PICTURES[name][0]}\n\n![{title(name)}]({name}.png)\n")
    write_file(out / "report.md", "\n".join(parts).encode())


def _summary(outcome: "Outcome") -> str:
    missing = f", {len(outcome.failed)} could not be read" if outcome.failed else ""
    images = f"{outcome.counted} of {outcome.total} images{missing}"
    return f"* {outcome.label} on {outcome.dataset} ({outcome.split}): {images}\n"
