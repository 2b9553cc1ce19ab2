"""The method: read any number of dense pathways out of one untouched forward pass.

Beside the last blocks of a frozen vision transformer runs a second stream. At each of these blocks it reads what the
host reads, ln_1(x) of the *host's* stream, mixes the values in its own way and adds the result to itself:

    y_L-d = x_L-d                    (or 0 without residual)
    y_l   = y_l-1 + out_l(mix(q, k, v of ln_1(x_l-1)))    [+ mlp_l(y) where asked]

The host's stream x never sees y. So the host runs once, whatever number of pathways is read, and CLIP, MaskCLIP, CLIP
Surgery, ClearCLIP and GEM are rows of one table (paper section 4.1; GEM's code sums as above, A.3's moving average is
a slip).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from open_gem import attention
from open_gem.attention import Heads
from open_gem.errors import PathwayError
from open_gem.types import Grid, Size


@dataclass(frozen=True)
class Block:
    """One block of the host as functions over its frozen weights.

    `norm`: tokens `(b, n, d)` → ln_1 of them. `qkv`: normed tokens → `Heads`. `out`: heads `(b, h, n, c)` → tokens, by
    the output projection and layer scale. `mlp`: tokens → ls_2(mlp(ln_2(tokens))), without the residual. `forward`:
    tokens → tokens through the host's own module, exactly as trained.
    """

    norm: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], Heads]
    out: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]


class Host(Protocol):
    """What a pathway needs of a model: the vision half of a backbone."""

    @property
    def layers(self) -> int:
        """Number of blocks."""
        ...

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches (1 for [CLS])."""
        ...

    def blocks(self, grid: Grid) -> Sequence[Block]:
        """The blocks, for tokens on `grid`: with rotary positions attention itself knows where a token is."""
        ...

    def embed(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        """Pixels `(b, 3, y, x)` → the tokens `(b, n, d)` that enter the first block, and their grid."""
        ...

    def project(self, tokens: Tensor) -> Tensor:
        """Each token's place in the joint space, by what the head makes of it alone: `(b, n, d)` → `(b, n, e)`."""
        ...

    def pool(self, tokens: Tensor) -> Tensor:
        """The image-level embedding as trained, not normalised: `(b, n, d)` → `(b, e)`."""
        ...


@dataclass(frozen=True, eq=False)
class Features:
    """What one pathway makes of a batch of images, before any prompt: a value to cache, share and ask again.

    `tokens` `(b, prefix + r·k, e)` in the joint space, not normalised; `grid` r×k; `size` the pixels that were encoded;
    `pooled` `(b, e)` the host's image-level embedding, not normalised, or None where nobody asked for it.
    """

    tokens: Tensor
    grid: Grid
    size: Size
    prefix: int = 1
    pooled: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """Patch features `(b, r·k, e)`, row by row, not normalised."""
        return self.tokens[:, self.prefix :]


@dataclass(frozen=True)
class Pathway:
    """One way to read dense features; an ablation is `dataclasses.replace(PATHWAYS["gem"], iterations=2)`.

    mix                how values are mixed, a key of `MIXES`: "self-self", "query-key", "identity"
    projections        self-self only: which of "q", "k", "v" are averaged (eq. 6)
    normalize          self-self only: L2-normalise each projected token per head (section 4.1)
    iterations         self-self only: K of eq. 3, at least 0
    temperature        self-self only: τ of eq. 5: a positive number, "adaptive" (section 4.1), "trained" (√head width)
    temperature_scale  multiplies τ (Fig. 5); above 0, smaller is sharper
    depth              number of last blocks that have this pathway (the published gem_depth is one more)
    residual           start from the host's stream (else from 0)
    mlp                apply the block's MLP to this stream too (Table 5)
    about              a word for people, of no effect
    """

    mix: str = "self-self"
    projections: str = "qkv"
    normalize: bool = True
    iterations: int = 1
    temperature: float | str = "adaptive"
    temperature_scale: float = 1.0
    depth: int = 6
    residual: bool = True
    mlp: bool = False
    about: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        def need(name: str, fits: Callable[[Any], bool], expected: str) -> None:
            if not fits(getattr(self, name)):
                raise PathwayError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        need("mix", lambda mix: isinstance(mix, str) and mix in MIXES, f"one of {', '.join(MIXES)}")
        need("projections", _is_selection, "a selection of 'qkv' without repetition")
        need("iterations", lambda number: _is_count(number, 0), "a whole number, 0 or more")
        need("temperature", _is_temperature, "a number above 0, 'adaptive' or 'trained'")
        need("temperature_scale", _is_positive, "a number above 0")
        need("depth", lambda number: _is_count(number, 1), "a whole number of blocks, 1 or more")
        for switch in ("normalize", "residual", "mlp"):
            need(switch, lambda value: isinstance(value, bool), "True or False")

    @property
    def is_host(self) -> bool:
        """True where this pathway is, by construction, the host's own stream."""
        return self.mix == "query-key" and self.residual and self.mlp

    @property
    def is_adaptive(self) -> bool:
        """True where the temperature follows the image (section 4.1)."""
        return self.mix == "self-self" and self.temperature == "adaptive"

    @property
    def mixture(self) -> "Pathway":
        """What is left of the settings that decide how values are mixed; equal mixtures are computed once."""
        return replace(self, depth=1, residual=True, mlp=False)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) > 0


def _is_selection(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) == len(set(value) & set("qkv"))


def _is_temperature(value: Any) -> bool:
    return value in ("adaptive", "trained") if isinstance(value, str) else _is_positive(value)


