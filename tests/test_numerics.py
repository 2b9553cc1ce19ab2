"""Torch's settings of a process or thread do not decide answers, numbers that are none are no answer, and a localizer
can be copied and sent."""

import ast
import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hub_checkpoints as hub
import numpy as np
import pytest
import torch
from PIL import Image
from serving import Server
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import open_gem
from open_gem import numerics, towers
from open_gem.data import Sample, Segmentation
from open_gem.data.scenes import scene
from open_gem.errors import InputError, NotFiniteError, OpenGemError, WeightsError
from open_gem.evaluation.metrics.contrast import object_contrast, to_grid
from open_gem.evaluation.protocol import EvalProtocol
from open_gem.evaluation.run import gather, measure
from open_gem.images.views import Views
from open_gem.label.labeling import Labeling
from open_gem.label.local import label, run
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Parts
from open_gem.label.sources import open_source
from open_gem.localization import Localization
from open_gem.localizer import Localizer
from open_gem.method.kmeans import spherical_kmeans
from open_gem.method.run import run as run_methods
from open_gem.method.table import METHODS
from open_gem.refine.pamr import Pamr
from open_gem.serve.settings import Settings
from open_gem.text import Vocabulary
from open_gem.types import Grid

SOURCE = Path(open_gem.__file__).parent

# Tensors that are made ------------------------------------------------------------------------------------------------

FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "hann_window", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
}
OLD = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "LongTensor", "BoolTensor"}


