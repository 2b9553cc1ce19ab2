"""Two rules about tensors that everything keeps."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.numerics import without_autocast


def at_least_float32(values: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """The same in float32 at least: sums and norms in half precision lose what they are about."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@without_autocast()
def similarity(patches: Float[Tensor, "*b n e"], text: Float[Tensor, "p e"]) -> Float[Tensor, "*b p n"]:
    """Cosine in [-1, 1] of every patch with every text: `(..., n, e)`, `(p, e)` → `(..., p, n)`, float32 at least."""
    patches, text = map(at_least_float32, (patches, text))
    return normalize(text, dim=-1) @ normalize(patches, dim=-1).transpose(-2, -1)
