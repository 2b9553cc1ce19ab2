"""Names say what things are, and docstrings say what functions do."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import open_gem

SOURCE = Path(open_gem.__file__).parent
BANNED = set(
    "anew found given house obstacle one phrase phrases picture pictures room rooms some speck specks stem stems "
    "there told twice wide".split(" ")  # noqa: SIM905 - readable
)


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that the code itself gives: variables, parameters, attributes, functions, classes, aliases."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield getattr(node, "lineno", 0), name


def banned_in(name: str) -> set[str]:
    return BANNED & set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))


def test_names_say_what_things_are():
    assert banned_in("_pool_of_one") == {"one"} and banned_in("OneThing") == {"one"} and not banned_in("everyone")
    named = [f"{path.relative_to(SOURCE)}: {path.stem}" for path in SOURCE.rglob("*.py") if banned_in(path.stem)]
    for path in sorted(SOURCE.rglob("*.py")):
        if "verify" not in path.relative_to(SOURCE).parts:
            tree = ast.parse(path.read_text("utf-8"))
            named += [
                f"{path.relative_to(SOURCE)}:{line}: {name}" for line, name in bound_names(tree) if banned_in(name)
            ]
    assert not named, "rename each to what it is: " + ", ".join(named)


def openings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The first words of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text
