"""open_clip's own vision transformer in all its kinds, against its own forward."""

import copy
import gc
import weakref
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from open_gem.errors import UnsupportedModelError
from open_gem.towers.check import check, randomize
from open_gem.towers.native import NativeTower
from open_gem.towers.open_clip import read_tower
from open_gem.types import Grid, Size

VISION = {"image_size": 32, "layers": 4, "width": 32, "head_width": 8, "patch_size": 8}
POOLER: dict[str, Any] = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 3}
KINDS: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "CLIP, not square": {"image_size": (32, 48), "patch_size": (8, 16)},
    "layer scale": {"ls_init_value": 1e-4},
    "average of patches": {"pool_type": "avg"},
    "CLIPA": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    "CLIPA, fixed positions": {
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "no_ln_pre": True,
        "pos_embed_type": "sin_cos_2d",
    },
    "CoCa": POOLER,
    "CoCa, as wide as the joint space": {**POOLER, "width": 24, "head_width": 6},
    "tokens too": {"output_tokens": True},
}
SIZES = (Size(32, 48), Size(48, 32), Size(16, 64), Size(64, 80))


def native(quick: bool = False, **vision: Any) -> NativeTower:
    """A tower with random weights; with every zero and one of a fresh model among them stirred."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = open_clip.CLIPVisionCfg(**{**VISION, **vision})
        module = open_clip.model._build_vision_tower(24, config, quick).eval()
    randomize(module)
    tower = read_tower(module, "test")
    assert isinstance(tower, NativeTower)
    return tower


def tokens(tower: NativeTower) -> Tensor:
    return torch.randn(2, 9, tower.module.conv1.out_channels, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quick", [False, True])
def test_every_kind_equals_its_library(kind, quick):
    tower = native(quick, **KINDS[kind])
    for difference in check(tower, [tower.trained, *SIZES]):
        assert difference.fits(torch.float32), difference


def test_the_check_sees_a_tower_that_is_read_wrongly(monkeypatch):
    tower = native()
    resample = tower.resample_positions
    monkeypatch.setattr(tower, "resample_positions", lambda grid: resample(grid).roll(1, 0))
    assert min(difference.tokens for difference in check(tower)) > 1e-3
    tower = native()
    monkeypatch.setattr(tower, "pool", lambda tokens: tower.project(tokens[:, 1]))
    assert min(difference.pooled for difference in check(tower)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["CLIP", "layer scale", "CoCa", "CoCa, as wide as the joint space"])
def test_a_tokens_place_is_what_the_head_makes_of_it_alone(kind):
    tower = native(**KINDS[kind])
    given = tokens(tower)
    alone = torch.stack([tower.pool(given[:, index, None]) for index in range(9)], dim=1)
    torch.testing.assert_close(tower.project(given), alone, rtol=0, atol=2e-6)
    assert (alone[:, 0] - alone[:, 1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["average of patches", "CLIPA"])
def test_where_patches_are_averaged_a_patchs_place_is_the_mean_of_one(kind):
    tower = native(**KINDS[kind])
    given = tokens(tower)
    alone = torch.stack([tower.pool(given[:, [0, index]]) for index in range(1, 9)], dim=1)
    torch.testing.assert_close(tower.project(given)[:, 1:], alone, rtol=0, atol=2e-6)


@torch.no_grad()
def test_with_attention_pooling_the_class_tokens_recipe_would_be_another_place():
    """What gives others next to nothing on such models: final norm and projection, past the pool."""
    tower = native(**KINDS["CoCa, as wide as the joint space"])
    given = tokens(tower)
    recipe = tower.module.ln_post(given) @ tower.module.proj
    assert torch.cosine_similarity(recipe, tower.project(given), dim=-1).abs().mean() < 0.5


@pytest.mark.parametrize("grid", [(4, 6), (8, 8), (2, 3)])
def test_positions_are_those_of_open_clip_loading_into_another_size(grid):
    tower, (rows, cols) = native(), grid
    larger = native(image_size=(8 * rows, 8 * cols))
    weights = {"visual.positional_embedding": tower.module.positional_embedding.detach()}
    whole = torch.nn.Module()
    whole.visual = larger.module
    open_clip.model.resize_pos_embed(weights, whole)
    torch.testing.assert_close(tower.positions(Grid(*grid)), weights["visual.positional_embedding"], rtol=0, atol=1e-6)


def test_another_grid_of_as_many_patches_is_another_grid():
    """open_clip's own loading counts patches, and would leave them where they were."""
    tower = native()
    assert not torch.equal(tower.positions(Grid(2, 8)), tower.positions(Grid(4, 4)))


def test_hooks_on_a_block_would_not_be_heard_and_are_refused():
    tower = native()
    tower.module.transformer.resblocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="wrappers or hooks"):
        read_tower(tower.module, "test")


@torch.no_grad()
def test_a_copy_of_a_tower_reads_the_copied_weights():
    tower = native()
    copied = copy.deepcopy(tower)
    before = tower.blocks(Grid(4, 4))[0].qkv(tokens(tower)).q
    for parameter in copied.module.parameters():
        parameter.zero_()
    assert torch.equal(tower.blocks(Grid(4, 4))[0].qkv(tokens(tower)).q, before)
    assert not copied.blocks(Grid(4, 4))[0].qkv(tokens(tower)).q.any()


def test_a_tower_goes_when_its_last_user_does():
    """Without waiting for the garbage collector: on a GPU its memory would stay taken."""
    gc.disable()
    try:
        tower = native(**KINDS["CoCa"])
        check(tower)
        gone = weakref.ref(tower)
        del tower
        assert gone() is None
    finally:
        gc.enable()


def test_what_was_made_in_inference_mode_serves_gradients_too():
    tower = native()
    with torch.inference_mode():
        tower.embed(torch.zeros(1, 3, 48, 64))
    embedded, _ = tower.embed(torch.zeros(1, 3, 48, 64))
    embedded.sum().backward()
    assert tower.module.conv1.weight.grad is not None


def test_trained_positions_are_not_resampled():
    tower = native()
    assert torch.equal(tower.positions(Grid(4, 4)), tower.module.positional_embedding)
    assert tower.positions(Grid(4, 6)).shape == (25, 32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["CLIP", "CoCa"])
def test_a_model_that_is_cast_after_it_was_read_stays_equal(kind, dtype):
    tower = native(**KINDS[kind])
    check(tower)  # positions of these sizes are known now
    tower.module.to(dtype)
    differences = check(tower)
    assert all(difference.fits(dtype) for difference in differences), differences
