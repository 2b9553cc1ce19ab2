"""Two rules about tensors that everything keeps."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.numerics import without_autocast


def at_least_float32(values: Tensor) -> Tensor:
    """The same in float32 at least: sums and norms in half precision lose what they are about."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@without_autocast()
def similarity(patches: Tensor, text: Tensor) -> Tensor:
    """Cosine in [-1, 1] of every patch with every text: `(..., n, e)`, `(p, e)` → `(..., p, n)`, float32 at least."""
    patches, text = map(at_least_float32, (patches, text))
    return normalize(text, dim=-1) @ normalize(patches, dim=-1).transpose(-2, -1)
