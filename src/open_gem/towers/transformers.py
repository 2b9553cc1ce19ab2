"""The package transformers: its CLIP, MetaCLIP 2, SigLIP, TIPSv2 and BLIP, by repository, folder or file of weights.

Tokenizers and image statistics are the checkpoint's own. `hf_text` reads its texts, and the tower that `families` names
its images.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from open_gem.errors import InputError, UnknownModelError, UnsupportedModelError
from open_gem.images.pixels import Preprocess
from open_gem.towers import hub as _hub
from open_gem.towers.base import Backbone, ModuleTower, check_evaluating
from open_gem.towers.families import check_not_trained, find_tower
from open_gem.towers.hf_text import BlipText, HfText, SiglipText, Tipsv2Text
from open_gem.towers.weights import finished, quiet
from open_gem.types import Size

# Kinds of models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """One kind of model.

    model      name of its class in transformers
    text       what reads its text half
    mean, std  statistics of its images, for checkpoints without their own
    tokenizer  name of its tokenizer's class, for files that do not say it
    """

    model: str
    text: type[HfText]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokenizer: str = "AutoTokenizer"


_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

MODELS = {
    "clip": ModelSpec("CLIPModel", HfText, *_CLIP, "CLIPTokenizer"),
    "metaclip_2": ModelSpec("MetaClip2Model", HfText, *_CLIP),
    "siglip": ModelSpec("SiglipModel", SiglipText, *_HALF),
    "siglip2": ModelSpec("Siglip2Model", SiglipText, *_HALF),
    "tipsv2": ModelSpec("Tipsv2Model", Tipsv2Text, (0, 0, 0), (1, 1, 1)),
    "blip": ModelSpec("BlipForImageTextRetrieval", BlipText, *_CLIP, "BertTokenizer"),
}
"""`model_type` of a configuration → its kind."""


def _spec(name: str, config: Any) -> ModelSpec:
    """Return the kind of a configuration. Raises UnsupportedModelError for one that is not read."""
    check_not_trained(name, config.model_type)
    if config.model_type not in MODELS:
        known = f"models of type {config.model_type!r} are not read, only {', '.join(MODELS)}"
        raise UnsupportedModelError(f"cannot read {name}: {known}")
    return MODELS[config.model_type]


# Architectures that are known without a download ----------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A configuration by what differs from the defaults of transformers: `kind`, a key of `MODELS`, and its sections.

    `certain`: known for sure, activations and all, so that a bare file of weights can be trusted to it. `original`:
    files of it name their weights as Salesforce's own code does.
    """

    kind: str
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)
    certain: bool = True
    original: bool = False

    def configuration(self) -> Any:
        """Return the configuration as transformers has it."""
        sections = {"vision_config": dict(self.vision), "text_config": dict(self.text)}
        with quiet():
            return transformers.AutoConfig.for_model(self.kind, **sections, **self.other)