def _self_self(pathway: Pathway, heads: Heads, normed: Tensor) -> Tensor:
    head_width = heads.q.shape[-1]
    match pathway.temperature:
        case "adaptive":
            inverse = attention.adaptive_inverse_temperature(normed, head_width)
        case "trained":
            inverse = head_width**-0.5
        case number:
            inverse = 1 / float(number)
    return attention.self_self(
        heads,
        inverse / pathway.temperature_scale,
        projections=pathway.projections,
        normalize=pathway.normalize,
        iterations=pathway.iterations,
    )


# The ways to mix values: (settings, q/k/v, ln_1(x)) -> mixed values (b, h, n, c).
MIXES: dict[str, Callable[[Pathway, Heads, Tensor], Tensor]] = {
    "self-self": _self_self,
    "query-key": lambda pathway, heads, normed: attention.query_key(heads),
    "identity": lambda pathway, heads, normed: attention.identity(heads),
}

PATHWAYS: dict[str, Pathway] = {
    "gem": Pathway(about="GEM: self-self attention of q, k and v, averaged, beside the last blocks"),
    "clip": Pathway(mix="query-key", depth=1, mlp=True, about="the host's own patch tokens"),
    # As released (vit.py of MaskCLIP): residual and MLP kept. The GEM paper describes the reduced form.
    "maskclip": Pathway(mix="identity", depth=1, mlp=True, about="MaskCLIP as released: values for attention"),
    "maskclip-reduced": Pathway(
        mix="identity", depth=1, residual=False, about="MaskCLIP as papers describe it: no residual, no MLP"
    ),
    "clip_surgery": Pathway(
        projections="v",
        normalize=False,
        iterations=0,
        temperature="trained",
        about="CLIP Surgery: value-value attention beside the last blocks",
    ),
    "clearclip": Pathway(
        projections="q",
        normalize=False,
        iterations=0,
        temperature="trained",
        depth=1,
        residual=False,
        about="ClearCLIP: query-query attention in the last block, nothing else",
    ),
}


def find_pathway(name: str) -> Pathway:
    """The row of `PATHWAYS` called `name`. Raises PathwayError that lists the known ones."""
    if name in PATHWAYS:
        return PATHWAYS[name]
    close = get_close_matches(str(name), PATHWAYS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise PathwayError(f"unknown pathway {name!r}{hint}; known: {', '.join(PATHWAYS)}")


def check_depth(pathway: Pathway, host: Host, label: str = "the pathway") -> None:
    """Raises PathwayError where the pathway, called `label`, is deeper than the host."""
    if pathway.depth > host.layers:
        raise PathwayError(f"{label} has depth {pathway.depth}, but the model has {host.layers} blocks")


@torch.no_grad()
def run(
    host: Host, pixels: Tensor, pathways: Mapping[str, Pathway], *, pooled: bool = False, exact: bool = False
) -> dict[str, Features]:
    """Encode `pixels` once and read every one of `pathways` from that pass.

    pixels    `(b, 3, y, x)`, preprocessed, y and x whole multiples of the host's patch
    pathways  name → settings; any number, computed beside the same host stream
    pooled    also the host's image-level embedding (costs the last block where no pathway needs it)
    exact     run the host's blocks through its own modules: its tokens are then the library's to the last bit; by
              default the same weights run through one fused attention and share q, k, v with the pathways (difference
              ≤ 2e-5)

    Returns one `Features` a pathway under the same names. Raises PathwayError where a pathway is deeper than the host,
    or none is given; InputError (from the host) where the pixels do not fit its patches.
    """
    if not pathways:
        raise PathwayError(f"no pathway given; known: {', '.join(PATHWAYS)}")
    for name, pathway in pathways.items():
        check_depth(pathway, host, f"pathway {name!r}")

    host_is_read = pooled or any(pathway.is_host for pathway in pathways.values())
    beside = {name: pathway for name, pathway in pathways.items() if not pathway.is_host}
    streams: dict[str, Tensor] = {}  # the second streams that have begun

    x, grid = host.embed(pixels)
    blocks = host.blocks(grid)
    for index, block in enumerate(blocks):
        here = {name: pathway for name, pathway in beside.items() if index >= len(blocks) - pathway.depth}
        for name in here.keys() - streams.keys():
            streams[name] = x if here[name].residual else torch.zeros_like(x)
        heads = None
        if here:
            normed = block.norm(x)
            heads = block.qkv(normed)
            _advance_streams(block, heads, normed, here, streams)
        if host_is_read or index < len(blocks) - 1:
            x = block.forward(x) if exact else _forward_fused(block, x, heads or block.qkv(block.norm(x)))

    embedding = host.pool(x) if pooled else None
    size = Size(*pixels.shape[-2:])
    return {
        name: Features(host.project(x if pathway.is_host else streams[name]), grid, size, host.prefix, embedding)
        for name, pathway in pathways.items()
    }


def _forward_fused(block: Block, x: Tensor, heads: Heads) -> Tensor:
    """The host's block in fused kernels: what `block.forward` computes, from q, k, v that are already there."""
    x = x + block.out(attention.query_key(heads))
    return x + block.mlp(x)


def _advance_streams(
    block: Block, heads: Heads, normed: Tensor, here: Mapping[str, Pathway], streams: dict[str, Tensor]
) -> None:
    """Add to each stream what its pathway mixes at this block; equal mixtures (a depth sweep, say) are made once."""
    mixtures: dict[Pathway, Tensor] = {}
    for name, pathway in here.items():
        mixture = pathway.mixture
        if mixture not in mixtures:
            mixtures[mixture] = block.out(MIXES[pathway.mix](pathway, heads, normed))
        stream = streams[name] + mixtures[mixture]
        streams[name] = stream + block.mlp(stream) if pathway.mlp else stream
