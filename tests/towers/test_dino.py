"""Experts: what they load, which tokens they give, and the attention that is taken from them (ProxyCLIP)."""

import json
import math
import shutil
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from open_gem import towers
from open_gem.errors import InputError, MethodError, UnknownModelError, UnsupportedModelError, WeightsError
from open_gem.method import attention
from open_gem.method.attention import Heads, external, resize_values
from open_gem.method.guided import External, proxyclip
from open_gem.method.run import run
from open_gem.method.table import BlockContext
from open_gem.towers import dino as experts
from open_gem.towers.check import randomize
from open_gem.towers.dino import Expert, ExpertGuide, adapt_expert, guide, load_expert
from open_gem.types import Grid, Size

# The attention --------------------------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_external(expert: Tensor, values: Tensor, gamma: float = 3.0, beta: float = 1.2) -> Tensor:
    """As the method is written, a pair at a time."""
    images, heads, tokens, _ = values.shape
    mixed = torch.zeros_like(values)
    for image in range(images):
        points = [point / math.sqrt(float(point @ point)) for point in expert[image]]
        cosines = [[float(one @ other) for other in points] for one in points]
        mean = sum(map(sum, cosines)) / tokens**2
        for i in range(tokens):
            logits = {j: gamma * (cosines[i][j] - beta * mean) for j in range(tokens)}
            kept = {j: math.exp(logit) for j, logit in logits.items() if logit >= 0} or {i: 1.0}
            for head in range(heads):
                for j, weight in kept.items():
                    mixed[image, head, i] += weight / sum(kept.values()) * values[image, head, j]
    return mixed


def objects(images: int = 2, tokens: int = 12, width: int = 5, spread: float = 0.8) -> Tensor:
    """Tokens of three things, so that some pairs stand out; of all lengths."""
    things = random(images, 3, width, seed=1)[:, torch.arange(tokens) % 3]
    lengths = torch.linspace(0.1, 9, tokens, dtype=torch.float64)[:, None]
    return (things + spread * random(images, tokens, width, seed=2)) * lengths


@pytest.mark.parametrize("settings", [{}, {"gamma": 10.0, "beta": 0.5}, {"gamma": 0.5, "beta": 0.0}, {"beta": 3.0}])
@pytest.mark.parametrize("rows", [1024, 7, 1])
def test_external_is_the_methods_formula(settings, rows, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", rows)
    tokens, values = objects(), random(2, 3, 12, 4)
    torch.testing.assert_close(external(tokens, values, **settings), slow_external(tokens, values, **settings))


def test_external_leaves_out_what_is_below_the_threshold():
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]])
    values = torch.tensor([1.0, 3.0, 100.0, 300.0]).reshape(1, 1, 4, 1)
    mixed = external(tokens, values).flatten()
    low, high = mixed[:2], mixed[2:]
    assert low.min() > 1 and low.max() < 3
    assert high.min() > 100 and high.max() < 300


def test_tokens_that_are_all_alike_keep_their_own_values():
    """The mean cosine is 1, below β times which every pair is: NaN in the published code."""
    values = random(1, 2, 6, 4)
    torch.testing.assert_close(external(torch.ones(1, 6, 3), values), values)


def test_tokens_of_no_length_are_told_apart_by_nothing():
    values = random(1, 2, 6, 4)
    torch.testing.assert_close(external(torch.zeros(1, 6, 3), values), values.mean(2, True).expand(-1, -1, 6, -1))


def test_one_token_that_all_others_outdo_keeps_its_own_value():
    """Only its row would be NaN: it is far from the rest, whose mean is high."""
    tokens = torch.cat([torch.ones(1, 40, 2) + 0.01 * random(1, 40, 2).float(), torch.zeros(1, 1, 2)], dim=1)
    values = random(1, 2, 41, 4, dtype=torch.float32)
    mixed = external(tokens, values)
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed[:, :, -1], values[:, :, -1])


