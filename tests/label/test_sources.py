"""Every kind of source gives the same pictures under ids of its own, and what cannot be read says why."""

import gc
import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from open_gem.errors import ImageError, InputError, OutputError
from open_gem.files import temporary_beside
from open_gem.images.pixels import read_image
from open_gem.label.done import TODO, HashedIdSet, Shard, writing
from open_gem.label.paths import PassedOver, expand
from open_gem.label.reading import absolute, local_file, read
from open_gem.label.sources import KINDS, Columns, Item, open_source

NAMES = ("a.png", "b/c.PNG", "b/ä d.png")


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (shade, 0, 0)).save(file, format="PNG")
    return file.getvalue()


IMAGES = {name: png(40 * index) for index, name in enumerate(NAMES)}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for name, content in IMAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for other in (".hidden.png", "notes.txt", ".cache/x.png"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(b"x")
    return folder


# One a row of KINDS: what makes such a source of the folder, and the ids it then has.


def as_folder(folder: Path) -> tuple[str, list[str]]:
    return str(folder), list(NAMES)


def as_pattern(folder: Path) -> tuple[str, list[str]]:
    return f"{folder}/**/*", list(NAMES)


def as_text(folder: Path) -> tuple[str, list[str]]:
    path = folder.parent / "list.txt"
    given = [f"photos/{name}" for name in NAMES]
    path.write_text("\n".join(["", *given]), "utf-8")
    return str(path), given


def as_csv(folder: Path) -> tuple[str, list[str]]:
    path = folder.parent / "list.csv"
    path.write_text("\n".join(["\ufefflicence,path", *(f'x,"{folder}/{name}"' for name in NAMES)]), "utf-8")
    return str(path), [f"{folder}/{name}" for name in NAMES]


def as_tar(folder: Path) -> tuple[str, list[str]]:
    for shard in range(2):
        with tarfile.open(folder.parent / f"shard-{shard}.tar", "w") as tar:
            for name in NAMES[shard::2]:
                tar.add(folder / name, name)
                tar.add(folder / "notes.txt", f"{name}.txt")
    return f"{folder.parent}/shard-*.tar", [f"shard-{index % 2}.tar/{name}" for index, name in enumerate(NAMES)]


def as_zip(folder: Path) -> tuple[str, list[str]]:
    with zipfile.ZipFile(folder.parent / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("b")
        for name in (*NAMES, ".hidden.png", "notes.txt"):
            archive.write(folder / name, name)
    return f"{folder.parent}/photos.zip", [f"photos.zip/{name}" for name in NAMES]


def as_parquet(folder: Path) -> tuple[str, list[str]]:
    import pyarrow as pa
    from pyarrow import parquet

    path = folder.parent / "rows.parquet"
    pictures = [{"bytes": content, "path": None} for content in IMAGES.values()]
    parquet.write_table(pa.table({"n": [1, 2, 3], "image": pictures}), path, row_group_size=2)
    return str(path), [f"rows.parquet/{row}" for row in range(len(NAMES))]


def as_dataset(folder: Path) -> tuple[str, list[str]]:
    import datasets

    features = datasets.Features({"picture": datasets.Image()})
    rows = [{"picture": {"bytes": content, "path": None}} for content in IMAGES.values()]
    data = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(str(folder.parent / "data"))
    return str(folder.parent / "data"), [f"train/{row}" for row in range(len(NAMES))]


MAKERS = {
    "folder": as_folder,
    "pattern": as_pattern,
    "text": as_text,
    "csv": as_csv,
    "tar": as_tar,
    "zip": as_zip,
    "parquet": as_parquet,
    "dataset": as_dataset,
}


def test_every_kind_is_tested():
    assert set(MAKERS) == set(KINDS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_gives_the_same_images(kind, folder):
    given, ids = MAKERS[kind](folder)
    items = {item.id: item for item in open_source(given).items()}
    assert sorted(items) == sorted(ids)
    for id, content in zip(ids, IMAGES.values(), strict=True):
        assert read_image(read(items[id])).tobytes() == read_image(content).tobytes(), id
    assert sorted(item.id for item in open_source(given).items()) == sorted(ids), "a source can be listed again"


def test_tables_of_paths_with_ids_of_their_own(folder):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"key": [7, 8, 9], "where": [f"photos/{name}" for name in NAMES]})
    parquet.write_table(table, folder.parent / "paths.parquet")
    source = open_source(str(folder.parent / "paths.parquet"), Columns("where", "key"))
    assert [item.id for item in source.items()] == ["7", "8", "9"]
    assert [read_image(read(item)).getpixel((0, 0)) for item in source.items()] == [(0, 0, 0), (40, 0, 0), (80, 0, 0)]


def test_remote_sources(folder):
    import fsspec

    store = fsspec.filesystem("memory")
    for name, content in IMAGES.items():
        store.pipe(f"/bucket/photos/{name}", content)
    items = list(open_source("memory://bucket/photos/").items())
    assert sorted(item.id for item in items) == sorted(NAMES)
    assert all(read(item) == IMAGES[item.id] for item in items)
    as_tar(folder)
    for path in folder.parent.glob("shard-*.tar"):
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    tars = list(open_source("memory://bucket/shard-*.tar").items())
    assert sorted(item.id for item in tars) == [
        f"shard-{i}.tar/{n}" for i, n in ((0, "a.png"), (0, NAMES[2]), (1, NAMES[1]))
    ]
    assert [bytes(read(item)) for item in tars] == [IMAGES[item.id.partition("/")[2]] for item in tars]
    store.pipe("/bucket/rows.parquet", Path(as_parquet(folder)[0]).read_bytes())
    rows = list(open_source("memory://bucket/rows.parquet").items())
    assert [item.id for item in rows] == [f"rows.parquet/{row}" for row in range(3)]
    assert [read(item) for item in rows] == list(IMAGES.values())
    (folder.parent / "urls.txt").write_text("memory://bucket/photos/a.png\n")
    [item] = open_source(str(folder.parent / "urls.txt")).items()
    assert (item.id, read(item)) == ("memory://bucket/photos/a.png", IMAGES["a.png"])


def test_a_remote_file_that_is_too_large_is_not_read_whole(monkeypatch):
    import fsspec

    fsspec.filesystem("memory").pipe("/large.png", b"12345")
    item = Item("x", "memory://large.png")
    monkeypatch.setattr("open_gem.label.remote.MAX_BYTES", 5)
    assert read(item) == b"12345"
    monkeypatch.setattr("open_gem.label.remote.MAX_BYTES", 4)
    with pytest.raises(ImageError, match="has more than 4 bytes, expected an image"):
        read(item)


def test_tables_may_have_tabs(folder):
    (folder.parent / "list.TSV").write_text("key\tpath\n7\tphotos/a.png\n8\tphotos/b,c.png\n")
    items = list(open_source(str(folder.parent / "list.TSV"), Columns(id="key")).items())
    assert [(item.id, item.source) for item in items] == [
        (n, f"{folder}/{p}") for n, p in (("7", "a.png"), ("8", "b,c.png"))
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_data_set_alone_with_ids_and_paths(folder):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "n": datasets.Value("int64")})
    pictures = [{"bytes": None, "path": str(folder / "a.png")}, {"bytes": IMAGES["a.png"], "path": None}, None]
    rows = [{"picture": picture, "n": n} for picture, n in zip(pictures, (7, 8, None), strict=True)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder.parent / "data"))
    given = str(folder.parent / "data")
    first, second, third = open_source(given).items()
    assert [item.id for item in (first, second, third)] == ["0", "1", "2"]
    assert read_image(read(first)).tobytes() == read_image(read(second)).tobytes()
    with pytest.raises(ImageError, match="the row has no image"):
        read(third)
    named = [(item.id, item.error) for item in open_source(given, Columns(id="n")).items()]
    assert named == [("7", None), ("8", None), ("2", "2 has no id")]


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("photos/a.png", "photos/a.png"),
        ("file:///photos/a.png", "/photos/a.png"),
        ("s3://bucket/a.png", None),
        ("tar://a.png::/photos/s.tar", "/photos/s.tar"),
        ("tar://a.png::s3://bucket/s.tar", None),
        ("/photos/rows.parquet#column=image&row=3", "/photos/rows.parquet"),
        ("/photos/data#split=train&column=image&row=3", "/photos/data"),
        ("s3://bucket/rows.parquet#column=image&row=3", None),
    ],
)
def test_the_local_file_of_an_address(address, file):
    assert local_file(address) == file


