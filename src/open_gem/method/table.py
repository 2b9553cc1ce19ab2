"""The training-free methods of the field: ways for one block to mix values, and the table of known methods.

A method is a value. What it does inside a block is its `attention`: a small frozen dataclass with settings of its own
(`SelfSelf`, `KMeans`, `CrossBlock`), or a plain function over q, k and v (`Plain`). To add a method: that function or
class, and a row of `METHODS`. An ablation is `METHODS["gem"].replace(iterations=2)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from open_gem.checks import did_you_mean, is_count, is_positive, require
from open_gem.errors import MethodError
from open_gem.method import attention
from open_gem.method.attention import Heads, to_unit
from open_gem.method.calibration import aggregate, attend_by_direction, correlate, outliers, repair
from open_gem.method.kmeans import means, spherical_kmeans
from open_gem.method.steps import Scga, Step, settings_of
from open_gem.method.tower import Block, Guide
from open_gem.tensors import at_least_float32
from open_gem.types import Grid, Size

A = TypeVar("A", bound="Attention")


# Settings -------------------------------------------------------------------------------------------------------------


def _names(value: Any) -> set[str]:
    return {setting.name for setting in fields(value)}


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_selection(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) == len(set(value) & set("qkv"))


def _is_temperature(value: Any) -> bool:
    return value in ("adaptive", "trained") if isinstance(value, str) else is_positive(value)


# Attention variants ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockContext:
    """What an attention variant may read in addition to q, k and v: one block of the host, one batch of images.

    normed    ln_1 of the host's stream, `(b, n, d)`
    pixels    the host's input, `(b, 3, y, x)`, normalised as its checkpoint wants it
    grid      of the patches
    prefix    number of tokens before them
    layers    number of blocks of the host
    borrowed  q, k and v of the earlier blocks that some method borrows from: see `Attention.borrows`
    taps      the host's stream after the earlier blocks that some method reads, by their numbers from 1, `(b, n, d)`:
              see `Attention.taps`; number 0 is the embedded image
    blocks    of the host, all of them
    regions   the number of each pixel's class-agnostic mask, 0 for none, `(b, y, x)`, if they are known
    """

    normed: Float[Tensor, "b n d"]
    pixels: Float[Tensor, "b 3 y x"]
    grid: Grid
    prefix: int
    layers: int
    borrowed: Mapping[int, Heads]
    taps: Mapping[Hashable, Float[Tensor, "b n d"]] = field(default_factory=dict)
    blocks: Sequence[Block] = ()
    regions: Int[Tensor, "b y x"] | None = None
    _cache: dict[Hashable, Tensor] = field(default_factory=dict)

    def cached(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return the result of `compute`, computed once in this block for each `key`, for all methods."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def known(self, key: Hashable) -> Tensor | None:
        """Return the cached value for `key`, if some method has computed it already."""
        return self._cache.get(key)


class TokenGrid(NamedTuple):
    """The layout of tokens: patches on `grid`, row by row, after `prefix` other tokens."""

    grid: Grid
    prefix: int


@dataclass(frozen=True)
class Attention(ABC):
    """One way for a block to mix its values: q, k, v `(b, h, n, c)` → mixed values `(b, h, n, c)`.

    A variant is a frozen dataclass: its fields are its settings, equal values are computed once, and `METHODS` may hold
    it. The other hooks have defaults that fit most variants.
    """

    @abstractmethod
    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h n c"]:
        """Return the mixed values `(b, h, n, c)`."""

    def borrows(self, layers: int) -> range:
        """Return the earlier blocks, of a host that has `layers`, whose q, k and v `BlockContext.borrowed` must
        hold."""
        return range(0)

    def taps(self, layers: int) -> range:
        """Return the earlier blocks, by their numbers from 1, after which `BlockContext.taps` must hold the host's
        stream."""
        return range(0)

    def update(self, block: Block, heads: Heads, context: BlockContext) -> Float[Tensor, "b n d"]:
        """Return what the block adds to the method's stream: the mixed values through its output projection."""
        return block.out(self(heads, context))

    def merge(self, features: Float[Tensor, "b n e"], count: int) -> Float[Tensor, "b m e"]:
        """Return the `count` features of this method from its stream in the joint space: the stream's own, unless
        `update` gives several streams one after another."""
        return features

    @property
    def stands_alone(self) -> bool:
        """True if this variant replaces the last block and so has no stream to add to: depth 1, no residual."""
        return False

    def layout(self, size: Size) -> TokenGrid | None:
        """Return the grid that mixed values lie on, for pixels of `size`; None for the host's own."""
        return None

    def rescaled(self: A, factor: float) -> A:
        """Return the variant with its *adaptive* temperature multiplied by `factor`; others as they are."""
        return self

    @property
    def order(self) -> int:
        """Position in a block: attentions with higher ones come later, so that they can reuse what others have
        computed."""
        return 0

    @property
    def is_adaptive(self) -> bool:
        """True if the temperature follows the image (section 4.1)."""
        return False

    def describe(self) -> dict[str, Any]:
        """Return the variant's name and its settings, as values that JSON can hold."""
        return {"attention": type(self).__name__, **settings_of(self)}


