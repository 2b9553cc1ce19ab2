"""The page in a real browser, on a real server with the model in the package: what people do, and what they see."""

import json
import re
import shlex
from base64 import b64encode
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Visit
from PIL import Image
from pycocotools import mask as coco
from typer.testing import CliRunner

from open_gem import Exemplar
from open_gem.cli import app as commands
from open_gem.data.scenes import scene
from open_gem.images import draw
from open_gem.images.colors import OPACITY

pytest.importorskip("fastapi", reason="the server is not installed: pip install open_gem[serve]")

PROMPTS = ("snail", "rabbit", "hamburger")


def lit(pixels: np.ndarray, mask: np.ndarray) -> float:
    """How much hotter than elsewhere, red over blue, a part of the picture is painted."""
    warmth = pixels[..., 0] - pixels[..., 2]
    return float(warmth[mask].mean() - warmth[~mask].mean())


# Seeing ---------------------------------------------------------------------------------------------------------------


def test_the_right_object_is_lit_as_a_prompt_is_typed(visit, picture, drawn):
    page = visit().open().look_at(picture).switch(boxes=False, point=False).slide("opacity", 1)
    for prompt in PROMPTS:
        page.page.fill("#prompt", "")
        page.page.type("#prompt", prompt)
        pixels = page.shows(prompt).pixels()
        warmth = {name: lit(pixels, mask) for name, mask in zip(drawn.names, drawn.masks, strict=True)}
        assert max(warmth, key=warmth.__getitem__) == prompt, warmth
        assert "ms from the last letter" in page.text("#status")
        x, y = map(int, page.rows()[-1][4].split(", "))
        assert drawn.masks[drawn.names.index(prompt), y, x]
    page.forgive("422")  # the first letters may be no word that the model knows


def test_heat_has_the_librarys_colours_and_opacity(visit, picture, drawn, embedded):
    page = visit().open().look_at(picture, "snail").switch(boxes=False, point=False)
    heat = embedded(picture, ["snail"]).heatmaps()[0].numpy()
    opacity = OPACITY * heat[..., None]
    expected = np.asarray(Image.open(picture)) * (1 - opacity) + draw.heat_colors(heat) * opacity
    assert np.abs(page.pixels() - expected).max() <= 6 and np.abs(page.pixels() - expected).mean() < 0.6


def test_boxes_and_points_of_absent_labels_are_not_drawn(visit, picture):
    page = visit().open().look_at(picture, "fire engine")
    assert [row[4:] for row in page.rows()] == [["", ""]]
    drawn = page.pixels()
    assert (page.switch(boxes=False, point=False, mask=True).pixels() == drawn).all()
    page.slide("limit", 0)
    assert all(page.rows()[0][4:])


def test_a_model_that_is_not_for_photographs_says_so_of_a_file_but_not_of_a_sample(visit, picture, embedded):
    page = visit().open()
    assert not page.page.is_visible("#caution")
    page.look_at(picture, "snail")
    assert embedded.caution in page.text("#caution")
    page.page.click("#samples button >> nth=0")
    page.page.wait_for_selector("#caution", state="hidden")


def test_masks_are_those_of_the_server(visit, picture, drawn, embedded):
    page = visit().open().look_at(picture, "rabbit").switch(heat=False, mask=True, boxes=False, point=False)
    page.slide("threshold", 0.35).slide("opacity", 1)
    marked = (page.pixels() != drawn.image).any(axis=-1)
    with page.page.expect_download() as download:
        page.click("#json")
    document = json.loads(download.value.path().read_text("utf-8"))
    [answer] = document["answers"]
    mask = np.any([coco.decode(obj["mask"]) for obj in answer["objects"]], axis=0)
    assert (marked & mask).sum() / (marked | mask).sum() > 0.99
    [row] = page.rows()
    assert row[4:] == [", ".join(map(str, answer["objects"][0][part])) for part in ("point", "box")]


def test_absent_labels_are_faded(visit, picture, drawn):
    page = visit().open().look_at(picture, "fire engine").switch(boxes=False, point=False).slide("opacity", 1)
    assert "absent" in page.text(".chip") and "is absent" in page.text(".caption")
    assert np.ptp(page.pixels()[150:, 200:], axis=-1).max() < np.ptp(drawn.image[150:, 200:].astype(int), axis=-1).max()
    page.slide("limit", 0)
    assert np.ptp(page.pixels()[150:, 200:], axis=-1).max() > 200  # in colours again
    assert "absent" not in page.text(".chip")