def test_links_are_followed_but_not_in_circles(folder):
    (folder / "b" / "up").symlink_to(folder)
    (folder / "twin").symlink_to(folder / "b")
    found = sorted(item.id for item in open_source(str(folder)).items())
    assert found == sorted([*NAMES, "twin/c.PNG", "twin/ä d.png"])


def test_names_that_are_not_utf8(folder):
    odd = os.fsencode(folder) + b"/\xff.png"
    with open(odd, "wb") as file:  # noqa: PTH123 - bytes
        file.write(IMAGES["a.png"])
    [item] = [item for item in open_source(str(folder)).items() if item.id not in NAMES]
    assert item.id == "\\udcff.png"
    assert read_image(read(item)).size == (9, 8)


def test_a_broken_tar_is_an_item_and_its_neighbours_are_there(folder):
    given, _ = as_tar(folder)
    (folder.parent / "shard-1.tar").write_bytes(b"x" * 2000)
    items = {item.id: item for item in open_source(given).items()}
    assert sorted(items) == ["shard-0.tar/a.png", f"shard-0.tar/{NAMES[2]}", "shard-1.tar"]
    with pytest.raises(ImageError, match="cannot be read to its end"):
        read(items["shard-1.tar"])


def test_what_cannot_be_read_is_an_image_error(folder):
    os.mkfifo(folder / "pipe.png")
    with tarfile.open(folder.parent / "s.tar", "w") as tar:
        tar.add(folder / "a.png", "a.png")
    [member] = open_source(str(folder.parent / "s.tar")).items()
    for item, reason in (
        (Item("x", str(folder / "none.png")), "No such file"),
        (Item("x", "memory://nowhere.png"), "cannot be read"),
        (Item("x", str(folder / "pipe.png")), "pipe.png' is a pipe, expected a file"),
        (Item("x", f"file://{folder}/pipe.png"), "pipe.png' is a pipe"),
        (member._replace(container=str(folder / "pipe.png")), "is a pipe"),
        (Item("x", "/dev/null"), "is a device"),
        (Item("x", str(folder)), "is a folder"),
    ):
        with pytest.raises(ImageError, match=reason):
            read_image(read(item))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "does not exist, expected a folder"),
        ("notes.txt.gz", "is not a source of images, expected a folder"),
        ("x.tar.xz", "x.tar.xz' is compressed, .*: unpack it to .tar"),
        ("nosuch://x/", "cannot read nosuch:// URLs"),
        ("list.csv", "which column of .*list.csv' has the images, .* No usual name among a, b: name it by --column"),
        ("x.RAR", "x.RAR' is an archive that cannot be read in place: unpack it, and pass the folder"),
        ("broken.parquet", "cannot read .*broken.parquet"),
        ("numbers.parquet", "column 'image' of .* is int64, expected paths, or the bytes"),
    ],
)
def test_what_is_no_source_is_reported(given, message, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "notes.txt.gz").write_bytes(b"")
    (tmp_path / "x.tar.xz").write_bytes(b"")
    (tmp_path / "x.RAR").write_bytes(b"")
    (tmp_path / "list.csv").write_text("a,b\n1,2\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    parquet.write_table(pa.table({"image": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(InputError, match=message):
        open_source(given if "://" in given else str(tmp_path / given))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns("picture"), "no column 'picture' in .*, expected one of path, key"),
        (Columns(id="n"), "no column 'n' in .*, expected one of path, key"),
        (Columns("path", "picture"), "no column 'picture' in"),
    ],
)
def test_a_column_that_is_not_there_is_reported(columns, message, tmp_path):
    (tmp_path / "list.csv").write_text("path,key\na.jpg,1\n")
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path / "list.csv"), columns)


