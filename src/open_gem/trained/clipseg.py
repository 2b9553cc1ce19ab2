"""CLIPSeg (Lüddecke & Ecker 2022), trained on masks with phrases."""

from typing import Any

import torch
from torch import Tensor

from open_gem.trained.base import Grounding, Trained
from open_gem.types import Size

DECODED = 32  # prompts that are decoded at a time: bounds memory when there are hundreds


class CLIPSeg(Trained):
    """A decoder on CLIP, conditioned on one prompt, gives a probability a pixel.

    Pictures are squashed to its square (352×352), and the map is as large. The score of a prompt is the map's highest
    probability: the decoder was also trained on prompts that are absent, where all of the map is to be 0.
    """

    @property
    def size_rule(self) -> str:
        return f"square:{self.images.size['height']}"

    @property
    def _texts(self) -> Any:
        return self.model.clip

    def _ground(self, pixels: Tensor, size: Size, text: Tensor) -> Grounding:
        states = self.model.clip.get_image_features(pixels, output_hidden_states=True).hidden_states
        activations = [states[layer + 1] for layer in self.model.extract_layers]  # the first state is before layer 0
        # The decoder broadcasts the one picture over the prompts: it is encoded once, however many there are.
        logits = torch.cat([self.model.decoder(activations, part).logits for part in text.split(DECODED)])
        similarity = logits.float().sigmoid()
        return Grounding(similarity, similarity.amax((1, 2)))
