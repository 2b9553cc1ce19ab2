"""`open-gem relabel`: other thresholds, without the model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from open_gem.cli.app import app, progress_bar
from open_gem.cli.label import ObjectOptions
from open_gem.cli.options import ClassOptions, JsonOption, QuietOption, with_options
from open_gem.cli.summary import OUT, SamplesOption, conclude
from open_gem.errors import InputError

if TYPE_CHECKING:
    from open_gem.label.ontology import Ontology


@dataclass(frozen=True)
class NewObjectOptions(ObjectOptions):
    """Which objects count, by default as before."""

    shown_default: ClassVar[str] = "as before"


@app.command()
@with_options
def relabel(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `open-gem label`.")] = OUT,
    *,
    objects: NewObjectOptions,
    classes: Annotated[
        Path | None,
        typer.Option("--classes", "-c", help="A class file with the same prompts: its thresholds replace all."),
    ] = None,
    first_is_background: Annotated[
        bool, typer.Option("--first-is-background", help="The class file's first line is the background.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the new labels.", show_default="replace those in FOLDER")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes, each for some of the files.", show_default="one per processor")
    ] = None,
    samples: SamplesOption = 8,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make the objects again by other thresholds from what `open-gem label` kept: no model, no images.

    `--presence` and `--threshold` are for all labels; with `--classes`, for labels without their own. Either all labels
    are new or none is, whatever happens meanwhile. `open-gem label` with the new thresholds then labels further images.
    """
    from open_gem.label.done import writing
    from open_gem.label.parts import Parts
    from open_gem.label.relabel import relabel, relabelled
    from open_gem.label.rules import ObjectRules
    from open_gem.label.summary import read_passed_over, write_passed_over

    parts = Parts.open(folder)
    if out is not None and out.resolve() == folder.resolve():
        out = None
    if first_is_background and classes is None:
        raise InputError("--first-is-background given without --classes")
    before = ObjectRules.of(parts.manifest.settings)
    named = None if classes is None else ClassOptions(classes=classes, first_is_background=first_is_background)
    rules = replace(before, classes=_thresholds(before.classes, objects, named), **objects.rules())
    relabelled(parts, rules)  # before a folder is made
    with writing(out or folder):
        total = sum(len(batch) for batch in parts.columns("id"))
        with progress_bar(total, quiet) as advance:
            new = relabel(parts, rules, out, workers=workers, progress=advance)
        if out is not None:
            write_passed_over(out, read_passed_over(folder))
    conclude(new, samples, as_json)


def _thresholds(before: "Ontology", objects: ObjectOptions, classes: ClassOptions | None) -> "Ontology":
    """Return labels, prompts and thresholds: those of a class file, or the thresholds of the command line."""
    levels = {"presence": objects.presence, "threshold": objects.threshold}
    if classes is not None:
        return classes.read(**levels)
    return replace(
        before, **{name: (value,) * len(before.labels) for name, value in levels.items() if value is not None}
    )
