"""What was found for one image and its prompts: small; maps, masks, boxes, points and label maps are made on demand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import overload

import torch
from torch import Tensor

from open_gem import readout
from open_gem.errors import InputError, PromptError
from open_gem.readout import Boxes
from open_gem.types import Size


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


@dataclass(frozen=True, eq=False)
class Localization:
    """What was found for one image and its prompts.

    prompts      as asked
    similarity   `(p, r, k)` cosine of each patch with each prompt, in [-1, 1]: small, keep this one. Of models trained
                 to localize also a probability in [0, 1]; "cosine" below means these values, whichever they are
    size         height and width of the original image, at which all views are given
    scores       `(p,)` image-level cosine of each prompt with the pooled embedding, as the model was trained:
                 *whether* it is there, where the maps say *where*; None where the features were encoded without it.
                 Of models trained to localize, what they judge it by themselves
    logit_scale  what cosines are multiplied by before a softmax over prompts; None where each prompt has a probability
                 of its own, whatever the others are
    detections   boxes that the model itself predicts, one `Boxes` a prompt, best first; None where it predicts none

    Maps, masks and label maps are on the device of `similarity`; boxes and points are on the CPU.
    """

    prompts: tuple[str, ...]
    similarity: Tensor
    size: Size
    scores: Tensor | None = None
    logit_scale: float | None = 100.0
    detections: tuple[Boxes, ...] | None = None

    def heatmaps(self, scale: str = "minmax") -> Maps:
        """One map `(y, x)` a prompt.

        scale: "minmax" stretches each to [0, 1] (to look at; it makes an absent thing look present); "cosine" leaves
        raw values in [-1, 1]. Raises InputError for another scale.
        """
        stretch = _find_scale(scale)
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
        stretch = _find_scale(scale)
        if self.detections is not None:
            return [_above(found, threshold, scale, per) for found in self.detections]
        cosines = map(self._cosine, range(len(self.prompts)))
        return [make(stretch(cosine) > threshold, cosine) for cosine in cosines]

    def points(self) -> Tensor:
        """The pixel where each prompt's map is highest, or the middle of its best box where the model itself predicts
        boxes (a map made of boxes is flat on top): `(p, 2)` int, `xy`."""
        return torch.tensor([self._point(index) for index in range(len(self.prompts))])

    def segment(self, background: float | None = None) -> Tensor:
        """The most probable prompt of each pixel: `(y, x)` int64, an index into `prompts`, −1 for background.

        A pixel is background where the best softmax probability (of logit_scale × cosine over the prompts) is below
        `background`, a number in [0, 1]; None has no background. The paper uses 0.8 with PascalVOC's 20 classes. With
        one prompt the softmax is 1 everywhere: use `masks` there. Without `logit_scale` there is no softmax: the values
        are probabilities already.
        """
        if background is not None and not 0 <= background <= 1:
            raise InputError(f"background is {background}, expected a probability in [0, 1] or None")
        if self.logit_scale is not None:
            return readout.segment(self.logit_scale * self.similarity, self.size, background)
        labels = readout.segment(self.similarity, self.size, None)
        if background is None:
            return labels
        return labels.masked_fill_(reduce(torch.maximum, self.heatmaps("cosine")) < background, -1)

    def _point(self, index: int) -> tuple[int, int]:
        if self.detections is not None and len(best := self.detections[index].xyxy[:1]):
            left, top, right, bottom = best[0].tolist()
            return (left + right - 1) // 2, (top + bottom - 1) // 2
        return readout.peak(self._cosine(index))

    def _cosine(self, index: int) -> Tensor:
        return readout.upsample(self.similarity[index], self.size)


_SCALES: Mapping[str, Callable[[Tensor], Tensor]] = {"minmax": readout.min_max, "cosine": lambda heatmap: heatmap}


def _above(found: Boxes, threshold: float, scale: str, per: str) -> Boxes:
    """Predicted boxes whose score is above the threshold: all, or the best one."""
    best = found.scores[:1] if scale == "minmax" else 1
    kept = torch.nonzero(found.scores > threshold * best)[:, 0][: 1 if per == "prompt" else None]
    return Boxes(found.xyxy[kept], found.scores[kept])


def _find_scale(scale: str) -> Callable[[Tensor], Tensor]:
    if scale not in _SCALES:
        raise InputError(f"scale is {scale!r}, expected one of {', '.join(_SCALES)}")
    return _SCALES[scale]
