"""The command line: `open-gem COMMAND --help`. One function a command; torch and the models wake inside them.

What a person asked for goes to stdout; progress, warnings and errors go to stderr, one line each. Exit codes: 0 all
went well, 1 some images failed and the others are done, 2 the request itself was wrong, 130 interrupted.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import open_gem
from open_gem.errors import ImageError, InputError, OpenGemError, PathwayError, PromptError

if TYPE_CHECKING:
    from open_gem.localizer import Localizer
    from open_gem.pathway import Pathway
    from open_gem.save import Found, Row

MANY = 20  # phrases up to which each gets a picture and a row of the table unless asked otherwise
DEFAULT_SAVE = "overlay,json"


# Errors and warnings --------------------------------------------------------------------------------------------------


class _Group(TyperGroup):
    """Commands whose foreseen errors and warnings are one line each on stderr."""

    def invoke(self, ctx: Any) -> Any:
        with _warnings_as_lines():
            try:
                return super().invoke(ctx)
            except OpenGemError as error:
                _say(f"error: {error}")
                raise typer.Exit(2) from error


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)  # those for people; those for developers stay as they were
        warnings.showwarning = show
        yield


def _say(message: str) -> None:
    """One line on stderr."""
    print(" ".join(message.splitlines()), file=sys.stderr)  # print, for typer.echo would write across a progress bar


app = typer.Typer(
    cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)


def main() -> None:
    """The entry point `open-gem`."""
    for stream in (sys.stdout, sys.stderr):  # a phrase in a script that the terminal cannot write is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"open-gem {open_gem.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find where things are in pictures, by phrases, with pretrained vision-language models and no training."""


# Options that several commands have -----------------------------------------------------------------------------------

ModelOption = Annotated[
    str, typer.Option("--model", help='"embedded", a name of `open-gem models`, "hf-hub:org/repo", "local-dir:folder".')
]
PretrainedOption = Annotated[
    str | None, typer.Option("--pretrained", help="The weights' tag, where a model has several.")
]
DeviceOption = Annotated[str, typer.Option("--device", help='"auto", "cpu", "cuda", "cuda:1", "mps" …')]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


# Ground ---------------------------------------------------------------------------------------------------------------