def test_sliders_and_layers_ask_nothing_of_the_server(visit, picture):
    page = visit().open().look_at(picture, *PROMPTS)
    page.settled()
    asked: list[str] = []
    page.page.on("request", lambda request: asked.append(request.url))
    seen = [page.pixels()]
    for name, value in [("threshold", 0.3), ("threshold", 0.8), ("opacity", 0.2), ("limit", 1), ("limit", 0.5)]:
        seen.append(page.slide(name, value).pixels())
        assert page.text(f"output[for={name}]") == f"{value:.2f}"
    for layer in ("mask", "all", "heat", "point", "boxes"):
        seen.append(page.switch(**{layer: not page.page.is_checked(f"input[name={layer}]")}).pixels())
    assert all((one != other).any() for one, other in pairwise(seen)) and asked == []
    page.page.click(".chip >> nth=0 >> .choose")
    page.shows(PROMPTS[0])
    assert asked == []  # what was answered once is known


def test_two_methods_side_by_side(visit, picture, drawn):
    page = visit().open().look_at(picture, *PROMPTS).switch(boxes=False, point=False, compare=True)
    page.shows(PROMPTS[-1], panels=2).slide("opacity", 1)
    assert page.page.locator("select").evaluate_all("(all) => all.map((one) => one.value)") == ["clip", "gem"]
    mask = drawn.masks[drawn.names.index(PROMPTS[-1])]
    clip, gem = (lit(page.pixels(panel), mask) for panel in (0, 1))
    assert gem > clip + 30  # the paper in one glance
    page.page.hover("canvas >> nth=1", position={"x": 5, "y": 5})
    for reading in page.texts(".readout"):
        assert re.fullmatch(
            rf"x \d+, y \d+ · {PROMPTS[-1]} \S+ \(heat \d\.\d\d\) · most similar: \w+ -?0\.\d+", reading
        )
    page.page.select_option("select >> nth=0", "maskclip")
    page.page.wait_for_function(NAMED, arg="maskclip,gem")
    page.shows(PROMPTS[-1], panels=2)
    page.switch(compare=False).shows(PROMPTS[-1], panels=1)


READING = re.compile(r"x (\d+), y (\d+) · hamburger (\S+) \(heat (\S+)\) · most similar: (.+) (\S+)")


def test_the_probe_reads_the_librarys_values(visit, picture, drawn, embedded):
    page = visit().open().look_at(picture, *PROMPTS)
    result = embedded(picture, list(PROMPTS))
    cosines = result.heatmaps("cosine").stack().numpy()
    frame = page.page.locator("canvas").bounding_box()
    for y, x in [(40, 60), (200, 130), (300, 400)]:
        scale = frame["width"] / 448
        page.page.hover("canvas", position={"x": (x + 0.5) * scale, "y": (y + 0.5) * scale})
        read = READING.fullmatch(page.text(".readout"))
        assert read, page.text(".readout")
        assert abs(int(read[1]) - x) <= 1 and abs(int(read[2]) - y) <= 1
        assert abs(float(read[3]) - cosines[2, y, x]) < 0.01
        assert abs(float(read[4]) - result.heatmaps()[2][y, x]) < 0.02
        assert read[5] == PROMPTS[cosines[:, y, x].argmax()] and abs(float(read[6]) - cosines[:, y, x].max()) < 0.01


# Query by example -----------------------------------------------------------------------------------------------------

SNAIL = (35, 115, 169, 244)  # left, top, right, bottom in the first scene


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another scene with a snail."""
    path = tmp_path_factory.mktemp("another") / "another.png"
    Image.fromarray(scene(44, (336, 448)).image).save(path)
    return path


def drag(page: Visit, box: tuple[int, int, int, int]) -> None:
    """Draw a box, in pixels of an image of 448 pixels' width, by the mouse."""
    canvas = page.page.locator("#panels canvas")
    page.settled()  # a table that is filled meanwhile would move the image
    canvas.scroll_into_view_if_needed()
    frame = canvas.bounding_box()
    left, top, right, bottom = (side * frame["width"] / 448 for side in box)
    page.page.mouse.move(frame["x"] + left, frame["y"] + top)
    page.page.mouse.down()
    page.page.mouse.move(frame["x"] + right, frame["y"] + bottom, steps=3)
    assert page.page.is_visible(".band")
    page.page.mouse.up()
    assert not page.page.is_visible(".band")