# Ids and locks --------------------------------------------------------------------------------------------------------


def test_ids_are_a_set(monkeypatch):
    monkeypatch.setattr("open_gem.label.done.key", lambda id: int(id) << 46)  # four with the same start
    ids = HashedIdSet(str(number) for number in range(1000))
    assert len(ids) == 1000
    assert all(str(number) in ids for number in range(1000))
    assert not any(str(number) in ids for number in range(1000, 9000))
    assert [ids.add("7"), ids.add("2000"), ids.add("2000")] == [False, True, False]
    assert len(ids) == 1001


def test_shards_share_all_images_out():
    names = [f"{number}.jpg" for number in range(300)]
    of = [[name for name in names if Shard(index, 3).has(name)] for index in range(3)]
    assert sorted(name for some in of for name in some) == sorted(names)
    assert all(70 < len(some) < 130 for some in of)


def test_two_writers_of_the_same_images_are_one_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr("open_gem.label.done.PATIENCE", 0.1)
    with (
        writing(tmp_path),
        pytest.raises(InputError, match=f"is being written by process {os.getpid()} on "),
        writing(tmp_path),
    ):
        pass
    with writing(tmp_path):  # free again
        pass
    with writing(tmp_path, Shard(0, 2)), writing(tmp_path, Shard(1, 2)):  # shards of one run may
        for other in (Shard(0, 2), Shard(0, 1), Shard(2, 3)):
            with pytest.raises(InputError, match="is being written by"), writing(tmp_path, other):
                pass


