"""Crisp masks: each region of a map prompts a Segment Anything model, which draws the object's outline.

Prompts from boxes, peaks and maps as in Y. Shi et al., "Harnessing Vision Foundation Models for High-Performance,
Training-Free Open Vocabulary Segmentation" (Trident, ICCV 2025) and RADSeg; prompts from points as in Y. Li et al., "A
Closer Look at the Explainability of CLIP" (CLIP Surgery, 2025).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import compress
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, pad

from open_gem.errors import InputError, UnsupportedModelError
from open_gem.images.pixels import size_of
from open_gem.localization import MIN_AREA, Localization
from open_gem.localization.crisp import CrispMask, Region
from open_gem.numerics import Lock, check_finite, cpu_by_default
from open_gem.refine import Refinement, check_image
from open_gem.types import Size

CHECKPOINT = "facebook/sam2.1-hiera-tiny"
"""The smallest SAM 2.1: 31 million parameters without its memory for video, Apache 2.0."""

PROMPTS = ("box", "points")
"""Kinds of prompts: a box, a point and the map; or points alone."""

LEAST, FACTOR = 0.1, 0.005
"""The map as a prompt, as in Trident: values up to the first become 0, others are multiplied by the second."""

SURE, CELLS = 0.8, 16
"""Points alone, as in CLIP Surgery: the share of the map's range that a positive point has at least, and the cells of
the longer side of the grid that points are taken from."""

BATCH = 16
"""Regions that are drawn at a time: bounds memory."""


class Kind(NamedTuple):
    """The classes of transformers for one `model_type`."""

    model: str
    processor: str


SEGMENTERS = {
    "sam": Kind("SamModel", "SamImageProcessorPil"),
    "sam2": Kind("Sam2Model", "Sam2ImageProcessor"),
    "sam2_video": Kind("Sam2Model", "Sam2ImageProcessor"),
    "edgetam": Kind("EdgeTamModel", "Sam2ImageProcessor"),
    "edgetam_video": Kind("EdgeTamModel", "Sam2ImageProcessor"),
    "sam3_tracker": Kind("Sam3TrackerModel", "Sam3ImageProcessor"),
    "sam3_video": Kind("Sam3TrackerModel", "Sam3ImageProcessor"),
}
"""`model_type` of a configuration → its kind. Checkpoints for video hold the model for images, too."""


@dataclass(frozen=True)
class Sam(Refinement):
    """Masks of a Segment Anything model: SAM, SAM 2, EdgeTAM, or the tracker of SAM 3.

    Each connected component of a label's mask is a prompt: its box, its most confident pixel, and the label's map. The
    model's mask takes its place if the IoU that it predicts is above `quality`; otherwise the component stays. Scores,
    points, presence and heatmaps are those of the localizer; `Object.mask_quality` is the predicted IoU. The image is
    encoded once for all labels.

    checkpoint  a repository of transformers, or a folder in its format
    quality     predicted IoU above which a mask is kept, in [0, 1]; 0.9 in Trident and RADSeg
    prompts     "box" as above; "points": cells of a coarse grid that have 0.8 of the map's range, and as many of its
                lowest as negative points; the best of the model's three masks counts
    min_area    share of the image's pixels that a component has at least, in [0, 1]; smaller ones stay as they are

    Raises InputError for settings outside these.
    """

    checkpoint: str = CHECKPOINT
    quality: float = 0.9
    prompts: str = "box"
    min_area: float = MIN_AREA

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, str) or not self.checkpoint:
            raise InputError(f"checkpoint is {self.checkpoint!r}, expected a repository or a folder")
        if self.prompts not in PROMPTS:
            raise InputError(f"prompts is {self.prompts!r}, expected one of {', '.join(PROMPTS)}")
        for name in ("quality", "min_area"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
                raise InputError(f"{name} is {value!r}, expected a number in [0, 1]")

    def load(self, device: torch.device) -> "PromptedModel":
        """Load the model, once in a process. Errors as `load_prompted`."""
        return _loaded(self.checkpoint, device)

    def refine(self, image: Image.Image, localization: Localization) -> Localization:
        check_image(image, localization)
        return replace(localization, segmenter=_Segmenter(self, image, localization.maps.device))


@dataclass(eq=False)
class _Segmenter:
    """Draws masks of one image, on the device where its maps were made."""

    settings: Sam
    image: Image.Image
    device: torch.device
    _encoded: "EncodedImage | None" = field(default=None, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __call__(self, regions: Sequence[Region], confidence: Tensor) -> Iterator[CrispMask | None]:
        fewest = self.settings.min_area * confidence.numel()
        are_large = [np.count_nonzero(region.mask) >= fewest for region in regions]
        drawn = self._drawn([*compress(regions, are_large)], confidence)
        for is_large in are_large:
            yield next(drawn) if is_large else None

    @torch.no_grad()
    def _drawn(self, regions: Sequence[Region], confidence: Tensor) -> Iterator[CrispMask | None]:
        if not regions:
            return
        model = self.settings.load(self.device)
        encoded, confidence = self._encode(model), confidence.to(self.device)
        for start in range(0, len(regions), BATCH):
            part = regions[start : start + BATCH]
            by_points = self.settings.prompts == "points"
            prompt = (point_prompts if by_points else box_prompts)(part, confidence)
            masks, qualities = model.predict(encoded, prompt, several=by_points)
            for own, predicted in zip(masks, qualities.tolist(), strict=True):
                quality = max(predicted)
                small = own[predicted.index(quality)]
                sure = quality > self.settings.quality
                yield CrispMask(model.upsample(small, encoded) > 0, quality) if sure else None

    def _encode(self, model: "PromptedModel") -> "EncodedImage":
        with self._lock:  # threads that ask for different labels encode once
            if self._encoded is None:
                self._encoded = model.encode(self.image)
            return self._encoded

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_encoded": None}


# Prompts --------------------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """What a model is asked for `n` masks.

    points  `(n, k, 2)` float32, `xy` in pixels of the image; None if there are boxes alone
    signs   `(n, k)` int64: 1 inside the object, 0 outside, −10 for no point
    boxes   `(n, 4)` float32, left, top, right, bottom; or None
    dense   `(y, x)` a map for all masks, or None
    """

    points: Float[Tensor, "n k 2"] | None
    signs: Int[Tensor, "n k"] | None
    boxes: Float[Tensor, "n 4"] | None = None
    dense: Float[Tensor, "y x"] | None = None


def box_prompts(regions: Sequence[Region], confidence: Float[Tensor, "y x"]) -> Prompt:
    """Return the box and the most confident pixel of each region, and the map of confidence in [0, 1]."""
    spans = [region.span for region in regions]
    edges = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in spans]
    peaks = [[region.point] for region in regions]
    return Prompt(
        torch.tensor(peaks, dtype=torch.float32, device=confidence.device),
        torch.ones(len(peaks), 1, dtype=torch.int64, device=confidence.device),
        torch.tensor(edges, dtype=torch.float32, device=confidence.device),
        torch.where(confidence > LEAST, FACTOR * confidence, 0.0),
    )


def point_prompts(regions: Sequence[Region], confidence: Float[Tensor, "y x"]) -> Prompt:
    """Return points of each region: its most confident pixel and the middles of cells, mostly inside the region, that
    reach `SURE` of the map's range; and as many cells outside of it that are lowest."""
    size = Size(*confidence.shape)
    sides = Size(*(max(1, min(side, round(CELLS * side / max(size)))) for side in size))
    cells = adaptive_avg_pool2d(confidence[None, None].float(), sides)[0, 0]
    low, high = confidence.aminmax()
    middles = [
        (torch.arange(count, device="cpu", dtype=torch.float32) + 0.5) * side / count - 0.5
        for count, side in zip(sides, size, strict=True)
    ]
    xy = torch.stack(torch.meshgrid(*middles, indexing="ij")[::-1], dim=-1).reshape(-1, 2).to(confidence.device)
    chosen, signs = [], []
    for region in regions:
        whole = torch.zeros(1, 1, *size, dtype=torch.float32, device="cpu")
        whole[0, 0][region.span] = torch.from_numpy(region.mask).float()
        inside = adaptive_avg_pool2d(whole.to(confidence.device), sides)[0, 0]
        sure = (cells - low >= SURE * (high - low)) & (inside > 0.5)
        peak = torch.tensor([region.point], dtype=torch.float32, device=confidence.device)
        positive = torch.cat([peak, xy[sure.flatten()]])
        outside = torch.nonzero(inside.flatten() == 0)[:, 0]
        lowest = outside[cells.flatten()[outside].argsort(stable=True)[: len(positive)]]
        chosen.append(torch.cat([positive, xy[lowest]]))
        signs.append([1] * len(positive) + [0] * len(lowest))
    most = max(map(len, chosen))
    padded = [pad(own, (0, 0, 0, most - len(own))) for own in chosen]
    listed = [own + [-10] * (most - len(own)) for own in signs]
    return Prompt(torch.stack(padded), torch.tensor(listed, dtype=torch.int64, device=confidence.device))


