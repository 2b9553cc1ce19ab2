"""The towers that open_clip takes from timm: every kind, made small, against the library's own forward."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.patch_embed import PatchEmbedWithSize
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

from open_gem.method.run import run
from open_gem.method.table import METHODS
from open_gem.towers.base import ModuleTower
from open_gem.towers.check import check
from open_gem.towers.families import find_tower
from open_gem.types import Grid, Size

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
CONV = {**SMALL, "img_size": 64, "patch_size": 1}  # convolutions by 16, then patches of one place
VITAMIN = {
    **CONV,
    "embed_cfg": VitCfg((8, 16, 32), (1, 2, 1), 8, VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), "1d"),
}
EXTRAS = {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.1, "reg_tokens": 2}

# What open_clip's configurations say (pool, proj), timm's name, and what makes it small.
KINDS: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "SigLIP": ("vit_base_patch16_siglip_224", "map", "none", SMALL),
    "MobileCLIP-B": ("vit_base_mci_224", "token", None, CONV),
    "MobileCLIP2-L": ("vit_large_patch14_clip_224", "token", None, SMALL),
    "ViTamin": ("vitamin_small_224", "", "linear", VITAMIN),
    "ViTamin-XL": ("vitamin_xlarge_256", "", "linear", {**VITAMIN, "dynamic_img_size": True}),
    "average": ("vit_medium_patch16_gap_256", "", "linear", SMALL),
    "every extra": ("vit_base_patch16_224", "token", "mlp", {**SMALL, **EXTRAS}),
    "any size": ("vit_base_patch16_224", "avg", None, {**SMALL, "reg_tokens": 1, "dynamic_img_size": True}),
    "oblong patch": ("vit_base_patch16_224", "token", None, {**SMALL, "patch_size": (8, 16), "img_size": (32, 48)}),
    "EVA01": ("eva_giant_patch14_224", "token", None, SMALL),
    "EVA02": ("eva02_base_patch16_clip_224", "token", None, SMALL),
    "EVA02, any size": ("eva02_base_patch16_clip_224", "token", None, {**SMALL, "dynamic_img_size": True}),
    "EVA02-E": ("eva02_enormous_patch14_clip_224", "token", None, SMALL),
    "PE": ("vit_pe_core_tiny_patch16_384", "map", None, {**SMALL, "attn_pool_num_heads": 4, "qk_norm": True}),
    "PE-bigG": ("vit_pe_core_gigantic_patch14_448", "map", None, SMALL),
    "rotary only": ("vit_medium_patch16_rope_reg1_gap_256", "avg", None, SMALL),
}


def model(kind: str, **changes: Any) -> TimmModel:
    """The kind as open_clip builds it, with weights that leave nothing at zero or one."""
    name, pool, proj, small = KINDS[kind]
    if "mci" in name:
        stem = ConvStem(channels=(8, 8, 32), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=nn.GELU)
        small = {**small, "embed_layer": partial(HybridEmbed, backbone=stem, proj=False)}
    with patch.object(timm, "create_model", partial(timm.create_model, **{**small, **changes})):
        made = TimmModel(name, 24 if proj != "none" else 32, small["img_size"], pool, proj or "")
    random = torch.Generator().manual_seed(0)
    for key, weight in made.named_parameters():
        noise = torch.randn(weight.shape, generator=random)
        if weight.ndim == 1:  # norms and layer scales around 1, biases around 0
            weight.data = 0.3 * noise + (0 if "bias" in key else 1)
        else:  # tokens and positions are (1, n, d)
            weight.data = noise * (0.5 if weight.ndim == 3 else weight[0].numel() ** -0.5)
    for norm in (module for module in made.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean += 0.3
        norm.running_var *= 1.7
    return made.eval()


def adapted(module: Any) -> ModuleTower:
    tower: Any = find_tower("open_clip", module.trunk)
    assert tower is not None and tower.unsupported_reason(module) is None
    return tower(module)


@pytest.fixture(scope="module")
def towers() -> Callable[[str], ModuleTower]:
    made: dict[str, ModuleTower] = {}
    return lambda kind: made.setdefault(kind, adapted(model(kind)))


def sizes(tower: ModuleTower) -> list[Size]:
    """As trained; as many patches in another shape; fewer; more."""
    rows, cols = (side // patch for side, patch in zip(tower.trained, tower.patch, strict=True))
    grids = [(rows, cols), (rows // 2, cols * 2), (rows - 1, cols - 2), (rows + 1, cols + 2)]
    return [Size(y * tower.patch[0], x * tower.patch[1]) for y, x in grids]


def pixels(size: Size, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_pooled_embedding_are_the_librarys(kind, towers):
    for difference in check(towers(kind), sizes(towers(kind))):
        limit = 0 if difference.exact else 2e-5
        assert difference.tokens <= limit and difference.pooled <= limit, difference


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_methods_get_what_the_attention_sees(kind, towers, monkeypatch):
    """Its input, and q, k, v with norms and rotations applied, at every block of the library's own forward."""
    tower, size = towers(kind), sizes(towers(kind))[3]
    seen, attention = [], nn.functional.scaled_dot_product_attention
    library = deepcopy(tower.module)
    library.trunk.set_input_size(size)
    inputs, normed = [], []
    for block in library.trunk.blocks:
        block.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        block.attn.register_forward_pre_hook(lambda module, given, kwargs: normed.append(given[0]), with_kwargs=True)
    with monkeypatch.context() as context:
        context.setattr(
            nn.functional, "scaled_dot_product_attention", lambda *a, **k: seen.append(a[:3]) or attention(*a, **k)
        )
        library(pixels(size))
    blocks = tower.blocks(tower.embed(pixels(size))[1])
    assert len(blocks) == len(inputs) == tower.layers == 3
    for index, block in enumerate(blocks):
        torch.testing.assert_close(block.norm(inputs[index]), normed[index], rtol=0, atol=0)
        for ours, theirs in zip(block.qkv(normed[index]), seen[index], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_token_is_where_the_head_puts_it_alone(kind, towers):
    tower: Any = towers(kind)
    size = sizes(tower)[2]
    tokens, _ = tower.embed(pixels(size))
    projected = tower.project(tokens)
    assert projected.shape[:2] == tokens.shape[:2] and len(projected.unique(dim=1)[0]) == tokens.shape[1]
    if tower.trunk.global_pool == "token":
        torch.testing.assert_close(tower.pool(tokens), projected[:, 0], rtol=0, atol=5e-6)
        return
    # The mean leaves prefix tokens out; Eva's attention pool does not.
    prefix = tokens[:, : tower.prefix if tower.trunk.global_pool == "avg" else 0]
    for index in range(tower.prefix, tokens.shape[1]):
        alone = torch.cat([prefix, tokens[:, index : index + 1]], dim=1)
        torch.testing.assert_close(tower.pool(alone), projected[:, index], rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_can_be_read(kind, towers):
    tower = towers(kind)
    methods = {
        name: method if method.attention.stands_alone else replace(method, depth=2) for name, method in METHODS.items()
    }
    size = sizes(tower)[3]
    grid = Grid(size.height // tower.patch[0], size.width // tower.patch[1])
    for features in run(tower, pixels(size), methods).values():
        assert features.grid == grid and features.tokens.isfinite().all()
        assert features.patches.shape == (2, grid.patches, 32 if kind == "SigLIP" else 24)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_follows_a_model_that_moves(kind):
    tower = adapted(model(kind))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        tower.module.to(dtype)
        for difference in check(tower, sizes(tower)):
            assert tower.patch_weight.dtype == dtype
            if difference.exact:
                assert difference.tokens == difference.pooled == 0, (dtype, difference)
            elif dtype != torch.bfloat16:
                assert max(difference.tokens, difference.pooled) <= 2e-5, (dtype, difference)


@pytest.mark.parametrize("kind", ["SigLIP", "EVA02", "PE"])
@torch.no_grad()
def test_positions_follow_the_weights(kind):
    tower: Any = adapted(model(kind))
    check(tower, sizes(tower))
    tower.trunk.pos_embed += 1
    if kind != "SigLIP":  # as a longer wavelength would
        tower.trunk.rope.temperature = 50.0
        tower.trunk.rope.init_non_persistent_buffers()
    assert all(difference.tokens == 0 for difference in check(tower, sizes(tower)) if difference.exact)


@pytest.mark.parametrize("kind", ["ViTamin", "EVA02", "PE"])
def test_threads_agree_with_one_thread(kind):
    module = model(kind)

    def work(tower: ModuleTower, size: Size) -> list[Tensor]:
        return [features.tokens for features in run(tower, pixels(size), {"clip": METHODS["clip"]}).values()]

    fresh, shared = adapted(module), adapted(module)
    jobs = sizes(fresh) * 8
    alone = [work(fresh, size) for size in jobs]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda size: work(shared, size), jobs))
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def everything(module: nn.Module) -> dict[str, str]:
    """Every plain attribute of every part, hooks included."""
    return {
        f"{name}.{key}": repr(value)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if key not in ("_parameters", "_buffers", "_modules")
    }


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_library_is_left_as_it_was(kind):
    module = model(kind)
    size = sizes(adapted(module))[0]
    attributes, before = everything(module), module(pixels(size))
    tensors = {name: (tensor, tensor._version, tensor.clone()) for name, tensor in module.state_dict().items()}
    tensors |= {name: (tensor, tensor._version, tensor.clone()) for name, tensor in module.named_buffers()}
    tower = adapted(module)
    check(tower, sizes(tower))
    tower.project(tower.embed(pixels(size))[0])
    assert torch.equal(module(pixels(size)), before)
    assert everything(module) == attributes
    for name, tensor in [*module.state_dict().items(), *module.named_buffers()]:
        then, version, value = tensors[name]
        assert tensor.data_ptr() == then.data_ptr() and torch.equal(tensor, value), name
        assert tensor._version == version, name


# What cannot be read --------------------------------------------------------------------------------------------------


def hooked(part: Callable[[Any], nn.Module]) -> Callable[[TimmModel], Any]:
    return lambda module: part(module.trunk).register_forward_hook(lambda *_: None)


def replaced(owner: Callable[[Any], Any], name: str, part: Any) -> Callable[[TimmModel], Any]:
    return lambda module: setattr(owner(module.trunk), name, part)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("SigLIP", {"block_fn": ResPostBlock}, "not timm's plain Block"),
        ("SigLIP", {"block_fn": ParallelScalingBlock}, "not timm's plain Block"),
        ("SigLIP", {"attn_layer": "diff"}, "not timm's plain Block"),
        ("EVA02", {"rope_type": "mixed"}, "RotaryEmbeddingMixed"),
        ("EVA02", {"rope_type": "dinov3"}, "RotaryEmbeddingDinoV3"),
        ("EVA02", {"rope_rotate_half": True}, "rotate halves"),
        ("PE", {"num_kv_heads": 1, "qkv_fused": False}, "shares keys"),
    ],
)
def test_what_is_built_otherwise_is_named(kind, changes, reason):
    assert reason in (unsupported_reason(model(kind, **changes)) or "")


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("SigLIP", hooked(lambda trunk: trunk.blocks[1]), "hooks"),
        ("SigLIP", hooked(lambda trunk: trunk.blocks[1].attn), "hooks"),
        ("SigLIP", hooked(lambda trunk: trunk.patch_embed), "hooks"),
        ("SigLIP", hooked(lambda trunk: trunk.attn_pool), "hooks"),
        ("PE", hooked(lambda trunk: trunk.blocks[1]), "hooks"),
        ("PE", hooked(lambda trunk: trunk.blocks[1].attn), "hooks"),
        ("SigLIP", replaced(lambda trunk: trunk.blocks[1], "attn", nn.Identity()), "wrappers"),
        ("PE", replaced(lambda trunk: trunk.blocks[1], "attn", nn.Identity()), "wrappers"),
        ("SigLIP", replaced(lambda trunk: trunk.blocks[1].attn, "gate", nn.Linear(32, 32)), "gates"),
        ("EVA02", replaced(lambda trunk: trunk.blocks[1].attn, "gate", nn.Linear(32, 32)), "gates"),
        ("SigLIP", replaced(lambda trunk: trunk, "patch_embed", PatchEmbedWithSize()), "patch embedding"),
        ("SigLIP", replaced(lambda trunk: trunk, "attn_pool", nn.Identity()), "attention pool"),
        ("PE", replaced(lambda trunk: trunk.attn_pool, "pos_embed", torch.zeros(16, 32)), "attention pool"),
        ("MobileCLIP-B", replaced(lambda trunk: trunk, "global_pool", ""), "does not pool"),
        ("ViTamin", lambda module: module.head.add_module("pool", nn.Identity()), "does not pool"),
    ],
)
def test_what_was_changed_is_named(kind, change, reason):
    made = model(kind)
    assert unsupported_reason(made) is None
    change(made)
    assert reason in (unsupported_reason(made) or "")


def test_a_trunk_without_open_clips_head_is_named():
    bare = nn.Module()
    bare.trunk = model("PE").trunk
    assert "TimmModel" in (unsupported_reason(bare) or "")


def unsupported_reason(module: Any) -> str | None:
    tower = find_tower("open_clip", module.trunk)
    assert tower is not None
    return tower.unsupported_reason(module)
