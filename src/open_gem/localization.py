"""What was found for one image and its prompts: small; maps, masks, boxes, points and label maps are made on demand."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from open_gem import readout
from open_gem.errors import InputError, PromptError
from open_gem.objects import Object
from open_gem.readout import Boxes
from open_gem.rle import Span, run_lengths
from open_gem.tensors import at_least_float32
from open_gem.text import Vocabulary
from open_gem.types import Size
from open_gem.windows import Mosaic


class Maps(Sequence[Tensor]):
    """One map `(y, x)` a label, made on access: index by number or label, iterate, or `stack()` them all.

    A thousand labels on a four-megapixel image are 16 GB as one tensor, so nothing is kept here.
    """

    def __init__(self, labels: tuple[str, ...], make: Callable[[int], Tensor]):
        self.labels, self._make = labels, make

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, which: int | str) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice) -> "Maps": ...
    def __getitem__(self, which: int | str | slice) -> "Tensor | Maps":
        if isinstance(which, slice):
            chosen = range(len(self))[which]
            return Maps(self.labels[which], lambda index: self._make(chosen[index]))
        return self._make(range(len(self))[_label_index(self.labels, which)])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._make, range(len(self)))

    def __contains__(self, label: object) -> bool:
        return label in self.labels

    def __repr__(self) -> str:
        return f"Maps({', '.join(map(repr, self.labels))})"

    def stack(self) -> Tensor:
        """All maps at once, `(p, y, x)`."""
        return torch.stack(list(self))


def _label_index(labels: tuple[str, ...], which: int | str) -> int:
    if isinstance(which, str):
        if which not in labels:
            raise PromptError(f"no label {which!r} here, expected one of {', '.join(labels)}")
        return labels.index(which)
    return which


SCALES = ("minmax", "cosine", "probability")
"""What `Localization.heatmaps` knows."""

INSTANCES = ("component", "label")
"""What an object is: each connected component of a label's mask, or all of the mask."""


