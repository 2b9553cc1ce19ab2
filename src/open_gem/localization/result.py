"""The result for one image and its prompts: small; maps, masks, boxes, points and label maps are made on demand."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, reduce
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from open_gem import readout
from open_gem.errors import InputError, PromptError
from open_gem.files import to_json, write_file
from open_gem.images.read import ImageLike, read_image
from open_gem.localization.crisp import Drawn, Segmenter, claimed, draw, paint, regions_of, united
from open_gem.objects import Object, check_nms, suppressed, to_detections, to_frame
from open_gem.readout import Boxes
from open_gem.rle import Span, run_lengths
from open_gem.tensors import at_least_float32
from open_gem.text import Vocabulary
from open_gem.types import Size
from open_gem.windows import MergedMaps

if TYPE_CHECKING:
    from pandas import DataFrame
    from supervision import Detections

SCALES = ("minmax", "cosine", "probability")
"""Scales of `Localization.heatmaps`."""

INSTANCES = ("component", "label")
"""Kinds of objects: each connected component of a label's mask, or the whole mask."""

PRESENCE = 0.5
"""Default presence from which a label counts as present. Below it the label is *absent*: its map has a maximum too, but
that is no detection. Recalibrate it for other models, prompts and images."""

MIN_AREA = 0.0005
"""Default share of the image's pixels that an object has at least."""

ABSENT = ("none", "presence", "denoise")
"""Rules for which labels are absent: none; those with a low presence; or those that win no pixel clearly (RADSeg)."""

DENOISE = 0.5
"""Softmax probability that a label reaches somewhere, or the rule "denoise" finds it absent."""


def check_absent(rule: str) -> str:
    """Return the rule itself, a name of `ABSENT`. Raises InputError for another."""
    if rule not in ABSENT:
        raise InputError(f"absent is {rule!r}, expected one of {', '.join(ABSENT)}")
    return rule


RegionVisitor = Callable[[int, Span, np.ndarray, np.ndarray], None]


