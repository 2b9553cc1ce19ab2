"""TIPSv2 and SigLIP 2 of variable resolution, on tiny random checkpoints, against transformers' own results."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hub_checkpoints import TEXT, VISION, gemma_like
from PIL import Image
from torch.nn.functional import normalize

from open_gem import METHODS, Localizer, run, towers
from open_gem.towers import transformers as ours
from open_gem.towers.check import check, randomize
from open_gem.types import Size

SIZES = (Size(32, 32), Size(64, 64), Size(16, 16), Size(32, 48), Size(72, 24), Size(16, 64))
TIPS = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
VARIABLE = {name: value for name, value in VISION.items() if name != "image_size"} | {"num_patches": 16}
PROMPTS = ["cat", "a photo of the red bus on the grass"]


def model(kind: str) -> Any:
    """A model with random weights, no parameter of which is all zeros or ones."""
    text = {**TEXT, "vocab_size": len(gemma_like()) + 8, "bos_token_id": None, "eos_token_id": 1}
    vision = {"tipsv2": TIPS, "siglip2": VARIABLE}[kind]
    config = transformers.AutoConfig.for_model(kind, vision_config=vision, text_config=text)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {"tipsv2": transformers.Tipsv2Model, "siglip2": transformers.Siglip2Model}[kind](config).eval()
    randomize(made)
    return made


@pytest.fixture(scope="module", params=["tipsv2", "siglip2"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(kind: str) -> Any:
    return model(kind)


@pytest.fixture(scope="module")
def folder(kind: str, made: Any, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(kind)
    made.save_pretrained(place)
    gemma_like().save_pretrained(place)
    if kind == "tipsv2":
        transformers.Tipsv2ImageProcessor().save_pretrained(place)
    else:
        transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(place)
    return place


@pytest.mark.parametrize("size", SIZES)
def test_every_grid_equals_the_library(made: Any, size: Size):
    for difference in check(ours.read_tower(made), [size]):
        limit = 0 if difference.exact else 2e-5
        assert max(difference.tokens, difference.pooled) <= limit, difference


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_cast_stays_equal(kind: str, dtype: torch.dtype):
    tower = ours.read_tower(model(kind).to(dtype))
    assert all(row.tokens == row.pooled == 0 for row in check(tower) if row.exact)


@torch.no_grad()
def test_a_loaded_checkpoint_scores_image_and_texts_as_the_library(kind: str, made: Any, folder: Path):
    backbone = towers.load(f"local-dir:{folder}", device="cpu")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    localizer = Localizer(backbone, "clip", size="native", template="{}")
    result = localizer(Image.fromarray(noise), PROMPTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    names = ("input_ids", "attention_mask") if kind == "tipsv2" else ("input_ids",)
    pixels = torch.from_numpy(noise).permute(2, 0, 1)[None] / 255
    if kind == "tipsv2":
        assert backbone.preprocess.mean == (0, 0, 0) and backbone.preprocess.std == (1, 1, 1)
        images = {"pixel_values": pixels}
    else:
        images = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16, do_resize=False)(
            [Image.fromarray(noise)], return_tensors="pt"
        )
    outcome = made(**images, **{name: words[name] for name in names})
    assert result.scores is not None
    scaled = backbone.logit_scale * result.scores + (backbone.logit_bias or 0)
    torch.testing.assert_close(scaled, outcome.logits_per_image[0], rtol=0, atol=2e-3)
    assert backbone.preprocess.image_size == (32, 32)


@torch.no_grad()
def test_the_published_recipe_of_tipsv2_is_the_row_maskclip():
    """The last block with values for attention, its residual and MLP kept, then the final norm."""
    made = model("tipsv2")
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    encoder, last = made.vision_model.encoder, made.vision_model.encoder.layer[-1]
    hidden = made.vision_model.embeddings(pixels)
    for layer in encoder.layer[:-1]:
        hidden = layer(hidden)
    values = last.attention.o_proj(last.attention.v_proj(last.norm1(hidden)))
    hidden = hidden + last.layer_scale1(values)
    hidden = hidden + last.layer_scale2(last.mlp(last.norm2(hidden)))
    expected = normalize(made.vision_model.layernorm(hidden)[:, 2:], dim=-1)

    encoded = run(ours.read_tower(made), pixels, {"it": METHODS["maskclip"]})["it"]
    torch.testing.assert_close(normalize(encoded.patches, dim=-1), expected, rtol=0, atol=2e-6)
