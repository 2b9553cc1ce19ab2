"""The API of `open-gem serve`: its answers are the library's, in the documented formats."""

import asyncio
import io
import threading
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from serving import Server, encoded, png, wait_until

import open_gem
from open_gem.data.scenes import HELD_OUT, scene
from open_gem.images.views import Views
from open_gem.localization import PRESENCE
from open_gem.method.table import GRADIENTS, METHODS
from open_gem.readout import Boxes
from open_gem.serve.settings import Settings
from open_gem.text import Exemplar, TextTower
from open_gem.trained.base import Grounding, TrainedModel
from open_gem.trained.localizer import TrainedLocalizer

PROMPTS = ["a cat", "a dog", "tree"]


@pytest.fixture(scope="module")
def server(tiny_localizer):
    server = Server(tiny_localizer, Settings())
    yield server
    server.stop()


@pytest.fixture
def client(server) -> httpx.Client:
    return server.client


# Images ---------------------------------------------------------------------------------------------


def test_an_upload_reports_size_grid_and_methods(server, client):
    info = server.upload(png(60, 90))
    assert (info["height"], info["width"], info["grid"]) == (60, 90, [8, 12])
    assert info["model"] == server.service.localizer.name
    assert set(info["methods"]) == METHODS.keys() | GRADIENTS.keys()
    assert client.get(f"/v1/images/{info['id']}").json() == info
    assert server.upload(png(60, 90))["id"] == info["id"] != server.upload(png(60, 90, seed=1))["id"]


def test_two_servers_have_different_ids_for_the_same_image(tiny_localizer, server):
    other = Server(tiny_localizer, Settings())
    try:
        assert other.upload(png())["id"] != server.upload(png())["id"]
    finally:
        other.stop()


def test_sizes_are_those_of_the_upright_image(server):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    info = server.upload(encoded(Image.new("RGB", (90, 60), "red"), "JPEG", exif=exif))
    assert (info["height"], info["width"]) == (90, 60)


def test_a_dropped_image_is_gone(server, client):
    id = server.upload(png(seed=2))["id"]
    assert client.delete(f"/v1/images/{id}").status_code == 204
    assert server.metric("open_gem_cache_images") == len(server.service.cache)
    assert server.metric("open_gem_cache_bytes") == server.service.cache.nbytes
    asked = {"prompts": ["a cat"]}
    for answer in (
        client.get(f"/v1/images/{id}"),
        client.delete(f"/v1/images/{id}"),
        client.post(f"/v1/images/{id}/ground", json=asked),
    ):
        assert answer.status_code == 404
        assert list(answer.json()) == ["error"] and "upload it again" in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gem", {}),
        ("gem", {"threshold": 0.0, "presence": 0.0}),
        ("clip", {"threshold": 0.7, "instances": "label", "presence": 0.0}),
        ("maskclip", {"threshold": 0.2, "presence": 0.3}),
    ],
)
def test_ground_says_what_the_localizer_says(server, client, tiny_localizer, method, options):
    data = png(60, 90)
    id = server.upload(data)["id"]
    expected = tiny_localizer.locate(tiny_localizer.encode(data, method), PROMPTS)
    objects = expected.objects(**{"presence": PRESENCE} | options)
    asked = {"prompts": PROMPTS, "method": method, "mask": "rle", "similarity": True, **options}
    answer = client.post(f"/v1/images/{id}/ground", json=asked).json()
    form = {"file": png(60, 90)}
    alone = client.post("/v1/ground", files=form, data=asked).json()
    png_answer = client.post(f"/v1/images/{id}/ground", json={**asked, "mask": "png"}).json()

    assert {key: answer[key] for key in ("height", "width", "grid", "method", "warnings")} == {
        "height": 60, "width": 90, "grid": [8, 12], "method": method, "warnings": [],
    }  # fmt: skip
    assert alone == answer
    for index, label in enumerate(answer["labels"]):
        assert label["label"] == PROMPTS[index]
        assert label["score"] == pytest.approx(expected.scores[index].item(), abs=2e-6)
        assert label["presence"] == pytest.approx(expected.presence[index].item(), abs=2e-6)
        assert label["present"] == (label["presence"] >= options.get("presence", PRESENCE))
        values = np.frombuffer(b64decode(label["similarity"]), "<f2").reshape(answer["grid"])
        assert torch.equal(torch.from_numpy(values.copy()), expected.similarity[index].half())
    for obj, located, as_png in zip(answer["objects"], objects, png_answer["objects"], strict=True):
        assert obj == located.to_dict() | {"confidence": pytest.approx(located.confidence, abs=2e-6)}
        with Image.open(io.BytesIO(b64decode(as_png["mask"]))) as mask:
            assert (np.asarray(mask) == located.mask * 255).all()
    assert answer["objects"]


