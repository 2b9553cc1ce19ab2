"""The training-free methods of the field: how a method mixes values, its settings, and the table of known ones.

A mix is a function `(method, heads, site) -> mixed values (b, h, n, c)`: the settings, q, k and v of one block, and
what else is known there. One without settings of its own is a function with a name in `MIXES`; one that has some is a
small frozen dataclass, and stands in a `Method` as a value. To add another attention over q, k and v: that, and a row
of `METHODS`.
"""

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from open_gem.checks import did_you_mean, is_count, is_positive
from open_gem.errors import MethodError
from open_gem.method import attention
from open_gem.method.attention import Heads, to_unit
from open_gem.method.clustering import means, spherical_kmeans
from open_gem.types import Grid, Size


@dataclass(frozen=True, eq=False)
class Site:
    """Where a mix is at work: one block of the host, one batch of images.

    normed  ln_1 of the host's stream, `(b, n, d)`
    pixels  what the host was given, `(b, 3, y, x)`, normalised as its checkpoint wants it
    grid    of the patches
    prefix  number of tokens before them
    layers  number of blocks of the host
    lent    q, k and v of those blocks so far that some mix borrows from: see `Method.borrows`
    asked   the settings by which all methods that are read here mix values: see `Method.mixture`
    """

    normed: Tensor
    pixels: Tensor
    grid: Grid
    prefix: int
    layers: int
    lent: Mapping[int, Heads]
    asked: Collection["Method"] = ()
    _made: dict[Hashable, Tensor] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives; made once at this site, however many methods need it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Layout(NamedTuple):
    """Where tokens are: patches on `grid`, row by row, after `prefix` other tokens."""

    grid: Grid
    prefix: int


Mix = Callable[["Method", Heads, Site], Tensor]
"""A mix may also have `borrows(layers) -> range`, blocks whose q, k and v it wants in `Site.lent`; `layout(size) ->
Layout`, where its tokens are not the host's; and `ignored`, names of settings of `MIXING` that it does not look at."""

MIXING = ("projections", "combine", "normalize", "iterations", "temperature", "temperature_scale", "gaussian")
"""Settings of a method that are about how values are mixed."""


