"""What the documentation shows is run: README's Python, and the commands it names exist."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from open_gem import METHODS
from open_gem.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["readouts"]) == len(METHODS) + 2  # as its comment says


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_python_imports_of_open_gem_exists(document):
    for block in re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("open_gem"):
                module = importlib.import_module(node.module)
                assert [one.name for one in node.names if not hasattr(module, one.name)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist_with_their_options(document):
    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    lines = re.findall(r"^ *(open-gem .*)$", document.read_text("utf-8"), re.MULTILINE)
    assert lines
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        command = commands[name]
        if words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, line


def test_every_method_is_in_the_table_of_methods_with_its_settings():
    rows = re.findall(r"^\| `([a-z_-]+)` \|(.*)\|$", (ROOT / "docs" / "methods.md").read_text("utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == list(METHODS)
    for name, row in rows:
        mix, depth, residual, mlp, source, evidence, flops, time = (cell.strip() for cell in row.split(" | "))
        method = METHODS[name]
        said = {True: "yes", False: "no"}
        assert (depth, residual, mlp) == (str(method.depth), said[method.residual], said[method.mlp]), name
        assert mix and source and evidence
        assert float(flops) > 0 and float(time) > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text("utf-8")):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_are_named_exist(document):
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_[a-z0-9_]+)`", document.read_text("utf-8"))
    assert [name for name in names if f"def {name}(" not in tests] == []
