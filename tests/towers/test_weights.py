"""Weights from folders and files: what fits is loaded, what does not is said in a line, nothing is ever random."""

import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import CONFIG, PARITY, random_checkpoint
from hub_checkpoints import as_downloaded, bert_tokenizer, offline
from PIL import Image
from safetensors.torch import load_file, save_file

from open_gem import METHODS, run, towers
from open_gem.errors import UnsupportedModelError, WeightsError

FOLDER = PARITY / "gem_square"
WEIGHTS = load_file(FOLDER / "open_clip_model.safetensors")


@pytest.fixture
def architecture(monkeypatch) -> str:
    """A name of open_clip's that stands for a small architecture."""
    config = json.loads((FOLDER / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: json.loads(json.dumps(config)))
    return "ViT-B-32-quickgelu"


def loads_the_weights(name: str, pretrained: Path | None = None, weights: dict[str, Any] = WEIGHTS) -> None:
    loaded = towers.load(name, None if pretrained is None else str(pretrained), device="cpu").model.state_dict()
    assert loaded.keys() >= weights.keys()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())


def refused(name: str, pretrained: Path | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        towers.load(name, None if pretrained is None else str(pretrained), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_loaded_by_its_path(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "mine")
    loads_the_weights(f"local-dir:{tmp_path / 'mine'}")
    loads_the_weights(str(tmp_path / "mine"))
    assert towers.load(tmp_path / "mine", device="cpu").vision.patch == (8, 8)
    monkeypatch.chdir(tmp_path)
    loads_the_weights("mine")


def test_a_folder_may_hold_a_pt_file(tmp_path):
    shutil.copy(FOLDER / "open_clip_config.json", tmp_path)
    torch.save(WEIGHTS, tmp_path / "open_clip_pytorch_model.bin")
    loads_the_weights(str(tmp_path))


def test_a_file_of_weights_for_an_architecture(tmp_path, architecture):
    save_file(WEIGHTS, tmp_path / "mine.safetensors")
    loads_the_weights(architecture, tmp_path / "mine.safetensors")
    torch.save(WEIGHTS, tmp_path / "mine.pt")
    loads_the_weights(architecture, tmp_path / "mine.pt")


def test_a_training_checkpoint_of_a_fine_tuned_model(tmp_path, architecture):
    """As open_clip's own training writes it: epoch, optimizer, and names that begin with `module.`."""
    tuned = {key: value + 0.01 if value.is_floating_point() else value for key, value in WEIGHTS.items()}
    state = {f"module.{key}": value for key, value in tuned.items()}
    torch.save({"epoch": 3, "name": "mine", "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "epoch_3.pt")
    loads_the_weights(architecture, tmp_path / "epoch_3.pt", tuned)


def prefixed(prefix: str, weights: dict[str, Any] = WEIGHTS) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in weights.items()}


PARTLY_COMPILED = {key.replace("visual.", "visual._orig_mod.").replace(".0.", ".0.module."): key for key in WEIGHTS}
AVERAGED = {**prefixed("module."), "n_averaged": torch.tensor(7)}  # as torch's AveragedModel saves itself
WRAPPED = {
    "state_dict": {"state_dict": WEIGHTS},
    "model_state_dict": {"model_state_dict": WEIGHTS, "optimizer_state_dict": {"lr": 0.1}},
    "Lightning": {"state_dict": prefixed("model."), "pytorch-lightning_version": "2", "epoch": 3},
    "torch.compile": prefixed("_orig_mod."),
    "torch.compile of a part": {name: WEIGHTS[key] for name, key in PARTLY_COMPILED.items()},
    "DDP": prefixed("module."),
    "DDP of a compiled model": {"model": prefixed("module._orig_mod.")},
    "a compiled DDP model in Lightning": {"state_dict": prefixed("model._orig_mod.module.")},
    "DeepSpeed": {"module": WEIGHTS, "global_steps": 3},
    "an average alone": {"model_ema": WEIGHTS},
    "an average beside": {"model_ema": {key: value + 1 for key, value in WEIGHTS.items()}, "model": WEIGHTS},
    "nested": {"model": {"state_dict": prefixed("module.")}},
}


@pytest.mark.parametrize("state", WRAPPED.values(), ids=WRAPPED)
def test_what_training_loops_wrap_around_weights_is_taken_off(state, tmp_path, architecture):
    torch.save(state, tmp_path / "mine.ckpt")
    loads_the_weights(architecture, tmp_path / "mine.ckpt")
    shutil.copy(FOLDER / "open_clip_config.json", tmp_path)
    (tmp_path / "mine.ckpt").rename(tmp_path / "open_clip_pytorch_model.bin")
    loads_the_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("state", "left"),
    [
        (AVERAGED, "1 tensors beside the model, left out: n_averaged"),
        ({**prefixed("model."), **prefixed("teacher."), "loss.scale": torch.ones(1)}, "loss.scale, teacher."),
    ],
)
def test_what_lies_beside_the_model_is_left_out_with_a_warning(state, left, tmp_path, architecture):
    torch.save({"state_dict": state}, tmp_path / "mine.pt")
    with pytest.warns(UserWarning, match=re.escape(left)):
        loads_the_weights(architecture, tmp_path / "mine.pt")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (prefixed("student."), 'names fit without the prefix "student.": save the state dict of that part alone'),
        (prefixed("model.clip."), 'names fit without the prefix "clip."'),
        (
            {key.removeprefix("visual."): value for key, value in WEIGHTS.items() if key.startswith("visual.")},
            'names fit behind the prefix "visual."',
        ),
        ({"epoch": 3, "net": {"weights": WEIGHTS}}, "no tensors under the keys it has (epoch, net)"),
    ],
)
def test_a_prefix_that_does_not_fit_is_named(state, words, tmp_path, architecture):
    torch.save(state, tmp_path / "mine.pt")
    assert words in refused(architecture, tmp_path / "mine.pt")


