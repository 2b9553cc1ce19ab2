"""What crisp masks cost beside the plain forward pass of a ViT-B/16 at 448 pixels.

Segment Anything models of their real sizes have random weights here: the cost does not depend on them.

    python benchmarks/crisp.py [turns] [names]

Cases take turns. An image is encoded once; then regions are drawn, each with a box, a point and the map.
"""

import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image

from open_gem.localization.crisp import Region
from open_gem.refine.sam import SEGMENTERS, PromptedModel, box_prompts

SIZES = {"SAM ViT-B": "sam", "SAM 2.1 tiny": "sam2", "EdgeTAM": "edgetam"}
REPVIT = {  # EdgeTAM's backbone, which its default configuration does not have
    "model_type": "timm_wrapper",
    "architecture": "repvit_m1",
    "num_classes": 2,
    "initializer_range": 0.02,
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
}
PARTS = {"edgetam": {"vision_config": {"model_type": "edgetam_vision_model", "backbone_config": REPVIT}}}
SIDES = (480, 640)  # height and width of the image


def random_model(kind: str) -> PromptedModel:
    """A model of the size of the checkpoints that the guide names."""
    spec = SEGMENTERS[kind]
    model = getattr(transformers, spec.model)(transformers.AutoConfig.for_model(kind, **PARTS.get(kind, {}))).eval()
    return PromptedModel(kind, model, getattr(transformers, spec.processor)())


def main(turns: int = 3, *names: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIDES, 3), dtype=np.uint8))
    host = open_clip.create_model("ViT-B-16", force_image_size=448).eval()
    pixels, confidence = torch.randn(1, 3, 448, 448), torch.rand(SIDES)
    square = Region((slice(100, 300), slice(100, 300)), np.ones((200, 200), bool), (200, 200))
    cases: dict[str, Callable[[], object]] = {"plain ViT-B/16": lambda: host.encode_image(pixels)}  # pyright: ignore[reportCallIssue]
    for name, kind in SIZES.items():
        if names and name not in names:
            continue
        model = random_model(kind)
        weights = sum(weight.numel() for weight in model.model.parameters())
        encoded = model.encode(image)
        print(f"{name}: {weights / 1e6:.0f} M parameters", flush=True)
        cases[f"{name}, encoding"] = lambda model=model: model.encode(image)
        for count in (1, 16):
            prompt = box_prompts([square] * count, confidence)
            cases[f"{name}, {count} regions"] = lambda model=model, encoded=encoded, prompt=prompt: [
                model.upsample(mask[0], encoded) for mask in model.predict(encoded, prompt, several=False)[0]
            ]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for _ in range(turns):
            for name, work in cases.items():
                start = perf_counter()
                work()
                seconds[name].append(perf_counter() - start)
    plain = median(seconds["plain ViT-B/16"])
    for name, own in seconds.items():
        times = ", ".join(f"{1000 * value:.0f}" for value in own)
        print(f"{name}: {1000 * median(own):.0f} ms ({times}), {median(own) / plain:.2f} x plain")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, *sys.argv[2:])
