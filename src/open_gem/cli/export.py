"""`open-gem export`: what was labelled, for other tools."""

import csv
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from open_gem.cli._app import app, new_console, new_table, progress_bar, say
from open_gem.cli.labels import OUT
from open_gem.errors import InputError

TOLD = 10  # images that are told one by one


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="What `open-gem label --out` filled.")] = OUT,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="Formats, by commas: coco,yolo,voc.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for a folder of each format.")] = Path("open_gem_export"),
    labels: Annotated[
        list[str] | None,
        typer.Option(
            help='Labels to export: one, or several by commas (cat,"car, parked"); may be given several times.',
            show_default="all",
        ),
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(help="Leave out objects whose cosine is lower.", show_default=False)
    ] = None,
    min_presence: Annotated[
        float | None,
        typer.Option(help="Leave out objects whose label is less probable in the image, 0 to 1.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Where the pictures are now, for formats that open them.", show_default="where they were"),
    ] = None,
    formats: Annotated[bool, typer.Option("--formats", help="List the formats.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Write what was labelled in the formats of other tools: `OUT/coco`, `OUT/yolo` …

    Each is written whole or not at all, one image in memory at a time. Images that could not be labelled are left out.
    """
    from open_gem.export import find_formats, write_formats
    from open_gem.export.labelled import Labelled
    from open_gem.label.parts import Parts

    if formats:
        list_formats()
        return
    if not format:
        raise InputError("expected --format, such as `open-gem export --format coco,yolo`; see --formats")
    names = list(dict.fromkeys(name.strip() for name in format.split(",")))
    find_formats(names)
    chosen = labels and labels_of(labels, Parts.open(folder).manifest.labels)
    found = Labelled.open(folder, chosen, min_score=min_score, min_presence=min_presence, images=images)
    count = found.count()
    skip, note = Told("left out"), Told("the rest is there")
    with progress_bar(count.total() * len(names), quiet) as advance:
        write_formats(replace(found, progress=advance), names, out, skip, note)
    skip.conclude()
    note.conclude()
    if count["error"]:
        say(f"warning: {count['error']} of {count.total()} images could not be labelled and are left out")
    console = new_console()
    for name in names:
        console.print(Text(f"Look at {out / name}"))
    if skip.count:
        raise typer.Exit(1)


@dataclass
class Told:
    """Images that something is told of: the first ones one by one, and how many more."""

    end: str
    count: int = 0

    def __call__(self, image_id: str, what: str) -> None:
        self.count += 1
        if self.count <= TOLD:
            say(f"warning: {image_id}: {what}; {self.end}")

    def conclude(self) -> None:
        if (more := self.count - TOLD) > 0:
            say(f"warning: and {more} {'image' if more == 1 else 'images'} more: {self.end}")


def labels_of(given: list[str], known: Container[str]) -> list[str]:
    """What values of --labels mean: a label as it is, commas and all, otherwise a line of CSV."""
    return [label for value in given for label in ([value] if value in known else _by_commas(value))]


def _by_commas(line: str) -> list[str]:
    return [label.strip() for label in next(csv.reader([line], skipinitialspace=True), [])]


def list_formats() -> None:
    from open_gem.export import FORMATS

    table = new_table("format", "what it is", "needs")
    for name, one in FORMATS.items():
        table.add_row(name, one.about, Text(f"open_gem[{one.extra}]" if one.extra else ""))
    new_console().print(table)
