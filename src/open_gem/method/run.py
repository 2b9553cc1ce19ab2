"""The method: reads any number of dense methods out of one untouched forward pass.

Alongside the last blocks of a frozen vision transformer runs a second stream. At each of these blocks it reads what the
host reads, ln_1(x) of the *host's* stream, mixes the values in its own way and adds the result to itself:

    y_{L-d} = x_{L-d}                   (or 0 without residual)
    y_l     = y_{l-1} + out_l(attention(q, k, v of ln_1(x_{l-1})))    [+ mlp_l(y) if the method keeps MLPs]

The host's stream x never sees y. So the host runs once for any number of methods, and CLIP, MaskCLIP, CLIP
Surgery, ClearCLIP and GEM are rows of one table (paper section 4.1; GEM's code sums as above, A.3's moving average is
a slip).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from open_gem.errors import InputError, MethodError, NotFiniteError
from open_gem.method import attention
from open_gem.method.attention import Heads, resize_values
from open_gem.method.steps import VALUES, Step, StepContext
from open_gem.method.table import METHODS, Attention, BlockContext, Method, TokenGrid
from open_gem.method.tower import Block, VisionTower
from open_gem.numerics import are_finite, check_finite, cpu_by_default
from open_gem.tensors import similarity
from open_gem.types import Grid, Size

Text = Tensor | Callable[[Tensor], Tensor]
"""Embeddings of prompts `(p, e)`, or a function that makes them of the patches `(r·k, e)` of an image or window."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """The features that one method makes of images of one size, before any prompt: a value to keep, share and reuse.

    tokens    `(b, prefix + r·k, e)` in the joint space, not normalised
    grid      r×k patches
    size      of the pixels that were encoded
    prefix    number of tokens before the patches
    pooled    `(b, e)`, the host's image-level embedding, not normalised; None if it was not asked for
    original  size of the image that the pixels were made of, if it is known
    trace     if asked for, this method's stream after each of its blocks, by the block's number from 1:
              `(b, prefix + r·k, d)` in the model's own width, before the final norm
    taps      what the method's steps read, see `Step.taps`: `(b, r·k, d)` each, on `grid`
    source    the image itself, if a refinement needs it
    method    whose features these are, if they come from `run`: exemplars are encoded by it too
    """

    tokens: Float[Tensor, "b n e"]
    grid: Grid
    size: Size
    prefix: int = 1
    pooled: Float[Tensor, "b e"] | None = None
    original: Size | None = None
    trace: Mapping[int, Float[Tensor, "b n d"]] = field(default_factory=dict)
    taps: Mapping[Hashable, Float[Tensor, "b m d"]] = field(default_factory=dict)
    source: Image.Image | None = None
    method: Method | None = None

    def image(self, index: int) -> "Encoded":
        """Return the features of one image of the batch, as a batch of one."""
        return self._each(lambda tensor: tensor[index : index + 1])

    @property
    def patches(self) -> Float[Tensor, "b m e"]:
        """Patch features `(b, r·k, e)`, row by row, not normalised."""
        return self.tokens[:, self.prefix :]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def similarity(self, text: Float[Tensor, "p e"]) -> Float[Tensor, "b p r k"]:
        """Return cosines of each patch with `text` `(p, e)`, float32 at least."""
        return similarity(self.patches, text).unflatten(-1, tuple(self.grid))

    def maps(self, text: Text, adjust: Callable[[Tensor], Tensor]) -> Float[Tensor, "q r k"]:
        """Return cosines with `text`, adjusted as `(b, p, r, k)`, as maps of the single image.

        Raises InputError for several images.
        """
        if len(self.tokens) != 1:
            raise InputError(f"{len(self.tokens)} encoded images, expected one: take one by `encoded.image(index)`")
        return adjust(self.similarity(text(self.patches[0]) if callable(text) else text))[0]

    def stepped(self, steps: Sequence[Step]) -> "Encoded":
        """Apply `steps`, image by image; without prefix tokens if there are any steps."""
        if not steps:
            return self
        features = []
        for index, patches in enumerate(self.patches):
            context = StepContext(self.grid, {key: tokens[index] for key, tokens in self.taps.items()})
            features.append(reduce(lambda values, step, context=context: step(values, context), steps, patches))
        return replace(self, tokens=torch.stack(features), prefix=0)

    def to(self, device: torch.device | str) -> "Encoded":
        """Move to another device."""
        return self._each(lambda tensor: tensor.to(device))

    def clone(self) -> "Encoded":
        """Return a copy that shares no memory, such as for one image that must not keep its whole batch alive."""
        return self._each(torch.clone)

    def _tensors(self) -> Iterator[Tensor]:
        yield self.tokens
        if self.pooled is not None:
            yield self.pooled
        yield from (*self.trace.values(), *self.taps.values())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        return replace(
            self,
            tokens=change(self.tokens),
            pooled=None if self.pooled is None else change(self.pooled),
            trace={block: change(tokens) for block, tokens in self.trace.items()},
            taps={key: change(tokens) for key, tokens in self.taps.items()},
        )


def check_depth(method: Method, layers: int, label: str = "the method") -> None:
    """Raise MethodError if the method, called `label`, is deeper than a tower of `layers` blocks, or borrows from
    blocks that come after it."""
    deepest = method.deepest(layers)
    if method.depth > layers:
        raise MethodError(
            f"{label} has depth {method.depth}, but the model has {layers} blocks: expected depth {deepest} at most"
        )
    if method.depth > deepest:
        raise MethodError(
            f"{label} has depth {method.depth}, but borrows from block {layers - deepest + 1} of {layers}: "
            f"expected depth {deepest} at most"
        )


@torch.no_grad()
@cpu_by_default()
def run(
    tower: VisionTower,
    pixels: Float[Tensor, "b 3 y x"],
    methods: Mapping[str, Method],
    *,
    pooled: bool = False,
    exact: bool = False,
    trace: Collection[str] = (),
    regions: Int[Tensor, "b y x"] | None = None,
) -> dict[str, Encoded]:
    """Encode `pixels` once and read every one of `methods` from that pass.

    pixels   `(b, 3, y, x)`, preprocessed, y and x whole multiples of the tower's patch
    methods  name → settings; any number, computed alongside the same host stream. Their `steps` are not applied: they
             come once windows are merged, see `Localizer.encode`
    pooled   also the host's image-level embedding (costs the last block if no method needs it)
    exact    run the host's blocks through the library's own modules: its tokens are then the library's to the last bit;
             by default the same weights run through one fused attention and share q, k, v with the methods (difference
             ≤ 2e-5)
    trace    methods whose stream after every block is wanted too, in `Encoded.trace`
    regions  for methods that take them (CorrCLIP): the number of each pixel's class-agnostic mask, 0 for none

    Returns one `Encoded` a method under the same names. Raises MethodError if a method is deeper than the tower, or
    none is given; InputError (from the tower) if the pixels do not fit its patches; NotFiniteError if features are
    infinite or not a number.
    """
    if not methods:
        raise MethodError(f"no method given; known: {', '.join(METHODS)}")
    for name, method in methods.items():
        if not isinstance(method, Method):
            raise MethodError(f"method {name!r} is {method!r}, expected settings such as METHODS['gem']")
        check_depth(method, tower.layers, f"method {name!r}")

    needs_host = pooled or any(method.is_host for method in methods.values())
    beside = {name: method for name, method in methods.items() if not method.is_host}
    lenders = {index for method in beside.values() for index in method.attention.borrows(tower.layers)}
    read = {name: {key for step in method.steps for key in step.taps(tower.layers)} for name, method in methods.items()}
    tapped = set().union(*read.values(), *(method.attention.taps(tower.layers) for method in beside.values()))
    borrowed: dict[int, Heads] = {}  # q, k and v of the lenders
    streams: dict[str, Tensor] = {}  # the second streams that have started
    traces: dict[str, dict[int, Tensor]] = defaultdict(dict)
    taps: dict[Hashable, Tensor] = {}  # of patches and other tokens

    x, grid = tower.embed(pixels)
    blocks = tower.blocks(grid)
    if 0 in tapped:
        taps[0] = x
    for index, block in enumerate(blocks):
        active = {name: method for name, method in beside.items() if index >= len(blocks) - method.depth}
        heads = None
        if active or index in lenders or (VALUES in tapped and index == len(blocks) - 1):
            normed = block.norm(x)
            heads = block.qkv(normed)
            if index in lenders:
                borrowed[index] = heads
            streams |= {name: x for name in active.keys() - streams.keys() if active[name].residual}
            context = BlockContext(normed, pixels, grid, tower.prefix, len(blocks), borrowed, taps, blocks, regions)
            if VALUES in tapped and index == len(blocks) - 1:
                taps[VALUES] = heads.v.transpose(1, 2).flatten(2)
            _advance_streams(block, heads, context, active, streams)
        if needs_host or index < len(blocks) - 1 or index + 1 in tapped:
            x = block.forward(x) if exact else _forward_fused(block, x, heads or block.qkv(block.norm(x)))
        if index + 1 in tapped:
            taps[index + 1] = x
        for name in trace:
            if name not in beside or name in active:
                traces[name][index + 1] = streams[name] if name in beside else x

    embedding = tower.pool(x) if pooled else None
    size = Size(*pixels.shape[-2:])
    guides: dict[Hashable, tuple[Tensor, Grid]] = {
        key: (key.projections(pixels)[-1], key.grid_for(size))  # pyright: ignore[reportAttributeAccessIssue]
        for key in tapped
        if key != VALUES and not isinstance(key, int)
    }
    encoded = {}
    for name, method in methods.items():
        layout = method.attention.layout(size) or TokenGrid(grid, tower.prefix)
        count = layout.grid.patches + layout.prefix
        tokens = method.attention.merge(tower.project(x if method.is_host else streams[name]), count)
        own_taps = {}
        for key in read[name]:
            tapped_tokens, lies_on = guides[key] if key in guides else (taps[key][:, tower.prefix :], grid)
            own_taps[key] = resize_values(tapped_tokens[:, None], lies_on, layout.grid)[:, 0]
        encoded[name] = Encoded(
            tokens, layout.grid, size, layout.prefix, embedding, trace=traces[name], taps=own_taps, method=method
        )
    pooled_too = [] if embedding is None else [embedding]
    _check_finite(tower, pixels, [*(features.tokens for features in encoded.values()), *pooled_too])
    return encoded


def _check_finite(tower: VisionTower, pixels: Tensor, features: Sequence[Tensor]) -> None:
    """Raise NotFiniteError for features that are not finite; InputError if the pixels are not."""
    try:
        check_finite("features", tower, *features)
    except NotFiniteError:
        if not are_finite(pixels):
            raise InputError("pixels are infinite or not a number in places, expected finite floats") from None
        raise


def _forward_fused(block: Block, x: Tensor, heads: Heads) -> Tensor:
    """Run the host's block in fused kernels: what `block.forward` computes, from existing q, k and v."""
    x = block.out(attention.query_key(heads)).add_(x)
    return block.mlp(x).add_(x)


def _advance_streams(
    block: Block, heads: Heads, context: BlockContext, active: Mapping[str, Method], streams: dict[str, Tensor]
) -> None:
    """Add to each stream what its method mixes at this block; equal attentions are computed once."""

    def mixed_by(attention: Attention) -> Tensor:
        return context.cached(("out", attention), lambda: attention.update(block, heads, context))

    for name, method in sorted(active.items(), key=lambda pair: pair[1].attention.order):
        mixed = mixed_by(method.attention)
        stream = streams[name] + mixed if name in streams else mixed
        streams[name] = stream + block.mlp(stream) if method.mlp else stream
