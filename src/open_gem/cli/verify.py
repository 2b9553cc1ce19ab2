"""`open-gem verify`: published numbers of real checkpoints, computed again on this machine."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from open_gem.cli.app import app, new_console, new_table, print_json, progress_bar, resumable, say
from open_gem.cli.options import DataOptions, DeviceOption, JsonOption, ModelOptions, QuietOption
from open_gem.errors import InputError

if TYPE_CHECKING:
    from open_gem.verify.run import Result

SLICE = 200  # images of PascalVOC that --paper measures unless --limit says otherwise
PAPER_OUT = Path("open_gem_paper") / "runs"


@app.command()
def verify(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(help="Names with published values, such as openai/clip-vit-base-patch32.", show_default="all"),
    ] = None,
    *,
    cached: Annotated[bool, typer.Option("--cached", help="Only checkpoints in the Hugging Face cache.")] = False,
    images: Annotated[
        Path | None, typer.Option(help="Folder with the images; nothing is downloaded.", show_default="download once")
    ] = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Instead: CLIP and GEM on a slice of PascalVOC, beside the paper's Table 3."),
    ] = False,
    data_root: Annotated[Path | None, typer.Option(help="With --paper: the folder that holds PascalVOC.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="With --paper: images to measure.")] = SLICE,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check checkpoints against numbers that their sources published: scores, dense tokens and masks on public images.

    Downloads images and weights once. What cannot be reached is "not checked" and no failure; exit code 1 if a number
    differs by more than its tolerance. The table can be pasted into an issue as it is.
    """
    if paper:
        verify_paper(data_root, limit, device, as_json, quiet)
        return
    if data_root is not None:
        raise InputError("--data-root given without --paper")

    if images is not None and not images.is_dir():
        raise InputError(f"--images is {str(images)!r}, expected a folder with the images")

    from open_gem.verify.images import ImageStore, cache_folder
    from open_gem.verify.run import FAILED, cached_repositories, find_values
    from open_gem.verify.run import verify as check

    rows = find_values(checkpoints or [])
    if cached:
        repositories = cached_repositories()
        rows = [row for row in rows if (row.repository or row.checkpoint) in repositories]
        if not rows:
            say("no checkpoint with published values is in the Hugging Face cache: run open-gem verify with a network")
            return
    store = ImageStore(images or cache_folder(), downloads=images is None)
    if not quiet:
        store.announce = say
    results = []
    with progress_bar(len(rows), quiet) as advance:
        for result in check(rows, store, device=device):
            results.append(result)
            advance(1)
    if as_json:
        for result in results:
            print_json(result.document())
    elif not quiet:
        print_results(results)
    if any(result.status == FAILED for result in results):
        raise typer.Exit(1)


def print_results(results: "Sequence[Result]") -> None:
    """Print a table of what was checked, and one line for each reason why something was not."""
    from open_gem.verify.run import NOT_CHECKED

    console = new_console()
    checked = [result for result in results if result.status != NOT_CHECKED]
    if checked:
        table = new_table("checkpoint", "compared", "expected", "measured", "difference", "tolerance", "result")
        for result in checked:
            row, difference = result.published, result.difference
            table.add_row(
                row.name,
                f"{row.compared} ({row.image}; {row.source}, certainty {row.certainty})",
                _numbers(row.expected),
                _numbers(result.measured or ()),
                "" if difference is None else f"{difference:.2g}",
                f"{row.tolerance:g}",
                result.status,
            )
        console.print(table)
    reasons = Counter(
        result.reason.replace(result.published.name, "a checkpoint")
        for result in results
        if result.status == NOT_CHECKED
    )
    for reason, count in reasons.items():
        console.print(Text(f"not checked ({count}): {reason}"))
    statuses = Counter(result.status for result in results)
    console.print(Text(", ".join(f"{count} {status}" for status, count in statuses.items())))


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def verify_paper(data_root: Path | None, limit: int, device: str, as_json: bool, quiet: bool) -> None:
    """Measure CLIP and GEM with ViT-B/16 on the first images of PascalVOC val; exit code 1 if a value of Table 3 lies
    outside the 95 % interval."""
    from open_gem.data import open_dataset
    from open_gem.evaluation import store as runs
    from open_gem.evaluation.protocol import PROTOCOLS
    from open_gem.paper.numbers import B16, MODELS, TABLES
    from open_gem.paper.runs import TABLE_3, read_run

    if data_root is None:
        raise InputError("--paper given without --data-root, expected the folder that holds PascalVOC")
    images, protocol = open_dataset("voc2012", data_root, "val"), PROTOCOLS["paper"]
    localizer = ModelOptions(MODELS[B16].name, MODELS[B16].pretrained, device).load()
    methods = {name: localizer.resolve(name) for name in ("clip", "gem")}
    ids = images.ids[:limit]
    store = runs.Store.at(PAPER_OUT, runs.settings_of(localizer, methods, images, protocol))
    with resumable(), progress_bar(len(ids), quiet) as advance:
        runs.run(store, localizer, methods, images, protocol, ids=ids, progress=advance, **DataOptions().loop)
    results = read_run(store, ids)
    documents = []
    for method, scores in results.scores.items():
        estimate, published = scores["mean_iou"], TABLES["table3"][B16][TABLE_3[method]]["voc2012"]
        low, high = 100 * estimate.low, 100 * estimate.high
        documents.append(
            {
                "method": method,
                "images": results.images,
                "measured": 100 * estimate.value,
                "low": low,
                "high": high,
                "paper": published,
                "status": "passed" if low <= published <= high else "failed",
            }
        )
    if as_json:
        for document in documents:
            print_json(document)
    else:
        table = new_table("method", "mIoU", "95 % interval", "paper", "result", title=f"{results.images} images of VOC")
        for row in documents:
            interval = f"{row['low']:.1f} to {row['high']:.1f}"
            table.add_row(row["method"], f"{row['measured']:.1f}", interval, f"{row['paper']:.1f}", row["status"])
        new_console().print(table)
    if any(document["status"] == "failed" for document in documents):
        raise typer.Exit(1)
