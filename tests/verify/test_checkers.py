"""Each checker on random weights of the real configuration, against the library's own forward and image processor: it
passes, and fails by more than its tolerance if something is wrong.

Everything about images is as in the published checkpoints: layers, widths, patches, sizes, preprocessing. Text halves
are cut to one layer. The random weights are larger than at the start of training, when results hardly depend on them.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hub_checkpoints
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import nn

from open_gem.data.scenes import scene
from open_gem.images import pixels
from open_gem.images.pixels import to_pixels as pixels_of
from open_gem.towers import adapt
from open_gem.towers.transformers import ARCHITECTURES
from open_gem.trained.owl import OWL
from open_gem.types import Size
from open_gem.verify import checkers
from open_gem.verify.checkers import Published
from open_gem.verify.run import FAILED, PASSED, judge
from open_gem.verify.values import VALUES

CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5] * 3, [0.5] * 3)


def preprocessor(kind: str, statistics: Any, resample: int, size: Any, crop: int | None = None) -> dict[str, Any]:
    """A preprocessor_config.json."""
    settings = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        "resample": resample,
        "do_center_crop": crop is not None,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": statistics[0],
        "image_std": statistics[1],
    }
    return settings if crop is None else settings | {"crop_size": {"height": crop, "width": crop}}


def enliven(model: nn.Module) -> None:
    """Random weights of such size that results depend on everything: as transformers makes them, they hardly do."""
    noise = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=noise)
        if name.endswith("logit_scale"):
            weight.fill_(4.6)
        elif weight.ndim == 1:
            weight.add_(0.3 * values)
        elif weight.ndim > 1 and "embedding" not in name.rpartition(".")[0].rpartition(".")[2]:
            weight.copy_(3.5 * values / weight[0].numel() ** 0.5)


LAYERS = 12


def cut(config: Any, layers: int = LAYERS) -> Any:
    """The configuration with few layers."""
    vision = getattr(config, "vision_config", config)
    vision.update({"num_hidden_layers": layers})
    if vision is not config:
        config.text_config.num_hidden_layers = 1
    return config


def clip_config() -> Any:
    config = cut(ARCHITECTURES["openai/clip-vit-base-patch32"].configuration())
    config.text_config.bos_token_id, config.text_config.eos_token_id = 49406, 49407
    return config


def siglip_config() -> Any:
    config = cut(ARCHITECTURES["google/siglip-base-patch16-224"].configuration())
    config.text_config.vocab_size = len(hub_checkpoints.gemma_like())
    return config


def clipseg_config() -> Any:
    config = transformers.CLIPSegConfig(reduce_dim=64, extract_layers=[3, 6, 9])
    config = cut(config)
    config.text_config.bos_token_id, config.text_config.eos_token_id = 49406, 49407
    return config


def metaclip_config() -> Any:
    config = cut(ARCHITECTURES["facebook/metaclip-2-worldwide-huge-quickgelu"].configuration(), 8)
    config.text_config.vocab_size = len(hub_checkpoints.xlm_like())
    return config


def blip_config() -> Any:
    config = cut(ARCHITECTURES["Salesforce/blip-itm-base-coco"].configuration())
    config.vision_config.initializer_range = 0.02  # its default is 1e-10
    config.text_config.vocab_size = len(hub_checkpoints.bert_tokenizer())
    config.text_config.sep_token_id = 3
    return config


def with_clip_tokens(config: Any) -> Any:
    config.text_config.num_hidden_layers = 1
    config.text_config.bos_token_id, config.text_config.eos_token_id = 49406, 49407
    return config


def owlv2_config() -> Any:
    return with_clip_tokens(cut(transformers.Owlv2Config(vision_config={"image_size": 960, "patch_size": 16}), 4))


def scores(model: Any, settings: dict[str, Any], tokenizer: Any, row: Any, image: Image.Image) -> torch.Tensor:
    """What transformers' own model and image processor give."""
    pixel_values = processed(settings, image)
    length = {"padding": "max_length", "max_length": 64} if "siglip" in model.config.model_type else {"padding": True}
    texts = tokenizer(list(row.prompts), truncation=True, return_tensors="pt", **length)
    return model(input_ids=texts["input_ids"], pixel_values=pixel_values).logits_per_image[0]


def processed(settings: dict[str, Any], image: Image.Image) -> torch.Tensor:
    kind = getattr(transformers, settings["image_processor_type"] + "Pil")
    return kind.from_dict(settings)(images=image, return_tensors="pt")["pixel_values"]


