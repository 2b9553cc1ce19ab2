"""The routes of `open-gem serve` that Label Studio asks, and the images they may fetch."""

import json
import threading
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest
from serving import Server, png

from open_gem.errors import InputError
from open_gem.serve.errors import RequestError
from open_gem.serve.label_studio import Control, Source, controls_of, image_of, typed_prompts
from open_gem.serve.settings import Settings

CONFIG = """<View>
  <Image name="photo" value="$picture"/>
  <RectangleLabels name="frames" toName="photo" model_score_threshold="0">
    <Label value="Cat" predicted_values="cat, kitten"/><Label value="Dog"/>
  </RectangleLabels>
  <PolygonLabels name="shapes" toName="photo" model_score_threshold="0"><Label value="Dog"/></PolygonLabels>
  <Choices name="mood" toName="photo"><Choice value="calm"/></Choices>
</View>"""


class LabelStudio(BaseHTTPRequestHandler):
    """Serves an image to whoever has the token; records the requests."""

    asked: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        LabelStudio.asked.append((self.path, self.headers["Authorization"]))
        allowed = self.headers["Authorization"] in ("Token legacy", "Bearer short")
        status = 302 if "away" in self.path else 200 if allowed else 401
        self.answer(status, png(64, 64))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        LabelStudio.asked.append((self.path, body["refresh"]))
        self.answer(200, json.dumps({"access": "short"}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:1/secret")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture(scope="module")
def studio() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), LabelStudio)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(tiny_localizer, studio):
    server = Server(tiny_localizer, Settings(label_studio=Source(studio, "legacy")))
    yield server
    server.stop()