@dataclass(frozen=True)
class Plain(Attention):
    """An attention without settings: a function of q, k and v."""

    function: Callable[[Heads], Tensor]

    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h n c"]:
        return self.function(heads)

    def describe(self) -> dict[str, Any]:
        return {"attention": getattr(self.function, "__name__", type(self.function).__name__)}


QUERY_KEY = Plain(attention.query_key)
IDENTITY = Plain(attention.identity)


@dataclass(frozen=True, kw_only=True)
class Tempered(Attention):
    """What attention variants with a temperature share.

    normalize          L2-normalise each projected token per head (section 4.1)
    temperature        τ of eq. 5: a positive number, "adaptive" (section 4.1), "trained" (√head width)
    temperature_scale  multiplies τ (Fig. 5); above 0, smaller is sharper
    """

    normalize: bool = True
    temperature: float | str = "adaptive"
    temperature_scale: float = 1.0

    def __post_init__(self) -> None:
        require(self, "normalize", _is_bool, "True or False")
        require(self, "temperature", _is_temperature, "a number above 0, 'adaptive' or 'trained'")
        require(self, "temperature_scale", is_positive, "a number above 0")

    @property
    def is_adaptive(self) -> bool:
        return self.temperature == "adaptive"

    def inverse_temperature(self, heads: Heads, context: BlockContext) -> Tensor | float:
        """Return 1/τ: a number, or one an image, `(b, 1, 1, 1)`."""
        head_width = heads.q.shape[-1]
        match self.temperature:
            case "adaptive":
                inverse = attention.adaptive_inverse_temperature(context.normed, head_width)
            case "trained":
                inverse = head_width**-0.5
            case number:
                inverse = 1 / float(number)
        return inverse / self.temperature_scale

    def rescaled(self: "T", factor: float) -> "T":
        if not self.is_adaptive or factor == 1:
            return self
        return replace(self, temperature_scale=self.temperature_scale * factor)


T = TypeVar("T", bound=Tempered)