def test_an_image_is_mixed_alike_in_any_batch():
    tokens, values = objects(3), random(3, 2, 12, 4)
    alone = [external(tokens[[index]], values[[index]]) for index in range(3)]
    torch.testing.assert_close(external(tokens, values), torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    tokens, values = objects().to(dtype), random(2, 3, 12, 4).to(dtype)
    mixed = external(tokens, values)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, external(tokens.float(), values.float()).to(dtype))


def test_types_may_differ():
    tokens, values = objects(), random(2, 3, 12, 4)
    assert external(tokens.half(), values).dtype == torch.float64
    assert external(tokens, values.half()).dtype == torch.float16


def test_no_map_of_all_pairs_is_made():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.seen = max(self.seen, result.numel())
            return result

    with Largest() as largest:
        external(random(2, 3000, 2).float(), random(2, 1, 3000, 1).float())
    assert 0 < largest.seen <= attention.ROWS * 3000


def slow_bilinear(picture: np.ndarray, to: Grid) -> np.ndarray:
    """Centres of patches on centres of patches, nothing beyond the edges."""
    rows, cols = picture.shape
    made = np.zeros(to)
    for r in range(to.rows):
        for k in range(to.cols):
            y = min(max((r + 0.5) * rows / to.rows - 0.5, 0), rows - 1)
            x = min(max((k + 0.5) * cols / to.cols - 0.5, 0), cols - 1)
            for i in range(rows):
                for j in range(cols):
                    made[r, k] += max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * picture[i, j]
    return made


@pytest.mark.parametrize("to", [Grid(6, 10), Grid(4, 6), Grid(2, 9), Grid(1, 1)])
def test_values_are_resized_between_the_centres_of_patches(to):
    grid = Grid(3, 5)
    values = random(2, 2, grid.patches, 3)
    resized = resize_values(values, grid, to)
    assert resized.shape == (2, 2, to.patches, 3)
    for image in range(2):
        for head in range(2):
            for channel in range(3):
                expected = slow_bilinear(values[image, head, :, channel].reshape(grid).numpy(), to)
                np.testing.assert_allclose(resized[image, head, :, channel].reshape(to).numpy(), expected, atol=1e-12)


def test_resized_values_keep_their_type_and_on_their_own_grid_all():
    values = random(1, 2, 15, 3).half()
    assert resize_values(values, Grid(3, 5), Grid(3, 5)) is values
    assert resize_values(values, Grid(3, 5), Grid(6, 4)).dtype == torch.float16


# Models ---------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURES = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 3}
MEAN, STD = (0.48, 0.45, 0.41), (0.23, 0.22, 0.225)

# model_type -> the class, what makes it small, its patch, and how many tokens come before the patches.
THEIRS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "vit": ("ViTModel", {"patch_size": 8, "image_size": 32}, 8, 1),
    "dinov2": ("Dinov2Model", {"patch_size": 7, "image_size": 28}, 7, 1),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        {"patch_size": 7, "image_size": 28, "num_register_tokens": 3},
        7,
        4,
    ),
    "dinov3_vit": ("DINOv3ViTModel", {"patch_size": 8, "image_size": 32, "num_register_tokens": 4}, 8, 5),
}

_TINY: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 0}

# A name of timm, what makes it small, its patch, and how many tokens come before the patches.
TIMM: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "DINO": ("vit_small_patch8_224", _TINY, 8, 1),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", {**_TINY, "img_size": 42}, 14, 5),
    "DINOv3": ("vit_small_patch16_dinov3", _TINY, 16, 5),
    "mean of patches": ("vit_base_patch16_224", {**_TINY, "global_pool": "avg", "class_token": False}, 16, 0),
}