def clip_tokens(model: Any, settings: dict[str, Any], tokenizer: Any, row: Any, image: Image.Image) -> torch.Tensor:
    """At 180×180, as the source calls it."""
    settings = settings | {"size": {"height": 180, "width": 180}, "do_center_crop": False}
    pixel_values = processed(settings, image)
    tokens = model.vision_model(pixel_values=pixel_values, interpolate_pos_encoding=True).last_hidden_state[0]
    return tokens[:3, :3].flatten()


def expert_tokens(model: Any, settings: dict[str, Any], tokenizer: Any, row: Any, image: Image.Image) -> torch.Tensor:
    any_size = {"interpolate_pos_encoding": True} if model.config.model_type == "vit" else {}
    tokens = model(pixel_values=processed(settings, image), **any_size).last_hidden_state[0]
    return tokens[list(row.rows), : row.columns].flatten()


def clipseg_mask(model: Any, settings: dict[str, Any], tokenizer: Any, row: Any, image: Image.Image) -> torch.Tensor:
    texts = tokenizer(list(row.prompts), padding=True, return_tensors="pt")
    pixel_values = processed(settings, image).expand(len(row.prompts), -1, -1, -1)
    return model(**texts, pixel_values=pixel_values).logits[0, :3, :3].flatten()


def blip_cosines(model: Any, settings: dict[str, Any], tokenizer: Any, row: Any, image: Image.Image) -> torch.Tensor:
    texts = tokenizer(list(row.prompts), padding=True, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    pixel_values = processed(settings, image)
    return model(**{name: texts[name] for name in names}, pixel_values=pixel_values, use_itm_head=False)[0][0]


def owl_boxes(model: Any, settings: dict[str, Any], tokenizer: Any, row: Any, image: Image.Image) -> torch.Tensor:
    """Prepared by OWL-ViT's image processor for both, as the sources' tests do."""
    texts = tokenizer(list(row.prompts), padding="max_length", max_length=16, return_tensors="pt")
    settings = settings | {"image_processor_type": "OwlViTImageProcessor"}
    answer = model(pixel_values=processed(settings, image), **texts)
    return (answer.logits if row.output == "logits" else answer.pred_boxes)[0, :3, :3].flatten()


SHORT = {"shortest_edge": 224}
pytestmark = pytest.mark.slow
KINDS: dict[str, tuple[str, str, Callable[[], Any], Callable[[], Any] | None, dict[str, Any], Any]] = {
    "clip scores": (
        "openai/clip-vit-base-patch32",
        "CLIPModel",
        clip_config,
        hub_checkpoints.clip_tokenizer,
        preprocessor("CLIPImageProcessor", CLIP, 3, SHORT, 224),
        scores,
    ),
    "siglip scores": (
        "google/siglip-base-patch16-224",
        "SiglipModel",
        siglip_config,
        hub_checkpoints.gemma_like,
        preprocessor("SiglipImageProcessor", HALF, 3, {"height": 224, "width": 224}),
        scores,
    ),
    "clip tokens": (
        "openai/clip-vit-base-patch32",
        "CLIPModel",
        clip_config,
        hub_checkpoints.clip_tokenizer,
        preprocessor("CLIPImageProcessor", CLIP, 3, SHORT, 224),
        clip_tokens,
    ),
    "dino tokens": (
        "facebook/dino-vits8",
        "ViTModel",
        lambda: cut(
            transformers.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, patch_size=8)
        ),
        None,
        preprocessor("ViTImageProcessor", IMAGENET, 2, {"height": 480, "width": 480}),
        expert_tokens,
    ),
    "dinov2 tokens": (
        "facebook/dinov2-base",
        "Dinov2Model",
        lambda: transformers.Dinov2Config(image_size=518, patch_size=14, num_hidden_layers=LAYERS),
        None,
        preprocessor("BitImageProcessor", IMAGENET, 3, {"shortest_edge": 256}, 224),
        expert_tokens,
    ),
    "clipseg masks": (
        "CIDAS/clipseg-rd64-refined",
        "CLIPSegForImageSegmentation",
        clipseg_config,
        hub_checkpoints.clip_tokenizer,
        preprocessor("ViTImageProcessor", IMAGENET, 2, {"height": 352, "width": 352}),
        clipseg_mask,
    ),
    "metaclip 2 scores": (
        "facebook/metaclip-2-worldwide-huge-quickgelu",
        "MetaClip2Model",
        metaclip_config,
        hub_checkpoints.xlm_like,
        preprocessor("CLIPImageProcessor", CLIP, 3, SHORT, 224),
        scores,
    ),
    "blip scores": (
        "Salesforce/blip-itm-base-coco",
        "BlipForImageTextRetrieval",
        blip_config,
        hub_checkpoints.bert_tokenizer,
        preprocessor("BlipImageProcessor", CLIP, 3, {"height": 384, "width": 384}),
        blip_cosines,
    ),
    "groupvit scores": (
        "nvidia/groupvit-gcc-yfcc",
        "GroupViTModel",
        lambda: with_clip_tokens(transformers.GroupViTConfig()),
        hub_checkpoints.clip_tokenizer,
        preprocessor("CLIPImageProcessor", CLIP, 3, SHORT, 224),
        scores,
    ),
    "registers tokens": (
        "facebook/dinov2-with-registers-base",
        "Dinov2WithRegistersModel",
        lambda: transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14, num_hidden_layers=LAYERS),
        None,
        preprocessor("BitImageProcessor", IMAGENET, 3, {"shortest_edge": 256}, 224),
        expert_tokens,
    ),
    "dinov3 tokens": (
        "facebook/dinov3-vits16-pretrain-lvd1689m",
        "DINOv3ViTModel",
        lambda: transformers.DINOv3ViTConfig(num_register_tokens=4),
        None,
        preprocessor("ViTImageProcessor", IMAGENET, 2, {"height": 224, "width": 224}),
        expert_tokens,
    ),
    "owlvit boxes": (
        "google/owlvit-base-patch32",
        "OwlViTForObjectDetection",
        lambda: with_clip_tokens(cut(transformers.OwlViTConfig())),
        hub_checkpoints.clip_tokenizer,
        preprocessor("OwlViTImageProcessor", CLIP, 3, {"height": 768, "width": 768}),
        owl_boxes,
    ),
    "owlv2 logits": (
        "google/owlv2-base-patch16",
        "Owlv2ForObjectDetection",
        owlv2_config,
        hub_checkpoints.clip_tokenizer,
        preprocessor("Owlv2ImageProcessor", CLIP, 2, {"height": 960, "width": 960}),
        owl_boxes,
    ),
}


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """As large as the photograph that most numbers are of."""
    return Image.fromarray(scene(3, (480, 640)).image)


