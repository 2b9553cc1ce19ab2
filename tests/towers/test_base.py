"""Loading and adapting: the right weights, the right activation, any grid, and errors that say what to do."""

import json
import logging
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import PARITY

import open_gem
from open_gem import METHODS, run, towers
from open_gem.errors import InputError, UnknownModelError, UnsupportedModelError, WeightsError
from open_gem.method import kernels
from open_gem.method.kernels import attention
from open_gem.towers import open_clip as native


@pytest.mark.parametrize(
    ("name", "tag", "quick"),
    [
        ("ViT-B-16", "openai", True),
        ("ViT-B/16", "openai", True),
        ("ViT-B-16-quickgelu", "openai", True),
        ("ViT-B-32", "laion400m_e32", True),
        ("ViT-B-16", "metaclip_fullcc", True),
        ("ViT-B-16", "dfn2b", True),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
        ("ViT-L-14", "datacomp_xl_s13b_b90k", False),
    ],
)
def test_activation_follows_the_tag(name, tag, quick):
    config = native.configuration(name, tag)
    assert config == {"model_name": name.replace("/", "-"), "pretrained": tag, "force_quick_gelu": quick}


def test_openai_weights_get_quick_gelu_in_both_towers(monkeypatch):
    """`load("ViT-B-16", "openai")` end to end, but for the download: a smaller architecture under that name."""
    small = json.loads((PARITY / "gem_square" / "open_clip_config.json").read_text())["model_cfg"]
    small = {**small, "quick_gelu": False}
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: json.loads(json.dumps(small)))
    weights = PARITY / "gem_square" / "open_clip_model.safetensors"
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(weights))
    backbone = native.load("ViT-B-16", "openai")
    blocks = [*backbone.model.visual.transformer.resblocks, *backbone.model.transformer.resblocks]
    assert {type(block.mlp.gelu).__name__ for block in blocks} == {"QuickGELU"}
    # OpenAI's own statistics, from the tag
    assert backbone.preprocess.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_preprocessing_comes_from_the_checkpoint(tmp_path):
    folder = checkpoint(
        tmp_path, preprocess_cfg={"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "interpolation": "bilinear"}
    )
    preprocess = towers.load(f"local-dir:{folder}", device="cpu").preprocess
    assert (preprocess.mean, preprocess.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert (preprocess.interpolation, preprocess.image_size) == ("bilinear", (32, 32))


def test_recommendations_come_from_the_checkpoint(tmp_path):
    folder = checkpoint(tmp_path, open_gem={"size": "short:64", "temperature_scale": 0.25})
    localizer = open_gem.load(f"local-dir:{folder}", device="cpu")
    assert localizer.size_rule == "short:64"
    assert localizer.resolve("gem") == METHODS["gem"].replace(temperature_scale=0.25)
    plain = open_gem.load(f"local-dir:{PARITY / 'gem_square'}", device="cpu")
    assert (plain.size_rule, plain.resolve("gem")) == ("short:448", METHODS["gem"])


def test_unknown_recommendations_are_named(tmp_path):
    folder = checkpoint(tmp_path, open_gem={"size": "short:64", "deepness": 3})
    with pytest.raises(WeightsError, match=r"recommends deepness, .* known: size, temperature_scale"):
        towers.load(f"local-dir:{folder}", device="cpu")


def checkpoint(tmp_path: Path, **changes) -> Path:
    """A copy of a parity checkpoint with some sections of its configuration changed."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(PARITY / "gem_square", folder)
    file = folder / "open_clip_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "tag", "error", "words"),
    [
        ("ViT-B-61", "openai", UnknownModelError, ["unknown model 'ViT-B-61'", "ViT-B-16"]),
        ("vit-b-16", "openai", UnknownModelError, ["did you mean ViT-B-16, "]),
        ("nonsense", None, UnknownModelError, ["unknown model 'nonsense'", "open-gem models --all"]),
        ("ViT-B-16", None, UnknownModelError, ["needs a pretrained tag", "openai"]),
        ("ViT-B-16", "opanai", UnknownModelError, ["'opanai' is no tag", "no file", "openai", "datacomp"]),
        ("embedded", "openai", UnknownModelError, ["one set of weights"]),
        ("local-dir:there", "openai", UnknownModelError, ["brings its own weights"]),
        ("RN50", "openai", UnsupportedModelError, ["cannot read RN50", "ResNet"]),
        ("convnext_base", "laion400m_s13b_b51k", UnsupportedModelError, ["cannot read convnext_base", "ConvNeXt"]),
        ("MobileCLIP-S1", "datacompdr", UnsupportedModelError, ["cannot read MobileCLIP-S1", "FastViT"]),
        ("local-dir:nowhere/at/all", None, WeightsError, ["no such folder"]),
    ],
)
def test_names_that_do_not_exist(name, tag, error, words):
    with pytest.raises(error) as caught:
        towers.load(name, tag, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_folder_without_configuration_or_weights_is_an_error_never_a_random_model(tmp_path):
    with pytest.raises(WeightsError, match=r"no open_clip_config\.json"):
        towers.load(f"local-dir:{tmp_path}", device="cpu")
    folder = checkpoint(tmp_path)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="there are no weights in"):
        towers.load(f"local-dir:{folder}", device="cpu")


def test_weights_of_another_shape_are_an_error(tmp_path):
    folder = checkpoint(tmp_path)
    shutil.copy(PARITY / "gem_resampled" / "open_clip_model.safetensors", folder)
    with pytest.raises(WeightsError, match="cannot load local-dir"):
        towers.load(f"local-dir:{folder}", device="cpu")


@pytest.mark.parametrize(("name", "tag"), [("hf-hub:some/model", None), ("ViT-B-16", "openai")])
def test_unreachable_weights_say_what_to_do(name, tag, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("connection refused\nsecond line")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    monkeypatch.setattr(open_clip.factory, "_get_hf_config", unreachable)
    with pytest.raises(WeightsError) as caught:
        towers.load(name, tag, device="cpu", cache_dir=str(tmp_path))
    message = str(caught.value)
    assert "connection refused" in message and "\n" not in message
    assert "HF_HOME" in message and "folder" in message and "embedded" not in message


def test_nothing_is_logged_beside_the_error(monkeypatch, tmp_path, caplog):
    def unreachable(*args, **kwargs):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("unreachable")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(WeightsError):
        towers.load("ViT-B-16", "openai", device="cpu", cache_dir=str(tmp_path))
    assert not caplog.records


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="cannot load ViT-B-32"):
        towers.load("ViT-B-32", str(tmp_path / "weights.pt"), device="cpu")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 16}, "ResNet"),
        ({"attentional_pool": "parallel", "attn_pooler_heads": 4}, "contrastive attention pool"),
        ({"block_type": "custom"}, "blocks are not"),
        ({"timm_model_name": "test_convnext", "timm_proj": "linear", "timm_pool": "avg"}, "ConvNeXt"),
    ],
)
def test_towers_that_cannot_be_read_are_refused_with_the_reason(vision, words):
    config = json.loads((PARITY / "gem_square" / "open_clip_config.json").read_text())["model_cfg"]
    config = {**config, "vision_cfg": {**config["vision_cfg"], **vision}}
    with pytest.raises(UnsupportedModelError, match=words):
        open_gem.adapt(open_clip.CLIP(**config).eval(), tokenizer=None)


def test_something_else_is_refused():
    with pytest.raises(UnsupportedModelError, match="no vision tower"):
        open_gem.adapt(torch.nn.Linear(1, 1), tokenizer=None)


def test_a_model_in_training_mode_is_refused(square):
    model = native.load(f"local-dir:{square.folder}").model.train()
    with pytest.raises(InputError, match=r"model\.eval"):
        open_gem.adapt(model, tokenizer=None)


@pytest.mark.parametrize("shape", [(1, 3, 33, 32), (1, 3, 0, 8), (3, 32, 32), (1, 4, 32, 32)])
def test_pixels_that_do_not_fit_are_refused(shape, square):
    with pytest.raises(InputError, match="expected"):
        run(square.backbone.vision, torch.zeros(shape), METHODS)


@pytest.mark.parametrize(("has_kernel", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_automatic_type_is_bfloat16_where_it_has_a_kernel(has_kernel, expected, monkeypatch):
    monkeypatch.setattr(attention, "has_bfloat16", lambda: has_kernel)
    assert towers.load("embedded", device="cpu", dtype="auto").dtype == expected
    assert towers.find_dtype("auto", torch.device("cuda")) == torch.float32


def test_a_kernel_that_is_off_is_no_reason_for_bfloat16(monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert towers.find_dtype("auto", torch.device("cpu")) == torch.float32


def test_unknown_device_is_one_line():
    with pytest.raises(InputError, match="cannot use device 'quantum'"):
        towers.load("embedded", device="quantum")


def test_positions_are_cached_per_grid_and_follow_the_weights(square, monkeypatch):
    backbone = native.load(f"local-dir:{square.folder}")
    calls = []
    resample = backbone.vision.resample_positions
    monkeypatch.setattr(backbone.vision, "resample_positions", lambda grid: calls.append(grid) or resample(grid))
    wide = torch.zeros(1, 3, 16, 64)
    before, _ = backbone.vision.embed(wide)
    backbone.vision.embed(wide)
    assert len(calls) == 1
    with torch.no_grad():
        backbone.model.visual.positional_embedding.mul_(2)
    after, _ = backbone.vision.embed(wide)
    assert len(calls) == 2 and not torch.equal(before, after)


def test_truncated_says_what_is_cut():
    text = native.OpenClipText(model=None, tokenizer=open_clip.get_tokenizer("ViT-B-16", context_length=6))
    assert text.truncated("a cat on a") == ""
    assert text.truncated("a cat on a red sofa") == "red sofa"


def test_text_towers_that_need_transformers(monkeypatch):
    for spec, expected in ((None, "needs the package transformers"), (object(), None)):
        monkeypatch.setattr(native, "find_spec", lambda name, spec=spec: spec)
        reason = native.unsupported_reason("roberta-ViT-B-32")
        assert reason == expected or (expected and reason and expected in reason)


def test_a_file_that_is_called_like_a_tag_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("openai").touch()
    assert native.configuration("ViT-B-16", "openai")["force_quick_gelu"] is True
    Path("mine.pt").touch()
    config = native.configuration("ViT-B-16", "mine.pt")
    assert (config["model_name"], config["pretrained"]) == ("ViT-B-16", "mine.pt")


@pytest.mark.parametrize(
    ("name", "mean", "interpolation"),
    [
        ("ViT-B-16-SigLIP", 0.5, "bicubic"),
        ("ViT-L-14-CLIPA", 0.485, "bilinear"),
        ("PE-Core-B-16", 0.5, "bilinear"),
        ("MobileCLIP-B", 0.0, "bilinear"),
        ("ViT-B-16", 0.48145466, None),
    ],
)
def test_a_file_of_weights_gets_the_statistics_of_its_architecture(name, mean, interpolation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.pt").touch()
    statistics = native.configuration(name, "mine.pt")["force_preprocess_cfg"]
    assert statistics["mean"][0] == pytest.approx(mean)
    assert interpolation is None or statistics["interpolation"] == interpolation


def test_attention_with_a_hook_or_a_wrapper_is_refused_for_it_would_be_read_past(square):
    model = native.load(f"local-dir:{square.folder}").model
    handle = model.visual.transformer.resblocks[2].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="hooks"):
        open_gem.adapt(model, tokenizer=None)
    handle.remove()
    open_gem.adapt(model, tokenizer=None)
    model.visual.transformer.resblocks[2].attn = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="wrappers"):
        open_gem.adapt(model, tokenizer=None)


def test_loading_in_threads_leaves_logging_and_warnings_as_they_were(square):
    before = logging.root.manager.disable, list(logging.root.handlers), list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: native.load(f"local-dir:{square.folder}"), range(8)))
    assert (logging.root.manager.disable, list(logging.root.handlers), list(warnings.filters)) == before


def test_a_hub_repository_is_loaded_as_a_folder_is(monkeypatch, square):
    """The real loading code, but for the two downloads."""
    config = json.loads((square.folder / "open_clip_config.json").read_text())
    weights = str(square.folder / "open_clip_model.safetensors")
    monkeypatch.setattr(open_clip.factory, "_get_hf_config", lambda *_, **__: json.loads(json.dumps(config)))
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", lambda *_, **__: weights)
    hub = native.load("hf-hub:some/model")
    assert hub.name == "hf-hub:some/model"
    for name, tensor in native.load(f"local-dir:{square.folder}").model.state_dict().items():
        assert torch.equal(hub.model.state_dict()[name], tensor)