def seeded(make: Any) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made = make().eval()
        randomize(made)
    return made


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    made = {}
    for kind, (name, small, _, _) in THEIRS.items():
        config = transformers.AutoConfig.for_model(kind, **SMALL, **small)
        head = {"add_pooling_layer": False} if kind == "vit" else {}
        made[kind] = seeded(lambda name=name, config=config, head=head: getattr(transformers, name)(config, **head))
    return made


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory) -> dict[str, Path]:
    """The checkpoints as the hub has them."""
    places = {}
    for kind, model in models.items():
        places[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(places[kind])
        settings = {**PICTURES, "image_mean": MEAN, "image_std": STD}
        (places[kind] / "preprocessor_config.json").write_text(json.dumps(settings))
    return places


@pytest.fixture(scope="module")
def timm_models() -> dict[str, Any]:
    return {
        kind: seeded(partial(timm.create_model, name, dynamic_img_size=True, **small))
        for kind, (name, small, *_) in TIMM.items()
    }


@pytest.fixture
def own(folders, tmp_path) -> Path:
    """A copy of a checkpoint, to spoil."""
    return Path(shutil.copytree(folders["dinov2"], tmp_path / "own"))


def loaded(name: Any, **settings: Any) -> Expert:
    return load_expert(name, device="cpu", **settings)


def picture(size: Size, images: int = 2) -> Tensor:
    return torch.rand(images, 3, *size, generator=torch.Generator().manual_seed(3))


def normalised(pixels: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    return torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)


GRIDS = [Grid(4, 4), Grid(3, 7), Grid(5, 2)]  # as trained, and others


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", THEIRS)
def test_tokens_are_those_of_transformers(kind, grid, models, folders):
    _, _, patch, prefix = THEIRS[kind]
    expert = loaded(folders[kind])
    assert (expert.patch, expert.prefix, expert.mean, expert.std) == ((patch, patch), prefix, MEAN, STD)
    pixels = picture(Size(grid.rows * patch, grid.cols * patch))
    more = {"interpolate_pos_encoding": True} if kind == "vit" and grid != GRIDS[0] else {}
    theirs = models[kind](normalised(pixels), **more).last_hidden_state
    tokens = expert.tokens(pixels, grid)
    assert tokens.shape == (2, grid.patches, 32)
    torch.testing.assert_close(tokens, theirs[:, -grid.patches :], rtol=0, atol=1e-5)
    assert theirs.shape[1] == prefix + grid.patches


@torch.no_grad()
@pytest.mark.parametrize("grid", [Grid(2, 2), Grid(1, 3), Grid(4, 3)])
@pytest.mark.parametrize("kind", TIMM)
def test_tokens_are_those_of_timm(kind, grid, timm_models):
    _, _, patch, prefix = TIMM[kind]
    model = timm_models[kind]
    expert = adapt_expert(model, MEAN, STD, name=kind)
    assert (expert.patch, expert.prefix, repr(expert)) == ((patch, patch), prefix, f"Expert({kind!r})")
    pixels = picture(Size(grid.rows * patch, grid.cols * patch))
    steps = model.forward_intermediates(normalised(pixels), norm=False, output_fmt="NLC", intermediates_only=True)
    norm = model.fc_norm if kind == "mean of patches" else model.norm
    torch.testing.assert_close(expert.tokens(pixels, grid), norm(steps[-1]), rtol=0, atol=1e-5)


def last_block(model: Any) -> Any:
    """The last block of a model: what its attention reads, and its q, k and v of that."""
    if hasattr(model, "blocks"):
        return model.blocks[-1].norm1, model.blocks[-1].attn
    [*_, (name, layer)] = [pair for pair in model.named_modules() if hasattr(pair[1], "attention")]
    return getattr(layer, "layernorm_before" if name.startswith("layers") else "norm1"), layer.attention


def slow_projections(norm: Any, attention: Any, model: Any, pixels: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    hook = norm.register_forward_hook(lambda module, given, made: seen.append(made))
    model(pixels, **({"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}))
    hook.remove()
    if getattr(attention, "qkv", None) is None:
        return [part(seen[0]) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return list(attention.qkv(seen[0]).unflatten(-1, (3, -1)).unbind(dim=-2))


@torch.no_grad()
@pytest.mark.parametrize("kind", [*THEIRS, *TIMM])
def test_projections_are_those_of_the_last_block(kind, models, timm_models):
    model, patch = (models[kind], THEIRS[kind][2]) if kind in THEIRS else (timm_models[kind], TIMM[kind][2])
    grid = Grid(3, 2)
    pixels = picture(Size(3 * patch, 2 * patch))
    expected = slow_projections(*last_block(model), model, normalised(pixels))  # pyright: ignore[reportCallIssue]
    for ours, theirs in zip(adapt_expert(model, MEAN, STD).projections(pixels, grid), expected, strict=True):
        assert ours.shape == (2, 6, 32)
        torch.testing.assert_close(ours, theirs[:, -6:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["DINO", "DINOv3"])
def test_a_folder_of_timm(kind, timm_models, tmp_path):
    _, small, patch, _ = TIMM[kind]
    model = deepcopy(timm_models[kind])
    model.pretrained_cfg.update(mean=MEAN, std=STD)
    arguments = {key: value for key, value in small.items() if key != "num_classes"}
    save_for_hf(model, str(tmp_path), model_args=arguments)
    expert = loaded(f"timm:{tmp_path}")
    assert type(expert.model) is type(model) and (expert.mean, expert.std) == (MEAN, STD)
    pixels, grid = picture(Size(2 * patch, 3 * patch)), Grid(2, 3)
    assert torch.equal(expert.tokens(pixels, grid), adapt_expert(model, MEAN, STD).tokens(pixels, grid))
    assert torch.equal(loaded(f"timm:local-dir:{tmp_path}").tokens(pixels, grid), expert.tokens(pixels, grid))


def test_a_name_of_timm_is_loaded_with_its_weights(timm_models, monkeypatch):
    asked = {}

    def create(name: str, **settings: Any) -> Any:
        asked[name] = settings
        return timm_models["DINO"]

    monkeypatch.setattr(timm, "create_model", create)
    expert = loaded("timm:vit_base_patch8_224.dino", cache_dir="here")
    settings = {"pretrained": True, "num_classes": 0, "dynamic_img_size": True, "cache_dir": "here"}
    assert asked == {"vit_base_patch8_224.dino": settings}
    assert expert.mean == tuple(timm_models["DINO"].pretrained_cfg["mean"])


@pytest.mark.parametrize("kind", THEIRS)
def test_adapting_a_model_in_memory_and_leaving_it_as_it_was(kind, models, folders):
    model = models[kind]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expert, pixels = adapt_expert(model, MEAN, STD), picture(Size(30, 50))
    tokens = expert.tokens(pixels, Grid(3, 5))
    assert torch.equal(tokens, loaded(folders[kind]).tokens(pixels, Grid(3, 5)))
    assert not tokens.requires_grad and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert expert.name == THEIRS[kind][0]


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "size", "grid"),
    [
        ((8, 8), Size(224, 336), Grid(28, 42)),
        ((14, 14), Size(224, 336), Grid(16, 24)),
        ((14, 14), Size(448, 592), Grid(32, 42)),  # 42.3
        ((16, 16), Size(24, 40), Grid(2, 3)),  # halves up
        ((16, 16), Size(3, 23), Grid(1, 1)),
        ((8, 16), Size(64, 64), Grid(8, 4)),
    ],
)
def test_the_grid_is_the_nearest_to_the_pixels(patch, size, grid):
    expert = Expert("any", None, patch, 1, MEAN, STD, lambda model, pixels: pixels, lambda model, pixels: (pixels,) * 3)  # pyright: ignore[reportArgumentType]
    assert expert.grid_for(size) == grid


def test_pictures_are_resized_as_pil_does(models):
    """Down one way and up the other, from hard edges, where bicubic overshoots."""
    seen = []
    expert = adapt_expert(models["vit"], MEAN, STD)
    expert.forward = lambda model, pixels: seen.append(pixels) or torch.zeros(1, 13, 1)
    pixels = (picture(Size(50, 17), images=1) > 0.5).float()
    expert.tokens(pixels, Grid(3, 4))
    resized = [
        np.asarray(Image.fromarray(channel.numpy()).resize((32, 24), Image.Resampling.BICUBIC)) for channel in pixels[0]
    ]
    expected = normalised(torch.from_numpy(np.stack(resized)).clamp(0, 1)[None])
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-4)
    assert abs(np.stack(resized) - 0.5).max() > 0.51


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", THEIRS)
def test_other_types(kind, dtype, folders, models):
    expert = loaded(folders[kind], dtype=dtype)
    pixels = picture(Size(30, 44)).to(dtype)
    tokens, exact = expert.tokens(pixels, Grid(4, 6)), adapt_expert(models[kind], MEAN, STD).tokens(pixels, Grid(4, 6))
    assert tokens.dtype == dtype
    assert (tokens.float() - exact).norm() / exact.norm() < (0.05 if dtype != torch.float64 else 1e-5)


def test_frequencies_of_rotary_positions_stay_float32(folders):
    model = loaded(folders["dinov3_vit"], dtype="bfloat16").model
    assert model.dtype == torch.bfloat16 and model.rope_embeddings.inv_freq.dtype == torch.float32
    original = transformers.DINOv3ViTModel.from_pretrained(folders["dinov3_vit"])
    assert torch.equal(model.rope_embeddings.inv_freq, original.rope_embeddings.inv_freq)


def test_timm_in_bfloat16(timm_models):
    for kind, exact in timm_models.items():
        model = deepcopy(exact).to(torch.bfloat16)
        grid, pixels = Grid(2, 3), picture(Size(32, 48))
        tokens, expected = (adapt_expert(one, MEAN, STD).tokens(pixels, grid) for one in (model, exact))
        assert tokens.dtype == torch.bfloat16
        assert (tokens.float() - expected).norm() / expected.norm() < 0.05, kind


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(3, 8, 8), r"shape \(3, 8, 8\), expected \(images, 3, height, width\)"),
        (torch.rand(1, 4, 8, 8), r"shape \(1, 4, 8, 8\)"),
        (torch.rand(1, 3, 0, 8), r"shape \(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"torch.uint8, expected floats"),
        (torch.full((1, 3, 8, 8), 255.0), r"from 255 to 255, expected \[0, 1\]"),
        (torch.full((1, 3, 8, 8), -0.5), r"from -0.5 to -0.5"),
        (torch.full((1, 3, 8, 8), torch.nan), r"from nan to nan"),
    ],
)
def test_what_is_no_picture(pixels, message, models):
    with pytest.raises(InputError, match=message):
        adapt_expert(models["vit"], MEAN, STD).tokens(pixels, Grid(1, 1))


# Errors ---------------------------------------------------------------------------------------------------------------


def one_line(error: Any) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def rewrite(folder: Path, file: str, **changes: Any) -> None:
    kept = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))