@dataclass(frozen=True, kw_only=True)
class SelfSelf(Tempered):
    """GEM and its kin (eqs. 2 to 6): each chosen projection attends to itself; the outcomes are averaged or added.

    projections  which of "q", "k", "v" (eq. 6)
    combine      "mean" over these projections (eq. 6), or "sum", as SCLIP and CLIPtrase have it
    iterations   K of eq. 3, at least 0
    gaussian     standard deviation, in patches, of a bias towards near patches (NACLIP), or None
    """

    projections: str = "qkv"
    combine: str = "mean"
    iterations: int = 1
    gaussian: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "projections", _is_selection, "a selection of 'qkv' without repetition")
        require(self, "combine", lambda combine: combine in ("mean", "sum"), "'mean' or 'sum'")
        require(self, "iterations", lambda number: is_count(number, 0), "a whole number, 0 or more")
        require(self, "gaussian", lambda std: std is None or is_positive(std), "a number of patches above 0, or None")

    @property
    def order(self) -> int:
        return len(self.projections)

    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h n c"]:
        mean = context.cached(self._key(self.projections), lambda: self._mean(heads, context))
        return mean * len(self.projections) if self.combine == "sum" else mean

    def _key(self, projections: str) -> Hashable:
        """Return what decides the mean over these projections, independent of subclass and `combine`."""
        temperature = self.temperature, self.temperature_scale
        return "self-self", projections, self.normalize, temperature, self.iterations, self.gaussian

    def _mean(self, heads: Heads, context: BlockContext) -> Tensor:
        single = [context.known(self._key(name)) for name in self.projections]
        if (parts := [part for part in single if part is not None]) and len(parts) == len(single):
            return sum(parts[1:], parts[0]) / len(parts)
        bias = None
        if self.gaussian is not None:
            std = float(self.gaussian)
            bias = context.cached(
                ("gaussian", std), lambda: attention.gaussian(context.grid, context.prefix, std).to(heads.v)
            )
        return attention.self_self(
            [getattr(heads, name) for name in self.projections],
            heads.v,
            self.inverse_temperature(heads, context),
            normalize=self.normalize,
            iterations=self.iterations,
            bias=bias,
        )


@dataclass(frozen=True, kw_only=True)
class KMeans(Tempered):
    """GEM-Kmeans (paper eq. 10, Fig. 6b): values attend to the centroids of their own clusters, softmax(v μᵀ/τ) μ.

    Spherical k-means for each image and head, over all tokens; μ are the means of the raw values. `normalize` and
    `temperature` hold for v μᵀ. The paper leaves distance, heads and τ open: see `docs/reference/methods.md`.

    clusters  K, 1 or more; with fewer tokens, each is its own cluster
    seed      of the k-means++ seeding, the same for every image
    max_iter  most steps of Lloyd's algorithm
    """

    clusters: int = 7
    seed: int = 0
    max_iter: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "clusters", lambda number: is_count(number, 1), "a whole number, 1 or more")
        require(self, "seed", lambda number: is_count(number, 0), "a whole number, 0 or more")
        require(self, "max_iter", lambda number: is_count(number, 1), "a whole number, 1 or more")

    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h n c"]:
        clusters = min(self.clusters, heads.v.shape[-2])
        labels = spherical_kmeans(heads.v, clusters, seed=self.seed, iterations=self.max_iter).labels
        centroids = means(heads.v, labels, clusters)
        inverse = self.inverse_temperature(heads, context)
        query, key = (to_unit(heads.v), to_unit(centroids)) if self.normalize else (heads.v, centroids)
        return attention.query_key(Heads(query * (inverse * query.shape[-1] ** 0.5), key, centroids))


@dataclass(frozen=True, kw_only=True)
class CrossBlock(SelfSelf):
    """ResCLIP's residual cross-correlation self-attention (RCS): gain · [(1 − share) A + share · mean of A_l] v.

    A is this variant's own self-self attention; A_l the attention that the host was trained with in its middle blocks,
    head by head, here applied to the values of this block. ResCLIP takes blocks 6 to 9 of 12, also of 24; here the
    same part of any depth. Its second pass (semantic feedback) needs labels and is not part of this.

    share  λ in [0, 1]: 0.3 with PascalVOC and Cityscapes, 0.4 with Pascal Context
    gain   τ, above 0: 2.0
    """

    share: float = 0.3
    gain: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "share", lambda share: is_positive(share) and share <= 1, "a number above 0, up to 1")
        require(self, "gain", is_positive, "a number above 0")

    def borrows(self, layers: int) -> range:
        return range(round(layers * 5 / 12), max(1, round(layers * 9 / 12)))

    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h n c"]:
        own = super().__call__(heads, context)
        middle = (context.borrowed[index] for index in self.borrows(context.layers))
        trained = [attention.query_key(block._replace(v=heads.v)) for block in middle]
        borrowed = sum(trained[1:], trained[0]) / len(trained)
        return self.gain * ((1 - self.share) * own + self.share * borrowed)


