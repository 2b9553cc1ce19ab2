"""Zips and gzip tars are read in place, whatever somebody has put into them."""

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_gem.errors import ImageError, InputError
from open_gem.label.archives import Gunzipped
from open_gem.label.done import WHOLE, HashedIdSet, Tally
from open_gem.label.local import pending
from open_gem.label.paths import PassedOver
from open_gem.label.reading import Item, read
from open_gem.label.sources import open_source

MIB = 2**20


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (shade, 0, 0)).save(file, format="PNG")
    return file.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def listed(path: Path | str) -> list[Item]:
    return list(open_source(str(path)).items())


WRITERS = {"a.zip": write_zip, "a.tar.gz": write_tar, "a.TGZ": write_tar}
each_kind = pytest.mark.parametrize("name", WRITERS)
MEMBERS = {f"{folder}/{number}.png": png(number) for folder in "ab" for number in range(20)}


# What is in them ------------------------------------------------------------------------------------------------------


@each_kind
def test_members_are_images_with_their_paths_as_ids(name, tmp_path):
    items = listed(WRITERS[name](tmp_path / name, MEMBERS))
    assert [item.id for item in items] == [f"{name}/{member}" for member in MEMBERS]
    assert [read(item) for item in items] == list(MEMBERS.values())
    assert [read(item) for item in reversed(items)] == list(reversed(MEMBERS.values()))
    assert [read(Item(item.id, item.source)) for item in items] == list(MEMBERS.values()), "by their addresses alone"


@each_kind
def test_several_archives_by_a_pattern_and_by_threads(name, tmp_path):
    for shard in range(3):
        WRITERS[name](tmp_path / f"{shard}-{name}", MEMBERS)
    items = listed(f"{tmp_path}/*-{name}")
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, items)) == 3 * list(MEMBERS.values())


@each_kind
def test_a_run_that_resumes_takes_the_images_that_are_left(name, tmp_path):
    source = open_source(str(WRITERS[name](tmp_path / name, MEMBERS)))
    done = HashedIdSet()
    for item in list(source.items())[:30]:
        done.add(item.id)
    left = list(pending(source.items(), done, WHOLE, Tally()))
    assert [read(item) for item in left] == list(MEMBERS.values())[30:]


@each_kind
def test_another_archive_of_the_same_name_is_opened_again(name, tmp_path):
    [item] = listed(WRITERS[name](tmp_path / name, {"x.png": png(1)}))
    assert read(item) == png(1)
    path = WRITERS[name](tmp_path / name, {"x.png": png(2)})
    os.utime(path, (1, 1))
    [item] = listed(path)
    assert read(item) == png(2)


def test_what_is_no_image_in_a_zip_is_counted(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"x.png": png(0), "__MACOSX/._x.png": b"", "in.zip": b"", "a.json": b"{}"})
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "x.png")
        archive.mkdir("folder.png")
    passed_over = PassedOver()
    assert [item.id for item in open_source(str(path)).items(passed_over)] == ["a.zip/x.png"]
    assert passed_over == {"hidden": 1, ".zip": 1, ".json": 1, "symbolic links in zips": 1}


