"""The page where things go wrong, and for people who do without a mouse, without sight, or with a small screen."""

import re
from pathlib import Path

import pytest
from browser import FRAME
from PIL import Image

import open_gem

pytest.importorskip("fastapi", reason="the server is not installed: pip install open_gem[serve]")

PAGE = Path(open_gem.__file__).parent / "serve" / "page"
FAILED = "Failed to load resource"

# Requests to the server take longer, and are counted.
SLOWLY = """
const send = window.fetch;
window.flights = { now: 0, most: 0, asked: [] };
window.fetch = async (address, options = {}) => {
  if (!String(address).includes("v1/images")) return send(address, options);
  if (typeof options.body === "string") flights.asked.push(JSON.parse(options.body).prompts);
  flights.most = Math.max(flights.most, ++flights.now);
  await new Promise((resolve) => setTimeout(resolve, 120));
  try { return await send(address, options); } finally { flights.now--; }
};
"""


def test_one_request_in_flight_and_only_the_newest_prompt_waits(visit, picture):
    page = visit(script=SLOWLY).open().look_at(picture)
    page.page.type("#prompt", "a white rabbit", delay=15)
    page.shows("a white rabbit").switch(compare=True).shows("a white rabbit", panels=2)
    flights = page.page.evaluate("flights")
    asked = [prompt for prompts in flights["asked"] for prompt in prompts]
    assert flights["most"] == 1 and asked[-2:] == ["a white rabbit"] * 2  # by gem, then by clip
    assert len(asked) < len("a white rabbit") and all(len(prompts) == 1 for prompts in flights["asked"])


def test_a_picture_given_up_for_another_is_no_trouble(visit, picture):
    page = visit(script=SLOWLY).open()
    page.page.fill("#prompt", "snail")
    for _ in range(3):
        page.look_at(picture)
    assert not page.shows("snail").page.is_visible("#trouble")
    assert page.page.evaluate("flights.most") == 1


SECOND_IS_FASTER = """
const decode = window.createImageBitmap;
let calls = 0;
window.createImageBitmap = async (...given) => {
  if (calls++ === 0) await new Promise((resolve) => setTimeout(resolve, 400));
  return decode(...given);
};
"""


def test_the_picture_that_was_picked_last_is_shown(visit, picture, tmp_path):
    page = visit(script=SECOND_IS_FASTER).open()
    slow = tmp_path / "slow.png"
    slow.write_bytes(picture.read_bytes())
    page.page.fill("#prompt", "snail")
    page.page.set_input_files("#file", slow)
    page.look_at(picture).shows("snail")
    page.page.wait_for_timeout(500)
    assert "a scene.png" in page.text("#cli")


def test_a_server_that_is_gone_and_comes_back(visit, picture):
    page = visit().open().look_at(picture, "snail")
    page.page.context.set_offline(True)
    page.page.fill("#prompt", "rabbit")
    page.page.wait_for_selector("#trouble:not([hidden])")
    assert page.text("#trouble p") == "The server cannot be reached."
    assert [row[0] for row in page.rows()] == ["snail"]  # what is there can be read
    page.page.context.set_offline(False)
    page.page.click("#retry")
    page.shows("rabbit")
    assert not page.page.is_visible("#trouble")
    page.forgive(FAILED)


def test_a_busy_server_is_asked_again(visit, picture):
    page = visit().open()
    busy = {"status": 429, "headers": {"Retry-After": "3"}, "json": {"error": "Too many requests."}}
    page.page.route("**/ground", lambda route: route.fulfill(**busy), times=1)
    page.page.fill("#prompt", "snail")
    page.look_at(picture)
    page.page.wait_for_function("() => document.querySelector('#status').textContent.includes('Trying again in 3 s')")
    assert not page.shows("snail").page.is_visible("#trouble")
    page.forgive(FAILED)


def test_an_image_that_the_server_no_longer_has_is_sent_again(visit, picture):
    page = visit().open()
    with page.page.expect_response("**/v1/images") as uploaded:
        page.look_at(picture, "snail")
    gone = page.page.evaluate("(id) => fetch(`v1/images/${id}`, { method: 'DELETE' })", uploaded.value.json()["id"])
    assert gone is not None
    page.page.fill("#prompt", "rabbit")
    assert not page.shows("rabbit").page.is_visible("#trouble")
    page.forgive(FAILED)


def draw_box(page) -> str:
    """Draw a box by keyboard; return the id of the image that it is in."""
    page.page.focus("canvas")
    for key in ("ArrowUp", "Enter", "ArrowLeft", "ArrowLeft", "ArrowDown", "ArrowDown"):
        page.page.keyboard.press(key)
    with page.page.expect_response("**/ground") as answered:
        page.page.keyboard.press("Enter")
    return answered.value.url.split("/")[-2]


