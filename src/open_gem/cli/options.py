"""Options that several commands share: a dataclass each, whose fields are the options.

    @app.command()
    @with_options
    def ground(images: …, model: ModelOptions, views: ViewOptions, *, quiet: …) -> None:

The command gets the dataclasses; the command line has their fields. A new shared option is a field here.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from open_gem.images.views import Views
    from open_gem.localizer import Localizer
    from open_gem.locate import AnyLocalizer
    from open_gem.method.table import Method
    from open_gem.refine import Refinement

PROMPTS, VIEWS, METHOD = "Prompts", "Views", "Method"  # panels of the help

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No table and no progress.")]


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with each parameter that is a dataclass replaced by the fields of that dataclass."""
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    groups = {name: hints[name] for name in signature.parameters if is_dataclass(hints[name])}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        kinds = get_type_hints(groups[name], include_extras=True)
        for one in fields(groups[name]):
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(one.name, keyword, default=one.default, annotation=kinds[one.name]))
    parameters.sort(key=lambda parameter: parameter.kind)

    @wraps(command)
    def grouped(**given: Any) -> Any:
        made = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        return command(**given, **made)

    del grouped.__wrapped__  # its signature is the one below
    grouped.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    grouped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return grouped


@dataclass(frozen=True)
class ModelOptions:
    """Which model, on what device and in what precision."""

    model: Annotated[
        str,
        typer.Option(
            help='"embedded", a name of `open-gem models`, "org/repo" of transformers, "hf-hub:org/repo", a folder.'
        ),
    ] = "embedded"
    pretrained: Annotated[
        str | None, typer.Option(help="The tag of open_clip weights, or a file of weights for this architecture.")
    ] = None
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", "mps" …')] = "auto"
    dtype: Annotated[str, typer.Option(help="What to compute in: float32, bfloat16 or float16.")] = "float32"

    def load(self, *, may_be_trained: bool = False, **settings: Any) -> "AnyLocalizer":
        """The localizer, with the `settings` that are not None; one that was trained to localize only if it may be."""
        if may_be_trained and self.is_trained():
            from open_gem.trained.localizer import load_trained

            return load_trained(self.model, device=self.device, dtype=self.dtype, **settings)
        return self.load_localizer(**settings)

    def load_localizer(self, **settings: Any) -> "Localizer":
        """A localizer without training, with the `settings` that are not None."""
        from open_gem import towers
        from open_gem.localizer import Localizer

        backbone = towers.load(self.model, self.pretrained, device=self.device, dtype=self.dtype)
        return Localizer(backbone, **{name: value for name, value in settings.items() if value is not None})

    def is_trained(self) -> bool:
        """True if the name is one of a model that was trained to localize."""
        from open_gem.trained.registry import is_trained

        return self.pretrained is None and is_trained(self.model)


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
        typer.Option(help='Steps after the attention, comma-separated: "scga".', rich_help_panel=METHOD),
    ] = None

    def given(self) -> dict[str, Any]:
        """Those that were given, as settings of a `Method`."""
        from open_gem.method.steps import find_step

        settings = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) is not None}
        if self.steps is not None:
            settings["steps"] = tuple(find_step(name.strip()) for name in self.steps.split(","))
        return settings

    def tune(self, name: str, method: "Method") -> "Method":
        """The method called `name` with these settings. Raises MethodError for one it does not have."""
        from open_gem.errors import MethodError

        settings = self.given()
        if unknown := sorted(settings.keys() - set(method.settings)):
            options = " and ".join(f"--{option.replace('_', '-')}" for option in unknown)
            raise MethodError(f"{options} has no effect with method {name!r}: leave it out")
        return method.replace(**settings)


@dataclass(frozen=True)
class ViewOptions:
    """How an image is looked at, and refined."""

    image_size: Annotated[
        str | None,
        typer.Option(
            help='"short:448", "long:N", "square:N" or "native".',
            show_default="the model's recommendation",
            rich_help_panel=VIEWS,
        ),
    ] = None
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
    refine: Annotated[
        str | None,
        typer.Option(help='Make maps follow the edges of the image: "pamr".', rich_help_panel=VIEWS),
    ] = None

    def views(self) -> "Views":
        """Raises InputError for values that make no sense."""
        from open_gem.cli.app import numbers_of
        from open_gem.images.pixels import check_size_rule
        from open_gem.images.views import Views

        if self.image_size is not None:
            check_size_rule(self.image_size)
        scales = numbers_of("scales", self.scales or "1")
        return Views(self.window, self.stride, scales, self.flip, self.merge or "features")

    def refinement(self) -> "Refinement | None":
        """Raises InputError for an unknown name."""
        from open_gem.refine import find_refinement

        return None if self.refine is None else find_refinement(self.refine)


@dataclass(frozen=True)
class ClassOptions:
    """What to look for."""

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
    classes: Annotated[
        Path | None,
        typer.Option(
            "--classes",
            "-c",
            help="A class file: YAML or JSON with prompts and thresholds, or one class a line, its synonyms after commas.",
            rich_help_panel=PROMPTS,
        ),
    ] = None
    first_is_background: Annotated[
        bool,
        typer.Option(
            "--first-is-background",
            help="The class file's first line is the background.",
            rich_help_panel=PROMPTS,
        ),
    ] = False
    template: Annotated[
        str | None,
        typer.Option(
            help='What a prompt is put into: "a picture of a {}", or the name of an ensemble such as "imagenet-80".',
            rich_help_panel=PROMPTS,
        ),
    ] = None
