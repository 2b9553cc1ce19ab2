"""The command-line reference, from the help of the commands: `python tools/cli_reference.py` writes it anew."""

from pathlib import Path
from typing import Any

from typer.main import get_command

from open_gem.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
HEAD = """# Command line

Every command explains itself with `--help`; this page is made from that help by `python tools/cli_reference.py`.
Errors are one line on stderr, with exit code 2. Options without a default are optional unless marked required.
"""


def render() -> str:
    """The whole page."""
    root = get_command(app)
    sections = [section for name, command in _commands(root).items() for section in _sections(name, command)]
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


def _commands(group: Any) -> dict[str, Any]:
    return {name: command for name, command in getattr(group, "commands", {}).items() if not command.hidden}


def _sections(name: str, command: Any, level: int = 2) -> list[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    usage = " ".join([f"open-gem {name}", *(f"[{_metavar(argument)}]" for argument in arguments), "[OPTIONS]"])
    lines = [f"{'#' * level} {name}", "", f"```text\n{usage}\n```", "", _prose(command.help or ""), ""]
    rows = [_row(parameter) for parameter in command.params if "--help" not in parameter.opts]
    if rows:
        lines += ["| option | default | |", "|---|---|---|", *rows, ""]
    nested = [
        part for sub, child in _commands(command).items() for part in _sections(f"{name} {sub}", child, level + 1)
    ]
    return ["\n".join(lines), *nested]


def _metavar(argument: Any) -> str:
    return argument.name.upper()


def _row(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = [_metavar(parameter)] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    default = "required" if parameter.required else _default(parameter.default)
    cells = [", ".join(f"`{name}`" for name in names), default, _prose(parameter.help or "").replace("\n", " ")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    return "" if value in (None, False, "", []) or callable(value) else f"`{value}`"


def _prose(text: str) -> str:
    """Help as Markdown: paragraphs rejoined, so that the page does not depend on how the source is wrapped."""
    paragraphs = ["\n".join(line.strip() for line in part.splitlines()) for part in text.strip().split("\n\n")]
    return "\n\n".join(paragraphs).replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(render(), "utf-8")
