"""Experts: frozen vision-only backbones (DINO, DINOv2, DINOv3) whose patch tokens say which patches belong together.

    expert = load_expert("facebook/dino-vitb8")
    method = proxyclip(guide(expert, backbone))  # the attention of the host's last block, taken from the expert

An expert sees the host's image in about the same pixels; the host's values are resized to its grid. Nothing here
changes a model, and no code of a checkpoint is run.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from open_gem.checks import close_names
from open_gem.errors import InputError, OpenGemError, UnknownModelError, UnsupportedModelError, WeightsError
from open_gem.numerics import check_finite, cpu_by_default
from open_gem.tensors import at_least_float32, check_has_numbers
from open_gem.towers.base import Backbone, check_evaluating, off_mps
from open_gem.towers.weights import finished, hub_or_cache, in_float32, needs_transformers, quiet, reason_of
from open_gem.types import Grid, Size

Color = tuple[float, float, float]  # red, green, blue


@dataclass(eq=False, repr=False)
class Expert:
    """A frozen vision transformer without a text half.

    name       for people
    model      the library's own
    patch      rows and columns of a patch, in pixels
    prefix     number of tokens before the patches ([CLS], registers)
    mean, std  of its images in [0, 1]
    forward    model, normalised pixels `(b, 3, y, x)` → all tokens `(b, n, e)` after the last block and the final norm
    attended   model, the same pixels → what the last block's q, k and v are made of, `(b, n, e)` each, at least patches
    """

    name: str
    model: Any
    patch: tuple[int, int]
    prefix: int
    mean: Color
    std: Color
    forward: Callable[[Any, Tensor], Tensor]
    attended: "Callable[[Any, Tensor], Projections]"

    def __repr__(self) -> str:
        return f"Expert({self.name!r})"

    def grid_for(self, size: Size) -> Grid:
        """Return the grid whose patches come nearest to an image of `size`: each side rounded (halves up), at least
        1."""
        return Grid(*(max(1, (2 * side + patch) // (2 * patch)) for side, patch in zip(size, self.patch, strict=True)))

    @torch.no_grad()
    @cpu_by_default()
    def tokens(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Encode pixels `(b, 3, y, x)` in [0, 1], of any size and float type: patch tokens `(b, r·k, e)`, not
        normalised.

        An image of another size is resized to `grid` patches: bicubic with antialias, clipped to [0, 1]. Tokens have
        the type and device of the weights. Raises InputError for other pixels, and NotFiniteError for tokens that are
        infinite or not a number.
        """
        tokens = self.forward(self.model, self._images(pixels, grid))[:, self.prefix :]
        check_finite("tokens", self, tokens)
        return tokens

    @torch.no_grad()
    @cpu_by_default()
    def projections(self, pixels: Tensor, grid: Grid) -> "Projections":
        """Return q, k and v of the last block's attention, all heads side by side and before any rotation by position,
        of patches alone: `(b, r·k, e)` each. Pixels and errors as of `tokens`."""
        q, k, v = (part[:, -grid.patches :] for part in self.attended(self.model, self._images(pixels, grid)))
        check_finite("projections", self, q, k, v)
        return q, k, v

    def _images(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Return the pixels as the model takes them."""
        _check_pixels(pixels)
        weights = next(self.model.parameters())
        size = tuple(side * patch for side, patch in zip(grid, self.patch, strict=True))
        images = at_least_float32(pixels)
        if images.shape[-2:] != size:
            images = interpolate(off_mps(images), size=size, mode="bicubic", antialias=True).clamp(0, 1)
        images = (images - _column(self.mean, images)) / _column(self.std, images)
        return images.to(weights.device, weights.dtype)


def _column(color: Color, pixels: Tensor) -> Tensor:
    return pixels.new_tensor(color)[:, None, None]


def _check_pixels(pixels: Tensor) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
        raise InputError(f"pixels have shape {tuple(pixels.shape)}, expected (images, 3, height, width)")
    if not pixels.is_floating_point():
        raise InputError(f"pixels are {pixels.dtype}, expected floats in [0, 1]")
    low, high = (bound.item() for bound in pixels.aminmax())
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"pixels range from {low:.3g} to {high:.3g}, expected [0, 1]: an expert normalises them itself"
        )


# Beside a host --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertGuide:
    """An expert that sees what a host sees: a `Guide`.

    expert     see `load_expert`
    mean, std  of the *host's* preprocessing: its pixels are turned back to [0, 1] by them
    """

    expert: Expert
    mean: Color
    std: Color

    def grid_for(self, size: Size) -> Grid:
        return self.expert.grid_for(size)

    def tokens(self, pixels: Tensor) -> Tensor:
        return self.expert.tokens(self._plain(pixels), self._grid(pixels))

    def projections(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.expert.projections(self._plain(pixels), self._grid(pixels))

    def _grid(self, pixels: Tensor) -> Grid:
        return self.grid_for(Size(*pixels.shape[-2:]))

    def _plain(self, pixels: Tensor) -> Tensor:
        pixels = at_least_float32(pixels)
        return (pixels * _column(self.std, pixels) + _column(self.mean, pixels)).clamp(0, 1)


def guide(expert: Expert, backbone: Backbone) -> ExpertGuide:
    """Let the expert see the pixels of `backbone`."""
    return ExpertGuide(expert, backbone.preprocess.mean, backbone.preprocess.std)


# What is read ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertSpec:
    """One kind of expert in transformers.

    model         name of its class
    without_head  arguments that make it without a pooling head
    any_size      arguments of its forward that accept images of any size
    """

    model: str
    without_head: Mapping[str, Any] = field(default_factory=dict)
    any_size: Mapping[str, Any] = field(default_factory=dict)


EXPERTS = {
    "vit": ExpertSpec("ViTModel", {"add_pooling_layer": False}, {"interpolate_pos_encoding": True}),  # DINO
    "dinov2": ExpertSpec("Dinov2Model"),
    "dinov2_with_registers": ExpertSpec("Dinov2WithRegistersModel"),
    "dinov3_vit": ExpertSpec("DINOv3ViTModel"),
}
"""`model_type` of a configuration of transformers → its kind."""

TIMM = {"vision_transformer": "VisionTransformer", "eva": "Eva"}
"""Modules of timm whose models are read → their class."""

_READ = f"{', '.join(kind.model for kind in EXPERTS.values())} of transformers, {' and '.join(TIMM.values())} of timm"


def _of_transformers(model: Any, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels, **EXPERTS[model.config.model_type].any_size).last_hidden_state


def _of_timm(model: Any, pixels: Tensor) -> Tensor:
    return model.fc_norm(model.forward_features(pixels))  # the only final norm of models that have it


def _attended_in_transformers(model: Any, pixels: Tensor) -> "Projections":
    more = EXPERTS[model.config.model_type].any_size
    before = model(pixel_values=pixels, output_hidden_states=True, **more).hidden_states[-2]
    last = [module for module in model.modules() if hasattr(module, "attention")][-1]
    normed = (last.layernorm_before if hasattr(last, "layernorm_before") else last.norm1)(before)
    attention = last.attention
    return attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)


def _attended_in_timm(model: Any, pixels: Tensor) -> "Projections":
    settings = {"norm": False, "output_fmt": "NLC", "intermediates_only": True}
    before = model.forward_intermediates(pixels, indices=[len(model.blocks) - 2], **settings)[0]
    last = model.blocks[-1]
    normed, attention = last.norm1(before), last.attn
    if attention.qkv is None:
        return attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    bias = attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:  # EVA's keys have none
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    q, k, v = linear(normed, attention.qkv.weight, bias).chunk(3, dim=-1)
    return q, k, v


def adapt_expert(model: nn.Module, mean: Sequence[float], std: Sequence[float], *, name: str | None = None) -> Expert:
    """Make an expert of a model in memory, of transformers or timm, which it never changes.

    `mean` and `std` normalise its images in [0, 1]: one number a channel (red, green, blue).

    Raises UnsupportedModelError if it cannot be read, InputError in training mode, on the device "meta", or for
    statistics that are not three numbers.
    """
    mean, std = _color("mean", mean), _color("std", std)
    if min(std) <= 0:
        raise InputError(f"std is {std}, expected numbers above 0")
    for library, read in (("transformers", _read_transformers), ("timm", _read_timm)):
        if any(kind.__module__.startswith(f"{library}.") for kind in type(model).__mro__):
            patch, prefix, channels, forward, attended = read(model)
            check_evaluating(model)
            check_has_numbers(model)
            if channels != 3:
                raise UnsupportedModelError(f"cannot read {type(model).__name__}: it takes {channels} channels, not 3")
            return Expert(name or type(model).__name__, model, patch, prefix, mean, std, forward, attended)
    raise UnsupportedModelError(f"cannot read {type(model).__name__}: it is none of {_READ}")


Projections = tuple[Tensor, Tensor, Tensor]  # q, k and v
_Anatomy = tuple[  # patch, prefix, channels and the two functions
    tuple[int, int], int, int, Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Projections]
]


def _read_transformers(model: Any) -> _Anatomy:
    config: Any = getattr(model, "config", None)
    kind = EXPERTS.get(getattr(config, "model_type", ""))
    if kind is None or kind.model not in (base.__name__ for base in type(model).__mro__):
        raise UnsupportedModelError(f"cannot read {type(model).__name__}: it is none of {_READ}")
    patch: Any = config.patch_size
    rows, cols = patch if isinstance(patch, Sequence) else (patch, patch)
    return (
        (rows, cols),
        1 + getattr(config, "num_register_tokens", 0),
        config.num_channels,
        _of_transformers,
        (_attended_in_transformers),
    )


def _read_timm(model: Any) -> _Anatomy:
    name = type(model).__name__
    if not any(base.__name__ in TIMM.values() for base in type(model).__mro__):
        raise UnsupportedModelError(f"cannot read {name}: it is none of {_READ}")
    embed: Any = model.patch_embed
    if not isinstance(embed, PatchEmbed):
        raise UnsupportedModelError(f"cannot read {name}: its patches come from a {type(embed).__name__}")
    if not model.dynamic_img_size:
        raise UnsupportedModelError(
            f"cannot read {name}: it takes images of one size; make it with dynamic_img_size=True"
        )
    patch: Any = embed.patch_size
    return (patch[0], patch[1]), model.num_prefix_tokens, embed.proj.in_channels, _of_timm, _attended_in_timm


def _color(name: str, values: Sequence[float]) -> Color:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {values!r}, expected three numbers: red, green, blue") from error
    return red, green, blue


# Loading --------------------------------------------------------------------------------------------------------------


def load_expert(
    name: str | PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    cache_dir: str | None = None,
) -> Expert:
    """Load an expert with its weights.

    name       a repository of transformers whose `model_type` is a key of `EXPERTS` ("facebook/dino-vitb8",
               "facebook/dinov2-with-registers-base"), or a folder of that kind; "timm:" before a name of timm
               ("timm:vit_base_patch16_dinov3.lvd1689m") or before a folder as timm saves them
    device     "auto" takes CUDA, then Apple's MPS, then the CPU
    dtype      "auto" or a key of `towers.DTYPES`: what the weights are cast to
    cache_dir  where downloaded weights are kept, by default the Hugging Face cache

    Never returns a model with random weights, and runs no code of a checkpoint. Raises UnknownModelError (no such
    name), WeightsError (weights missing, unreachable, not fitting, or no statistics of images with them),
    UnsupportedModelError (a model that cannot be read; judged before its weights are downloaded), and InputError for
    the device and type.
    """
    from open_gem.towers.loading import find_device, find_dtype

    name, device = fspath(name), find_device(device)
    dtype = find_dtype(dtype, device)
    if name.startswith("timm:"):
        return _load_timm(name, device, dtype, cache_dir)
    return _load_transformers(name, device, dtype, cache_dir)


def _load_transformers(name: str, device: torch.device, dtype: torch.dtype, cache_dir: str | None) -> Expert:
    try:
        import transformers

        from open_gem.towers import hub as _hub
    except ImportError as error:
        raise UnsupportedModelError(needs_transformers(error)) from error

    location = _location(name)
    config = _hub.configuration(location, cache_dir)
    if config.model_type not in EXPERTS:
        raise UnsupportedModelError(
            f"cannot read {name}: models of type {config.model_type!r} are not read, only {', '.join(EXPERTS)}"
        )
    kind = EXPERTS[config.model_type]
    mean, std = _statistics(name, _hub.image_settings(location, cache_dir))
    model = _hub.fetch(getattr(transformers, kind.model), location, cache_dir=cache_dir, **kind.without_head)
    exact = {at: buffer.clone() for at, buffer in model.named_buffers() if buffer.is_floating_point()}
    finished(model, device, dtype)
    for at, buffer in exact.items():  # the frequencies of rotary positions, which the library keeps in float32
        model.get_buffer(at).data = buffer.to(device)
    return adapt_expert(model, mean, std, name=name)


def _location(name: str) -> str:
    """Return the repository or folder, for `hub`. Raises UnknownModelError for anything else."""
    if folder := _folder(name):
        return folder
    if "/" not in name:
        raise UnknownModelError(
            f'unknown expert {name!r}, expected "org/repo" of transformers (facebook/dino-vitb8), a folder, or '
            '"timm:NAME" (timm:vit_base_patch8_224.dino)'
        )
    return name


def _folder(name: str) -> str | None:
    """Return "local-dir:" and the path for the path of a folder, else None. Raises WeightsError for a missing
    folder."""
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if name and folder.is_dir():
        return f"local-dir:{folder}"
    if name.startswith(("local-dir:", "./", "../", "/", "~")):
        raise WeightsError(f"no such folder: {folder}")
    return None


def _statistics(name: str, settings: Mapping[str, Any]) -> tuple[Color, Color]:
    """Return mean and std, from a preprocessor_config.json."""
    if not settings.get("do_rescale", True) or abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UnsupportedModelError(f"cannot read {name}: its images are not scaled to [0, 1]")
    if not settings.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is None or std is None:
        raise WeightsError(
            f"cannot load {name}: its preprocessor_config.json lacks image_mean or image_std; read the model with "
            "transformers and pass them: adapt_expert(model, mean, std)"
        )
    return _color("image_mean", mean), _color("image_std", std)


def _load_timm(name: str, device: torch.device, dtype: torch.dtype, cache_dir: str | None) -> Expert:
    inner = name.removeprefix("timm:")
    try:
        location = inner if _is_of_timm(inner) else _folder(inner)
        if location is None:
            close = close_names(inner, timm.list_models(module=list(TIMM), pretrained=True))
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise UnknownModelError(f"timm has no model called {inner!r}{hint}")
        _check_timm(name, location)
        settings: dict[str, Any] = {"pretrained": True, "cache_dir": cache_dir, "num_classes": 0}
        with quiet(), nullcontext() if location.startswith("local-dir:") else hub_or_cache(name, cache_dir):
            model: Any = in_float32(lambda: timm.create_model(location, dynamic_img_size=True, **settings))
    except OpenGemError:
        raise
    except Exception as error:  # anything that a hub, a file system or a state dict can raise
        raise WeightsError(f"cannot load {name}: {reason_of(error)}") from error
    trained = model.pretrained_cfg
    return adapt_expert(finished(model, device, dtype), trained["mean"], trained["std"], name=name)


def _is_of_timm(name: str, read: bool = False) -> bool:
    """Return True for a name of timm, with or without a tag; with `read`, only if it can be read."""
    return name.partition(".")[0] in timm.list_models(module=list(TIMM) if read else "")


def _check_timm(name: str, location: str) -> None:
    """Raise UnsupportedModelError if `location`, a name of timm or a folder, holds a model that is not read, and
    UnknownModelError if timm has no such weights."""
    in_folder = location.startswith("local-dir:")
    architecture = location
    if in_folder:
        config = json.loads((Path(location.removeprefix("local-dir:")) / "config.json").read_text("utf-8"))
        architecture = str(config.get("architecture"))
    if not _is_of_timm(architecture, read=True):
        raise UnsupportedModelError(f"cannot read {name}: {architecture} is none of {_READ}")
    if not in_folder and not timm.is_model_pretrained(location):
        tags = timm.list_models(f"{architecture.partition('.')[0]}.*", pretrained=True)
        raise UnknownModelError(f"timm has no weights called {location!r}; known: {', '.join(tags) or 'none'}")
