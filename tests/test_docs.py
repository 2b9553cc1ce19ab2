"""What the documentation shows is run: README's Python, and the commands it names exist."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from open_gem import PATHWAYS
from open_gem.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["readouts"]) == len(PATHWAYS) + 2  # as its comment says


def test_readme_commands_exist_with_their_options():
    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    lines = re.findall(r"^open-gem .*$", README, re.MULTILINE)
    assert lines
    for line in lines:
        _, name, *words = shlex.split(line)
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, line


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text("utf-8")):
        assert (document.parent / target).exists(), target
