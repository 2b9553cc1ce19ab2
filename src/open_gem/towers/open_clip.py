"""open_clip: its names, tags and checkpoints, its tokenizers; `families` says which tower reads its models."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import cached_property
from importlib.util import find_spec
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.transformer import TextTransformer
from torch import Tensor

from open_gem.checks import close_names
from open_gem.errors import OpenGemError, UnknownModelError, UnsupportedModelError, WeightsError
from open_gem.images.pixels import Preprocess
from open_gem.method import kernels
from open_gem.method.kernels.linear import is_watched
from open_gem.text import TextTower
from open_gem.towers.base import Backbone, ModuleTower, Recommended, check_evaluating
from open_gem.towers.families import find_family, find_tower
from open_gem.towers.hf_text import cut_off
from open_gem.towers.weights import finished, hub_or_cache, in_float32, quiet, read_weights, reason_of
from open_gem.types import Size


def adapt(
    model: Any,
    tokenizer: Any,
    *,
    name: str = "open_clip",
    recommended: Recommended | None = None,
    concepts: Sequence[str] = (),
) -> Backbone:
    """Make a backbone of an open_clip model in memory; `concepts` as in `TextTower`.

    Raises UnsupportedModelError with the reason if its vision tower cannot be read, InputError in training mode.
    """
    visual = getattr(model, "visual", None)
    if visual is None:
        raise UnsupportedModelError(f"cannot read {type(model).__name__}: it has no vision tower (`model.visual`)")
    tower, text = read_tower(visual, type(model).__name__), OpenClipText(model, tokenizer, concepts)
    return Backbone(name, model, text, tower, _preprocess(visual), recommended or Recommended())


def read_tower(visual: Any, owner: str) -> ModuleTower:
    """Return the tower that reads `visual`, of the model called `owner`; errors as `adapt`."""
    module = getattr(visual, "trunk", visual)  # timm's towers are wrapped
    tower = find_tower("open_clip", module)
    if tower is None:
        reason = f"its vision tower is a {type(module).__name__}, which has no file in `towers/`"
    else:
        reason = tower.unsupported_reason(visual)
    if tower is None or reason is not None:
        raise UnsupportedModelError(f"cannot read {owner}: {reason}")
    check_evaluating(visual)
    return tower(visual)


def build_tower(name: str) -> ModuleTower:
    """Build the vision tower of open_clip's architecture `name` with random weights; errors as `load`."""
    config = open_clip.get_model_config(_architecture(name))
    assert config is not None
    build = open_clip.model._build_vision_tower  # a whole model's text tower may need a download
    visual = build(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
    return read_tower(visual.eval(), name)


def build(name: str) -> Backbone:
    """Build a whole model of open_clip's architecture `name` with random weights; errors as `load`, OSError if its
    tokenizer has to be downloaded."""
    architecture = _architecture(name)
    tokenizer = open_clip.get_tokenizer(architecture)
    with quiet():
        model = open_clip.create_model(architecture)
    return adapt(model.eval(), tokenizer, name=name)


class OpenClipText(TextTower):
    """The text half of a CLIP, CoCa or CustomTextCLIP."""

    def __init__(self, model: Any, tokenizer: Any, concepts: Sequence[str] = ()):
        super().__init__(model, tokenizer)
        self._concepts = tuple(concepts)

    def encode(self, texts: list[str]) -> Tensor:
        with self._lock:
            tokens = self.tokenizer(texts)
        tokens = tokens.to(self.device)
        causal = _CausalText.of(self.model) if kernels.are_on() else None
        return self.model.encode_text(tokens) if causal is None else causal.encode(tokens)

    def truncated(self, text: str) -> str:
        inner = getattr(self.tokenizer, "tokenizer", None)  # of transformers
        if inner is not None:
            with self._lock:
                return cut_off(inner, text, self.tokenizer.context_length)
        encode, decode = getattr(self.tokenizer, "encode", None), getattr(self.tokenizer, "decode", None)
        if encode is None or decode is None:  # another library's tokenizer
            return ""
        return decode(encode(text)[self.tokenizer.context_length - 2 :]).strip()  # without start and end of text

    @property
    def concepts(self) -> tuple[str, ...]:
        return self._concepts

    def knows(self, prompt: str) -> bool:
        """Return True if the model knows a word of `prompt`. A model of few concepts was trained on their tokens and on
        those of templates; all other embeddings say nothing. Tokens without two letters in a row ("-", "t") occur in
        many words, and are no words themselves."""
        return not self._concepts or not self._tokens(prompt).isdisjoint(self._known)

    @cached_property
    def _known(self) -> set[int]:
        return {token for concept in self._concepts for token in self._tokens(concept)}

    def _tokens(self, text: str) -> set[int]:
        with self._lock:
            nothing, tokens = (set(row) for row in self.tokenizer(["", text]).tolist())
            tokens -= nothing
            return {token for token in tokens if re.search("[a-z]{2}", self.tokenizer.decode([token]))}


def _is_plain(text: TextTransformer) -> bool:
    """Return True for a text tower that is exactly its class, without a class token of its own."""
    return type(text) is TextTransformer and text.cls_emb is None and not text.output_tokens and not is_watched(text)


class _CausalText(NamedTuple):
    """A text half whose attention is causal and whose embedding is read where the text ends, so that what follows has
    no part in it.

    pool  "argmax": a text ends at its highest token; "eos": at its first token `eos`
    """

    half: Any
    pool: str
    eos: int

    @classmethod
    def of(cls, model: Any) -> "_CausalText | None":
        """Return that half of a model; None for any other, and where calling it does more than its class says."""
        text, kind = getattr(model, "text", None), type(model)
        if "encode_text" in vars(model):
            return None
        if kind is open_clip.CLIP:
            causal = cls(model, model.text_pool_type, model.text_eos_id)
        elif isinstance(text, TextTransformer) and _is_plain(text):
            causal = cls(text, text.pool_type, text.eos_id)
        else:
            return None
        return causal if causal.half.attn_mask is not None and causal.pool in ("argmax", "eos") else None

    def encode(self, tokens: Int[Tensor, "p n"]) -> Float[Tensor, "p e"]:
        """Encode tokens through the half's own modules, without those after the end of the longest text."""
        half = self.half
        ends = (tokens if self.pool == "argmax" else (tokens == self.eos).long()).argmax(dim=1)
        length = int(ends.max()) + 1
        dtype = half.transformer.get_cast_dtype()
        x = half.token_embedding(tokens[:, :length]).to(dtype) + half.positional_embedding[:length].to(dtype)
        x = half.transformer(x, attn_mask=half.attn_mask[:length, :length])
        x = half.ln_final(x[torch.arange(len(x), dtype=torch.int64, device=x.device), ends])
        projection = half.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, torch.nn.Module) else x @ projection


