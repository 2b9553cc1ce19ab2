"""Whatever happens to a run, in the end every image is in one part, once; what was done twice is counted."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread, Timer, get_ident
from typing import Any

import pytest
from PIL import Image

from open_gem.data.scenes import scene
from open_gem.errors import InputError
from open_gem.label.done import HashedIdSet, Tally, writing
from open_gem.label.parts import Manifest, Parts
from open_gem.label.reading import within
from open_gem.label.sources import Source, open_source
from open_gem.label.watching import watch

CHILD = Path(__file__).parents[1].joinpath("label_child.py")
PART, BATCH, UNDER_WAY = 50, 8, 6 * 8  # as in the child; what is between the model and the writer


def images(folder: Path, count: int) -> Path:
    folder.mkdir()
    pictures = [Image.fromarray(scene(seed, 64).image) for seed in range(20)]
    for number in range(count):
        pictures[number % len(pictures)].save(folder / f"{number:05}.png")
    return folder


class Runs:
    """Runs of one job, each a process."""

    def __init__(self, source: Path, out: Path, model: str):
        self.source, self.out, self.model, self.log = source, out, model, out.with_suffix(".log")

    def start(self, engine: str = "local", **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(CHILD), *map(str, (self.source, self.out, self.model, self.log)), engine]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **pipes)

    def finish(self, engine: str = "local", **environment: str) -> str:
        child = self.start(engine, **environment)
        output, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors[-3000:]
        return output

    @property
    def seen(self) -> list[str]:
        """Ids of images that the model saw, as often as it did."""
        return [line.split(" ", 1)[1] for line in self.log.read_text().splitlines()] if self.log.exists() else []

    @property
    def written(self) -> list[str]:
        return [row["id"] for row in Parts.open(self.out).rows("id")] if (self.out / "_manifest.json").exists() else []

    def check(self, count: int) -> None:
        """Everything is there once, and nothing half-written is."""
        assert len(self.written) == len(set(self.written)) == count
        assert all(row["status"] == "ok" for row in Parts.open(self.out).rows("status"))
        assert not list(self.out.glob(".*.tmp"))


@pytest.fixture
def job(tmp_path: Path, tiny: str) -> Callable[[int], Runs]:
    return lambda count: Runs(images(tmp_path / "photos", count), tmp_path / "out", tiny)


def wait(until: Callable[[], Any], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def kill(runs: Runs, engine: str, after: float, **environment: str) -> None:
    """Start a run and end it with SIGKILL `after` seconds from when the model has seen its first image."""
    before = len(runs.seen)
    child = runs.start(engine, **environment)
    wait(lambda: len(runs.seen) > before or child.poll() is not None, "the first image")
    time.sleep(after)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def kills(
    runs: Runs, count: int, times: int, engine: str = "local", longest: float = 0.3, pause: str = "0.02"
) -> dict[str, float]:
    """Kill a job of `count` images `times` times at random points, finish it, and say what that cost."""
    chance = random.Random(0)
    lost: list[int] = []
    for _ in range(times):
        kill(runs, engine, chance.uniform(0, longest), PAUSE=pause)
        lost.append(len(runs.seen) - sum(lost) - len(runs.written))  # seen, but neither written nor lost before
    runs.finish(engine)
    runs.check(count)
    again = len(runs.seen) - count
    assert again == sum(lost)
    return {"kills": times, "images": count, "seen twice": again, "most a kill": max(lost)}


@pytest.mark.slow
def test_killed_at_random_points(job):
    cost = kills(job(100), 100, 3)
    assert cost["most a kill"] <= PART + UNDER_WAY


@pytest.mark.full
def test_killed_twenty_times(job):
    cost = kills(job(2000), 2000, 20)
    print(cost)
    assert cost["most a kill"] <= PART + UNDER_WAY


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_signals_end_a_run_in_order(number, name, job, tiny):
    """By the command itself: what is done is written, how to go on is said, and the exit code tells the signal."""
    runs = job(120)
    command = [sys.executable, "-c", "from open_gem.cli import main; main()", "label", str(runs.source), "-p", "cat"]
    command += [
        "--out",
        str(runs.out),
        "--model",
        tiny,
        "--device",
        "cpu",
        "--presence",
        "0",
        "--images-per-part",
        "1000",
    ]
    slow = [sys.executable, "-c", SLOW, *command[3:]]
    child = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("first image"):
            break
    child.send_signal(number)
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 128 + number, errors
    assert errors.splitlines()[0] == f"{name}: writing finished rows; a second signal ends it at once"
    assert "rerun the same command to resume" in errors
    assert "images labelled" in output
    assert 0 < len(runs.written) < 120
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs.check(120)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_that_hangs(job, tiny):
    """While it lists what a server that never answers has; what was labelled until then is written."""
    runs = job(60)
    command = [sys.executable, "-c", HANGS, "label", str(runs.source), "-p", "cat", "--presence", "0"]
    command += ["--out", str(runs.out), "--model", tiny, "--device", "cpu", "--read-timeout", "10000"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    late = Timer(120, child.kill)
    late.start()
    for number, line in ((signal.SIGINT, "hangs"), (signal.SIGTERM, "SIGINT: writing finished rows")):
        while not (said := child.stderr.readline()).startswith(line):
            assert said, "it ended"
        child.send_signal(number)
    _, errors = child.communicate()
    late.cancel()
    assert child.returncode == 128 + signal.SIGINT, errors
    assert errors == "ended at once: rerun the same command to resume\n"
    assert 0 < len(runs.written) < 60


class WokenError(Exception):
    pass


@pytest.fixture
def unheard():
    """A signal soon that another thread gets: whatever this one waits in is not interrupted, and has to look."""
    threads: list[Thread] = []

    def send(act: Callable[[], None]) -> None:
        def to_itself() -> None:
            time.sleep(0.2)
            signal.pthread_kill(get_ident(), signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, lambda number, frame: act())
        threads.append(Thread(target=to_itself))
        threads[-1].start()

    before = signal.getsignal(signal.SIGUSR1)
    yield send
    for thread in threads:
        thread.join()
    signal.signal(signal.SIGUSR1, before)


def test_a_read_that_hangs_ends_by_a_signal_that_wakes_nobody(unheard):
    def wake() -> None:
        raise WokenError

    start, over = time.monotonic(), Event()
    with pytest.raises(WokenError):
        unheard(wake)
        within(60.0, over.wait, 60.0)
    over.set()
    assert time.monotonic() - start < 30


def test_watching_ends_by_a_signal_that_wakes_nobody(unheard, tmp_path):
    stop, start = Event(), time.monotonic()
    source = open_source(str(images(tmp_path / "photos", 1)))
    parts = Parts.claim(tmp_path / "out", Manifest({}, ()))

    def once(images: Source, done: HashedIdSet) -> Tally:
        unheard(stop.set)
        return Tally()

    assert len(list(watch(once, parts, source, 60.0, stop))) == 1
    assert stop.is_set() and time.monotonic() - start < 30


HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # what runs behind a shell may not


HANGS = f"""{HEARS}
import sys, threading
from open_gem.label import sources
from open_gem.label.reading import within
walk = sources.walk
def hangs():
    print("hangs", file=sys.stderr, flush=True)
    threading.Event().wait()