@dataclass(frozen=True, kw_only=True)
class Recursive(Attention):
    """RADSeg's self-correlating recursive attention (SCRA): softmax(scale · t tᵀ, negatives left out) v, per head.

    t is what the trained attention gives after the output projection, cut into heads again, of unit norm.

    scale  above 0; 10 as published
    """

    scale: float = 10.0

    def __post_init__(self) -> None:
        require(self, "scale", is_positive, "a number above 0")

    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h n c"]:
        """Return the first half: the attention that the model was trained with."""
        return attention.query_key(heads)

    def update(self, block: Block, heads: Heads, context: BlockContext) -> Float[Tensor, "b n d"]:
        tokens = block.out(self(heads, context)).unflatten(-1, (heads.v.shape[1], -1)).transpose(1, 2)
        values = at_least_float32(heads.v)
        return block.out(attend_by_direction(at_least_float32(tokens), values, self.scale).to(heads.v))


@dataclass(frozen=True, kw_only=True)
class SelfCalibrated(Attention):
    """SC-CLIP: the last block once more, on the host's stream with its outliers repaired and similar tokens averaged.

    Both halves of its result are out(½ [softmax(scale · (M − mean M)) + softmax(k kᵀ/√c)] v) + cls · [CLS], aggregated
    by the cosines of an early block. One is of the last block's own input, repaired and aggregated by M; the other of
    the sum of the intermediate streams. M holds the cosines of an intermediate block's repaired patches. Blocks are
    those of the published code for 12 blocks (9 for M, 4 for the early one, 4 to 10 for the sum), and the same part of
    any other depth. See `method.calibration`; a `Method` needs residual=False and depth=1 with it.

    neighbors  of the local outlier factor, 1 or more
    share      of patches that are outliers, in [0, 1)
    least      cosines below it have no weight where patches are aggregated
    scale      of M before its softmax, above 0
    cls        weight of the [CLS] token, 0 or more
    """

    neighbors: int = 30
    share: float = 0.05
    least: float = 0.4
    scale: float = 3.0
    cls: float = 0.3

    def __post_init__(self) -> None:
        require(self, "neighbors", lambda number: is_count(number, 1), "a whole number, 1 or more")
        require(self, "share", lambda share: share == 0 or (is_positive(share) and share < 1), "a number in [0, 1)")
        require(self, "least", lambda least: least == 0 or (is_positive(least) and least < 1), "a number in [0, 1)")
        require(self, "scale", is_positive, "a number above 0")
        require(self, "cls", lambda cls: cls == 0 or is_positive(cls), "a number, 0 or more")

    @property
    def stands_alone(self) -> bool:
        return True

    def taps(self, layers: int) -> range:
        if layers < 2:
            raise MethodError(
                f"SC-CLIP reads the block before the last, but the model has {layers}: use another method"
            )
        return range(_share_of(layers, 4), layers)

    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h n c"]:
        """Return ½ softmax(k kᵀ/√c) v: the half of the mix that needs no other block."""
        return attention.query_key(Heads(heads.k, heads.k, heads.v)) / 2

    def update(self, block: Block, heads: Heads, context: BlockContext) -> Float[Tensor, "b n d"]:
        last = context.taps[context.layers - 1]
        images = [self._update_image(block, context, index) for index in range(len(last))]
        return torch.cat([last[:, : context.prefix], torch.stack(images).to(last)], dim=1)

    def _update_image(self, block: Block, context: BlockContext, index: int) -> Float[Tensor, "n d"]:
        """Return the update of the patches `(r·k, d)` of one image: outliers and mean cosines are an image's own."""
        first, middle, end = (_share_of(context.layers, number) for number in (4, 9, 10))
        taps = {number: at_least_float32(tokens[index]) for number, tokens in context.taps.items()}
        patches = {number: tokens[context.prefix :] for number, tokens in taps.items()}
        last = context.layers - 1
        wrong = outliers(patches[last], self.neighbors, self.share)
        guide = repair(patches[middle], context.grid, wrong)
        calibrated = aggregate(repair(patches[last], context.grid, wrong), guide, self.least)
        summed = sum((taps[number] for number in range(first + 1, end + 1)), taps[first])
        parts = [
            self._attend(block, context, taps[last][: context.prefix], calibrated, guide),
            self._attend(block, context, summed[: context.prefix], summed[context.prefix :], guide),
        ]
        return sum(aggregate(part, patches[first], self.least) for part in parts)  # pyright: ignore[reportReturnType]

    def _attend(self, block: Block, context: BlockContext, prefix: Tensor, patches: Tensor, guide: Tensor) -> Tensor:
        """Return the calibrated attention over `patches`, with the share of [CLS], the first of the `prefix` tokens."""
        tokens = torch.cat([prefix, patches]).to(context.normed.dtype)[None]
        heads = Heads(*(part[:, :, context.prefix :] for part in block.qkv(block.norm(tokens))))
        values = at_least_float32(heads.v[0]).transpose(0, 1)  # (r·k, h, c)
        mixed = correlate(values.flatten(1), guide, self.scale).view_as(values).transpose(0, 1)
        out = block.out(self(heads, context) + mixed.to(heads.v)[None] / 2)[0]
        return at_least_float32(out) + self.cls * prefix[:1].sum(dim=0)  # nothing if there is no [CLS]