def faults_in(code: str) -> Iterator[str]:
    """Tensors made in a type, or on a device, that is left to torch's defaults."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (f"line {node.lineno}: torch.{name.name}" for name in node.names if name.name in FACTORIES)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
            continue
        name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
        constants = [isinstance(argument, ast.Constant | ast.UnaryOp) for argument in node.args[1:]]
        if (
            (name in FACTORIES and not {"dtype", "device"} <= given)
            or name in OLD
            or (name == "Generator" and not node.args)
            or (name == "where" and len(constants) == 2 and all(constants))
        ):
            yield f"line {node.lineno}: torch.{name}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_tensor_is_made_in_the_default_type_or_on_the_default_device(path):
    assert list(faults_in(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.zeros(3)",
        "torch.full((2,), 1.0, dtype=torch.float32)",
        "torch.tensor([1], device='cpu')",
        "torch.where(x < 0, -1.0, 1.0)",
        "torch.Generator()",
        "torch.Tensor(3)",
        "from torch import arange",
    ],
)
def test_one_that_is_would_be_seen(code):
    assert list(faults_in(code))


# Defaults -------------------------------------------------------------------------------------------------------------

PHRASES = ["a cat", "a dog", "a monkey"]
NAMES = ["gem", "clip", "naclip", "gem-kmeans", "resclip-rcs"]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(scene(0, (96, 128)).image)


def fresh(backbone: towers.Backbone) -> towers.Backbone:
    """The same, which has seen no grid yet."""
    other = copy.copy(backbone)
    other.vision = copy.copy(backbone.vision)
    return other


def answers(backbone: towers.Backbone, image: Image.Image) -> dict[str, Localization]:
    """By localizers that nothing was computed with before."""
    backbone = fresh(backbone)
    found = {name: Localizer(backbone, name, size="short:96")(image, PHRASES) for name in NAMES}
    found["refined"] = Localizer(backbone, size="short:96", refinement=Pamr(iterations=2))(image, PHRASES)
    views = Views(window=64, flip=True, merge="logits")
    return found | {"views": Localizer(backbone, views=views, size="short:96", remove_redundancy=True)(image, PHRASES)}


def check_same(ours: dict[str, Localization], theirs: dict[str, Localization]) -> None:
    for name, one in ours.items():
        for a, b in zip(numbers_of(one), numbers_of(theirs[name]), strict=True):
            assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b), name


def numbers_of(found: Localization) -> list[Tensor]:
    assert found.scores is not None and found.presence is not None
    boxes = [part for kind in ("component", "label") for some in found.boxes(instances=kind) for part in some]
    maps = [found.heatmaps(scale).stack() for scale in ("minmax", "cosine", "probability")]
    return [found.similarity, found.scores, found.presence, *boxes, *maps, found.points(), found.segment(0.4)]


@pytest.fixture(scope="module")
def expected(embedded: Localizer, image: Image.Image) -> dict[str, Localization]:
    found = answers(embedded.backbone, image)
    assert all(tensor.dtype != torch.float64 for one in found.values() for tensor in numbers_of(one))
    return found


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_answers_do_not_depend_on_the_default_type(dtype, embedded, image, expected):
    with default_dtype(dtype):
        found = answers(embedded.backbone, image)
        check_same(found, expected)


def test_answers_do_not_depend_on_the_default_device(embedded, image, expected):
    with default_device("meta"):
        found = answers(embedded.backbone, image)
        check_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nor_does_a_model_depend_on_them_that_is_loaded_meanwhile(dtype, embedded):
    expected = embedded.backbone.fingerprint()
    with default_dtype(dtype), default_device("meta"):
        loaded = towers.load("embedded", device="cpu")
    assert loaded.fingerprint() == expected
    assert torch.get_default_dtype() == torch.float32


@contextmanager
def another_thread_changes_the_default_type() -> Iterator[None]:
    """As transformers does while it loads a model."""
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for dtype in (torch.bfloat16, torch.float64, torch.float32):
                torch.set_default_dtype(dtype)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        torch.set_default_dtype(torch.float32)


def test_another_thread_that_changes_the_default_type_changes_no_answer(embedded, image, expected):
    with another_thread_changes_the_default_type():
        found = [answers(embedded.backbone, image) for _ in range(3)]
        for one in found:
            check_same(one, expected)


def test_another_thread_that_loads_a_model_by_transformers_changes_no_answer(embedded, image, expected, tmp_path):
    """transformers sets torch's default type while it loads a model in another one."""
    import transformers

    folder, stop, types = hub.checkpoint(tmp_path, "clip").removeprefix("local-dir:"), threading.Event(), set()
    watched = torch.set_default_dtype

    def load() -> None:
        while not stop.is_set():
            transformers.CLIPModel.from_pretrained(folder, dtype=torch.bfloat16)

    def noted(dtype: torch.dtype) -> None:
        types.add(dtype)
        watched(dtype)

    thread = threading.Thread(target=load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_default_dtype", noted)
        thread.start()
        try:
            for _ in range(3):
                check_same(answers(embedded.backbone, image), expected)
        finally:
            stop.set()
            thread.join()
    assert torch.bfloat16 in types, "transformers set the default type"


def test_a_model_is_loaded_right_or_not_at_all_while_another_thread_changes_the_default_type(embedded):
    with another_thread_changes_the_default_type():
        try:
            loaded = towers.load("embedded", device="cpu")
        except WeightsError as error:
            assert "default dtype" in str(error)
            return
    assert loaded.fingerprint() == embedded.backbone.fingerprint()


def test_a_trained_models_boxes_do_not_depend_on_them_either():
    from open_gem.readout import Boxes
    from open_gem.trained.owl import paint
    from open_gem.types import Size

    boxes = Boxes(torch.tensor([[3, 4, 30, 41], [0, 0, 50, 9]]), torch.tensor([0.7, 0.3]))
    expected = paint(boxes, Size(60, 100), Grid(6, 7))
    with default_dtype(torch.bfloat16), default_device("meta"):
        found = paint(boxes, Size(60, 100), Grid(6, 7))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


# Autocast -------------------------------------------------------------------------------------------------------------


def test_results_under_autocast_are_float32_and_nothing_of_it_is_kept(embedded, image):
    localizer, other = (Localizer(fresh(embedded.backbone), size="short:80") for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        within = localizer(image, PHRASES)
    check_same({"": localizer(image, PHRASES)}, {"": other(image, PHRASES)})
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in numbers_of(within))
    assert within.scores is not None and within.scores.numpy().dtype == np.float32
    without = other(image, PHRASES)
    assert (within.similarity - without.similarity).abs().max() < 0.05
    assert not torch.equal(within.similarity, without.similarity)  # the model did compute in bfloat16


def test_phrases_that_were_asked_before_are_no_other_under_autocast(embedded, image):
    before, within = Localizer(embedded.backbone), Localizer(embedded.backbone)
    before(image, PHRASES)
    with torch.autocast("cpu", torch.bfloat16):
        check_same({"": before(image, PHRASES)}, {"": within(image, PHRASES)})


def test_what_is_made_of_features_is_computed_in_their_type_under_autocast():
    points = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 5, 8, dtype=torch.bool)
    mask[:, :3, :4] = True
    sides = to_grid(mask, Grid(5, 8))
    expected = spherical_kmeans(points, 4), object_contrast(points, sides)
    with torch.autocast("cpu", torch.bfloat16):
        found = spherical_kmeans(points, 4), object_contrast(points, sides)
    assert all(torch.equal(a, b) for a, b in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True))


