"""Models that were trained to localize, with random weights: the cost of a pass does not depend on them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

TOKENS = 16  # tokens of a prompt: OWL-ViT pads prompts of a few words to so many


class _RandomSpec(NamedTuple):
    """One kind of model: names of its classes in transformers, the side of its images in pixels, and its forward pass
    `(model, pixels (b, 3, y, x), tokens (p, t))`."""

    config: str
    model: str
    side: int
    forward: Callable[[Any, Tensor, Tensor], Any]


def _clipseg(model: Any, pixels: Tensor, tokens: Tensor) -> Any:
    """Run CLIPSeg, which expects each image once a prompt."""
    texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return [model(pixel_values=image.expand(len(tokens), -1, -1, -1), **texts) for image in pixels]


def _groupvit(model: Any, pixels: Tensor, tokens: Tensor) -> Any:
    texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return model(pixel_values=pixels, output_segmentation=True, **texts)


def _owlv2(model: Any, pixels: Tensor, tokens: Tensor) -> Any:
    return [model(pixel_values=image[None], input_ids=tokens) for image in pixels]


_KINDS = {
    "clipseg": _RandomSpec("CLIPSegConfig", "CLIPSegForImageSegmentation", 352, _clipseg),
    "groupvit": _RandomSpec("GroupViTConfig", "GroupViTModel", 224, _groupvit),
    "owlv2": _RandomSpec("Owlv2Config", "Owlv2ForObjectDetection", 768, _owlv2),
}


def forward_pass(name: str, images: int, prompts: int) -> Callable[[], Any]:
    """Return a function that runs transformers' default "clipseg", "groupvit" or "owlv2" once, as its documentation
    does: on random images of its own size, each with all of `prompts` random prompts."""
    kind = _KINDS[name]
    config = getattr(transformers, kind.config)()
    model = getattr(transformers, kind.model)(config).eval()
    pixels = torch.randn(images, 3, kind.side, kind.side, dtype=torch.float32, device="cpu")
    tokens = torch.randint(1, 1000, (prompts, TOKENS), dtype=torch.int64, device="cpu")
    tokens[:, -1] = config.text_config.vocab_size - 1  # the token at the end of a text
    return lambda: kind.forward(model, pixels, tokens)
