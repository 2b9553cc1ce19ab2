"""`open-gem ground`: phrases in pictures."""

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
    names_of,
    new_console,
    new_table,
    numbers,
    numbers_of,
    print_json,
    progress_bar,
    say,
    settings_of,
    tuned,
    warn_of_commas,
)
from open_gem.errors import ImageError, InputError, PromptError

if TYPE_CHECKING:
    from PIL import Image

    from open_gem.cli.save import Row
    from open_gem.localization import Localization
    from open_gem.localizer import Localizer
    from open_gem.method.table import Method
    from open_gem.text import Vocabulary
    from open_gem.trained.localizer import TrainedLocalizer

MANY = 20  # phrases up to which each gets a picture and a row of the table unless asked otherwise
DEFAULT_SAVE = "overlay,json"
DEFAULT_METHOD = "gem"
PHRASES, VIEWS = "Phrases", "Views"  # panels of the help


@app.command()
def ground(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Picture files.", show_default=False)],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A phrase, or @FILE with one a line; may be repeated.", show_default=False),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="A file with one class a line, its synonyms after commas.", rich_help_panel=PHRASES),
    ] = None,
    first_is_background: Annotated[
        bool, typer.Option("--first-is-background", help="Its first line is the background.", rich_help_panel=PHRASES)
    ] = False,
    negative: Annotated[
        list[str] | None,
        typer.Option(
            "--negative",
            "-n",
            help="A phrase for what is not meant, or @FILE; may be repeated. Competes, and is never an answer.",
            show_default=False,
            rich_help_panel=PHRASES,
        ),
    ] = None,
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="A name of `open-gem methods`; several by commas, or all, to compare. "
            '"proxyclip:facebook/dino-vitb8" follows that DINO.',
            show_default=DEFAULT_METHOD,
        ),
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Number of last blocks that have the method.")] = None,
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
        str | None,
        typer.Option(
            help='What a phrase is put into, such as "a picture of a {}"; "imagenet-80" and other ensembles by name.',
            rich_help_panel=PHRASES,
        ),
    ] = None,
    remove_redundancy: Annotated[
        bool,
        typer.Option(
            "--remove-redundancy", help="Take away what all phrases share (CLIP Surgery).", rich_help_panel=PHRASES
        ),
    ] = False,
    window: Annotated[
        int | None, typer.Option(help="Side of sliding windows in pixels; else all at once.", rich_help_panel=VIEWS)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Pixels between windows; half a window by default.", rich_help_panel=VIEWS)
    ] = None,
    scales: Annotated[
        str | None, typer.Option(help='Multiples of the size, by commas: "1,1.5".', rich_help_panel=VIEWS)
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mirrored as well.", rich_help_panel=VIEWS)] = False,
    merge: Annotated[
        str | None,
        typer.Option(help='Of views: "features", or "logits" as the field\'s evaluators.', rich_help_panel=VIEWS),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Let maps follow the picture's edges (PAMR).", rich_help_panel=VIEWS)
    ] = False,
    heatmap_scale: Annotated[
        str | None,
        typer.Option(
            help='"minmax" stretches each heatmap, "probability" lets phrases compete, "cosine" is raw.',
            show_default="minmax, or probability with negatives",
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Masks and boxes are where the heatmap is above this.")] = 0.5,
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
    there, and presence says so as a probability. Heatmaps say where, and each is stretched to its own extremes, so
    that of an absent thing looks lively too. Several methods are read from one pass of the model; their files go to
    folders of their names, and a contact sheet shows them side by side.
    """
    from open_gem.cli.save import Found, find_kinds, save_picture, side_by_side, stems
    from open_gem.files import check_writable
    from open_gem.images.pixels import check_size_rule
    from open_gem.images.views import Views
    from open_gem.method.table import METHODS
    from open_gem.refine.pamr import Pamr
    from open_gem.text import check_template
    from open_gem.trained.localizer import load_trained
    from open_gem.trained.registry import is_trained

    vocabulary = read_vocabulary(prompt or [], classes, first_is_background, negative or [])
    kinds = find_kinds(DEFAULT_SAVE if save is None else save)
    names = names_of(method or DEFAULT_METHOD)
    tune = partial(tuned, depth=depth, iterations=iterations, temperature_scale=temperature_scale)
    for name in METHODS.keys() & set(names):
        tune(name, METHODS[name])  # whatever is wrong is said before a model is loaded
    if size is not None:
        check_size_rule(size)
    if template is not None:
        check_template(template)
    views = Views(window, stride, numbers_of("scales", scales or "1"), flip, merge or "features")
    drawn = heatmap_scale or ("probability" if vocabulary.background else "minmax")
    check_scale(drawn)
    check_share("threshold", threshold)
    check_share("background", background)
    if kinds:
        check_writable(out)

    phrases = len(vocabulary.labels)
    if merge is not None and views.is_plain:
        say("warning: --merge has no effect without --window, --scales or --flip")
    if background is not None and "segmentation" not in kinds:
        say("warning: --background has no effect without --save segmentation")
    few = MANY if save is None else phrases
    if phrases > few:
        say(f"warning: {phrases} phrases: overlays of the {few} best scores only, --save overlay draws all")
    if pretrained is None and is_trained(model):
        untrained = {
            "method": method,
            "depth": depth,
            "iterations": iterations,
            "temperature-scale": temperature_scale,
            "size": size,
            "window": window,
            "stride": stride,
            "scales": scales,
            "flip": flip or None,
            "merge": merge,
            "refine": refine or None,
            "remove-redundancy": remove_redundancy or None,
        }
        _refuse(model, untrained)
        localizer = load_trained(model, template=template, device=device, dtype=dtype)
        chosen = {}
    else:
        localizer = load_localizer(
            model,
            pretrained,
            device,
            dtype,
            size=size,
            template=template,
            views=views,
            refinement=Pamr() if refine else None,
            remove_redundancy=remove_redundancy,
        )
        chosen = {name: tune(name, localizer.settings(name)) for name in names}
    settings = settings_of(localizer, chosen)
    done: list[tuple[str, list[Row]]] = []
    failed = 0
    with progress_bar(len(images), quiet) as advance:
        for path, stem in zip(images, stems(images), strict=True):
            try:
                picture, located = _locate(localizer, path, vocabulary, chosen)
            except ImageError as error:  # one broken picture; anything else would befall all of them
                failed += 1
                message = str(error) if str(error).startswith(repr(path)) else f"{path!r}: {error}"
                say(f"error: {message}")
                if as_json:
                    print_json({"path": path, "error": message})
                continue
            finally:
                advance(1)
            compared = len(located) > 1
            made = {
                name: Found(path, picture, result, threshold, background, drawn, name if compared else "")
                for name, result in located.items()
            }
            for name, found in made.items():
                found.write(out / folder(name) if compared else out, stem, kinds, few, settings[name])
                if as_json:
                    print_json(found.document(settings[name]))
                title = f"{path} · {name}" if compared else path
                done.append((title, found.rows(MANY)))  # not the picture itself: there may be thousands
            if compared and "overlay" in kinds:
                save_picture(out / f"{stem}.compare.png", side_by_side(list(made.values()), few))
    if not quiet:
        _print_found(done, phrases, out if kinds else None, to_stderr=as_json)
    if failed:
        raise typer.Exit(1)


def _refuse(model: str, options: dict[str, Any]) -> None:
    """Raise InputError where any of the options, which a model that was trained to localize does not have, is given."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise InputError(f"{model} was trained to localize: it has no methods, and no {', '.join(given)}")


def _locate(
    localizer: "Localizer | TrainedLocalizer", path: str, vocabulary: "Vocabulary", methods: "dict[str, Method]"
) -> "tuple[Image.Image, dict[str, Localization]]":
    """The picture, and what each method finds in it; a model that has none goes under ""."""
    from open_gem.images.pixels import read_image
    from open_gem.trained.localizer import TrainedLocalizer

    picture = read_image(path)
    try:
        if isinstance(localizer, TrainedLocalizer):
            return picture, {"": localizer(picture, vocabulary)}
        return picture, localizer.compare(picture, vocabulary, methods)
    except (MemoryError, RuntimeError) as error:  # torch has a class for it on GPUs, and only words on the CPU
        if "memory" in f"{type(error).__name__} {error}".lower():
            raise ImageError(f"{path!r} needs more memory than there is; try --size long:N or --window") from error
        raise


def _print_found(
    done: "Sequence[tuple[str, Sequence[Row]]]", phrases: int, out: Path | None, *, to_stderr: bool
) -> None:
    console = new_console(to_stderr)
    for path, some in done:
        table = new_table("phrase", "score", "presence", "point x, y", "best box x, y, x, y", title=path)
        for row in some:
            presence = "" if row.presence is None else f"{row.presence:.2f}"
            cells = row.phrase, f"{row.score:.3f}", presence, numbers(row.point), numbers(row.box)
            table.add_row(*map(Text, cells))
        if len(some) < phrases:
            table.caption = Text(f"and {phrases - len(some)} phrases with lower scores")
        console.print(table)
    if out is not None and done:
        console.print(Text(f"Files are in {out}"))


def read_vocabulary(
    prompts: Iterable[str], classes: Path | None, first_is_background: bool, negatives: Iterable[str]
) -> "Vocabulary":
    """What is asked for, by phrases or a class file, and what is not meant; "@FILE" stands for the lines of a file."""
    from open_gem.text import Vocabulary

    phrases, others = (
        [phrase for one in given for phrase in (prompt_file(one[1:]) if one.startswith("@") else [one])]
        for given in (prompts, negatives)
    )
    warn_of_commas("-p", phrases)
    warn_of_commas("-n", others)
    if classes is None:
        if first_is_background:
            raise InputError("--first-is-background given without --classes")
        vocabulary = Vocabulary.of(phrases)
    elif phrases:
        raise InputError("--classes and --prompt given, expected one of them")
    else:
        vocabulary = Vocabulary.read(classes, first_is_background)
    return vocabulary.with_background(others) if others else vocabulary


def prompt_file(name: str) -> list[str]:
    try:
        text = Path(name).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PromptError(f"cannot read phrases from {name!r}: {reason}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def folder(method: str) -> str:
    """Where files of a method go when several are compared."""
    from open_gem.cli.save import slugs
    from open_gem.method.table import METHODS

    return method if method in METHODS else slugs([method])[0]


def check_scale(scale: str) -> None:
    from open_gem.localization import SCALES

    if scale not in SCALES:
        raise InputError(f"heatmap scale is {scale!r}, expected one of {', '.join(SCALES)}")


def check_share(name: str, number: float | None) -> None:
    if number is not None and not 0 <= number <= 1:
        raise InputError(f"{name} is {number}, expected a number in [0, 1]")