class Gradient(Attention):
    """Maps that follow the gradient of a prompt's score, see `gradients`.

    A method of it has no features before the prompts, so `run` does not take it: a `Localizer` does.
    """

    def __call__(self, heads: Heads, context: BlockContext) -> Float[Tensor, "b h n c"]:
        raise MethodError("methods with gradients need prompts: use a Localizer, not run()")


@dataclass(frozen=True, kw_only=True)
class ClassActivation(Gradient):
    """Grad-CAM and CLIP-ES: the gradient with respect to the last block's input, after its first norm.

    softmax  the score is the softmax over all prompts (CLIP-ES), else the scaled cosine (Grad-CAM)
    blocks   number of last blocks whose attention spreads the map (CLIP-ES has 8); 0 for none
    """

    softmax: bool = True
    blocks: int = 8

    def __post_init__(self) -> None:
        require(self, "softmax", _is_bool, "True or False")
        require(self, "blocks", lambda number: is_count(number, 0), "a whole number, 0 or more")

    @property
    def stands_alone(self) -> bool:
        return True


@dataclass(frozen=True)
class AttentionGradient(Gradient):
    """LeGrad: the gradient with respect to the attention of each of the last blocks, `depth` of them."""


def _share_of(layers: int, number: int) -> int:
    """Return the block, of a host with `layers` blocks, at the place of block `number` among 12, before the last."""
    return min(max(1, round(layers * number / 12)), layers - 1)


