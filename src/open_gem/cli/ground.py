"""`open-gem ground`: phrases in pictures."""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from open_gem.cli._app import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PretrainedOption,
    app,
    load_localizer,
    new_console,
    new_table,
    numbers,
    progress_bar,
    say,
    settings_of,
    tuned,
)
from open_gem.errors import ImageError, InputError, PromptError

if TYPE_CHECKING:
    from open_gem.localizer import Localizer, TrainedLocalizer
    from open_gem.save import Found, Row

MANY = 20  # phrases up to which each gets a picture and a row of the table unless asked otherwise
DEFAULT_SAVE = "overlay,json"
DEFAULT_PATHWAY = "gem"


@app.command()
def ground(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Picture files.", show_default=False)],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A phrase, or @FILE with one a line; may be repeated.", show_default=False),
    ] = None,
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    pathway: Annotated[
        str | None, typer.Option(help="A name of `open-gem pathways`.", show_default=DEFAULT_PATHWAY)
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Number of last blocks that have the pathway.")] = None,
    iterations: Annotated[
        int | None, typer.Option(help="K, refinement steps before the values are mixed; 0 or more.")
    ] = None,
    temperature_scale: Annotated[
        float | None, typer.Option(help="Multiplies the temperature; smaller is sharper.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help='"short:448", "long:N", "square:N" or "native"; else as the model recommends.')
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='What a phrase is put into, such as "a picture of a {}"; "{}" for nothing.')
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Masks and boxes are where the heatmap (0 to 1) is above this.")
    ] = 0.5,
    background: Annotated[
        float | None, typer.Option(help="In segmentations, what is less probable than this is background.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    save: Annotated[
        str | None,
        typer.Option(
            help="What to write, by commas: overlay, heatmap, mask, segmentation, npz, json; or none.",
            show_default=DEFAULT_SAVE,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("open_gem_out"),
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No table and no progress.")] = False,
) -> None:
    """Find phrases in pictures: a heatmap, a point and boxes for each.

    Scores are cosines of the whole picture with a phrase (of CLIPSeg and OWL, probabilities): they say whether it is
    there. Heatmaps say where, and each is stretched to its own extremes, so that of an absent thing looks lively too.
    """
    from open_gem.backbones.trained import is_trained
    from open_gem.imaging import check_size_rule
    from open_gem.localizer import load_trained
    from open_gem.pathway import find_pathway
    from open_gem.prompts import check_template
    from open_gem.save import check_writable, find_kinds, stems

    phrases, kinds = read_prompts(prompt or []), find_kinds(DEFAULT_SAVE if save is None else save)
    tune = partial(tuned, depth=depth, iterations=iterations, temperature_scale=temperature_scale)
    tune(find_pathway(pathway or DEFAULT_PATHWAY))  # whatever is wrong is said before a model is loaded
    if size is not None:
        check_size_rule(size)
    if template is not None:
        check_template(template)
    check_share("threshold", threshold)
    check_share("background", background)
    if kinds:
        check_writable(out)

    if background is not None and "segmentation" not in kinds:
        say("warning: --background has no effect without --save segmentation")
    few = MANY if save is None else len(phrases)
    if len(phrases) > few:
        say(f"warning: {len(phrases)} phrases: overlays of the {few} best scores only, --save overlay draws all")
    if pretrained is None and is_trained(model):
        untrained = {"pathway": pathway, "depth": depth, "iterations": iterations}
        _refuse(model, {**untrained, "temperature-scale": temperature_scale, "size": size})
        localizer = load_trained(model, template=template, device=device, dtype=dtype)
    else:
        chosen = pathway or DEFAULT_PATHWAY
        localizer = load_localizer(model, pretrained, device, dtype, chosen, tune, size, template)
    settings = settings_of(localizer, pathway or DEFAULT_PATHWAY)
    done: list[tuple[str, list[Row]]] = []
    failed = 0
    with progress_bar(len(images), quiet) as advance:
        for path, stem in zip(images, stems(images), strict=True):
            try:
                found = _locate(localizer, path, phrases, threshold, background)
            except ImageError as error:  # one broken picture; anything else would befall all of them
                failed += 1
                message = str(error) if str(error).startswith(repr(path)) else f"{path!r}: {error}"
                say(f"error: {message}")
                if as_json:
                    print(json.dumps({"path": path, "error": message}), flush=True)
                continue
            finally:
                advance(1)
            found.write(out, stem, kinds, few, settings)
            if as_json:
                print(json.dumps(found.document(settings)), flush=True)
            done.append((path, found.rows(MANY)))  # not the picture itself: there may be thousands
    if not quiet:
        _print_found(done, len(phrases), out if kinds else None, to_stderr=as_json)
    if failed:
        raise typer.Exit(1)


def _refuse(model: str, options: dict[str, Any]) -> None:
    """Raise InputError where any of the options, which a model that was trained to localize does not have, is given."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise InputError(f"{model} was trained to localize: it has no pathways, and no {', '.join(given)}")


def _locate(
    localizer: "Localizer | TrainedLocalizer",
    path: str,
    phrases: Sequence[str],
    threshold: float = 0.5,
    background: float | None = None,
) -> "Found":
    from open_gem.imaging import read_image
    from open_gem.save import Found

    picture = read_image(path)
    try:
        return Found(path, picture, localizer(picture, phrases), threshold, background)
    except (MemoryError, RuntimeError) as error:  # torch has a class for it on GPUs, and only words on the CPU
        if "memory" in f"{type(error).__name__} {error}".lower():
            raise ImageError(f"{path!r} needs more memory than there is; try --size long:N") from error
        raise


def _print_found(
    done: "Sequence[tuple[str, Sequence[Row]]]", phrases: int, out: Path | None, *, to_stderr: bool
) -> None:
    console = new_console(to_stderr)
    for path, some in done:
        table = new_table("phrase", "score", "point x, y", "best box x, y, x, y", title=path)
        for row in some:
            table.add_row(*map(Text, (row.phrase, f"{row.score:.3f}", numbers(row.point), numbers(row.box))))
        if len(some) < phrases:
            table.caption = Text(f"and {phrases - len(some)} phrases with lower scores")
        console.print(table)
    if out is not None and done:
        console.print(Text(f"Files are in {out}"))


def read_prompts(given: Iterable[str]) -> tuple[str, ...]:
    """Phrases as typed, with every "@FILE" replaced by the lines of that file that are not blank."""
    from open_gem.prompts import check_prompts

    phrases = [phrase for one in given for phrase in (prompt_file(one[1:]) if one.startswith("@") else [one])]
    return check_prompts(phrases)


def prompt_file(name: str) -> list[str]:
    try:
        text = Path(name).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PromptError(f"cannot read phrases from {name!r}: {reason}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def check_share(name: str, number: float | None) -> None:
    if number is not None and not 0 <= number <= 1:
        raise InputError(f"{name} is {number}, expected a number in [0, 1]")
