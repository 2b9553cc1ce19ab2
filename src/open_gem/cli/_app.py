"""What the commands share: one line an error, options, how models are asked for, tables and progress."""

import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import open_gem
from open_gem.errors import InputError, MethodError, OpenGemError
from open_gem.files import to_json

if TYPE_CHECKING:
    from open_gem.localizer import Localizer
    from open_gem.method.table import Method
    from open_gem.trained.localizer import TrainedLocalizer

Number = TypeVar("Number", int, float)

# Errors and warnings --------------------------------------------------------------------------------------------------


class Group(TyperGroup):
    """Commands whose foreseen errors and warnings are one line each on stderr."""

    def invoke(self, ctx: Any) -> Any:
        with warnings_as_lines():
            try:
                return super().invoke(ctx)
            except OpenGemError as error:
                say(f"error: {error}")
                raise typer.Exit(2) from error


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)  # those for people; those for developers stay as they were
        warnings.showwarning = show
        yield


@contextmanager
def going_on() -> Iterator[None]:
    """Ctrl-C inside is one line and exit code 130: for commands that keep what they have done."""
    try:
        yield
    except KeyboardInterrupt as error:
        say("interrupted: what was measured is kept, and the same command goes on from there")
        raise typer.Exit(130) from error


def say(message: str) -> None:
    """One line on stderr."""
    print(" ".join(message.splitlines()), file=sys.stderr)  # print, for typer.echo would write across a progress bar


def print_json(document: Any) -> None:
    """A document on stdout, one line; in ASCII, so that it is JSON whatever the encoding of the stream."""
    print(to_json(document, ascii=True), flush=True)


def warn_of_commas(option: str, phrases: Iterable[str]) -> None:
    """One warning where a phrase looks like several separated by commas, with how to give several."""
    for phrase in phrases:
        parts = [part.strip() for part in phrase.split(",") if part.strip()]
        if len(parts) > 1:
            several = " ".join(f"{option} {shlex.quote(part)}" for part in parts)
            say(f"warning: {phrase!r} is one phrase, comma included; for {len(parts)} phrases: {several}")
            return


def counted(count: int, what: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},  # commands have it from here
)


def main() -> None:
    """The entry point `open-gem`."""
    for stream in (sys.stdout, sys.stderr):  # a phrase in a script that the terminal cannot write is no reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    app()


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"open-gem {open_gem.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find where things are in pictures, by phrases, with pretrained vision-language models and no training."""


# Options that several commands have -----------------------------------------------------------------------------------

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help='"embedded", a name of `open-gem models`, "org/repo" of transformers, "hf-hub:org/repo", a folder.',
    ),
]
PretrainedOption = Annotated[
    str | None,
    typer.Option("--pretrained", help="The weights' tag, or a file of weights for this architecture."),
]
DeviceOption = Annotated[str, typer.Option("--device", help='"auto", "cpu", "cuda", "cuda:1", "mps" …')]
DtypeOption = Annotated[str, typer.Option("--dtype", help="What to compute in: float32, bfloat16 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


# Models that are asked for --------------------------------------------------------------------------------------------


def load_localizer(
    model: str,
    pretrained: str | None,
    device: str,
    dtype: str,
    method: str = "clip",
    **settings: Any,
) -> "Localizer":
    """The localizer that was asked for, with the `settings` that are not None. Most commands name methods when they
    ask: `method`, which any model has, is only of what is asked without one."""
    from open_gem import towers
    from open_gem.localizer import Localizer

    backbone = towers.load(model, pretrained, device=device, dtype=dtype)
    return Localizer(backbone, method, **{name: value for name, value in settings.items() if value is not None})


def load_any(model: str, pretrained: str | None, device: str, dtype: str) -> "Localizer | TrainedLocalizer":
    """The same, or a model that was trained to localize, by what its name says."""
    from open_gem.trained.localizer import load_trained
    from open_gem.trained.registry import is_trained

    if pretrained is None and is_trained(model):
        return load_trained(model, device=device, dtype=dtype)
    return load_localizer(model, pretrained, device, dtype)


def tuned(name: str, method: "Method", **settings: Any) -> "Method":
    """The method called `name` with the settings that are not None. Raises MethodError for one it has no use for."""
    given = {name: value for name, value in settings.items() if value is not None}
    if without_effect := sorted(given.keys() & (method.ignored | ({"depth"} if method.is_host else set()))):
        raise MethodError(f"{' and '.join(without_effect)} given, of which method {name!r} has no use")
    return replace(method, **given)


def names_of(methods: str) -> list[str]:
    """The names in a list by commas, or all there are. Raises MethodError for an unknown one."""
    from open_gem.method.table import METHODS, check_name

    asked = [name.strip() for name in methods.split(",")]
    names = [name for one in asked for name in (METHODS if one == "all" else [check_name(one)])]
    return list(dict.fromkeys(names))


def numbers_of(option: str, given: str, kind: Callable[[str], Number] = float) -> tuple[Number, ...]:
    """The numbers in a list by commas. Raises InputError for what is none."""
    try:
        return tuple(kind(number) for number in given.split(","))
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} is {given!r}, expected {what} by commas such as 1,3") from error


def settings_of(
    localizer: "Localizer | TrainedLocalizer", methods: "Mapping[str, Method]"
) -> dict[str, dict[str, Any]]:
    """Everything that decided the result of each method, for the JSON document; a model without any goes under ""."""
    settings = {"open_gem": open_gem.__version__, **localizer.describe()}
    if "method" not in settings:
        return {"": settings}
    return {name: {**settings, "method": {"name": name, **method.describe()}} for name, method in methods.items()}


# Showing --------------------------------------------------------------------------------------------------------------


def new_console(to_stderr: bool = False) -> Console:
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console.width = 240  # a file or pipe has no edge to wrap at; tables take what they need
    return console


def new_table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=Text(title) if title else None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def numbers(numbers: Sequence[int] | None) -> str:
    return "none" if numbers is None else ", ".join(map(str, numbers))


class Speed(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "")


@contextmanager
def progress_bar(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where there are several images and a person is looking; gives what moves it on."""
    console = Console(stderr=True)
    if quiet or total < 2 or not console.is_terminal:
        yield lambda images: None
        return
    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), Speed(), progress.TimeRemainingColumn())
    # What goes to stdout passes through the bar only where both are one screen: else it would end up on stderr.
    with progress.Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda images: bar.advance(task, images)