def test_links_in_a_gzip_tar_are_the_files_they_lead_to(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for name, target in (("early.png", "x.png"), ("out.png", "/etc/passwd")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        info = tarfile.TarInfo("x.png")
        info.size = len(png(5))
        tar.addfile(info, io.BytesIO(png(5)))
    passed_over = PassedOver()
    items = list(open_source(str(tmp_path / "a.tgz")).items(passed_over))
    assert [(item.id, read(item)) for item in items] == [("a.tgz/x.png", png(5)), ("a.tgz/early.png", png(5))]
    assert passed_over == {"symbolic links to what is not in the tar": 1}


def test_a_remote_zip(tmp_path):
    import fsspec

    content = write_zip(tmp_path / "a.zip", MEMBERS).read_bytes()
    fsspec.filesystem("memory").pipe("/bucket/a.zip", content)
    items = listed("memory://bucket/a.zip")
    assert [read(item) for item in items] == list(MEMBERS.values())
    with pytest.raises(InputError, match=r"is compressed, .*: unpack it"):
        open_source("memory://bucket/a.tar.gz")


# What is wrong with them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WRITERS, "a.tar"])
def test_names_that_lead_out_of_the_archive_are_errors(name, tmp_path):
    members = {"../up.png": png(1), "a/../../b.png": png(2), "/etc/c.png": png(3), "a/../d.png": png(4)}
    write = WRITERS.get(name, lambda path, members: write_tar(path, members, "w"))
    items = listed(write(tmp_path / name, members))
    assert [(item.id.removeprefix(f"{name}/"), item.error) for item in items] == [
        ("../up.png", "its name leads out of the archive"),
        ("a/../../b.png", "its name leads out of the archive"),
        ("etc/c.png", None),
        ("a/../d.png", None),
    ]
    assert [read(item) for item in items[2:]] == [png(3), png(4)]
    with pytest.raises(ImageError, match="leads out of the archive"):
        read(items[0])


@each_kind
def test_an_archive_that_is_broken_off_is_a_row_with_the_reason(name, tmp_path):
    path = WRITERS[name](tmp_path / name, {"x.png": np.random.default_rng(0).bytes(100_000), "y.png": png(1)})
    path.write_bytes(path.read_bytes()[:50_000])
    *_, last = listed(path)
    assert last.id == name and str(last.error).startswith("cannot be read to its end: ")
    path.write_bytes(b"")
    [item] = listed(path)
    assert str(item.error).startswith("cannot be read to its end: ")


def patched(path: Path, *, local: int, central: int, value: bytes) -> Path:
    """A zip of one member with other bytes at these places of its two headers."""
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\1\2")
    content[local : local + len(value)] = value
    content[start + central : start + central + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"local": 6, "central": 8, "value": b"\1\0"}, "is encrypted: unpack the archive"),
        ({"local": 8, "central": 10, "value": b"\x09\0"}, "compression"),
        ({"local": 14, "central": 16, "value": b"\0\0\0\0"}, "Bad CRC-32"),
    ],
    ids=["encrypted", "unknown compression", "damaged"],
)
def test_a_member_that_cannot_be_read_is_a_row_with_the_reason(change, reason, tmp_path):
    [item] = listed(patched(write_zip(tmp_path / "a.zip", {"x.png": png(1)}), **change))
    with pytest.raises(ImageError, match=reason):
        read(item)


def peak_of(work) -> int:
    """The most bytes that were in use while it worked."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_zip_bomb_is_refused_without_being_expanded(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"bomb.png": bytes(100 * MIB), "x.png": png(1)})
    bomb, image = listed(path)
    assert "expands to more than 100 times its size" in str(bomb.error)
    assert read(image) == png(1)

    def again() -> None:
        with pytest.raises(ImageError, match="expands to more than 100 times"):
            read(Item("x", bomb.source))

    assert peak_of(again) < 10 * MIB


def test_a_zip_that_lies_about_its_size_is_not_expanded(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"bomb.png": bytes(100 * MIB)})
    [item] = listed(patched(path, local=22, central=24, value=struct.pack("<I", 1000)))

    def refused() -> None:
        with pytest.raises(ImageError, match="Bad CRC-32"):
            read(item)

    assert peak_of(refused) < 10 * MIB


@pytest.mark.parametrize("header", [False, True], ids=["content", "header"])
def test_a_gzip_bomb_ends_the_archive_with_a_reason(header, tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("first.png"))
        info = tarfile.TarInfo("bomb.png")
        if header:
            info.pax_headers = {"comment": "x" * 20 * MIB}
        else:
            info.size = 90 * MIB
        tar.addfile(info, io.BytesIO(bytes(info.size)))
        tar.addfile(tarfile.TarInfo("last.png"))
    seen: list[Item] = []
    assert peak_of(lambda: seen.extend(listed(tmp_path / "a.tgz"))) < 30 * MIB
    assert next(item.id for item in seen if not item.error) == "a.tgz/first.png"
    assert "a.tgz/last.png" not in [item.id for item in seen]
    assert seen[-1].error is not None and "expected" in seen[-1].error


# The content of a gzip file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 2 * MIB, 100 * MIB])
def test_any_part_of_a_gzip_file_is_its_content(window):
    random = np.random.default_rng(0)
    content = np.repeat(random.integers(0, 255, MIB, dtype=np.uint8), 5).tobytes()
    file = Gunzipped(io.BytesIO(gzip.compress(content, 1)), window)
    for offset in [0, len(content) - 5, *random.integers(0, len(content), 20).tolist()]:
        for size in (0, 1, 1000, 3 * MIB):
            assert file.part(offset, size) == content[offset : offset + size]
