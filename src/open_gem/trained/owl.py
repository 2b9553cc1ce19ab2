"""OWLv2 and OWL-ViT (Minderer et al. 2023, 2022), trained on boxes with names."""

from math import isqrt
from types import SimpleNamespace

import torch
from torch import Tensor

from open_gem.numerics import check_finite
from open_gem.trained.base import Grounding, TrainedModel
from open_gem.trained.boxes import best_boxes, highest, paint, whole_pixels
from open_gem.types import Grid, Size


class OWL(TrainedModel):
    """A box a patch, and its probability of showing each prompt.

    Images are padded to a square at the bottom and right (OWLv2) or squashed (OWL-ViT). Each prompt is judged alone: it
    has its 100 most probable boxes (`boxes.BOXES`), independent of the others. Nothing is suppressed, since the model
    was trained to predict an object once. Edges are rounded to whole pixels; boxes outside the image are left out. The
    map has cells as large as the model's patches; a cell's value is the highest score of a box that covers it, or 0.
    The score of a prompt is that of its best box.
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
        xyxy, inside = whole_pixels(result["boxes"].cpu(), size)
        best = [best_boxes(xyxy[inside], scores[inside]) for scores in logits[0].sigmoid().T.cpu()]
        side, longest = isqrt(logits.shape[1]), max(size)
        grid = Grid(*(max(1, round(side * edge / longest)) for edge in size))
        similarity = torch.stack([paint(boxes, size, grid) for boxes in best]).to(self.device)
        return Grounding(similarity, torch.stack([highest(boxes.scores) for boxes in best]).to(self.device), (*best,))