def test_a_label_may_have_several_prompts(server, client, tiny_localizer):
    data, labels = png(), {"animal": ["a cat", "a dog"], "tree": ["tree"]}
    expected = tiny_localizer(data, labels)
    body = {"prompts": labels, "presence": 0, "similarity": True}
    answer = client.post(f"/v1/images/{server.upload(data)['id']}/ground", json=body).json()
    assert [label["label"] for label in answer["labels"]] == ["animal", "tree"]
    objects = [(obj["label"], obj["prompt"], tuple(obj["box"])) for obj in answer["objects"]]
    assert objects == [(obj.label, obj.prompt, obj.box) for obj in expected.objects(presence=0)]
    values = np.frombuffer(b64decode(answer["labels"][0]["similarity"]), "<f2").reshape(answer["grid"])
    assert torch.equal(torch.from_numpy(values.copy()), expected.similarity[:2].amax(dim=0).half())


def test_what_is_not_asked_for_is_left_out(server, client):
    id, keys = server.upload(png())["id"], {"label", "score", "presence", "present"}
    for asked, expected in [({"objects": False}, keys), ({"similarity": True, "presence": 1}, keys | {"similarity"})]:
        answer = client.post(f"/v1/images/{id}/ground", json={"prompts": ["x"], **asked}).json()
        assert answer["labels"][0].keys() == expected and answer["objects"] == []
    answer = client.post(f"/v1/images/{id}/ground", json={"prompts": ["x"], "presence": 0}).json()
    assert answer["objects"][0].keys() == {"label", "prompt", "score", "confidence", "presence", "box", "point"}


def test_a_model_that_is_not_for_photographs_says_so():
    localizer = open_gem.load("embedded", device="cpu")
    server = Server(localizer, Settings())
    try:
        info = server.upload(png())
        body = {"prompts": ["cat"], "objects": False}
        answer = server.client.post(f"/v1/images/{info['id']}/ground", json=body).json()
        [model] = server.client.get("/v1/models").json()["models"]
    finally:
        server.stop()
    assert info["warnings"] == answer["warnings"] == model["warnings"] == [localizer.caution]
    assert "photographs" in str(localizer.caution)


def test_an_image_is_encoded_once_by_each_method(server, client):
    id = server.upload(png(seed=3))["id"]
    asked = {"prompts": ["a cat"], "method": "sclip"}
    passes = server.metric('open_gem_batch_inputs_count{work="encode"}')
    first = client.post(f"/v1/images/{id}/ground", json=asked).json()
    assert client.post(f"/v1/images/{id}/ground", json=asked).json() == first
    assert server.metric('open_gem_batch_inputs_count{work="encode"}') == passes + 1


def test_the_first_client_finds_the_model_warm(tiny_localizer):
    server = Server(tiny_localizer, Settings())
    passes = [server.metric(f'open_gem_batch_inputs_count{{work="{work}"}}') for work in ("encode", "locate")]
    server.stop()
    assert passes == [1, 1]


def test_work_stops_at_the_next_prompt_when_the_client_has_left(server, tiny_localizer):
    begun, release, worked = threading.Event(), threading.Event(), []

    def work(index):
        begun.set()
        release.wait(10)
        worked.append(index)

    async def ask_and_leave():
        asking = asyncio.create_task(server.service.each_label(work, tiny_localizer(png(), PROMPTS)))
        await asyncio.to_thread(begun.wait, 10)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        release.set()

    asyncio.run(ask_and_leave())
    wait_until(lambda: worked)
    assert server.upload(png(seed=8)) and worked == [0]


def test_the_right_object_is_located():
    drawn = scene(HELD_OUT + 3, (192, 256))  # an octopus among others
    server = Server(open_gem.load("embedded", device="cpu"), Settings())
    try:
        id = server.upload(encoded(Image.fromarray(drawn.image), "PNG"))["id"]
        answer = server.client.post(f"/v1/images/{id}/ground", json={"prompts": list(drawn.names)}).json()
    finally:
        server.stop()
    best = {obj["label"]: obj for obj in reversed(answer["objects"])}
    inside = [
        mask[y, x] for mask, (x, y) in zip(drawn.masks, (best[name]["point"] for name in drawn.names), strict=True)
    ]
    assert sum(inside) >= len(inside) - 1 and all(label["present"] for label in answer["labels"])


