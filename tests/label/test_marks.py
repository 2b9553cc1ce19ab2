"""Marks: the file, which detections are on the page, and the page in a real browser."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Visit, chromium
from labelled import rle_of
from PIL import Image

from open_gem.errors import InputError
from open_gem.label.marks import COLUMNS, Detection, choose, read_marks, write_page
from open_gem.label.parts import Manifest, Parts, row_of

LABELS = ("cat", 'dog, "old" </script>', "owl")
HEAD = ",".join(COLUMNS) + "\n"


def stored(label: str, box: list[int], mask: bool = True) -> dict[str, Any]:
    pixels = np.zeros((60, 80), bool)
    pixels[box[1] : box[3], box[0] : box[2]] = True
    known = dict.fromkeys(("score", "presence", "peak", "probability", "confidence"), 0.5)
    return {"label": label, "prompt": label, "xyxy": box, "rle": rle_of(pixels) if mask else None, **known}


@pytest.fixture
def parts(tmp_path) -> Parts:
    """Twelve images: twelve cats, four dogs, one owl; each image is of one colour."""
    folder = tmp_path / "photos"
    folder.mkdir()
    parts = Parts.claim(tmp_path / "labels", Manifest({}, LABELS, str(folder)))
    rows = []
    for number in range(12):
        id = f"{number:02}.png"
        Image.new("RGB", (80, 60), (20 * number, 90, 90)).save(folder / id)
        own = [stored(LABELS[0], [10, 10, 40 + number, 50])]
        own += [stored(LABELS[1], [50, 0, 70, 20], mask=False)] * (number < 4) + [stored(LABELS[2], [1, 2, 3, 4])] * (
            number == 5
        )
        rows.append(row_of(id, str(folder / id), status="ok", height=60, width=80, seconds=0, objects=own))
    parts.write("1", rows[:7])
    parts.write("2", rows[7:])
    return parts


# The file -------------------------------------------------------------------------------------------------------------


def test_a_file_of_marks(tmp_path):
    path = tmp_path / "marks.csv"
    path.write_text(HEAD + '"a,b.jpg",cat,1,2,3,4,right\nc.jpg,"the ""dog""",5,6,7,8,wrong\n', "utf-8-sig")
    expected = {
        Detection("a,b.jpg", "cat", (1, 2, 3, 4)): True,
        Detection("c.jpg", 'the "dog"', (5, 6, 7, 8)): False,
    }
    assert read_marks(path) == expected


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("id,label,mark\na,cat,right\n", "has no column 'left', expected id, label"),
        (HEAD + "a,cat,1,2,3,x,right\n", "line 2 has no box, expected whole numbers"),
        (HEAD + "a,cat,1,2\n", "line 2 has no box"),
        (HEAD + "a,cat,1,2,3,4,right\na,cat,1,2,3,5,maybe\n", "line 3 has the mark 'maybe', expected right or wrong"),
        (HEAD, "has no mark, expected a line for each"),
        (b"\xff\xfe\x00", "cannot read marks from .*UTF-8"),
        (None, "cannot read marks from .*No such file"),
    ],
)
def test_a_file_without_marks_is_refused(tmp_path, content, error):
    path = tmp_path / "marks.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=error):
        read_marks(path)


# The page -------------------------------------------------------------------------------------------------------------


def test_detections_are_random_and_as_many_of_each_label(parts):
    chosen = choose(parts, 9)
    assert Counter(detection.label for detection in chosen) == {LABELS[0]: 4, LABELS[1]: 4, LABELS[2]: 1}
    assert list(choose(parts, 9)) == list(chosen)
    assert sorted(detection.id for detection in chosen if detection.label == "cat") != [
        "00.png",
        "01.png",
        "02.png",
        "03.png",
    ]
    assert len(choose(parts, 100)) == 17


def test_images_that_cannot_be_read_are_left_out(parts, tmp_path):
    (tmp_path / "photos" / "05.png").unlink()
    skipped = []
    assert write_page(tmp_path / "marks.html", parts, 100, lambda *what: skipped.append(what)) == 15
    [(id, reason)] = skipped
    assert id == "05.png" and "No such file" in reason


def test_labels_without_detections_have_no_page(tmp_path):
    with pytest.raises(InputError, match=r"no detection in .* can be shown"):
        write_page(tmp_path / "marks.html", Parts.claim(tmp_path, Manifest({}, LABELS)), 100)
    assert not (tmp_path / "marks.html").exists()


def test_a_person_marks_detections(parts, tmp_path):
    path = tmp_path / "marks.html"
    write_page(path, parts, 100)
    with chromium() as browser:
        context = browser.new_context(accept_downloads=True)
        visit = Visit(context, path.as_uri())
        page, shown = visit.page, []
        for key in ("ArrowRight", "n", " ", "y", "ArrowLeft", "u", "ArrowRight"):  # right, wrong, skip, right, right
            shown.append((visit.text("#question"), visit.text("#about")))
            page.keyboard.press(key)
        assert visit.text("#count") == "5 of 17 seen, 4 marked"
        assert page.evaluate("document.querySelector('#image').naturalWidth") > 100
        page = Visit(context, path.as_uri()).page  # another visit goes on where this one was
        page.click("#wrong")
        assert page.inner_text("#count") == "6 of 17 seen, 5 marked"
        for _ in range(11):
            page.keyboard.press("s")
        assert page.inner_text("#question") == "Done" and page.is_disabled("#right")
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename == "marks.csv"
        download.value.save_as(tmp_path / "marks.csv")
        assert visit.complaints == []
    marks = read_marks(tmp_path / "marks.csv")
    assert list(marks.values()) == [True, False, True, True, False]
    for (question, id), detection in zip((shown[0], shown[1], shown[3]), marks, strict=False):
        assert (question, id) == (f"Is this “{detection.label}”?", detection.id)
    of_parts = {Detection.of(row["id"], own) for row in parts.rows("id", "objects") for own in row["objects"]}
    assert set(marks) < of_parts
    with (tmp_path / "marks.csv").open(encoding="utf-8", newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 700), (320, 480)])
def test_everything_fits_on_a_screen(parts, tmp_path, width, height):
    path = tmp_path / "marks.html"
    write_page(path, parts, 3)
    with chromium() as browser:
        page = Visit(browser.new_context(viewport={"width": width, "height": height}), path.as_uri()).page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for button in ("#right", "#wrong", "#skip", "#undo", "#download"):
            box = page.locator(button).bounding_box()
            assert box["height"] >= 44 and box["y"] + box["height"] <= height
        assert page.locator("#image").bounding_box()["height"] > 80


def test_the_page_asks_nothing_of_others(parts, tmp_path):
    write_page(tmp_path / "marks.html", parts, 100)
    text = (tmp_path / "marks.html").read_text("utf-8")
    assert "://" not in text
    document = json.loads(text.partition('id="detections">')[2].partition("</script>")[0])
    assert {entry["label"] for entry in document["detections"]} == set(LABELS)
    assert all(Path(entry["id"]).suffix == ".png" for entry in document["detections"])
