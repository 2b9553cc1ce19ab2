"""Labelling by Ray, but for Ray itself (`test_label_faults` has that): what actors have to do, and do of it."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event, current_thread, main_thread
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
from PIL import Image
from pyarrow import parquet

from open_gem import Localizer
from open_gem.data.scenes import scene
from open_gem.errors import InputError, OutputError
from open_gem.files import to_json
from open_gem.label import local, on_ray
from open_gem.label.done import HashedIdSet, Shard
from open_gem.label.kept import kept_images
from open_gem.label.labeling import Labeling
from open_gem.label.on_ray import Actor, Node, _count, _items_of, _ours, _share, _telling, _write_todo
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Manifest, Parts
from open_gem.label.sources import Item, Source, open_source


@pytest.fixture
def labeling(tiny_localizer: Localizer) -> Labeling:
    return Labeling(tiny_localizer, Ontology.of(["cat", "dog"], presence=0.0))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Five pictures, as paths relative to the working folder, one of which is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for seed in range(5):
        Image.fromarray(scene(seed, 64).image).save(tmp_path / "in" / f"{seed}.png")
    (tmp_path / "in" / "3.png").write_bytes(b"no picture")
    return open_source("in")


@pytest.fixture
def parts(source: Source, labeling: Labeling, tmp_path: Path) -> Parts:
    return Parts.claim(tmp_path / "out", labeling.manifest(source))


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """The file that exists as long as the run does."""
    path = tmp_path / "token"
    path.touch()
    return path


@pytest.fixture
def begin(parts: Parts, labeling: Labeling, token: Path) -> Callable[..., Actor]:
    """Begins an actor, perhaps with other settings than the run's."""

    def actor(manifest: Manifest = parts.manifest, labels: Labeling = labeling, batch_size: int = 8) -> Actor:
        return Actor(str(token.parent), str(parts.folder), str(token), manifest, lambda: labels, batch_size, 1)

    return actor


def asked(name: str, items: list[Item]) -> dict[str, Any]:
    return {"part": [name], "items": [to_json(items)]}