# Numbers that are none ------------------------------------------------------------------------------------------------


def damaged(backbone: towers.Backbone, part: str, value: float = torch.nan) -> towers.Backbone:
    """A copy with one weight of this part that is no number."""
    broken = copy.deepcopy(backbone)
    weight = next(weight for name, weight in broken.model.named_parameters() if part in name)
    with torch.no_grad():
        weight.view(-1)[0] = value
    return broken


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["visual.proj", "token_embedding", "visual.conv1", "logit_scale"])
def test_damaged_weights_are_an_error_that_names_them(part, value, tiny_localizer, image):
    broken = damaged(tiny_localizer.backbone, part, value)
    prompts = "!"  # the first word of the vocabulary
    with pytest.raises(NotFiniteError) as raised:
        Localizer(broken, template="{}")(image, prompts)
    said = str(raised.value)
    assert broken.name in said and "damaged" in said and "\n" not in said
    assert "logit" in part or part.removeprefix("visual.") in said


def test_numbers_that_overflow_are_an_error_that_names_a_type_with_more_room(tiny_localizer, image):
    half = copy.deepcopy(tiny_localizer.backbone)
    with torch.no_grad():
        half.model.visual.proj.mul_(1e5 / half.model.visual.proj.abs().max())
    localizer = Localizer(half)
    assert localizer(image, "a").similarity.isfinite().all()
    half.model.visual.proj.data.clamp_(-6e4, 6e4)
    half.model.half()
    with pytest.raises(NotFiniteError, match=r"features .* float16 ends at 65504; compute in float32 or bfloat16"):
        localizer(image, "a")


def test_under_autocast_the_type_that_it_computes_in_is_named():
    model = nn.Linear(3, 3)
    tower = type("Tower", (), {"name": "ours", "model": model})()
    with torch.autocast("cpu", torch.float16), pytest.raises(NotFiniteError, match=r"ours .* float16 ends at"):
        numerics.check_finite("features", tower, torch.tensor([torch.inf]))


def test_sums_of_large_numbers_are_no_alarm():
    large = torch.full((4096,), 6e4, dtype=torch.float16)
    assert numerics.are_finite(large, -large)
    assert not numerics.are_finite(large, torch.tensor([torch.inf, -torch.inf], dtype=torch.float16))


def test_pixels_that_are_no_numbers_are_the_callers_fault(tiny_localizer):
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="pixels are infinite or not a number"):
        run_methods(tiny_localizer.backbone.vision, pixels, {"gem": METHODS["gem"]})


def test_no_embedding_that_is_no_number_is_kept(tiny_localizer, image):
    backbone = copy.deepcopy(tiny_localizer.backbone)
    localizer, scale = Localizer(backbone), backbone.model.ln_final.weight
    good = localizer(image, "a cat").similarity
    with torch.no_grad():
        scale[0] = torch.nan
    with pytest.raises(NotFiniteError, match="text embeddings"):
        localizer(image, "a cat")
    with torch.no_grad():
        scale[0] = 1
    assert torch.equal(localizer(image, "a cat").similarity, good)


