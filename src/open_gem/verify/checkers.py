"""How a published number is computed here. Each kind loads the model as open_gem does, prepares the image as the source
did, and gives numbers in the order in which they were published."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from open_gem import towers
from open_gem.images.pixels import Preprocess, size_of, to_pixels
from open_gem.method.run import run
from open_gem.method.table import METHODS
from open_gem.refine.sam import Prompt, PromptedModel, load_prompted
from open_gem.towers.dino import Expert, load_expert
from open_gem.trained.base import TrainedModel
from open_gem.trained.owl import OWL
from open_gem.trained.registry import load_trained
from open_gem.types import Size

HOST = {"host": METHODS["clip"]}


class Framing(NamedTuple):
    """How a source brought an image to the size that the model sees.

    side  of the square in pixels
    edge  the shorter side is resized to this, and the square is cropped from the centre; None: squashed to the square
    """

    side: int
    edge: int | None = None

    def pixels(self, image: Image.Image, preprocess: Preprocess) -> Tensor:
        """Normalised pixels `(1, 3, side, side)` of an RGB image."""
        if self.edge is None:
            return to_pixels(image, Size(self.side, self.side), preprocess)[None]
        sides = size_of(image)
        size = Size(*(int(self.edge * side / min(sides)) for side in sides))  # rounded down, as libraries do
        top, left = ((side - self.side) // 2 for side in size)
        return to_pixels(image, size, preprocess)[None, :, top : top + self.side, left : left + self.side]


CROPPED = Framing(224, 224)  # as CLIP's own


@dataclass(frozen=True, kw_only=True)
class Published(ABC):
    """One published group of numbers.

    checkpoint  what `open_gem.load` takes as name, and `pretrained` as tag
    repository  of the Hugging Face hub that has the weights; "" if the checkpoint is called like it
    image       a key of `images.URLS` or `images.DRAWN`
    compared    what the numbers are, for people
    expected    the numbers
    tolerance   largest absolute difference that passes: the source's own, or wider for the reason beside it
    source      the file that has them
    certainty   "A": asserted by a test suite; "B": stated by a converter, a README or a page of documentation; "C": a
                condition is unknown, so that the difference is shown and not judged
    """

    kind: ClassVar[str]

    checkpoint: str
    pretrained: str | None = None
    repository: str = ""
    image: str
    compared: str
    expected: tuple[float, ...]
    tolerance: float
    source: str
    certainty: str = "A"

    @property
    def name(self) -> str:
        """The checkpoint for people."""
        return ", ".join(filter(None, (self.checkpoint, self.pretrained)))

    @abstractmethod
    def load(self, **where: Any) -> Any:
        """Load the model; errors as `open_gem.load`."""

    @abstractmethod
    def measure(self, model: Any, image: Image.Image) -> Tensor:
        """Return the numbers of a loaded model, as many as `expected`."""


@dataclass(frozen=True, kw_only=True)
class Scores(Published):
    """Image-level scores of prompts.

    prompts  whole texts, without a template
    framing  of the image
    output   "logits", "softmax", "sigmoid" or "cosine"
    """

    kind = "scores"

    prompts: tuple[str, ...]
    framing: Framing = CROPPED
    output: str = "logits"

    def load(self, **where: Any) -> Any:
        return towers.load(self.checkpoint, self.pretrained, **where)

    def cosines(self, model: Any, image: Image.Image) -> Tensor:
        """Cosine of the image with each prompt, `(p,)`."""
        pixels = self.framing.pixels(image, model.preprocess).to(model.device, model.dtype)
        pooled = run(model.vision, pixels, HOST, pooled=True)["host"].pooled
        assert pooled is not None
        return (normalize(pooled.float(), dim=-1) @ model.encode_text(self.prompts).T)[0]

    @torch.no_grad()
    def measure(self, model: Any, image: Image.Image) -> Tensor:
        cosines = self.cosines(model, image)
        if self.output == "cosine":
            return cosines
        logits = cosines * model.logit_scale + (getattr(model, "logit_bias", None) or 0)
        return {"logits": logits, "softmax": logits.softmax(0), "sigmoid": logits.sigmoid()}[self.output]


@dataclass(frozen=True, kw_only=True)
class TrainedScores(Scores):
    """Image-level scores of a model that was trained to localize, its image as its own processor makes it."""

    def load(self, **where: Any) -> Any:
        return load_trained(self.checkpoint, **where)

    def cosines(self, model: Any, image: Image.Image) -> Tensor:
        return _ground(model, image, self.prompts).scores


@dataclass(frozen=True, kw_only=True)
class Tokens(Published):
    """The first `columns` entries of some tokens of a CLIP after its last block, before the final norm.

    rows  of the tokens; 0 is the class token
    """

    kind = "tokens"

    framing: Framing = CROPPED
    rows: tuple[int, ...] = (0, 1, 2)
    columns: int = 3

    def load(self, **where: Any) -> Any:
        return towers.load(self.checkpoint, self.pretrained, **where)

    def tokens(self, model: Any, image: Image.Image) -> Tensor:
        """All tokens `(n, d)`. Pixels beyond the last whole patch are cut off, as the library's convolution does."""
        pixels = self.framing.pixels(image, model.preprocess).to(model.device, model.dtype)
        rows, cols = model.vision.patch
        pixels = pixels[..., : self.framing.side // rows * rows, : self.framing.side // cols * cols]
        return run(model.vision, pixels, HOST, trace=HOST)["host"].trace[model.vision.layers][0]

    @torch.no_grad()
    def measure(self, model: Any, image: Image.Image) -> Tensor:
        return self.tokens(model, image)[list(self.rows), : self.columns].flatten()


@dataclass(frozen=True, kw_only=True)
class ExpertTokens(Tokens):
    """Tokens of a DINO after the final norm.

    resampling  of the image
    """

    resampling: str = "bicubic"

    def load(self, **where: Any) -> Expert:
        return load_expert(self.checkpoint, **where)

    def tokens(self, model: Any, image: Image.Image) -> Tensor:
        preprocess = Preprocess(model.mean, model.std, self.resampling, Size(self.framing.side, self.framing.side))
        weights = next(model.model.parameters())
        return model.forward(model.model, self.framing.pixels(image, preprocess).to(weights.device, weights.dtype))[0]


@dataclass(frozen=True, kw_only=True)
class Masks(Published):
    """The top left corner of the first prompt's map of a model that was trained on masks, as logits.

    prompts  whole texts
    corner   rows and columns of it
    """

    kind = "masks"

    prompts: tuple[str, ...]
    corner: int = 3

    def load(self, **where: Any) -> TrainedModel:
        return load_trained(self.checkpoint, **where)

    @torch.no_grad()
    def measure(self, model: Any, image: Image.Image) -> Tensor:
        similarity = _ground(model, image, self.prompts).similarity
        return similarity[0, : self.corner, : self.corner].logit().flatten()


@dataclass(frozen=True, kw_only=True)
class Boxes(Published):
    """What an OWL predicts at the first three patches.

    prompts   whole texts
    output    "boxes": centre x, centre y and width, in parts of the model's square; "logits": those of the first three
              prompts
    squashed  to the model's square, as OWL-ViT's image processor does, instead of as the checkpoint's own does
    """

    kind = "boxes"

    prompts: tuple[str, ...]
    output: str = "boxes"
    squashed: bool = False

    def load(self, **where: Any) -> OWL:
        model = load_trained(self.checkpoint, **where)
        assert isinstance(model, OWL)
        return model

    @torch.no_grad()
    def measure(self, model: OWL, image: Image.Image) -> Tensor:
        pixels = self._squashed(model.processor, image) if self.squashed else model.prepare(image)[None]
        logits, boxes = model.predict(pixels.to(model.device, model.dtype), model.encode_text(self.prompts))
        return (boxes if self.output == "boxes" else logits)[0, :3, :3].flatten()

    def _squashed(self, processor: Any, image: Image.Image) -> Tensor:
        side, resampling = processor.size["height"], Image.Resampling(processor.resample).name.lower()
        preprocess = Preprocess(processor.image_mean, processor.image_std, resampling, Size(side, side))
        return Framing(side).pixels(image, preprocess)


@dataclass(frozen=True, kw_only=True)
class Captioned(Published):
    """What Grounding DINO predicts for a caption: the first three boxes, or their logits of the first three tokens.

    caption  the whole text
    output   "boxes": centre x, centre y and width, in parts of the image; or "logits"
    """

    kind = "boxes"

    caption: str
    output: str = "boxes"

    def load(self, **where: Any) -> TrainedModel:
        return load_trained(self.checkpoint, **where)

    @torch.no_grad()
    def measure(self, model: Any, image: Image.Image) -> Tensor:
        pixels = model.prepare(image)[None].to(model.device, model.dtype)
        answer = model.predict(model.model, pixels, model.encode_text([self.caption])[0])
        return (answer.pred_boxes if self.output == "boxes" else answer.logits)[0, :3, :3].flatten()


@dataclass(frozen=True, kw_only=True)
class Concept(Published):
    """What SAM 3 predicts for a noun phrase: its three highest scores, or the corner of the best instance's mask.

    concept  the whole text
    output   "scores": probabilities of instances, without presence; "mask": logits
    """

    kind = "masks"

    concept: str
    output: str = "scores"

    def load(self, **where: Any) -> TrainedModel:
        return load_trained(self.checkpoint, **where)

    @torch.no_grad()
    def measure(self, model: Any, image: Image.Image) -> Tensor:
        vision = model.model.get_vision_features(model.prepare(image)[None].to(model.device, model.dtype))
        answer = model.predict(vision, model.encode_text([self.concept])[0])
        highest = answer.pred_logits[0].topk(3)
        if self.output == "scores":
            return highest.values.sigmoid()
        return answer.pred_masks[0, highest.indices[0], :3, :3].flatten()


@dataclass(frozen=True, kw_only=True)
class PromptedMasks(Published):
    """What a Segment Anything model draws for prompts: the IoU that it predicts, or the corner of a mask.

    points   one prompt of several points `xy`, in pixels of the image; or, with boxes, one point each
    boxes    one prompt each: left, top, right, bottom; both exist if the prompt is a box with a point
    several  three masks a prompt instead of one
    output   "quality": of each prompt, or of its masks, highest first; "last quality": of the last mask; "mask": logits
             of the mask with the highest quality of the first prompt, `corner` rows and columns
    """

    kind = "prompted masks"

    points: tuple[tuple[float, float], ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    several: bool = False
    output: str = "quality"
    corner: int = 3

    def load(self, **where: Any) -> PromptedModel:
        return load_prompted(self.checkpoint, **where)

    @torch.no_grad()
    def measure(self, model: PromptedModel, image: Image.Image) -> Tensor:
        masks, qualities = model.predict(model.encode(image), self.prompt(model.device), several=self.several)
        if self.output == "last quality":
            return qualities[0, -1:]
        if self.output == "quality":
            return qualities.sort(dim=1, descending=True).values.flatten()
        return masks[0, qualities[0].argmax(), : self.corner, : self.corner].flatten()

    def prompt(self, device: torch.device) -> Prompt:
        """Return the prompts as a model takes them."""
        count, each = max(1, len(self.boxes)), len(self.points) // max(1, len(self.boxes))
        xy = torch.tensor(self.points, dtype=torch.float32, device=device).reshape(count, each, 2) if each else None
        edges = torch.tensor(self.boxes, dtype=torch.float32, device=device) if self.boxes else None
        signs = None if xy is None else torch.ones(count, each, dtype=torch.int64, device=device)
        return Prompt(xy, signs, edges)


def _ground(model: TrainedModel, image: Image.Image, prompts: tuple[str, ...]) -> Any:
    pixels = model.processor(images=image, return_tensors="pt")["pixel_values"][0]
    return model.ground(pixels, size_of(image), model.encode_text(prompts))
