"""Files of results: names that never collide, contents written whole or not at all."""

from pathlib import Path
from typing import BinaryIO

import pytest

from open_gem import save
from open_gem.errors import OutputError
from open_gem.files import write_file


def test_slugs_are_short_plain_and_distinct():
    phrases = ["cat 3", "cat", "cat", "CAT!", "", "😀", "猫", "a" * 300, "a" * 301, "é/è"]
    made = save.slugs(phrases)
    assert made[:4] == ["cat-3", "cat", "cat-3-3", "cat-4"]
    assert len(set(made)) == len(phrases)
    assert max(map(len, made)) <= save.SLUG + 5
    assert made[-1] == "e-e"
    assert len(set(save.slugs(["x"] * 5000))) == 5000


def test_stems_are_distinct_where_case_does_not_count_and_never_too_long():
    assert save.stems(["a/x.png", "b/X.jpg", "x.tar.gz"]) == ["x", "X-2", "x.tar"]
    assert len(save.stems(["猫" * 80 + ".png"])[0].encode()) <= save.STEM


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
