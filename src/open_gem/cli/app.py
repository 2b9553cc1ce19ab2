"""What commands share: the application, one line for each error, JSON, tables and progress. Options: `options`."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import open_gem
from open_gem.errors import OpenGemError
from open_gem.files import to_json

# Errors and warnings --------------------------------------------------------------------------------------------------


class CommandGroup(TyperGroup):
    """Commands that print each expected error and each warning as one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        with warnings_as_lines():
            try:
                return super().invoke(ctx)
            except OpenGemError as error:
                say(f"error: {error}")
                raise typer.Exit(2) from error


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings as one line each on stderr."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)  # warnings for users; those for developers are left as they are
        warnings.showwarning = show
        yield


@contextmanager
def resumable() -> Iterator[None]:
    """Turn Ctrl-C into one line and exit code 130, for commands that keep finished work."""
    try:
        yield
    except KeyboardInterrupt as error:
        say("interrupted: results so far are kept; rerun the same command to resume")
        raise typer.Exit(130) from error


def say(message: str) -> None:
    """Print one line on stderr."""
    print(" ".join(message.splitlines()), file=sys.stderr)  # typer.echo would write across a progress bar


def print_json(document: Any) -> None:
    """Print a document as one line on stdout; in ASCII, so that the stream's encoding cannot break it."""
    print(to_json(document, ascii=True), flush=True)


def counted(count: int, what: str) -> str:
    """Return "1 image" or "2 images"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},  # commands inherit it
)


def main() -> None:
    """Run `open-gem`."""
    for stream in (sys.stdout, sys.stderr):  # escape letters that the terminal cannot write, instead of failing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    app()


def print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"open-gem {open_gem.__version__}")
        raise typer.Exit


@app.callback()
def open_gem_command(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Locate what prompts describe in images, with pretrained vision-language models and no training."""


# Tables and progress --------------------------------------------------------------------------------------------------


def new_console(to_stderr: bool = False) -> Console:
    """Return a console on stdout or stderr. It does not wrap lines unless it is a terminal."""
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal:
        console.width = 240  # do not wrap tables in a file or pipe
    return console


def new_table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table."""
    table = Table(title=Text(title) if title else None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def comma_separated(numbers: Sequence[int] | None) -> str:
    """Return "1, 2", or "none"."""
    return "none" if numbers is None else ", ".join(map(str, numbers))


class SpeedColumn(progress.ProgressColumn):
    """Images per second."""

    def render(self, task: progress.Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "")


@contextmanager
def progress_bar(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr if there are several images and stderr is a terminal; yield the function that
    advances it."""
    console = Console(stderr=True)
    if quiet or total < 2 or not console.is_terminal:
        yield lambda images: None
        return
    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), SpeedColumn(), progress.TimeRemainingColumn())
    # Stdout passes through the bar only if both share a terminal: otherwise it would end up on stderr.
    with progress.Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda images: bar.advance(task, images)