# Image and prompts in one request ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_hugging_faces_clients_get_their_own_shapes(client, tiny_localizer, prefix):
    data = png()
    best: dict[str, float] = {}
    for obj in tiny_localizer(data, PROMPTS).objects(presence=0):
        best[obj.label] = max(best.get(obj.label, 0.0), obj.confidence)
    middle = sorted(best.values())[-2] - 1e-4
    body = {
        "inputs": prefix + b64encode(data).decode(),
        "parameters": {"candidate_labels": PROMPTS, "threshold": middle},
        "options": {"wait_for_model": True},
    }
    boxes = client.post("/v1/huggingface", json=body).json()
    answer = client.post("/v1/ground", files={"file": data}, data={"prompts": PROMPTS, "presence": middle}).json()
    objects = [obj for obj in answer["objects"] if obj["confidence"] >= middle]
    expected = [
        {
            "label": obj["label"],
            "score": obj["confidence"],
            "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), obj["box"], strict=True)),
        }
        for obj in sorted(objects, key=lambda obj: -obj["confidence"])
    ]
    assert boxes == expected and len({box["label"] for box in boxes}) == 2


def test_an_image_of_a_single_request_is_not_cached(server, client):
    kept = len(server.service.cache)
    answer = client.post("/v1/ground", files={"file": png(seed=9)}, data={"prompts": PROMPTS, "method": "sclip"})
    assert answer.status_code == 200 and len(server.service.cache) == kept


def test_an_unreadable_image_does_not_spoil_its_batch(client):
    other = encoded(Image.new("RGB", (20, 20)), "PPM")
    files = [("files", data) for data in (png(), b"no image", png(seed=1), other)]
    form = {"prompts": PROMPTS, "presence": "0"}
    results = client.post("/v1/ground/batch", files=files, data=form).json()["results"]
    alone = [client.post("/v1/ground", files={"file": data}, data=form).json() for data in (png(), png(seed=1))]
    assert [results[0], results[2]] == alone
    assert list(results[1]) == ["error"]
    assert results[3]["error"].startswith("an image of format PPM, expected JPEG")


def test_images_of_a_batch_share_a_pass_of_the_model(server, client):
    lines = [f'open_gem_batch_inputs_{what}{{work="encode"}}' for what in ("count", "sum")]
    files = [("files", png(seed=seed)) for seed in range(20, 24)]
    before = list(map(server.metric, lines))
    with ThreadPoolExecutor(1) as threads, server.busy():
        answer = threads.submit(client.post, "/v1/ground/batch", files=files, data={"prompts": PROMPTS})
        wait_until(lambda: len(server.service.worker) == 4)
    assert len(answer.result().json()["results"]) == 4
    assert list(map(server.metric, lines)) == [before[0] + 1, before[1] + 4]


# About ---------------------------------------------------------------------------------------------


def test_models_list_methods_and_limits(client, tiny_localizer):
    [model] = client.get("/v1/models").json()["models"]
    known = METHODS | GRADIENTS
    assert {one["name"]: one["about"] for one in model["methods"]} == {name: row.about for name, row in known.items()}
    assert (model["size"], model["patch"], model["default"]) == (tiny_localizer.size_rule, [8, 8], "gem")
    assert model["limits"]["max_prompts"] == Settings().max_prompts


def test_every_method_of_a_model_of_few_blocks_is_served(shallow):
    server = Server(open_gem.load(shallow, device="cpu"), Settings())
    try:
        id = server.upload(png())["id"]
        for name in METHODS:
            answer = server.client.post(f"/v1/images/{id}/ground", json={"prompts": ["a cat"], "method": name})
            assert (answer.status_code, answer.json()["method"]) == (200, name)
    finally:
        server.stop()


def test_null_stands_for_the_default_method(shallow):
    server = Server(open_gem.load(shallow, device="cpu"), Settings())
    try:
        default = server.client.get("/v1/models").json()["models"][0]["default"]
        assert default == "gem"
        id = server.upload(png())["id"]
        bodies = [{"prompts": ["a cat"]}, {"prompts": ["a cat"], "method": default}]
        answers = [server.client.post(f"/v1/images/{id}/ground", json=body).json() for body in bodies]
        assert answers[0] == answers[1] and answers[0]["method"] == default
        form = {"prompts": "a cat"}
        assert server.client.post("/v1/ground", files={"file": png()}, data=form).status_code == 200
        assert server.client.post("/v1/ground/batch", files={"files": png()}, data=form).status_code == 200
    finally:
        server.stop()


