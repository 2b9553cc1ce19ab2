"""Names say what things are, and docstrings of functions say what these do."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import open_gem

SOURCE = Path(open_gem.__file__).parent
BANNED = frozenset(
    re.findall(
        r"\w+",
        "anew found given house obstacle one phrase phrases picture pictures room rooms some speck specks stem stems "
        "there told twice wide",
    )
)
FRAGMENT = re.compile(
    r"(A|An|As|By|For|From|How|In|Its|Like|Of|That|The|There|Those|What|When|Where|Whether|Which|Why)\b"
)


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text("utf-8"))


def bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield each name that the code itself chooses, with its line; names of libraries do not count."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield node.lineno, name


def banned_in(name: str) -> frozenset[str]:
    return BANNED & set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))


def test_names_say_what_things_are():
    assert banned_in("_pool_of_one") == banned_in("OneThing") == {"one"} and not banned_in("everyone")
    files = [path.as_posix() for path in SOURCE.rglob("*.py") if banned_in(path.stem)]
    names = [f"{file}:{line} {name}" for file, tree in trees() for line, name in bound_names(tree) if banned_in(name)]
    assert not files + names, "rename each to what it is"


def fragments(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and name of each function, no property, whose docstring does not start with a verb."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_property = any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)
            if not is_property and FRAGMENT.match(ast.get_docstring(node) or ""):
                yield node.lineno, node.name


def test_docstrings_of_functions_start_with_a_verb():
    assert list(fragments(ast.parse('def f():\n    """Whether it is."""'))) == [(1, "f")]
    unclear = [f"{file}:{line} {name}" for file, tree in trees() for line, name in fragments(tree)]
    assert not unclear, 'write "Return …", "Yield …", "Raise …" or what else the function does'
