"""Options that several commands share: each dataclass is a group of them, its fields are the options.

    @app.command()
    @with_options
    def ground(images: …, *, model: ModelOptions, views: ViewOptions, quiet: …) -> None:

The command receives the dataclasses; its command line has their fields. A new shared option is a new field.
"""

import inspect
import shlex
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from open_gem.cli.app import say
from open_gem.errors import InputError, MethodError, PromptError

if TYPE_CHECKING:
    from open_gem.images.views import Views
    from open_gem.label.ontology import Ontology
    from open_gem.localizer import Localizer
    from open_gem.locate import AnyLocalizer
    from open_gem.method.table import Method
    from open_gem.method.text_steps import TextStep
    from open_gem.refine import Refinement
    from open_gem.text import Exemplar, Prompt, Vocabulary

Number = TypeVar("Number", int, float)

PROMPTS, VIEWS, METHOD = "Prompts", "Views", "Method"  # panels of the help

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No table and no progress.")]
RefineOption = Annotated[
    str | None,
    typer.Option(
        help='Sharpen masks: "fgs", "pamr" or "lposs+" makes maps follow the edges of the image; "sam" or '
        '"sam:CHECKPOINT" draws them with a Segment Anything model; "regions" or "regions:CHECKPOINT" evens maps '
        "inside the regions of an image.",
        rich_help_panel=VIEWS,
    ),
]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(
        help='How images are resized: "short:448", "long:N", "square:N" or "native".',
        show_default="the model's recommendation",
    ),
]
ExclusiveOption = Annotated[
    bool | None,
    typer.Option(
        "--exclusive/--no-exclusive",
        help="Masks of different labels do not overlap: a pixel belongs to the label with the highest cosine there.",
        show_default="they may overlap",
    ),
]
NmsOption = Annotated[
    float | None,
    typer.Option(
        help="IoU of boxes above which the less confident of two objects, of any labels, is dropped.",
        show_default="none is dropped",
    ),
]
DeviceOption = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", "mps" …')]
DtypeOption = Annotated[
    str, typer.Option(help="What to compute in: float32, bfloat16, float16, or auto: bfloat16 on a CPU with AMX.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        help='What a prompt is put into: "a picture of a {}", or the name of an ensemble such as "imagenet-80".',
        rich_help_panel=PROMPTS,
    ),
]
RedundancyOption = Annotated[
    bool,
    typer.Option(
        "--remove-redundancy", help="Subtract what all prompts share (CLIP Surgery).", rich_help_panel=PROMPTS
    ),
]
PretrainedOption = Annotated[
    str | None, typer.Option(help="The tag of open_clip weights, or a file of weights for this architecture.")
]


def _check_absent(rule: str | None) -> str | None:
    from open_gem.localization import check_absent

    return None if rule is None else check_absent(rule)


def absent_option(show_default: str | bool = True) -> Any:
    """Return the option `--absent`, a rule of `localization.ABSENT`, checked before the command runs; with what help
    says of a default that is None."""
    return typer.Option(
        help='Which labels are absent: "presence" (a low image-level presence), "denoise" (no pixel clearly theirs) or '
        '"none".',
        show_default=show_default,
        callback=_check_absent,
    )


AbsentOption = Annotated[str, absent_option()]