@pytest.mark.parametrize("model_type", ["vit_mae", "clip", "dinov3_convnext"])
def test_other_types_of_models_are_refused_before_their_weights(model_type, own):
    (own / "model.safetensors").unlink()
    rewrite(own, "config.json", model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=f"{model_type}.*vit, dinov2, dinov2_with_registers") as error:
        loaded(own)
    one_line(error)


def test_code_of_a_checkpoint_is_never_run(own):
    (own / "evil.py").write_text("raise SystemExit('was run')")
    rewrite(own, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    with pytest.raises(UnsupportedModelError):
        loaded(own)


def test_weights_that_are_missing_or_do_not_fit(own):
    rewrite(own, "config.json", hidden_size=64)
    with pytest.raises(WeightsError, match="of another shape") as error:
        loaded(own)
    one_line(error)
    rewrite(own, "config.json", hidden_size=32, num_hidden_layers=3)
    with pytest.raises(WeightsError, match="missing"):
        loaded(own)
    (own / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="cannot load"):
        loaded(own)


def test_statistics_are_the_checkpoints_or_an_error(own):
    file = "preprocessor_config.json"
    rewrite(own, file, do_normalize=False)
    assert (loaded(own).mean, loaded(own).std) == ((0, 0, 0), (1, 1, 1))
    rewrite(own, file, do_normalize=True, image_std=None)
    with pytest.raises(WeightsError, match=r"image_std.*adapt_expert\(model, mean, std\)") as error:
        loaded(own)
    one_line(error)
    rewrite(own, file, image_std=STD, rescale_factor=1 / 127.5)
    with pytest.raises(UnsupportedModelError, match=r"not scaled to \[0, 1\]"):
        loaded(own)
    (own / file).unlink()
    with pytest.raises(WeightsError, match="cannot load"):
        loaded(own)


def test_without_network_the_hub_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("facebook/dino-vitb8", "timm:vit_base_patch8_224.dino"):
        with pytest.raises(WeightsError, match=f"cannot load {name}: it is not in the cache") as error:
            loaded(name, cache_dir=str(tmp_path))
        one_line(error)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("dino", UnknownModelError, "unknown expert 'dino'.*facebook/dino-vitb8"),
        ("./nowhere", WeightsError, "no such folder: nowhere"),
        ("local-dir:nowhere", WeightsError, "no such folder: nowhere"),
        ("timm:vit_base_patch8_224.dinoo", UnknownModelError, "known: .*vit_base_patch8_224.dino"),
        ("timm:vit_bas_patch8_224.dino", UnknownModelError, "did you mean vit_base_patch8_224.dino, "),
        ("timm:", UnknownModelError, "timm has no model called ''"),
        ("timm:org/repo", UnknownModelError, "timm has no model called 'org/repo'"),
        ("timm:~/nowhere", WeightsError, "no such folder: /"),
        ("timm:vit_giant_patch14_224", UnknownModelError, "no weights called 'vit_giant_patch14_224'; known: none"),
        ("timm:resnet50.a1_in1k", UnsupportedModelError, "none of ViTModel.*VisionTransformer and Eva of timm"),
    ],
)
def test_names_that_nobody_knows(name, error, message):
    with pytest.raises(error, match=message) as raised:
        loaded(name)
    one_line(raised)


