"""The interface of a vision tower, block by block, that the method section needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from open_gem.method.attention import Heads
from open_gem.types import Grid, Size


@dataclass(frozen=True)
class Block:
    """One block of a vision tower as functions over its frozen weights.

    norm     tokens `(b, n, d)` → ln_1 of them
    qkv      normed tokens → `Heads`
    out      heads `(b, h, n, c)` → tokens, by the output projection and layer scale
    mlp      tokens → ls_2(mlp(ln_2(tokens))), without the residual
    forward  tokens → tokens through the library's own module, exactly as trained
    """

    norm: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], Heads]
    out: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], Tensor]


class VisionTower(ABC):
    """A frozen vision transformer. Axes as in `types`.

    patch   rows and columns of a patch, in pixels
    prefix  number of tokens before the patches (1 for [CLS])
    layers  number of blocks
    """

    patch: tuple[int, int]
    prefix: int
    layers: int

    @abstractmethod
    def embed(self, pixels: Float[Tensor, "b 3 y x"]) -> tuple[Float[Tensor, "b n d"], Grid]:
        """Embed pixels `(b, 3, y, x)`, whole patches a side → tokens `(b, n, d)` for the first block, and their grid.

        Pixels come from any device and in any float type. Raises InputError if they do not fit.
        """

    @abstractmethod
    def blocks(self, grid: Grid) -> Sequence[Block]:
        """Return the blocks, for tokens on `grid` (which matters if attention itself knows positions)."""

    @abstractmethod
    def project(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """Project each token to the joint space: `(b, n, d)` → `(b, n, e)`, not normalised.

        What the head makes of that token alone. Where it takes a token or the mean of tokens, that is its norm and
        projection; if it pools by attention, see `docs/explanation/joint-space.md`.
        """

    @abstractmethod
    def pool(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b e"]:
        """Pool tokens to the image-level embedding as trained: `(b, n, d)` → `(b, e)`, not normalised."""


@runtime_checkable
class Guide(Protocol):
    """Another vision model that says which patches of a host's image belong together, such as a DINO. Hashable."""

    def grid_for(self, size: Size) -> Grid:
        """Return the grid of this model's patches for the host's pixels, of `size`."""
        ...

    def tokens(self, pixels: Float[Tensor, "b 3 y x"]) -> Float[Tensor, "b n e"]:
        """Return patch tokens after the last block, `(b, r·k, e)`, of the host's pixels as the host has them."""
        ...

    def projections(
        self, pixels: Float[Tensor, "b 3 y x"]
    ) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b n e"], Float[Tensor, "b n e"]]:
        """Return q, k and v of the last block's attention, all heads side by side, `(b, r·k, e)` each."""
        ...
