"""`open-gem summary`: labels in numbers, and a page of samples."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from open_gem.cli.app import app, counted, new_console, new_table, print_json, say
from open_gem.cli.options import JsonOption
from open_gem.errors import OutputError
from open_gem.files import to_json
from open_gem.label.parts import SHEET, SUMMARY

if TYPE_CHECKING:
    from open_gem.label.parts import Parts
    from open_gem.label.summary import Summary

OUT = Path("open_gem_labels")
MAX_LABELS = 40  # in the table

SamplesOption = Annotated[int, typer.Option(min=0, help="Images per label on the page of samples; 0: no page.")]


@app.command()
def summary(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `open-gem label`.")] = OUT,
    samples: SamplesOption = 8,
    as_json: JsonOption = False,
) -> None:
    """Count what was labelled so far: objects by label, empty images, errors by kind; and draw a page of samples."""
    from open_gem.label.parts import Parts

    parts = Parts.open(folder)
    for warning in parts.manifest.warnings:
        say(f"warning: {warning}")
    conclude(parts, samples, as_json)


def conclude(parts: "Parts", samples: int, as_json: bool) -> None:
    """Print the summary, then write it and the page of samples beside the parts; print a note if that is impossible."""
    from open_gem.files import write_file
    from open_gem.label.sheet import Sheet
    from open_gem.label.summary import summarize

    sheet = Sheet(parts.manifest, samples)
    totals = summarize(parts, sheet.add if samples else lambda part, row: None)
    document = totals.document()
    if as_json:
        print_json(document)
    else:
        _print_summary(parts, totals)
    files = {SUMMARY: to_json(document, indent=1).encode()}
    if samples and totals.labeled:
        files[SHEET] = sheet.write(parts, totals)
    advice = f"; look at {parts.folder / SHEET} before you trust them" if SHEET in files else ""
    try:
        for name, content in files.items():
            write_file(parts.folder / name, content)
    except OutputError as error:
        say(f"note: {error}: {' and '.join(files)} were not written")
        advice = ""
    if not as_json:
        typer.echo(f"Labels are in {parts.folder}{advice}")


def _print_summary(parts: "Parts", totals: "Summary") -> None:
    from open_gem.label.summary import COLUMNS, decimals, describe

    console = new_console()
    for name, value in describe(parts.manifest).items():
        console.print(Text(f"{name}: {value}"))
    if totals.labeled:
        table = new_table(*COLUMNS, title=f"{counted(totals.labeled, 'image')} labelled")
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        most_frequent = sorted(totals.labels.items(), key=lambda pair: -pair[1].images)
        for name, label in most_frequent[:MAX_LABELS]:
            numbers = (str(label.images), str(label.objects))
            means = map(decimals, (label.presence, label.confidence, label.score))
            is_absent = not label.images
            table.add_row(Text(name, "strike" if is_absent else ""), *numbers, *means, style="dim" if is_absent else "")
        console.print(table)
        if len(most_frequent) > MAX_LABELS:
            typer.echo(f"{counted(len(most_frequent) - MAX_LABELS, 'more label')} in {SUMMARY}")
    typer.echo(f"{counted(totals.empty, 'image')} without any object")
    if totals.passed_over:
        typer.echo(f"Passed over in the source: {totals.passed_over}")
    for kind, count in totals.errors.most_common(10):
        such = "" if count == 1 else " such as"
        typer.echo(f"{counted(count, 'image')} with an error{such}: {totals.examples[kind]}")