# Methods --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to read dense features from a frozen vision transformer.

    attention  how a block mixes values: a value such as `SelfSelf(iterations=2)`
    depth      number of last blocks that have this attention (the published gem_depth is one more)
    residual   start from the host's stream (else from 0)
    mlp        apply the block's MLP to this stream too (Table 5)
    steps      what is done to patch features afterwards, in order, once windows are merged: see `method.steps`
    about      a description for people, without effect
    """

    attention: Attention = SelfSelf()
    depth: int = 6
    residual: bool = True
    mlp: bool = False
    steps: tuple[Step, ...] = ()
    about: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        require(self, "attention", lambda value: isinstance(value, Attention), "an attention such as SelfSelf()")
        require(self, "depth", lambda number: is_count(number, 1), "a whole number of blocks, 1 or more")
        for switch in ("residual", "mlp"):
            require(self, switch, _is_bool, "True or False")
        if self.attention.stands_alone and (self.residual or self.depth > 1):
            name = type(self.attention).__name__
            raise MethodError(f"{name} replaces the last block: it needs residual=False and depth=1")
        if isinstance(self.attention, AttentionGradient) and not (self.residual and self.mlp):
            raise MethodError("AttentionGradient follows whole blocks: it needs residual=True and mlp=True")
        object.__setattr__(self, "steps", tuple(self.steps))
        require(self, "steps", lambda steps: all(isinstance(step, Step) for step in steps), "steps such as Scga()")

    @property
    def is_host(self) -> bool:
        """True if this method is, by construction, the host's own stream."""
        return self.attention == QUERY_KEY and self.residual and self.mlp

    def replace(self, **settings: Any) -> "Method":
        """Return a copy with other settings, of the method or of its attention: `gem.replace(depth=4, iterations=0)`.

        Raises MethodError for a setting that neither has, or a value that makes no sense.
        """
        own = {name: settings.pop(name) for name in _names(self) & settings.keys()}
        changed = replace(self, **own)
        if unknown := sorted(settings.keys() - _names(changed.attention)):
            known = ", ".join(changed.settings)
            raise MethodError(f"{' and '.join(unknown)}: no setting of {changed._title}, which has {known}")
        return replace(changed, attention=replace(changed.attention, **settings)) if settings else changed

    @property
    def settings(self) -> tuple[str, ...]:
        """Return the names of the settings that have an effect, of the method and of its attention."""
        own = [name for name in ("depth", "residual", "mlp", "steps") if not (self.is_host and name == "depth")]
        return (*own, *sorted(_names(self.attention) - {"function"}))

    def guided(self, find: Callable[[str], Guide]) -> "Method":
        """Return the method with guides in place of their names in its steps; `find` loads them."""
        return replace(self, steps=tuple(step.guided(find) for step in self.steps)) if self.steps else self

    def deepest(self, layers: int) -> int:
        """Return the greatest depth on a tower of `layers` blocks: borrowed blocks come before those that change."""
        borrowed = self.attention.borrows(layers)
        return layers - borrowed[-1] if borrowed else layers

    def fitted(self, layers: int) -> "Method":
        """Return the settings, no deeper than a tower of `layers` blocks allows: for a depth that nobody requested."""
        deepest = self.deepest(layers)
        return self if self.depth <= deepest else replace(self, depth=deepest)

    def describe(self) -> dict[str, Any]:
        """Return the settings as values that JSON can hold."""
        steps = [step.describe() for step in self.steps]
        own = {"depth": self.depth, "residual": self.residual, "mlp": self.mlp}
        return self.attention.describe() | own | ({"steps": steps} if steps else {})

    @property
    def _title(self) -> str:
        return f"a method with {self.attention.describe()['attention']} attention"


# The table ------------------------------------------------------------------------------------------------------------

_GEM = Method()
_RAW = _GEM.replace(normalize=False, iterations=0, temperature="trained")  # self-self without what GEM adds to it
_REDUCED = _RAW.replace(depth=1, residual=False)  # the last block's attention, and nothing else of that block
_KEPT = _RAW.replace(depth=1, mlp=True)  # the last block with another attention
_NACLIP = SelfSelf(projections="k", gaussian=5.0, normalize=False, iterations=0, temperature="trained")