def test_an_exemplars_image_that_the_server_no_longer_has_is_sent_again(visit, picture, tmp_path):
    page = visit().open().look_at(picture, "snail")
    gone = draw_box(page)
    page.shows("box 1 in a scene.png")
    assert page.page.evaluate("async (id) => (await fetch(`v1/images/${id}`, { method: 'DELETE' })).ok", gone)
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64), "white").save(other)
    page.look_at(other).shows("box 1 in a scene.png")
    assert not page.page.is_visible("#trouble") and page.texts(".chip.failed") == []
    page.forgive(FAILED)


def test_a_document_is_saved_once_a_lost_exemplar_has_been_sent_again(visit, picture, tmp_path):
    page = visit().open().look_at(picture, "snail")
    gone = draw_box(page)
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64), "white").save(other)
    page.look_at(other).shows("box 1 in a scene.png")
    page.settled()
    assert page.page.evaluate("async (id) => (await fetch(`v1/images/${id}`, { method: 'DELETE' })).ok", gone)
    with page.page.expect_download():  # the first try fails, and the image is sent again
        page.page.evaluate("setInterval(() => document.querySelector('#json').click(), 500)")
    page.forgive(FAILED)


def test_a_document_is_not_asked_of_a_server_that_has_no_picture_yet(visit, picture):
    page = visit().open()
    page.page.route("**/v1/images", lambda route: None)
    page.page.fill("#prompt", "snail")
    page.look_at(picture)
    page.page.click("#json")
    page.page.wait_for_selector("#trouble:not([hidden])")
    assert page.text("#trouble p") == "The server does not have the image yet."


def test_what_is_no_picture_is_refused_in_words(visit, picture, tmp_path):
    page = visit().open()
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    page.look_at(text)
    page.page.wait_for_selector("#trouble:not([hidden])")
    assert page.text("#trouble p") == "notes.png is not an image that this browser can show."
    assert not page.page.is_visible("#retry")
    page.page.click("#dismiss")
    page.look_at(picture, "snail")
    assert not page.page.is_visible("#trouble")


def test_a_server_that_asks_for_a_token_and_has_limits(visit, picture, start, tmp_path):
    with start(token="a-secret", max_prompt=20, max_body=picture.stat().st_size + 2000) as address:
        page = visit(address)
        page.page.wait_for_selector("dialog[open]")
        assert not page.page.is_visible(".wrong")
        page.page.fill("dialog input", "a-guéss 猫")  # what no header can carry is not even sent
        page.page.press("dialog input", "Enter")
        assert page.page.is_visible("dialog[open]") and not page.page.is_visible(".wrong")
        page.page.fill("dialog input", "a-guess")
        page.page.press("dialog input", "Enter")
        page.page.wait_for_selector(".wrong:not([hidden])")
        page.page.fill("dialog input", "a-secret")
        page.page.press("dialog input", "Enter")
        page.open().look_at(picture, "snail")
        assert "Authorization: Bearer $OPEN_GEM_TOKEN" not in page.text("#cli")  # the picture is no sample
        page.page.reload()
        page.open().look_at(picture, "rabbit", "a prompt longer than twenty letters", "snail")
        assert not page.page.is_visible("dialog")  # asked for once
        page.page.wait_for_selector(".chip.failed")
        assert page.texts(".chip.failed .text") == ["a prompt longer than twenty letters"]
        assert page.texts(".chip:not(.failed) .presence") != []
        large = tmp_path / "large.png"
        large.write_bytes(picture.read_bytes() + bytes(4000))
        page.look_at(large)
        page.page.wait_for_selector("#trouble:not([hidden])")
        page.page.wait_for_selector("#results", state="hidden")  # in the frame that follows
        assert not page.page.is_visible("#retry")
        assert page.text(".caption") == page.text("#trouble p") and "bytes" in page.text(".caption")
        page.forgive(FAILED)
        page.page.context.close()


# Without a mouse, without sight, on a small screen --------------------------------------------------------------------


FOCUSED = """() => {
  const one = document.activeElement, seen = one.id === "file" ? one.nextElementSibling : one;
  return [one.id || one.name || one.className || one.localName, getComputedStyle(seen).outlineStyle];
}"""
TOUCH = "getComputedStyle(document.querySelector('#panels canvas')).touchAction"
CONTROLS = {"skip", "file", "prompt", "heat", "mask", "boxes", "point", "all", "threshold", "opacity", "limit"} | {
    "compare",
    "canvas",
    "png",
    "json",
    "copy",
}


TOLD = "(text) => document.querySelector('#live').textContent.startsWith(text)"


