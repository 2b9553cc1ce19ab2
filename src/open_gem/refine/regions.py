"""Maps that are even inside the regions of an image, whatever these are: pooling over class-agnostic masks.

The last step of D. Zhang et al., "CorrCLIP" (2024), which gives each region of a mask generator one label.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from open_gem.checks import is_count
from open_gem.errors import InputError, UnsupportedModelError
from open_gem.localization import Localization
from open_gem.numerics import Lock, cpu_by_default
from open_gem.refine import Refinement, check_image
from open_gem.refine.sam import CHECKPOINT, SEGMENTERS, load_prompted
from open_gem.tensors import at_least_float32

PANOPTIC = {"mask2former": "Mask2FormerForUniversalSegmentation"}
"""`model_type` of models that segment a whole image → their class in transformers."""

BATCH = 64
"""Points that a Segment Anything model is asked for at a time."""


@dataclass(frozen=True)
class Regions(Refinement):
    """Each region of the image gets the mean of a map over it.

    The mean of cosines of normalised features with a text is, up to a factor that all labels share, the cosine of the
    pooled feature: each region gets the label that its pooled feature is most similar to. Regions know no labels: they
    are all masks that a Segment Anything model draws for a grid of points, by the library's own pipeline, smaller ones
    over larger ones; or the segments of a Mask2Former, whose classes do not matter. Pixels in no region stay.

    checkpoint  a repository of transformers, or a folder in its format, of a type in `sam.SEGMENTERS` or `PANOPTIC`
    points      along each side of the grid, 1 or more; without effect on a Mask2Former

    Raises InputError for settings outside these. A refined localization keeps its image and, once a map was made, the
    image's regions, 8 bytes a pixel; pickles have the image alone.
    """

    checkpoint: str = CHECKPOINT
    points: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, str) or not self.checkpoint:
            raise InputError(f"checkpoint is {self.checkpoint!r}, expected a repository or a folder")
        if not is_count(self.points, 1):
            raise InputError(f"points is {self.points!r}, expected a whole number, 1 or more")

    def load(self, device: torch.device) -> Any:
        """Load the model, once in a process. Errors as `sam.load_prompted`."""
        return _loaded(self.checkpoint, device)

    def refine(self, image: Image.Image, localization: Localization) -> Localization:
        check_image(image, localization)
        return replace(localization, refiner=_Pooling(self, image, localization.maps.device))

    @torch.no_grad()
    @cpu_by_default()
    def regions(self, image: Image.Image, device: torch.device) -> Int[Tensor, "y x"]:
        """Return the number of the region of each pixel of an RGB image, from 0; −1 for pixels in none: int64, on the
        CPU."""
        kind, processor, model = self.load(device)
        height, width = image.height, image.width
        if kind in PANOPTIC:
            answer = model(**processor(images=image, return_tensors="pt").to(device))
            [segments] = processor.post_process_panoptic_segmentation(
                answer, label_ids_to_fuse=set(), target_sizes=[(height, width)]
            )
            return (segments["segmentation"].cpu().long() - 1).clamp(min=-1)  # 0 or −1 there for none
        from transformers import pipeline

        draw = pipeline("mask-generation", model=model, image_processor=processor, device=device)
        drawn = draw(image, points_per_crop=self.points, points_per_batch=BATCH)["masks"]
        masks = [torch.as_tensor(mask, dtype=torch.bool, device="cpu") for mask in drawn]
        numbers = torch.full((height, width), -1, dtype=torch.int64, device="cpu")
        for number, mask in enumerate(sorted(masks, key=lambda mask: -int(mask.sum()))):
            numbers[mask] = number
        return numbers


def pool(values: Float[Tensor, "y x"], regions: Int[Tensor, "y x"]) -> Float[Tensor, "y x"]:
    """Return a map with the mean of each region in its place; pixels of region −1 stay. In float32 at least."""
    values = at_least_float32(values)
    own = (regions + 1).flatten()
    sums = values.new_zeros(int(own.max()) + 1).index_add_(0, own, values.flatten())
    means = sums / own.bincount().clamp(min=1)
    return torch.where(regions < 0, values, means[own].reshape(values.shape))


@dataclass(eq=False)
class _Pooling:
    """Pools maps of one image."""

    settings: Regions
    image: Image.Image
    device: torch.device
    _regions: Tensor | None = field(default=None, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __call__(self, heatmap: Tensor) -> Tensor:
        with self._lock:  # threads that ask for different labels segment once
            if self._regions is None:
                self._regions = self.settings.regions(self.image, self.device)
        return pool(heatmap, self._regions.to(heatmap.device))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_regions": None}


@lru_cache(maxsize=2)
def _loaded(checkpoint: str, device: torch.device) -> tuple[str, Any, Any]:
    """Return the type of a model, its image processor and itself."""
    from open_gem.towers.loading import as_folder
    from open_gem.towers.weights import finished, needs_transformers

    try:
        import transformers

        from open_gem.towers import hub
    except ImportError as error:
        raise UnsupportedModelError(needs_transformers(error)) from error
    place = as_folder(checkpoint)
    kind = hub.configuration(place).model_type
    if kind in PANOPTIC:
        model = hub.fetch(getattr(transformers, PANOPTIC[kind]), place)
        processor = transformers.Mask2FormerImageProcessor.from_dict(hub.image_settings(place))
        return kind, processor, finished(model, device, torch.float32)
    if kind not in SEGMENTERS:
        raise UnsupportedModelError(
            f"{checkpoint} ({kind}) draws no regions of an image; expected a model of type "
            f"{', '.join((*SEGMENTERS, *PANOPTIC))}"
        )
    prompted = load_prompted(checkpoint, device=device)
    return kind, prompted.processor, prompted.model
