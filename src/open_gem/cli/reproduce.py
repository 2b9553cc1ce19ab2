"""`open-gem reproduce`: the paper's tables and figures, each a list of methods and a renderer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from open_gem.checks import did_you_mean
from open_gem.cli.app import app, new_console, progress_bar, resumable, say
from open_gem.cli.options import (
    DataOptions,
    DeviceOption,
    DtypeOption,
    ModelOptions,
    PretrainedOption,
    QuietOption,
    with_options,
)
from open_gem.errors import InputError, ModelError, OpenGemError

if TYPE_CHECKING:
    from open_gem.evaluation.protocol import EvalProtocol
    from open_gem.evaluation.tasks import Dataset
    from open_gem.locate import AnyLocalizer
    from open_gem.paper.measuring import Job, Outcome

PROBE = 4  # images that a plan is timed on


@app.command()
@with_options
def reproduce(
    experiments: Annotated[
        list[str] | None, typer.Argument(help="table1, table2 …, figure5, additions, or all.", show_default="all")
    ] = None,
    *,
    dataset: Annotated[str, typer.Option(help="A name of `open-gem data`.")] = "scenes",
    data: DataOptions,
    model: Annotated[
        str | None,
        typer.Option(
            help="One model for all experiments, a name as for `open-gem evaluate`.",
            show_default="the paper's models of each; with scenes, embedded",
        ),
    ] = None,
    pretrained: PretrainedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what would run and for how long; runs four images with each model.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the report and its plots; counts go to its subfolder runs.")
    ] = Path("open_gem_paper"),
    quiet: QuietOption = False,
) -> None:
    """Measure tables and figures of the paper, with each model from one pass over the data, beside the paper's values.

    With the paper's models and data, or offline on synthetic scenes with the model in the package. Rerun the same
    command to resume an interrupted run. A model that cannot be loaded is reported; the others are measured.
    """
    from open_gem.data import Segmentation, find_dataset
    from open_gem.evaluation.protocol import find_protocol
    from open_gem.files import check_writable
    from open_gem.paper.measuring import jobs
    from open_gem.paper.numbers import B16
    from open_gem.paper.qualitative import QUALITATIVE
    from open_gem.paper.rows import EXPERIMENTS

    names = find_experiments(experiments or ["all"])
    tables = [name for name in names if name in EXPERIMENTS]
    figures = [name for name in names if name in QUALITATIVE]
    has_own_model = model is not None or dataset == "scenes"
    if pretrained is not None and model is None:
        raise InputError("--pretrained given without --model")
    models = ModelOptions(model, pretrained, device, dtype)
    models = models.or_embedded() if dataset == "scenes" else models
    run = Reproduction(models, dataset, data, find_protocol(data.protocol), out, quiet)
    check_writable(out)
    images = run.open_data(data.split)  # checked before a model is loaded
    if not isinstance(images, Segmentation):
        for name in [name for name in tables if EXPERIMENTS[name].analysis]:
            tables.remove(name)
            run.faults.append(f"{name} needs the class of each pixel, which {dataset} does not know")
    todo = jobs(tables, has_own_model, tuple(find_dataset(dataset).splits), data.split)
    console = new_console()
    if plan:
        lines = [run.plan(job) for job in todo]
        lines += [f"{', '.join(figures)}: less than a minute"] if figures else []
        for line in [*lines, *run.faults]:
            console.print(Text(line))
        return
    with resumable():
        for job in todo:
            run.measure(job)
        if figures:
            run.draw(figures, None if has_own_model else B16, images)
    faults = list(dict.fromkeys(run.faults))
    for fault in faults:
        say(f"error: {fault}")
    if run.outcomes or run.sheets:
        run.write_report(names, faults)
        console.print(Text(f"Look at {out / 'report.md'}; its counts are in {out / 'runs'}"))
    if faults:
        raise typer.Exit(1)


def find_experiments(names: Sequence[str]) -> list[str]:
    """Return the requested experiments. Raises InputError for an unknown one."""
    from open_gem.paper.qualitative import QUALITATIVE
    from open_gem.paper.rows import EXPERIMENTS

    known = [*EXPERIMENTS, *QUALITATIVE]
    if list(names) == ["all"]:
        return known
    for name in names:
        if name not in known:
            raise InputError(f"unknown experiment {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return list(names)


@dataclass(eq=False)
class Reproduction:
    """The settings of a reproduction and its results so far.

    outcomes  of each finished job
    sheets    drawn figures, by name
    faults    what failed, and why
    """

    models: ModelOptions
    dataset: str
    data: DataOptions
    protocol: "EvalProtocol"
    out: Path
    quiet: bool
    outcomes: "list[Outcome]" = field(default_factory=list)
    sheets: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def open_data(self, split: str | None) -> "Dataset":
        from open_gem.data import open_dataset

        return open_dataset(self.dataset, self.data.data_root, split)

    def load(self, label: str | None) -> "AnyLocalizer":
        """Load a model of the paper by its label, or the user's own model (None), which must have methods."""
        from open_gem.paper.numbers import MODELS

        if label is None:
            localizer = self.models.load_any()
            if self.dataset == "scenes":
                localizer.acknowledge()  # drawn objects, which the embedded model knows
            if not localizer.layers:
                name = self.models.model
                raise InputError(f"{name} was trained to localize and has no methods: use open-gem evaluate")
            return localizer
        return replace(self.models, model=MODELS[label].name, pretrained=MODELS[label].pretrained).load_any()

    def plan(self, job: "Job") -> str:
        """Return one line about what a job would do, and for how long."""
        from open_gem.evaluation.run import measure
        from open_gem.paper.measuring import analysed_in, union

        images, experiments = self.open_data(job.split), ", ".join(job.experiments)
        count = self._count(images)
        try:
            localizer = self.load(job.model)
        except ModelError as error:
            return f"{experiments}: cannot be run with {job.model}: {error}"
        methods = union(job.experiments, localizer.layers) if localizer.layers else {}
        probe, start = range(min(PROBE, count)), perf_counter()
        analysed = analysed_in(job.experiments, localizer.layers)
        for _ in measure(localizer, methods, images, probe, self.protocol, analysed=analysed, **self.data.loop):
            pass
        minutes = (perf_counter() - start) / len(probe) * count / 60
        rows = f"{len(methods)} methods" if methods else "as trained"
        source = f"one pass over {count} images of {images.name} {images.split}"
        return f"{experiments}: {rows} from {source} with {job.model or localizer.name}, about {minutes:.0f} minutes"

    def measure(self, job: "Job") -> None:
        """Run a job; add its outcome, or what failed."""
        from open_gem.paper.measuring import reproduce as measure_all

        images = self.open_data(job.split)
        try:
            localizer = self.load(job.model)
            with progress_bar(self._count(images), self.quiet) as advance:
                outcome = measure_all(
                    job.experiments,
                    localizer,
                    images,
                    self.out / "runs",
                    label=job.model,
                    protocol=self.protocol,
                    limit=self.data.limit,
                    progress=advance,
                    **self.data.loop,
                )
        except ModelError as error:
            self.faults.append(f"{job.model or self.models.model}: {error}")
            return
        self.outcomes.append(outcome)
        self.faults += [f"{image}: {error}" for image, error in outcome.run.failed.items()]

    def draw(self, names: Sequence[str], label: str | None, images: "Dataset") -> None:
        """Draw figures; add those that can be drawn, or what failed."""
        from open_gem.paper.qualitative import QUALITATIVE

        try:
            localizer: Any = self.load(label)
        except ModelError as error:
            self.faults.append(f"{', '.join(names)}: {error}")
            return
        for name in names:
            try:
                self.sheets[name] = QUALITATIVE[name][1](localizer, images, self.protocol)
            except OpenGemError as error:
                self.faults.append(f"{name}: {error}")

    def write_report(self, names: Sequence[str], faults: Sequence[str]) -> None:
        """Write the report and its figures."""
        from open_gem.cli.save import save_image
        from open_gem.files import write_file
        from open_gem.paper.qualitative import QUALITATIVE
        from open_gem.paper.rendering import curves, markdown, title
        from open_gem.paper.rows import EXPERIMENTS

        parts = [
            f"# The paper's experiments, protocol {self.data.protocol}\n",
            "".join(map(_summary_line, self.outcomes)),
        ]
        if faults:
            parts.append("What failed:\n\n" + "".join(f"* {fault}\n" for fault in faults))
        for name in names:
            if name in EXPERIMENTS and any(name in outcome.rows for outcome in self.outcomes):
                parts.append(markdown(name, self.outcomes))
                for file, plot in curves(name, self.outcomes).items():
                    save_image(self.out / f"{file}.png", plot)
                    parts.append(f"![{title(name)}]({file}.png)\n")
            elif name in self.sheets:
                save_image(self.out / f"{name}.png", self.sheets[name])
                parts.append(f"## {title(name)}: {QUALITATIVE[name][0]}\n\n![{title(name)}]({name}.png)\n")
        write_file(self.out / "report.md", "\n".join(parts).encode())

    def _count(self, images: "Dataset") -> int:
        return min(self.data.limit or len(images), len(images))


def _summary_line(outcome: "Outcome") -> str:
    run = outcome.run
    failures = f", {len(run.failed)} could not be read" if run.failed else ""
    return f"* {outcome.label} on {run.dataset} ({run.split}): {run.images} of {run.total} images{failures}\n"