def test_a_box_drawn_in_one_image_is_looked_for_in_another(visit, picture, another, embedded, monkeypatch):
    page = visit().open().look_at(picture, "rabbit")
    drag(page, SNAIL)
    name = "box 1 in a scene.png"
    page.shows(name)
    assert page.texts(".chip .text") == ["rabbit", name]
    assert page.page.locator(".chip .crop").evaluate_all("(all) => all.map((one) => one.naturalWidth)") == [0, 48]
    page.look_at(another).shows(name)
    rabbit, row = page.rows()
    monkeypatch.chdir(picture.parent)
    (picture.parent / another.name).write_bytes(another.read_bytes())
    _, *words = shlex.split(page.text("#cli"))
    drawn: Any = tuple(map(int, words[words.index("--like") + 1].rpartition(":")[2].split(",")))
    np.testing.assert_allclose(drawn, SNAIL, atol=2)
    result = embedded(another, ["rabbit", Exemplar(picture, drawn)])
    assert [row[2] for row in (rabbit, row)] == [
        f"{100 * result.presence[0]:.0f} % (absent)",
        f"{100 * result.presence[1]:.0f} %",
    ]
    x, y = map(int, row[4].split(", "))
    other = scene(44, (336, 448))
    assert row[0] == name and other.masks[other.names.index("snail"), y, x]
    ran = CliRunner().invoke(commands, [*words, "--json", "--quiet"])
    assert ran.exit_code == 0, ran.output
    described = json.loads(ran.stdout)["labels"]
    names: dict[str, Any] = {}
    exec(page.text("#python"), names)
    assert [label["label"] for label in described] == ["rabbit", name] == list(names["result"].labels)
    assert row[3] == f"{described[1]['score']:.3f}" == f"{names['result'].scores[1]:.3f}"


def test_a_document_has_texts_and_boxes(visit, picture):
    page = visit().open().look_at(picture, "rabbit")
    drag(page, SNAIL)
    page.shows("box 1 in a scene.png")
    page.page.fill("#prompt", "hamburger")
    page.shows("hamburger")
    with page.page.expect_download() as download:
        page.click("#json")
    answers = json.loads(download.value.path().read_text("utf-8"))["answers"]
    labels = [[label["label"] for label in answer["labels"]] for answer in answers]
    assert labels == [["rabbit", "hamburger"], ["box 1 in a scene.png"]]


def test_a_click_is_no_box_and_a_box_is_removed_like_a_text(visit, picture):
    page = visit().open().look_at(picture, "rabbit")
    page.click("#panels canvas")
    assert page.texts(".chip .text") == ["rabbit"]
    for _ in range(2):
        drag(page, SNAIL)
    page.shows("box 2 in a scene.png").click(".chip:nth-child(2) .remove")
    page.page.wait_for_function("() => document.querySelectorAll('.chip').length === 2")
    assert page.texts(".chip .text") == ["rabbit", "box 2 in a scene.png"]


def test_a_box_that_a_method_does_not_take_says_why(visit, picture):
    page = visit().open().look_at(picture, "rabbit")
    drag(page, SNAIL)
    page.page.select_option("select", "gradcam")
    page.page.wait_for_selector(".chip.failed")
    assert page.texts(".chip.failed .text") == ["box 1 in a scene.png"]
    assert "use another method" in page.text(".caption")
    page.page.click(".chip .choose >> nth=0")
    page.shows("rabbit").forgive("422")


# Bringing and taking --------------------------------------------------------------------------------------------------

NAMED = "(name) => document.querySelector('#cli').textContent.includes(name)"
GIVE = """async ([kind, bytes]) => {
  const given = new DataTransfer();
  const content = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
  given.items.add(new File([content], `${kind}.png`, { type: "image/png" }));
  const how = { bubbles: true, cancelable: true, clipboardData: given, dataTransfer: given };
  const event = kind === "paste" ? new ClipboardEvent("paste", how) : new DragEvent("drop", how);
  document.querySelector("main").dispatchEvent(event);
}"""


