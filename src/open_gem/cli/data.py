"""`open-gem data`: the data sets that can be read, the files they need, and checks of these files."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.text import Text

from open_gem.cli.app import app, counted, new_console, new_table, print_json, progress_bar, say
from open_gem.cli.options import JsonOption, QuietOption, split_commas
from open_gem.errors import DatasetError, InputError

data = typer.Typer(rich_markup_mode="markdown")
app.add_typer(data, name="data")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A name of `open-gem data`.")]
RootOption = Annotated[Path, typer.Option("--root", help="The folder that holds its files, or one above.")]


@data.callback(invoke_without_command=True)
def listing(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the data sets that can be read, show the files of one, and check them."""
    if context.invoked_subcommand is not None:
        return
    from open_gem.data import DATASETS

    sources = DATASETS.values()
    if as_json:
        shown = ("name", "about", "page", "tree", "splits", "names")
        print_json([{key: getattr(source, key) for key in shown} for source in sources])
        return
    table = new_table("name", "about", "splits", "class names")
    for source in sources:
        splits = ", ".join(name if count is None else f"{name} {count:,}" for name, count in source.splits.items())
        table.add_row(*map(Text, (source.name, source.about, splits, ", ".join(source.names))))
    console = new_console()
    console.print(table)
    console.print(
        Text("The files one needs: open-gem data show NAME. Whether they are there: open-gem data check NAME.")
    )


@data.command()
def show(name: NameArgument) -> None:
    """Print the expected files of a data set, and its download page."""
    from open_gem.data import find_dataset

    source = find_dataset(name)
    typer.echo(f"{source.name}: {source.about}\n\n{source.tree}\n\nDownload: {source.page}")


@data.command()
def check(
    name: NameArgument,
    root: Annotated[Path | None, typer.Option("--root", help="The folder that holds its files, or one above.")] = None,
    split: Annotated[str | None, typer.Option(help="One of its splits.", show_default="the first")] = None,
    as_json: JsonOption = False,
) -> None:
    """Count the images of a split, and list missing files and, among the first few, broken ones: exit code 1 if there
    are any."""
    from open_gem.data import find_dataset

    source = find_dataset(name)
    split = source.split_of(split)
    survey = source.check(root, split)
    if as_json:
        print_json({"name": source.name, "split": split, **asdict(survey), "home": str(survey.home)})
    else:
        published = "" if survey.expected is None else f", {survey.expected:,} were published"
        typer.echo(f"{source.name} {split} in {survey.home}: {survey.images:,} images{published}")
        for note in survey.notes:
            typer.echo(note)
        typer.echo(f"missing files: {len(survey.missing):,}")
        for missing in survey.missing[:10]:
            typer.echo(f"  {missing}")
        if len(survey.missing) > 10:
            typer.echo("  …")
        for fault in survey.broken:
            typer.echo(f"broken: {fault}")
    if survey.missing or survey.broken:
        raise typer.Exit(1)


@data.command()
def context(
    document: Annotated[Path, typer.Option("--json", help="trainval_merged.json of PASCAL in Detail.")],
    root: RootOption,
    quiet: QuietOption = False,
) -> None:
    """Make the label maps and lists of Pascal Context from trainval_merged.json.

    Existing maps are kept: rerun the command to resume it. The lists come last.
    """
    from PIL import Image

    from open_gem.cli.save import save_image
    from open_gem.data import MapSource, find_dataset, read_context
    from open_gem.files import write_file

    source = find_dataset("context59")
    assert isinstance(source, MapSource)
    home = source.home(root)
    images = read_context(document)
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for image in images:
        if image.phase not in lists:
            raise DatasetError(
                f"image {image.id} of {str(document)!r} is of phase {image.phase!r}, expected train or val"
            )
        lists[image.phase].append(image.id)
    written = 0
    with progress_bar(len(images), quiet) as advance:
        for image in images:
            path = home / "SegmentationClassContext" / f"{image.id}.png"
            if not path.exists():
                save_image(path, Image.fromarray(image.labels()))
                written += 1
            advance(1)
    for phase, ids in lists.items():
        text = "".join(f"{image_id}\n" for image_id in sorted(ids))
        write_file(home / "ImageSets" / "SegmentationContext" / f"{phase}.txt", partial(_write_text, text))
    counts = ", ".join(f"{phase} {len(ids):,}" for phase, ids in lists.items())
    typer.echo(f"{written:,} label maps made, {len(images) - written:,} were there; {counts}; in {home}")


def _write_text(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


@data.command()
def scenes(
    out: Annotated[Path, typer.Option(help="A new folder, for `images/` and `truth.json`.")],
    images: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    size: Annotated[int, typer.Option(min=32, help="Pixels of a side.")] = 256,
    showing: Annotated[
        str | None,
        typer.Option(help="Only scenes that show one of these concepts, comma-separated.", show_default="all"),
    ] = None,
) -> None:
    """Draw synthetic scenes, with their objects in COCO's format, to try labelling and tuning on."""
    from open_gem.data import write_scenes

    write_scenes(out, images, size, () if showing is None else split_commas(showing))
    typer.echo(f"{counted(images, 'image')} in {out / 'images'}, their objects in {out / 'truth.json'}")


@data.command()
def voc(
    root: Annotated[Path, typer.Option("--root", help="Folder for VOCdevkit.")],
    year: Annotated[str, typer.Option(help="2012 or 2010.")] = "2012",
) -> None:
    """Download PascalVOC, 2 GB, with torchvision, unless it exists."""
    from open_gem.data import find_dataset

    if year not in ("2012", "2010"):
        raise InputError(f"--year is {year!r}, expected 2012 or 2010")
    source = find_dataset(f"voc{year}")
    try:
        typer.echo(f"{len(source.open(root))} images of {source.name} are there")  # pyright: ignore[reportArgumentType]
        return
    except DatasetError:
        say(f"downloading {source.page}")
    from torchvision.datasets import VOCSegmentation

    try:
        root.mkdir(parents=True, exist_ok=True)
        VOCSegmentation(str(root), year=year, image_set="val", download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise DatasetError(f"cannot download {source.page}: {error}") from error
    dataset: Any = source.open(root)
    typer.echo(f"{len(dataset)} images of {source.name} {dataset.split}")