UNSUPPORTED = {  # prefix of names of timm's towers -> why they are not read
    "convnext": "its vision tower is a ConvNeXt: convolutions, no self-attention between patch tokens",
    "fastvit": "its vision tower is a FastViT: convolutions, self-attention in its last stage at most",
    "swin": "its vision tower is a Swin transformer: self-attention within windows, on a grid that shrinks",
    "vit_relpos": "its vision tower adds relative positions to the attention's scores",
}
_RESNET = "its vision tower is a ResNet: it has no blocks of self-attention between patch tokens"
_OTHER = "its vision tower, timm's {name}, is of no family here"
_TRANSFORMERS = 'its text tower needs the package transformers: pip install "open_gem[transformers]"'


def unsupported_reason(name: str) -> str | None:
    """Return why open_clip's architecture `name` is not supported, by its name and configuration; None if it is."""
    config = open_clip.get_model_config(name)
    assert config is not None
    vision, text = config["vision_cfg"], config["text_cfg"]
    if find_family("open_clip", name) is None:
        timm_name = vision.get("timm_model_name")
        reasons = (reason for prefix, reason in UNSUPPORTED.items() if timm_name and timm_name.startswith(prefix))
        return next(reasons, _OTHER.format(name=timm_name) if timm_name else _RESNET)
    needs_transformers = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    return _TRANSFORMERS if needs_transformers and find_spec("transformers") is None else None


def _preprocess(visual: Any) -> Preprocess:
    """Return the preprocessing of the checkpoint's own configuration, which open_clip attaches to the tower."""
    config = {**open_clip.transform.PreprocessCfg().__dict__, **getattr(visual, "preprocess_cfg", {})}
    return Preprocess(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bicubic" if config["interpolation"] == "random" else config["interpolation"],
        image_size=Size(*visual.image_size),
    )


# Loading --------------------------------------------------------------------------------------------------------------