def test_samples_are_held_out_scenes(client):
    samples = client.get("/v1/samples").json()["samples"]
    assert len(samples) == 6
    first = samples[0]
    with Image.open(io.BytesIO(client.get(f"/v1/samples/{first['name']}").content)) as image:
        drawn = scene(HELD_OUT, (image.height, image.width))
        assert (np.asarray(image) == drawn.image).all() and first["labels"] == list(drawn.names)
    assert client.get("/v1/samples/none").status_code == 404


def test_health_and_metrics(server, client):
    assert client.get("/health").json() == {
        "status": "UP", "model_class": server.service.localizer.name, "version": open_gem.__version__,
    }  # fmt: skip
    line = 'open_gem_requests_total{route="/v1/images/{id}",status="404"}'
    before = server.metric(line)
    client.get("/v1/images/none")
    assert server.metric(line) == before + 1
    assert server.metric("open_gem_pending_requests") == 0
    line = 'open_gem_cache_lookups_total{hit="false"}'
    before = server.metric(line)
    client.get("/v1/images/none")
    assert server.metric(line) == before + 1
    assert server.metric("open_gem_cache_bytes") == server.service.cache.nbytes


@pytest.mark.parametrize("path", ["/health", "/"])
def test_head_requests_are_answered(path, client):
    answer, whole = client.head(path), client.get(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == whole.headers["content-length"] != "0"


def test_every_answer_has_security_headers(client):
    for path in ("/health", "/nothing", "/v1/images/none"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob: data:;")
        assert headers["x-content-type-options"] == "nosniff"


# Every kind of localizer ---------------------------------------------------------------------------------------------

LOCALIZERS = {
    "windows, features merged": {"views": Views(window=32)},
    "windows, maps merged": {"views": Views(window=32, merge="logits")},
    "scales, mirrored": {"views": Views(scales=(1.0, 1.5), flip=True)},
    "a refinement": {"refinement": open_gem.Pamr(iterations=2, dilations=(1,))},
}


@pytest.mark.parametrize("name", LOCALIZERS)
def test_a_server_answers_what_its_localizer_says_whatever_its_views_and_refinement(tiny_localizer, name):
    localizer = replace(tiny_localizer, **LOCALIZERS[name])
    data, expected = png(60, 90), localizer(png(60, 90), PROMPTS)
    server = Server(localizer, Settings(methods=("gem",)))
    try:
        info = server.upload(data)
        held = server.service.cache.nbytes
        body = {"prompts": PROMPTS, "mask": "rle", "similarity": True, "presence": 0}
        answer = server.client.post(f"/v1/images/{info['id']}/ground", json=body).json()
        later = server.client.post(f"/v1/images/{info['id']}/ground", json={**body, "method": "clip"})
        alone = server.client.post("/v1/ground", files={"file": data}, data=body).json()
    finally:
        server.stop()
    assert answer["grid"] == info["grid"] == list(expected.maps.shape[-2:])
    for index, label in enumerate(answer["labels"]):
        best = next(obj for obj in answer["objects"] if obj["label"] == label["label"])
        assert best["box"] == expected.boxes()[index].xyxy[0].tolist()
        assert best["point"] == expected.points()[index].tolist()
        assert not (coco.decode(best["mask"]).astype(bool) & ~expected.masks()[index].numpy()).any()
        values = np.frombuffer(b64decode(label["similarity"]), "<f2").reshape(answer["grid"])
        assert torch.equal(torch.from_numpy(values.copy()), expected.similarity[index].half())
    assert later.status_code == 200  # encoded from what is kept of the image
    assert alone == answer
    assert held > 60 * 90 * 3  # the image itself is kept, and counted


class Blobs(TrainedModel):
    """A model that was trained to localize, so to speak: every prompt is in the upper left, in one box."""

    @property
    def device(self):
        return torch.device("cpu")

    @property
    def size_rule(self):
        return "square:8"

    def _ground(self, pixels, size, text):
        similarity = torch.zeros(len(text), 4, 4)
        similarity[:, 0, 0] = 0.8
        box = Boxes(torch.tensor([[0, 0, 10, 8]]), torch.tensor([0.8]))
        return Grounding(similarity, torch.full((len(text),), 0.8), (box,) * len(text))

    def _pixels(self, image, **settings):
        return torch.zeros(3, 8, 8)


class Zeros(TextTower):
    def encode(self, texts):
        return torch.zeros(len(texts), 2)

    def truncated(self, text):
        return ""


def test_a_model_that_was_trained_to_localize_is_served_too():
    server = Server(TrainedLocalizer(Blobs("blobs", torch.nn.Linear(2, 2), Zeros(None, None), None)), Settings())
    try:
        [model] = server.client.get("/v1/models").json()["models"]
        info = server.upload(png(60, 90))
        path = f"/v1/images/{info['id']}/ground"
        answer = server.client.post(path, json={"prompts": PROMPTS, "mask": "rle", "similarity": True}).json()
        unknown = server.client.post(path, json={"prompts": PROMPTS, "method": "gem"})
    finally:
        server.stop()
    assert (model["default"], model["patch"], info["grid"]) == ("as trained", None, None)
    assert answer["grid"] == [4, 4] and answer["method"] == "as trained"
    expected = {"score": 0.8, "confidence": 0.8, "presence": 0.8, "box": [0, 0, 10, 8], "point": None}
    assert answer["objects"] == [{"label": label, "prompt": label, **expected} for label in PROMPTS]
    assert unknown.status_code == 422


# Query by example -----------------------------------------------------------------------------------------------------


def test_a_region_of_an_uploaded_image_is_a_prompt(server, client, tiny_localizer):
    shown, asked = (server.upload(png(60, 90, seed=seed))["id"] for seed in (31, 32))
    like = {"like": shown, "box": [8, 8, 40, 40]}
    body = {"prompts": {"it": ["a cat", like], "dog": ["a dog"]}, "presence": 0, "similarity": True}
    answer = client.post(f"/v1/images/{asked}/ground", json=body).json()
    assert [label["label"] for label in answer["labels"]] == ["it", "dog"]
    images = [Image.open(io.BytesIO(png(60, 90, seed=seed))) for seed in (31, 32)]
    expected = tiny_localizer(images[1], {"it": ["a cat", Exemplar(images[0], (8, 8, 40, 40))], "dog": "a dog"})
    for label, score, presence in zip(answer["labels"], expected.scores, expected.presence, strict=True):
        assert label["score"] == pytest.approx(score.item(), abs=1e-4)
        assert label["presence"] == pytest.approx(presence.item(), abs=1e-3)


def test_each_method_sees_an_exemplar_by_itself(server, client, tiny_localizer):
    id = server.upload(png(60, 90, seed=33))["id"]
    like = {"like": id, "box": [8, 8, 40, 40]}
    body = {"prompts": {"it": [like, like | {"box": [0, 0, 9, 9]}]}, "methods": ["csa", "gem"], "presence": 0}
    answers = client.post(f"/v1/images/{id}/ground", json=body).json()["results"]
    image = Image.open(io.BytesIO(png(60, 90, seed=33)))
    prompts = {"it": [Exemplar(image, tuple(box)) for box in ([8, 8, 40, 40], [0, 0, 9, 9])]}  # pyright: ignore[reportArgumentType]
    for answer, method in zip(answers, ("csa", "gem"), strict=True):
        expected = tiny_localizer.configured(method=method)(image, prompts)
        assert answer["method"] == method
        assert answer["labels"][0]["presence"] == pytest.approx(expected.presence.item(), abs=1e-3)


@pytest.mark.parametrize(
    ("like", "box", "method", "status"),
    [
        ("unknown", [0, 0, 9, 9], None, 404),
        (None, [0, 0, 900, 9], None, 422),
        (None, [9, 0, 9, 9], None, 422),
        (None, [0, 0, 90, 60], None, 422),
        (None, [0, 0, 9, 9], "clip-es", 422),
        (None, [0, 9], None, 422),
    ],
)
def test_a_bad_exemplar_is_an_error(like, box, method, status, server, client):
    id = server.upload(png(60, 90))["id"]
    body = {"prompts": {"it": [{"like": like or id, "box": box}]}, "method": method}
    answer = client.post(f"/v1/images/{id}/ground", json=body)
    assert answer.status_code == status and "\n" not in answer.json()["error"]


def test_methods_with_gradients_are_served_by_name(server, client):
    id = server.upload(png(60, 90))["id"]
    for name in GRADIENTS:
        answer = client.post(f"/v1/images/{id}/ground", json={"prompts": PROMPTS, "method": name, "presence": 0})
        assert answer.status_code == 200 and answer.json()["method"] == name