@pytest.mark.parametrize("format", ["file", "folder"])
def test_weights_of_another_image_size_keep_their_own_positions(format, tmp_path, monkeypatch):
    """What open_clip does with them at loading, and what was done at asking, were two resamplings in a row."""
    large, small = (random_checkpoint(made(tmp_path / str(side)), image_size=side) for side in (64, 32))
    file = Path(large.removeprefix("local-dir:")) / "open_clip_model.safetensors"
    if format == "file":
        config = json.loads((tmp_path / "32" / "open_clip_config.json").read_text())["model_cfg"]
        monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: json.loads(json.dumps(config)))
        loaded = towers.load("ViT-B-32", str(file), device="cpu")
    else:
        shutil.copy(file, tmp_path / "32")
        loaded = towers.load(small, device="cpu")
    expected = towers.load(large, device="cpu")
    assert loaded.vision.trained == loaded.preprocess.image_size == (64, 64)
    for size in ((64, 64), (32, 48)):
        pixels = torch.rand(1, 3, *size)
        ours, theirs = (
            run(one.vision, pixels, {"gem": METHODS["gem"]}, pooled=True)["gem"] for one in (loaded, expected)
        )
        assert torch.equal(ours.tokens, theirs.tokens)
        assert ours.pooled is not None and theirs.pooled is not None and torch.equal(ours.pooled, theirs.pooled)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_positions_of_no_square_grid_are_refused(tmp_path, architecture):
    rows = len(WEIGHTS["visual.positional_embedding"]) + 4
    longer = torch.zeros(rows, WEIGHTS["visual.positional_embedding"].shape[1])
    save_file({**WEIGHTS, "visual.positional_embedding": longer}, tmp_path / "long.safetensors")
    assert f"for {rows - 1} patches, which are no square grid" in refused(architecture, tmp_path / "long.safetensors")


def test_texts_of_another_length_are_refused(tmp_path, architecture):
    """open_clip would resample them too."""
    longer = torch.zeros(len(WEIGHTS["positional_embedding"]) + 4, WEIGHTS["positional_embedding"].shape[1])
    save_file({**WEIGHTS, "positional_embedding": longer}, tmp_path / "long.safetensors")
    assert "1 of another shape (positional_embedding)" in refused(architecture, tmp_path / "long.safetensors")


