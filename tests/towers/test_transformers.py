"""Models of the package transformers, against its own forward, open_clip's tower and Salesforce's files."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hub_checkpoints as hub
import huggingface_hub
import open_clip
import pytest
import torch
import transformers
from conftest import CONFIG
from hub_checkpoints import as_downloaded, checkpoint, from_open_clip, offline, salesforce
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

import open_gem
from open_gem import METHODS, Localizer, run, towers
from open_gem.errors import InputError, UnknownModelError, UnsupportedModelError, WeightsError
from open_gem.towers import hub as _hub
from open_gem.towers import open_clip as ours_of_open_clip
from open_gem.towers import transformers as ours
from open_gem.towers.base import ModuleTower
from open_gem.towers.check import check
from open_gem.towers.loading import FAMILIES, find_family
from open_gem.types import Grid, Size

KINDS = list(hub.KINDS)
SIZES = (Size(32, 32), Size(64, 64), Size(16, 16), Size(32, 48), Size(72, 24), Size(16, 64))  # the last: 16 patches too
PROMPTS = ["cat", "a photo of the red bus on the grass", "dog"]


def pixels(size: Size, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.fixture(scope="session", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def made(kind) -> Any:
    return hub.model(kind)


@pytest.fixture(scope="session")
def folder(kind, made, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(kind)
    checkpoint(place, kind, made)
    return place


@pytest.fixture(scope="session")
def backbone(folder) -> open_gem.towers.loading.Backbone:
    return towers.load(f"local-dir:{folder}", device="cpu")


@pytest.fixture
def without_network(monkeypatch) -> None:
    """Were there a connection, nothing here would use it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def own(kind, made, folder, tmp_path) -> Path:
    """A copy of the checkpoint, to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_grid_equals_the_library(made, size):
    for difference in check(ours.read_tower(made), [size]):
        limit = 0 if difference.exact else 2e-5
        assert max(difference.tokens, difference.pooled) <= limit, difference


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_positions_are_the_librarys_own(made, size):
    tower = ours.read_tower(made)
    grid = Grid(size.height // 8, size.width // 8)
    theirs = made.vision_model.embeddings.interpolate_pos_encoding(
        torch.zeros(1, tower.prefix + grid.patches, 32), *size
    )
    assert torch.equal(tower.positions(grid), theirs[0])


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_the_pooled_embedding_is_what_people_call_for(kind, made, backbone, size):
    tokens, _ = backbone.vision.embed(pixels(size))
    for block in backbone.vision.blocks(Grid(size.height // 8, size.width // 8)):
        tokens = block.forward(tokens)
    if kind == "blip":  # has no `get_image_features`: what its own forward compares, normalised there
        scores = made(
            input_ids=torch.tensor([[2, 5, 3]]),
            attention_mask=torch.ones(1, 3),
            pixel_values=pixels(size),
            use_itm_head=False,
            interpolate_pos_encoding=True,
        ).itm_score
        text = made.text_encoder(torch.tensor([[2, 5, 3]])).last_hidden_state[:, 0]
        found = normalize(backbone.vision.pool(tokens), dim=-1) @ normalize(made.text_proj(text), dim=-1).T
        torch.testing.assert_close(found, scores, rtol=0, atol=1e-6)
    else:
        theirs = made.get_image_features(pixels(size), interpolate_pos_encoding=True).pooler_output
        assert torch.equal(backbone.vision.pool(tokens), theirs)


@torch.no_grad()
def test_a_tokens_place_is_what_the_head_makes_of_it_alone(backbone):
    given = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    alone = torch.stack([backbone.vision.pool(given[:, index, None]) for index in range(9)], dim=1)
    torch.testing.assert_close(backbone.vision.project(given), alone, rtol=0, atol=2e-6)
    assert (alone[:, 0] - alone[:, 1]).abs().max() > 0.1


@torch.no_grad()
def test_blips_dense_tokens_are_the_projected_last_hidden_state():
    made = hub.model("blip")
    found = run(ours.read_tower(made), pixels(Size(32, 48)), {"host": METHODS["clip"]})["host"]
    theirs = made.vision_model(pixels(Size(32, 48)), interpolate_pos_encoding=True).last_hidden_state
    dense = normalize(made.vision_proj(theirs[:, 1:]), dim=-1)
    torch.testing.assert_close(normalize(found.patches, dim=-1), dense, rtol=0, atol=1e-6)


@torch.no_grad()
def test_blip_itself_cuts_positions_off_unless_told_not_to():
    """Why `library_forward` asks for interpolation: without, a smaller picture gets the first rows' positions."""
    made, size = hub.model("blip"), Size(16, 16)
    cut = made.vision_model(pixels(size)).last_hidden_state
    resampled = made.vision_model(pixels(size), interpolate_pos_encoding=True).last_hidden_state
    assert (cut - resampled).abs().max() > 1e-2