def test_folders_of_timm_that_cannot_be_read(own, tmp_path):
    with pytest.raises(UnsupportedModelError, match=f"cannot read timm:{own}: None is none of") as error:
        loaded(f"timm:{own}")  # it is of transformers
    one_line(error)
    rewrite(own, "config.json", architecture="resnet18")
    with pytest.raises(UnsupportedModelError, match="resnet18 is none of"):
        loaded(f"timm:{own}")
    (own / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot load timm:"):
        loaded(f"timm:{own}")


class Code:
    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


def test_pickles_that_run_code_are_refused(own, timm_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (own / "model.safetensors").unlink()
    torch.save({"weights": Code()}, own / "pytorch_model.bin")
    theirs = tmp_path / "timm"
    save_for_hf(deepcopy(timm_models["DINO"]), str(theirs), model_args=_TINY, safe_serialization=False)
    torch.save({"weights": Code()}, theirs / "pytorch_model.bin")
    for name in (own, f"timm:{theirs}"):
        with pytest.raises(WeightsError, match=f"cannot load .*{Path(name).name}: .*pickle") as error:
            loaded(name)
        one_line(error)
    assert not Path("was-run").exists()


def test_device_and_type(folders):
    with pytest.raises(InputError, match="device"):
        load_expert(folders["vit"], device="nowhere")
    with pytest.raises(InputError, match="float32, bfloat16"):
        load_expert(folders["vit"], device="cpu", dtype="int8")


def test_models_that_cannot_be_adapted(models, timm_models):
    training = deepcopy(models["dinov2"]).train()
    with pytest.raises(InputError, match="training mode"):
        adapt_expert(training, MEAN, STD)
    with pytest.raises(UnsupportedModelError, match="cannot read Linear: it is none of ViTModel"):
        adapt_expert(torch.nn.Linear(2, 2).eval(), MEAN, STD)
    config = transformers.ViTConfig(**SMALL, patch_size=8, image_size=32)
    with pytest.raises(UnsupportedModelError, match="cannot read ViTEmbeddings: it is none of ViTModel"):
        adapt_expert(models["vit"].embeddings, MEAN, STD)
    with pytest.raises(UnsupportedModelError, match="cannot read ViTForImageClassification"):
        adapt_expert(transformers.ViTForImageClassification(config).eval(), MEAN, STD)
    grey = transformers.ViTModel(transformers.ViTConfig(**SMALL, patch_size=8, image_size=32, num_channels=1)).eval()
    with pytest.raises(UnsupportedModelError, match="takes 1 channels, not 3"):
        adapt_expert(grey, MEAN, STD)
    with pytest.raises(UnsupportedModelError, match="dynamic_img_size=True"):
        adapt_expert(timm.create_model("vit_small_patch8_224", **_TINY).eval(), MEAN, STD)
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", dynamic_img_size=True).eval()
    with pytest.raises(UnsupportedModelError, match="its patches come from a HybridEmbed"):
        adapt_expert(hybrid, MEAN, STD)
    with pytest.raises(UnsupportedModelError, match="cannot read ResNet"):
        adapt_expert(timm.create_model("resnet10t").eval(), MEAN, STD)


@pytest.mark.parametrize(("mean", "std"), [((0.5, 0.5), STD), (MEAN, 0.5), (MEAN, ("a", "b", "c")), (MEAN, (1, 0, 1))])
def test_statistics_are_three_numbers(mean, std, models):
    with pytest.raises(InputError, match=r"expected (three numbers|numbers above 0)"):
        adapt_expert(models["vit"], mean, std)


# As an attention ------------------------------------------------------------------------------------------------------

HOST_MEAN, HOST_STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.25)


def in_a_block(pixels: Tensor, grid: Grid, prefix: int) -> BlockContext:
    return BlockContext(normed=torch.zeros(0), pixels=pixels, grid=grid, prefix=prefix, layers=1, borrowed={})


def test_the_hosts_values_are_mixed_by_the_experts_affinity(folders):
    """A host with patches of 8 and two tokens before them, an expert with patches of 7: grids that do not divide."""
    expert = loaded(folders["dinov2_with_registers"])
    pixels, grid = picture(Size(24, 40)), Grid(3, 5)
    q, k, v = (random(2, 4, 2 + grid.patches, 6, seed=seed) for seed in (1, 2, 3))
    attention = External(ExpertGuide(expert, HOST_MEAN, HOST_STD), gamma=5.0, beta=0.9)
    mixed = attention(Heads(q, k, v), in_a_block(normalised(pixels, HOST_MEAN, HOST_STD), grid, 2))
    assert attention.layout(Size(24, 40)) == (Grid(3, 6), 0)
    tokens = expert.tokens(pixels, Grid(3, 6))
    values = torch.zeros(2, 4, 18, 6, dtype=torch.float64)
    for b, h, c in np.ndindex(2, 4, 6):
        values[b, h, :, c] = torch.from_numpy(slow_bilinear(v[b, h, 2:, c].reshape(grid).numpy(), Grid(3, 6))).flatten()
    expected = slow_external(tokens.double(), values, gamma=5.0, beta=0.9)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-4)


