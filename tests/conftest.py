"""Shared hosts: the seeded checkpoints that the published implementations were run on, and a tiny one of our own."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from browser import Visit, chromium, serving
from PIL import Image
from safetensors.torch import save_file

import open_gem
from open_gem import towers
from open_gem.data.scenes import Scene, scene

torch.set_num_threads(1)  # models here are too small for more, and threads that wait for each other are slow

PARITY = Path(__file__).parent / "parity"


class Reference:
    """One folder of `data/parity`: a checkpoint, and what the published code made of it (see its README)."""

    def __init__(self, name: str):
        self.folder = PARITY / name
        self.backbone = towers.load(f"local-dir:{self.folder}", device="cpu")
        self.cases = {case["key"]: case for case in json.loads((self.folder / "cases.json").read_text())}

    def arrays(self, file: str = "reference") -> dict[str, torch.Tensor]:
        with np.load(self.folder / f"{file}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="session")
def square() -> Reference:
    return Reference("gem_square")


@pytest.fixture(scope="session")
def resampled() -> Reference:
    return Reference("gem_resampled")


CONFIG: dict[str, Any] = {  # the vocabulary is CLIP's own, so that any phrase can be asked
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 6, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def random_checkpoint(folder: Path, **vision: int) -> str:
    """A checkpoint with random weights that sees pictures at 64 pixels; `vision` changes its vision tower."""
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **vision}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = open_clip.CLIP(**config).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "open_clip_model.safetensors")
    sections = {"model_cfg": config, "preprocess_cfg": PREPROCESS, "open_gem": {"size": "short:64"}}
    (folder / "open_clip_config.json").write_text(json.dumps(sections))
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of six small blocks."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of three small blocks: fewer than GEM's usual depth."""
    return random_checkpoint(tmp_path_factory.mktemp("shallow"), layers=3)


@pytest.fixture(scope="session")
def tiny_localizer(tiny: str) -> open_gem.Localizer:
    return open_gem.load(tiny, device="cpu")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """The parts of a few labelled images."""
    from labelled import IMAGES, write_parts

    return write_parts(tmp_path / "labels", IMAGES)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The pictures that were labelled, all in one folder: readers of these formats know no other."""
    from labelled import GOOD, HEIGHT, WIDTH

    folder = tmp_path / "pictures"
    folder.mkdir()
    for one in GOOD:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / Path(one["id"]).name)
    return folder


# The page: a server with the model in the package, and a browser. This one is each module's own, for Playwright keeps
# an event loop in this thread, in which no other test could run one meanwhile.


@pytest.fixture(scope="session")
def embedded() -> open_gem.Localizer:
    return open_gem.load("embedded", device="cpu").acknowledge()


@pytest.fixture(scope="session")
def drawn() -> Scene:
    return scene(2, (336, 448))  # so large that it is painted pixel by pixel


@pytest.fixture(scope="session")
def picture(drawn: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a scene.png"
    Image.fromarray(drawn.image).save(path)
    return path


@pytest.fixture(scope="session")
def start(embedded: open_gem.Localizer) -> Callable[..., Any]:
    """Start a server with given settings, while the block lasts."""
    from open_gem.serve.app import create_app
    from open_gem.serve.settings import Settings

    return lambda **settings: serving(create_app(embedded, Settings(**settings)))


@pytest.fixture(scope="session")
def address(start: Callable[..., Any]) -> Iterator[str]:
    with start() as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Visit]]:
    """Open the page in a window of its own. Whatever the browser complains of fails the test."""
    visits: list[Visit] = []

    def opened(url: str = address, script: str = "", **settings: Any) -> Visit:
        context = browser.new_context(**settings)
        context.add_init_script(script)
        visits.append(Visit(context, url))
        return visits[-1]

    yield opened
    for one in visits:
        one.page.context.close()
        assert one.complaints == []
