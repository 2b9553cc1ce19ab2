"""An image becomes a row, in three steps that any engine can spread as it likes:

    ready = labeling.prepare(item)            # reading and decoding; a row where it cannot be
    found = labeling.find([ready, …])         # the model, on images that come to one shape
    row   = labeling.row(found[0])            # objects, masks, label map

Presence before place: a label is looked for only in an image that has it as a whole (`Localization.presence` at or
above the label's threshold), because the map of an absent thing has a maximum too, and stretched to [0, 1] looks as if
it were there.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Condition
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import open_gem
from open_gem import readout
from open_gem.errors import InputError, OpenGemError
from open_gem.files import to_json
from open_gem.images.pixels import size_of
from open_gem.label.decoding import decode
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Manifest, Row, row_of
from open_gem.label.reading import SECONDS, absolute, one_line, read
from open_gem.label.sources import Item, Source, printable
from open_gem.localization import SCALES, Localization
from open_gem.localizer import Localizer
from open_gem.rle import Span, run_lengths
from open_gem.types import Size

BAND = 2**20  # pixels of a map that are worked on at a time, where that needs more maps

OUTPUTS = ("boxes", "masks", "points", "labelmap", "heatmaps")
PER = ("component", "label")


def check_settings(outputs: Sequence[str], scale: str, per: str, least_area: float) -> None:
    """Raises InputError for values that do not exist."""
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise InputError(f"output {unknown[0]!r}, expected some of {', '.join(OUTPUTS)}")
    for name, value, known in (("scale", scale, SCALES), ("per", per, PER)):
        if value not in known:
            raise InputError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if not 0 <= least_area <= 1:
        raise InputError(f"least area is {least_area!r}, expected a share of the picture in [0, 1]")


@dataclass(frozen=True, eq=False)
class Ready:
    """An image that was read: `pixels` `(3, y, x)` for the model, and the picture where somebody asks for it later."""

    item: Item
    size: Size
    seconds: float
    pixels: Tensor | None
    picture: Image.Image | None
    pages: int | None = None  # where the file has more than one


class Found(NamedTuple):
    """What the model says of an image; on the CPU."""

    item: Item
    result: Localization
    seconds: float
    pages: int | None = None


@dataclass(frozen=True, eq=False)
class Labeling:
    """How images are labelled.

    outputs     some of `OUTPUTS`; boxes are always there
    scale       of the maps that the thresholds of the ontology are about: see `Localization.heatmaps`
    per         "component": each connected part of a mask is an object of its own; "label": one object a label
    least_area  share of the picture's pixels that an object has at least, in [0, 1]
    seconds     that reading a remote image may take, and that decoding one may; decides no row but whether there is one

    Raises InputError for values that do not exist, and for heatmaps of views that are merged at pixel size.
    """

    localizer: Localizer
    ontology: Ontology
    outputs: tuple[str, ...] = ("boxes", "masks", "points")
    scale: str = "minmax"
    per: str = "component"
    least_area: float = 0.0005
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        check_settings(self.outputs, self.scale, self.per, self.least_area)
        self.localizer.text.check(self.ontology.vocabulary.phrases)
        views = self.localizer.views
        if "heatmaps" in self.outputs and views.merge == "logits" and not views.is_plain:
            raise InputError("heatmaps of views merged as logits have no patch grid: merge features, or leave them out")

    def manifest(self, source: "Source") -> Manifest:
        """All that decides a row, and where the images are."""
        settings = {
            "open_gem": open_gem.__version__,
            **({} if source.columns is None else {"columns": source.columns}),
            **self.localizer.describe(),
            "weights": self.localizer.backbone.fingerprint(),
            "ontology": self.ontology.describe(),
            "outputs": [name for name in OUTPUTS if name in self.outputs],
            "scale": self.scale,
            "per": self.per,
            "least_area": self.least_area,
        }
        return Manifest(json.loads(to_json(settings)), self.ontology.labels, source.root)

    # Three steps ------------------------------------------------------------------------------------------------------

    def prepare(self, item: Item) -> Ready | Row:
        """The image read and made ready for the model; a row with the reason where that cannot be."""
        start = perf_counter()
        try:
            picture = decode(read(item, self.seconds), self.seconds)
            plain = self.localizer.views.is_plain
            pixels = self.localizer.pixels(picture) if plain else None
            keep = not plain or self.localizer.refinement is not None
            seconds, pages = perf_counter() - start, picture.info.get("pages")
            return Ready(item, size_of(picture), seconds, pixels, picture if keep else None, pages)
        except Exception as error:  # whatever one image does to a library, the others go on
            return failed(item, error, perf_counter() - start)

    def find(self, group: Sequence[Ready]) -> list[Found]:
        """What the model says of images of one shape. Raises NotFiniteError where that is no number for one of them,
        and whatever torch raises when memory ends."""
        start = perf_counter()
        with torch.no_grad():
            results = [_on_cpu(result) for result in self._locate(group)]
        seconds = (perf_counter() - start) / len(group)
        pairs = zip(group, results, strict=True)
        return [Found(one.item, result, one.seconds + seconds, one.pages) for one, result in pairs]

    def row(self, found: Found) -> Row:
        """What was found, as a row."""
        start, result = perf_counter(), found.result
        try:
            painting = _Painting(result.size) if "labelmap" in self.outputs else None
            with ROOM.taken(result.size.height * result.size.width):  # one label at a time: each has maps as large
                objects = [one for index in self._present(result) for one in self._objects(result, index, painting)]
            fields = {
                "objects": objects,
                "labelmap": None if painting is None else painting.png(len(self.ontology.labels)),
                "similarity": self._similarity(result) if "heatmaps" in self.outputs else None,
            }
        except Exception as error:
            return failed(found.item, error, found.seconds + perf_counter() - start)
        size = {"height": result.size.height, "width": result.size.width}
        seconds = found.seconds + perf_counter() - start
        return _row(found.item, status="ok", pages=found.pages, **size, seconds=seconds, **fields)

    def _locate(self, group: Sequence[Ready]) -> list[Localization]:
        vocabulary = self.ontology.vocabulary
        if group[0].pixels is None:
            return [self.localizer(one.picture, vocabulary) for one in group if one.picture is not None]
        features = self.localizer.encode(torch.stack([one.pixels for one in group if one.pixels is not None]))
        results = self.localizer.locate(features, vocabulary, [one.size for one in group])
        if (refinement := self.localizer.refinement) is None:
            return results
        pictures = [one.picture for one in group if one.picture is not None]
        return [result.refined(picture, refinement) for result, picture in zip(results, pictures, strict=True)]

    def _present(self, result: Localization) -> Iterator[int]:
        assert result.presence is not None  # a Localizer gives it with every embedding of the whole image
        for index, presence in enumerate(result.presence.tolist()):
            if presence >= self.ontology.presence[index]:
                yield index

    def _objects(self, result: Localization, index: int, painting: "_Painting | None") -> list[dict[str, Any]]:
        """The objects of one label, best first; the maps they are made of are gone then."""
        label = _Label(self, result, index)
        objects = []
        for span, mask in label.parts():
            objects.append(label.object(span, mask))
            if painting is not None:
                painting.add(index, span, mask, label.values)
        return sorted(objects, key=lambda one: -one["score"])

    def _similarity(self, result: Localization) -> dict[str, Any]:
        by_label = self.ontology.vocabulary.by_label(list(result.similarity))
        grids = [torch.stack(some).amax(dim=0) for some in by_label]
        values = torch.stack(grids).to(torch.float16).contiguous().numpy().tobytes()
        return {"labels": list(self.ontology.labels), "grid": list(grids[0].shape), "values": values}


@dataclass(frozen=True, eq=False)
class _Label:
    """One label in one image that has it."""

    labeling: Labeling
    result: Localization
    index: int

    @cached_property
    def cosine(self) -> Tensor:
        return self.result.heatmaps("cosine")[self.index]

    @cached_property
    def values(self) -> np.ndarray:
        """The cosine `(y, x)`."""
        return self.cosine.float().numpy()

    @property
    def mask(self) -> Tensor:
        """Where the map is above the label's threshold, `(y, x)`."""
        scale, threshold = self.labeling.scale, self.labeling.ontology.threshold[self.index]
        if scale == "probability":
            return self.result.heatmaps(scale)[self.index] > threshold
        stretch = readout.min_max_of(self.cosine) if scale == "minmax" else _unchanged
        mask = torch.empty(self.cosine.shape, dtype=torch.bool, device="cpu")
        for band in _bands(*mask.shape):
            torch.gt(stretch(self.cosine[band]), threshold, out=mask[band])
        return mask

    def parts(self) -> Iterator[tuple[Span, np.ndarray]]:
        """The rows and columns of each object, and its mask in them."""
        find = readout.components if self.labeling.per == "component" else readout.whole
        mask = self.mask
        if not mask.any():
            return
        top, left = (_extent(mask.any(dim=dim)) for dim in (1, 0))  # most of a picture is nothing
        labels, spans = find(mask[top, left])
        least = self.labeling.least_area * mask.numel()
        for number, (rows, columns) in enumerate(spans, start=1):
            part = labels[rows, columns] == number
            if np.count_nonzero(part) >= least:
                yield (_shifted(rows, top.start), _shifted(columns, left.start)), part

    def object(self, span: Span, mask: np.ndarray) -> dict[str, Any]:
        rows, columns = span
        y, x = _peak(self.values[span], mask)
        point = (columns.start + x, rows.start + y)
        scores, presence = self.result.scores, self.result.presence
        return {
            "label": self.labeling.ontology.labels[self.index],
            "prompt": self._phrase(point),
            "score": float(self.values[point[1], point[0]]),
            "image_score": None if scores is None else scores[self.index].item(),
            "presence": None if presence is None else presence[self.index].item(),
            "xyxy": [columns.start, rows.start, columns.stop, rows.stop],
            "rle": run_lengths(mask, span, self.result.size) if "masks" in self.labeling.outputs else None,
            "point": list(point) if "points" in self.labeling.outputs else None,
        }

    def _phrase(self, point: tuple[int, int]) -> str:
        """The phrase of the label that is best where the object is."""
        phrases = self.labeling.ontology.vocabulary.synonyms
        if len(phrases[self.index]) == 1:
            return phrases[self.index][0]
        first = sum(map(len, phrases[: self.index]))
        at = [
            _at(self.result.maps[first + number], point, self.result.size) for number in range(len(phrases[self.index]))
        ]
        return phrases[self.index][int(np.argmax(at))]