@app.command()
def ground(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Picture files.", show_default=False)],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A phrase, or @FILE with one a line; may be repeated.", show_default=False),
    ] = None,
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    pathway: Annotated[str, typer.Option(help="A name of `open-gem pathways`.")] = "gem",
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

    Scores are cosines of the whole picture with a phrase: they say whether it is there. Heatmaps say where, and each is
    stretched to its own extremes, so that of an absent thing looks lively too.
    """
    from open_gem.imaging import check_size_rule
    from open_gem.pathway import find_pathway
    from open_gem.prompts import check_template
    from open_gem.save import check_writable, find_kinds, stems

    phrases, kinds = read_prompts(prompt or []), find_kinds(DEFAULT_SAVE if save is None else save)
    tune = partial(_tuned, depth=depth, iterations=iterations, temperature_scale=temperature_scale)
    tune(find_pathway(pathway))  # whatever is wrong is said before a model is loaded
    if size is not None:
        check_size_rule(size)
    if template is not None:
        check_template(template)
    _check_share("threshold", threshold)
    _check_share("background", background)
    if kinds:
        check_writable(out)

    if background is not None and "segmentation" not in kinds:
        _say("warning: --background has no effect without --save segmentation")
    few = MANY if save is None else len(phrases)
    if len(phrases) > few:
        _say(f"warning: {len(phrases)} phrases: overlays of the {few} best scores only, --save overlay draws all")
    localizer = _load(model, pretrained, device, pathway, tune, size, template)
    settings = _settings(localizer, pathway)
    done: list[tuple[str, list[Row]]] = []
    failed = 0
    with _bar(len(images), quiet) as advance:
        for path, stem in zip(images, stems(images), strict=True):
            try:
                found = _locate(localizer, path, phrases, threshold, background)
            except ImageError as error:  # one broken picture; anything else would befall all of them
                failed += 1
                message = str(error) if str(error).startswith(repr(path)) else f"{path!r}: {error}"
                _say(f"error: {message}")
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


def _locate(
    localizer: "Localizer", path: str, phrases: Sequence[str], threshold: float = 0.5, background: float | None = None
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


def _load(
    model: str,
    pretrained: str | None,
    device: str,
    pathway: str = "gem",
    tune: "Callable[[Pathway], Pathway]" = lambda pathway: pathway,
    size: str | None = None,
    template: str | None = None,
) -> "Localizer":
    """The localizer that was asked for; its settings start from those that the checkpoint recommends."""
    from open_gem import backbones
    from open_gem.localizer import Localizer, resolve
    from open_gem.prompts import TEMPLATE

    backbone = backbones.load(model, pretrained, device=device)
    return Localizer(backbone, tune(resolve(backbone, pathway)), size, TEMPLATE if template is None else template)


def _tuned(
    pathway: "Pathway", depth: int | None = None, iterations: int | None = None, temperature_scale: float | None = None
) -> "Pathway":
    given = {"depth": depth, "iterations": iterations, "temperature_scale": temperature_scale}
    given = {name: value for name, value in given.items() if value is not None}
    without_effect = sorted(given.keys() - {"depth"})
    if pathway.mix != "self-self" and without_effect:
        raise PathwayError(f"{' and '.join(without_effect)} given, but the pathway has no self-self attention")
    return replace(pathway, **given)


def _settings(localizer: "Localizer", pathway: str) -> dict[str, Any]:
    """Everything that decided the result, for the JSON document."""
    return {
        "open_gem": open_gem.__version__,
        "model": localizer.backbone.name,
        "pathway": {"name": pathway, **asdict(localizer.settings(localizer.pathway))},
        "size_rule": localizer.size_rule,
        "template": localizer.template,
    }


def _print_found(
    done: "Sequence[tuple[str, Sequence[Row]]]", phrases: int, out: Path | None, *, to_stderr: bool
) -> None:
    console = _console(to_stderr)
    for path, some in done:
        table = _table("phrase", "score", "point x, y", "best box x, y, x, y", title=path)
        for row in some:
            table.add_row(*map(Text, (row.phrase, f"{row.score:.3f}", _numbers(row.point), _numbers(row.box))))
        if len(some) < phrases:
            table.caption = Text(f"and {phrases - len(some)} phrases with lower scores")
        console.print(table)
    if out is not None and done:
        console.print(Text(f"Files are in {out}"))


# Demo -----------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("open_gem_demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which scene.")] = 0,
    model: ModelOption = "embedded",
    pretrained: PretrainedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make a scene of known objects, find them and one thing that is absent, and draw the result. Needs no network."""
    from PIL import Image

    from open_gem.datasets.scenes import CONCEPTS, scene
    from open_gem.save import Found, check_writable, draw_overlay, save_picture, slugs, write_file, write_json
    from open_gem.viz import contact_sheet

    check_writable(out)
    localizer = _load(model, pretrained, device)
    made = scene(seed, size=512)
    absent = next(name for name in CONCEPTS if name not in made.names)
    picture, phrases = Image.fromarray(made.image), [*made.names, absent]
    found = Found(str(out / "scene.png"), picture, localizer(picture, phrases))
    pictures = [draw_overlay(found, index) for index in range(len(phrases))]

    save_picture(out / "scene.png", picture)
    for slug, drawn in zip(slugs(phrases), pictures, strict=True):
        save_picture(out / f"scene.{slug}.overlay.png", drawn)
    save_picture(out / "contact-sheet.png", contact_sheet([picture, *pictures]))
    document = {"seed": seed, **found.document(_settings(localizer, "gem"))}
    for entry, mask, box in zip(document["prompts"], made.masks, made.boxes, strict=False):
        x, y = entry["point"]
        entry.update(object_box=box.tolist(), point_in_object=bool(mask[y, x]))
    document["prompts"][-1].update(object_box=None, point_in_object=None)
    write_file(out / "result.json", partial(write_json, document))

    if as_json:
        typer.echo(json.dumps(document))
    _print_demo(document, out, to_stderr=as_json)


def _print_demo(document: dict[str, Any], out: Path, *, to_stderr: bool) -> None:
    verdicts = {True: "yes", False: "no", None: "not in the picture"}
    table = _table("phrase", "score", "point x, y", "best box x, y, x, y", "point in object", title="demo")
    for entry in document["prompts"]:
        best = entry["boxes"][0]["xyxy"] if entry["boxes"] else None
        row = entry["prompt"], f"{entry['score']:.3f}", _numbers(entry["point"]), _numbers(best)
        table.add_row(*map(Text, (*row, verdicts[entry["point_in_object"]])))
    console = _console(to_stderr)
    console.print(table)
    console.print(Text(f"Look at {out / 'contact-sheet.png'}; everything is in {out}"))
    console.print(Text(f'Try: open-gem ground {out / "scene.png"} -p "{document["prompts"][0]["prompt"]}"'))