def predict(server: Server, *pictures: object, config: str = CONFIG) -> list[dict]:
    tasks = [{"id": index, "data": {"picture": picture}, "meta": {}} for index, picture in enumerate(pictures)]
    answer = server.client.post(
        "/predict", json={"tasks": tasks, "label_config": config, "project": "1.2", "params": {}}
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_version"].startswith("open_gem")
    return answer.json()["results"]


def test_regions_are_of_the_projects_own_controls(server, tiny_localizer):
    data = png(64, 128)
    [prediction] = predict(server, "data:image/png;base64," + b64encode(data).decode())
    expected = tiny_localizer(data, {"Cat": ("cat", "kitten"), "Dog": "Dog"})
    best: dict[str, float] = {}
    for obj in expected.objects(presence=0):
        best[obj.label] = max(best.get(obj.label, 0.0), obj.confidence)

    frames = [one for one in prediction["result"] if one["from_name"] == "frames"]
    shapes = [one for one in prediction["result"] if one["from_name"] == "shapes"]
    assert len(frames) + len(shapes) == len(prediction["result"])
    assert {one["value"]["rectanglelabels"][0] for one in frames} >= {"Cat"}
    assert {tuple(one["value"]["polygonlabels"]) for one in shapes} == {("Dog",)}
    assert prediction["score"] == pytest.approx(max(best.values()), abs=1e-5)
    assert len(server.service.cache) == 0
    boxes, scores = {tuple(box) for box in expected.boxes()[0].xyxy.tolist()}, defaultdict(set)
    for one in prediction["result"]:
        kind = one["type"]
        assert (one["to_name"], one["original_width"], one["original_height"]) == ("photo", 128, 64)
        scores[one["value"][kind][0]].add(one["score"])
        if one["value"][kind] == ["Cat"]:
            left, top = one["value"]["x"] * 1.28, one["value"]["y"] * 0.64
            right, bottom = left + one["value"]["width"] * 1.28, top + one["value"]["height"] * 0.64
            assert tuple(map(round, (left, top, right, bottom))) in boxes
    assert len({one["id"] for one in prediction["result"]}) == len(prediction["result"])
    assert {label: max(each) for label, each in scores.items()} == pytest.approx(best, abs=1e-5)
    assert len(scores["Cat"]) == len(boxes) > 1  # objects of one label can be ranked


def test_improbable_labels_have_no_regions(server):
    picture = "data:image/png;base64," + b64encode(png(64, 64)).decode()
    [one] = predict(server, picture, config=CONFIG.replace('threshold="0"', 'threshold="1"'))
    assert (one["result"], one["score"]) == ([], 0)


def test_images_of_the_configured_label_studio_are_fetched(server, studio):
    LabelStudio.asked.clear()
    results = predict(server, "/data/upload/1/a.png", f"{studio}/data/local-files/?d=a.png")
    assert all(one["result"] for one in results)
    assert sorted(LabelStudio.asked) == [
        ("/data/local-files/?d=a.png", "Token legacy"), ("/data/upload/1/a.png", "Token legacy"),
    ]  # fmt: skip


def test_a_personal_access_token_is_exchanged(studio):
    LabelStudio.asked.clear()
    assert Source(studio + "/", "a.b.c").fetch("/data/upload/a.png", 10**6) == png(64, 64)
    assert LabelStudio.asked == [("/api/token/refresh", "a.b.c"), ("/data/upload/a.png", "Bearer short")]


ADDRESSES = [
    "http://127.0.0.1:1/data/a.png", "https://example.com/data/upload/a.png", "file:///etc/passwd", "/etc/passwd",
    "/api/users", "/data/../api/users", "/data/%2e%2e/api/users", "/data/%252e%252e/api/users", "/data/..\\api",
    "//example.com/data/a.png", "s3://bucket/a.png", "/data/a\r\nX-Evil: 1", "", 7, "@example.com/data/a.png", None,
    "/data/é\n.png", "/label-studio/data/a.png", "/data/a b/../../api", "http://[/data/a.png", "data/a.png",
]  # fmt: skip


SENT = {  # a task's address -> what is asked for, below the address of Label Studio
    "/data/upload/1/a.png": "/data/upload/1/a.png",
    "/data/upload/1/a b é%20%2F.png": "/data/upload/1/a%20b%20%C3%A9%20%2F.png",
    "/data/local-files/?d=photos/süß 猫 100%.png": "/data/local-files/?d=photos/s%C3%BC%C3%9F%20%E7%8C%AB%20100%25.png",
    "/data/Screen\u202fShot #2.png": "/data/Screen%E2%80%AFShot%20%232.png",
    "/data/a.png?X-Sig=a%2Bb%40c&d=e+f": "/data/a.png?X-Sig=a%2Bb%40c&d=e+f",
}


@pytest.mark.parametrize("below", ["", "/", "/label-studio", "/tools/label-studio/", "/data"])
@pytest.mark.parametrize("address", SENT)
def test_addresses_of_label_studio_below_a_path_and_with_odd_letters(studio, below, address):
    LabelStudio.asked.clear()
    path = below.rstrip("/")
    for spelling in (address, f"{path}{address}", f"{studio}{path}{address}", f"{studio.upper()}{path}{address}"):
        assert Source(f"{studio}{below}", "legacy").fetch(spelling, 10**6) == png(64, 64)
    assert LabelStudio.asked == [(path + SENT[address], "Token legacy")] * 4


def test_addresses_beside_the_path_of_label_studio_are_not_fetched(studio):
    LabelStudio.asked.clear()
    source = Source(f"{studio}/label-studio", "legacy")
    for address in ("/label-studio-old/data/a.png", "/label-studio/api/users", f"{studio}/data/a.png", "/data/../x"):
        with pytest.raises(RequestError, match="neither a data: URI nor"):
            source.fetch(address, 10**6)
    assert LabelStudio.asked == []
    assert Source(f"{studio}/label-studio", "a.b.c").fetch("/data/a.png", 10**6) == png(64, 64)
    assert [path for path, _ in LabelStudio.asked] == ["/label-studio/api/token/refresh", "/label-studio/data/a.png"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_else_is_fetched(server, studio, address):
    LabelStudio.asked.clear()
    addresses = (
        [address, f"{studio}{address}"] if isinstance(address, str) and address.startswith("/api") else [address]
    )
    for one in predict(server, *addresses):
        assert one["result"] == [] and one["score"] == 0 and "image" in one["error"]
    assert LabelStudio.asked == []


def test_redirects_are_not_followed(server):
    [one] = predict(server, "/data/upload/away.png")
    assert one["result"] == [] and "302" in one["error"]


def test_images_have_a_limit_and_the_studio_may_be_down(studio):
    with pytest.raises(RequestError, match="more than 100 bytes"):
        Source(studio, "legacy").fetch("/data/upload/a.png", 100)
    assert Source(studio, "legacy").fetch("/data/upload/a.png", len(png(64, 64))) == png(64, 64)
    with pytest.raises(RequestError, match="cannot be reached"):
        Source("http://127.0.0.1:1", "legacy").fetch("/data/upload/a.png", 100)
    with pytest.raises(RequestError, match="401"):
        Source(studio, "wrong").fetch("/data/upload/a.png", 100)
    with pytest.raises(RequestError, match="without --label-studio-url"):
        image_of("/data/upload/a.png", None, 100)


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://a", "http://", "http://a/?x=1", ""])
def test_a_malformed_url_of_label_studio_is_refused(url):
    with pytest.raises(InputError, match="url"):
        Source(url, "token")


def test_setup_and_health(server):
    body = {"project": "1.1", "schema": CONFIG, "hostname": "http://x", "access_token": "t"}
    assert server.client.post("/setup", json=body).json()["model_version"].startswith("open_gem")
    [version] = server.client.get("/versions").json()["versions"]
    assert version == server.client.post("/setup", json=body).json()["model_version"]
    assert server.client.get("/health").json()["status"] == "UP"


def test_controls_of_a_configuration():
    rectangles, polygons = controls_of(CONFIG)
    labels = {"Cat": ("cat", "kitten"), "Dog": ("Dog",)}
    assert rectangles == Control("box", "frames", "photo", "picture", labels, 0.0)
    assert polygons.labels == {"Dog": ("Dog",)}


@pytest.mark.parametrize(
    ("threshold", "presence"), [("0.8", 0.8), ("1", 1.0), ("2", 0.5), ("-1", 0.5), ("nan", 0.5), ("much", 0.5)]
)
def test_the_least_presence_of_a_control(threshold, presence):
    rectangles, _ = controls_of(CONFIG.replace('threshold="0"', f'threshold="{threshold}"'))
    assert rectangles.presence == presence


def test_labels_have_regions_from_a_presence_of_one_half_by_default(server, tiny_localizer):
    data, names = png(64, 64), [f"thing {number}" for number in range(12)]
    labels = "".join(f'<Label value="{name}"/>' for name in names)
    frames = f'<RectangleLabels name="r" toName="i">{labels}</RectangleLabels>'
    config = f'<View><Image name="i" value="$picture"/>{frames}</View>'
    [prediction] = predict(server, "data:image/png;base64," + b64encode(data).decode(), config=config)
    there = {name for name, share in zip(names, tiny_localizer(data, names).presence, strict=True) if share >= 0.5}
    assert {one["value"]["rectanglelabels"][0] for one in prediction["result"]} == there
    assert 0 < len(there) < 12


def test_regions_are_over_the_first_of_several_images():
    picture = '<Image name="other" value="$other"/>'
    other = picture + '<RectangleLabels name="more" toName="other"><Label value="Pig"/></RectangleLabels>'
    assert [one.name for one in controls_of(CONFIG.replace("</View>", other + "</View>"))] == ["frames", "shapes"]


@pytest.mark.skipif(find_spec("label_studio_sdk") is not None, reason="label-studio-sdk is installed")
def test_brushes_without_their_package_say_what_to_install():
    with pytest.raises(RequestError, match="pip install label-studio-sdk"):
        controls_of(CONFIG.replace("PolygonLabels", "BrushLabels"))


LAUGHS = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><View>&b;</View>'


CONFIGS = {  # configuration -> what is said of it
    "": " cannot be read",
    "<View>": " cannot be read",
    "<View/>": " has no labels over an image",
    "<View><Label value='a'/></View>": " has no labels over an image",
    LAUGHS: " is not a labelling configuration",
    f"<View>{' ' * 100_000}</View>": ": String should have at most 100000 characters",
}


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_malformed_configurations_are_refused(server, config):
    answer = server.client.post("/predict", json={"tasks": [], "label_config": config})
    assert answer.status_code == 422 and f"label_config{CONFIGS[config]}" in answer.json()["error"]


# What an annotator types ----------------------------------------------------------------------------------------------

TYPED = CONFIG.replace("<Choices", '<TextArea name="prompt" toName="photo"/><Choices')


def typed(text: object, type: str = "textarea", to: str = "photo") -> dict:
    """As Label Studio 1.23 sends it."""
    return {"context": {"result": [{"value": {"text": text}, "from_name": "prompt", "to_name": to, "type": type}]}}


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a cat", {"Cat": ("cat", "kitten")}),  # a label's name: its own prompts
        ("a tabby, tabby, the Cat", {"a tabby": ("a tabby",), "Cat": ("cat", "kitten")}),
        ("Kitten, a tabby", {"Cat": ("Kitten",), "a tabby": ("a tabby",)}),
        ("dog: puppy, a poodle, puppy", {"Dog": ("puppy", "a poodle")}),
        ("time: 12:30", {"time: 12:30": ("time: 12:30",)}),
        (" , ", {}),
        ("", {}),
    ],
)
def test_typed_prompts_belong_to_the_labels_that_they_name(text, prompts):
    assert typed_prompts(controls_of(TYPED), typed([text])) == prompts