def test_what_a_killed_writer_left_half_written_goes(tmp_path):
    (tmp_path / f".{'0123' * 8}.tmp").write_bytes(b"half a part")
    (tmp_path / TODO).mkdir()
    (tmp_path / TODO / "1.parquet").write_bytes(b"what its actors would do")
    with writing(tmp_path):
        assert not list(tmp_path.glob(".*.tmp")) and not (tmp_path / TODO).exists()


def test_a_folder_that_cannot_be_is_reported(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(OutputError, match=r"cannot write to '.*labels': Not a directory"),
        writing(tmp_path / "file/labels"),
    ):
        pass


def test_shards_take_away_what_killed_ones_left_and_leave_what_others_write(tmp_path):
    (tmp_path / f".{'0123' * 8}.tmp").write_bytes(b"half a part")
    with temporary_beside(tmp_path / "part", Path.touch) as written, writing(tmp_path, Shard(0, 2)):
        assert list(tmp_path.glob(".*.tmp")) == [written]


def test_a_link_in_a_circle_is_one_item(tmp_path):
    """Opening it fails; its neighbours are there."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    items = list(open_source(str(tmp_path)).items())
    assert sorted(item.id for item in items) == ["a.jpg", "b.jpg", "loop.jpg"]
    assert not any(item.error for item in items)


def test_other_columns_are_another_job(tmp_path):
    (tmp_path / "list.csv").write_text("a,b,n\nx.jpg,y.jpg,1\n")
    asked = [Columns("a"), Columns("b"), Columns("a", "n")]
    assert len({open_source(str(tmp_path / "list.csv"), one).columns for one in asked}) == 3


def test_an_image_in_a_tar_is_read_by_its_address_alone(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "a.jpg")
    [item] = open_source(str(tmp_path / "s.tar")).items()
    assert read(Item(item.id, item.source)) == b"picture"


def test_addresses_mean_the_same_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = {
        ("photos/a.jpg", ""): f"{tmp_path}/photos/a.jpg",
        (f"file://{tmp_path}/a.jpg", ""): f"{tmp_path}/a.jpg",
        ("tar://b/a.jpg::s.tar", "s.tar"): f"tar://b/a.jpg::{tmp_path}/s.tar",
        ("tar://a.jpg::/x/y::z.tar", "/x/y::z.tar"): "tar://a.jpg::/x/y::z.tar",
        ("t.parquet#column=image&row=3", ""): f"{tmp_path}/t.parquet#column=image&row=3",
        ("s3://b/a.jpg", ""): "s3://b/a.jpg",
        ("tar://a.jpg::s3://b/s.tar", "s3://b/s.tar"): "tar://a.jpg::s3://b/s.tar",
        ("https://h/t.parquet#column=i&row=3", ""): "https://h/t.parquet#column=i&row=3",
        ("", ""): "",
    }
    assert {given: absolute(Item("", *given)) for given in here} == here
    for address in here.values():
        assert absolute(Item("", address)) == address


def test_rows_of_parquet_are_read_in_any_order(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    cells = [{"bytes": str(number).encode(), "path": None} for number in range(200)]
    parquet.write_table(pa.table({"image": cells}), tmp_path / "rows.parquet", row_group_size=90)
    items = list(open_source(str(tmp_path / "rows.parquet")).items())
    for order in (range(200), (0, 5, 199, 3, 89, 90, 88, 130, 66, 1), range(199, -1, -7)):
        assert [read(items[row]) for row in order] == [str(row).encode() for row in order]


# Lists with faults ----------------------------------------------------------------------------------------------------


def test_a_bad_line_is_an_item_that_names_it_and_the_others_are_there(tmp_path):
    (tmp_path / "list.csv").write_bytes(
        b"path,key\na.jpg,1\nnosuch://x.jpg,2\n,3\nb.jpg\nb.jpg,\n\xe9.jpg,6\nc.jpg,\xe9\nd.jpg,8,9\n"
    )
    items = list(open_source(str(tmp_path / "list.csv"), Columns(id="key")).items())
    assert [item.id for item in items] == ["1", "2", "3", "line 5", "line 6", "6", "\\udce9", "8"]
    reasons = {item.id: item.error for item in items if item.error}
    assert reasons.pop("2", "").startswith("line 3 is 'nosuch://x.jpg': cannot read nosuch:// URLs")
    assert reasons == {
        "3": "line 4 has no path",
        "line 5": "line 5 has no id",
        "line 6": "line 6 has no id",
        "6": "line 7 is not UTF-8 text, and no file has its bytes for a name",
    }
    (tmp_path / "list.txt").write_bytes(b"a.jpg\n\nnosuch://b.jpg\n\xe9.jpg\n")
    listed = list(open_source(str(tmp_path / "list.txt")).items())
    assert [(item.error or "")[:7].strip() for item in listed] == ["", "line 3", "line 4"]


def test_what_breaks_a_table_is_an_item_and_the_others_are_there(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "list.csv").write_text(f"path\n{'a' * 200_000}\nb.jpg\n")
    bad, good = open_source(str(tmp_path / "list.csv")).items()
    assert (bad.id, good.id) == ("line 2", "b.jpg") and "line 2 cannot be read: field larger" in str(bad.error)
    for number in range(3):
        parquet.write_table(pa.table({"path": [f"{number}.jpg"]}), tmp_path / f"{number}.parquet")
    (tmp_path / "1.parquet").write_bytes(b"PAR1")
    items = {item.id: item.error for item in open_source(f"{tmp_path}/*.parquet").items()}
    assert "cannot be read to its end" in str(items.pop("1.parquet"))
    assert items == {"0.jpg": None, "2.jpg": None}


def test_lists_of_whole_paths_have_no_root(tmp_path):
    for path, root in (("/photos/a.jpg", None), ("s3://b/a.jpg", None), ("a.jpg", str(tmp_path))):
        (tmp_path / "list.txt").write_text(path)
        assert open_source(str(tmp_path / "list.txt")).root == root


def test_rows_without_an_id_or_a_path_are_items_that_say_so(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    pictures = [{"bytes": b"x", "path": None}] * 3
    parquet.write_table(pa.table({"image": pictures, "n": ["a", None, ""]}), tmp_path / "rows.parquet")
    items = list(open_source(str(tmp_path / "rows.parquet"), Columns(id="n")).items())
    assert [(item.id, item.error) for item in items] == [
        ("a", None),
        ("rows.parquet/1", "rows.parquet/1 has no id"),
        ("rows.parquet/2", "rows.parquet/2 has no id"),
    ]
    parquet.write_table(pa.table({"path": ["a.jpg", None, ""], "n": [1, 2, 3]}), tmp_path / "paths.parquet")
    items = list(open_source(str(tmp_path / "paths.parquet"), Columns(id="n")).items())
    assert [(item.id, item.error) for item in items] == [
        ("1", None),
        ("2", "row 1 of paths.parquet has no path"),
        ("3", "row 2 of paths.parquet has no path"),
    ]


# Patterns -------------------------------------------------------------------------------------------------------------


def test_patterns_mean_what_glob_makes_of_them(folder, monkeypatch):
    from glob import glob

    (folder / "b" / "deep" / "er").mkdir(parents=True)
    (folder / "b" / "deep" / "er" / "e.png").write_bytes(b"x")
    (folder / ".cache" / "y.png").write_bytes(b"x")
    monkeypatch.chdir(folder)
    for pattern in (
        "*.png",
        "**/*.png",
        "b/*",
        "**/**/?.png",
        "b/**",
        "*/*.PNG",
        "[ab]/**/*",
        ".*/*.png",
        "no*/x.png",
        "**",
    ):
        for given in (pattern, f"{folder}/{pattern}"):
            found = [item.source for item in open_source(given).items()]
            expected = glob(given, recursive=True)  # noqa: PTH207 - what is compared
            assert sorted(found) == sorted({path for path in expected if path.lower().endswith("png")})
            assert len(set(found)) == len(found)


def test_patterns_follow_links_but_not_in_circles(folder):
    (folder / "b" / "up").symlink_to(folder)
    assert sorted(item.id for item in open_source(f"{folder}/**/*").items()) == sorted(NAMES)


def test_braces_are_as_shells_have_them(tmp_path):
    assert list(expand("s-{0..2}.tar")) == ["s-0.tar", "s-1.tar", "s-2.tar"]
    assert list(expand("s-{098..101}.{a,b}")) == [f"s-{n}.{e}" for n in ("098", "099", "100", "101") for e in "ab"]
    assert list(expand("{2..1}{x,}{}")) == ["2x{}", "2{}", "1x{}", "1{}"]
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as tar:
            (tmp_path / "x.png").write_bytes(png(shard))
            tar.add(tmp_path / "x.png", "x.png")
    items = list(open_source(f"{tmp_path}/s-{{0..2}}.tar").items())
    assert [(item.id, item.error is None) for item in items] == [
        ("s-0.tar/x.png", True),
        ("s-1.tar/x.png", True),
        ("s-2.tar", False),
    ]


def test_a_file_that_is_called_like_a_pattern_is_that_file(tmp_path):
    for name in ("br[1].tar", "br1.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            (tmp_path / f"{name}.png").write_bytes(png(9))
            tar.add(tmp_path / f"{name}.png", f"{name}.png")
    assert [item.id for item in open_source(f"{tmp_path}/br[1].tar").items()] == ["br[1].tar/br[1].tar.png"]


def test_a_source_without_images_is_reported(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for given in (tmp_path, f"{tmp_path}/*.jpg", f"{tmp_path}/no/*.jpg", f"{tmp_path}/*.tar", tmp_path / "empty.txt"):
        with pytest.raises(InputError, match=r"no image in .*, expected at least one"):
            open_source(str(given)).check_not_empty()


def test_listing_a_tar_keeps_none_of_its_members(tmp_path):
    with tarfile.open(tmp_path / "many.tar", "w") as tar:
        for number in range(50):
            tar.addfile(tarfile.TarInfo(f"{number}.png"))
    del tar  # it keeps what it wrote
    items = open_source(str(tmp_path / "many.tar")).items()
    before = _members_in_memory()
    for _ in range(50):
        next(items)
    assert _members_in_memory() < before + 5


def _members_in_memory() -> int:
    gc.collect()
    return sum(type(one) is tarfile.TarInfo for one in gc.get_objects())


# Columns --------------------------------------------------------------------------------------------------------------


def parquet_of(file: Path, /, **columns: Any) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), file)
    return str(file)


@pytest.mark.parametrize(
    ("addresses", "pictures"), [("url", "jpg"), ("path", "bytes"), ("URL", "image"), ("link", "PNG")]
)
def test_bytes_go_before_addresses_which_are_the_ids(addresses, pictures, tmp_path):
    urls = ["http://127.0.0.1:1/gone.jpg", None]
    given = parquet_of(
        tmp_path / "rows.parquet", **{addresses: urls, pictures: [b"one", b"two"], "caption": ["a", "b"]}
    )
    source = open_source(given)
    assert [(item.id, read(item)) for item in source.items()] == [(urls[0], b"one"), ("rows.parquet/1", b"two")]
    assert f"are read from column {pictures!r}, ids from {addresses!r}; --column and --id-column" in str(source.note)
    assert next(open_source(given, Columns(addresses)).items()).source == urls[0]


def test_a_table_of_which_one_column_can_be_meant_needs_no_note(tmp_path):
    assert open_source(parquet_of(tmp_path / "rows.parquet", jpg=[b"one"], caption=["a"])).note is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_images_of_a_data_set_go_before_its_addresses(tmp_path):
    import datasets

    features = datasets.Features({"url": datasets.Value("string"), "page": datasets.Image()})
    rows = [{"url": "http://h/a.png", "page": {"bytes": IMAGES["a.png"], "path": None}}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "data"))
    source = open_source(str(tmp_path / "data"))
    [item] = source.items()
    assert (item.id, read(item)) == ("http://h/a.png", IMAGES["a.png"])
    assert "column 'page', ids from 'url'" in str(source.note)


@pytest.mark.parametrize("header", ["URL,TEXT", "TEXT,Url", "link,TEXT", "TEXT,photo", "Image_Path,TEXT"])
def test_columns_are_known_in_either_case(header, tmp_path):
    names = header.split(",")
    (tmp_path / "list.csv").write_text(
        f"{header}\n{','.join('words' if name == 'TEXT' else 'a.jpg' for name in names)}\n"
    )
    assert [item.id for item in open_source(str(tmp_path / "list.csv")).items()] == ["a.jpg"]
    [item] = open_source(str(tmp_path / "list.csv"), Columns("text", "TEXT")).items()
    assert item.source.endswith("/words")


def test_names_that_differ_in_case_alone_are_not_mixed_up(tmp_path):
    (tmp_path / "list.csv").write_text("a,A\n1.jpg,2.jpg\n")
    assert [next(open_source(str(tmp_path / "list.csv"), Columns(name)).items()).id for name in "aA"] == [
        "1.jpg",
        "2.jpg",
    ]
    (tmp_path / "list.csv").write_text("Ab,aB\n1.jpg,2.jpg\n")
    with pytest.raises(InputError, match="no column 'ab' in"):
        open_source(str(tmp_path / "list.csv"), Columns("ab"))


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string"])
def test_text_is_text_however_it_is_stored(kind, tmp_path):
    """pandas keeps categories as dictionaries, and newer writers strings as views."""
    import pyarrow as pa

    kinds = {"dictionary": pa.dictionary(pa.int32(), pa.string()), "string_view": pa.string_view()}
    paths = pa.array(["a.jpg", "b.jpg", "a.jpg"]).cast(kinds.get(kind, pa.large_string()))
    source = open_source(parquet_of(tmp_path / "rows.parquet", path=paths, key=paths))
    assert [item.id for item in source.items()] == ["a.jpg", "b.jpg", "a.jpg"]
    named = open_source(source.address, Columns("path", "key"))
    assert [item.id for item in named.items()] == ["a.jpg", "b.jpg", "a.jpg"]


@pytest.mark.parametrize("kind", ["dictionary", "binary_view"])
def test_bytes_are_bytes_however_they_are_stored(kind, tmp_path):
    import pyarrow as pa

    kinds = {"dictionary": pa.dictionary(pa.int32(), pa.binary()), "binary_view": pa.binary_view()}
    pictures = pa.array([b"one", b"two", b"one"]).cast(kinds[kind])
    items = open_source(parquet_of(tmp_path / "rows.parquet", image=pictures)).items()
    assert [read(item) for item in items] == [b"one", b"two", b"one"]


# Paths in tables ------------------------------------------------------------------------------------------------------


def test_relative_paths_are_relative_to_the_table_in_every_kind_of_column(tmp_path, monkeypatch):
    """And not to the folder that the command was called in, which has another image of that name."""
    for place, content in (("tables", b"right"), ("elsewhere", b"wrong")):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "a.jpg").write_bytes(content)
    tables = tmp_path / "tables"
    (tables / "list.csv").write_text("image\nsub/a.jpg\n")
    cell = [{"bytes": None, "path": "sub/a.jpg"}]
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = [
        str(tables / "list.csv"),
        parquet_of(tables / "text.parquet", image=["sub/a.jpg"]),
        parquet_of(tables / "struct.parquet", image=cell),
        "../tables/struct.parquet",
    ]
    for one in given:
        [item] = open_source(one).items()
        content = read(item)
        assert (content.read_bytes() if isinstance(content, Path) else content) == b"right", one


def test_tables_in_several_folders_have_their_own_images(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        parquet_of(tmp_path / name / "list.parquet", path=["x.jpg", "/abs/x.jpg"])
    items = list(open_source(f"{tmp_path}/*/list.parquet").items())
    assert sorted((item.id, item.source) for item in items if item.id[0] != "/") == [
        (f"{name}/x.jpg", f"{tmp_path}/{name}/x.jpg") for name in "ab"
    ]
    assert {item.source for item in items if item.id[0] == "/"} == {"/abs/x.jpg"}


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_lists_are_read_by_their_byte_order_mark(encoding, tmp_path):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / "list.txt").write_bytes(f"{mark}\u00e4.jpg\r\nb.jpg\r\n".encode(encoding))
    (tmp_path / "list.tsv").write_bytes(f"{mark}key\tpath\r\n1\t\u00e4.jpg\r\n2\tb.jpg\r\n".encode(encoding))
    for name in ("list.txt", "list.tsv"):
        assert [item.id for item in open_source(str(tmp_path / name)).items()] == ["\u00e4.jpg", "b.jpg"]


def test_lists_that_were_put_together_have_marks_inside(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.jpg\n\xef\xbb\xbfb.jpg\n")
    assert [item.id for item in open_source(str(tmp_path / "list.txt")).items()] == ["a.jpg", "b.jpg"]


def test_utf_16_without_a_mark_is_named(tmp_path):
    (tmp_path / "list.txt").write_bytes("a.jpg\nb.jpg\n".encode("utf-16-be"))
    with pytest.raises(InputError, match=r"has a NUL character in its path: if the list is UTF-16 .* save it as UTF-8"):
        open_source(str(tmp_path / "list.txt")).check_not_empty()


# What is passed over --------------------------------------------------------------------------------------------------


def member(
    tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b""
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    tar.addfile(info, io.BytesIO(content))


def test_links_in_a_tar_are_the_files_they_lead_to_or_are_counted(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        member(tar, "./d", tarfile.DIRTYPE)
        member(tar, "d/early.png", tarfile.SYMTYPE, "../z.png")
        member(tar, "z.png", content=b"content")
        member(tar, "hard.png", tarfile.LNKTYPE, "z.png")
        member(tar, "d/chain.png", tarfile.SYMTYPE, "early.png")
        member(tar, "gone.png", tarfile.LNKTYPE, "none.png")
        member(tar, "out.png", tarfile.SYMTYPE, "/etc/passwd")
        member(tar, "up.png", tarfile.SYMTYPE, "../../x.png")
        member(tar, "a.png", tarfile.SYMTYPE, "b.png")
        member(tar, "b.png", tarfile.SYMTYPE, "a.png")
        member(tar, "pipe.png", tarfile.FIFOTYPE)
        member(tar, "z.json", content=b"{}")
        member(tar, "._z.png", content=b"x")
    left = PassedOver()
    items = list(open_source(str(tmp_path / "s.tar")).items(left))
    assert [item.id for item in items if item.id == "s.tar/z.png"], "itself, too"
    assert sorted((item.id, read(item)) for item in items) == [
        (f"s.tar/{name}", b"content") for name in ("d/chain.png", "d/early.png", "hard.png", "z.png")
    ]
    assert all(read(Item(item.id, item.source)) == b"content" for item in items), "by their addresses alone"
    assert left.ordered() == {
        "symbolic links to what is not in the tar": 4,
        ".json": 1,
        "hard links to what is not in the tar": 1,
        "hidden": 1,
        "pipes and devices": 1,
    }


def test_what_a_folder_has_beside_images_is_counted_anew_at_each_listing(folder):
    source = open_source(str(folder))
    for _ in range(2):
        left = PassedOver()
        list(source.items(left))
        assert left.ordered() == {"hidden": 2, ".txt": 1}
    left = PassedOver()
    list(open_source(f"{folder}/*").items(left))
    assert left.ordered() == {".txt": 1}, "of a pattern what it asks for"


def test_kinds_that_are_passed_over_are_not_counted_without_end():
    left = PassedOver()
    for number in range(1000):
        left.takes(f"x.{number}")
    assert len(left) == PassedOver.MOST + 1 and left.total() == 1000


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["a.tar", "sub/b.tar"], r"it has 2 \.tar: give '.*/photos/\*\*/\*\.tar'"),
        (["a.parquet", "x.json"], r"it has 1 \.json, 1 \.parquet: give '.*/photos/\*\*/\*\.parquet'"),
        (["a.rar"], r"it has 1 \.rar: unpack archives first"),
        (["a.zip"], r"it has 1 \.zip: give '.*/photos/\*\*/\*\.zip'"),
        (["a.psd", "b"], r"it has 1 \.psd, 1 without an ending$"),
    ],
)
def test_a_folder_without_images_says_what_it_has_and_how_to_give_it(names, advice, tmp_path):
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"no image in .*, expected at least one; {advice}"):
        open_source(str(tmp_path / "photos")).check_not_empty()


def test_the_pattern_that_is_advised_has_the_images(folder):
    as_tar(folder)
    with pytest.raises(InputError) as raised:
        (folder.parent / "photos").rename(folder.parent / ".photos")
        open_source(str(folder.parent)).check_not_empty()
    advised = str(raised.value).split("give '")[1].rstrip("'")
    assert len(list(open_source(advised).items())) == len(NAMES)
