"""decoder: the images of reading in-process, and an end to what takes too long, too much, or the process with it."""

import io
import os
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_gem.errors import ImageError
from open_gem.images.decoder import Decoder
from open_gem.images.read import ImageWarning, read_header, read_image

NOISE = np.random.default_rng(0).integers(0, 256, (13, 21, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def slow() -> bytes:
    """A small file of 40 million pixels, each a number in text: minutes of decoding."""
    return b"P3 8000 5000 254 " + b"1 " * (3 * 8000 * 5000 // 8)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(workers=2) as decoder:
        yield decoder


def same(decoder: Decoder, source: bytes | Path) -> None:
    ours, theirs = decoder.read(source, seconds=30), read_image(source)
    assert ours.mode == "RGB" and ours.size == theirs.size and ours.tobytes() == theirs.tobytes()
    assert not ours.info


def test_images_are_those_that_are_read_in_process(decoder: Decoder, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(NOISE), "JPEG", exif=exif)
    path = tmp_path / "turned.jpg"
    path.write_bytes(turned)
    many_strips = encoded(Image.fromarray(NOISE).resize((1000, 1501)), "PNG")
    for source in (turned, path, many_strips, encoded(Image.new("RGBA", (3, 70_000), (1, 2, 3, 4)), "PNG")):
        same(decoder, source)


@pytest.mark.parametrize(
    "source",
    [b"", b"hello", encoded(Image.fromarray(NOISE), "PNG")[:60], "nowhere/cats.jpg", "https://a.b/c.jpg", "a\0b"],
)
def test_errors_are_those_of_reading_in_process(decoder: Decoder, source: bytes | str) -> None:
    with pytest.raises(ImageError) as ours:
        decoder.read(source, seconds=30)
    with pytest.raises(ImageError) as theirs:
        read_image(source)
    assert str(ours.value) == str(theirs.value)


def test_an_image_that_takes_too_long_is_stopped_and_the_next_is_read(decoder: Decoder) -> None:
    data, start = slow(), time.monotonic()
    with pytest.raises(ImageError, match=r"^image bytes was not decoded within 0\.5 seconds$"):
        decoder.read(data, seconds=0.5)
    assert time.monotonic() - start < 5
    same(decoder, encoded(Image.fromarray(NOISE), "PNG"))


PNG = encoded(Image.fromarray(NOISE), "PNG")
linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks at processes as Linux shows them")


def children(parent: int | None = None) -> set[int]:
    """The processes that decode for this one, or for another."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        state, of = stat.rsplit(")", 1)[1].split()[:2]
        if of == str(parent or os.getpid()) and b"images.decoder" in command and state != "Z":
            found.add(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def precincts(side: int) -> bytes:
    """A JPEG2000 of one precinct a pixel, 200 bytes: OpenJPEG makes half a kilobyte of each before it decodes any."""
    data = bytearray(
        encoded(
            Image.new("L", (16, 16)),
            "JPEG2000",
            precinct_size=(8, 8),
            codeblock_size=(4, 4),
            num_resolutions=1,
            no_jp2=True,
        )
    )
    data[8:16] = data[24:32] = struct.pack(">II", side, side)
    style = data.index(b"\xff\x52")
    data[style + 1 + data[style + 3]] = 0
    return bytes(data)


@linux
def test_a_decoder_that_needs_more_memory_than_its_image_may_have_it_not() -> None:
    before = children()
    with Decoder(workers=1) as decoder:
        same(decoder, precincts(16))
        [pid] = children() - before
        with pytest.raises(ImageError, match=r"^image bytes cannot be read: "):  # and not the deadline
            decoder.read(precincts(4000), seconds=30)
        if alive(pid):  # 9 GB and a minute in-process
            status = Path(f"/proc/{pid}/status").read_text()
            peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
            assert peak < 800_000
        same(decoder, PNG)


@linux
def test_a_process_that_crashes_is_an_error_of_its_image_and_the_next_is_read() -> None:
    before = children()
    with Decoder(workers=1) as decoder, ThreadPoolExecutor(1) as pool:
        same(decoder, PNG)
        [pid] = children() - before
        waiting = pool.submit(decoder.read, slow(), seconds=60)
        time.sleep(0.3)
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(
            ImageError, match=r"image bytes cannot be read: .* ended \(signal 11\), out of memory or by"
        ):
            waiting.result(10)
        same(decoder, PNG)
        [pid] = children() - before
        os.kill(pid, signal.SIGKILL)  # while it waits: nobody's error
        assert within(5, lambda: not alive(pid))
        same(decoder, PNG)


@linux
@pytest.mark.slow
def test_a_process_that_is_halted_is_given_up() -> None:
    before = children()
    with Decoder(workers=1) as decoder:
        same(decoder, PNG)
        [pid] = children() - before
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ImageError, match=r"^image bytes was not decoded within 0\.1 seconds$"):
            decoder.read(PNG, seconds=0.1)
        assert not alive(pid)
        same(decoder, PNG)


@linux
@pytest.mark.parametrize("busy", [False, True])
def test_processes_end_with_their_parent_even_by_kill_9(busy: bool) -> None:
    code = (
        "import sys; from open_gem.images.decoder import Decoder; decoder = Decoder(); data = sys.stdin.buffer.read()\n"
        f"decoder.read(bytes.fromhex({PNG.hex()!r}), seconds=9); print('ready', flush=True)\n"
        "decoder.read(data, seconds=2); import time; time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(slow() if busy else PNG)
        parent.stdin.close()
        assert parent.stdout.readline() == b"ready\n"
        pids = children(parent.pid)
        assert pids
        time.sleep(0.3)
        parent.kill()
        parent.wait()
        assert within(10, lambda: not any(map(alive, pids)))


@linux
def test_an_interrupt_from_the_terminal_is_not_theirs() -> None:
    before = children()
    with Decoder(workers=1) as decoder:
        same(decoder, PNG)
        [pid] = children() - before
        assert os.getsid(pid) != os.getsid(0) and os.getpgid(pid) != os.getpgid(0)


@linux
def test_threads_share_as_many_processes_as_it_has(decoder: Decoder) -> None:
    images = [Image.new("RGB", (width, 9), (width, 1, 2)) for width in range(1, 41)]
    with Decoder(workers=2) as own, ThreadPoolExecutor(8) as pool:
        before = children()
        results = list(pool.map(lambda image: own.read(encoded(image, "PNG"), seconds=30), images))
        assert 1 <= len(children() - before) <= 2
    assert [result.tobytes() for result in results] == [image.tobytes() for image in images]
    assert children() == before


def test_waiting_for_a_process_does_not_count(decoder: Decoder) -> None:
    with Decoder(workers=1) as own, ThreadPoolExecutor(1) as pool:
        first = pool.submit(own.read, slow(), seconds=1.5)
        time.sleep(0.2)
        assert own.read(PNG, seconds=1).size == (21, 13)
        with pytest.raises(ImageError, match=r"within 1\.5 seconds"):
            first.result()


def test_who_waits_while_it_is_closed_gets_an_error_and_so_does_who_comes_later() -> None:
    decoder = Decoder(workers=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(decoder.read, slow(), seconds=60)
        time.sleep(0.5)
        decoder.close()
        with pytest.raises(ImageError, match="image bytes cannot be read: "):
            waiting.result(10)
    with pytest.raises(ImageError, match="the decoder is closed"):
        decoder.read(PNG, seconds=9)
    decoder.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork_the_processes_answer_the_parent_alone(decoder: Decoder) -> None:
    same(decoder, PNG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that other tests left behind
        pid = os.fork()
    if pid == 0:
        other = encoded(Image.new("RGB", (5, 6), (7, 8, 9)), "PNG")
        os._exit(0 if decoder.read(other, seconds=30).tobytes() == bytes([7, 8, 9]) * 30 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    same(decoder, PNG)


def test_headers_warnings_and_pages_come_through(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = encoded(Image.new("L", (4, 5)), "TIFF", save_all=True, append_images=[Image.new("L", (4, 5))])
    (tmp_path / "pages.tif").write_bytes(pages)
    monkeypatch.chdir(tmp_path)
    for source in (pages, "pages.tif"):
        assert decoder.read_header(source, seconds=30) == read_header(source) == ("TIFF", (5, 4), 2)
        assert decoder.read(source, seconds=30).info == {"pages": 2}
        assert decoder.read(source, seconds=float("inf")).size == (4, 5)
    with pytest.raises(ImageError, match=r"within 0\.001 seconds"):
        decoder.read(slow(), seconds=0)
    with pytest.raises(ImageError, match=r"^'gone\.tif' does not exist$"):
        decoder.read_header("gone.tif", seconds=30)
    with pytest.raises(ImageError, match="is 13x21 pixels, more than the 272 that"):
        decoder.read(PNG, seconds=30, max_pixels=272)
    with pytest.warns(ImageWarning, match="values up to 9: it is read as 0 to 65535"):
        decoder.read(encoded(Image.fromarray(np.full((4, 5), 9, np.uint16)), "PNG"), seconds=30)
    with pytest.raises(ImageError, match="expected a path or the bytes of a file, not int"):
        decoder.read(7, seconds=30)  # pyright: ignore[reportArgumentType]


def test_a_process_needs_no_torch() -> None:
    code = "import sys, open_gem.images.decoder; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