# Evaluate -------------------------------------------------------------------------------------------------------------


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
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure pathways against known masks: pointing game, mask IoU, mIoU. The model sees each image once for all."""
    from open_gem.evaluate import evaluate_scenes
    from open_gem.imaging import check_size_rule
    from open_gem.pathway import PATHWAYS, find_pathway

    if dataset != "scenes":
        raise InputError(f"unknown data set {dataset!r}; known: scenes")
    names = list(PATHWAYS) if pathway == "all" else [name.strip() for name in pathway.split(",")]
    tune = partial(_tuned, temperature_scale=temperature_scale)
    for name in names:  # whatever is wrong is said before a model is loaded
        find_pathway(name)
    tune(PATHWAYS["gem"])
    if size is not None:
        check_size_rule(size)
    localizer = _load(model, pretrained, device, size=size, pathway=names[0])
    settings = {name: localizer.settings(name) for name in names}
    chosen = {name: tune(setting) if setting.is_adaptive else setting for name, setting in settings.items()}
    with _bar(count, quiet) as advance:
        outcomes = evaluate_scenes(localizer, chosen, range(first, first + count), progress=advance)
    rows = [
        {"pathway": name, "temperature_scale": _adaptive_scale(chosen[name]), **outcome.scores()}
        for name, outcome in outcomes.items()
    ]
    if as_json:
        run = {"dataset": dataset, "count": count, "first": first, "model": localizer.backbone.name}
        typer.echo(json.dumps({**run, "size_rule": localizer.size_rule, "pathways": rows}))
        return
    table = _table(*(key.replace("_", " ") for key in rows[0]), title=f"{count} scenes, {localizer.size_rule}")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else value or "" for value in row.values()))
    _console().print(table)


def _adaptive_scale(pathway: "Pathway") -> float | None:
    """The multiplier of the adaptive temperature; None for a pathway that has no such temperature."""
    return float(pathway.temperature_scale) if pathway.is_adaptive else None


# Models and pathways --------------------------------------------------------------------------------------------------

MODELS = (  # a choice of those that can be read: name, tag, what it is
    ("embedded", None, "small, in the package, no download: for trying out and for tests"),
    ("ViT-B-32", "openai", "CLIP; coarse patches, fast"),
    ("ViT-B-16", "openai", "CLIP; the paper's main model"),
    ("ViT-L-14", "openai", "CLIP, large"),
    ("ViT-L-14-336", "openai", "CLIP, large, trained at 336 pixels"),
    ("ViT-B-16", "laion2b_s34b_b88k", "OpenCLIP, trained on LAION-2B"),
    ("ViT-L-14", "laion2b_s32b_b82k", "OpenCLIP, large, trained on LAION-2B"),
    ("ViT-H-14", "laion2b_s32b_b79k", "OpenCLIP, huge, trained on LAION-2B"),
    ("ViT-B-16", "datacomp_xl_s13b_b90k", "trained on DataComp-1B"),
    ("ViT-B-16", "metaclip_400m", "MetaCLIP, trained on 400 million pairs"),
    ("ViT-L-14", "metaclip_400m", "MetaCLIP, large"),
    ("ViT-B-16", "dfn2b", "trained on data chosen by a filtering network"),
)


@app.command()
def models(
    every: Annotated[
        bool, typer.Option("--all", help="Every name and tag of open_clip, and whether it can be read.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List pretrained models."""
    if every:
        from open_gem.backbones import catalogue

        rows = [{"name": name, "tag": tag, "obstacle": reason} for name, tag, reason in catalogue()]
    else:
        rows = [{"name": name, "tag": tag, "notes": notes} for name, tag, notes in MODELS]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = _table("name", "tag", "cannot be read because" if every else "notes")
    for row in rows:
        table.add_row(*(Text(value or "") for value in row.values()))
    _console().print(table)


@app.command()
def pathways(as_json: JsonOption = False) -> None:
    """List the ways to read a model's patches, with their settings."""
    from open_gem.pathway import PATHWAYS

    rows = [{"name": name, **asdict(row)} for name, row in PATHWAYS.items()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = _table(*(key.replace("_", " ") for key in rows[0]))
    for row in rows:
        table.add_row(
            *(Text("yes" if value is True else "no" if value is False else str(value)) for value in row.values())
        )
    _console().print(table)


# Showing --------------------------------------------------------------------------------------------------------------


def _console(to_stderr: bool = False) -> Console:
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console.width = 240  # a file or pipe has no edge to wrap at; tables take what they need
    return console


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=Text(title) if title else None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _numbers(numbers: Sequence[int] | None) -> str:
    return "none" if numbers is None else ", ".join(map(str, numbers))


class _Speed(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "")


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where there are several images and a person is looking; gives what moves it on."""
    console = Console(stderr=True)
    if quiet or total < 2 or not console.is_terminal:
        yield lambda images: None
        return
    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), _Speed(), progress.TimeRemainingColumn())
    # What goes to stdout passes through the bar only where both are one screen: else it would end up on stderr.
    with progress.Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda images: bar.advance(task, images)


# Checking what was given ----------------------------------------------------------------------------------------------


def read_prompts(given: Iterable[str]) -> tuple[str, ...]:
    """Phrases as typed, with every "@FILE" replaced by the lines of that file that are not blank."""
    from open_gem.prompts import check_prompts

    phrases = [phrase for one in given for phrase in (_prompt_file(one[1:]) if one.startswith("@") else [one])]
    return check_prompts(phrases)


def _prompt_file(name: str) -> list[str]:
    try:
        text = Path(name).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PromptError(f"cannot read phrases from {name!r}: {reason}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _check_share(name: str, number: float | None) -> None:
    if number is not None and not 0 <= number <= 1:
        raise InputError(f"{name} is {number}, expected a number in [0, 1]")
