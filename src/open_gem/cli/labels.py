"""`open-gem labels`: what was labelled so far."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from open_gem.cli._app import JsonOption, app, counted, new_console, new_table, print_json, say
from open_gem.errors import OutputError
from open_gem.files import to_json
from open_gem.label.parts import SHEET, SUMMARY

if TYPE_CHECKING:
    from open_gem.label.parts import Parts
    from open_gem.label.summary import Summary

OUT = Path("open_gem_labels")
MOST = 40  # labels in the table


@app.command()
def labels(
    folder: Annotated[Path, typer.Argument(help="What `open-gem label --out` filled.")] = OUT,
    samples: Annotated[int, typer.Option(min=0, help="Images a label on the page of samples; 0: no page.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """What was labelled so far: labels found, empty images, errors by kind, and a page of samples to look at."""
    from open_gem.label.parts import Parts

    conclude(Parts.open(folder), samples, as_json)


def conclude(parts: "Parts", samples: int, as_json: bool) -> None:
    """Print the summary, and then write it with the page of samples beside the parts; where that cannot be, say so."""
    from open_gem.label.sheet import Sheet
    from open_gem.label.summary import summarize

    sheet = Sheet(parts.manifest.labels, samples)
    summary = summarize(parts, sheet.add if samples else lambda place, row: None)
    document = summary.document()
    if as_json:
        print_json(document)
    else:
        _show(summary)
    files = {SUMMARY: to_json(document, indent=1).encode()}
    if samples and summary.labeled:
        files[SHEET] = sheet.write(parts)
    is_written = _written(parts.folder, files)
    if as_json:
        return
    look = f"; look at {parts.folder / SHEET} before you trust them" if SHEET in files and is_written else ""
    typer.echo(f"Labels are in {parts.folder}{look}")


def _written(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether there was a place for the files; where not, that is said."""
    from open_gem.files import write_file

    try:
        for name, content in files.items():
            write_file(folder / name, content)
    except OutputError as error:
        say(f"note: {error}: {' and '.join(files)} were not written")
        return False
    return True


def _show(summary: "Summary") -> None:
    console = new_console()
    if summary.labeled:
        table = new_table(
            "label", "images", "objects", "mean score", title=f"{counted(summary.labeled, 'image')} labelled"
        )
        often = sorted(summary.labels.items(), key=lambda pair: -pair[1].images)
        for name, one in often[:MOST]:
            table.add_row(name, str(one.images), str(one.objects), "" if one.score is None else f"{one.score:.3f}")
        console.print(table)
        if len(often) > MOST:
            typer.echo(f"and {len(often) - MOST} labels more, in {SUMMARY}")
    typer.echo(f"{counted(summary.empty, 'image')} without any object")
    if summary.left:
        typer.echo(f"Passed over in the source: {summary.left}")
    for kind, count in summary.errors.most_common(10):
        such = "" if count == 1 else " such as"
        typer.echo(f"{counted(count, 'image')} with an error{such}: {summary.examples[kind]}")
