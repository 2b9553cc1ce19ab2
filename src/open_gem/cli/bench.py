"""`open-gem bench`: what pathways cost beside the plain forward pass."""

import json
from dataclasses import asdict
from statistics import median
from typing import Annotated

import typer

from open_gem.cli._app import DeviceOption, DtypeOption, JsonOption, app, names_of, new_console, new_table


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="An architecture of `open-gem models`; its weights are random.")
    ] = "ViT-B-16",
    pathway: Annotated[str, typer.Option(help="Names of `open-gem pathways`, by commas, or all.")] = "all",
    side: Annotated[int, typer.Option(min=1, help="Sides of the pictures in pixels, whole patches.")] = 448,
    batch: Annotated[int, typer.Option(min=1, help="How many pictures at a time.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="How often each case is measured; they take turns.")] = 5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Measure pathways beside the library's plain forward pass: FLOPs, and seconds as ratios of medians in one run."""
    from open_gem import backbones
    from open_gem.backbones import find_device, find_dtype
    from open_gem.bench import bench as measure
    from open_gem.methods import find_pathway
    from open_gem.types import Size

    chosen = {name: find_pathway(name) for name in names_of(pathway)}
    tower = backbones.build_tower(model)
    tower.module.to(find_device(device), find_dtype(dtype))
    costs = measure(tower, chosen, Size(side, side), batch, repeats)
    if as_json:
        run = {"model": model, "side": side, "batch": batch, "repeats": repeats, "dtype": dtype}
        typer.echo(json.dumps({**run, "costs": [asdict(cost) for cost in costs]}))
        return
    table = new_table(
        "case", "GFLOP an image", "× plain", "ms an image", "range", "× plain", title=f"{model}, {side} px"
    )
    for cost in costs:
        times = [1000 * seconds / batch for seconds in cost.seconds]
        table.add_row(
            cost.case,
            f"{cost.flops / batch / 1e9:.1f}",
            f"{cost.flops_ratio:.2f}",
            f"{median(times):.0f}",
            f"{min(times):.0f} to {max(times):.0f}",
            f"{cost.time_ratio:.2f}",
        )
    new_console().print(table)
