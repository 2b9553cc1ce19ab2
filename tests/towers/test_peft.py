"""Models with LoRA adapters of PEFT, merged and not: the table in docs/guides/fine-tuned.md."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hub_checkpoints import model as random_model
from hub_checkpoints import tokenizer

import open_gem
from open_gem.data.scenes import scene
from open_gem.errors import UnsupportedModelError

peft = pytest.importorskip("peft", reason="needs pip install peft")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

SCENE = scene(0, size=128)


def with_lora(model, targets):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)  # adapters that change something
    return peft.get_peft_model(model, config).eval()


def maps_of(model, words):
    return open_gem.adapt(model, words)(SCENE.image, ["a cat", "a dog"]).similarity


@pytest.fixture
def of_open_clip():
    folder = f"local-dir:{Path(open_gem.__file__).parent / 'towers' / 'embedded'}"
    model: Any = open_clip.create_model_from_pretrained(folder, return_transform=False)
    return model.eval(), open_clip.get_tokenizer(folder)


def test_merged_adapters_change_the_maps(of_open_clip):
    model, words = of_open_clip
    before = maps_of(model, words).clone()
    after = maps_of(with_lora(model, r".*\.(attn|c_fc|c_proj)").merge_and_unload(), words)
    assert (after - before).abs().max() > 0.1


def test_transformers_gives_the_maps_of_the_merged_model_before_merging():
    lora = with_lora(random_model("clip"), ["q_proj", "k_proj", "v_proj", "out_proj"])
    words = tokenizer("clip")
    unmerged = maps_of(lora.get_base_model(), words).clone()
    torch.testing.assert_close(maps_of(lora.merge_and_unload(), words), unmerged, atol=2e-5, rtol=0)


def test_open_clip_gives_the_maps_of_the_merged_model_for_adapters_of_the_mlp(of_open_clip):
    model, words = of_open_clip
    lora = with_lora(model, r".*\.(c_fc|c_proj)")
    unmerged = maps_of(lora.get_base_model(), words).clone()
    torch.testing.assert_close(maps_of(lora.merge_and_unload(), words), unmerged, atol=2e-5, rtol=0)


def test_open_clip_itself_ignores_adapters_of_out_proj_until_they_are_merged(of_open_clip):
    model, words = of_open_clip
    before, pixels = maps_of(model, words).clone(), torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        embedded = model.encode_image(pixels)
        lora = with_lora(model, r".*\.out_proj")
        torch.testing.assert_close(lora.get_base_model().encode_image(pixels), embedded)
    torch.testing.assert_close(maps_of(lora.get_base_model(), words), before, atol=2e-5, rtol=0)
    assert (maps_of(lora.merge_and_unload(), words) - before).abs().max() > 0.05


@pytest.mark.parametrize("unwrapped", [False, True])
def test_what_cannot_be_read_is_refused_before_merging(of_open_clip, unwrapped):
    model, words = of_open_clip
    lora = with_lora(model, r".*\.attn")
    with pytest.raises(UnsupportedModelError):
        open_gem.adapt(lora.get_base_model() if unwrapped else lora, words)