# Models ---------------------------------------------------------------------------------------------------------------


class EncodedImage(NamedTuple):
    """An image as a model sees it.

    embeddings  the library's
    size        of the image
    resized     the part of the model's square frame that it fills, from the top left corner
    """

    embeddings: Any
    size: Size
    resized: Size


@dataclass(frozen=True, eq=False)
class PromptedModel:
    """A frozen model of transformers that draws masks for prompts, and its image processor."""

    name: str
    model: Any
    processor: Any

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @torch.no_grad()
    @cpu_by_default()
    def encode(self, image: Image.Image) -> EncodedImage:
        """Encode an RGB image. Raises NotFiniteError if the model gives no numbers."""
        inputs = self.processor(images=image, return_tensors="pt")
        pixels = inputs["pixel_values"]
        resized = inputs.get("reshaped_input_sizes", [pixels.shape[-2:]])[0]
        embeddings = self.model.get_image_embeddings(pixels.to(self.device))
        levels = [embeddings] if isinstance(embeddings, Tensor) else embeddings
        check_finite("embeddings of the image", self, *levels)
        return EncodedImage(embeddings, size_of(image), Size(*map(int, resized)))

    @torch.no_grad()
    @cpu_by_default()
    def predict(self, encoded: EncodedImage, prompt: Prompt, *, several: bool) -> tuple[Tensor, Tensor]:
        """Return masks `(n, m, y, x)` as logits, small, and the IoU that the model predicts for each `(n, m)`.

        several  the model's three masks of each prompt, instead of one
        """
        height, width = (shown / side for shown, side in zip(encoded.resized, encoded.size, strict=True))
        scale = torch.tensor([width, height], dtype=torch.float32, device=self.device)
        points, signs, boxes, dense = prompt
        answer = self.model(
            image_embeddings=encoded.embeddings,
            input_points=None if points is None else (points * scale)[None],
            input_labels=None if signs is None else signs[None],
            input_boxes=None if boxes is None else (boxes * scale.repeat(2))[None],
            input_masks=None if dense is None else self.framed(dense, encoded)[None, None],
            multimask_output=several,
        )
        check_finite("masks", self, answer.pred_masks, answer.iou_scores)
        return answer.pred_masks[0], answer.iou_scores[0]

    def framed(self, dense: Float[Tensor, "y x"], encoded: EncodedImage) -> Float[Tensor, "h w"]:
        """Return a map as the model takes it: as large as its own masks, 0 where the frame is empty."""
        encoder = self.model.prompt_encoder
        side = 4 * encoder.image_embedding_size[0]
        target = [max(1, round(side * shown / encoder.input_image_size)) for shown in encoded.resized]
        small = interpolate(dense[None, None], target, mode="bilinear", align_corners=False, antialias=True)[0, 0]
        return pad(small, (0, side - target[1], 0, side - target[0]))

    def upsample(self, mask: Float[Tensor, "h w"], encoded: EncodedImage) -> Float[Tensor, "y x"]:
        """Return a mask of logits at the size of the image, by the library's own post-processing."""
        [large] = self.processor.post_process_masks(
            mask[None, None, None],
            original_sizes=[tuple(encoded.size)],
            reshaped_input_sizes=[tuple(encoded.resized)],
            binarize=False,
        )
        return large[0, 0]


