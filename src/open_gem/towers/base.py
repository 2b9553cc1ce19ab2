"""The interface between a pretrained vision-language model and everything open_gem does with it.

    Backbone = VisionTower + TextTower + what the checkpoint says about its images

A tower reads one kind of vision transformer of one library, in a file of its own. Nothing here changes the model:
weights are looked up when they are used, so a model that is moved, cast or tuned stays current.
"""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from open_gem.errors import InputError
from open_gem.images.pixels import Preprocess
from open_gem.method.tower import VisionTower
from open_gem.numerics import Lock, check_finite_number, cpu_by_default, without_autocast
from open_gem.tensors import at_least_float32, version
from open_gem.text import FrozenModel
from open_gem.types import Grid, Size

T = TypeVar("T")


@dataclass(frozen=True)
class Recommended:
    """Settings that a checkpoint's own configuration may recommend.

    size               a size rule, see `images.pixels.SIZE_RULES`
    temperature_scale  multiplies the adaptive temperature of methods asked for by name
    """

    size: str = "short:448"
    temperature_scale: float = 1.0


class ModuleTower(VisionTower):
    """A vision tower read from a library's module.

    reads       full names of the library's classes that this class reads
    resampling  how position embeddings are resized to other grids, for people
    module      the library's
    trained     size in pixels that it was trained at
    """

    reads: ClassVar[tuple[str, ...]]
    resampling: ClassVar[str]

    module: Any
    trained: Size

    def __init__(self, module: Any):
        self.module = module
        self._positions: GridCache[Tensor] = GridCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)  # a copy reads the module anew: blocks are functions over it

    @classmethod
    @abstractmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """Return why this `module`, of a class that is read, is not supported; None if it is."""

    @property
    @abstractmethod
    def patch_weight(self) -> Tensor:
        """The weight of the patch embedding: its device and type are those of the tower."""

    @property
    @abstractmethod
    def trained_positions(self) -> Tensor:
        """The position embeddings as trained."""

    @abstractmethod
    def resample_positions(self, grid: Grid) -> Tensor:
        """Resample position embeddings for `grid` as the library itself does; unchanged on the trained grid."""

    @abstractmethod
    def embed_patches(self, pixels: Float[Tensor, "b 3 y x"], grid: Grid) -> Float[Tensor, "b n d"]:
        """Embed checked pixels `(b, 3, y, x)`: the tokens `(b, n, d)` that enter the first block."""

    @abstractmethod
    def library_forward(self, pixels: Float[Tensor, "b 3 y x"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b e"]]:
        """Run the library's own forward, for checks: tokens `(b, n, d)` after the last block, and the pooled embedding
        `(b, e)`. Positions are resized for `pixels` in the library's own way, on a copy if that changes the module."""

    def embed(self, pixels: Float[Tensor, "b 3 y x"]) -> tuple[Float[Tensor, "b n d"], Grid]:
        grid = grid_of(pixels, self.patch)
        return self.embed_patches(pixels.to(self.patch_weight.device, self.patch_weight.dtype), grid), grid

    def positions(self, grid: Grid) -> Tensor:
        """Return position embeddings for `grid`, cached until the weights change."""
        return self._positions(grid, version([self.trained_positions]), self.resample_positions)


@dataclass(eq=False, repr=False)
class Backbone(FrozenModel):
    """A frozen vision-language transformer: a `VisionTower` and a `TextTower`.

    vision       the vision tower
    preprocess   how pixels are normalised, from the checkpoint's own configuration
    recommended  from there too
    caution      what the model is not for, in one line; None if there is nothing to say
    """

    vision: ModuleTower
    preprocess: Preprocess
    recommended: Recommended = Recommended()
    caution: str | None = None

    @property
    def device(self) -> torch.device:
        return self.vision.patch_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vision.patch_weight.dtype

    @property
    def logit_scale(self) -> float:
        """The factor of cosines before a softmax over prompts (about 100 for CLIP)."""
        return check_finite_number("logit scale", self, self.text.logit_scale)

    @property
    def logit_bias(self) -> float | None:
        """The bias of scaled cosines before the sigmoid of a model that was trained with one; None for others."""
        bias = self.text.logit_bias
        return None if bias is None else check_finite_number("logit bias", self, bias)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "p e"]:
        """Encode texts: embeddings `(p, e)` of unit norm, float32 at least; at least one text. Raises
        NotFiniteError."""
        return normalize(at_least_float32(super().encode_text(texts)), dim=-1)


# What towers share ----------------------------------------------------------------------------------------------------


def grid_of(pixels: Tensor, patch: tuple[int, int]) -> Grid:
    """Return the patch grid of `pixels` `(b, 3, y, x)`. Raises InputError for other tensors, and for parts of
    patches."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise InputError(f"pixels have shape {tuple(pixels.shape)}, expected (images, 3, height, width)")
    if not pixels.is_floating_point():
        raise InputError(f"pixels are {pixels.dtype}, expected floats, normalised as `Localizer.prepare` gives them")
    (height, width), (rows, cols) = pixels.shape[-2:], patch
    if height % rows or width % cols or not height or not width:
        raise InputError(
            f"pixels are {height}×{width} (height × width), expected whole multiples of the {rows}×{cols} patch"
        )
    return Grid(height // rows, width // cols)


class GridCache(Generic[T]):
    """A cache of values made from weights for the last few grids; may be shared between threads.

    It keeps no reference to its maker, so a tower is freed with its last user. A copy begins empty.
    """

    def __init__(self, capacity: int = 16):
        self.capacity = capacity
        self._cache: OrderedDict[Grid, tuple[Hashable, T]] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.capacity,)

    def __call__(self, grid: Grid, version: Hashable, make: Callable[[Grid], T]) -> T:
        """Return the value of `make(grid)`, made again if the weights have another `version`."""
        with self._lock:
            cached = self._cache.get(grid)
            if cached is not None and cached[0] == version:
                self._cache.move_to_end(grid)
                return cached[1]
            # Cached values serve other callers, which may need gradients, or no autocast.
            with torch.inference_mode(False), torch.no_grad(), cpu_by_default(), without_autocast():
                value = make(grid)
            self._cache[grid] = version, value
            while len(self._cache) > self.capacity:
                self._cache.popitem(last=False)
            return value


def off_mps(weights: Tensor) -> Tensor:
    """Return the weights, on the CPU if they are on Apple's GPU: not every torch can resample with antialias there."""
    return weights.cpu() if weights.device.type == "mps" else weights


def check_evaluating(module: nn.Module) -> None:
    """Raise InputError if a model is in training mode."""
    if any(part.training for part in module.modules()):
        raise InputError("the model is in training mode; call model.eval() before adapting it")


def split_heads(tokens: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b h n c"]:
    """Split heads: `(b, n, h·c)` → `(b, h, n, c)`."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(mixed: Float[Tensor, "b h n c"]) -> Float[Tensor, "b n d"]:
    """Join heads: `(b, h, n, c)` → `(b, n, h·c)`."""
    return mixed.transpose(1, 2).flatten(2)


def has_hooks(*modules: nn.Module) -> bool:
    """Return True if a module has forward hooks, which do not run when its weights are read directly."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@torch.no_grad()
def watch(block: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the output of `block` while `forward` runs, and the result of `forward`."""
    seen: list[Any] = []
    handle = block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        result = forward()
    finally:
        handle.remove()
    tokens = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
    return tokens, result
