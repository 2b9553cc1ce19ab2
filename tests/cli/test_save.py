"""Files of results: names that never collide, contents written whole or not at all, JSON that every reader takes."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import open_gem
from open_gem import files
from open_gem.cli import save
from open_gem.cli.app import print_json
from open_gem.errors import OutputError
from open_gem.files import digest, to_json, whole_folder, write_file


def test_slugs_are_short_plain_and_distinct():
    phrases = ["cat 3", "cat", "cat", "CAT!", "", "😀", "猫", "a" * 300, "a" * 301, "é/è"]
    made = save.slugs(phrases)
    assert made[:4] == ["cat-3", "cat", "cat-3-3", "cat-4"]
    assert len(set(made)) == len(phrases)
    assert max(map(len, made)) <= save.MAX_SLUG + 5
    assert made[-1] == "e-e"
    assert len(set(save.slugs(["x"] * 5000))) == 5000


def test_stems_are_distinct_where_case_does_not_count_and_never_too_long():
    assert save.base_names(["a/x.png", "b/X.jpg", "x.tar.gz"]) == ["x", "X-2", "x.tar"]
    assert len(save.base_names(["猫" * 80 + ".png"])[0].encode()) <= save.MAX_BASE_NAME


def test_write_file_replaces_and_reports(tmp_path: Path):
    path = tmp_path / "deep" / "file"
    for content in (b"first", b"second"):

        def write(file: BinaryIO, content: bytes = content) -> None:
            file.write(content)

        write_file(path, write)
        assert path.read_bytes() == content
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match=r"cannot write '.*taken'"):
        write_file(tmp_path / "taken", b"")
    assert {file.name for file in tmp_path.iterdir()} == {"deep", "taken"}
    assert {file.name for file in (tmp_path / "deep").iterdir()} == {"file"}


# What killed processes leave ------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from open_gem.files import whole_folder, write_file

def hang(file):
    file.write(b"half")
    file.flush()
    print("at work", flush=True)
    time.sleep(600)

place = Path(sys.argv[2])
if sys.argv[1] == "file":
    write_file(place, hang)
else:
    with whole_folder(place) as new, (new / "half").open("wb") as file:
        hang(file)
"""


def write(kind: str, path: Path) -> None:
    if kind == "file":
        write_file(path, b"whole")
    else:
        with whole_folder(path) as new:
            (new / "whole").touch()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_stays(tmp_path, kind):
    with subprocess.Popen([sys.executable, "-c", WRITER, kind, tmp_path / "a"], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout and child.stdout.readline() == b"at work\n"
            [temporary] = tmp_path.iterdir()
            write("folder", tmp_path / "b")
            assert sorted(tmp_path.iterdir()) == sorted([temporary, tmp_path / "b"])
        finally:
            child.kill()
    write("folder", tmp_path / "c")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "b", tmp_path / "c"]


def leftover(folder: Path, name: str, age: float = 0) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "half").touch()
    then = time.time() - age
    for one in (path / "half", path):
        os.utime(one, (then, then))
    return path


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_are_removed_by_any_writer_and_nothing_else_is(tmp_path, kind):
    ours = [leftover(tmp_path, f".coco-{'0' * 32}.tmp"), tmp_path / f".{'1' * 32}.tmp"]
    ours[1].touch()
    others = [leftover(tmp_path, name) for name in (".tmp", ".notes.tmp", f"{'2' * 32}.tmp", f".{'3' * 32}.tmp.txt")]
    write(kind, tmp_path / "a")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "a"])


def test_what_another_machine_writes_is_left_over_after_a_day(tmp_path):
    young, old = (leftover(tmp_path, f".coco-{'f' * 8}-{c * 32}.tmp", age) for c, age in (("0", 80_000), ("1", 90_000)))
    used = leftover(tmp_path, f".coco-{'f' * 8}-{'2' * 32}.tmp", 90_000)
    (used / "half").touch()
    write("folder", tmp_path / "a")
    assert sorted(tmp_path.iterdir()) == sorted([young, used, tmp_path / "a"])
    assert not old.exists()


def test_without_locks_a_day_has_to_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    young, old = (leftover(tmp_path, f".coco-{c * 32}.tmp", age) for c, age in (("0", 80_000), ("1", 90_000)))
    write("folder", tmp_path / "a")
    assert sorted(tmp_path.iterdir()) == [young, tmp_path / "a"]
    assert not old.exists()


def test_a_long_name_has_room_for_its_temporary(tmp_path):
    write_file(tmp_path / ("ü" * 127), b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


# JSON -----------------------------------------------------------------------------------------------------------------

ODD = {"nan": float("nan"), "in": [(1.5, float("inf")), {"deep": -float("inf")}], "text": "NaN é \udcff"}


def strict(text: str | bytes) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("indent", [None, 1])
def test_json_has_null_for_numbers_that_are_not_finite(indent):
    expected = {"nan": None, "in": [[1.5, None], {"deep": None}], "text": "NaN é \udcff"}
    assert strict(to_json(ODD, indent=indent).encode()) == expected
    assert strict(to_json(ODD, ascii=True, indent=indent).encode("ascii")) == expected
    fine = {"b": [1, 0.1, "é"], "a": None}
    assert to_json(fine) == '{"b": [1, 0.1, "é"], "a": null}'
    assert digest(fine) == digest(dict(reversed(fine.items()))) == "6ae551c56e54"


def test_a_printed_document_is_json_whatever_the_terminal_can_write(capsys):
    print_json(ODD)
    printed = capsys.readouterr().out
    assert printed.isascii() and strict(printed)["nan"] is None


def json_calls(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "json"]
    return [name for name in names if name in ("dump", "dumps")]


def test_all_json_is_made_in_one_place():
    source = Path(open_gem.__file__).parent
    makers = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if json_calls(path)}
    assert makers == {"files.py", "bench/published.py"}  # which runs without this package, and writes two numbers
