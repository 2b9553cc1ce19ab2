"""Boxes that a model predicts: in whole pixels, the best of a prompt, and a map made of them."""

import torch
from torch import Tensor

from open_gem.readout import Boxes
from open_gem.types import Grid, Size

BOXES = 100  # best boxes of a prompt that are kept: a model predicts hundreds or thousands for every prompt


def whole_pixels(boxes: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Clip boxes `(m, 4)` to the image and round them, int64; also return which of them hold a pixel of it."""
    height, width = size
    xyxy = (
        boxes.round()
        .long()
        .clamp(min=0)
        .minimum(torch.tensor([width, height, width, height], dtype=torch.int64, device="cpu"))
    )
    return xyxy, (xyxy[:, :2] < xyxy[:, 2:]).all(1)


def best_boxes(xyxy: Tensor, scores: Tensor) -> Boxes:
    """Return the `BOXES` with the highest scores, best first."""
    kept = scores.argsort(descending=True, stable=True)[:BOXES]
    return Boxes(xyxy[kept], scores[kept])


def highest(scores: Tensor) -> Tensor:
    """Return the first score, or 0 if there is none."""
    return scores[0] if len(scores) else scores.new_zeros(())


def paint(boxes: Boxes, size: Size, grid: Grid) -> Tensor:
    """Return the highest score of a box in each cell of `grid` over an image of `size`, 0 without one: `(r, k)`.

    Edges move to those of the nearest cells; no box is less than one cell.
    """
    scale = [grid.cols / size.width, grid.rows / size.height]
    cells = torch.tensor(scale, dtype=torch.float32, device="cpu").repeat(2)
    left, top, right, bottom = (boxes.xyxy * cells).round().T[..., None]
    row, col = (torch.arange(count, dtype=torch.int64, device="cpu") for count in grid)
    in_rows = (row >= top.clamp(max=grid.rows - 1)) & (row < torch.maximum(bottom, top + 1))
    in_cols = (col >= left.clamp(max=grid.cols - 1)) & (col < torch.maximum(right, left + 1))
    covered = in_rows[:, :, None] & in_cols[:, None, :]
    painted = torch.where(covered, boxes.scores[:, None, None], 0.0)
    return torch.cat([painted, torch.zeros(1, *grid, dtype=painted.dtype, device="cpu")]).amax(0)
