"""open_clip's native vision transformers (`open_clip.transformer.VisionTransformer`), read and never changed."""

import json
import logging
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import open_clip
import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor
from torch.nn.functional import linear

from open_gem.attention import Heads
from open_gem.backbones._base import Backbone, Recommended
from open_gem.errors import InputError, UnknownModelError, UnsupportedModelError, WeightsError
from open_gem.imaging import Preprocess
from open_gem.pathway import Block
from open_gem.types import Grid, Size

TEXT_BATCH = 256  # prompts encoded at a time: bounds memory when there are thousands


class OpenClipBackbone(Backbone):
    """A CLIP of open_clip with a native ViT tower, already in memory. See `Backbone` for what each member gives.

    Raises UnsupportedModelError, naming what is in the way, for towers that cannot be read.
    """

    prefix = 1

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "open_clip", recommended: Recommended | None = None):
        visual = _readable_tower(model)
        self.model, self.visual, self.tokenizer, self.name = model, visual, tokenizer, name
        self.recommended = recommended or Recommended()
        self.preprocess = _preprocess(visual)
        rows, cols = visual.patch_size
        self.patch = (rows, cols)
        self.blocks: Sequence[Block] = tuple(_read_block(block) for block in visual.transformer.resblocks)
        self._positions = lru_cache(maxsize=16)(self._resample_positions)  # lru_cache is safe between threads

    @property
    def device(self) -> torch.device:
        return self.visual.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    @property
    def logit_scale(self) -> float:
        return self.model.logit_scale.detach().exp().item()

    @property
    def weights_version(self) -> Hashable:
        return _version(self.model.parameters())

    def embed(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        grid = self._grid(pixels)
        pixels = pixels.to(self.device, self.dtype)
        patches = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        class_token = self.visual.class_embedding.expand(len(pixels), 1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self._positions(grid, _version([self._trained_positions]))
        return self.visual.ln_pre(tokens), grid

    def project(self, tokens: Tensor) -> Tensor:
        tokens = self.visual.ln_post(tokens)
        return tokens if self.visual.proj is None else tokens @ self.visual.proj

    def pool(self, tokens: Tensor) -> Tensor:
        pooled, _ = self.visual._pool(tokens)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        batches = [list(prompts[start : start + TEXT_BATCH]) for start in range(0, len(prompts), TEXT_BATCH)]
        encode = partial(self.model.encode_text, normalize=True)
        return torch.cat([encode(self.tokenizer(batch).to(self.device)) for batch in batches])

    def truncated(self, prompt: str) -> str:
        # Only open_clip's own BPE tokenizer says what it does with a text; the others are trusted.
        encode, decode = getattr(self.tokenizer, "encode", None), getattr(self.tokenizer, "decode", None)
        if encode is None or decode is None:
            return ""
        room = self.tokenizer.context_length - 2  # start and end of text
        return decode(encode(prompt)[room:]).strip()

    @property
    def _trained_positions(self) -> Tensor:
        return self.visual.positional_embedding

    def _grid(self, pixels: Tensor) -> Grid:
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(f"pixels have shape {tuple(pixels.shape)}, expected (images, 3, height, width)")
        if not pixels.is_floating_point():
            raise InputError(f"pixels are {pixels.dtype}, expected floats, normalised as `Localizer.pixels` gives them")
        (height, width), (rows, cols) = pixels.shape[-2:], self.patch
        if height % rows or width % cols or not height or not width:
            raise InputError(
                f"pixels are {height}×{width} (height × width), expected whole multiples of the {rows}×{cols} patch"
            )
        return Grid(height // rows, width // cols)

    def _resample_positions(self, grid: Grid, version: Hashable) -> Tensor:
        """Position embeddings for `grid`; `version` only tells the cache that the weights have changed since."""
        trained = Grid(*self.visual.grid_size)
        if grid == trained:
            return self._trained_positions.detach()
        return resample_abs_pos_embed(  # bicubic with antialias, as in the published GEM
            self._trained_positions.detach()[None], list(grid), list(trained), num_prefix_tokens=self.prefix
        )[0]


def _version(weights: Iterable[Tensor]) -> Hashable:
    """Changes with every move of the tensors and every write to them (but not through `.data` or in inference mode)."""
    return tuple((w.device, w.dtype, w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)


_RESNET = "its vision tower is a ResNet: it has no blocks of self-attention between patch tokens"
_TIMM = "its vision tower comes from timm, and only open_clip's native ViT towers are read so far"
_POOL = "its vision tower pools by attention, and only class-token and average pooling are read so far"
_BLOCK = "its blocks are not open_clip's plain ResidualAttentionBlock, without wrappers or hooks on their attention"


_TRANSFORMERS = "its text tower needs the package transformers, which is not installed"


def obstacle(name: str) -> str | None:
    """Why open_clip's architecture `name` cannot be read here, judged by its configuration; None if it can."""
    config = open_clip.get_model_config(name)
    assert config is not None
    vision, text = config["vision_cfg"], config["text_cfg"]
    obstacles = {
        _TIMM: bool(vision.get("timm_model_name")),
        _RESNET: isinstance(vision.get("layers"), list),
        _POOL: bool(vision.get("attentional_pool")),
        _TRANSFORMERS: bool(text.get("hf_model_name")) and find_spec("transformers") is None,
    }
    return next((reason for reason, there in obstacles.items() if there), None)


def catalogue() -> list[tuple[str, str, str | None]]:
    """Every (name, tag) of open_clip's pretrained models, with what is in the way of reading it, or None."""
    pairs = open_clip.list_pretrained()
    obstacles = {name: obstacle(name) for name in {name for name, _ in pairs}}
    return [(name, tag, obstacles[name]) for name, tag in pairs]


def _readable_tower(model: Any) -> Any:
    """The model's vision tower. Raises UnsupportedModelError with the reason where it cannot be read."""
    visual = getattr(model, "visual", None)
    tower = type(visual).__name__
    if type(visual) is not VisionTransformer:
        other = f"its vision tower is a {tower}, and only open_clip's native ViT towers are read so far"
        known = {"NoneType": "it has no vision tower (`model.visual`)", "ModifiedResNet": _RESNET, "TimmModel": _TIMM}
        reason = known.get(tower, other)
    elif visual.attn_pool is not None:
        reason = _POOL
    elif not all(_is_plain(block) for block in visual.transformer.resblocks):
        reason = _BLOCK
    else:
        if any(module.training for module in visual.modules()):
            raise InputError("the model is in training mode; call model.eval() before adapting it")
        return visual
    raise UnsupportedModelError(f"cannot read {type(model).__name__}: {reason}")


def _is_plain(block: torch.nn.Module) -> bool:
    """True where reading the weights past the modules computes what the modules would."""
    if type(block) is not ResidualAttentionBlock or type(block.attn) is not torch.nn.MultiheadAttention:
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in (block.attn, block.attn.out_proj))


def _read_block(block: ResidualAttentionBlock) -> Block:
    """The block as functions that look its weights up when called, so a model that is moved or tuned stays current."""
    attn = block.attn

    def qkv(normed: Tensor) -> Heads:
        packed = linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return Heads(q, k, v)

    def out(mixed: Tensor) -> Tensor:
        return block.ls_1(linear(mixed.transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias))

    return Block(norm=block.ln_1, qkv=qkv, out=out, mlp=lambda x: block.ls_2(block.mlp(block.ln_2(x))), forward=block)


def _preprocess(visual: Any) -> Preprocess:
    """What the checkpoint's own configuration says; open_clip attaches it to the tower."""
    config = {**open_clip.transform.PreprocessCfg().__dict__, **getattr(visual, "preprocess_cfg", {})}
    return Preprocess(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bicubic" if config["interpolation"] == "random" else config["interpolation"],
        image_size=Size(*visual.image_size),
    )


# Loading --------------------------------------------------------------------------------------------------------------


def load(
    name: str, pretrained: str | None = None, *, device: str | torch.device = "cpu", cache_dir: str | None = None
) -> OpenClipBackbone:
    """Load `name` with open_clip's names and tags, "hf-hub:org/repo", or "local-dir:folder"; always with its weights.

    `pretrained` may also be a checkpoint file; which activation it was trained with only its name can say then
    ("ViT-B-16-quickgelu" for OpenAI's).

    Raises UnknownModelError (no such name or tag), WeightsError (weights missing, unreachable or not fitting),
    UnsupportedModelError (a tower that cannot be read; for built-in names before anything is downloaded).
    """
    config = configuration(name, pretrained)
    label = name if pretrained is None else f"{name}, {pretrained}"
    try:
        with _quiet():
            model = open_clip.create_model(**config, device=device, cache_dir=cache_dir, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(config["model_name"], cache_dir=cache_dir)
    except Exception as error:  # whatever a hub, a file system or a state dict can throw
        raise WeightsError(f"cannot load {label}: {_first_line(error)}. {_WEIGHTS_ADVICE}") from error
    return OpenClipBackbone(model.eval(), tokenizer, name=label, recommended=_recommended(name))


_WEIGHTS_ADVICE = (
    "Weights are kept in the Hugging Face cache (HF_HOME; `cache_dir` chooses another). Without network, put a "
    'checkpoint with its open_clip_config.json in a folder and load "local-dir:FOLDER", or load "embedded", which '
    "needs no download"
)


def configuration(name: str, pretrained: str | None) -> dict[str, Any]:
    """The arguments for `open_clip.create_model`, checked: names, tags, and the activation that goes with the tag.

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

    architecture = name.replace("/", "-")
    if architecture not in open_clip.list_models():
        close = get_close_matches(architecture, open_clip.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise UnknownModelError(
            f'unknown model {name!r}; {hint}expected "embedded", a name of `open-gem models --all`, '
            '"hf-hub:org/repo" or "local-dir:folder"'
        )
    if reason := obstacle(architecture):
        raise UnsupportedModelError(f"cannot read {name}: {reason}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None:
        raise UnknownModelError(f"{name!r} needs a pretrained tag; known: {', '.join(tags) or 'none'}")
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)  # before files: one may be called like a tag
    if not tag and Path(pretrained).is_file():
        return {"model_name": architecture, "pretrained": pretrained}
    if not tag:
        raise UnknownModelError(f"unknown tag {pretrained!r} for {name!r}; known: {', '.join(tags) or 'none'}")
    return {
        "model_name": architecture,
        "pretrained": pretrained,
        "force_quick_gelu": bool(tag.get("quick_gelu", False)),
    }


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise WeightsError(f"no such folder: {folder}")
    if not (folder / "open_clip_config.json").is_file():
        raise WeightsError(f"{folder} has no open_clip_config.json, which says what model it holds")


def _recommended(name: str) -> Recommended:
    """What a local checkpoint's own configuration recommends, in an "open_gem" section that open_clip does not read."""
    if not name.startswith("local-dir:"):
        return Recommended()
    config = json.loads((Path(name.removeprefix("local-dir:")) / "open_clip_config.json").read_text("utf-8"))
    given, known = config.get("open_gem", {}), {field.name for field in fields(Recommended)}
    if not given.keys() <= known:
        unknown = ", ".join(sorted(given.keys() - known))
        raise WeightsError(f"{name} recommends {unknown}, which nothing here knows; known: {', '.join(sorted(known))}")
    return Recommended(**given)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


_QUIET = Lock()  # logging and warning filters belong to the whole process


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip and the hub: what they log the error raised next says better, and open_clip's doubts about
    QuickGELU have been dealt with (see `configuration`). Progress bars of downloads are shown."""
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="QuickGELU mismatch")
        disabled, handlers = logging.root.manager.disable, list(logging.root.handlers)
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
            logging.root.handlers[:] = handlers  # `logging.info`, as open_clip calls it, installs one
