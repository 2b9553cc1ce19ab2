"""`open-gem ground`: prompts in images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

import open_gem
from open_gem.cli.app import app, comma_separated, new_console, new_table, print_json, progress_bar, say
from open_gem.cli.options import (
    METHOD,
    PROMPTS,
    ClassOptions,
    ExclusiveOption,
    JsonOption,
    ModelOptions,
    NmsOption,
    QuietOption,
    RedundancyOption,
    TuneOptions,
    ViewOptions,
    absent_option,
    names_of_options,
    parse_methods,
    read_prompts,
    with_options,
)
from open_gem.errors import ImageError, InputError

if TYPE_CHECKING:
    from open_gem.cli.save import ImageResult, LabelRow
    from open_gem.locate import AnyLocalizer
    from open_gem.method.table import Method
    from open_gem.text import Vocabulary

MANY = 20  # maximum number of labels with an overlay and a row of the table, unless overlays are requested
DEFAULT_SAVE = "overlay,json"
DEFAULT_METHOD = "gem"


@dataclass(frozen=True)
class FileOptions:
    """Which files are written, and what is drawn."""

    heatmap_scale: Annotated[
        str | None,
        typer.Option(
            help='"minmax" stretches each heatmap, "probability" is a softmax over prompts, "cosine" is raw.',
            show_default="minmax, or probability with distractors",
        ),
    ] = None
    threshold: Annotated[float, typer.Option(help="Heatmaps above it become masks and boxes.")] = 0.5
    presence: Annotated[
        float,
        typer.Option(help="Labels with a lower presence are absent: crossed out, without boxes. 0 draws all boxes."),
    ] = 0.5
    absent: Annotated[
        str | None, absent_option("presence for drawings and boxes, none for masks and segmentations")
    ] = None
    min_area: Annotated[
        float, typer.Option(help="Smallest object, as a share of the image's pixels; smaller ones are left out.")
    ] = 0.0005
    exclusive: ExclusiveOption = None
    nms: NmsOption = None
    background: Annotated[
        float | None, typer.Option(help="Segmentations: pixels with a lower probability are background.")
    ] = None
    save: Annotated[
        str | None,
        typer.Option(
            help="What to write, comma-separated: overlay, heatmap, mask, segmentation, npz, json; or none.",
            show_default=DEFAULT_SAVE,
        ),
    ] = None
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("open_gem_out")

    def kinds(self) -> list[str]:
        """Return the kinds of files to write. Raises InputError for impossible values, and OutputError if nothing can
        be written."""
        from open_gem.cli.save import find_kinds
        from open_gem.files import check_writable
        from open_gem.localization import SCALES

        kinds = find_kinds(DEFAULT_SAVE if self.save is None else self.save)
        if self.heatmap_scale is not None and self.heatmap_scale not in SCALES:
            raise InputError(f"heatmap scale is {self.heatmap_scale!r}, expected one of {', '.join(SCALES)}")
        limits = ("threshold", "presence", "min_area", "nms", "background")
        for name, number in ((name, getattr(self, name)) for name in limits):
            if number is not None and not 0 <= number <= 1:
                raise InputError(f"{name.replace('_', ' ')} is {number}, expected a number in [0, 1]")
        if kinds:
            check_writable(self.out)
        if self.background is not None and "segmentation" not in kinds:
            say("warning: --background has no effect without --save segmentation")
        return kinds

    def most_overlays(self, labels: int) -> int:
        """Return how many labels get an overlay: all with `--save`, those with the highest scores otherwise."""
        if self.save is not None or labels <= MANY:
            return labels
        say(f"warning: {labels} labels: overlays of the {MANY} with the highest scores only, --save overlay draws all")
        return MANY


@app.command()
@with_options
def ground(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    *,
    classes: ClassOptions,
    negative: Annotated[
        list[str] | None,
        typer.Option(
            "--negative",
            "-n",
            help="A distractor, or @FILE (repeatable): part of the softmax, never predicted.",
            show_default=False,
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    remove_redundancy: RedundancyOption = False,
    model: ModelOptions,
    method: Annotated[
        str | None,
        typer.Option(
            help="A name of `open-gem methods`; several, comma-separated, or all, to compare. "
            '"proxyclip:facebook/dino-vitb8" follows that DINO.',
            show_default=DEFAULT_METHOD,
        ),
    ] = None,
    tuning: TuneOptions,
    views: ViewOptions,
    regions: Annotated[
        Path | None,
        typer.Option(
            help='A label image of class-agnostic masks of the image, 0 for none: "corrclip:EXPERT" attends within '
            "each, and each has a single label in the segmentation.",
            show_default=False,
            rich_help_panel=METHOD,
        ),
    ] = None,
    files: FileOptions,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Locate prompts in images: a heatmap, a point and boxes for each.

    Presence says whether a prompt is in the image, as a probability; the score is the cosine it comes from (for CLIPSeg
    and OWL, a probability itself). A heatmap says where. Min-max scaling stretches each heatmap, so that of an absent
    thing has a maximum too: absent labels are crossed out, and have boxes only with --absent none. Several methods are
    read from one pass of the model; each has a folder of its own, and a sheet shows them side by side.
    """
    from open_gem.cli.save import base_names

    vocabulary = read_vocabulary(classes, negative or [])
    kinds = files.kinds()
    few = files.most_overlays(len(vocabulary.labels))
    if regions is not None and len(images) > 1:
        raise InputError(f"--regions are those of one image, but {len(images)} are given")
    if regions is not None:
        model.check_untrained(["--regions"])
    localizer, methods = load(model, method, classes.template, remove_redundancy, tuning, views)
    localizer.check(vocabulary)
    settings = settings_of(localizer, methods)
    tables: list[tuple[str, list[LabelRow]]] = []  # not the images: there may be thousands
    has_failed = False
    with progress_bar(len(images), quiet) as advance:
        for path, base_name in zip(images, base_names(images), strict=True):
            try:
                located = locate(localizer, path, vocabulary, methods, files, regions)
            except ImageError as error:  # an error of this image alone
                has_failed = True
                report_failure(path, error, as_json)
            else:
                write(located, base_name, kinds, few, settings, files.out)
                for name, image in located.items():
                    tables.append((f"{path} · {name}" if image.method else path, image.rows(MANY)))
                    if as_json:
                        print_json(image.document(settings[name]))
            advance(1)
    if not quiet:
        print_tables(tables, len(vocabulary.labels), files.out if kinds else None, to_stderr=as_json)
    if has_failed:
        raise typer.Exit(1)


