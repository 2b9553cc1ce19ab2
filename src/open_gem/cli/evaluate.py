"""`open-gem evaluate`: pathways against known masks."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from open_gem.cli._app import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PretrainedOption,
    app,
    load_localizer,
    names_of,
    new_console,
    new_table,
    progress_bar,
    tuned,
)
from open_gem.errors import InputError

if TYPE_CHECKING:
    from open_gem.methods import Pathway


@app.command()
def evaluate(
    dataset: Annotated[str, typer.Argument(help='What to measure on: "scenes", made on the spot.')] = "scenes",
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 500,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first scene; 0 and up are held out.")] = 0,
    pathway: Annotated[str, typer.Option(help="Names of `open-gem pathways`, by commas, or all.")] = (
        "clip,maskclip,clip_surgery,gem"
    ),
    temperature_scale: Annotated[
        float | None,
        typer.Option(help="Of adaptive temperatures, not the model's own; 1 is the paper's."),
    ] = None,
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    size: Annotated[str | None, typer.Option(help="Size rule; else as the model recommends.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure pathways against known masks: pointing game, mask IoU, mIoU. The model sees each image once for all."""
    from open_gem.evaluate import evaluate_scenes
    from open_gem.imaging import check_size_rule
    from open_gem.methods import PATHWAYS

    if dataset != "scenes":
        raise InputError(f"unknown data set {dataset!r}; known: scenes")
    names = names_of(pathway)  # whatever is wrong is said before a model is loaded
    tuned("gem", PATHWAYS["gem"], temperature_scale=temperature_scale)
    if size is not None:
        check_size_rule(size)
    localizer = load_localizer(model, pretrained, device, dtype, size=size)
    settings = {name: localizer.settings(name) for name in names}
    chosen = {
        name: tuned(name, setting, temperature_scale=temperature_scale) if setting.is_adaptive else setting
        for name, setting in settings.items()
    }
    with progress_bar(count, quiet) as advance:
        outcomes = evaluate_scenes(localizer, chosen, range(first, first + count), progress=advance)
    rows = [
        {"pathway": name, "temperature_scale": _adaptive_scale(chosen[name]), **outcome.scores()}
        for name, outcome in outcomes.items()
    ]
    if as_json:
        run = {"dataset": dataset, "count": count, "first": first, "model": localizer.backbone.name}
        typer.echo(json.dumps({**run, "size_rule": localizer.size_rule, "pathways": rows}))
        return
    table = new_table(*(key.replace("_", " ") for key in rows[0]), title=f"{count} scenes, {localizer.size_rule}")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else value or "" for value in row.values()))
    new_console().print(table)


def _adaptive_scale(pathway: "Pathway") -> float | None:
    """The multiplier of the adaptive temperature; None for a pathway that has no such temperature."""
    return float(pathway.temperature_scale) if pathway.is_adaptive else None