def _sizes(width: int, layers: int, heads: int, mlp: int | None = None, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": mlp or 4 * width, **more}


def _tips(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}


_B16, _B32 = _sizes(768, 12, 12, patch_size=16), _sizes(768, 12, 12, patch_size=32)
_L14, _H14 = _sizes(1024, 24, 16, patch_size=14), _sizes(1280, 32, 16, patch_size=14)
_TEXT_B, _TEXT_L, _TEXT_H = _sizes(512, 12, 8), _sizes(768, 12, 12), _sizes(1024, 24, 16)
_GELU = {"hidden_act": "gelu"}
_XLM_V = {"vocab_size": 901_629, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_SO400M = _sizes(1152, 27, 16, 4304)
_BERT = _sizes(768, 12, 12)
_MED = {**_BERT, "is_decoder": False}  # without the cross-attention to images, which matching needs
_BLIP_B = _sizes(768, 12, 12, patch_size=16, image_size=384)
_BLIP_L = _sizes(1024, 24, 16, patch_size=16, image_size=384)
_EPS = {"layer_norm_eps": 1e-6}  # as Salesforce's code has it; the default of transformers is 1e-5

ARCHITECTURES = {
    "openai/clip-vit-base-patch32": Architecture("clip", _B32, _TEXT_B),
    "openai/clip-vit-base-patch16": Architecture("clip", _B16, _TEXT_B),
    "openai/clip-vit-large-patch14": Architecture("clip", _L14, _TEXT_L, {"projection_dim": 768}),
    "openai/clip-vit-large-patch14-336": Architecture(
        "clip", {**_L14, "image_size": 336}, _TEXT_L, {"projection_dim": 768}
    ),
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": Architecture("clip", {**_B16, **_GELU}, {**_TEXT_B, **_GELU}),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": Architecture(
        "clip", {**_H14, **_GELU}, {**_TEXT_H, **_GELU}, {"projection_dim": 1024}
    ),
    "facebook/metaclip-b16-400m": Architecture("clip", _B16, _TEXT_B),
    "wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M": Architecture(
        "clip", _sizes(512, 12, 8, patch_size=32), _sizes(512, 6, 8), certain=False
    ),
    "facebook/metaclip-2-worldwide-huge-quickgelu": Architecture(
        "metaclip_2", _H14, {**_TEXT_H, **_XLM_V}, {"projection_dim": 1024}
    ),
    "google/siglip-base-patch16-224": Architecture("siglip"),
    "google/siglip-so400m-patch14-384": Architecture(
        "siglip", {**_SO400M, "patch_size": 14, "image_size": 384}, _SO400M
    ),
    "google/siglip2-base-patch16-224": Architecture("siglip", {}, {"vocab_size": 256_000}),
    "google/siglip2-base-patch16-naflex": Architecture("siglip2", {}, {"vocab_size": 256_000}),
    "google/siglip2-so400m-patch16-naflex": Architecture("siglip2", _SO400M, {**_SO400M, "vocab_size": 256_000}),
    "google/tipsv2-b14": Architecture("tipsv2"),
    "google/tipsv2-l14": Architecture("tipsv2", _tips(1024, 24, 16), _sizes(1024, 12, 16), certain=False),
    "Salesforce/blip-itm-base-coco": Architecture("blip", _BLIP_B, _BERT, certain=False),
    "Salesforce/blip-itm-large-coco": Architecture("blip", _BLIP_L, _BERT, certain=False),
    "blip-base": Architecture("blip", {**_BLIP_B, **_EPS}, _MED, original=True),
    "blip-large": Architecture("blip", {**_BLIP_L, **_EPS}, _MED, original=True),
}
"""Names -> configurations, for random weights and for bare files of weights; a checkpoint's own always goes first.

From memory are only those that are not `certain`: TinyCLIP's activation and BLIP's norm in transformers' files. The
others are open_clip's for the same weights, or of transformers' defaults, or of Salesforce's code.
"""


def build_tower(name: str) -> ModuleTower:
    """Build the vision tower of an architecture with random weights, for checks; errors as `load`.

    No download for a key of `ARCHITECTURES`, for others only their configuration. The text half is cut down.
    """
    known = ARCHITECTURES.get(name)
    config = _hub.configuration(name) if known is None else known.configuration()
    model = getattr(transformers, _spec(name, config).model)
    config.text_config.vocab_size, config.text_config.num_hidden_layers = 8, 1
    if hasattr(config.vision_config, "initializer_range"):
        config.vision_config.initializer_range = 0.02  # BLIP's is 1e-10
    with quiet():
        return read_tower(model(config).eval())


# Adapting -------------------------------------------------------------------------------------------------------------


def adapt(model: Any, tokenizer: Any) -> Backbone:
    """Make a backbone of a model of transformers in memory, with its tokenizer, or its processor of images and text.

    With a tokenizer alone, images get the statistics of the model's family. Raises UnsupportedModelError with the
    reason if its vision tower cannot be read, InputError in training mode.
    """
    tower = read_tower(model)
    settings = {}
    if isinstance(tokenizer, transformers.ProcessorMixin):
        processor: Any = tokenizer
        settings, tokenizer = processor.image_processor.to_dict(), processor.tokenizer
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise InputError(f"expected a tokenizer or a processor of transformers, not a {type(tokenizer).__name__}")
    _check_words(model, tokenizer)
    return _backbone("transformers", tower, MODELS[model.config.model_type].text(model, tokenizer), settings)


def _check_words(model: Any, tokenizer: Any) -> None:
    words, known = len(tokenizer), model.config.text_config.vocab_size
    if words > known:
        raise InputError(f"the tokenizer has {words} words, the model knows {known}: it is another model's")


def read_tower(model: Any) -> ModuleTower:
    """Return the tower that reads the vision half of `model`; errors as `adapt`."""
    tower, name = find_tower("transformers", model), type(model).__name__
    if tower is None:
        reason = f"it is none of {', '.join(kind.model for kind in MODELS.values())}"
    else:
        reason = tower.unsupported_reason(model)
    if tower is None or reason is not None:
        raise UnsupportedModelError(f"cannot read {name}: {reason}")
    check_evaluating(model)
    return tower(model)


def _backbone(name: str, tower: ModuleTower, text: HfText, settings: Mapping[str, Any]) -> Backbone:
    model: Any = tower.module
    return Backbone(name, model, text, tower, _preprocess(name, model.config, settings))


def _preprocess(name: str, config: Any, settings: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing from `settings` of a preprocessor_config.json, with the family's usual values for
    missing ones."""
    kind, vision = MODELS[config.model_type], config.vision_config
    size = isqrt(vision.num_patches) * vision.patch_size if config.model_type == "siglip2" else vision.image_size
    scale = settings.get("rescale_factor", 1 / 255)
    if not settings.get("do_rescale", True) or abs(scale * 255 - 1) > 1e-6:
        raise UnsupportedModelError(f"cannot read {name}: its images are not scaled to [0, 1]")
    resample = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC)).name.lower()
    mean: Any = settings.get("image_mean") or kind.mean
    std: Any = settings.get("image_std") or kind.std
    if not settings.get("do_normalize", True):
        mean, std = (0, 0, 0), (1, 1, 1)
    return Preprocess(tuple(mean), tuple(std), resample, Size(size, size))


# Loading --------------------------------------------------------------------------------------------------------------


def load(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> Backbone:
    """Load "org/repo" or "local-dir:folder"; always with its weights.

    `pretrained` may be a file of weights for the architecture that `name` says: in transformers' names, or for
    "blip-base" and "blip-large" in those of Salesforce's own files ("model_base_14M.pth"). A tokenizer and a
    preprocessor_config.json that lie beside it go first, before the hub's.

    Raises UnknownModelError (no such name or file), WeightsError (weights missing, unreachable or not fitting),
    UnsupportedModelError (a model that cannot be read; judged by its configuration before weights are downloaded).
    """
    if pretrained is None:
        if name in ARCHITECTURES and ARCHITECTURES[name].original:
            raise UnknownModelError(f'{name!r} needs a file of weights, such as "model_base.pth"')
        label, kind = name, _spec(name, _hub.configuration(name, cache_dir))
        model = _hub.fetch(getattr(transformers, kind.model), name, cache_dir=cache_dir)
        tokenizer, settings = _hub.fetch_processor(name, cache_dir)
        text = kind.text(model, tokenizer)
    else:
        label = f"{name}, {pretrained}"
        text, settings = _from_file(name, Path(pretrained), cache_dir)
    _check_words(text.model, text.tokenizer)
    return _backbone(label, read_tower(finished(text.model, device, dtype)), text, settings)


def _from_file(name: str, file: Path, cache_dir: str | None) -> tuple[HfText, dict[str, Any]]:
    """Make the text half of a model of architecture `name` with the weights of a file, and the settings of its
    images."""
    if name.startswith("local-dir:"):
        raise UnknownModelError(f"{name!r} brings its own weights; {str(file)!r} cannot be combined with it")
    if not file.is_file():
        raise UnknownModelError(f"no such file: {file} (models of transformers have no tags)")
    architecture, temperature = ARCHITECTURES.get(name), {}
    if architecture is None or not architecture.certain:
        config = _hub.configuration(name, cache_dir)
    else:
        config = architecture.configuration()
    kind = _spec(name, config)
    model_class = getattr(transformers, kind.model)
    if architecture is not None and architecture.original:
        weights, temperature = _translated(_hub.read_weights(file), config)
    else:
        weights = _hub.read_weights(file, model_class, config)
    model = _hub.fetch(model_class, str(file), config=config, state_dict=weights)
    beside, repository = f"local-dir:{file.parent.absolute()}", "bert-base-uncased" if "/" not in name else name
    if _hub.has_tokenizer(file.parent):
        tokenizer = _hub.fetch_tokenizer(beside, kind=getattr(transformers, kind.tokenizer))
    else:
        tokenizer = _hub.fetch_tokenizer(repository, cache_dir)
    if (file.parent / "preprocessor_config.json").is_file():
        settings = _hub.image_settings(beside)
    else:
        settings = {} if architecture else _hub.image_settings(name, cache_dir)
    return kind.text(model, tokenizer, **temperature), settings


_RENAMED = (  # Salesforce's code -> transformers, in this order
    (r"^visual_encoder\.(cls_token|pos_embed|patch_embed\.proj)", r"vision_model.embeddings.\1"),
    (r"embeddings\.cls_token$", "embeddings.class_embedding"),
    (r"embeddings\.pos_embed$", "embeddings.position_embedding"),
    (r"embeddings\.patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"^(vision_model\.encoder\.layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.attn\.", r"\1.self_attn."),
)
_CONTRASTIVE = r"(vision_model|text_encoder|vision_proj|text_proj)\.(?!.*\.crossattention\.)"


def _translated(weights: Mapping[str, Tensor], config: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Translate the weights of the contrastive half in a file of Salesforce's, and the temperature if there is one.

    Momentum encoders, queues, the text decoder and image-text matching are left out (transformers' head for the last is
    zero). `config` gets the image size that the position embeddings are for.
    """
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if re.match(_CONTRASTIVE, name):
            renamed[name] = value
    positions = renamed.get("vision_model.embeddings.position_embedding")
    if positions is not None and positions.ndim == 3:
        config.vision_config.image_size = isqrt(positions.shape[1] - 1) * config.vision_config.patch_size
    width = config.text_config.hidden_size
    bias = torch.zeros(2, dtype=torch.float32, device="cpu")
    unused = {"itm_head.weight": bias[:, None].repeat(1, width), "itm_head.bias": bias}
    trained = {"temperature": weights["temp"].clamp(0.001, 0.5).item()} if "temp" in weights else {}
    return renamed | unused, trained