def test_weights_that_do_not_fit_are_named(tmp_path, architecture):
    wrong = {key: value for key, value in WEIGHTS.items() if "resblocks.0.ln_1" not in key}
    wrong |= {f"extra.{index}": torch.zeros(1) for index in range(5)} | {"ln_final.bias": torch.zeros(3)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    message = refused(architecture, tmp_path / "wrong.safetensors")
    assert "4 missing (transformer.resblocks.0.ln_1.bias, transformer.resblocks.0.ln_1.weight, visual." in message
    assert "5 unexpected (extra.0, extra.1, extra.2, …)" in message
    assert "1 of another shape (ln_final.bias)" in message


def test_weights_of_something_else_are_named(tmp_path, architecture):
    save_file({"classifier.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    message = refused(architecture, tmp_path / "other.safetensors")
    assert re.search(r"\d+ missing \(ln_final.bias, ln_final.weight, logit_scale, …\)", message)
    assert "1 unexpected (classifier.weight)" in message


@pytest.mark.parametrize("function", [Path.touch, os.mkdir, os.system])
def test_a_pickle_that_runs_code_is_refused_and_says_what_to_do(function, tmp_path, architecture):
    class Harmful:
        def __reduce__(self):
            target = tmp_path / "executed"
            return (function, (f"touch {target}" if function is os.system else target,))

    torch.save({"state_dict": Harmful()}, tmp_path / "weights.pt")
    message = refused(architecture, tmp_path / "weights.pt")
    assert "needs code to run" in message and "safetensors" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_torchscript_archive_is_refused_and_says_what_to_do(tmp_path, architecture):
    """OpenAI's original files are such."""
    traced: Any = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save(tmp_path / "ViT-B-32.pt")
    assert "TorchScript" in refused(architecture, tmp_path / "ViT-B-32.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_broken_file_is_one_line(content, suffix, tmp_path, architecture):
    file = tmp_path / f"broken{suffix}"
    file.write_bytes(content)
    message = refused(architecture, file)
    assert "holds no weights" in message and "code" not in message and "HF_HOME" not in message


@pytest.mark.parametrize("place", ["text_cfg", "nested"])
def test_code_that_comes_with_a_checkpoint_is_not_run(place, bert):
    """open_clip passes what a configuration says about its tokenizer on to transformers."""
    file = Path(bert) / "open_clip_config.json"
    sections = json.loads(file.read_text())
    text = sections["model_cfg"]["text_cfg"]
    (text if place == "text_cfg" else text["tokenizer_kwargs"])["trust_remote_code"] = True
    file.write_text(json.dumps(sections))
    with pytest.raises(UnsupportedModelError, match="brings its own code, which is never run"):
        towers.load(bert, device="cpu")


@pytest.fixture
def bert(tmp_path) -> str:
    """A model in open_clip's format whose words are BERT's, as CLIPA's are, with its tokenizer beside it."""
    text = {"context_length": 8, "vocab_size": len(bert_tokenizer()), "width": 16, "heads": 2, "layers": 1}
    text |= {
        "hf_tokenizer_name": "bert-base-uncased",
        "tokenizer_kwargs": {"strip_sep_token": True},
        "pool_type": "last",
    }
    config = {**CONFIG, "text_cfg": text, "custom_text": False}
    model = open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors"
    )
    sections = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(sections))
    bert_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_tokenizers_of_transformers_in_open_clips_format(bert):
    backbone = towers.load(bert, device="cpu")
    text: Any = backbone.text
    words = text.tokenizer.tokenizer
    room = 8 - words.num_special_tokens_to_add()
    prompt = " ".join(["cat"] * room)
    assert backbone.text.truncated(prompt) == ""
    assert backbone.text.truncated(f"{prompt} dog") == "dog"
    tokens = text.tokenizer(["a cat"])
    assert words.sep_token_id not in tokens  # as CLIPA was trained
    expected = torch.nn.functional.normalize(backbone.model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(backbone.encode_text(["a cat"]), expected)


def test_tokenizers_of_transformers_are_one_threads_at_a_time(bert, monkeypatch):
    """How they cut and pad is their state: two at a time end in "Already borrowed", or in each other's lengths."""
    backbone = towers.load(bert, device="cpu")
    text: Any = backbone.text
    theirs, inside, most = text.tokenizer, [], []

    class Watched:
        context_length = theirs.context_length
        tokenizer = theirs.tokenizer

        def __call__(self, prompts: list[str]) -> torch.Tensor:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
            return theirs(prompts)

    monkeypatch.setattr(text, "tokenizer", Watched())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: backbone.encode_text(["a cat"]), range(8)))
    assert most == [1] * 8


# Without network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [("ViT-B-16", "openai"), ("hf-hub:some/model", None), ("some/model", None)])
@pytest.mark.slow
def test_offline_without_the_weights(model, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    name, tag = model
    tags = ["--pretrained", tag] if tag else []
    result = offline(tmp_path, "ground", "cat.png", "-p", "a cat", "--model", name, *tags)
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and name in line and "HF_HUB_OFFLINE is set" in line
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "hub") == ["cat.png"]


@pytest.mark.parametrize("name", ["blip-base", "openai/clip-vit-base-patch16"])
@pytest.mark.slow
def test_offline_with_a_file_for_an_architecture_of_transformers_the_hub_is_not_asked(name, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    save_file({"extra": torch.zeros(1)}, tmp_path / "mine.safetensors")
    arguments = ["--model", name, "--pretrained", "mine.safetensors"]
    result = offline(tmp_path, "ground", "cat.png", "-p", "a cat", *arguments)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "the weights do not fit the architecture" in line and "missing" in line


@pytest.mark.slow
def test_offline_with_what_was_downloaded_before(tmp_path, tiny):
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    as_downloaded(Path(tiny.removeprefix("local-dir:")), tmp_path, "some/model")
    result = offline(tmp_path, "ground", "cat.png", "-p", "a cat", "--model", "hf-hub:some/model", "--json", "-q")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["model"] == "hf-hub:some/model"