def test_a_picture_that_the_patch_does_not_divide(made):
    """SigLIP's so400m: of 384 pixels the 14-pixel patches see 378."""
    odd = hub.model("siglip", {"image_size": 36})
    tower = ours.read_tower(odd)
    assert tower.trained == (32, 32)
    assert all(row.tokens == row.pooled == 0 for row in check(tower) if row.exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_after_it_was_read_stays_equal(kind, dtype):
    tower = ours.read_tower(hub.model(kind))
    check(tower)  # positions of these sizes are known now
    tower.module.to(dtype)
    differences = check(tower)
    assert all(row.tokens == row.pooled == 0 for row in differences if row.exact)
    limit = {torch.float64: 1e-12, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert max(max(row.tokens, row.pooled) for row in differences) < limit


def test_the_model_is_untouched(kind):
    """No weight, no output, no hook and no attribute is another one afterwards."""

    def state() -> tuple[Any, ...]:
        with torch.no_grad():
            output = made.vision_model(pixels(Size(32, 32))).last_hidden_state
        names = [(name, sorted(vars(part))) for name, part in made.named_modules()]
        hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in made.modules()]
        return [value.clone() for value in made.state_dict().values()], [output], names, hooks

    made = hub.model(kind)
    weights, output, *rest = state()
    backbone = towers.adapt(made, hub.tokenizer(kind))
    run(
        backbone.vision,
        pixels(Size(32, 48)),
        {name: METHODS[name] for name in ("gem", "maskclip", "clip")},
        pooled=True,
    )
    backbone.encode_text(PROMPTS)
    check(backbone.vision)
    weights_after, output_after, *rest_after = state()
    assert all(map(torch.equal, weights, weights_after)) and torch.equal(output[0], output_after[0])
    assert rest == rest_after


@torch.no_grad()
def test_low_rank_adapters_count(kind):
    """What fine-tuning puts in place of a projection is called, not read past."""
    made = hub.model(kind)
    for layer in made.vision_model.encoder.layers:
        for name in ("qkv", "projection") if kind == "blip" else ("q_proj", "v_proj", "out_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))
    fused = [row for row in check(ours.read_tower(made)) if not row.exact]
    assert max(max(row.tokens, row.pooled) for row in fused) < 2e-5


class Adapted(torch.nn.Module):
    """A linear layer and a low-rank update beside it."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base, noise = base, torch.Generator().manual_seed(1)
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features, generator=noise) / 4)
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2, generator=noise) / 4)
        self.eval()

    def forward(self, given: Tensor) -> Tensor:
        return self.base(given) + given @ self.down.T @ self.up.T


# Prompts --------------------------------------------------------------------------------------------------------------


def library_text(kind: str, made: Any, prompt: str) -> Tensor:
    """Unit text features `(1, e)` as the documentation of each model says to make them, of one prompt."""
    words = hub.tokenizer(kind)
    if kind == "siglip":
        given = words([prompt.lower()], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        features = made.get_text_features(given["input_ids"]).pooler_output
    elif kind == "blip":
        given = words([prompt], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        encoded = made.text_encoder(given["input_ids"], attention_mask=given["attention_mask"])
        features = made.text_proj(encoded.last_hidden_state[:, 0])
    else:
        given = words([prompt], truncation=True, max_length=16, return_tensors="pt")
        features = made.get_text_features(given["input_ids"], given["attention_mask"]).pooler_output
    return normalize(features, dim=-1)


@torch.no_grad()
def test_prompts_of_unequal_length_equal_each_alone(kind, made, backbone):
    together = backbone.encode_text(PROMPTS)
    for row, prompt in zip(together, PROMPTS, strict=True):
        torch.testing.assert_close(row[None], library_text(kind, made, prompt), rtol=0, atol=2e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


@torch.no_grad()
def test_siglip_attends_to_padding_as_it_was_trained():
    made, words = hub.model("siglip"), hub.tokenizer("siglip")
    given = words(["cat"], padding="max_length", max_length=16, return_tensors="pt")
    masked = made.get_text_features(given["input_ids"], given["attention_mask"]).pooler_output
    found = towers.adapt(made, words).encode_text(["cat"])
    assert (found - normalize(masked, dim=-1)).abs().max() > 1e-3


def test_siglip_reads_lower_case():
    """The second generation's tokenizer has words of its own for upper case, which training never saw."""
    made, words = hub.model("siglip"), hub.tokenizer("siglip")
    assert words("CAT").input_ids != words("cat").input_ids
    backbone = towers.adapt(made, words)
    assert torch.equal(backbone.encode_text(["A photo of a CAT"]), backbone.encode_text(["a photo of a cat"]))


def test_what_does_not_fit_the_context_is_said(kind, backbone):
    assert backbone.text.truncated("a photo of the cat") == ""
    long = " ".join(["cat"] * 14 + ["dog", "bus", "grass"])
    room = {"siglip": 15}.get(kind, 14)  # and <eos>, or a token at either end
    assert backbone.text.truncated(long).split() == long.split()[room:]
    assert torch.equal(backbone.encode_text([long]), backbone.encode_text([" ".join(long.split()[:room])]))


def test_prompts_can_be_encoded_in_threads(backbone):
    """A tokenizer cannot: how it cuts and pads is its own state."""
    with ThreadPoolExecutor(8) as pool:
        tasks = pool.map(lambda _: (backbone.encode_text(PROMPTS), backbone.text.truncated(PROMPTS[1])), range(64))
        encoded, cut = zip(*tasks, strict=True)
    assert all(torch.equal(features, encoded[0]) for features in encoded) and not any(cut)


def test_blip_reads_35_tokens_of_its_512():
    made = hub.model("blip", max_position_embeddings=64)
    backbone = towers.adapt(made, hub.tokenizer("blip"))
    assert backbone.text.truncated(" ".join(["cat"] * 34)) == "cat"


def test_the_first_siglips_tokenizer(tmp_path):
    """Of sentencepiece: drops case and punctuation itself."""
    words = hub.sentencepiece_tokenizer(tmp_path)
    made = transformers.SiglipModel(hub.configuration("siglip", len(words))).eval()
    backbone = towers.load(checkpoint(tmp_path / "here", "siglip", made, words), device="cpu")
    features = backbone.encode_text(["A photo of the cat.", "a photo of the cat", "the dog"])
    assert torch.equal(features[0], features[1]) and not torch.equal(features[1], features[2])
    assert backbone.text.truncated("cat") == ""
    assert backbone.text.truncated("the cat " * 20).endswith("the cat")


def test_the_logit_scale_is_the_models_own(kind, made, backbone):
    expected = 1 / 0.07 if kind == "blip" else made.logit_scale.exp().item()
    assert backbone.logit_scale == pytest.approx(expected, abs=1e-6)


# Loading and adapting -------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_by_its_path(folder, made, monkeypatch):
    for name in (f"local-dir:{folder}", str(folder)):
        loaded = towers.load(name, device="cpu").model
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in made.state_dict().items())
        assert not loaded.training


@pytest.mark.slow
def test_the_command_loads_a_repository_without_network_once_it_was_downloaded(tmp_path):
    checkpoint(tmp_path / "made", "clip")
    as_downloaded(tmp_path / "made", tmp_path, "some/model")
    Image.new("RGB", (40, 32), "red").save(tmp_path / "cat.png")
    result = offline(
        tmp_path, "ground", "cat.png", "-p", "cat", "--model", "some/model", "--image-size", "short:32", "--json"
    )
    assert result.returncode == 0, result.stderr
    assert "some/model" in result.stdout
    assert "Loading weights" not in result.stderr


def test_a_repository_is_loaded_from_where_it_was_downloaded_to(folder, made, tmp_path, without_network):
    as_downloaded(folder, tmp_path, "some/model")
    loaded = towers.load("some/model", device="cpu", cache_dir=str(tmp_path / "hub"))
    assert loaded.name == "some/model"
    assert torch.equal(loaded.vision.patch_weight, ours.read_tower(made).patch_weight)
    with pytest.raises(WeightsError, match="cannot load some/other"):
        towers.load("some/other", device="cpu", cache_dir=str(tmp_path / "hub"))


def test_a_processor_brings_the_pictures_statistics(folder, kind, made):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    family = {"clip": "CLIP", "metaclip_2": "CLIP", "siglip": "Siglip", "blip": "Blip"}[kind]
    pictures = getattr(transformers, f"{family}ImageProcessorPil")(**settings)
    processor = getattr(transformers, f"{family}Processor")(pictures, hub.tokenizer(kind))
    preprocess = towers.adapt(made, processor).preprocess
    assert (preprocess.mean, preprocess.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (preprocess.interpolation, preprocess.image_size) == ("bilinear", (32, 32))


def test_statistics_come_from_the_checkpoint(kind, made, tmp_path):
    name = checkpoint(tmp_path, kind, made, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3], resample=2)
    preprocess = towers.load(name, device="cpu").preprocess
    assert (preprocess.mean, preprocess.std, preprocess.interpolation) == ((0.1, 0.2, 0.3), (1, 2, 3), "bilinear")
    name = checkpoint(tmp_path, kind, made, do_normalize=False)
    assert towers.load(name, device="cpu").preprocess.mean == (0, 0, 0)
    name = checkpoint(tmp_path, kind, made, do_rescale=False)
    with pytest.raises(UnsupportedModelError, match="not scaled"):
        towers.load(name, device="cpu")


def test_with_a_tokenizer_alone_they_are_the_familys(kind, made):
    preprocess = towers.adapt(made, hub.tokenizer(kind)).preprocess
    expected = ((0.5,) * 3, (0.5,) * 3) if kind == "siglip" else (open_clip.OPENAI_DATASET_MEAN, None)
    assert preprocess.mean == pytest.approx(expected[0])
    assert preprocess.interpolation == "bicubic"


def test_a_model_in_training_mode_is_refused(kind):
    made = hub.model(kind)
    made.vision_model.encoder.layers[0].self_attn.train()
    with pytest.raises(InputError, match="training mode"):
        towers.adapt(made, hub.tokenizer(kind))


def test_hooks_on_attention_are_refused(kind):
    made = hub.model(kind)
    handle = made.vision_model.encoder.layers[2].self_attn.register_forward_hook(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match="wrappers or hooks"):
        towers.adapt(made, hub.tokenizer(kind))
    handle.remove()
    towers.adapt(made, hub.tokenizer(kind))


@torch.no_grad()
def test_a_model_that_was_asked_for_hidden_states_is_read(kind):
    """transformers leaves hooks of its own behind then."""
    made = hub.model(kind)
    made.vision_model(pixels(Size(32, 32)), output_hidden_states=True, output_attentions=True)
    assert any(layer.self_attn._forward_hooks for layer in made.vision_model.encoder.layers)
    towers.adapt(made, hub.tokenizer(kind))


def test_layers_of_another_class_are_refused(kind):
    made = hub.model(kind)
    layers = made.vision_model.encoder.layers
    layers[1].self_attn = type("Mine", (type(layers[1].self_attn),), {})(made.config.vision_config).eval()
    with pytest.raises(UnsupportedModelError, match="transformers' own"):
        towers.adapt(made, hub.tokenizer(kind))


def test_another_models_tokenizer_is_refused(kind, made):
    other = hub.tokenizer("clip") if kind != "clip" else None
    if other is not None:
        with pytest.raises(InputError, match="49408 words"):
            towers.adapt(made, other)
    with pytest.raises(InputError, match="expected a tokenizer or a processor"):
        towers.adapt(made, open_clip.get_tokenizer("ViT-B-16"))


def test_other_models_of_transformers_are_refused_with_the_reason():
    vision, text = hub.VISION, {**hub.TEXT, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    other = transformers.AltCLIPModel(transformers.AltCLIPConfig(vision_config=vision, text_config=text)).eval()
    with pytest.raises(UnsupportedModelError, match="it is none of CLIPModel"):
        towers.adapt(other, hub.tokenizer("siglip"))
    alone = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)).eval()
    with pytest.raises(UnsupportedModelError, match="none of CLIPModel, MetaClip2Model"):
        towers.adapt(alone, hub.tokenizer("clip"))
    headless = hub.model("siglip", {"vision_use_head": False})
    with pytest.raises(UnsupportedModelError, match="no pooling head"):
        towers.adapt(headless, hub.tokenizer("siglip"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder, dtype):
    half, exact = (towers.load(str(folder), device="cpu", dtype=some) for some in (dtype, "float32"))
    assert half.dtype == getattr(torch, dtype)
    assert half.logit_scale == pytest.approx(exact.logit_scale, abs=1e-6)
    picture = Image.effect_noise((48, 32), 90).convert("RGB")
    found, expected = (Localizer(some, size="short:32")(picture, ["cat", "dog"]).similarity for some in (half, exact))
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 0.2


def test_gem_end_to_end(folder):
    localizer = open_gem.load(str(folder), device="cpu", size="short:64")
    result = localizer(Image.effect_noise((96, 64), 90).convert("RGB"), ["cat", "the red bus"])
    assert result.similarity.shape == (2, 8, 12)
    assert result.similarity.isfinite().all() and result.similarity.std() > 1e-3
    assert result.heatmaps()["cat"].shape == (64, 96)


# Weights: all of them, or an error ------------------------------------------------------------------------------------


def spoiled(own: Path, **changes: Tensor | None) -> str:
    """Rewrite the weights of a folder, without what is None."""
    weights = load_file(own / "model.safetensors") | changes
    kept = {name: value.contiguous() for name, value in weights.items() if value is not None}
    save_file(kept, own / "model.safetensors", metadata={"format": "pt"})
    return str(own)


def refused(name: str, pretrained: Path | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        ours.load(name if pretrained else f"local-dir:{name}", None if pretrained is None else str(pretrained))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["vision_model.post_layernorm.weight", "vision_model.encoder.layers.3.mlp.fc1.bias"])
def test_a_folder_with_a_weight_missing_is_an_error(own, name):
    assert f"1 missing ({name})" in refused(spoiled(own, **{name: None}))


def test_a_folder_with_weights_that_do_not_fit_is_an_error(own):
    name = "vision_model.post_layernorm.bias"
    message = refused(spoiled(own, **{"extra": torch.zeros(1), name: torch.zeros(3)}))
    assert "1 unexpected (extra)" in message and f"1 of another shape ({name})" in message


def test_a_folder_with_weights_to_spare_is_loaded_with_a_warning(own, made):
    spoiled(own, extra=torch.zeros(1))
    with pytest.warns(UserWarning, match=r"has more weights than its architecture: 1 unexpected \(extra\)"):
        loaded = ours.load(f"local-dir:{own}")
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_buffers_that_older_versions_saved_are_no_weights(own, kind):
    prefix = "text_encoder" if kind == "blip" else "text_model"
    spoiled(own, **{f"{prefix}.embeddings.position_ids": torch.arange(16)[None]})
    ours.load(f"local-dir:{own}")


def test_half_precision_files_are_read_as_float32(own, made, kind):
    """transformers would follow the configuration."""
    spoiled(own, **{name: value.half() for name, value in made.state_dict().items()})
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    loaded = _hub.fetch(getattr(transformers, hub.KINDS[kind]), f"local-dir:{own}")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_an_empty_folder_and_half_a_folder(own, tmp_path):
    (own / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refused(str(own))
    assert "no such folder" in refused(str(tmp_path / "nowhere"))


def test_a_folder_without_a_tokenizer_is_an_error(own):
    """transformers would make one of no words."""
    for file in own.iterdir():
        if "token" in file.name or file.suffix in (".txt", ".model") or file.name == "vocab.json":
            file.unlink()
    assert "tokenizer" in refused(str(own))


def test_a_folder_that_says_nothing_of_pictures_is_an_error(own):
    (own / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in refused(str(own))


def test_code_of_a_checkpoint_is_not_run(own):
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "mine.py").write_text(f"open({str(own / 'executed')!r}, 'w')")
    with pytest.raises(UnsupportedModelError, match="never run"):
        ours.load(f"local-dir:{own}")
    assert not (own / "executed").exists()


def test_code_of_a_tokenizer_is_not_run(own):
    class Demanding:
        @staticmethod
        def from_pretrained(*_: Any, **settings: Any) -> None:
            assert settings["trust_remote_code"] is False
            raise ValueError("contains custom code which must be executed: set `trust_remote_code=True`")

    with pytest.raises(UnsupportedModelError, match="never run"):
        _hub.fetch_tokenizer(f"local-dir:{own}", kind=Demanding)


def test_an_error_that_is_its_own_cause_comes_to_an_end():
    error, other = ValueError("one"), ValueError("two")
    error.__cause__, other.__cause__ = other, error
    with pytest.raises(WeightsError, match="cannot load it: one"), _hub._reporting("it"):
        raise error


class Harmful:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_a_pickle_that_runs_code_is_refused(own, tmp_path):
    (own / "model.safetensors").unlink()
    torch.save({"weights": Harmful(tmp_path / "executed")}, own / "pytorch_model.bin")
    assert "needs code to run" in refused(str(own))
    message = refused("openai/clip-vit-base-patch16", own / "pytorch_model.bin")
    assert "needs code to run" in message
    assert not (tmp_path / "executed").exists()


def test_types_that_nothing_reads_are_named(own):
    (own / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(
        UnsupportedModelError, match="'vit' are not read, only clip, metaclip_2, siglip, siglip2, tipsv2, blip"
    ):
        ours.load(f"local-dir:{own}")
    (own / "config.json").write_text("{")
    assert "not a valid JSON" in refused(str(own))


def test_a_missing_package_is_said():
    class Kind:
        @staticmethod
        def from_pretrained(*args: Any, **settings: Any) -> Any:
            raise ImportError("\nSiglipTokenizer requires the SentencePiece library. Check out\nthe instructions")

    with pytest.raises(UnsupportedModelError, match="requires the SentencePiece library: pip install") as caught:
        _hub.fetch_tokenizer("some/model", kind=Kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("before", [None, "0"])
def test_no_request_to_convert_a_repository_is_sent(before, monkeypatch):
    """transformers would send one, in a thread, where a repository has pickles only."""
    name, seen = "DISABLE_SAFETENSORS_CONVERSION", []

    class Kind:
        @staticmethod
        def from_pretrained(*args: Any, **settings: Any) -> Any:
            seen.append(os.environ.get(name))
            raise OSError("no")

    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with pytest.raises(WeightsError):
        _hub.fetch(Kind, "some/model")
    assert seen == ["1"] and os.environ.get(name) == before


# Bare files of weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def architecture(monkeypatch, kind) -> str:
    """A name that stands for the tiny model."""
    sections = hub.configuration(kind, len(hub.tokenizer(kind))).to_dict()
    row = ours.Architecture(kind, sections["vision_config"], sections["text_config"], hub.OTHER[kind])
    monkeypatch.setitem(ours.ARCHITECTURES, "some/tiny", row)
    return "some/tiny"


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_a_file_of_weights_for_an_architecture(architecture, own, made, suffix):
    file = own / f"mine.{suffix}"
    weights = {name: value.contiguous() for name, value in made.state_dict().items()}
    save_file(weights, file) if suffix == "safetensors" else torch.save(weights, file)
    loaded = ours.load(architecture, str(file))
    assert loaded.name == f"some/tiny, {file}"
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in weights.items())
    torch.testing.assert_close(loaded.encode_text(PROMPTS), ours.load(f"local-dir:{own}").encode_text(PROMPTS))


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "model._orig_mod.module."])
def test_a_training_loops_wrapping_is_taken_off(prefix, architecture, own, made):
    state = {f"{prefix}{name}": value for name, value in made.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, own / "epoch_3.pt")
    loaded = ours.load(architecture, str(own / "epoch_3.pt")).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in made.state_dict().items())


