"""`open-gem tune`: thresholds from what is known to be right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from open_gem.cli.app import app, counted, new_console, new_table, print_json, say
from open_gem.cli.options import JsonOption
from open_gem.cli.summary import OUT
from open_gem.errors import InputError

if TYPE_CHECKING:
    from open_gem.label.parts import Parts
    from open_gem.label.tuning import Judged, Point, Rate


@app.command()
def tune(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `open-gem label`.")] = OUT,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Write a page on which a person marks detections right or wrong, and which gives marks.csv.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="With --page: detections on it, as many of each label.")] = 100,
    against: Annotated[
        Path | None,
        typer.Option(help="What is right: marks.csv, or true objects in COCO's JSON.", show_default=False),
    ] = None,
    precision: Annotated[
        float, typer.Option(help="Find the thresholds with the most recall at this precision or more, 0 to 1.")
    ] = 0.9,
    iou: Annotated[
        float, typer.Option(help="With COCO's JSON: IoU from which a detection matches a true object, 0 to 1.")
    ] = 0.5,
    curves: Annotated[bool, typer.Option("--curves", help="Print the whole curve of each label.")] = False,
    write: Annotated[
        Path | None,
        typer.Option(help="Write the thresholds into this class file, .yaml or .json.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure labels against what is right, and find thresholds for a wanted precision: no model is needed.

    Against marks only presence is tuned, and recall is a share of the right detections. Against true objects, and if
    what the model saw is kept, thresholds of heatmaps are tried as well.
    """
    from open_gem.label.parts import Parts

    if (page is None) == (against is None):
        which = "neither --page nor --against" if page is None else "--page and --against"
        raise InputError(f"{which} given, expected one of them")
    for name, value in (("precision", precision), ("iou", iou)):
        if not 0 < value <= 1:
            raise InputError(f"{name} is {value}, expected a number above 0, up to 1")
    parts = Parts.open(folder)
    if page is not None:
        make_page(parts, page, samples)
        return
    assert against is not None
    tune_against(parts, against, precision, iou, curves, write, as_json)


def make_page(parts: "Parts", page: Path, samples: int) -> None:
    """Write the page of detections to mark."""
    from open_gem.label.marks import write_page

    count = write_page(page, parts, samples, lambda image_id, reason: say(f"warning: {image_id}: {reason}; left out"))
    typer.echo(f"{counted(count, 'detection')} in {page}: open it in a browser, mark them, and download marks.csv")


def tune_against(
    parts: "Parts", against: Path, precision: float, iou: float, curves: bool, write: Path | None, as_json: bool
) -> None:
    """Print precision and recall of each label now and by the best thresholds, and write these if asked to."""
    from open_gem.label.marks import read_marks
    from open_gem.label.tuning import (
        Truth,
        best_point,
        check_class_file,
        classes_of,
        judge,
        judge_marks,
        tuned,
        write_class_file,
    )

    classes = classes_of(parts)
    if write is not None:
        check_class_file(write, classes)
    is_truth = against.suffix.lower() == ".json"
    judged = judge(parts, Truth.read(against), iou) if is_truth else judge_marks(parts, read_marks(against))
    best = {label: best_point([p for own in ways for p in own.curve()], precision) for label, ways in judged.items()}
    if as_json:
        print_json({"precision": precision, "labels": document_of(parts, judged, best, precision)})
    else:
        print_tables(parts, judged, best, precision, curves, is_truth)
    chosen = {label: point for label, point in best.items() if point is not None}
    if write is not None:
        write_class_file(write, tuned(classes, chosen))
        others = len(classes.labels) - len(chosen)
        say(f"{write}: thresholds of {counted(len(chosen), 'label')} written, {counted(others, 'label')} as before")


def document_of(
    parts: "Parts",
    judged: "Mapping[str, Sequence[Judged]]",
    best: "Mapping[str, Point | None]",
    precision: float,
) -> dict[str, Any]:
    """Return curves and thresholds by label as values that JSON can hold; labels that cannot be measured have none."""
    from open_gem.label.tuning import verdict

    documents: dict[str, Any] = dict.fromkeys(parts.manifest.labels)
    for label, ways in judged.items():
        points = [point for own in ways for point in own.curve()]
        chosen = best[label]
        documents[label] = {
            "best": None if chosen is None else chosen.document(),
            "verdict": verdict(points, chosen, precision),
            "curve": [point.document() for point in points],
        }
    return documents


def print_tables(
    parts: "Parts",
    judged: "Mapping[str, Sequence[Judged]]",
    best: "Mapping[str, Point | None]",
    precision: float,
    curves: bool,
    is_truth: bool,
) -> None:
    """Print a table of all labels, and the curve of each if wanted."""
    from open_gem.label.tuning import at_presence, classes_of, verdict

    console, classes = new_console(), classes_of(parts)
    presence = dict(zip(classes.labels, classes.presence, strict=True))
    title = f"Thresholds for a precision of {precision:g}, with 95 % intervals"
    table = new_table("label", "presence", "threshold", "precision", "recall", "for that precision", title=title)
    for label in classes.labels:
        if label not in judged:
            table.add_row(Text(label), "", "", "", "", "no category of the truth", style="dim")
            continue
        points = [point for own in judged[label] for point in own.curve()]
        now, chosen = at_presence(judged[label][0].curve(), presence[label]), best[label]
        if now is not None:
            table.add_row(Text(label), *cells(now._replace(presence=presence[label])), "now")
        if chosen is None or chosen != now:
            values = ("", "", "", "") if chosen is None else cells(chosen)
            table.add_row(
                Text("" if now else label),
                *values,
                verdict(points, chosen, precision),
                style="dim" if chosen is None else "",
            )
    console.print(table)
    if curves:
        for label, ways in judged.items():
            for own in ways:
                curve = new_table("presence", "threshold", "precision", "recall", "detections", title=label)
                for point in own.curve():
                    curve.add_row(*cells(point), str(point.precision.of))
                console.print(curve)
    if not is_truth:
        typer.echo("Recall is the share of the marked detections that are right: what was not detected is not in it.")


def cells(point: "Point") -> tuple[str, str, str, str]:
    return f"{point.presence:.4g}", f"{point.threshold:g}", rate(point.precision), rate(point.recall)


def rate(rate: "Rate") -> str:
    """Return "0.92 [0.81, 0.97]"; empty if nothing was counted."""
    return f"{rate.value:.2f} [{rate.interval[0]:.2f}, {rate.interval[1]:.2f}]" if rate.of else ""