def test_only_what_was_typed_last_is_wanted():
    assert typed_prompts(controls_of(TYPED), typed(["dog", "cat"])) == {"Cat": ("cat", "kitten")}


def test_with_a_single_label_typed_prompts_are_its_own():
    [control] = controls_of('<View><Image name="i" value="$a"/><RectangleLabels name="r" toName="i">'
                            '<Label value="Cat"/></RectangleLabels></View>')  # fmt: skip
    assert typed_prompts([control], typed(["a tabby, a lynx"], to="i")) == {"Cat": ("a tabby", "a lynx")}


@pytest.mark.parametrize(
    "params",
    [
        typed(["cat"], type="keypointlabels"),
        typed(["cat"], to="other"),
        typed(None),
        typed([7]),
        {"context": {}},
        {"context": {"result": 3}},
        {"context": {"result": ["cat", {"type": "textarea", "to_name": "photo", "value": 3}]}},
    ],
)
def test_a_context_without_text_has_no_prompts(params):
    assert typed_prompts(controls_of(TYPED), params) == {}


def ask(server: Server, params: object) -> list[dict]:
    picture = "data:image/png;base64," + b64encode(png(64, 64)).decode()
    body = {"tasks": [{"id": 1, "data": {"picture": picture}}], "label_config": TYPED, "params": params}
    answer = server.client.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    [prediction] = answer.json()["results"]
    return prediction["result"]


def test_regions_of_a_typed_prompt_have_the_label_that_it_names_or_none(server):
    for params, labels, prompts in [
        (typed(["dog: a poodle"]), ["Dog"], ["a poodle"]),
        (typed(["a zebra"]), [], ["a zebra"]),
    ]:
        regions = ask(server, params)
        assert regions
        for region in regions:
            assert (region["value"][region["type"]], region["meta"]["text"]) == (labels, prompts)
    assert ask(server, typed([""])) == []
    assert {region["value"][region["type"]][0] for region in ask(server, {"context": None})} == {"Cat", "Dog"}


def test_regions_of_two_answers_never_share_an_id(server):
    first, second = ({region["id"] for region in ask(server, typed(["cat"]))} for _ in range(2))
    assert first and not first & second