def test_another_prefix_is_named(architecture, own, made):
    torch.save({f"student.{name}": value for name, value in made.state_dict().items()}, own / "student.pt")
    assert 'names fit without the prefix "student."' in refused(architecture, own / "student.pt")


def test_weights_of_another_image_size_are_refused(architecture, own, made):
    """transformers itself would take them, and say nothing."""
    name = next(name for name in made.state_dict() if "vision" in name and "position_embedding" in name)
    positions = made.state_dict()[name]
    larger = torch.zeros(*positions.shape[:-2], positions.shape[-2] + 20, positions.shape[-1])
    torch.save({**made.state_dict(), name: larger}, own / "larger.pt")
    assert f"1 of another shape ({name})" in refused(architecture, own / "larger.pt")


def test_a_file_of_other_weights_names_them(architecture, own, made):
    weights = {name: value for name, value in made.state_dict().items() if "layers.0.mlp.fc1" not in name}
    weights |= {f"extra.{index}": torch.zeros(1) for index in range(5)}
    torch.save(weights, own / "wrong.pt")
    message = refused(architecture, own / "wrong.pt")
    assert "missing (" in message and "encoder.layers.0.mlp.fc1." in message
    assert "5 unexpected (extra.0, extra.1, extra.2, …)" in message


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_broken_file_is_one_line(content, suffix, tmp_path):
    file = tmp_path / f"broken{suffix}"
    file.write_bytes(content)
    assert "cannot load" in refused("openai/clip-vit-base-patch16", file)


