"""The model that nobody named: from the hub's cache or a mirror, and a clear word where it cannot be had."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from hub_checkpoints import as_downloaded, offline
from huggingface_hub import constants, scan_cache_dir
from PIL import Image
from safetensors.torch import save_file

import open_gem
from open_gem.errors import WeightsError
from open_gem.towers import DEFAULT_MODEL, weights

REPOSITORY = "timm/vit_base_patch16_clip_224.openai"  # of open_clip's tag "openai"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 6, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which ViT-B-16 was downloaded, for an open_clip in which that is a tiny architecture."""
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: json.loads(json.dumps(TINY)))
    save_weights(open_clip.CLIP(**TINY), tmp_path / "files")
    as_downloaded(tmp_path / "files", tmp_path, REPOSITORY)
    return tmp_path


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub is at a port where nobody listens, and may be asked, whatever the environment says."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    weights._why_silent.cache_clear()
    yield
    weights._why_silent.cache_clear()


def test_the_cache_is_laid_out_as_the_hubs_client_does(home: Path):
    report = scan_cache_dir(home / "hub")
    assert not report.warnings
    [repository] = report.repos
    [revision] = repository.revisions
    assert (repository.repo_id, revision.refs) == (REPOSITORY, {"main"})
    assert [file.file_name for file in revision.files] == ["open_clip_model.safetensors"]


@pytest.mark.parametrize("is_offline", [True, False])
def test_the_default_comes_from_the_cache_without_a_network(home, is_offline, unreachable, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    localizer = open_gem.load(device="cpu", cache_dir=str(home / "hub"))
    assert localizer.name == ", ".join(DEFAULT_MODEL)
    assert localizer.backbone.preprocess.mean == open_clip.OPENAI_DATASET_MEAN
    assert constants.HF_HUB_OFFLINE is is_offline


@pytest.mark.parametrize("arguments", [(), ("ViT-B-16", "openai"), ("hf-hub:some/model",), ("some/model",)])
def test_a_model_that_cannot_be_had_is_one_line_that_says_what_to_do(arguments, tmp_path, unreachable):
    with pytest.raises(WeightsError) as caught:
        open_gem.load(*arguments, device="cpu", cache_dir=str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message and "embedded" not in message
    assert f"it is not in the cache {tmp_path}, and http://127.0.0.1:9 cannot be reached" in message
    assert all(way in message for way in ("folder", "HTTPS_PROXY", "HF_ENDPOINT", "HF_HOME", "open-gem demo"))


def test_the_hub_is_asked_once_when_it_does_not_answer(tmp_path, unreachable, monkeypatch):
    """Its client would ask again and again, for a minute."""
    asked = []
    monkeypatch.setattr(weights, "get_session", lambda: asked.append(1))
    for _ in range(2):
        with pytest.raises(WeightsError):
            open_gem.load(device="cpu", cache_dir=str(tmp_path))
    assert asked == [1]


class Hub(BaseHTTPRequestHandler):
    """What the client needs of a hub, or of a mirror, for the files of a folder."""

    def __init__(self, folder: Path, *arguments: object):
        self.folder = folder
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def do_HEAD(self) -> None:
        file = self.folder / Path(self.path).name
        self.send_response(200 if file.is_file() else 404)
        if file.is_file():
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("Content-Length", str(file.stat().st_size))
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        file = self.folder / Path(self.path).name
        if file.is_file():
            self.wfile.write(file.read_bytes())

    def log_message(self, format: str, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_mirror_serves_a_model_with_a_progress_bar_that_tells_the_size(tiny: str, tmp_path: Path):
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    folder = Path(tiny.removeprefix("local-dir:"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = ["ground", "cat.png", "-p", "a cat", "--model", "hf-hub:some/model", "--save", "none", "--json"]
        mirror = f"http://127.0.0.1:{server.server_port}"
        as_terminal = {"TQDM_POSITION": "-1"}  # elsewhere the client shows no bars
        result = offline(tmp_path, *arguments, HF_HUB_OFFLINE="0", HF_ENDPOINT=mirror, **as_terminal)
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["model"] == "hf-hub:some/model"
    size = (folder / "open_clip_model.safetensors").stat().st_size
    assert "open_clip_model.safetensors: 100%" in result.stderr and f"{size / 1e6:.2f}M" in result.stderr


@pytest.mark.slow
def test_with_a_downloaded_vit_b_16_nobody_has_to_name_it(tmp_path: Path):
    Image.new("RGB", (64, 48)).save(tmp_path / "cat.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-16", load_weights=False).half()
    save_weights(model, tmp_path / "files")
    as_downloaded(tmp_path / "files", tmp_path, REPOSITORY)
    code = "import open_gem; localizer = open_gem.load(); print(localizer.name, localizer.layers, localizer.patch)"
    assert offline(tmp_path, "-c", code).stdout == "ViT-B-16, openai 12 (16, 16)\n"
    result = offline(tmp_path, "ground", "cat.png", "-p", "a cat", "--image-size", "short:64", "--json", "-q")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["model"] == "ViT-B-16, openai"