def _peak(values: np.ndarray, mask: np.ndarray) -> tuple[int, int]:
    """Where the values `(y, x)` are highest in a mask, which has some: `(y, x)`, the first of equal ones."""
    found = None
    for band in _bands(*mask.shape):
        inside = np.where(mask[band], values[band], -np.inf)
        y, x = divmod(int(inside.argmax()), mask.shape[1])
        if found is None or inside[y, x] > values[found]:
            found = (band.start + y, x)
    assert found is not None
    return found


@dataclass
class _Painting:
    """A label map: each pixel of an object has the label with the highest cosine there."""

    size: Size

    def __post_init__(self) -> None:
        self._best = np.full(tuple(self.size), -np.inf, dtype=np.float32)
        self._winner = np.zeros(tuple(self.size), dtype=np.uint16)

    def add(self, index: int, span: Span, mask: np.ndarray, values: np.ndarray) -> None:
        best, winner, values = self._best[span], self._winner[span], values[span]
        ahead = mask & (values > best)
        best[ahead], winner[ahead] = values[ahead], index + 1

    def png(self, labels: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self._winner.astype(np.uint8) if labels <= 255 else self._winner).save(file, format="PNG")
        return file.getvalue()


def _extent(some: Tensor) -> slice:
    """From the first to the last of some of which one is true at least."""
    at = torch.nonzero(some)[:, 0]
    return slice(int(at[0]), int(at[-1]) + 1)