@dataclass(frozen=True, eq=False)
class Localization:
    """What was found for one image and its prompts.

    labels       what is reported: the prompts, or the labels of a `Vocabulary`
    maps         `(q, r, k)` cosine of each patch with each phrase, in [-1, 1]: small, keep this one. Of models trained
                 to localize also a probability in [0, 1]; "cosine" below means these values, whichever they are.
                 Without redundancy, not quite cosines. A `Mosaic` where the maps of several views were merged
    size         height and width of the original image, at which all views are given
    scores       `(p,)` image-level cosine of each prompt with the pooled embedding, as the model was trained:
                 *whether* it is there, where the maps say *where*; of several windows, of their mean. None where the
                 features were encoded without it.
                 Of models trained to localize, what they judge it by themselves
    logit_scale  what cosines are multiplied by before a softmax over phrases; None where each prompt has a probability
                 of its own, whatever the others are
    detections   boxes that the model itself predicts, one `Boxes` a prompt, best first; None where it predicts none
    presence     `(p,)` in [0, 1]: `scores` as a probability that the prompt is in the image, each prompt by itself; see
                 `Localizer`. None where there are no scores, or nothing to compare them with
    vocabulary   the labels, their phrases and those of the background; by default every prompt is its own one phrase
    refined      what a refinement makes of a map `(y, x)`; None for the maps as they are

    Maps, masks and label maps are on the device of `maps`; boxes and points are on the CPU.
    """

    labels: tuple[str, ...]
    maps: Float[Tensor, "q r k"] | Mosaic
    size: Size
    scores: Float[Tensor, " p"] | None = None
    logit_scale: float | None = 100.0
    detections: tuple[Boxes, ...] | None = None
    presence: Float[Tensor, " p"] | None = None
    vocabulary: Vocabulary | None = None
    refined: Callable[[Tensor], Tensor] | None = None

    @property
    def similarity(self) -> Float[Tensor, "q r k"]:
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
        return Maps(self.labels, lambda index: stretch(self._cosine(index)))

    def masks(self, threshold: float = 0.5, scale: str = "minmax") -> Maps:
        """One bool mask `(y, x)` a prompt: heatmap above `threshold` (the paper on OpenImages: min-max above 0.5)."""
        heatmaps = self.heatmaps(scale)
        return Maps(self.labels, lambda index: heatmaps[index] > threshold)

    def boxes(self, threshold: float = 0.5, scale: str = "minmax", *, instances: str = "component") -> list[Boxes]:
        """Boxes of each prompt, best first: one a connected component of the mask, or one for all of it ("label").

        Scores are raw cosines, so boxes of different prompts and images compare.

        Where the model itself predicts boxes (`detections`), those whose score is above `threshold`: as a share of the
        prompt's best score with "minmax", as it is with "cosine". One a prompt is the best of them then.
        """
        make = self._find_instances(instances)[1]
        stretch = self._find_scale(scale)
        if self.detections is not None:
            return [_above(boxes, threshold, scale, instances) for boxes in self.detections]
        cosines = map(self._cosine, range(len(self.labels)))
        return [make(stretch(cosine) > threshold, cosine) for cosine in cosines]

    def objects(
        self,
        threshold: float | Sequence[float] = 0.5,
        scale: str = "minmax",
        *,
        presence: float | Sequence[float] = 0.0,
        min_area: float = 0.0005,
        instances: str = "component",
        masks: bool = True,
        label_map: "LabelMap | None" = None,
    ) -> list[Object]:
        """What is in the image: the connected components of each label's mask, or the boxes that the model predicts.

        threshold  heatmaps above it are the mask, of `scale` as in `heatmaps`: one for all labels, or one per label
        presence   labels that are less probable in the image have no objects; one for all, or one a label. The map of
                   an absent thing has a maximum too
        min_area   share of the image's pixels, in [0, 1], that an object has at least; smaller ones are specks
        instances  "component", or "label": one object for all of a label's mask
        masks      also as `Object.rle`
        label_map  is painted with the objects

        Labels in order, best first within each. Raises InputError for an unknown scale or kind
        of instances, or a wrong number of thresholds.
        """
        self._find_scale(scale)
        find = self._find_instances(instances)[0]
        objects = []
        for index, (at, least) in enumerate(zip(self._each(threshold), self._each(presence), strict=True)):
            if self.presence is not None and self.presence[index].item() < least:
                continue
            if self.detections is not None:
                objects += self._predicted(index, _above(self.detections[index], at, scale, instances), scale)
                continue
            own = self._regions(index, at, scale, min_area, find, masks, label_map)
            objects += sorted(own, key=lambda region: -region.score)
        return objects

    def _each(self, value: float | Sequence[float]) -> Sequence[float]:
        value = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
        if not isinstance(value, Sequence):
            return [float(value)] * len(self.labels)
        if len(value) != len(self.labels):
            raise InputError(f"{len(value)} values for {len(self.labels)} labels, expected one for all, or as many")
        return value

    def _predicted(self, index: int, boxes: Boxes, scale: str) -> Iterator[Object]:
        for box, score in zip(boxes.xyxy.tolist(), boxes.scores.tolist(), strict=True):
            share = score / boxes.scores[0].item() if scale == "minmax" else None
            yield self._object(index, self.labels[index], score, box, peak=share)

    def _object(self, index: int, prompt: str, score: float, box: Sequence[int], **fields: Any) -> Object:
        image_score, presence = (
            None if values is None else values[index].item() for values in (self.scores, self.presence)
        )
        return Object(
            self.labels[index], index, prompt, score, image_score, presence, (box[0], box[1], box[2], box[3]), **fields
        )

    def _regions(
        self,
        index: int,
        threshold: float,
        scale: str,
        min_area: float,
        find: "Callable[[Tensor], readout.Components]",
        masks: bool,
        label_map: "LabelMap | None",
    ) -> list[Object]:
        """The objects of one label, by the connected components of its mask. Its maps are gone afterwards."""
        cosine = self._cosine(index)
        stretch = readout.min_max_of(cosine) if scale == "minmax" else None
        mask = self._mask(cosine, threshold, stretch, scale).cpu()
        if not mask.any():
            return []
        values = at_least_float32(cosine).cpu().numpy()
        top, left = (readout.extent(mask.any(dim=dim)) for dim in (1, 0))  # most of an image is nothing
        labels, spans = find(mask[top, left])
        least = min_area * mask.numel()
        objects = []
        for number, inner in enumerate(spans, start=1):
            region = labels[inner] == number
            if np.count_nonzero(region) < least:
                continue
            rows, columns = (
                slice(part.start + start, part.stop + start)
                for part, start in zip(inner, (top.start, left.start), strict=True)
            )
            y, x = readout.peak_inside(values[rows, columns], region)
            point = (columns.start + x, rows.start + y)
            if label_map is not None:
                label_map.add(index, (rows, columns), region, values)
            objects.append(
                self._object(
                    index,
                    self._best_phrase(index, point),
                    float(values[point[1], point[0]]),
                    (columns.start, rows.start, columns.stop, rows.stop),
                    point=point,
                    rle=run_lengths(region, (rows, columns), self.size) if masks else None,
                )
            )
        if stretch is None:
            return objects
        peaks = stretch(
            torch.tensor([one.score for one in objects], dtype=torch.float32, device=cosine.device)
        ).tolist()
        return [replace(one, peak=peak) for one, peak in zip(objects, peaks, strict=True)]

    def _mask(self, cosine: Tensor, threshold: float, stretch: Callable[[Tensor], Tensor] | None, scale: str) -> Tensor:
        if scale == "probability":
            return self._probability(cosine) > threshold
        mask = torch.empty(cosine.shape, dtype=torch.bool, device=cosine.device)
        for band in readout.bands(*mask.shape):
            torch.gt(cosine[band] if stretch is None else stretch(cosine[band]), threshold, out=mask[band])
        return mask

    def _best_phrase(self, index: int, point: tuple[int, int]) -> str:
        """The phrase of a label that is most similar at a pixel `(x, y)`."""
        phrases = (self.labels[index],) if self.vocabulary is None else self.vocabulary.prompts[index]
        if len(phrases) == 1:
            return phrases[0]
        maps = [self.maps[phrase] for phrase in self._phrases[index]]
        (x, y), (rows, cols) = point, maps[0].shape
        at = [values[y * rows // self.size.height, x * cols // self.size.width].item() for values in maps]
        return phrases[int(np.argmax(at))]

    def _find_instances(self, instances: str) -> tuple[Any, Any]:
        """How masks come apart, and what makes boxes of them."""
        if instances not in INSTANCES:
            raise InputError(f"instances is {instances!r}, expected one of {', '.join(INSTANCES)}")
        ways = {
            "component": (readout.components, readout.component_boxes),
            "label": (readout.whole, readout.whole_box),
        }
        return ways[instances]

    def points(self) -> Int[Tensor, "p 2"]:
        """The pixel where each prompt's map is highest, or the middle of its best box where the model itself predicts
        boxes (a map made of boxes is flat on top): `(p, 2)` int, `xy`."""
        return torch.tensor([self._point(index) for index in range(len(self.labels))], dtype=torch.int64, device="cpu")

    def segment(self, background: float | None = None) -> Int[Tensor, "y x"]:
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
            return readout.segment(self._softmax, groups, background)
        labels = readout.segment(self._softmax, groups, None)
        return labels if background is None else labels.masked_fill_(self._softmax.best < background, -1)

    def to(self, device: torch.device | str) -> "Localization":
        """The same on another device; scores in float32 at least."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else at_least_float32(tensor).to(device)

        return replace(self, maps=self.maps.to(device), scores=moved(self.scores), presence=moved(self.presence))

    @cached_property
    def _softmax(self) -> readout.SoftmaxArgmax:
        scale = 1.0 if self.logit_scale is None else self.logit_scale
        if self.refined is None and isinstance(self.maps, Tensor):
            return readout.grid_softmax_argmax(scale * self.maps[self._order], self.size)
        return readout.softmax_argmax(scale * self._phrase(index) for index in self._order)

    @property
    def _order(self) -> list[int]:
        """Phrases of the background first: they win a tie, as where they are the field's class 0."""
        return sorted(range(len(self._groups)), key=lambda index: self._groups[index] >= 0)

    @cached_property
    def _groups(self) -> Sequence[int]:
        """For each phrase the index of its prompt, −1 for background."""
        return range(len(self.labels)) if self.vocabulary is None else self.vocabulary.groups

    @cached_property
    def _phrases(self) -> list[list[int]]:
        """The indices of each prompt's phrases."""
        if self.vocabulary is None:
            return [[index] for index in range(len(self.labels))]
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
        return upsampled if self.refined is None else self.refined(upsampled)

    def _find_scale(self, scale: str) -> Callable[[Tensor], Tensor]:
        if scale not in SCALES:
            raise InputError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
        return {"minmax": readout.min_max, "cosine": lambda cosine: cosine, "probability": self._probability}[scale]

    def _probability(self, cosine: Tensor) -> Tensor:
        if self.logit_scale is None:
            return cosine
        return (self.logit_scale * cosine - self._softmax.log_sum_exp).exp()


class LabelMap:
    """A label map: each pixel of an object has the label with the highest cosine there."""

    def __init__(self, size: Size):
        self._best = np.full(tuple(size), -np.inf, dtype=np.float32)
        self._winner = np.zeros(tuple(size), dtype=np.uint16)

    def add(self, index: int, span: Span, region: np.ndarray, values: np.ndarray) -> None:
        """An object of label `index`: its `region` in the rows and columns of `span`, and the label's map `(y, x)`."""
        best, winner, values = self._best[span], self._winner[span], values[span]
        ahead = region & (values > best)
        best[ahead], winner[ahead] = values[ahead], index + 1

    def png(self, labels: int) -> bytes:
        """As a PNG, 0 for background and else 1 + the label's index: 8 bit up to 255 labels, else 16."""
        file = io.BytesIO()
        Image.fromarray(self._winner.astype(np.uint8) if labels <= 255 else self._winner).save(file, format="PNG")
        return file.getvalue()


def _above(boxes: Boxes, threshold: float, scale: str, instances: str) -> Boxes:
    """Predicted boxes whose score is above the threshold: all, or the best one."""
    best = boxes.scores[:1] if scale == "minmax" else 1
    kept = torch.nonzero(boxes.scores > threshold * best)[:, 0][: 1 if instances == "label" else None]
    return Boxes(boxes.xyxy[kept], boxes.scores[kept])
