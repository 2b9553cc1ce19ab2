"""CLIPSeg (Lüddecke & Ecker 2022), trained on masks with captions of objects."""

import torch
from torch import Tensor

from open_gem.trained.base import Grounding, TrainedModel
from open_gem.types import Size

DECODED = 32  # prompts that are decoded at a time: bounds memory when there are hundreds


class CLIPSeg(TrainedModel):
    """A decoder on CLIP, conditioned on one prompt, gives a probability a pixel.

    Images are squashed to its square (352×352), and the map is as large. The score of a prompt is the map's highest
    probability: the decoder was also trained on absent prompts, for which the map is 0 everywhere.
    """

    @property
    def size_rule(self) -> str:
        return f"square:{self.processor.size['height']}"

    def _ground(self, pixels: Tensor, size: Size, text: Tensor) -> Grounding:
        states = self.model.clip.get_image_features(pixels, output_hidden_states=True).hidden_states
        activations = [states[layer + 1] for layer in self.model.extract_layers]  # the first state is before layer 0
        # The decoder broadcasts the image over the prompts, so it is encoded once.
        logits = torch.cat([self.model.decoder(activations, part).logits for part in text.split(DECODED)])
        similarity = logits.float().sigmoid()
        return Grounding(similarity, similarity.amax((1, 2)))