def load(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> Backbone:
    """Load `name` with open_clip's names and tags, "hf-hub:org/repo", or "local-dir:folder"; always with its weights.

    `pretrained` may also be a checkpoint file; which activation it was trained with only its name can say then
    ("ViT-B-16-quickgelu" for OpenAI's).

    Raises UnknownModelError (no such name or tag), WeightsError (weights missing, unreachable or not fitting),
    UnsupportedModelError (a tower that cannot be read; for built-in names before anything is downloaded).
    """
    config = configuration(name, pretrained)
    label = name if pretrained is None else f"{name}, {pretrained}"
    try:
        with quiet(), nullcontext() if name.startswith("local-dir:") else hub_or_cache(label, cache_dir):
            sections = _sections(name, cache_dir)
            _check_runs_no_code(label, sections)
            model = in_float32(lambda: _with_weights(label, config, cache_dir))
            tokenizer = open_clip.get_tokenizer(config["model_name"], cache_dir=cache_dir)
            settings = dict(sections.get("open_gem", {}))
            concepts = tuple(settings.pop("concepts", ()))
            recommended = _recommended(name, settings)
    except OpenGemError:
        raise
    except Exception as error:  # anything that a hub, a file system or a state dict can raise
        raise WeightsError(f"cannot load {label}: {reason_of(error)}") from error
    return adapt(finished(model, device, dtype), tokenizer, name=label, recommended=recommended, concepts=concepts)


def knows(name: str) -> bool:
    """Return True for open_clip's own names, and for names that say they are in its format."""
    return name.startswith(("hf-hub:", "local-dir:")) or name.replace("/", "-") in open_clip.list_models()


def catalogue() -> list[tuple[str, str | None, str | None]]:
    """Return every (name, tag) of open_clip with the reason if it is not supported, else None. Untrained names have no
    tag."""
    tags = {name: open_clip.list_pretrained_tags_by_model(name) or [None] for name in open_clip.list_models()}
    return [(name, tag, reason) for name in tags for reason in [unsupported_reason(name)] for tag in tags[name]]


def configuration(name: str, pretrained: str | None) -> dict[str, Any]:
    """Return the arguments for `open_clip.create_model`, checked: names, tags, and the activation that goes with the
    tag.

    Many tags (every `openai`, for one) were trained with QuickGELU, but open_clip builds what the architecture's name
    says and only warns. Here the tag decides.
    """
    if name.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise UnknownModelError(
                f"{name!r} brings its own weights; the tag {pretrained!r} cannot be combined with it"
            )
        if name.startswith("local-dir:"):
            _check_folder(Path(name.removeprefix("local-dir:")))
        return {"model_name": name}

    architecture = _architecture(name)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None:
        raise UnknownModelError(f"{name!r} needs a pretrained tag; known: {', '.join(tags) or 'none'}")
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)  # before files: a file may have the name of a tag
    if not tag and Path(pretrained).is_file():
        return {"model_name": architecture, "pretrained": pretrained, "force_preprocess_cfg": _statistics(architecture)}
    if not tag:
        known = ", ".join(tags) or "none"
        raise UnknownModelError(f"{pretrained!r} is no tag of {name!r}, and no file; known tags: {known}")
    return {
        "model_name": architecture,
        "pretrained": pretrained,
        "force_quick_gelu": bool(tag.get("quick_gelu", False)),
    }


def _with_weights(label: str, config: Mapping[str, Any], cache_dir: str | None) -> Any:
    """Make the model that `configuration` describes, with all of its weights, none of them random or resampled.

    open_clip's own loading silently resamples position embeddings to the architecture's grid; here the model is made
    for the grid of the weights.
    """
    file, config = _file_of_weights(config, cache_dir)
    settings = {**config, "cache_dir": cache_dir, "load_weights": False, "pretrained_text": False}
    model: Any = open_clip.create_model(**settings)
    if file.suffix in (".npz", ".npy"):  # big_vision's, which only open_clip can read
        open_clip.load_checkpoint(model, str(file))
        return model
    weights = read_weights(file, model.state_dict().keys())
    weights = open_clip.factory.convert_state_dict(model, weights)
    if "positional_embedding" in weights and not hasattr(model, "positional_embedding"):
        weights = open_clip.factory.convert_to_custom_text_state_dict(weights)
    weights.pop("text.transformer.embeddings.position_ids", None)  # a buffer of older versions of transformers
    if size := _trained_size(label, adapt(model.eval(), None), weights):
        model = open_clip.create_model(**settings, force_image_size=(size.height, size.width))
    for name in {"logit_scale", "logit_bias"} & weights.keys() & dict(model.named_parameters()).keys():
        weights[name] = weights[name].reshape(model.get_parameter(name).shape)  # older versions saved other shapes
    model.load_state_dict(weights)
    return model