METHODS: dict[str, Method] = {
    "gem": _GEM.replace(about="GEM: self-self attention of q, k and v, averaged, beside the last blocks"),
    "clip": _KEPT.replace(attention=QUERY_KEY, about="the host's own patch tokens"),
    # As released (vit.py of MaskCLIP): residual and MLP kept. The GEM paper describes the reduced form.
    "maskclip": _KEPT.replace(attention=IDENTITY, about="MaskCLIP as released: values for attention"),
    "maskclip-reduced": _REDUCED.replace(attention=IDENTITY, about="MaskCLIP as papers have it: no residual, no MLP"),
    "clip_surgery": _RAW.replace(projections="v", about="CLIP Surgery: value-value attention beside the last blocks"),
    "sclip": _KEPT.replace(projections="qk", combine="sum", about="SCLIP: q-q plus k-k attention in the last block"),
    "clearclip": _REDUCED.replace(projections="q", about="ClearCLIP: q-q attention of the last block, nothing else"),
    "naclip": _REDUCED.replace(attention=_NACLIP, about="NACLIP: k-k attention, nearer patches favoured"),
    "kk": _REDUCED.replace(projections="k", about="k-k attention, nothing else of the last block"),
    "csa": _REDUCED.replace(projections="qk", combine="sum", about="SCLIP's attention, nothing else of the block"),
    "cliptrase": _KEPT.replace(combine="sum", about="CLIPtrase: q-q plus k-k plus v-v attention in the last block"),
    "resclip-rcs": _REDUCED.replace(
        attention=CrossBlock(**{name: getattr(_NACLIP, name) for name in sorted(_names(_NACLIP))}),
        about="ResCLIP's cross-block attention: NACLIP's, mixed with that of the middle blocks",
    ),
    "radseg": _KEPT.replace(attention=Recursive(), steps=(Scga(),), about="RADSeg: recursive attention, then SCGA"),
    "sc-clip": Method(
        SelfCalibrated(), depth=1, residual=False, about="SC-CLIP: outliers repaired, similar patches averaged"
    ),
    "gem-q": _GEM.replace(projections="q", about="GEM with q alone (Table 1)"),
    "gem-k": _GEM.replace(projections="k", about="GEM with k alone (Table 1)"),
    "gem-v": _GEM.replace(projections="v", about="GEM with v alone (Table 1)"),
    "gem-raw": _RAW.replace(about="GEM without normalisation, adaptive temperature and iterations (Table 1)"),
    "gem-q-raw": _RAW.replace(projections="q", about="the same with q alone (Table 1)"),
    "gem-k-raw": _RAW.replace(projections="k", about="the same with k alone (Table 1)"),
    "gem-v-raw": _RAW.replace(projections="v", about="the same with v alone (Table 1): CLIP Surgery"),
    "gem-mlp": _GEM.replace(mlp=True, about="GEM with the MLPs kept (Table 5)"),
    "gem-kmeans": _RAW.replace(
        attention=KMeans(normalize=False, temperature="trained"),
        about="k-means of the values in place of self-self attention (Table 2)",
    ),
}


GRADIENTS: dict[str, Method] = {
    "gradcam": Method(
        ClassActivation(softmax=False, blocks=0), 1, False, about="Grad-CAM of a prompt's score at the last block"
    ),
    "clip-es": Method(
        ClassActivation(), 1, False, about="CLIP-ES: Grad-CAM of the softmax over prompts, spread by attention"
    ),
    "legrad": Method(
        AttentionGradient(), 2, mlp=True, about="LeGrad: gradients at the attention of the last two blocks"
    ),
}
"""Methods that need gradients, and so prompts: comparisons, which a `Localizer` takes by name, but `run` does not."""


def find_method(name: str) -> Method:
    """Return the row of `METHODS` or `GRADIENTS` called `name`. Raises MethodError that lists the known ones."""
    known = METHODS | GRADIENTS
    if name in known:
        return known[name]
    raise MethodError(f"unknown method {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