# The request, checked before a model is loaded ------------------------------------------------------------------------


def read_vocabulary(classes: ClassOptions, negatives: Sequence[str]) -> "Vocabulary":
    """Return labels, prompts and distractors."""
    from open_gem.text import check_template

    vocabulary = classes.vocabulary()
    if classes.template is not None:
        check_template(classes.template)
    distractors = read_prompts("-n", negatives)
    return vocabulary.with_background(distractors) if distractors else vocabulary


def load(
    model: ModelOptions,
    method: str | None,
    template: str | None,
    remove_redundancy: bool,
    tuning: TuneOptions,
    views: ViewOptions,
) -> "tuple[AnyLocalizer, dict[str, Method]]":
    """Load the localizer and its methods by name; none if it was trained to localize."""
    from open_gem.method.run import check_depth
    from open_gem.method.table import METHODS

    names = parse_methods(method or DEFAULT_METHOD)
    for name in METHODS.keys() & set(names):
        tuning.tune(name, METHODS[name])
    settings = {"size": views.image_size, "views": views.views(), "refinement": views.refinement()}
    settings["text_step"] = views.step_on_text()
    options = [*names_of_options(tuning), *names_of_options(views)]
    options = (["--method"] if method else []) + options + (["--remove-redundancy"] if remove_redundancy else [])
    if model.is_trained():
        model.check_untrained(options)
        return model.load_any(template=template), {}
    localizer = model.load(template=template, remove_redundancy=remove_redundancy, **settings)
    methods = {name: localizer.resolve(tuning.tune(name, localizer.resolve(name))) for name in names}
    for chosen in methods.values():
        check_depth(chosen, localizer.layers)
    return localizer, methods