def test_pixels_that_rounding_puts_outside_are_put_back(folders):
    """Black and white come back from the host's statistics as a little less than 0 and more than 1."""
    pixels = (picture(Size(16, 16)) > 0.5).float()
    heads = Heads(*(random(2, 2, 4, 3, dtype=torch.float32),) * 3)
    attention = External(ExpertGuide(loaded(folders["vit"]), HOST_MEAN, HOST_STD))
    mixed = attention(heads, in_a_block(normalised(pixels, HOST_MEAN, HOST_STD) * 1.001, Grid(2, 2), 0))
    assert mixed.shape == (2, 2, 4, 3) and mixed.isfinite().all()


def test_settings_share_one_pass_of_the_expert(folders):
    expert = loaded(folders["vit"])
    calls, forward = [], expert.forward
    expert.forward = lambda model, pixels: calls.append(1) or forward(model, pixels)
    here = in_a_block(normalised(picture(Size(16, 16)), HOST_MEAN, HOST_STD), Grid(2, 2), 1)
    heads = Heads(*(random(2, 2, 5, 3, dtype=torch.float32),) * 3)
    soft, sharp = (
        External(ExpertGuide(expert, HOST_MEAN, HOST_STD), beta=0.0, gamma=gamma)(heads, here) for gamma in (0.1, 9.0)
    )
    assert len(calls) == 1 and not torch.allclose(soft, sharp)


