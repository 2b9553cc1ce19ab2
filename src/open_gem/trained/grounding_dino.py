"""Grounding DINO (Liu et al. 2023), trained on boxes with names and captions."""

from copy import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from open_gem.numerics import check_finite, torch_defaults
from open_gem.towers.hf_text import HfText
from open_gem.trained.base import Grounding, TrainedModel
from open_gem.trained.boxes import best_boxes, highest, paint, whole_pixels
from open_gem.types import Grid, Size

STRIDE = 8  # pixels of the resized image for a cell of the model's finest features, and of the map


class GroundingText(HfText):
    """The tokens of a prompt: text and image meet in the model's first layer, so there is no embedding of a text alone.
    A row has their numbers, and −1 beyond the last."""

    @property
    def length(self) -> int:
        return self.model.config.max_text_len

    def clean(self, text: str) -> str:
        return text.lower()

    def embed(self, tokens: dict[str, Tensor]) -> Tensor:
        numbers = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -1)
        return pad(numbers.float(), (0, self.length - numbers.shape[1]), value=-1)


class GroundingDINO(TrainedModel):
    """Boxes of the whole image, and the probability that each shows the prompt.

    A prompt is a caption by itself, "cat.", so none depends on the others; the image's features are computed once for
    all. A box's score is the highest over the caption's tokens, as in the library's post-processing. As of OWL, a
    prompt has its 100 most probable boxes (`boxes.BOXES`), edges are rounded to whole pixels, and a cell of the map has
    the highest score of a box that covers it, or 0. The score of a prompt is that of its best box.
    """

    template = "{}."
    text_reader = GroundingText
    averages_templates: ClassVar[bool] = False

    @property
    def size_rule(self) -> str:
        size = self.processor.size
        return f"short:{size['shortest_edge']}, at most {size['longest_edge']}"

    def predict(self, model: Any, pixels: Tensor, row: Tensor) -> Any:
        """Return the library's answer for one prompt.

        model   the library's, or what `_seen` makes of it
        pixels  `(1, 3, y, x)`, prepared
        row     of `text`
        """
        return model(pixel_values=pixels, input_ids=row[row >= 0].long()[None])

    @torch_defaults()  # the library names no type for positions of tokens
    def _ground(self, pixels: Tensor, size: Size, text: Tensor) -> Grounding:
        seen = _seen(self.model, pixels)
        best = []
        for row in text:
            answer = self.predict(seen, pixels, row)
            scores = answer.logits[0].float().sigmoid().amax(dim=-1).cpu()
            boxes = answer.pred_boxes[0].float().cpu()
            check_finite("maps", self, scores, boxes)
            middle, sides = boxes[:, :2], boxes[:, 2:] / 2
            pixel = torch.tensor([size.width, size.height] * 2, dtype=torch.float32, device="cpu")
            xyxy, inside = whole_pixels(torch.cat([middle - sides, middle + sides], dim=1) * pixel, size)
            best.append(best_boxes(xyxy[inside], scores[inside]))
        grid = Grid(*(max(1, round(side / STRIDE)) for side in pixels.shape[-2:]))
        similarity = torch.stack([paint(boxes, size, grid) for boxes in best])
        scores = torch.stack([highest(boxes.scores) for boxes in best])
        return Grounding(similarity.to(self.device), scores.to(self.device), (*best,))


class _Seen(nn.Module):
    """In place of a backbone: the features that it gave for an image."""

    def __init__(self, backbone: Any, pixels: Tensor):
        super().__init__()
        mask = torch.ones(1, *pixels.shape[-2:], dtype=torch.int64, device=pixels.device)
        self.features, self.positions = backbone(pixels, mask)
        self.position_embedding = backbone.position_embedding  # for a level that the library adds

    def forward(self, *image: Tensor) -> tuple[Any, Any]:
        return list(self.features), list(self.positions)  # the library appends to them


def _seen(model: Any, pixels: Tensor) -> Any:
    """Return the model as it is, but with the features of one image in place of its backbone; weights are shared."""
    inner = _with(model.model, "backbone", _Seen(model.model.backbone, pixels))
    return _with(model, "model", inner)


def _with(module: Any, name: str, part: nn.Module) -> Any:
    """Return a module with another part, which shares all others."""
    other = copy(module)
    other._modules = {**module._modules, name: part}
    return other