def settings_of(localizer: "AnyLocalizer", methods: "Mapping[str, Method]") -> dict[str, dict[str, Any]]:
    """Return all settings that decide each method's result, for the JSON document."""
    from open_gem.trained.localizer import TRAINED

    settings = {"open_gem": open_gem.__version__, **localizer.describe()}
    if not methods:
        return {TRAINED: settings}
    return {name: {**settings, "method": {"name": name, **method.describe()}} for name, method in methods.items()}


# One image ------------------------------------------------------------------------------------------------------------


def locate(
    localizer: "AnyLocalizer",
    path: str,
    vocabulary: "Vocabulary",
    methods: "Mapping[str, Method]",
    files: FileOptions,
    regions: Path | None = None,
) -> "dict[str, ImageResult]":
    """Locate the vocabulary in an image by each method, all from one pass of the model. Raises ImageError."""
    from open_gem.cli.save import ImageResult
    from open_gem.images.pixels import read_image
    from open_gem.localizer import Localizer

    image = read_image(path)
    scale = files.heatmap_scale or ("probability" if vocabulary.background else "minmax")
    try:
        if regions is None:
            prepared = localizer.prepare(image)
        else:
            assert isinstance(localizer, Localizer), "`ground` refuses regions for others"
            prepared = localizer.prepare(image, regions)
        encoded = localizer.encode(prepared, methods)
        results = {name: localizer.locate(features, vocabulary) for name, features in encoded.items()}
    except (MemoryError, RuntimeError) as error:  # torch has an exception class on GPUs, and only a message on the CPU
        if "memory" not in f"{type(error).__name__} {error}".lower():
            raise
        raise ImageError(f"{path!r} does not fit into memory; try --image-size long:N or --window") from error
    return {
        name: ImageResult(
            path,
            image,
            result,
            files.threshold,
            files.background,
            scale,
            files.presence,
            files.absent,
            files.min_area,
            bool(files.exclusive),
            files.nms,
            name if len(results) > 1 else "",
            localizer.caution,
            prepared.regions,
        )
        for name, result in results.items()
    }


def report_failure(path: str, error: ImageError, as_json: bool) -> None:
    """Print that an image failed, and why."""
    message = str(error) if str(error).startswith(repr(path)) else f"{path!r}: {error}"
    say(f"error: {message}")
    if as_json:
        print_json({"path": path, "error": message})


def write(
    located: "Mapping[str, ImageResult]",
    base_name: str,
    kinds: Sequence[str],
    few: int,
    settings: Mapping[str, dict[str, Any]],
    out: Path,
) -> None:
    """Write an image's files; those of several methods into folders of their own, with a sheet of all beside them."""
    from open_gem.cli.save import side_by_side
    from open_gem.files import write_file
    from open_gem.images.sheet import png

    for name, image in located.items():
        image.write(out / folder_name(name) if image.method else out, base_name, kinds, few, settings[name])
    if len(located) > 1 and "overlay" in kinds:
        write_file(out / f"{base_name}.compare.png", png(side_by_side(list(located.values()), few)))


def folder_name(method: str) -> str:
    """Return the name of the folder for a method's files, if there are several methods."""
    from open_gem.cli.save import slugs
    from open_gem.method.table import METHODS

    return method if method in METHODS else slugs([method])[0]


def print_tables(
    tables: "Sequence[tuple[str, Sequence[LabelRow]]]", labels: int, out: Path | None, *, to_stderr: bool
) -> None:
    """Print a table for each image and method."""
    console = new_console(to_stderr)
    for title, rows in tables:
        table = new_table("label", "presence", "score", "point x, y", "best box x, y, x, y", title=title)
        for row in rows:
            presence = "" if row.presence is None else f"{row.presence:.2f}"
            point, box = map(comma_separated, (row.point, row.box))
            if row.is_present:
                table.add_row(*map(Text, (row.label, presence, f"{row.score:.3f}", point, box)))
            else:
                cells = Text(row.label, "strike"), Text(f"{presence} absent"), Text(f"{row.score:.3f}")
                table.add_row(*cells, Text(), Text(), style="dim")
        if len(rows) < labels:
            table.caption = Text(f"and {labels - len(rows)} labels with lower scores")
        console.print(table)
    if out is not None and tables:
        console.print(Text(f"Files are in {out}"))