def test_equal_attentions_are_equal(folders):
    one, other = loaded(folders["vit"]), loaded(folders["vit"])
    backbone: Any = SimpleNamespace(preprocess=SimpleNamespace(mean=HOST_MEAN, std=HOST_STD))
    ours, theirs = (guide(expert, backbone) for expert in (one, other))
    assert proxyclip(ours).attention == External(ExpertGuide(one, HOST_MEAN, HOST_STD), 3.0, 1.2)
    assert hash(proxyclip(ours)) == hash(proxyclip(guide(one, backbone)))
    assert proxyclip(ours) != proxyclip(theirs) != proxyclip(theirs, beta=1)
    assert len(repr(proxyclip(ours).attention)) < 300


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0}, "gamma is 0, expected a number above 0"),
        ({"gamma": "3"}, "gamma is '3'"),
        ({"gamma": math.inf}, "gamma is inf"),
        ({"beta": -0.1}, "beta is -0.1, expected a number, 0 or more"),
        ({"beta": True}, "beta is True"),
    ],
)
def test_impossible_settings(settings, message, models):
    with pytest.raises(MethodError, match=message):
        External(ExpertGuide(adapt_expert(models["vit"], MEAN, STD), MEAN, STD), **settings)


@torch.no_grad()
def test_proxyclip_of_a_whole_tower(tiny, folders):
    """The last block's output projection and the head, over the mixed values, and nothing else."""
    backbone, expert = towers.load(tiny, device="cpu"), loaded(folders["dinov2"])
    method, host = proxyclip(guide(expert, backbone)), backbone.vision
    pixels = normalised(picture(Size(32, 48)), backbone.preprocess.mean, backbone.preprocess.std)
    assert not method.attention.is_adaptive
    found = run(host, pixels, {"proxyclip": method})["proxyclip"]
    assert (found.grid, found.prefix) == (Grid(5, 7), 0)

    x, grid = host.embed(pixels)
    *before, last = host.blocks(grid)
    for block in before:
        x = block.forward(x)
    heads = last.qkv(last.norm(x))
    expected = host.project(last.out(method.attention(heads, in_a_block(pixels, grid, host.prefix))))
    torch.testing.assert_close(found.patches, expected, rtol=0, atol=1e-5)
    assert expected.shape[1] == 35


def test_the_table_of_kinds_is_what_transformers_has():
    for kind, row in experts.EXPERTS.items():
        assert getattr(transformers, row.model).config_class.model_type == kind