FIRST = ("clip scores", "siglip scores", "clip tokens", "dinov2 tokens")  # the others take minutes: with `-m full`


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=() if kind in FIRST else pytest.mark.full) for kind in KINDS]
)
def case(request, image, tmp_path_factory) -> tuple[Any, Path, Image.Image]:
    """A published row, with a random checkpoint for its own and the library's numbers for the published ones."""
    name, kind, config, make_tokenizer, settings, reference = KINDS[request.param]
    published = [row for row in VALUES if row.checkpoint == name and row.certainty == "A"]
    compared = request.param.rpartition(" ")[2]
    row: Any = next(row for row in published if compared in (row.kind, getattr(row, "output", "")))
    folder = tmp_path_factory.mktemp("checkpoint")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = {"add_pooling_layer": False} if kind == "ViTModel" else {}
        model = getattr(transformers, kind)(config(), **heads).eval()
    with torch.no_grad():
        enliven(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    tokenizer = None if make_tokenizer is None else make_tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    with torch.no_grad():
        expected = reference(model, settings, tokenizer, row, image)
    row = replace(row, checkpoint=str(folder), expected=tuple(expected.tolist()))
    return row, folder, image


def checked(row: Published, image: Image.Image) -> Any:
    model = row.load(device="cpu")
    return judge(row, tuple(row.measure(model, image).tolist()))


def changed(folder: Path, place: Path, file: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with another setting; the weights are shared."""
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).symlink_to(path)
    settings = json.loads((folder / file).read_text())
    change(settings)
    (place / file).unlink()
    (place / file).write_text(json.dumps(settings))
    return place


def test_the_checker_agrees_with_the_library(case):
    row, _, image = case
    result = checked(row, image)
    assert result.status == PASSED, result.difference


ACTIVATIONS = {"quick_gelu": "gelu", "gelu": "relu", "gelu_pytorch_tanh": "relu"}


def test_a_wrong_activation_fails(case, tmp_path):
    row, folder, image = case
    if row.kind == "boxes" or "blip" in row.source:
        pytest.skip("with random weights, an activation changes less than the tolerance")

    def change(config: dict[str, Any]) -> None:
        vision = config.get("vision_config", config)
        vision["hidden_act"] = ACTIVATIONS[vision["hidden_act"]]

    wrong = changed(folder, tmp_path / "wrong", "config.json", change)
    assert checked(replace(row, checkpoint=str(wrong)), image).status == FAILED


def test_wrong_statistics_fail(case, tmp_path):
    row, folder, image = case
    other = CLIP if row.kind == "masks" or "siglip" in row.source else HALF

    def change(settings: dict[str, Any]) -> None:
        settings["image_mean"], settings["image_std"] = other

    wrong = changed(folder, tmp_path / "wrong", "preprocessor_config.json", change)
    assert checked(replace(row, checkpoint=str(wrong)), image).status == FAILED


def test_a_wrong_resize_fails(case, tmp_path):
    row, folder, image = case

    def change(settings: dict[str, Any]) -> None:
        settings["resample"] = 5 - settings["resample"]  # bicubic for bilinear, and the other way round

    if hasattr(row, "resampling"):  # experts are told, their checkpoints do not decide
        other = "bilinear" if row.resampling == "bicubic" else "bicubic"
        wrong = replace(row, resampling=other)
    else:
        folder = changed(folder, tmp_path / "wrong", "preprocessor_config.json", change)
        wrong = replace(row, checkpoint=str(folder))
    assert checked(wrong, image).status == FAILED


def test_swapped_axes_fail(case, monkeypatch):
    row, _, image = case
    right, ground = pixels.to_pixels, checkers._ground

    def transposed(image: Image.Image, size: Size, preprocess: Any) -> torch.Tensor:
        return right(image.transpose(Image.Transpose.TRANSPOSE), size, preprocess)

    monkeypatch.setattr(checkers, "to_pixels", transposed)
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    monkeypatch.setattr(checkers, "_ground", lambda model, image, prompts: ground(model, turned, prompts))
    prepare = OWL.prepare
    monkeypatch.setattr(OWL, "prepare", lambda model, image: prepare(model, turned))
    assert checked(row, image).status == FAILED


NORMS = (
    "vision_model.post_layernorm",
    "vision_model.layernorm",
    "owlvit.vision_model.post_layernorm",
    "owlv2.vision_model.post_layernorm",
    "layernorm",
    "norm",
    "clip.vision_model.pre_layrnorm",
)


def test_a_missing_norm_fails(case):
    """The final one; what is published of CLIP's tokens and of CLIPSeg comes before it, so the first one there."""
    row, _, image = case
    model = row.load(device="cpu")
    norms = ["vision_model.pre_layrnorm"] if row.kind == "tokens" and "clip" in row.source else NORMS
    library = model.model
    name = next(name for name in norms if name in dict(library.named_modules()))
    library.set_submodule(name, nn.Identity())
    for tower in filter(None, [getattr(model, "vision", None)]):
        tower.__init__(library)
    assert judge(row, tuple(row.measure(model, image).tolist())).status == FAILED


@pytest.mark.parametrize(
    ("name", "checkpoint", "depth"), [("EVA02-B-16", "EVA02-B-16", 4), ("PE-Core-B-16", "PE-Core-L-14-336", 4)]
)
def test_scores_of_open_clips_models(name, checkpoint, depth, image, monkeypatch):
    """EVA02 and PE, with few layers: as the library's transform and encoders give them, and other if it is wrong."""
    with torch.random.fork_rng(), patch.object(timm, "create_model", partial(timm.create_model, depth=depth)):
        torch.manual_seed(0)
        model, _, evaluation = open_clip.create_model_and_transforms(name)
    transform: Any = evaluation
    library: Any = model.eval()
    library.text.transformer.resblocks = library.text.transformer.resblocks[:1]
    with torch.no_grad():
        enliven(library)
        row: Any = next(row for row in VALUES if row.checkpoint == checkpoint)
        tokenizer = open_clip.get_tokenizer(name)
        pixels, texts = transform(image)[None], tokenizer(list(row.prompts))
        images = library.encode_image(pixels, normalize=True)
        logits = (library.logit_scale.exp() * images @ library.encode_text(texts, normalize=True).T)[0]
        row = replace(row, framing=checkers.CROPPED, expected=tuple(logits.softmax(0).tolist()))
        backbone = adapt(library, tokenizer)
        assert judge(row, tuple(row.measure(backbone, image).tolist())).status == PASSED
        turned = image.transpose(Image.Transpose.TRANSPOSE)
        assert judge(row, tuple(row.measure(backbone, turned).tolist())).status == FAILED
        other = replace(backbone.preprocess, mean=(0.3, 0.3, 0.3), std=(0.9, 0.9, 0.9))
        monkeypatch.setattr(checkers, "to_pixels", lambda image, size, _: pixels_of(image, size, other))
        assert judge(row, tuple(row.measure(backbone, image).tolist())).status == FAILED