@lru_cache(maxsize=2)
def _loaded(checkpoint: str, device: torch.device) -> PromptedModel:
    return load_prompted(checkpoint, device=device)


def load_prompted(name: str, *, device: str | torch.device = "auto", cache_dir: str | None = None) -> PromptedModel:
    """Load a model that draws masks for prompts: a transformers repository of a type in `SEGMENTERS`, or a folder in
    its format. Arguments as `towers.load`; in float32.

    Raises UnknownModelError, WeightsError or UnsupportedModelError, and InputError for the device.
    """
    from open_gem.towers.loading import as_folder, find_device
    from open_gem.towers.weights import finished, needs_transformers

    device = find_device(device)
    try:
        import transformers

        from open_gem.towers import hub
    except ImportError as error:
        raise UnsupportedModelError(needs_transformers(error)) from error
    place = as_folder(name)
    config = hub.configuration(place, cache_dir)
    if config.model_type not in SEGMENTERS:
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) does not draw masks for prompts; expected a model of type "
            f"{', '.join(SEGMENTERS)}, such as {CHECKPOINT}"
        )
    kind = SEGMENTERS[config.model_type]
    processor = getattr(transformers, kind.processor).from_dict(hub.image_settings(place, cache_dir))
    model = hub.fetch(getattr(transformers, kind.model), place, cache_dir=cache_dir)
    return PromptedModel(name, finished(model, device, torch.float32), processor)
