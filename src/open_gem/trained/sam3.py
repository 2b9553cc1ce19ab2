"""SAM 3 (Carion et al. 2025), trained on masks of four million concepts."""

from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor

from open_gem.numerics import check_finite
from open_gem.towers.hf_text import HfText
from open_gem.trained.base import Grounding, TrainedModel
from open_gem.types import Size


class Sam3Text(HfText):
    """SAM 3's text encoder: a row holds the features of all tokens of a prompt, each followed by 1 or, if it is
    padding, by 0. Prompts are noun phrases."""

    padding = "max_length"

    def embed(self, tokens: dict[str, Tensor]) -> Tensor:
        features = self.model.get_text_features(**tokens).pooler_output
        return torch.cat([features, tokens["attention_mask"][..., None].to(features)], dim=-1).flatten(1)


class SAM3(TrainedModel):
    """A map of a concept, masks of its instances, and the probability that it is in the image at all.

    The value of a pixel is the highest of the semantic map and of each instance's mask times its score, multiplied by
    the presence: all are probabilities (K. Li et al., "SegEarth-OV3", 2025). Images are squashed to the model's square,
    and maps have a cell for every 3.5 of its pixels. The score of a prompt is its presence. The image is encoded once
    for all prompts.
    """

    template = "{}"
    text_reader = Sam3Text
    averages_templates: ClassVar[bool] = False

    @property
    def size_rule(self) -> str:
        return f"square:{self.processor.size['height']}"

    def predict(self, vision: object, row: Tensor) -> SimpleNamespace:
        """Return the library's answer for one prompt.

        vision  what the model's `get_vision_features` makes of the image
        row     of `text`
        """
        packed = row.unflatten(-1, (-1, self.model.text_projection.out_features + 1))[None]
        text, attention = SimpleNamespace(pooler_output=packed[..., :-1]), packed[..., -1].bool()
        return self.model(vision_embeds=vision, text_embeds=text, attention_mask=attention)

    def _ground(self, pixels: Tensor, size: Size, text: Tensor) -> Grounding:
        vision = self.model.get_vision_features(pixels)
        maps, scores = [], []
        for row in text:
            answer = self.predict(vision, row)
            presence, instance = answer.presence_logits.float().sigmoid()[0, 0], answer.pred_logits.float().sigmoid()[0]
            check_finite("maps", self, answer.semantic_seg, answer.pred_masks)
            instances = answer.pred_masks[0].float().sigmoid() * instance[:, None, None]
            semantic = answer.semantic_seg[0, 0].float().sigmoid()
            maps.append(torch.maximum(semantic, instances.amax(dim=0)) * presence)
            scores.append(presence)
        return Grounding(torch.stack(maps), torch.stack(scores))
