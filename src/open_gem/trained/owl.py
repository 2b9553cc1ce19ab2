"""OWLv2 and OWL-ViT (Minderer et al. 2023, 2022), trained on boxes with names."""

from math import isqrt
from types import SimpleNamespace

import torch
from torch import Tensor

from open_gem.numerics import check_finite
from open_gem.readout import Boxes
from open_gem.trained.base import Grounding, TrainedModel
from open_gem.types import Grid, Size

BOXES = 100  # best boxes of a prompt that are kept: the model predicts one a patch, thousands, for every prompt


class OWL(TrainedModel):
    """A box a patch, and its probability of showing each prompt.

    Images are padded to a square at the bottom and right (OWLv2) or squashed (OWL-ViT). Each prompt is judged alone: it
    has its `BOXES` most probable boxes, independent of the others. Nothing is suppressed, since the model was
    trained to predict an object once. Edges are rounded to whole pixels; boxes outside the image are left out. The map
    has cells as large as the model's patches; a cell's value is the highest score of a box that covers it, or 0. The
    score of a prompt is that of its best box.
    """

    template = "a photo of a {}"
    predicts_boxes = True

    @property
    def size_rule(self) -> str:
        side = self.processor.size["height"]
        return f"pad:{side}" if getattr(self.processor, "do_pad", False) else f"square:{side}"

    def predict(self, pixels: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the library's answers for prepared pixels `(1, 3, y, x)`: logits `(1, rk, p)` of prompts, and boxes
        `(1, rk, 4)` as centre x, centre y, width and height, in parts of the model's square; float32."""
        features = self.model.image_embedder(pixels)[0]
        patches = features.flatten(1, 2)
        logits = self.model.class_predictor(patches, text[None])[0]
        return logits.float(), self.model.box_predictor(patches, features).float()

    def _ground(self, pixels: Tensor, size: Size, text: Tensor) -> Grounding:
        logits, boxes = self.predict(pixels, text)
        predicted = SimpleNamespace(logits=logits, pred_boxes=boxes)
        check_finite("maps", self, logits, boxes)
        [result] = self.processor.post_process_object_detection(predicted, threshold=-1.0, target_sizes=[tuple(size)])
        xyxy, inside = _whole_pixels(result["boxes"].cpu(), size)
        best = [_best(xyxy[inside], scores[inside]) for scores in logits[0].sigmoid().T.cpu()]
        side, longest = isqrt(logits.shape[1]), max(size)
        grid = Grid(*(max(1, round(side * edge / longest)) for edge in size))
        similarity = torch.stack([paint(boxes, size, grid) for boxes in best]).to(self.device)
        return Grounding(similarity, torch.stack([_highest(boxes.scores) for boxes in best]).to(self.device), (*best,))


def _whole_pixels(boxes: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Clip boxes `(m, 4)` to the image and round them, int64; also return which of them hold a pixel of it."""
    height, width = size
    xyxy = (
        boxes.round()
        .long()
        .clamp(min=0)
        .minimum(torch.tensor([width, height, width, height], dtype=torch.int64, device="cpu"))
    )
    return xyxy, (xyxy[:, :2] < xyxy[:, 2:]).all(1)


def _best(xyxy: Tensor, scores: Tensor) -> Boxes:
    kept = scores.argsort(descending=True, stable=True)[:BOXES]
    return Boxes(xyxy[kept], scores[kept])


def _highest(scores: Tensor) -> Tensor:
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
