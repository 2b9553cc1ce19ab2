"""What was found for one image and its prompts: small; maps, masks, boxes, points and label maps are made on demand."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from typing import overload

import torch
from PIL import Image
from torch import Tensor

from open_gem import readout
from open_gem.errors import InputError, PromptError
from open_gem.images.pixels import ImageLike, Preprocess, read_image, size_of, to_pixels
from open_gem.readout import Boxes
from open_gem.refine.pamr import Pamr
from open_gem.text import Vocabulary
from open_gem.types import Size
from open_gem.views import Mosaic


class Maps(Sequence[Tensor]):
    """One map `(y, x)` a prompt, made when asked for: index by number or prompt, iterate, or `stack()` them all.

    A thousand prompts on a four-megapixel image are 16 GB as one tensor, so nothing is kept here.
    """

    def __init__(self, prompts: tuple[str, ...], make: Callable[[int], Tensor]):
        self.prompts, self._make = prompts, make

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, which: int | str) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice) -> "Maps": ...
    def __getitem__(self, which: int | str | slice) -> "Tensor | Maps":
        if isinstance(which, slice):
            chosen = range(len(self))[which]
            return Maps(self.prompts[which], lambda index: self._make(chosen[index]))
        return self._make(range(len(self))[_prompt_index(self.prompts, which)])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._make, range(len(self)))

    def __contains__(self, prompt: object) -> bool:
        return prompt in self.prompts

    def __repr__(self) -> str:
        return f"Maps({', '.join(map(repr, self.prompts))})"

    def stack(self) -> Tensor:
        """All maps at once, `(p, y, x)`."""
        return torch.stack(list(self))


def _prompt_index(prompts: tuple[str, ...], which: int | str) -> int:
    if isinstance(which, str):
        if which not in prompts:
            raise PromptError(f"no prompt {which!r} here; there are: {', '.join(prompts)}")
        return prompts.index(which)
    return which


SCALES = ("minmax", "cosine", "probability")
"""What `Localization.heatmaps` knows."""

_UNCHANGED = Preprocess(mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest", image_size=Size(1, 1))  # in [0, 1]


@dataclass(frozen=True, eq=False)
class _Refiner:
    """A refinement of maps `(y, x)` of one picture; keeps the picture, not the much larger weights made of it."""

    picture: Image.Image
    refinement: Pamr

    def __call__(self, heatmap: Tensor) -> Tensor:
        return self.refinement(_weights(self, heatmap.device), heatmap)


@lru_cache(maxsize=1)  # one picture's phrases are refined one after another
def _weights(refiner: _Refiner, device: torch.device) -> Tensor:
    pixels = to_pixels(refiner.picture, size_of(refiner.picture), _UNCHANGED)
    return refiner.refinement.weights(pixels.to(device))


@dataclass(frozen=True, eq=False)
class Localization:
    """What was found for one image and its prompts.

    prompts      as asked; of a `Vocabulary`, its labels
    maps         `(q, r, k)` cosine of each patch with each phrase, in [-1, 1]: small, keep this one. Of models trained
                 to localize also a probability in [0, 1]; "cosine" below means these values, whichever they are.
                 Without redundancy, not quite cosines. A `Mosaic` where the maps of several views were merged
    size         height and width of the original image, at which all views are given
    scores       `(p,)` image-level cosine of each prompt with the pooled embedding, as the model was trained:
                 *whether* it is there, where the maps say *where*; None where the features were encoded without it.
                 Of models trained to localize, what they judge it by themselves
    logit_scale  what cosines are multiplied by before a softmax over phrases; None where each prompt has a probability
                 of its own, whatever the others are
    detections   boxes that the model itself predicts, one `Boxes` a prompt, best first; None where it predicts none
    presence     `(p,)` in [0, 1]: `scores` as a probability that the prompt is in the image, each prompt by itself; see
                 `Localizer`. None where there are no scores, or nothing to compare them with
    vocabulary   the labels, their phrases and those of the background; by default every prompt is its own one phrase
    refine       what makes a map `(y, x)` follow the edges of the image, see `refined`

    Maps, masks and label maps are on the device of `maps`; boxes and points are on the CPU.
    """

    prompts: tuple[str, ...]
    maps: Tensor | Mosaic
    size: Size
    scores: Tensor | None = None
    logit_scale: float | None = 100.0
    detections: tuple[Boxes, ...] | None = None
    presence: Tensor | None = None
    vocabulary: Vocabulary | None = None
    refine: Callable[[Tensor], Tensor] | None = None

    @property
    def similarity(self) -> Tensor:
        """`maps` as one tensor: `(q, r, k)`, or `(q, y, x)` of a `Mosaic`, made on demand and large."""
        return self.maps if isinstance(self.maps, Tensor) else self.maps.stack()

    def heatmaps(self, scale: str = "minmax") -> Maps:
        """One map `(y, x)` a prompt.

        scale: "minmax" stretches each to [0, 1] (to look at; it makes an absent thing look present); "cosine" leaves
        raw values in [-1, 1]; "probability" is the softmax of logit_scale × cosine over all phrases, those of the
        background included (with one phrase, 1 everywhere; without `logit_scale`, the values as they are). Of several
        phrases of one prompt the best counts at each pixel. Raises InputError for another scale.
        """
        stretch = self._find_scale(scale)
        return Maps(self.prompts, lambda index: stretch(self._cosine(index)))

    def masks(self, threshold: float = 0.5, scale: str = "minmax") -> Maps:
        """One bool mask `(y, x)` a prompt: heatmap above `threshold` (the paper on OpenImages: min-max above 0.5)."""
        heatmaps = self.heatmaps(scale)
        return Maps(self.prompts, lambda index: heatmaps[index] > threshold)

    def boxes(self, threshold: float = 0.5, scale: str = "minmax", *, per: str = "component") -> list[Boxes]:
        """Boxes of each prompt, best first: one a connected component of the mask, or one a prompt.

        per: "component" or "prompt". Scores are raw cosines, so boxes of different prompts and images compare.

        Where the model itself predicts boxes (`detections`), those whose score is above `threshold`: as a share of the
        prompt's best score with "minmax", as it is with "cosine". One a prompt is the best of them then.
        """
        make = {"component": readout.component_boxes, "prompt": readout.whole_box}.get(per)
        if make is None:
            raise InputError(f"per is {per!r}, expected 'component' or 'prompt'")
        stretch = self._find_scale(scale)
        if self.detections is not None:
            return [_above(found, threshold, scale, per) for found in self.detections]
        cosines = map(self._cosine, range(len(self.prompts)))
        return [make(stretch(cosine) > threshold, cosine) for cosine in cosines]

    def points(self) -> Tensor:
        """The pixel where each prompt's map is highest, or the middle of its best box where the model itself predicts
        boxes (a map made of boxes is flat on top): `(p, 2)` int, `xy`."""
        return torch.tensor([self._point(index) for index in range(len(self.prompts))], dtype=torch.int64, device="cpu")

    def segment(self, background: float | None = None) -> Tensor:
        """The most probable prompt of each pixel: `(y, x)` int64, an index into `prompts`, −1 for background.

        A pixel is background where a background phrase of the vocabulary is best, or where the best softmax probability
        (of logit_scale × cosine over all phrases) is below `background`, a number in [0, 1]; None has no such limit.
        The paper uses 0.8 with PascalVOC's 20 classes. With one phrase the softmax is 1 everywhere: use `masks` there.
        Without `logit_scale` there is no softmax: the values are probabilities already.
        """
        if background is not None and not 0 <= background <= 1:
            raise InputError(f"background is {background}, expected a probability in [0, 1] or None")
        groups = [self._groups[index] for index in self._order]
        if self.logit_scale is not None:
            return readout.segment(self._contest, groups, background)
        labels = readout.segment(self._contest, groups, None)
        return labels if background is None else labels.masked_fill_(self._contest.best < background, -1)

    def refined(self, image: ImageLike, refinement: Pamr) -> "Localization":
        """The same with maps that follow the edges of `image`, the one that was localized. Raises ImageError where it
        cannot be read, InputError where it has another size."""
        picture = read_image(image)
        if size_of(picture) != self.size:
            given, expected = ("×".join(map(str, size)) for size in (size_of(picture), self.size))
            raise InputError(f"the image is {given} (height × width), expected the one localized: {expected}")
        return replace(self, refine=_Refiner(picture, refinement))

    @cached_property
    def _contest(self) -> readout.Contest:
        scale = 1.0 if self.logit_scale is None else self.logit_scale
        if self.refine is None and isinstance(self.maps, Tensor):
            return readout.grid_contest(scale * self.maps[self._order], self.size)
        return readout.contest(scale * self._phrase(index) for index in self._order)

    @property
    def _order(self) -> list[int]:
        """Phrases of the background first: they win a tie, as where they are the field's class 0."""
        return sorted(range(len(self._groups)), key=lambda index: self._groups[index] >= 0)

    @cached_property
    def _groups(self) -> Sequence[int]:
        """For each phrase the index of its prompt, −1 for background."""
        return range(len(self.prompts)) if self.vocabulary is None else self.vocabulary.groups

    @cached_property
    def _phrases(self) -> list[list[int]]:
        """The indices of each prompt's phrases."""
        if self.vocabulary is None:
            return [[index] for index in range(len(self.prompts))]
        return self.vocabulary.by_label(range(len(self._groups)))

    def _point(self, index: int) -> tuple[int, int]:
        if self.detections is not None and len(best := self.detections[index].xyxy[:1]):
            left, top, right, bottom = best[0].tolist()
            return (left + right - 1) // 2, (top + bottom - 1) // 2
        return readout.peak(self._cosine(index))

    def _cosine(self, index: int) -> Tensor:
        """The best of a prompt's phrases at each pixel."""
        return reduce(torch.maximum, map(self._phrase, self._phrases[index]))

    def _phrase(self, index: int) -> Tensor:
        upsampled = readout.upsample(self.maps[index], self.size)
        return upsampled if self.refine is None else self.refine(upsampled)

    def _find_scale(self, scale: str) -> Callable[[Tensor], Tensor]:
        if scale not in SCALES:
            raise InputError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
        return {"minmax": readout.min_max, "cosine": lambda cosine: cosine, "probability": self._probability}[scale]

    def _probability(self, cosine: Tensor) -> Tensor:
        if self.logit_scale is None:
            return cosine
        return (self.logit_scale * cosine - self._contest.log_mass).exp()


def _above(found: Boxes, threshold: float, scale: str, per: str) -> Boxes:
    """Predicted boxes whose score is above the threshold: all, or the best one."""
    best = found.scores[:1] if scale == "minmax" else 1
    kept = torch.nonzero(found.scores > threshold * best)[:, 0][: 1 if per == "prompt" else None]
    return Boxes(found.xyxy[kept], found.scores[kept])
