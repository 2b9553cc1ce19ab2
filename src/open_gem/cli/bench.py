"""`open-gem bench`: the cost of dense features, relative to the plain forward pass."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_gem.checks import is_positive
from open_gem.cli.app import app, counted, print_json, say
from open_gem.cli.options import DtypeOption, JsonOption, parse_numbers, split_commas
from open_gem.errors import InputError
from open_gem.files import check_writable, to_json, write_file

if TYPE_CHECKING:
    from open_gem.bench.cases import Case
    from open_gem.bench.comparison import Change
    from open_gem.bench.measuring import Cost
    from open_gem.bench.subject import Setting

HEADS = ("case", "ms an image", "from", "to", "× plain", "GFLOP an image", "× plain", "of the ceiling")
MEMORY = ("peak MiB", "above the model")


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="An architecture of `open-gem models`, randomly initialised.")
    ] = "ViT-B-16",
    cases: Annotated[
        str,
        typer.Option(
            help="Names of `open-gem methods` and other cases, comma-separated; methods, answers and trained are "
            "groups."
        ),
    ] = "clip,maskclip,clip_surgery,gem",
    side: Annotated[str, typer.Option(help="Sides of the images in pixels, whole patches, comma-separated.")] = "448",
    batch_size: Annotated[str, typer.Option(help="Images at a time, comma-separated.")] = "1",
    prompts: Annotated[str, typer.Option(help="Numbers of prompts, comma-separated.")] = "20",
    repeats: Annotated[int, typer.Option(min=1, help="How often each case is measured; cases take turns.")] = 5,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also peak memory: each case again in a process of its own.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="A Python that has the published gem_torch, to measure as well.")
    ] = None,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", "mps" …')] = "cpu",
    dtype: DtypeOption = "float32",
    threads: Annotated[int, typer.Option(min=0, help="Threads of the CPU; 0: torch's default.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Also write the run to this file, as JSON.")] = None,
    against_run: Annotated[
        Path | None,
        typer.Option("--compare", help="Compare with a run that --save wrote; exit with 1 if a case is slower."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="With --compare: the increase in × plain that counts as slower; 0.1: by 10 %.")
    ] = 0.1,
    as_json: JsonOption = False,
) -> None:
    """Measure methods, and the path from images to masks, relative to the library's plain forward pass.

    The cases of a setting take turns in one run: read the ratios of medians. Prints Markdown.
    """
    from open_gem.bench import comparison
    from open_gem.bench.cases import find_cases
    from open_gem.bench.measuring import machine
    from open_gem.bench.subject import Setting

    chosen = find_cases(split_commas(cases))
    options = {"--side": side, "--batch-size": batch_size, "--prompts": prompts}
    sweep = product(*(_counts(option, text) for option, text in options.items()))
    settings = [Setting(model, *counts, device=device, dtype=dtype, threads=threads) for counts in sweep]
    if not is_positive(tolerance):
        raise InputError(f"--tolerance is {tolerance}, expected a number above 0, such as 0.1")
    if save is not None:
        check_writable(save.parent)
    earlier = None if against_run is None else comparison.read_run(against_run)
    befores = [None if earlier is None else comparison.run_like(earlier, asdict(setting)) for setting in settings]
    runs, slower = [], []
    for setting, before in zip(settings, befores, strict=True):
        costs = _measure(setting, chosen, repeats, memory, against)
        run: dict[str, Any] = {"setting": asdict(setting), "costs": [asdict(cost) for cost in costs]}
        runs.append(run)
        if not as_json:
            typer.echo("\n".join(_markdown(setting, costs)) + "\n")
        if before is not None:
            changes = comparison.compare(before, comparison.times_of(run))
            run["changes"] = [change._asdict() for change in changes]
            slower += [(setting, change) for change in changes if change.ratio > 1 + tolerance]
            if not as_json:
                typer.echo("\n".join(_changes(changes)) + "\n")
    document = {"machine": machine(), "repeats": repeats, "runs": runs}
    if save is not None:
        write_file(save, to_json(document, indent=1).encode())
    if as_json:
        print_json(document)
    else:
        typer.echo(f"{machine()}; medians of {repeats} turns.")
    if slower:
        setting, worst = max(slower, key=lambda pair: pair[1].ratio)
        say(
            f"slower than {str(against_run)!r} by more than {tolerance:.0%}: {worst.case} {worst.before:.2f} → "
            f"{worst.after:.2f} × plain at {setting.side} px, batch {setting.batch}"
            + (f", and {counted(len(slower) - 1, 'other case')}" if len(slower) > 1 else "")
        )
        raise typer.Exit(1)


def _counts(option: str, text: str) -> tuple[int, ...]:
    counts = parse_numbers(option, text, int)
    if min(counts) < 1:
        raise InputError(f"{option} is {text!r}, expected whole numbers from 1")
    return counts


def _measure(
    setting: "Setting", cases: "Mapping[str, Case]", repeats: int, memory: bool, against: Path | None
) -> "list[Cost]":
    from open_gem.bench.measuring import measure
    from open_gem.bench.memory import measure_memory
    from open_gem.bench.published import NAME, published

    with ExitStack() as stack:
        others = {}
        if against is not None:
            if (setting.device, setting.dtype) != ("cpu", "float32"):
                raise InputError("the published code is measured in float32 on a CPU only")
            subject = (setting.model, setting.side, setting.batch, setting.threads)
            others[NAME] = stack.enter_context(published(str(against), *subject))
        costs = measure(setting, cases, repeats, others)
        peaks = {name: (other.rest, other.peak) for name, other in others.items()}
    if memory:
        peaks |= {name: measure_memory(name, setting) for name in cases}
        costs = [replace(cost, rest=peaks[cost.case][0], peak=peaks[cost.case][1]) for cost in costs]
    return costs


def _markdown(setting: "Setting", costs: "list[Cost]") -> Iterator[str]:
    """Yield the lines of a table in Markdown, under a line with the setting."""
    threads = f", {setting.threads} threads" if setting.threads else ""
    yield (
        f"{setting.model}, {setting.side} px, {setting.batch} images at a time, {setting.prompts} prompts, "
        f"{setting.dtype} on {setting.device}{threads}"
    )
    yield ""
    heads = [*HEADS, *(MEMORY if costs[0].peak is not None else ())]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for cost in costs:
        cells = [cost.case, *_cells(cost, setting.batch)][: len(heads)]
        yield f"| {' | '.join(cells)} |"


def _changes(changes: "list[Change]") -> Iterator[str]:
    """Yield the lines of a table in Markdown: × plain of two runs."""
    yield "| case | × plain before | now | ratio | from | to |"
    yield f"|{'---|' * 6}"
    for case, *numbers in changes:
        yield f"| {case} | {' | '.join(f'{number:.2f}' for number in numbers)} |"


def _cells(cost: "Cost", batch: int) -> Iterator[str]:
    times = [1000 * seconds / batch for seconds in (median(cost.seconds), min(cost.seconds), max(cost.seconds))]
    yield from (f"{time:.3g}" if time < 100 else f"{time:.0f}" for time in times)
    yield f"{cost.time_ratio:.2f}"
    yield "" if cost.flops is None else f"{cost.flops / batch / 1e9:.1f}"
    yield "" if cost.flops_ratio is None else f"{cost.flops_ratio:.2f}"
    yield "" if cost.ceiling is None else f"{cost.ceiling:.0%}"
    yield "" if cost.peak is None else f"{cost.peak:.0f}"
    yield "" if cost.peak is None or cost.rest is None else f"{cost.peak - cost.rest:.0f}"
