"""From patch features to heatmaps, masks, boxes, points and label maps: pure functions, no state.

Maps are `(p, r, k)` on the patch grid and `(p, y, x)` at pixel size; everything that grows with pixels × prompts is
made one prompt at a time.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from open_gem.types import Size


class Boxes(NamedTuple):
    """Boxes of one prompt, best first: `xyxy` `(m, 4)` int pixels, right/bottom exclusive; `scores` `(m,)` the highest
    cosine inside each."""

    xyxy: Tensor
    scores: Tensor


def similarity(patches: Tensor, text: Tensor) -> Tensor:
    """Cosine in [-1, 1] of every patch with every text: `(..., n, e)`, `(p, e)` → `(..., p, n)`, float32 at least."""
    patches, text = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in (patches, text))
    return normalize(text, dim=-1) @ normalize(patches, dim=-1).transpose(-2, -1)


def upsample(grid_map: Tensor, size: Size) -> Tensor:
    """Bilinear (corners not aligned), as the published code: `(r, k)` → `(y, x)`, or `(p, r, k)` → `(p, y, x)`.

    In float32 at least: half precision would make steps of what should be slopes.
    """
    maps = grid_map.reshape(1, -1, *grid_map.shape[-2:])
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False).reshape(
        *grid_map.shape[:-2], *size
    )


def min_max(heatmap: Tensor) -> Tensor:
    """Stretch one map `(y, x)` to [0, 1]; a constant map, where nothing stands out, becomes 0."""
    low, high = heatmap.aminmax()
    # Interpolation weights add up to 1 only nearly, so a constant patch map comes here with noise in its last digits.
    noise = 8 * torch.finfo(heatmap.dtype).eps * torch.maximum(low.abs(), high.abs())
    return (heatmap - low) / (high - low) if high - low > noise else torch.zeros_like(heatmap)


def peak(heatmap: Tensor) -> tuple[int, int]:
    """Where a map `(y, x)` is highest, as `(x, y)` in pixels; the first in reading order among equals."""
    y, x = divmod(int(heatmap.argmax()), heatmap.shape[-1])
    return x, y


def component_boxes(mask: Tensor, heatmap: Tensor) -> Boxes:
    """A box around each 8-connected component of `mask` `(y, x)`, scored by the highest value of `heatmap` in it."""
    labels = np.empty(tuple(mask.shape), dtype=np.int32)
    ndimage.label(mask.cpu().numpy(), structure=np.ones((3, 3)), output=labels)
    found = ndimage.find_objects(labels)
    values = heatmap.float().cpu().numpy()
    boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in found]
    scores = ndimage.maximum(values, labels, range(1, len(found) + 1)) if found else []
    return _sorted(Boxes(torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4), torch.tensor(np.array(scores)).float()))


def whole_box(mask: Tensor, heatmap: Tensor) -> Boxes:
    """One box around all of `mask` `(y, x)`, scored likewise; none where the mask is empty."""
    ys, xs = torch.nonzero(mask, as_tuple=True)
    if not len(ys):
        return Boxes(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0))
    box = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    return Boxes(box[None].cpu(), heatmap[mask].max()[None].float().cpu())


def _sorted(boxes: Boxes) -> Boxes:
    order = boxes.scores.argsort(descending=True, stable=True)
    return Boxes(boxes.xyxy[order], boxes.scores[order])


def segment(grid_logits: Tensor, size: Size, background: float | None) -> Tensor:
    """The most probable prompt of each pixel: logits `(p, r, k)` → labels `(y, x)` int64, −1 for background.

    Logits are upsampled first and softmax-normalised over prompts then; a pixel whose best probability is below
    `background` is background (PascalVOC protocol of the paper). The softmax runs over prompts in one pass that keeps
    three maps.
    """
    best = torch.full(tuple(size), -torch.inf, device=grid_logits.device)
    label = torch.zeros(tuple(size), dtype=torch.int64, device=grid_logits.device)
    mass = torch.zeros_like(best)  # Σ exp(logit − best) of the prompts seen so far
    for index, grid_logit in enumerate(grid_logits.float()):
        logit = upsample(grid_logit, size)
        higher = torch.maximum(best, logit)
        if background is not None:
            mass = mass * (best - higher).exp() + (logit - higher).exp()
        label.masked_fill_(logit > best, index)
        best = higher
    return label if background is None else label.masked_fill_(1 / mass < background, -1)