def blinded(backbone: towers.Backbone) -> towers.Backbone:
    """The same, which gives no numbers for images whose first pixel is white, as a type may that is too narrow."""
    other, embed = fresh(backbone), backbone.vision.embed

    def embed_some(pixels: Tensor) -> tuple[Tensor, Grid]:
        tokens, grid = embed(pixels)
        return tokens.masked_fill((pixels[:, :, 0, 0] >= 1).all(dim=1)[:, None, None], torch.nan), grid

    vars(other.vision)["embed"] = embed_some
    return other


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eight of one shape, of which two are white."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        drawn = scene(number, (64, 64)).image
        drawn[0, 0] = 0
        Image.fromarray(np.full_like(drawn, 255) if number in (2, 5) else drawn).save(folder / f"{number}.png")
    return folder


def test_a_row_has_the_error_and_the_others_are_labelled(tiny_localizer, images, tmp_path):
    labeling = Labeling(Localizer(blinded(tiny_localizer.backbone)), Ontology.of(["cat"], presence=0.0))
    source = open_source(str(images))
    parts = Parts.claim(tmp_path / "labels", labeling.manifest(source))
    tally = run(parts, labeling, source, batch_size=4)
    rows = {row["id"]: row for row in parts.rows()}
    assert sorted(name for name, row in rows.items() if row["status"] == "error") == ["2.png", "5.png"]
    assert "features that are infinite or not a number" in rows["2.png"]["error"] and rows["2.png"]["objects"] == []
    assert len(rows) == 8 and tally.failed == 2
    good = {row["id"]: row for row in label(Labeling(tiny_localizer, labeling.classes), source.items(), batch_size=4)}
    for name in rows.keys() - {"2.png", "5.png"}:
        assert [one["xyxy"] for one in rows[name]["objects"]] == [one["xyxy"] for one in good[name]["objects"]]


def test_an_evaluation_counts_a_failure(tiny_localizer, images):
    localizer = Localizer(blinded(tiny_localizer.backbone))
    samples = [Sample(path.stem, path, np.zeros((64, 64), np.uint8)) for path in sorted(images.iterdir())]
    data = Segmentation("ours", "val", ("cat", "dog"), None, {"usual": Vocabulary.of(["cat", "dog"])}, samples)
    measured = list(measure(localizer, {"gem": "gem"}, data, range(8), EvalProtocol(size="short:64"), batch_size=4))
    assert sorted(one.id for one in measured if one.error) == ["2", "5"]
    assert all("infinite or not a number" in one.error for one in measured if one.error)
    assert set(gather(measured)["gem"]["pixels"].rows) == set("013467")


@pytest.mark.filterwarnings("ignore:.*are infinite or not a number")
def test_a_server_answers_that_it_failed(tiny_localizer, images):
    server = Server(Localizer(blinded(tiny_localizer.backbone)), Settings())
    try:
        for number, status in ((1, 200), (2, 500)):
            files = {"file": ("any.png", (images / f"{number}.png").read_bytes())}
            answer = server.client.post("/v1/ground", files=files, data={"prompts": "cat"})
            assert answer.status_code == status, answer.text
        assert "features that are infinite or not a number" in answer.json()["error"]
        sent = [("files", ("any.png", (images / f"{number}.png").read_bytes())) for number in range(3)]
        results = server.client.post("/v1/ground/batch", files=sent, data={"prompts": "cat"}).json()["results"]
        assert ["error" in one for one in results] == [False, False, True]
        uploaded = server.client.post("/v1/images", files={"file": ("any.png", (images / "5.png").read_bytes())})
        assert uploaded.status_code == 500 and list(uploaded.json()) == ["error"]
    finally:
        server.stop()


@pytest.mark.filterwarnings("ignore:.*are infinite or not a number")
def test_a_server_with_a_damaged_model_says_so_to_every_client(tiny_localizer, images):
    server = Server(Localizer(damaged(tiny_localizer.backbone, "visual.proj")), Settings())
    try:
        files = {"file": ("any.png", (images / "1.png").read_bytes())}
        answer = server.client.post("/v1/ground", files=files, data={"prompts": "cat"})
        assert answer.status_code == 500 and "its weights are damaged (proj)" in answer.json()["error"]
    finally:
        server.stop()


