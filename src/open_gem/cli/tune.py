"""`open-gem tune`: thresholds from what is known to be right."""

from pathlib import Path
from typing import Annotated

import typer

from open_gem.cli.app import app, counted, say
from open_gem.cli.summary import OUT
from open_gem.errors import InputError


@app.command()
def tune(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `open-gem label`.")] = OUT,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Write a page on which a person marks detections right or wrong, and which writes marks.csv.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Detections on the page, as many of each label.")] = 100,
) -> None:
    """Measure."""
    from open_gem.label.parts import Parts

    parts = Parts.open(folder)
    if page is not None:
        make_page(parts, page, samples)
        return
    raise InputError("nothing to do")


def make_page(parts: "Parts", page: Path, samples: int) -> None:
    from open_gem.label.marks import write_page

    count = write_page(page, parts, samples, lambda image_id, reason: say(f"warning: {image_id}: {reason}; left out"))
    typer.echo(f"{counted(count, 'detection')} in {page}: open it in a browser, mark them, and download marks.csv")