@dataclass(frozen=True)
class Method:
    """One way to read dense features; an ablation is `dataclasses.replace(METHODS["gem"], iterations=2)`.

    mix                how values are mixed: a name of `MIXES`, or a value such as `KMeans(clusters=3)`
    projections        self-self: which of "q", "k", "v" (eq. 6)
    combine            self-self: "mean" over these projections (eq. 6), or "sum", as SCLIP and CLIPtrase have it
    normalize          L2-normalise each projected token per head (section 4.1)
    iterations         self-self: K of eq. 3, at least 0
    temperature        τ of eq. 5: a positive number, "adaptive" (section 4.1), "trained" (√head width)
    temperature_scale  multiplies τ (Fig. 5); above 0, smaller is sharper
    gaussian           self-self: standard deviation, in patches, of a bias towards near patches (NACLIP), or None
    depth              number of last blocks that have this method (the published gem_depth is one more)
    residual           start from the host's stream (else from 0)
    mlp                apply the block's MLP to this stream too (Table 5)
    about              a word for people, of no effect
    """

    mix: str | Mix = "self-self"
    projections: str = "qkv"
    combine: str = "mean"
    normalize: bool = True
    iterations: int = 1
    temperature: float | str = "adaptive"
    temperature_scale: float = 1.0
    gaussian: float | None = None
    depth: int = 6
    residual: bool = True
    mlp: bool = False
    about: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        need = _Checker(self)
        need("mix", _is_mix, f"one of {', '.join(MIXES)}, or a function")
        need("projections", _is_selection, "a selection of 'qkv' without repetition")
        need("combine", lambda combine: combine in ("mean", "sum"), "'mean' or 'sum'")
        need("iterations", lambda number: is_count(number, 0), "a whole number, 0 or more")
        need("temperature", _is_temperature, "a number above 0, 'adaptive' or 'trained'")
        need("temperature_scale", is_positive, "a number above 0")
        need("gaussian", lambda std: std is None or is_positive(std), "a number of patches above 0, or None")
        need("depth", lambda number: is_count(number, 1), "a whole number of blocks, 1 or more")
        for switch in ("normalize", "residual", "mlp"):
            need(switch, lambda value: isinstance(value, bool), "True or False")
        if hasattr(self.mixer, "layout") and (self.residual or self.depth > 1):
            kind = type(self.mixer).__name__
            raise MethodError(f"{kind} lays tokens on a grid of its own: it needs residual=False and depth=1")

    @property
    def is_host(self) -> bool:
        """True where this method is, by construction, the host's own stream."""
        return self.mix == "query-key" and self.residual and self.mlp

    @property
    def is_adaptive(self) -> bool:
        """True where the temperature follows the image (section 4.1)."""
        return self.temperature == "adaptive" and "temperature" not in self.ignored

    @property
    def ignored(self) -> frozenset[str]:
        """Settings that the mix does not look at."""
        return frozenset(getattr(self.mixer, "ignored", ()))

    @property
    def mixture(self) -> "Method":
        """What is left of the settings that decide how values are mixed; equal mixtures are computed once."""
        return replace(self, depth=1, residual=False, mlp=False)

    @property
    def mixer(self) -> Mix:
        """The function that mixes values."""
        return MIXES[self.mix] if isinstance(self.mix, str) else self.mix

    def borrows(self, layers: int) -> range:
        """The blocks, of a host that has `layers`, whose q, k and v the mix wants to see beside those of its own."""
        borrows = getattr(self.mixer, "borrows", None)
        return range(0) if borrows is None else borrows(layers)

    def deepest(self, layers: int) -> int:
        """The greatest depth on a host that has `layers` blocks: borrowed blocks come before those it changes."""
        borrowed = self.borrows(layers)
        return layers - borrowed[-1] if borrowed else layers

    def fitted(self, layers: int) -> "Method":
        """The same settings, no deeper than a host of `layers` blocks allows: for a depth that nobody asked for."""
        return replace(self, depth=min(self.depth, self.deepest(layers)))

    def layout(self, grid: Grid, prefix: int, size: Size) -> Layout:
        """Where this method's tokens are, of pixels of `size` whose host has its own on `grid` after `prefix`."""
        layout = getattr(self.mixer, "layout", None)
        return Layout(grid, prefix) if layout is None else layout(size)

    def describe(self) -> dict[str, Any]:
        """The settings, those that have an effect, as values that JSON can hold."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "about"}
        settings = {name: float(value) if isinstance(value, np.floating) else value for name, value in given.items()}
        function = getattr(self.mix, "__qualname__", None)  # what `repr` says of one has its address
        return settings | {"mix": self.mix if isinstance(self.mix, str) else function or repr(self.mix)}


class _Checker:
    """Raises MethodError where a setting of `owner` is not what it has to be."""

    def __init__(self, owner: Any):
        self.owner = owner

    def __call__(self, name: str, fits: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self.owner, name)
        if not fits(value):
            raise MethodError(f"{name} is {value!r}, expected {expected}")


def _is_mix(value: Any) -> bool:
    return value in MIXES if isinstance(value, str) else callable(value) and not isinstance(value, type)


def _is_selection(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) == len(set(value) & set("qkv"))


def _is_temperature(value: Any) -> bool:
    return value in ("adaptive", "trained") if isinstance(value, str) else is_positive(value)


# Ways to mix values ---------------------------------------------------------------------------------------------------


def _inverse_temperature(method: Method, heads: Heads, site: Site) -> Tensor | float:
    head_width = heads.q.shape[-1]
    match method.temperature:
        case "adaptive":
            inverse = attention.adaptive_inverse_temperature(site.normed, head_width)
        case "trained":
            inverse = head_width**-0.5
        case number:
            inverse = 1 / float(number)
    return inverse / method.temperature_scale


def self_self(method: Method, heads: Heads, site: Site) -> Tensor:
    """GEM and all its kin: each chosen projection attends to itself; the outcomes are averaged or added."""
    inverse, bias = _inverse_temperature(method, heads, site), None
    if method.gaussian is not None:
        std = float(method.gaussian)
        bias = site.once(("gaussian", std), lambda: attention.gaussian(site.grid, site.prefix, std).to(heads.v))

    def attend(names: str) -> Tensor:
        settings: dict[str, Any] = {"normalize": method.normalize, "iterations": method.iterations, "bias": bias}
        return attention.self_self([getattr(heads, name) for name in names], heads.v, inverse, **settings)

    alone = replace(method.mixture, mix="self-self", combine="mean")
    keys = {names: replace(alone, projections=names) for names in (method.projections, *method.projections)}
    apart = any(keys[name] in site.asked for name in method.projections)  # others want some projection by itself
    parts = method.projections if apart else [method.projections]
    mixed = [site.once(keys[names], partial(attend, names)) for names in parts]
    mean = sum(mixed[1:], mixed[0]) / len(mixed)
    return mean * len(method.projections) if method.combine == "sum" else mean


@dataclass(frozen=True)
class Plain:
    """A mix without any settings."""

    mix: Callable[[Heads], Tensor]
    ignored: ClassVar = MIXING

    def __call__(self, method: Method, heads: Heads, site: Site) -> Tensor:
        return self.mix(heads)


MIXES: dict[str, Mix] = {
    "self-self": self_self,
    "query-key": Plain(attention.query_key),
    "identity": Plain(attention.identity),
}


@dataclass(frozen=True)
class KMeans:
    """GEM-Kmeans (paper eq. 10, Fig. 6b): values attend to the centroids of their own clusters, softmax(v μᵀ/τ) μ.

    Spherical k-means for each image and head, over all tokens; μ are the means of the raw values. `normalize` and
    `temperature` of the method hold for v μᵀ. The paper leaves distance, heads and τ open: see `docs/methods.md`.

    clusters    K, 1 or more; with fewer tokens, each is its own cluster
    seed        of the k-means++ seeding, the same for every image
    iterations  most steps of Lloyd's algorithm
    """

    clusters: int = 7
    seed: int = 0
    iterations: int = 20
    ignored: ClassVar = ("projections", "combine", "iterations", "gaussian")

    def __post_init__(self) -> None:
        need = _Checker(self)
        need("clusters", lambda number: is_count(number, 1), "a whole number, 1 or more")
        need("seed", lambda number: is_count(number, 0), "a whole number, 0 or more")
        need("iterations", lambda number: is_count(number, 1), "a whole number, 1 or more")

    def __call__(self, method: Method, heads: Heads, site: Site) -> Tensor:
        clusters = min(self.clusters, heads.v.shape[-2])
        found = spherical_kmeans(heads.v, clusters, seed=self.seed, iterations=self.iterations)
        centroids = means(heads.v, found.labels, clusters)
        inverse = _inverse_temperature(method, heads, site)
        query, key = (to_unit(heads.v), to_unit(centroids)) if method.normalize else (heads.v, centroids)
        return attention.query_key(Heads(query * (inverse * query.shape[-1] ** 0.5), key, centroids))


@dataclass(frozen=True)
class CrossBlock:
    """ResCLIP's residual cross-correlation self-attention (RCS): gain · [(1 − share) A + share · mean of A_l] v.

    A is the method's own self-self attention; A_l the attention that the host was trained with in its middle blocks,
    head by head, here applied to the values of this block. ResCLIP takes blocks 6 to 9 of 12, also of 24; here the
    same part of any depth. Its second pass (semantic feedback) needs labels and is not part of this.

    share  λ in [0, 1]: 0.3 with PascalVOC and Cityscapes, 0.4 with Pascal Context
    gain   τ, above 0: 2.0
    """

    share: float = 0.3
    gain: float = 2.0

    def __post_init__(self) -> None:
        need = _Checker(self)
        need("share", lambda share: is_positive(share) and share <= 1, "a number above 0, up to 1")
        need("gain", is_positive, "a number above 0")

    def borrows(self, layers: int) -> range:
        return range(round(layers * 5 / 12), max(1, round(layers * 9 / 12)))

    def __call__(self, method: Method, heads: Heads, site: Site) -> Tensor:
        middle = (site.lent[index] for index in self.borrows(site.layers))
        trained = [attention.query_key(block._replace(v=heads.v)) for block in middle]
        borrowed = sum(trained[1:], trained[0]) / len(trained)
        return self.gain * ((1 - self.share) * self_self(method, heads, site) + self.share * borrowed)


# The table ------------------------------------------------------------------------------------------------------------

_GEM = Method()
_RAW = replace(_GEM, normalize=False, iterations=0, temperature="trained")  # self-self without what GEM adds to it
_REDUCED = replace(_RAW, depth=1, residual=False)  # the last block's attention, and nothing else of that block
_KEPT = replace(_RAW, depth=1, mlp=True)  # the last block with another attention

METHODS: dict[str, Method] = {
    "gem": replace(_GEM, about="GEM: self-self attention of q, k and v, averaged, beside the last blocks"),
    "clip": replace(_KEPT, mix="query-key", about="the host's own patch tokens"),
    # As released (vit.py of MaskCLIP): residual and MLP kept. The GEM paper describes the reduced form.
    "maskclip": replace(_KEPT, mix="identity", about="MaskCLIP as released: values for attention"),
    "maskclip-reduced": replace(_REDUCED, mix="identity", about="MaskCLIP as papers have it: no residual, no MLP"),
    "clip_surgery": replace(_RAW, projections="v", about="CLIP Surgery: value-value attention beside the last blocks"),
    "sclip": replace(_KEPT, projections="qk", combine="sum", about="SCLIP: q-q plus k-k attention in the last block"),
    "clearclip": replace(_REDUCED, projections="q", about="ClearCLIP: q-q attention of the last block, nothing else"),
    "naclip": replace(_REDUCED, projections="k", gaussian=5.0, about="NACLIP: k-k attention, nearer patches favoured"),
    "kk": replace(_REDUCED, projections="k", about="k-k attention, nothing else of the last block"),
    "csa": replace(_REDUCED, projections="qk", combine="sum", about="SCLIP's attention, nothing else of the block"),
    "cliptrase": replace(_KEPT, combine="sum", about="CLIPtrase: q-q plus k-k plus v-v attention in the last block"),
    "resclip-rcs": replace(
        _REDUCED,
        mix=CrossBlock(),
        projections="k",
        gaussian=5.0,
        about="ResCLIP's cross-block attention: NACLIP's, mixed with that of the middle blocks",
    ),
    "gem-q": replace(_GEM, projections="q", about="GEM with q alone (Table 1)"),
    "gem-k": replace(_GEM, projections="k", about="GEM with k alone (Table 1)"),
    "gem-v": replace(_GEM, projections="v", about="GEM with v alone (Table 1)"),
    "gem-raw": replace(_RAW, about="GEM without normalisation, adaptive temperature and iterations (Table 1)"),
    "gem-q-raw": replace(_RAW, projections="q", about="the same with q alone (Table 1)"),
    "gem-k-raw": replace(_RAW, projections="k", about="the same with k alone (Table 1)"),
    "gem-v-raw": replace(_RAW, projections="v", about="the same with v alone (Table 1): CLIP Surgery"),
    "gem-mlp": replace(_GEM, mlp=True, about="GEM with the MLPs kept (Table 5)"),
    "gem-kmeans": replace(_RAW, mix=KMeans(), about="k-means of the values in place of self-self attention (Table 2)"),
}


PROXYCLIP = "proxyclip:"
"""Before the name of an expert (`backbones.experts`) the name of a method, made when it is asked for."""


def check_name(name: str) -> str:
    """The name itself, of a row of `METHODS`, or "proxyclip:" and an expert's. Raises MethodError for another."""
    if name.removesuffix(":") == PROXYCLIP.removesuffix(":"):
        raise MethodError(f'{name!r} names no expert, expected for example "{PROXYCLIP}facebook/dino-vitb8"')
    if not name.startswith(PROXYCLIP):
        find_method(name)
    return name


def find_method(name: str) -> Method:
    """The row of `METHODS` called `name`. Raises MethodError that lists the known ones."""
    if name in METHODS:
        return METHODS[name]
    raise MethodError(f"unknown method {name!r}{did_you_mean(name, METHODS)}; known: {', '.join(METHODS)}")