class Maps(Sequence[Tensor]):
    """One map `(y, x)` per label, made on access: index by number or label, iterate, or `stack()` them all.

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
        return self._make(_label_index(self.labels, which))

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._make, range(len(self)))

    def __contains__(self, label: object) -> bool:
        return label in self.labels

    def __repr__(self) -> str:
        return f"Maps({', '.join(map(repr, self.labels))})"

    def stack(self) -> Tensor:
        """Return all maps at once, `(p, y, x)`."""
        return torch.stack(list(self))


def _label_index(labels: tuple[str, ...], which: int | str) -> int:
    if isinstance(which, str):
        if which not in labels:
            raise PromptError(f"no label {which!r} here, expected one of {', '.join(labels)}")
        return labels.index(which)
    return range(len(labels))[which]


@dataclass(frozen=True, eq=False, repr=False)
class Localization:
    """The result for one image and its prompts. A notebook shows it as an image, `print` as one line.

    labels       what is reported: the prompts, or the labels of a `Vocabulary`
    maps         `(q, r, k)` cosine of each patch with each prompt, in [-1, 1]: small, keep this one. Models trained to
                 localize give a probability in [0, 1] instead; "cosine" below means these values, whichever they are.
                 Redundancy removal leaves values that are not quite cosines. `MergedMaps` if the maps of several views
                 were merged
    size         height and width of the original image, at which all views are given
    scores       `(p,)` image-level cosine of each label with the pooled embedding, as the model was trained: *whether*
                 it is in the image, while the maps say *where*; with several windows, that of their mean. Models
                 trained to localize have a score of their own. None if the features were encoded without the pooled
                 embedding
    logit_scale  factor of cosines before a softmax over prompts; None if each prompt has a probability of its own,
                 independent of the others
    detections   boxes that the model itself predicts, one `Boxes` per label, best first; None if it predicts none
    presence     `(p,)` in [0, 1]: `scores` as a probability that the label is in the image, each label by itself; see
                 `Localizer`. None if there are no scores, or nothing to compare them with
    vocabulary   the labels, their prompts and those of the background; by default every label is its own one prompt
    refiner      makes a refined map `(y, x)` of an upsampled one; None leaves the maps as they are. It may keep what it
                 computed of the image: see `Pamr`
    segmenter    draws a crisp mask in place of each region of a label's mask, see `Sam`; None leaves regions as they
                 are. Masks, objects and label maps are its own then; heatmaps, scores and points stay the map's
    image        the image as the localizer was called with it, to draw on: a reference, which keeps that object alive
                 and costs nothing else (a path costs nothing at all; it is read again when something is drawn). None
                 after `locate`, which knows no image

    Maps, masks and label maps are on the device of `maps`; boxes and points are on the CPU.
    """

    labels: tuple[str, ...]
    maps: Float[Tensor, "q r k"] | MergedMaps
    size: Size
    scores: Float[Tensor, " p"] | None = None
    logit_scale: float | None = 100.0
    detections: tuple[Boxes, ...] | None = None
    presence: Float[Tensor, " p"] | None = None
    vocabulary: Vocabulary | None = None
    refiner: Callable[[Tensor], Tensor] | None = None
    segmenter: Segmenter | None = None
    image: ImageLike | None = field(default=None, compare=False)

    # Maps, masks, boxes ----------------------------------------------------------------------------------------------

    @property
    def similarity(self) -> Float[Tensor, "q r k"]:
        """`maps` as one tensor: `(q, r, k)`, or `(q, y, x)` of `MergedMaps`, made on demand and large."""
        return self.maps if isinstance(self.maps, Tensor) else self.maps.stack()

    def heatmaps(self, scale: str = "minmax") -> Maps:
        """Return one map `(y, x)` per label.

        scale  "minmax" stretches each map to [0, 1] (to look at; it makes an absent thing look present); "cosine"
               leaves raw values in [-1, 1]; "probability" is the softmax of logit_scale × cosine over all prompts,
               those of the background included (with one prompt, 1 everywhere; without `logit_scale`, the values as
               they are)

        A label's value at a pixel is the maximum over its prompts. Raises InputError for another scale.
        """
        stretch = self._stretch(scale)
        return Maps(self.labels, lambda index: stretch(self._label_map(index)))

    def masks(
        self,
        threshold: float = 0.5,
        scale: str = "minmax",
        *,
        presence: float | Sequence[float] = PRESENCE,
        absent: str = "none",
    ) -> Maps:
        """Return a bool mask `(y, x)` per label: heatmap above `threshold` (the paper on OpenImages: min-max, 0.5).

        Masks of labels that are absent by the rule `absent`, see `present`, are empty.
        """
        heatmaps, present = self.heatmaps(scale), self.present(presence, absent=absent)

        def make(index: int) -> Tensor:
            heatmap = heatmaps[index]
            mask = readout.above(heatmap, threshold) & present[index]
            return mask if self.segmenter is None else paint(self._drawn(mask.cpu(), heatmap, scale), mask)

        return Maps(self.labels, make)

    def boxes(
        self, threshold: float | Sequence[float] = 0.5, scale: str = "minmax", *, instances: str = "component"
    ) -> list[Boxes]:
        """Return the boxes of each label, best first, whether it is present or not, however small: those of `objects`
        with presence and min_area 0."""
        by_label: list[list[Object]] = [[] for _ in self.labels]
        for obj in self.objects(threshold, scale, presence=0.0, min_area=0.0, instances=instances, masks=False):
            by_label[obj.index].append(obj)
        return [readout.boxes_of([obj.box for obj in own], [obj.score for obj in own]) for own in by_label]

    def present(self, presence: float | Sequence[float] = PRESENCE, *, absent: str = "presence") -> tuple[bool, ...]:
        """Return whether each label is in the image, by a rule of `ABSENT`.

        "presence"  its presence is not below the threshold `presence`, one for all or one per label; every label if
                    nothing is known of presence
        "denoise"   its softmax probability, against all prompts, is `DENOISE` or more somewhere on the maps: RADSeg's
                    prompt denoising. With a single prompt the softmax is 1 and the label always present
        "none"      every label

        Raises InputError for another rule or a wrong number of thresholds.
        """
        thresholds = self._each(presence)
        if check_absent(absent) == "denoise":
            return tuple(max(self._highest[prompt] for prompt in own) >= DENOISE for own in self._prompts)
        if absent == "none" or self.presence is None:
            return (True,) * len(self.labels)
        return tuple(not value < threshold for value, threshold in zip(self.presence.tolist(), thresholds, strict=True))

    @cached_property
    def _highest(self) -> list[float]:
        """The highest softmax probability of each prompt on the unrefined maps."""
        if self.logit_scale is None:
            return [values.max().item() for values in self.maps]
        return [
            (self.logit_scale * at_least_float32(values) - self._cell_log_sum_exp).max().exp().item()
            for values in self.maps
        ]

    @cached_property
    def _cell_log_sum_exp(self) -> Tensor:
        """log Σ exp(logit) over all prompts at each cell of the unrefined maps, `(r, k)`."""
        if isinstance(self.maps, Tensor):
            rows = at_least_float32(self.maps).unbind(dim=1)  # by row: no second copy of all maps
            return torch.stack([(self._scale * row).logsumexp(dim=0) for row in rows])
        return readout.softmax_argmax(self._scale * at_least_float32(values) for values in self.maps).log_sum_exp

    def objects(
        self,
        threshold: float | Sequence[float] = 0.5,
        scale: str = "minmax",
        *,
        presence: float | Sequence[float] = PRESENCE,
        absent: str = "presence",
        min_area: float = MIN_AREA,
        instances: str = "component",
        exclusive: bool = False,
        nms: float | None = None,
        masks: bool = True,
        visit: RegionVisitor | None = None,
    ) -> list[Object]:
        """Return the objects in the image: the connected components of each present label's mask, or the boxes that the
        model itself predicts.

        threshold  heatmaps above it are the mask, of `scale` as in `heatmaps`: one for all labels, or one per label.
                   Predicted boxes are kept if their score is above it: as a share of the label's best with "minmax",
                   as it is with other scales
        presence   labels below it are absent and have no objects, see `present`; 0 keeps all
        absent     another rule for it, see `present`
        min_area   share of the image's pixels, in [0, 1], that an object has at least
        instances  "component", or "label": one object for all of a label's mask, or the best predicted box
        exclusive  masks of different labels do not overlap: a pixel of several belongs to the label whose cosine is
                   highest there. `min_area` then counts what is left. Pixels that a segmenter adds belong to the first
                   label that it draws there
        nms        non-maximum suppression: of two objects, of any labels, whose boxes have an IoU above this, in
                   [0, 1], the less confident is dropped; None keeps both
        masks      False leaves out `Object.rle`
        visit      called for each object that has a mask, with its label's index, its rows and columns, its mask there,
                   and its label's whole map of cosines `(y, x)`

        An object's score is its highest cosine; its `confidence` compares objects of different labels and images.
        Labels come in order, in each the object with the highest score first.

        Raises InputError for an unknown scale or kind of instances, a wrong number of thresholds, an IoU out of range,
        or `exclusive` with a model that predicts boxes itself.
        """
        self._stretch(scale)
        if instances not in INSTANCES:
            raise InputError(f"instances is {instances!r}, expected one of {', '.join(INSTANCES)}")
        check_nms(nms)
        if exclusive and self.detections is not None:
            raise InputError("exclusive masks of a model that predicts boxes itself, expected nms: boxes have no masks")
        present = zip(self._each(threshold), self.present(presence, absent=absent), strict=True)
        limits = {index: limit for index, (limit, is_present) in enumerate(present) if is_present}
        if self.detections is not None:
            objects = [
                obj for index, limit in limits.items() for obj in self._predicted(index, limit, scale, instances)
            ]
            return objects if nms is None else suppressed(objects, nms)
        winner = self._winner(limits, scale) if exclusive else None
        objects = []
        for index, limit in limits.items():
            now, later = (visit, None) if nms is None else (None, visit)
            regions = self._regions(index, limit, scale, min_area, instances, masks or later is not None, now, winner)
            objects += sorted(regions, key=lambda obj: -obj.score)
        if nms is not None:
            objects = suppressed(objects, nms)
            if visit is not None:
                self._visit(objects, visit)
        return objects if masks else [replace(obj, rle=None) for obj in objects]

    def points(self) -> Int[Tensor, "p 2"]:
        """Return the pixel where each label's map is highest, or the middle of its best box if the model itself
        predicts boxes (a map made of boxes is flat on top): `(p, 2)` int, `xy`."""
        return torch.tensor([self._point(index) for index in range(len(self.labels))], dtype=torch.int64, device="cpu")

    def segment(
        self,
        background: float | None = None,
        *,
        presence: float | Sequence[float] = PRESENCE,
        absent: str = "none",
        regions: Int[Tensor, "y x"] | None = None,
    ) -> Int[Tensor, "y x"]:
        """Return the most probable label of each pixel: `(y, x)` int64, an index into `labels`, −1 for background.

        A pixel is background if a background prompt of the vocabulary is best there, or if the best softmax probability
        (of logit_scale × cosine over all prompts) is below `background`, a number in [0, 1]; None has no such limit.
        The paper uses 0.8 with PascalVOC's 20 classes. With one prompt the softmax is 1 everywhere: use `masks` then.
        Without `logit_scale` there is no softmax: the values are probabilities already.

        Labels that are absent by the rule `absent`, see `present`, win no pixel; probabilities stay those against all
        prompts. With `regions`, each of them, by its number from 1, gets the label of most of its pixels.

        With a `segmenter`, each connected component of a label becomes the mask that it draws. A pixel of several masks
        is that of the label that is most probable there. A pixel that is in no mask any more is background, or keeps
        its label if there is neither a background prompt nor a limit.
        """
        if regions is not None:
            labels = self.segment(background, presence=presence, absent=absent)
            return readout.majority(labels, regions.to(labels.device))
        coarse = self._segment(background, presence, absent)
        if self.segmenter is None:
            return coarse
        has_background = background is not None or -1 in self._groups
        labels = torch.full_like(coarse, -1) if has_background else coarse.clone()
        best = torch.full_like(coarse, -1, dtype=torch.float32)  # below any probability
        for index in range(len(self.labels)):
            if (own := coarse == index).any():
                probability = self._probability(self._label_map(index))
                mask = paint(self._drawn(own.cpu(), probability, "probability"), own)
                wins = mask & (probability > best)
                labels[wins], best[wins] = index, probability[wins]
        return labels

    def _segment(self, background: float | None, presence: float | Sequence[float], absent: str) -> Tensor:
        """Return `segment` of the maps alone."""
        if background is not None and not 0 <= background <= 1:
            raise InputError(f"background is {background}, expected a probability in [0, 1] or None")
        present = self.present(presence, absent=absent)
        order = [index for index in self._order if self._groups[index] < 0 or present[self._groups[index]]]
        if not order:
            return torch.full(tuple(self.size), -1, dtype=torch.int64, device=self.maps.device)
        groups = [self._groups[index] for index in order]
        if background is not None and self.logit_scale is not None and len(order) == len(self._order):
            return readout.segment(self._softmax, groups, background)
        best, winner = self._winners(order)
        labels = readout.label_of(winner, groups)
        if background is None:
            return labels
        probability = best if self.logit_scale is None else (best - self._softmax.log_sum_exp).exp()
        return labels.masked_fill_(probability < background, -1)

    # One label, another device ---------------------------------------------------------------------------------------

    def __getitem__(self, which: int | str) -> "Localization":
        """Return one label by itself. The prompts of all others become its background, so probabilities stay the same,
        and `segment` says where it wins against them.

        Raises PromptError for an unknown label, IndexError for a number out of range.
        """
        index = _label_index(self.labels, which)
        own = self._prompts[index]
        rest = [prompt for prompt in range(len(self._groups)) if prompt not in own]
        label, texts = self.labels[index], self._vocabulary.all_prompts
        single = replace(
            self,
            labels=(label,),
            maps=self.maps[[*own, *rest]],
            scores=None if self.scores is None else self.scores[[index]],
            detections=None if self.detections is None else (self.detections[index],),
            presence=None if self.presence is None else self.presence[[index]],
            vocabulary=Vocabulary((label,), (tuple(texts[at] for at in own),), tuple(texts[at] for at in rest)),
        )
        object.__setattr__(single, "_whole", self)
        return single

    def to(self, device: torch.device | str) -> "Localization":
        """Move to another device; scores in float32 at least."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else at_least_float32(tensor).to(device)

        return replace(self, maps=self.maps.to(device), scores=moved(self.scores), presence=moved(self.presence))

    def __getstate__(self) -> dict[str, Any]:
        return {setting.name: getattr(self, setting.name) for setting in fields(self)}  # not what is cached

    # To look at, and for other libraries -----------------------------------------------------------------------------

    def __repr__(self) -> str:
        shown = [
            label
            + ("" if self.presence is None else f" {self.presence[index].item():.2f}")
            + ("" if is_present else " (absent)")
            for index, (label, is_present) in enumerate(zip(self.labels[:10], self.present()[:10], strict=True))
        ]
        more = [f"{len(self.labels) - 10} more"] if len(self.labels) > 10 else []
        return f"<Localization of {self.size.height}x{self.size.width} pixels: {', '.join(shown + more)}>"

    def plot(self, image: ImageLike | None = None, **settings: Any) -> Image.Image:
        """Draw the image and each label's heatmap with its objects; absent labels are greyed and crossed out.

        image     by default the one that was localized (`image`); without any, maps are drawn alone
        settings  as of `objects`

        Raises ImageError if the image cannot be read, InputError if it has another size than the one localized.
        """
        from open_gem.localization import drawing

        source = self.image if image is None else image
        return drawing.figure(self, None if source is None else read_image(source), **settings)

    def save(self, path: str | PathLike[str], image: ImageLike | None = None, **settings: Any) -> None:
        """Write `plot` to a file whose ending is that of an image format, such as .png, or `to_json` to a .json file.

        Raises InputError for another ending, OutputError if the file cannot be written, and errors as `plot`.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            return write_file(path, self.to_json(indent=1, **settings).encode() + b"\n")
        if (form := Image.registered_extensions().get(path.suffix.lower())) not in Image.SAVE:
            raise InputError(f"cannot save {str(path)!r}, expected a name that ends with .png, .jpg, .webp or .json")
        drawn = self.plot(image, **settings)
        return write_file(path, lambda file: drawn.save(file, form))

    def _repr_png_(self) -> bytes:
        """Return the PNG that a notebook shows."""
        from open_gem.localization import drawing

        return drawing.png(self.plot())

    def to_dict(
        self, *, presence: float | Sequence[float] = PRESENCE, absent: str = "presence", **settings: Any
    ) -> dict[str, Any]:
        """Return labels and objects as values that JSON can hold; settings as of `objects`."""
        objects = self.objects(presence=presence, absent=absent, **settings)
        return {
            "size": self.size._asdict(),
            "labels": self.labels_to_dict(presence, absent),
            "objects": [obj.to_dict() for obj in objects],
        }

    def labels_to_dict(
        self, presence: float | Sequence[float] = PRESENCE, absent: str = "presence"
    ) -> list[dict[str, Any]]:
        """Return label, score, presence, whether it is present by the rule `absent`, and point `xy` of each label."""
        scores, presences = (
            [None if values is None else round(values[index].item(), 6) for index in range(len(self.labels))]
            for values in (self.scores, self.presence)
        )
        columns = self.labels, scores, presences, self.present(presence, absent=absent), self.points().tolist()
        names = "label", "score", "presence", "present", "point"
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def to_json(self, *, indent: int | None = None, **settings: Any) -> str:
        """Return `to_dict` as JSON text."""
        return to_json(self.to_dict(**settings), indent=indent)

    def to_pandas(self, **settings: Any) -> "DataFrame":
        """Return the objects as a table, one per row; settings as of `objects`. Raises InputError if pandas is
        missing."""
        return to_frame(self.objects(**{"masks": False, **settings}))

    def to_supervision(self, **settings: Any) -> "Detections":
        """Return the objects as supervision's `Detections`, most confident first, see `objects.to_detections`; settings
        as of `objects`. Raises InputError if supervision is missing."""
        return to_detections(sorted(self.objects(**settings), key=lambda obj: -obj.confidence), self.size)

    # How they are made -----------------------------------------------------------------------------------------------

    def _each(self, value: float | Sequence[float]) -> Sequence[float]:
        value = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
        if not isinstance(value, Sequence):
            return [float(value)] * len(self.labels)
        if len(value) != len(self.labels):
            raise InputError(f"{len(value)} values for {len(self.labels)} labels, expected one for all, or as many")
        return value

    def _predicted(self, index: int, threshold: float, scale: str, instances: str) -> Iterator[Object]:
        """Yield the boxes that the model predicts for a label, above the threshold."""
        assert self.detections is not None
        boxes = self.detections[index]
        best = boxes.scores[:1] if scale == "minmax" else 1
        kept = torch.nonzero(boxes.scores > threshold * best)[:, 0][: 1 if instances == "label" else None]
        for box, score in zip(boxes.xyxy[kept].tolist(), boxes.scores[kept].tolist(), strict=True):
            yield self._object(index, self.labels[index], score, box, peak=score / boxes.scores[0].item())

    def _object(self, index: int, prompt: str, score: float, box: Sequence[int], **values: Any) -> Object:
        image_score, presence = (
            None if numbers is None else numbers[index].item() for numbers in (self.scores, self.presence)
        )
        return Object(
            self.labels[index], index, prompt, score, image_score, presence, (box[0], box[1], box[2], box[3]), **values
        )

    def _regions(
        self,
        index: int,
        threshold: float,
        scale: str,
        min_area: float,
        instances: str,
        masks: bool,
        visit: RegionVisitor | None,
        winner: Tensor | None,
    ) -> list[Object]:
        """Return the objects of one label, by the regions of its mask where it is the `winner`. Its maps are released
        afterwards."""
        cosine = self._label_map(index)
        stretch = readout.min_max_of(cosine)
        mask = self._mask(cosine, threshold, stretch, scale).cpu()
        mask = mask if winner is None else mask & (winner == index)
        flags = mask.numpy()  # numpy's `any` takes a tenth of the time of torch's
        if not flags.any():
            return []
        values = at_least_float32(cosine).cpu().numpy()
        fewest = min_area * mask.numel()
        maps = [self.maps[prompt] for prompt in self._prompts[index]]
        whole = instances == "label"
        if self.segmenter is None:
            drawn = draw(regions_of(mask, values, fewest, whole=whole), None, None)
        else:
            heatmap = self._stretch(scale)(cosine)
            drawn = self._drawn(mask, heatmap, scale, values, 0 if whole else fewest)
            if whole:
                drawn = [united([*drawn], values)] if np.count_nonzero(flags) >= fewest else []
            if winner is not None:
                drawn = claimed(drawn, winner.numpy(), index)
        objects = []
        for (span, region, point), quality in drawn:
            rows, columns = span
            if visit is not None:
                visit(index, span, region, values)
            prompt, probability = self._best_prompt(index, maps, point)
            objects.append(
                self._object(
                    index,
                    prompt,
                    float(values[point[1], point[0]]),
                    (columns.start, rows.start, columns.stop, rows.stop),
                    probability=probability,
                    point=point,
                    rle=run_lengths(region, span, self.size) if masks else None,
                    mask_quality=quality,
                )
            )
        scores = torch.tensor([obj.score for obj in objects], dtype=torch.float32, device=cosine.device)
        return [replace(obj, peak=peak) for obj, peak in zip(objects, stretch(scores).tolist(), strict=True)]

    def _winner(self, limits: Mapping[int, float], scale: str) -> Int[Tensor, "y x"]:
        """Return which label has the highest cosine at each pixel, among those whose mask has it, by their thresholds;
        −1 where no mask is. On the CPU."""
        winner = torch.full(tuple(self.size), -1, dtype=torch.int32, device=self.maps.device)
        best = torch.full(tuple(self.size), -math.inf, dtype=torch.float32, device=self.maps.device)
        for index, limit in limits.items():
            cosine = self._label_map(index)
            ahead = self._mask(cosine, limit, readout.min_max_of(cosine), scale) & (cosine > best)
            best = torch.where(ahead, cosine, best)
            winner.masked_fill_(ahead, index)
        return winner.cpu()

    def _visit(self, objects: Sequence[Object], visit: RegionVisitor) -> None:
        """Call `visit` for objects that have masks, label by label."""
        for index, own in groupby(objects, key=lambda obj: obj.index):
            values = at_least_float32(self._label_map(index)).cpu().numpy()
            for obj in own:
                left, top, right, bottom = obj.box
                span = slice(top, bottom), slice(left, right)
                assert obj.mask is not None
                visit(index, span, obj.mask[span], values)

    def _drawn(
        self, mask: Tensor, heatmap: Tensor, scale: str, values: np.ndarray | None = None, fewest: float = 0
    ) -> Iterator[Drawn]:
        """Yield the regions of a mask `(y, x)` on the CPU as the segmenter draws them.

        heatmap  `(y, x)` of the label, at a scale
        values   by which the point of a region is chosen; None: the heatmap itself
        fewest   pixels of a region; smaller ones are left out
        """
        heatmap = at_least_float32(heatmap)
        values = heatmap.cpu().numpy() if values is None else values
        confidence = readout.min_max(heatmap) if scale == "cosine" else heatmap
        return draw(regions_of(mask, values, fewest), self.segmenter, confidence)

    def _mask(self, cosine: Tensor, threshold: float, stretch: Callable[[Tensor], Tensor], scale: str) -> Tensor:
        if scale == "probability":
            return readout.above(self._probability(cosine), threshold)
        mask = torch.empty(cosine.shape, dtype=torch.bool, device=cosine.device)
        for band in readout.bands(*mask.shape):
            mask[band] = readout.above(stretch(cosine[band]) if scale == "minmax" else cosine[band], threshold)
        return mask

    def _best_prompt(self, index: int, maps: Sequence[Tensor], point: tuple[int, int]) -> tuple[str, float | None]:
        """Return the prompt of a label, by the maps of all its prompts, that is most similar at a pixel `(x, y)`, and
        the label's softmax probability there, the sum of theirs; None without `logit_scale`."""
        (x, y), (rows, cols) = point, maps[0].shape
        cell = y * rows // self.size.height, x * cols // self.size.width
        cosines = [values[cell].item() for values in maps]
        best = int(np.argmax(cosines))
        text = str(self._vocabulary.prompts[index][best])
        if self.logit_scale is None:
            return text, None
        total = self._cell_log_sum_exp[cell].item()
        if math.isnan(total):  # maps of some prompts are unknown
            return text, None
        return text, min(1.0, sum(math.exp(self.logit_scale * cosine - total) for cosine in cosines))

    def _point(self, index: int) -> tuple[int, int]:
        if self.detections is not None and len(best := self.detections[index].xyxy[:1]):
            left, top, right, bottom = best[0].tolist()
            return (left + right - 1) // 2, (top + bottom - 1) // 2
        return readout.peak(self._label_map(index))

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.labels) if self.vocabulary is None else self.vocabulary

    _whole = None  # of a single label: the localization that it comes from, whose softmax it shares

    @cached_property
    def _log_sum_exp(self) -> Tensor:
        """log Σ exp(logit) over all prompts at each pixel, `(y, x)`."""
        return self._softmax.log_sum_exp if self._whole is None else self._whole._log_sum_exp

    @cached_property
    def _softmax(self) -> readout.SoftmaxArgmax:
        """All prompts against each other, in `_order`."""
        if self.refiner is None and isinstance(self.maps, Tensor):
            return readout.grid_softmax_argmax(self._scale * self.maps[self._order], self.size)
        return readout.softmax_argmax(self._scale * self._prompt_map(index) for index in self._order)

    @property
    def _scale(self) -> float:
        """The factor of values before a softmax over prompts."""
        return 1.0 if self.logit_scale is None else self.logit_scale

    def _winners(self, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the highest logit of each pixel, and which of `prompts` has it: `(y, x)` both."""
        if self.refiner is None and isinstance(self.maps, Tensor):
            return readout.grid_argmax(self._scale * self.maps[prompts], self.size)
        compared = readout.softmax_argmax(self._scale * self._prompt_map(index) for index in prompts)
        return compared.best, compared.winner

    @property
    def _order(self) -> list[int]:
        """Return the order of prompts, those of the background first: they win a tie, as if they were the field's class
        0."""
        return sorted(range(len(self._groups)), key=lambda index: self._groups[index] >= 0)

    @cached_property
    def _groups(self) -> tuple[int, ...]:
        """Return the index of each prompt's label, −1 for background."""
        return self._vocabulary.groups

    @cached_property
    def _prompts(self) -> list[list[int]]:
        """Return the indices of each label's prompts."""
        return self._vocabulary.by_label(range(len(self._groups)))

    def _label_map(self, index: int) -> Tensor:
        """Return the maximum over a label's prompts at each pixel, `(y, x)`."""
        return reduce(torch.maximum, map(self._prompt_map, self._prompts[index]))

    def _prompt_map(self, index: int) -> Tensor:
        upsampled = readout.upsample(self.maps[index], self.size)
        return upsampled if self.refiner is None else self.refiner(upsampled)

    def _stretch(self, scale: str) -> Callable[[Tensor], Tensor]:
        """Return the function that brings a map of cosines to a scale."""
        if scale not in SCALES:
            raise InputError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
        return {"minmax": readout.min_max, "cosine": lambda cosine: cosine, "probability": self._probability}[scale]

    def _probability(self, cosine: Tensor) -> Tensor:
        if self.logit_scale is None:
            return cosine
        return (self.logit_scale * cosine - self._log_sum_exp).exp()
