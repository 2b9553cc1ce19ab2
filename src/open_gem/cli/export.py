"""`open-gem export`: labels in the formats of other tools."""

import csv
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from open_gem.cli.app import app, counted, new_console, new_table, progress_bar, say
from open_gem.cli.options import QuietOption, split_commas
from open_gem.cli.summary import OUT
from open_gem.errors import InputError

MOST_WARNINGS = 10  # images that have a line of their own


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `open-gem label`.")] = OUT,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="Formats, comma-separated: coco,yolo,voc.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for a folder of each format.")] = Path("open_gem_export"),
    labels: Annotated[
        list[str] | None,
        typer.Option(
            help='Labels to export, comma-separated: cat,"car, parked" (repeatable).',
            show_default="all",
        ),
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(help="Leave out objects with a lower cosine.", show_default=False)
    ] = None,
    min_presence: Annotated[
        float | None,
        typer.Option(help="Leave out objects whose label has a lower presence, 0 to 1.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder where the images are now.", show_default="where they were"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Sets and their shares of the images: train=0.8,val=0.1,test=0.1.", show_default=False),
    ] = None,
    split_by: Annotated[str, typer.Option(help="image, or folder: images of one folder stay in one set.")] = "image",
    split_seed: Annotated[int, typer.Option(min=0, help="Another seed gives other sets.")] = 0,
    link_images: Annotated[
        str | None,
        typer.Option(help="Put the images beside the labels: hard or sym links, or a copy.", show_default=False),
    ] = None,
    formats: Annotated[bool, typer.Option("--formats", help="List the formats.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write labels in the formats of other tools: `OUT/coco`, `OUT/yolo` …

    Each folder is written whole or not at all, with one image in memory at a time. Images that could not be labelled
    are left out.
    """
    from open_gem.export import find_formats, write_formats
    from open_gem.export.labelled import Labelled
    from open_gem.export.split import UNSPLIT, parse_split
    from open_gem.label.parts import Parts

    if formats:
        list_formats()
        return
    if not format:
        raise InputError("expected --format, such as `open-gem export --format coco,yolo`; see --formats")
    names = split_commas(format)
    find_formats(names)
    if split is None and (split_by, split_seed) != ("image", 0):
        raise InputError("--split-by and --split-seed are about --split, expected it too: --split train=0.9,val=0.1")
    sets = UNSPLIT if split is None else parse_split(split, split_by, split_seed)
    chosen = labels and labels_of(labels, Parts.open(folder).manifest.labels)
    labelled = Labelled.open(folder, chosen, min_score=min_score, min_presence=min_presence, images=images)
    count = labelled.count()
    skip, note = ImageWarnings("left out"), ImageWarnings("the rest is there")
    with progress_bar(count.total() * len(names), quiet) as advance:
        write_formats(replace(labelled, progress=advance), names, out, skip, note, sets, link_images)
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
class ImageWarnings:
    """Warns about images: a line for each of the first, and the number of the others."""

    consequence: str
    count: int = 0

    def __call__(self, image_id: str, reason: str) -> None:
        self.count += 1
        if self.count <= MOST_WARNINGS:
            say(f"warning: {image_id}: {reason}; {self.consequence}")

    def conclude(self) -> None:
        if (more := self.count - MOST_WARNINGS) > 0:
            say(f"warning: and {counted(more, 'image')} more: {self.consequence}")


def labels_of(values: list[str], known: Container[str]) -> list[str]:
    """Return the labels that --labels names: a value that is a known label counts as it is, commas and all; others are
    lines of CSV."""
    return [label for value in values for label in ([value] if value in known else _split_csv(value))]


def _split_csv(line: str) -> list[str]:
    return [label.strip() for label in next(csv.reader([line], skipinitialspace=True), [])]


def list_formats() -> None:
    from open_gem.export import FORMATS

    table = new_table("format", "what it is", "needs")
    for name, row in FORMATS.items():
        table.add_row(name, row.about, Text(f"open_gem[{row.extra}]" if row.extra else ""))
    new_console().print(table)
