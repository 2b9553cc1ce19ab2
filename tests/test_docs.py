"""The documentation keeps its word: what it shows is run, what it names exists, and it reads like English.

Code blocks marked `python` and `sh` are run, page by page, in a folder with a few images. The model in the package
stands in for those whose weights would be downloaded. Blocks marked `py`, `console` and `text` are shown only: they
need weights, a server, a cluster or a data set. What they import and the options they name are checked all the same.
"""

import ast
import importlib
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from open_gem import METHODS, towers
from open_gem.cli import app
from open_gem.data.scenes import scene

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OF_ROOT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
CARD = ROOT / "src" / "open_gem" / "towers" / "embedded" / "README.md"
PAGES = [*(ROOT / name for name in OF_ROOT), CARD, *sorted(DOCS.rglob("*.md"))]
TEXTS = {page: page.read_text("utf-8") for page in PAGES}
COMMANDS = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
CAT, PARTY = 25, 0  # scenes: scissors, a cat, a duck; a birthday cake, a bee, a pineapple, a tractor
CLASSES = "labels:\n  cat: [cat, tabby cat]\n  bee: bee\n  birthday cake:\nbackground: [tree, house]\n"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """The language and text of each."""
    return re.findall(r"```(\w+)\n(.*?)```", TEXTS[page], re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in code_blocks(page) if language in languages]


def commands_in(code: str) -> list[list[str]]:
    """The words of each `open-gem` command."""
    lines = re.findall(r"^(?:[A-Z_]+=\S+ )*(?:torchrun .*--no-python )?(open-gem .*)$", code, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


# What is shown is run -------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with a few images and a class file, and a model that needs no download."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    original = towers.load

    def load(name: Any = None, pretrained: Any = None, **settings: Any):
        return original(name if name and Path(name).is_dir() else towers.EMBEDDED, **settings)

    monkeypatch.setattr(towers, "load", load)
    images = {
        "photo.jpg": CAT,
        "cats.jpg": CAT,
        "party.jpg": PARTY,
        **{f"photos/{seed}.jpg": seed for seed in (CAT, PARTY, 3)},
    }
    for file, seed in images.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.fromarray(scene(seed, (384, 512)).image).save(tmp_path / file, quality=95)
    (tmp_path / "classes.yaml").write_text(CLASSES, "utf-8")
    return tmp_path


SHOWN = [page for page in PAGES if blocks(page, "python", "sh")]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page.name == "README.md" else pytest.mark.slow, id=name_of(page))
        for page in SHOWN
    ],
)
def test_what_is_shown_runs(page, desk):
    names: dict = {"__name__": "docs"}
    for language, code in code_blocks(page):
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the stand-in says that it knows no photographs
                exec(compile(code, name_of(page), "exec"), names)
        for words in commands_in(code) if language == "sh" else ():
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"open-gem {shlex.join(words)}\n{result.output}\n{result.exception}"


# What is named exists -------------------------------------------------------------------------------------------------


@each_page
def test_what_python_imports_of_open_gem_exists(page):
    for block in blocks(page, "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("open_gem"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@each_page
def test_commands_exist_with_their_options(page):
    shown = (commands_in(code) for code in blocks(page, "sh", "console", "text"))
    for name, *words in (words for commands in shown for words in commands):
        command = COMMANDS[name]
        if words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("-")} <= known, f"open-gem {name} {shlex.join(words)}"


def test_the_reference_of_commands_is_their_help(monkeypatch):
    assert tool("cli_reference", monkeypatch).render() == TEXTS[DOCS / "reference" / "cli.md"], (
        "run: python tools/cli_reference.py"
    )


def test_the_drawing_of_the_second_stream_is_that_of_its_script(monkeypatch):
    drawn = (DOCS / "images" / "second-stream.svg").read_text("utf-8")
    assert tool("second_stream", monkeypatch).render() == drawn, "run: python tools/second_stream.py"


def tool(name: str, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_every_method_is_in_the_table_of_methods_with_its_settings():
    rows = re.findall(r"^\| `([a-z_-]+)` \|(.*)\|$", TEXTS[DOCS / "reference" / "methods.md"], re.MULTILINE)
    rows = [(name, row) for name, row in rows if row.count(" | ") == 7]  # steps have fewer columns
    assert [name for name, _ in rows] == list(METHODS)
    for name, row in rows:
        mix, depth, residual, mlp, source, evidence, flops, time = (cell.strip() for cell in row.split(" | "))
        method = METHODS[name]
        expected = {True: "yes", False: "no"}
        assert (depth, residual, mlp) == (str(method.depth), expected[method.residual], expected[method.mlp]), name
        assert mix and source and evidence
        assert float(flops) > 0 and float(time) > 0


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)#]+)", TEXTS[page]):
        assert (page.parent / target).exists(), target


@each_page
def test_tests_that_are_named_exist(page):
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_[a-z0-9_]+)`", TEXTS[page])
    assert [name for name in names if f"def {name}(" not in tests] == []
    files = re.findall(r"`((?:tests|tools|benchmarks|src|examples|training)/[\w./-]+)`", TEXTS[page])
    assert [file for file in files if not (ROOT / file).exists()] == []


# How it reads ---------------------------------------------------------------------------------------------------------

BANNED = {
    "image": r"pictures?",
    "prompt": r"phrases?",
    "method": r"pathways?",
    "region": r"specks?",
    "told, said": r"(?:is|are|was) (?:told|said)",
    "anew, but for, goes on, to be had": r"anew|but for|goes? on with|to be had|cannot be had|were? at hand",
    "capacity, package": r"house|room",
}
"""The field's word → what is not written for it, as whole words outside code."""


def prose(text: str) -> str:
    """The text without code, links' targets and what it quotes."""
    text = re.sub(r"```.*?```|^ {4}.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|[“\"][^”\"]*[”\"]", "", text)


def banned_words(text: str) -> list[str]:
    return [
        match[0] for words in BANNED.values() for match in re.finditer(rf"\b(?:{words})\b", prose(text), re.IGNORECASE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_use_the_words_of_the_field(page):
    assert banned_words(TEXTS[page]) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_uses_the_words_of_the_field(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert banned_words(re.sub(r"\s+", " ", result.output)) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page):
    """At most 120 characters, except rows of tables, code, and lines that are one long link."""
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("|") and "](http" not in line]
    assert [line for line in lines if len(line) > 120] == []