def _file_of_weights(config: Mapping[str, Any], cache_dir: str | None) -> tuple[Path, dict[str, Any]]:
    """Return the file of weights, downloaded if necessary, and the arguments for `create_model` that go with it."""
    name, get = config["model_name"], open_clip.factory
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if (weights := get._find_checkpoint_in_dir(folder)) is None:
            raise FileNotFoundError(f"there are no weights in {folder}")
        return Path(weights), dict(config)
    if name.startswith("hf-hub:"):
        return Path(get.download_pretrained_from_hf(name.removeprefix("hf-hub:"), cache_dir=cache_dir)), dict(config)
    pretrained = config["pretrained"]
    if tag := open_clip.get_pretrained_cfg(name, pretrained):
        file = get.download_pretrained(tag, cache_dir=cache_dir)
        return Path(file), {**config, "pretrained": file, "force_preprocess_cfg": tag}
    return Path(pretrained), dict(config)


def _trained_size(label: str, backbone: Backbone, weights: Mapping[str, Tensor]) -> Size | None:
    """Return the image size that the position embeddings in `weights` are for; None for the model's own.

    Raises WeightsError if their number of patches is no square.
    """
    tower, positions = backbone.vision, backbone.vision.trained_positions
    name = next((name for name, weight in backbone.model.named_parameters() if weight is positions), None)
    loaded = None if name is None else weights.get(name)
    if loaded is None or loaded.ndim != positions.ndim or loaded.shape[-2] == positions.shape[-2]:
        return None
    rows, cols = (side // patch for side, patch in zip(tower.trained, tower.patch, strict=True))
    patches = loaded.shape[-2] - (positions.shape[-2] - rows * cols)
    side = isqrt(max(patches, 0))
    if not side or side * side != patches:
        raise WeightsError(
            f"cannot load {label}: its position embeddings are for {patches} patches, which are no square grid; "
            f"expected the architecture's {rows}×{cols}"
        )
    return Size(side * tower.patch[0], side * tower.patch[1])


def _architecture(name: str) -> str:
    """Return open_clip's own spelling of a built-in name. Raises UnknownModelError, UnsupportedModelError with the
    reason."""
    architecture = name.replace("/", "-")
    if architecture not in open_clip.list_models():
        close = close_names(architecture, open_clip.list_models())
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise UnknownModelError(
            f"unknown model {name!r}; {hint}expected a name of `open-gem models --all`, "
            '"org/repo" of transformers, "hf-hub:org/repo" or a folder'
        )
    if reason := unsupported_reason(architecture):
        raise UnsupportedModelError(f"cannot read {name}: {reason}")
    return architecture


def _statistics(architecture: str) -> dict[str, Any]:
    """Return image statistics that all tags of an architecture agree on: for a file of weights alone, which has
    none."""
    tags = [
        open_clip.get_pretrained_cfg(architecture, tag) for tag in open_clip.list_pretrained_tags_by_model(architecture)
    ]
    keys = ("mean", "std", "interpolation") if tags else ()
    return {key: tags[0][key] for key in keys if key in tags[0] and all(tag.get(key) == tags[0][key] for tag in tags)}


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise WeightsError(f"no such folder: {folder}")
    if not (folder / "open_clip_config.json").is_file():
        raise WeightsError(f"{folder} has no open_clip_config.json, which says what model it holds")


def _sections(name: str, cache_dir: str | None) -> dict[str, Any]:
    """Return the contents of a checkpoint's open_clip_config.json; empty for built-in names."""
    if name.startswith("local-dir:"):
        return json.loads((Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text("utf-8"))
    if name.startswith("hf-hub:"):
        return open_clip.factory._get_hf_config(name.removeprefix("hf-hub:"), cache_dir=cache_dir)
    return {}


def _check_runs_no_code(label: str, section: Any) -> None:
    """Raise UnsupportedModelError for a configuration that asks, anywhere, to run code of its own: open_clip would pass
    that on to transformers."""
    if isinstance(section, dict):
        if section.get("trust_remote_code"):
            raise UnsupportedModelError(f"cannot read {label}: it brings its own code, which is never run")
        for part in section.values():
            _check_runs_no_code(label, part)


def _recommended(name: str, settings: dict[str, Any]) -> Recommended:
    """Return a checkpoint's own recommendations, from an "open_gem" section that open_clip does not read."""
    known = {field.name for field in fields(Recommended)}
    if not settings.keys() <= known:
        unknown = ", ".join(sorted(settings.keys() - known))
        raise WeightsError(f"{name} recommends {unknown}, which is unknown; known: {', '.join(sorted(known))}")
    return Recommended(**settings)