def _shifted(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


def _unchanged(cosine: Tensor) -> Tensor:
    return cosine


def _bands(height: int, width: int) -> Iterator[slice]:
    """Rows of which together there are about `BAND` pixels."""
    step = max(1, BAND // width)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))


class Room:
    """Lets threads at work on so many pixels at once, or on one picture that is larger alone."""

    def __init__(self, pixels: int):
        self._all = self._left = pixels
        self._changed = Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


ROOM = Room(2**26)


def failed(item: Item, error: BaseException, seconds: float) -> Row:
    """The row of an image that could not be labelled."""
    if isinstance(error, OpenGemError):
        reason = one_line(error)
    else:
        known = isinstance(error, MemoryError)
        reason = "does not fit into memory" if known else f"{type(error).__name__}: {one_line(error)}"
    return _row(item, status="error", error=printable(reason), seconds=seconds)


def _row(item: Item, **fields: Any) -> Row:
    return row_of(item.id, printable(absolute(item)), **fields)


def _at(patches: Tensor, point: tuple[int, int], size: Size) -> float:
    """The value of a map `(r, k)` in the patch that has a pixel `xy` of the picture."""
    x, y = point
    return float(patches[y * patches.shape[0] // size.height, x * patches.shape[1] // size.width])


def _on_cpu(result: Localization) -> Localization:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float().cpu()

    return replace(result, maps=result.maps.to("cpu"), scores=moved(result.scores), presence=moved(result.presence))