def test_a_picture_is_dropped_or_pasted(visit, picture):
    page = visit().open()
    page.page.fill("#prompt", "rabbit")
    for kind in ("drop", "paste"):
        page.page.evaluate(GIVE, [kind, b64encode(picture.read_bytes()).decode()])
        page.page.wait_for_function(NAMED, arg=f"{kind}.png")
        page.shows("rabbit")


def test_a_sample_brings_its_prompts_and_what_was_typed_stays(visit):
    page = visit().open()
    page.page.fill("#prompt", "fire engine, ")
    page.page.click("#samples button >> nth=0")
    page.page.wait_for_selector("canvas[data-shows]:not([data-shows=''])")
    first = page.texts(".chip .text")
    page.page.click("#samples button >> nth=1")
    page.page.wait_for_selector("#samples li:nth-child(2) [aria-pressed=true]")
    second = page.texts(".chip .text")
    assert first[0] == second[0] == "fire engine" and first[1:] != second[1:] and len(second) > 1
    address, command = page.text("#cli").splitlines()
    assert address.startswith("curl ") and command.startswith("open-gem ground ")


def test_the_lines_reproduce_the_view(visit, picture, monkeypatch):
    page = visit().open().look_at(picture, *PROMPTS).switch(compare=True).slide("threshold", 0.4)
    page.shows(PROMPTS[-1], panels=2)
    rows = page.rows()
    monkeypatch.chdir(picture.parent)
    _, *words = shlex.split(page.text("#cli"))
    ran = CliRunner().invoke(commands, [*words, "--json", "--quiet"])
    assert ran.exit_code == 0, ran.output
    documents = {document["method"]["name"]: document for document in map(json.loads, ran.stdout.splitlines())}
    names: dict[str, Any] = {}
    exec(page.text("#python"), names)
    assert len(rows) == 6 and documents.keys() == {"clip", "gem"}
    for label, method, _, score, point, box in rows:
        described = next(each for each in documents[method]["labels"] if each["label"] == label)
        best = next(obj for obj in documents[method]["objects"] if obj["label"] == label)
        assert score == f"{described['score']:.3f}" and point == ", ".join(map(str, described["point"]))
        assert box == ", ".join(map(str, best["box"]))
        assert names["results"][method].boxes(0.4)[PROMPTS.index(label)].xyxy[0].tolist() == best["box"]
    assert names["masks"].stack().shape == (3, 336, 448)


def test_a_png_as_large_as_the_picture(visit, picture, drawn):
    page = visit().open().look_at(picture, "snail").switch(compare=True)
    page.shows("snail", panels=2)
    with page.page.expect_download() as download:
        page.click("#png")
    assert download.value.suggested_filename == "a scene.open_gem.png"
    saved = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    assert np.array_equal(saved[:336, :448], page.pixels(0)) and np.array_equal(saved[:336, -448:], page.pixels(1))
    assert saved.shape[0] > 336 and saved[336:].min() == 0  # words below


def test_lines_are_copied(visit, picture, address):
    page = visit().open()
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    page.look_at(picture, "snail")
    for which in ("cli", "python"):
        page.click(f"[data-copies={which}]")
        page.page.wait_for_selector(f"[data-copies={which}]:text('Copied')")
        assert page.page.evaluate("navigator.clipboard.readText()") == page.page.text_content(f"#{which}")


@pytest.mark.parametrize("size", [(130, 100), (900, 1200)])
def test_pictures_that_are_painted_larger_or_smaller_than_they_are(visit, embedded, tmp_path, size):
    path = tmp_path / "other.png"
    Image.fromarray(scene(1, size).image).save(path)
    page = visit().open().look_at(path, "balloon")
    result = embedded(path, ["balloon"])
    painted = page.pixels().shape
    assert painted[0] / painted[1] == pytest.approx(size[0] / size[1], rel=0.01)
    good = int(np.ceil(size[0] / painted[0]))  # pixels of the picture in one that is painted
    [[*_, point, box]] = page.rows()
    for told, true in [(point, result.points()[0]), (box, result.boxes()[0].xyxy[0])]:
        assert np.abs(np.array(told.split(", "), dtype=int) - true.numpy()).max() <= good