def walk_and_hang(*arguments, **settings):
    yield from walk(*arguments, **settings)
    within(10_000, hangs)
sources.walk = walk_and_hang
from open_gem.cli import main
main()
"""


SLOW = f"""{HEARS}
import sys, time
from open_gem.label.labeling import Labeling
locate, said = Labeling.locate, []
def slowly(self, group):
    located = locate(self, group)
    if not said:
        print("first image", file=sys.stderr, flush=True)
        said.append(True)
    time.sleep(0.3)
    return located
Labeling.locate = slowly
from open_gem.cli import main
main()
"""


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(job, tiny):
    """The system allows this process files of 4 KB: a part is larger."""
    runs = job(60)
    command = [sys.executable, "-c", LIMITED, "label", str(runs.source), "-p", "cat", "--out", str(runs.out)]
    command += ["--model", tiny, "--device", "cpu", "--presence", "0", "--samples", "0"]
    full = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LIMIT": "4096"}, check=False)
    assert full.returncode == 2, full.stderr
    assert full.stderr.splitlines()[-1].startswith("error: cannot write ")
    assert "File too large" in full.stderr
    assert not list(runs.out.glob("*.parquet")) and not list(runs.out.glob(".*.tmp"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs.check(60)


@pytest.mark.full
def test_a_disk_that_is_full_for_real(job, tmp_path):
    """A file system of 100 KB; needs the right to mount one."""
    runs = job(400)
    runs.out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(runs.out)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        child = runs.start()
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 1 and "OutputError: cannot write" in errors and "No space left on device" in errors
        before = len(runs.written)
        assert 0 < before < 400 and not list(runs.out.glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(runs.out)], check=True)
        assert f"done {400 - before} 0 {before}" in runs.finish()
        runs.check(400)
        print({"written before the disk was full": before, "seen twice": len(runs.seen) - 400})
    finally:
        subprocess.run(["umount", str(runs.out)], check=True)


LIMITED = """
import os, resource
if "LIMIT" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]),) * 2)
from open_gem.cli import main
main()
"""


@pytest.mark.slow
def test_a_second_writer_refuses(job):
    runs = job(100)
    child = runs.start(PAUSE="0.2")
    wait(lambda: runs.seen, "the first image")
    with pytest.raises(InputError, match=f"is being written by process {child.pid} on "), writing(runs.out):
        pass
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    with writing(runs.out):  # the lock of a process that died is free
        pass


# Ray ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_either_engine_goes_on_with_what_the_other_began(job):
    runs = job(120)
    kill(runs, "local", 0.2, PAUSE="0.05")
    begun = len(runs.written)
    kill(runs, "ray", 0.7, PAUSE="0.05")
    between = len(runs.written)
    runs.finish("local")
    runs.check(120)
    assert begun <= between < 120


def processes(runs: Runs) -> list[int]:
    """Processes in which the model saw images, oldest first."""
    return list(dict.fromkeys(int(line.split()[0]) for line in runs.log.read_text().splitlines()))


@pytest.mark.full
def test_a_worker_of_ray_is_killed(job):
    runs = job(200)
    child = runs.start("ray", PAUSE="0.1")
    wait(lambda: len(runs.seen) > 60, "a part and more")
    [worker] = processes(runs)
    os.kill(worker, signal.SIGKILL)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors[-3000:]
    assert output.splitlines()[-1] == "done 200 0 0"
    assert len(processes(runs)) == 2
    runs.check(200)
    assert max(Counter(runs.seen).values()) == 2
    assert len(runs.seen) - 200 <= PART + UNDER_WAY


@pytest.mark.full
def test_ray_ends_in_order(job):
    runs = job(200)
    child = runs.start("ray", PAUSE="0.1")
    wait(lambda: len(runs.seen) > 60, "a part and more")
    child.send_signal(signal.SIGTERM)
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors[-3000:]
    done = len(runs.written)
    assert 50 < done < 200 and f"done {done} 0 0" in output
    assert set(runs.written) == set(runs.seen), "what the model has seen is written"
    runs.finish()
    runs.check(200)
    assert len(runs.seen) == 200, "nothing was done twice"


@pytest.mark.full
def test_a_node_of_ray_is_killed(job):
    runs = job(400)
    node = Path(__file__).parents[1].joinpath("label_nodes.py")
    arguments = [str(one) for one in (node, runs.source, runs.out, runs.model, runs.log)]
    environment = os.environ | {"ACTORS": "2", "PAUSE": "0.1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    runs.check(400)


@pytest.mark.full
def test_killed_ten_times_with_ray(job):
    runs = job(600)
    for _ in range(10):
        kill(runs, "ray", random.uniform(0, 4), PAUSE="0.2")  # actors may write the part at hand after that
    runs.finish("ray")
    runs.check(600)
    print({"kills": 10, "images": 600, "seen twice": len(runs.seen) - 600})
    assert len(runs.seen) - 600 <= 10 * (PART + UNDER_WAY)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_memory_is_flat_over_a_hundred_thousand_images(tmp_path, tiny):
    folder = images(tmp_path / "photos", 20)
    listing = tmp_path / "list.csv"
    names = sorted(path.name for path in folder.iterdir())
    lines = [f"{number},photos/{names[number % 20]}" for number in range(100_000)]
    listing.write_text("\n".join(["id,path", *lines]))
    runs = Runs(listing, tmp_path / "out", tiny)
    child = runs.start()
    sizes: dict[int, int] = {}
    while child.poll() is None:
        time.sleep(2)
        status = Path(f"/proc/{child.pid}/status").read_text() if child.poll() is None else ""
        resident = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
        sizes[len(runs.seen)] = resident[0] if resident else 0
    _, errors = child.communicate()
    assert child.returncode == 0, errors[-3000:]
    runs.check(100_000)
    early = max(size for count, size in sizes.items() if 10_000 <= count < 20_000)
    late = max(size for count, size in sizes.items() if count >= 80_000)
    print({"MB at 10 to 20 thousand": early // 1024, "MB at 80 to 100 thousand": late // 1024})
    assert late <= 1.05 * early