def test_everything_can_be_done_by_keyboard(visit, picture):
    page = visit().open().look_at(picture, "snail")
    keyboard = page.page.keyboard
    page.page.focus(".skip")
    reached = ["skip"]
    while "body" not in reached and len(reached) < 60:
        keyboard.press("Tab")
        name, outline = page.page.evaluate(FOCUSED)
        assert outline != "none" or name == "body", f"nobody sees the focus on {name}"
        reached.append(name)
    assert not CONTROLS.difference(reached)
    page.page.focus("#prompt")
    keyboard.type("hamburger, rabbit")
    keyboard.press("Enter")
    page.shows("rabbit")
    page.page.focus(".chip .choose")
    keyboard.press("Enter")
    page.shows("snail")
    keyboard.press("Delete")
    page.shows("rabbit")
    assert page.texts(".chip .text") == ["hamburger", "rabbit"] and page.page.evaluate(FOCUSED)[0] == "choose"
    page.page.focus("#threshold")
    keyboard.press("ArrowRight")
    page.page.evaluate(FRAME)
    assert page.text("output[for=threshold]") == "0.51"
    page.settled().page.wait_for_function(TOLD, arg="rabbit: present")  # else it would be told after what follows
    page.page.focus("canvas")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        keyboard.press(key)
    read = page.text("#live")
    assert re.match(r"x \d+, y \d+ · rabbit -?0\.\d+ \(heat", read) and read == page.text(".readout")
    keyboard.press("Escape")
    assert page.text(".readout").startswith("Point at")
    page.page.focus("canvas")
    for key in ("ArrowRight", "Enter", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
        keyboard.press(key)
    assert page.page.is_visible(".band") and page.text("#live").startswith("x ")
    keyboard.press("Enter")
    page.shows("box 1 in a scene.png")
    page.forgive("422")  # the first letters may be no word that the model knows


def test_a_finger_scrolls_the_page_unless_it_is_to_draw(visit, picture):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True).open().look_at(picture, "snail")
    assert page.page.evaluate(TOUCH) == "pan-y"
    page.page.locator("#panels canvas").scroll_into_view_if_needed()
    frame = page.page.locator("#panels canvas").bounding_box()
    touch = page.page.context.new_cdp_session(page.page)

    def drag() -> None:
        for kind, share in [("touchStart", 0.2), ("touchMove", 0.4), ("touchMove", 0.6)]:
            point = {"x": frame["x"] + share * frame["width"], "y": frame["y"] + share * frame["height"]}
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    drag()
    assert page.texts(".chip .text") == ["snail"]
    page.switch(draw=True)
    assert page.page.evaluate(TOUCH) == "none"
    page.page.locator("#panels canvas").scroll_into_view_if_needed()
    frame = page.page.locator("#panels canvas").bounding_box()
    drag()
    page.shows("box 1 in a scene.png")


def test_what_was_found_is_told(visit, picture):
    page = visit().open().look_at(picture, "rabbit")
    page.page.wait_for_function(TOLD, arg="rabbit: present, presence")
    page.page.fill("#prompt", "fire engine")
    page.page.wait_for_function(TOLD, arg="fire engine: absent")
    assert "fire engine" in page.page.get_attribute("canvas", "aria-label")


SHADE = "getComputedStyle(document.body).backgroundColor"


def test_no_barrier_that_axe_knows(visit, picture):
    axe = pytest.importorskip("axe_playwright_python.base", reason="no axe: pip install axe-playwright-python")
    page = visit(viewport={"width": 360, "height": 740}).open()
    page.page.evaluate(axe.AXE_SCRIPT)
    found = []

    def examine(step: str, scheme: str) -> None:
        page.page.emulate_media(color_scheme=scheme)
        for problem in page.page.evaluate("axe.run()")["violations"]:
            found.extend((step, scheme, problem["id"], node["failureSummary"]) for node in problem["nodes"])

    examine("empty", "light")
    page.look_at(picture, "snail", "fire engine").switch(compare=True).shows("fire engine", panels=2)
    page.page.evaluate("document.getElementById('trouble').hidden = false")
    examine("results", "light")
    shades = [page.page.evaluate(SHADE)]
    examine("results", "dark")
    shades.append(page.page.evaluate(SHADE))
    assert found == []
    light, dark = ([int(part) for part in re.findall(r"\d+", shade)] for shade in shades)
    assert min(light) > 220 and max(dark) < 60


def test_a_small_screen_and_prompts_of_all_kinds(visit, picture):
    hostile = ["<img src=x onerror=alert(1)>", "w" * 60, "猫 \u202eevil\u202c 🐈", "' \" ` $HOME"]
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True).open().look_at(picture, *hostile)
    page.switch(compare=True).shows(hostile[-1], panels=2)
    assert page.page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.page.locator("main img[src=x]").count() == 0
    assert page.texts(".chip .text")[:2] == hostile[:2]
    tops = [page.page.locator(part).bounding_box()["y"] for part in ("#prompts", "#stage", "#layers", "#results")]
    assert tops == sorted(tops)
    page.forgive("422")  # the model knows no word of these prompts


def test_the_page_is_small_and_needs_nothing_from_elsewhere():
    files = sorted(PAGE.iterdir())
    assert sum(path.stat().st_size for path in files) < 90_000
    for path in files:
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|style=|\bon\w+=\"|innerHTML|eval\(", text), path