# Copies ---------------------------------------------------------------------------------------------------------------


class Answers(Dataset):
    """Scores of images, in a worker's process."""

    def __init__(self, localizer: Localizer, images: list[Image.Image]):
        self.localizer, self.images = localizer, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        scores = self.localizer(self.images[index], PHRASES).scores
        assert scores is not None
        return scores


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_localizer_can_be_copied(copied, embedded, image):
    localizer = Localizer(embedded.backbone, "gem", "short:80", "a {}", Views(flip=True), Pamr(iterations=1), True)
    expected = localizer(image, PHRASES)
    other = copied(localizer)
    assert other.describe() == localizer.describe()
    check_same({"": other(image, PHRASES)}, {"": expected})
    assert other.text is not localizer.text or copied is copy.copy


def test_a_copy_has_weights_of_its_own_and_one_made_by_copy_does_not(tiny_localizer, image):
    deep, flat = copy.deepcopy(tiny_localizer), copy.copy(tiny_localizer)
    before = tiny_localizer(image, "a").similarity
    with torch.no_grad():
        deep.backbone.model.visual.proj.mul_(-1)
    assert not torch.equal(deep(image, "a").similarity, before)
    assert deep.backbone.vision.module is deep.backbone.model.visual
    assert torch.equal(tiny_localizer(image, "a").similarity, before)
    assert flat.backbone is tiny_localizer.backbone


def test_what_was_kept_is_not_sent(tiny_localizer, image):
    phrases = [f"phrase {number}" for number in range(20)]
    Localizer(fresh(tiny_localizer.backbone))(image, phrases)  # open_clip's tokenizer keeps words, too
    localizer = Localizer(fresh(tiny_localizer.backbone))
    size = len(pickle.dumps(localizer))
    localizer(image, phrases)
    assert len(pickle.dumps(localizer)) == size


def test_a_localizer_is_copied_while_another_thread_uses_it(tiny_localizer, image):
    stop, raised = threading.Event(), []

    def ask() -> None:
        number = 0
        while not stop.is_set():
            try:
                tiny_localizer(image, f"phrase {number}")
            except Exception as error:
                raised.append(error)
            number += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(5):
            copy.deepcopy(tiny_localizer)
            pickle.dumps(tiny_localizer)
    finally:
        stop.set()
        thread.join()
    assert raised == []


def test_a_localizer_can_be_sent_to_workers_that_are_spawned(tiny_localizer, image):
    dataset = Answers(tiny_localizer, [image, image.rotate(90)])
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for found, one in zip(loader, dataset.images, strict=True):
        torch.testing.assert_close(found, tiny_localizer(one, PHRASES).scores)


@pytest.mark.parametrize("kind", sorted(hub.KINDS))
def test_models_of_transformers_are_copied_and_do_not_depend_on_torchs_defaults(kind, image):
    backbone = towers.adapt(hub.model(kind), hub.tokenizer(kind))
    method = replace(METHODS["gem"], depth=1)
    expected = Localizer(backbone, method, size="short:64")(image, ["cat", "bus"])
    again = pickle.loads(pickle.dumps(copy.deepcopy(backbone)))
    check_same({"": Localizer(again, method, size="short:64")(image, ["cat", "bus"])}, {"": expected})
    with default_dtype(torch.bfloat16), default_device("meta"):
        found = Localizer(copy.deepcopy(backbone), method, size="short:64")(image, ["cat", "bus"])
        check_same({"": found}, {"": expected})


# Models without numbers -----------------------------------------------------------------------------------------------


def test_a_model_without_numbers_is_refused(tiny_localizer):
    model = copy.deepcopy(tiny_localizer.backbone.model).to("meta")
    with pytest.raises(InputError, match="on the device 'meta', which holds no numbers") as raised:
        open_gem.adapt(model, lambda texts: torch.zeros(len(texts), 16, dtype=torch.int64))
    assert "\n" not in str(raised.value)


def test_nothing_is_loaded_onto_a_device_without_memory():
    with pytest.raises(OpenGemError, match="'meta'"):
        open_gem.load("embedded", device="meta")