def test_a_file_that_is_none_and_a_folder_with_a_file(tmp_path):
    with pytest.raises(UnknownModelError, match="no such file: webli"):
        ours.load("google/siglip-base-patch16-224", "webli")
    with pytest.raises(UnknownModelError, match="brings its own weights"):
        ours.load(f"local-dir:{tmp_path}", "mine.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in refused("openai/clip-vit-base-patch16", tmp_path / "list.pt")


def test_an_uncertain_architecture_is_not_trusted_with_a_file(tmp_path, without_network):
    """Shapes would fit whatever the activation: its own configuration is asked for, and is not there."""
    torch.save({}, tmp_path / "mine.pt")
    with pytest.raises(WeightsError, match="cannot load wkcn/TinyCLIP"):
        ours.load("wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M", str(tmp_path / "mine.pt"), cache_dir=str(tmp_path))


# Salesforce's own files -----------------------------------------------------------------------------------------------


@pytest.fixture
def blip(monkeypatch) -> Any:
    """A small BLIP as "blip-base" says, but for the sizes."""
    row, words = ours.ARCHITECTURES["blip-base"], len(hub.tokenizer("blip"))
    small = hub.configuration("blip", words, {**row.vision, **hub.VISION}, is_decoder=False).to_dict()
    row = ours.Architecture("blip", small["vision_config"], small["text_config"], hub.OTHER["blip"], original=True)
    monkeypatch.setitem(ours.ARCHITECTURES, "blip-base", row)
    return hub.model("blip", {"layer_norm_eps": 1e-6})


def original(folder: Path, weights: dict[str, Tensor]) -> str:
    """A file as Salesforce's training writes it, with BERT's vocabulary beside it."""
    torch.save({"model": weights, "epoch": 19, "config": {"vit": "base"}}, folder / "model_base.pth")
    words = sorted(hub.tokenizer("blip").get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("\n".join(word for word, _ in words))
    return str(folder / "model_base.pth")


@torch.no_grad()
def test_salesforces_file_equals_the_model_of_transformers(blip, tmp_path):
    loaded = ours.load("blip-base", original(tmp_path, salesforce(blip)))
    same = towers.adapt(blip, hub.tokenizer("blip"))
    assert loaded.logit_scale == pytest.approx(20)
    assert loaded.preprocess == same.preprocess
    torch.testing.assert_close(loaded.encode_text(PROMPTS), same.encode_text(PROMPTS), rtol=0, atol=1e-6)
    theirs, ours_ = (
        run(some.vision, pixels(Size(32, 48)), {"gem": METHODS["gem"]}, pooled=True)["gem"] for some in (same, loaded)
    )
    assert torch.equal(theirs.patches, ours_.patches)
    torch.testing.assert_close(theirs.pooled, ours_.pooled, rtol=0, atol=0)
    assert all(row.tokens == row.pooled == 0 for row in check(loaded.vision) if row.exact)
    vision: Any = loaded.model.vision_model
    norms = [part for part in vision.modules() if isinstance(part, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}


def test_its_image_size_is_that_of_its_positions(blip, tmp_path):
    larger = hub.model("blip", {"image_size": 48})
    loaded = ours.load("blip-base", original(tmp_path, salesforce(larger)))
    assert loaded.vision.trained == loaded.preprocess.image_size == (48, 48)


def test_what_matching_needs_may_be_missing(blip, tmp_path):
    weights = {name: value for name, value in salesforce(blip).items() if "crossattention" not in name}
    weights = {name: value for name, value in weights.items() if not name.startswith(("itm_head", "temp"))}
    loaded = ours.load("blip-base", original(tmp_path, weights))
    assert loaded.logit_scale == pytest.approx(1 / 0.07)
    assert not loaded.model.get_parameter("itm_head.weight").any()


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ("visual_encoder.blocks.2.attn.qkv.weight", "vision_model.encoder.layers.2.self_attn.qkv.weight"),
        ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.norm.bias", "vision_model.post_layernorm.bias"),
        ("vision_proj.weight", "vision_proj.weight"),
        ("text_proj.bias", "text_proj.bias"),
        ("text_encoder.encoder.layer.1.output.dense.weight", "text_encoder.encoder.layer.1.output.dense.weight"),
    ],
)
def test_what_contrast_needs_may_not(blip, tmp_path, theirs, named):
    """Nor does a momentum encoder's weight of the same name stand in for it."""
    weights = salesforce(blip)
    del weights[theirs]
    with pytest.raises(WeightsError, match=rf"1 missing \({named}\)"):
        ours.load("blip-base", original(tmp_path, weights))


def test_a_name_of_salesforces_needs_its_file():
    with pytest.raises(UnknownModelError, match="needs a file of weights"):
        ours.load("blip-large")


# An independent implementation: open_clip -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("quick", [False, True])
def test_the_same_weights_give_the_same_through_open_clip(quick):
    """Tokens, pooled embedding, every method and texts; open_clip's tower was read by other code."""
    config: dict[str, Any] = {**CONFIG, "quick_gelu": quick}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = open_clip.CLIP(**config).eval()
    native = ours_of_open_clip.adapt(theirs, open_clip.SimpleTokenizer(context_length=16))
    converted = towers.adapt(from_open_clip(theirs, config), hub.tokenizer("clip"))
    given = pixels(Size(32, 32))
    expected, found = (run(some.vision, given, METHODS, pooled=True) for some in (native, converted))
    for name in METHODS:
        torch.testing.assert_close(found[name].tokens, expected[name].tokens, rtol=0, atol=2e-5)
        torch.testing.assert_close(found[name].pooled, expected[name].pooled, rtol=0, atol=2e-5)
    texts = ["a photo of a cat, and 2 dogs!", "it's raining", "the " * 30]
    torch.testing.assert_close(converted.encode_text(texts), native.encode_text(texts), rtol=0, atol=2e-5)
    assert [converted.text.truncated(text) for text in texts] == [native.text.truncated(text) for text in texts]
    assert converted.logit_scale == pytest.approx(native.logit_scale)


# The table ------------------------------------------------------------------------------------------------------------

SAME = {  # a name here -> open_clip's for the same weights
    "openai/clip-vit-base-patch32": "ViT-B-32-quickgelu",
    "openai/clip-vit-base-patch16": "ViT-B-16-quickgelu",
    "openai/clip-vit-large-patch14": "ViT-L-14-quickgelu",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336-quickgelu",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "ViT-B-16",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "ViT-H-14",
    "facebook/metaclip-b16-400m": "ViT-B-16-quickgelu",
    "facebook/metaclip-2-worldwide-huge-quickgelu": "ViT-H-14-worldwide-quickgelu",
    "google/siglip-base-patch16-224": "ViT-B-16-SigLIP",
    "google/siglip-so400m-patch14-384": "ViT-SO400M-14-SigLIP-384",
    "google/siglip2-base-patch16-224": "ViT-B-16-SigLIP2",
    "google/siglip2-base-patch16-naflex": "ViT-B-16-SigLIP2",
    "google/siglip2-so400m-patch16-naflex": "ViT-SO400M-16-SigLIP2-256",
}
DEFAULTS = {"google/tipsv2-b14"}  # what transformers takes for this kind where nothing is said


@pytest.mark.parametrize("name", ours.ARCHITECTURES)
def test_an_architecture_is_of_a_family_and_is_open_clips_where_that_has_it(name):
    row = ours.ARCHITECTURES[name]
    config = row.configuration()
    family = find_family("transformers", name)
    assert family is not None and family.tower.endswith("Tower")
    if name in DEFAULTS:
        assert config.to_dict() == transformers.AutoConfig.for_model(row.kind).to_dict()
        return
    if name not in SAME:
        assert row.original or not row.certain
        return
    theirs = open_clip.get_model_config(SAME[name])
    assert theirs is not None
    text, vision = config.text_config, config.vision_config
    expected = theirs["text_cfg"]
    assert (text.hidden_size, text.num_hidden_layers) == (expected["width"], expected["layers"])
    assert (text.num_attention_heads, text.vocab_size) == (expected["heads"], expected["vocab_size"])
    assert text.max_position_embeddings == expected["context_length"]
    expected = theirs["vision_cfg"]
    if row.kind == "siglip2":  # of variable resolution: a number of patches stands for a size
        assert vision.num_patches * vision.patch_size**2 == 256**2
    else:
        assert vision.image_size == expected["image_size"]
    if not row.kind.startswith("siglip"):
        heads = expected["width"] // expected.get("head_width", 64)
        assert (vision.hidden_size, vision.num_hidden_layers) == (expected["width"], expected["layers"])
        assert (vision.num_attention_heads, vision.patch_size) == (heads, expected["patch_size"])
        assert config.projection_dim == theirs["embed_dim"]
        acts = {"quick_gelu" if theirs.get("quick_gelu") else "gelu"}
        assert {text.hidden_act, vision.hidden_act} == acts
        assert {text.layer_norm_eps, vision.layer_norm_eps} == {1e-5}


def test_every_example_is_in_the_table():
    for family in FAMILIES:
        if family.library == "transformers":
            assert all(name in ours.ARCHITECTURES and tag is None for name, tag in family.examples)
            assert all(find_family("transformers", name) is family for name, _ in family.examples)


def test_a_tower_of_an_architecture_needs_no_network(monkeypatch, kind):
    row = ours.Architecture(kind, hub.VISION, hub.TEXT, hub.OTHER[kind])
    monkeypatch.setitem(ours.ARCHITECTURES, "some/tiny", row)
    tower = towers.build_tower("some/tiny")
    assert isinstance(tower, ModuleTower) and tower.layers == 6
    assert tower.trained_positions.std() > 1e-3
    assert all(row.tokens == row.pooled == 0 for row in check(tower) if row.exact)


def test_a_tower_of_another_repository_needs_its_configuration_only(folder, tmp_path, monkeypatch):
    alone = tmp_path / "configuration"
    alone.mkdir()
    shutil.copy(folder / "config.json", alone)
    assert towers.build_tower(f"local-dir:{alone}").layers == 6


# What is not asked for is not imported --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_of_open_clip_wakes_none_of_this(tiny):
    code = f"""
import sys, open_gem
from PIL import Image
open_gem.load({tiny!r}, device="cpu")(Image.new("RGB", (64, 64)), ["cat"])
assert not [name for name in sys.modules if name.startswith("open_gem.towers.transformers")]
assert "open_gem.towers.hub" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_subclass_is_said_to_be_another_class(made, own):
    """It may compute something else; the message is about it, not about open_clip."""
    kind = type(made)
    mine = type("Mine", (kind,), {})
    made.__class__ = mine
    try:
        with pytest.raises(UnsupportedModelError, match="cannot read Mine: it is none of CLIPModel"):
            towers.adapt(made, None)
    finally:
        made.__class__ = kind
