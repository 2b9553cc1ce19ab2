"""The method: read any number of dense methods out of one untouched forward pass.

Beside the last blocks of a frozen vision transformer runs a second stream. At each of these blocks it reads what the
host reads, ln_1(x) of the *host's* stream, mixes the values in its own way and adds the result to itself:

    y_L-d = x_L-d                    (or 0 without residual)
    y_l   = y_l-1 + out_l(mix(q, k, v of ln_1(x_l-1)))    [+ mlp_l(y) where asked]

The host's stream x never sees y. So the host runs once, whatever number of methods is read, and CLIP, MaskCLIP, CLIP
Surgery, ClearCLIP and GEM are rows of one table (paper section 4.1; GEM's code sums as above, A.3's moving average is
a slip).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from open_gem.errors import InputError, MethodError, NotFiniteError
from open_gem.method import attention
from open_gem.method.attention import Heads
from open_gem.method.table import METHODS, Method, Site
from open_gem.numerics import are_finite, check_finite, cpu_by_default
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
    """What a method needs of a model: the vision half of a backbone."""

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
    """What one method makes of a batch of images, before any prompt: a value to cache, share and ask again.

    `tokens` `(b, prefix + r·k, e)` in the joint space, not normalised; `grid` r×k; `size` the pixels that were encoded;
    `pooled` `(b, e)` the host's image-level embedding, not normalised, or None where nobody asked for it; `original`
    the size of the picture that the pixels were made of, where it is known; `trace`, where it was asked for, this
    method's stream after each block that it has, by the block's number from 1: `(b, prefix + r·k, d)` in the model's
    own width, before the final norm.
    """

    tokens: Tensor
    grid: Grid
    size: Size
    prefix: int = 1
    pooled: Tensor | None = None
    original: Size | None = None
    trace: Mapping[int, Tensor] = field(default_factory=dict)

    def image(self, index: int) -> "Features":
        """Those of one image of the batch, as a batch of one."""
        one = slice(index, index + 1)
        pooled = None if self.pooled is None else self.pooled[one]
        trace = {block: tokens[one] for block, tokens in self.trace.items()}
        return replace(self, tokens=self.tokens[one], pooled=pooled, trace=trace)

    @property
    def patches(self) -> Tensor:
        """Patch features `(b, r·k, e)`, row by row, not normalised."""
        return self.tokens[:, self.prefix :]


def check_depth(method: Method, host: Host, label: str = "the method") -> None:
    """Raises MethodError where the method, called `label`, is deeper than the host, or borrows from blocks that come
    after it."""
    if method.depth > host.layers:
        raise MethodError(
            f"{label} has depth {method.depth}, but the model has {host.layers} blocks: "
            f"expected depth {method.deepest(host.layers)} at most"
        )
    if method.depth > (deepest := method.deepest(host.layers)):
        raise MethodError(
            f"{label} has depth {method.depth}, but borrows from block {host.layers - deepest + 1} of {host.layers}: "
            f"expected depth {deepest} at most"
        )


@torch.no_grad()
@cpu_by_default()
def run(
    host: Host,
    pixels: Tensor,
    methods: Mapping[str, Method],
    *,
    pooled: bool = False,
    exact: bool = False,
    trace: Collection[str] = (),
) -> dict[str, Features]:
    """Encode `pixels` once and read every one of `methods` from that pass.

    pixels    `(b, 3, y, x)`, preprocessed, y and x whole multiples of the host's patch
    methods  name → settings; any number, computed beside the same host stream
    pooled    also the host's image-level embedding (costs the last block where no method needs it)
    exact     run the host's blocks through its own modules: its tokens are then the library's to the last bit; by
              default the same weights run through one fused attention and share q, k, v with the methods (difference
              ≤ 2e-5)
    trace     methods of which the stream after every block is wanted too, in `Features.trace`

    Returns one `Features` a method under the same names. Raises MethodError where a method is deeper than the host,
    or none is given; InputError (from the host) where the pixels do not fit its patches; NotFiniteError where features
    are infinite or not a number.
    """
    if not methods:
        raise MethodError(f"no method given; known: {', '.join(METHODS)}")
    for name, method in methods.items():
        check_depth(method, host, f"method {name!r}")

    host_is_read = pooled or any(method.is_host for method in methods.values())
    beside = {name: method for name, method in methods.items() if not method.is_host}
    lenders = {index for method in beside.values() for index in method.borrows(host.layers)}
    lent: dict[int, Heads] = {}  # their q, k and v
    streams: dict[str, Tensor] = {}  # the second streams that have begun
    traces: dict[str, dict[int, Tensor]] = defaultdict(dict)

    x, grid = host.embed(pixels)
    blocks = host.blocks(grid)
    for index, block in enumerate(blocks):
        here = {name: method for name, method in beside.items() if index >= len(blocks) - method.depth}
        heads = None
        if here or index in lenders:
            normed = block.norm(x)
            heads = block.qkv(normed)
            lent |= {index: heads} if index in lenders else {}
            streams |= {name: x for name in here.keys() - streams.keys() if here[name].residual}
            asked = {method.mixture for method in here.values()}
            site = Site(normed, pixels, grid, host.prefix, len(blocks), lent, asked)
            _advance_streams(block, heads, site, here, streams)
        if host_is_read or index < len(blocks) - 1:
            x = block.forward(x) if exact else _forward_fused(block, x, heads or block.qkv(block.norm(x)))
        for name in trace:
            if name not in beside or name in here:
                traces[name][index + 1] = streams[name] if name in beside else x

    embedding = host.pool(x) if pooled else None
    size = Size(*pixels.shape[-2:])
    layouts = {name: method.layout(grid, host.prefix, size) for name, method in methods.items()}
    tokens = {name: host.project(x if method.is_host else streams[name]) for name, method in methods.items()}
    _check(host, pixels, [*tokens.values(), *([] if embedding is None else [embedding])])
    return {
        name: Features(tokens[name], layouts[name].grid, size, layouts[name].prefix, embedding, trace=traces[name])
        for name in methods
    }


def _check(host: Host, pixels: Tensor, features: Sequence[Tensor]) -> None:
    """Raises NotFiniteError for features that are no numbers; InputError where the pixels are not."""
    try:
        check_finite("features", host, *features)
    except NotFiniteError:
        if not are_finite(pixels):
            raise InputError("pixels are infinite or not a number in places, expected finite floats") from None
        raise


def _forward_fused(block: Block, x: Tensor, heads: Heads) -> Tensor:
    """The host's block in fused kernels: what `block.forward` computes, from q, k, v that are already there."""
    x = block.out(attention.query_key(heads)).add_(x)
    return block.mlp(x).add_(x)


def _advance_streams(
    block: Block, heads: Heads, site: Site, here: Mapping[str, Method], streams: dict[str, Tensor]
) -> None:
    """Add to each stream what its method mixes at this block; equal mixtures (a depth sweep, say) are made once."""
    mixtures: dict[Method, Tensor] = {}
    for name, method in here.items():
        mixture = method.mixture
        if mixture not in mixtures:
            mixtures[mixture] = block.out(method.mixer(method, heads, site))
        stream = streams[name] + mixtures[mixture] if name in streams else mixtures[mixture]
        streams[name] = stream + block.mlp(stream) if method.mlp else stream