TextStepOption = Annotated[
    str | None,
    typer.Option(help='Let the image change the prompts: "cass" (the text half of CASS).', rich_help_panel=METHOD),
]


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command so that the fields of each dataclass parameter become options of their own."""
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    groups = {name: hints[name] for name in signature.parameters if is_dataclass(hints[name])}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            parameters += _parameters_of(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @wraps(command)
    def flat_command(**values: Any) -> Any:
        options = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        return command(**values, **options)

    del flat_command.__wrapped__  # typer would read the signature of `command`
    flat_command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    flat_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat_command


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    """Return the fields of a group as options. If the group has `shown_default`, its help says that of all defaults."""
    hints = get_type_hints(group, include_extras=True)
    shown_default = getattr(group, "shown_default", None)
    parameters: list[inspect.Parameter] = []
    for field in fields(group):
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, hints[field.name]
        if shown_default is not None:
            value, option = get_args(annotation)
            option = copy(option)
            option.show_default = shown_default
            annotation = Annotated[value, option]
        parameters.append(inspect.Parameter(field.name, kind, default=field.default, annotation=annotation))
    return parameters


def names_of_options(group: Any) -> list[str]:
    """Return the options of a group that differ from their defaults, such as "--image-size"."""
    return [option_name(field.name) for field in fields(group) if getattr(group, field.name) != field.default]


def option_name(name: str) -> str:
    """Return "--min-area" for "min_area"."""
    return f"--{name.replace('_', '-')}"


# Lists of values ------------------------------------------------------------------------------------------------------


def split_commas(text: str) -> list[str]:
    """Split a comma-separated list into distinct values."""
    return list(dict.fromkeys(value.strip() for value in text.split(",")))


def parse_methods(text: str) -> list[str]:
    """Parse a comma-separated list of methods, or "all". Raises MethodError for an unknown name."""
    from open_gem.method.guided import check_name
    from open_gem.method.table import METHODS

    names = [name for value in split_commas(text) for name in (METHODS if value == "all" else [check_name(value)])]
    return list(dict.fromkeys(names))


def parse_numbers(option: str, text: str, kind: Callable[[str], Number] = float) -> tuple[Number, ...]:
    """Parse a comma-separated list of numbers. Raises InputError if a value is not a number."""
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError as error:
        expected = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} is {text!r}, expected comma-separated {expected} such as 1,3") from error


def read_prompts(option: str, prompts: Iterable[str]) -> list[str]:
    """Return the prompts, with "@FILE" replaced by the lines of FILE. Warns if one prompt looks like several."""
    lines = [line for prompt in prompts for line in (_lines(prompt[1:]) if prompt.startswith("@") else [prompt])]
    for line in lines:
        parts = [part.strip() for part in line.split(",") if part.strip()]
        if len(parts) > 1:
            separate = " ".join(f"{option} {shlex.quote(part)}" for part in parts)
            say(f"warning: {line!r} is one prompt, comma included; for {len(parts)} prompts: {separate}")
            break
    return lines


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PromptError(f"cannot read prompts from {path!r}: {reason}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


# Groups ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """Which model, on what device and in what precision."""

    model: Annotated[
        str | None,
        typer.Option(
            help='A name of `open-gem models`, "org/repo" of transformers, "hf-hub:org/repo", a folder; or "embedded", '
            "the model in the package, for drawn scenes.",
            show_default="ViT-B-16 with openai weights; embedded for demo and scenes",
        ),
    ] = None
    pretrained: PretrainedOption = None
    device: DeviceOption = "auto"
    dtype: DtypeOption = "float32"

    def or_embedded(self) -> "ModelOptions":
        """Return these options, with the embedded model if none is named."""
        return replace(self, model=self.model or "embedded")

    def load(self, **settings: Any) -> "Localizer":
        """Load a training-free localizer, with the `settings` that are not None."""
        from open_gem import towers
        from open_gem.localizer import Localizer

        backbone = towers.load(self.model, self.pretrained, device=self.device, dtype=self.dtype)
        return Localizer(backbone, **{name: value for name, value in settings.items() if value is not None})

    def load_any(self, **settings: Any) -> "AnyLocalizer":
        """Load a localizer, which may be one that was trained to localize; that one takes only the template of the
        `settings`."""
        if self.model is None or not self.is_trained():
            return self.load(**settings)
        from open_gem.trained.localizer import load_trained

        return load_trained(self.model, template=settings.get("template"), device=self.device, dtype=self.dtype)

    def is_trained(self) -> bool:
        """Return True if the name is that of a model that was trained to localize."""
        from open_gem.trained.registry import is_trained

        return self.model is not None and self.pretrained is None and is_trained(self.model)

    def check_untrained(self, options: Iterable[str]) -> None:
        """Raise InputError if the model was trained to localize but options for methods are set."""
        names = ", ".join(options)
        if names and self.is_trained():
            raise InputError(f"{self.model} was trained to localize: it has no methods, and no {names}")


@dataclass(frozen=True)
class TuneOptions:
    """Settings of methods."""

    depth: Annotated[
        int | None, typer.Option(help="Number of last blocks that use the method.", rich_help_panel=METHOD)
    ] = None
    iterations: Annotated[
        int | None,
        typer.Option(help="K, refinement steps before the values are mixed; 0 or more.", rich_help_panel=METHOD),
    ] = None
    temperature_scale: Annotated[
        float | None, typer.Option(help="Multiplies the temperature; smaller is sharper.", rich_help_panel=METHOD)
    ] = None
    steps: Annotated[
        str | None,
        typer.Option(
            help='Steps after the attention, comma-separated: "scga", "lposs:facebook/dino-vitb16".',
            rich_help_panel=METHOD,
        ),
    ] = None

    def tune(self, name: str, method: "Method") -> "Method":
        """Return the method called `name` with these settings. Raises MethodError for a setting that it does not
        have."""
        from open_gem.method.steps import find_step

        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        settings = {setting: value for setting, value in settings.items() if value is not None}
        if self.steps is not None:
            settings["steps"] = tuple(find_step(step) for step in split_commas(self.steps))
        if unknown := sorted(settings.keys() - set(method.settings)):
            verb = "has" if len(unknown) == 1 else "have"
            options = " and ".join(map(option_name, unknown))
            raise MethodError(f"{options} {verb} no effect with method {name!r}")
        return method.replace(**settings)


def parse_refinement(name: str | None) -> "Refinement | None":
    """Return the refinement called `name`, if any. Raises InputError for an unknown name."""
    from open_gem.refine import find_refinement

    return None if name is None else find_refinement(name)


@dataclass(frozen=True)
class ViewOptions:
    """The views and the refinement of an image."""

    image_size: ImageSizeOption = None
    window: Annotated[
        int | None,
        typer.Option(
            help="Side of sliding windows in pixels.", show_default="the whole image at once", rich_help_panel=VIEWS
        ),
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(help="Pixels between windows.", show_default="half a window", rich_help_panel=VIEWS),
    ] = None
    scales: Annotated[
        str | None, typer.Option(help='Multiples of the image size, comma-separated: "1,1.5".', rich_help_panel=VIEWS)
    ] = None
    flip: Annotated[
        bool, typer.Option("--flip", help="Also average over a horizontal flip.", rich_help_panel=VIEWS)
    ] = False
    merge: Annotated[
        str | None,
        typer.Option(
            help='Merge "features" of views, or "logits" as the field\'s evaluators do.',
            show_default="features",
            rich_help_panel=VIEWS,
        ),
    ] = None
    refine: RefineOption = None
    text_step: TextStepOption = None

    def views(self) -> "Views":
        """Return the views. Raises InputError for impossible values; warns if --merge has no effect."""
        from open_gem.images.pixels import check_size_rule
        from open_gem.images.views import Views

        if self.image_size is not None:
            check_size_rule(self.image_size)
        scales = parse_numbers("scales", self.scales or "1")
        views = Views(self.window, self.stride, scales, self.flip, self.merge or "features")
        if self.merge is not None and views.sees_whole:
            say("warning: --merge has no effect without --window, --scales or --flip")
        return views

    def refinement(self) -> "Refinement | None":
        """Return the refinement, if any. Raises InputError for an unknown name."""
        return parse_refinement(self.refine)

    def step_on_text(self) -> "TextStep | None":
        """Return the step on text, if any. Raises MethodError for an unknown name."""
        from open_gem.method.text_steps import find_text_step

        return None if self.text_step is None else find_text_step(self.text_step)


@dataclass(frozen=True)
class ClassOptions:
    """What to look for: prompts or a class file."""

    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="A label that is its own prompt, or @FILE with one a line (repeatable).",
            show_default=False,
            rich_help_panel=PROMPTS,
        ),
    ] = None
    like: Annotated[
        list[str] | None,
        typer.Option(
            "--like",
            metavar="[LABEL=]FILE[:X,Y,X,Y]",
            help="Whatever looks like an image, or like what its box shows (left, top, right, bottom in pixels); "
            "repeatable.",
            show_default=False,
            rich_help_panel=PROMPTS,
        ),
    ] = None
    classes: Annotated[
        Path | None,
        typer.Option(
            "--classes",
            "-c",
            help="A class file: YAML or JSON with prompts and thresholds, or one class a line with its synonyms, "
            "comma-separated.",
            rich_help_panel=PROMPTS,
        ),
    ] = None
    first_is_background: Annotated[
        bool,
        typer.Option(
            "--first-is-background", help="The class file's first line is the background.", rich_help_panel=PROMPTS
        ),
    ] = False
    template: TemplateOption = None

    def prompts(self) -> "list[str] | dict[str, list[Prompt]]":
        """Return the prompts on the command line, with the lines of files; by label if there are exemplars. Raises
        PromptError, and InputError if there is a class file too."""
        prompts = read_prompts("-p", self.prompt or [])
        if self.classes is not None and prompts:
            raise InputError("--classes and --prompt given, expected one of them")
        if self.classes is not None and self.like:
            raise InputError("--classes and --like given, expected one of them: a class file may name exemplars too")
        if self.classes is None and self.first_is_background:
            raise InputError("--first-is-background given without --classes")
        if self.classes is None and not prompts and not self.like:
            raise PromptError("no prompt given, expected --prompt, --like or --classes")
        if not self.like:
            return prompts
        by_label: dict[str, list[Prompt]] = {prompt: [prompt] for prompt in prompts}
        for label, exemplar in map(read_exemplar, self.like):
            by_label.setdefault(label or exemplar.name, []).append(exemplar)
        return by_label

    def read(self, **thresholds: float | None) -> "Ontology":
        """Return labels, prompts and thresholds; `thresholds` apply to labels without their own. Raises PromptError and
        InputError."""
        from open_gem.label.ontology import Ontology

        prompts = self.prompts()
        if self.classes is None:
            return Ontology.of(prompts, **thresholds)
        return Ontology.read(self.classes, self.first_is_background, **thresholds)

    def vocabulary(self) -> "Vocabulary":
        """Return labels and prompts without thresholds; labels may repeat. Raises PromptError and InputError; warns of
        thresholds in a class file."""
        from open_gem.label.ontology import DEFAULTS, FILES
        from open_gem.text import Vocabulary

        prompts = self.prompts()
        if self.classes is None:
            return Vocabulary.of(prompts)
        if self.classes.suffix.lower() not in FILES:  # has no thresholds, and may name a label's prompt as background
            return Vocabulary.read(self.classes, self.first_is_background)
        classes = self.read()
        if any(set(getattr(classes, name)) != {default} for name, default in DEFAULTS.items()):
            say(f"warning: the thresholds in {str(self.classes)!r} are for open-gem label only")
        return classes.vocabulary


def read_exemplar(text: str) -> "tuple[str, Exemplar]":
    """Read the exemplar "[LABEL=]FILE[:X,Y,X,Y]" and its label, which may be empty. Raises PromptError."""
    from open_gem.text import Exemplar

    parts = text.split("=")
    ways = [("=".join(parts[:at]), "=".join(parts[at:])) for at in range(len(parts))]  # "=" may be in the label or file
    is_file = (way for way in ways if any(Path(path).is_file() for path in (way[1], way[1].rpartition(":")[0])))
    label, file = next(is_file, ways[-1])
    path, _, numbers = file.rpartition(":")
    if not path or Path(file).is_file():  # the colon, if any, is the file name's own
        return label, Exemplar.read(file)
    try:
        box = tuple(map(float, numbers.split(",")))
    except ValueError:
        raise PromptError(f"--like {text!r}: {numbers!r} is no box, expected left,top,right,bottom in pixels") from None
    return label, Exemplar.read(path, box)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class DataOptions:
    """Which images of a data set are measured, and how."""

    data_root: Annotated[Path | None, typer.Option(help="The folder that holds its files; scenes need none.")] = None
    split: Annotated[str | None, typer.Option(help="A split of the data set.", show_default="the usual one")] = None
    protocol: Annotated[str, typer.Option(help="Evaluation protocol: paper, official or field.")] = "paper"
    limit: Annotated[int | None, typer.Option(min=1, help="The first images only.")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one shape at a time.")] = 8
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode images ahead of the model.")] = 2

    @property
    def loop(self) -> dict[str, int]:
        """Return the settings of `evaluation.run.measure`."""
        return {"batch_size": self.batch_size, "workers": self.workers}