def found(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["source"], row["error"], [(one["label"], one["xyxy"]) for one in row["objects"]]


def read_todo(files: list[str]) -> list[tuple[str, str]]:
    rows = (row for file in files for row in parquet.read_table(file).to_pylist())
    return [(row["part"], row["items"]) for row in rows]


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An actor in this process; the files of what it had to do."""
    files: list[str] = []

    def results(todo: list[str], actor: Any, workers: int | None) -> Iterator[dict[str, Any]]:
        files.extend(todo)
        begun = actor(1)
        for name, items in read_todo(todo):
            answer = begun({"part": [name], "items": [items]})
            yield from (dict(zip(answer, row, strict=True)) for row in zip(*answer.values(), strict=True))

    monkeypatch.setattr(on_ray, "_results", results)
    monkeypatch.setattr(on_ray, "_cluster", nullcontext)
    return files


def test_a_run_is_that_of_the_other_engine(source, parts, labeling, tmp_path, without_ray):
    done, heard = HashedIdSet(["0.png"]), []
    tally = on_ray.run(
        parts, labeling, source, make=lambda: labeling, images_per_part=2, done=done, progress=heard.append
    )
    assert (tally.listed, tally.done, tally.labeled, tally.failed) == (5, 1, 3, 1)
    assert heard == [1, 1, 1, 1] and len(parts.paths()) == 2
    assert len(done) == 5
    others = Parts.claim(tmp_path / "other", parts.manifest)
    local.run(others, labeling, source)
    mine, other = ({row["id"]: found(row) for row in some.rows()} for some in (parts, others))
    assert other.pop("0.png") and mine == other
    assert tally.seconds == pytest.approx(sum(row["seconds"] for row in parts.rows("seconds")))
    assert {path.suffix for path in parts.folder.rglob("*.*")} == {".parquet", ".kept", ".json", ".yaml"}, (
        "nothing is left but parts"
    )
    assert len(list(kept_images(parts))) == 3
    before = list(without_ray)
    on_ray.run(parts, labeling, source, make=lambda: labeling)
    on_ray.run(others, labeling, source, make=lambda: labeling)
    assert len(without_ray) == len(before) + 1, "where all is done, nothing is begun"


def test_ray_shares_out_by_itself(source, parts, labeling, without_ray):
    with pytest.raises(InputError, match="torchrun and --engine ray given"):
        on_ray.run(parts, labeling, source, make=lambda: labeling, shard=Shard(0, 2))


def test_what_is_to_be_done_is_on_disk_part_by_part(tmp_path):
    """Names of files need not be text."""
    given = [Item(str(number), f"in/\udcff{number}.png") for number in range(5)]
    given[1] = Item("1", "tar://1.png::in/\udcff.tar", "in/\udcff.tar", 512, 7)
    given[2] = given[2]._replace(error="is none")
    files = _write_todo(tmp_path / "todo", iter(given), 2)
    todo = read_todo(files)
    assert [_items_of(items) for _, items in todo] == [given[:2], given[2:4], given[4:]]
    many = _write_todo(tmp_path / "todo", (Item(str(number), "") for number in range(on_ray.FILE_PARTS + 1)), 1)
    assert len(many) == len(list((tmp_path / "todo").iterdir())) == 2, "what a run before had to do is gone"
    assert len({name for name, _ in read_todo(many)}) == on_ray.FILE_PARTS + 1
    assert not {name for name, _ in todo} & {name for name, _ in read_todo(many)}


# An actor -------------------------------------------------------------------------------------------------------------


def test_an_actor_labels_a_part_once(source, parts, begin, tmp_path, monkeypatch):
    """From wherever it was started; a second try finds what the first wrote."""
    items = sorted(source.items())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    actor, groups, locate = begin(batch_size=2), [], Labeling.locate
    monkeypatch.setattr(Labeling, "locate", lambda self, group: groups.append(len(group)) or locate(self, group))
    first = actor(asked("1", items))
    assert groups == [2, 2]
    assert sorted(first["id"]) == [f"{seed}.png" for seed in range(5)]
    assert sorted(first["status"]) == ["error", "ok", "ok", "ok", "ok"]
    [path] = parts.paths()
    written = path.stat().st_mtime_ns
    shutil.rmtree("in")
    assert actor(asked("1", items)) == first | {"seconds": pytest.approx(first["seconds"])}
    assert path.stat().st_mtime_ns == written


def test_an_actor_that_is_asked_to_stop_begins_nothing(source, parts, begin):
    (parts.folder / on_ray.STOP).touch()
    assert begin()(asked("1", list(source.items()))) == {"id": [], "status": [], "seconds": []}
    assert parts.paths() == []


def test_an_actor_whose_run_is_over_writes_nothing(source, parts, begin, token):
    actor = begin()
    token.unlink()
    with pytest.raises(OutputError, match="the run that this actor belongs to is over"):
        actor(asked("1", list(source.items())))
    assert parts.paths() == []


def test_an_actor_with_other_settings_is_refused(parts, begin, labeling):
    chosen = replace(parts.manifest, settings={**parts.manifest.settings, "columns": "ids 'n'"})
    begin(chosen)
    with pytest.raises(InputError, match="an actor has other settings or weights than the run"):
        begin(labels=replace(labeling, instances="label"))


# Around them ----------------------------------------------------------------------------------------------------------


def test_actors_are_asked_to_stop_by_a_file(tmp_path):
    file, stop = tmp_path / "stop", Event()
    file.touch()
    with _telling(stop, file):
        assert not file.exists(), "that of a run before, which was killed"
        stop.set()
        end = time.monotonic() + 30
        while not file.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
    assert not file.exists()
    before = set(enumerate_threads())
    with _telling(Event(), file):
        [teller] = set(enumerate_threads()) - before
    assert not teller.is_alive(), "nobody is left who would tell the next run"


def test_a_cluster_is_begun_in_any_thread_and_ends_with_the_run(monkeypatch):
    """What Ray does with signals does not stay."""
    ray, told, before = pytest.importorskip("ray"), [], signal.getsignal(signal.SIGTERM)

    def init(**settings: Any) -> None:
        told.append("begun")
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: told.append("ended"))

    def begin() -> None:
        with on_ray._cluster():
            assert signal.getsignal(signal.SIGTERM) == before
            assert told.pop() == "begun"
        assert told.pop() == "ended"

    begin()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(begin).result()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with on_ray._cluster():
        pass
    assert told == [], "that of others is theirs"


def test_errors_of_ours_are_found_in_what_ray_makes_of_them():
    ours, wrapped, raised = InputError("ours"), RuntimeError("task"), RuntimeError("job")
    wrapped.cause, raised.__cause__ = ours, wrapped  # pyright: ignore[reportAttributeAccessIssue]
    assert _ours(raised) is ours
    assert _ours(other := RuntimeError("other")) is other


@pytest.mark.parametrize(
    ("nodes", "actors", "share"),
    [
        ([Node(1)], 1, 0),
        ([Node(2)], 1, 1),
        ([Node(2)], 4, 0),
        ([Node(16)], 3, 5),
        ([Node(16)], 15, 1),
        ([Node(16)], 16, 0),
        ([Node(4), Node(4)], 1, 4),
        ([Node(4), Node(4)], 3, 2),
        ([Node(64), Node(8, 1), Node(8, 1)], 2, 8),
        ([Node(16, 4)], 4, 3),
        ([Node(16, 1), Node(2, 1)], 2, 2),
    ],
)
def test_actors_leave_a_processor_free_and_fit_on_machines(nodes, actors, share):
    assert _share(nodes, actors) == share


@pytest.mark.parametrize(
    ("nodes", "wanted", "count"),
    [
        ([Node(1)], None, 1),
        ([Node(4), Node(4)], None, 7),
        ([Node(4)], 6, 6),
        ([Node(16, 1)], 4, 1),
        ([Node(8, 2), Node(8)], None, 2),
        ([Node(8, 2), Node(8)], 1, 1),
    ],
)
def test_there_are_no_more_actors_than_cards(nodes, wanted, count):
    assert _count(nodes, wanted) == count
