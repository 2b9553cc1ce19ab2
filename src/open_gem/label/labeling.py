"""Label images in steps that any engine can spread over threads and machines:

    prepared = labeling.prepare(item)              # read and decoded; a row with the reason if that fails
    located  = labeling.locate([prepared, …])      # the model, on images of one shape
    row      = labeling.row(located[0])            # objects, masks, label map

A label is looked for only in images that contain it as a whole (`Localization.presence` at or above the label's
threshold): the map of an absent thing has a maximum too, and after min-max scaling it looks like a detection.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from time import perf_counter
from typing import Any, NamedTuple

import torch

import open_gem
from open_gem.errors import InputError, OpenGemError
from open_gem.files import to_json
from open_gem.label.decoding import decode
from open_gem.label.label_map import LabelMap
from open_gem.label.ontology import Ontology
from open_gem.label.parts import LabelRow, Manifest, row_of
from open_gem.label.reading import READ_TIMEOUT, absolute, describe_error, read
from open_gem.label.sources import Item, Source, printable
from open_gem.localization import INSTANCES, MIN_AREA, SCALES, Localization
from open_gem.localizer import load
from open_gem.locate import BATCH, AnyLocalizer, Prepared
from open_gem.objects import Object

OUTPUTS = ("boxes", "masks", "points", "labelmap", "heatmaps")


def check_settings(
    outputs: Sequence[str] = (),
    heatmap_scale: str = SCALES[0],
    instances: str = INSTANCES[0],
    min_area: float = MIN_AREA,
    read_timeout: float = READ_TIMEOUT,
) -> None:
    """Raise InputError for invalid settings of a `Labeling`."""
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise InputError(f"output {unknown[0]!r}, expected any of {', '.join(OUTPUTS)}")
    for name, value, known in (("heatmap scale", heatmap_scale, SCALES), ("instances", instances, INSTANCES)):
        if value not in known:
            raise InputError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if not 0 <= min_area <= 1:
        raise InputError(f"min area is {min_area!r}, expected a share of the image in [0, 1]")


class PreparedImage(NamedTuple):
    """An image that was read; `pages` of its file, if there are several."""

    item: Item
    prepared: Prepared
    seconds: float
    pages: int | None = None


class LocatedImage(NamedTuple):
    """The model's result for an image; on the CPU."""

    item: Item
    localization: Localization
    seconds: float
    pages: int | None = None


@dataclass(frozen=True, eq=False)
class Labeling:
    """The settings of labelling.

    classes        labels, their prompts and thresholds
    outputs        names from `OUTPUTS`; boxes are always written
    heatmap_scale  scale of the maps that the labels' thresholds apply to, see `Localization.heatmaps`
    instances      "component": one object per connected component of a mask; "label": one per label
    min_area       smallest share of the image's pixels that an object may have, in [0, 1]
    read_timeout   seconds for reading a remote image, and for decoding one; on expiry the row records an error

    Raises InputError for values that do not exist, and for heatmaps if the localizer merges maps at pixel size.
    """

    localizer: AnyLocalizer
    classes: Ontology
    outputs: tuple[str, ...] = ("boxes", "masks", "points")
    heatmap_scale: str = "minmax"
    instances: str = "component"
    min_area: float = MIN_AREA
    read_timeout: float = READ_TIMEOUT

    def __post_init__(self) -> None:
        check_settings(self.outputs, self.heatmap_scale, self.instances, self.min_area)
        self.localizer.check(self.classes.vocabulary)
        if "heatmaps" in self.outputs and self.localizer.merges_maps:
            raise InputError("heatmaps of views merged as logits have no patch grid: merge features, or leave them out")

    def manifest(self, source: "Source") -> Manifest:
        """Return the manifest: all that decides a row, and where the images are."""
        settings = {
            "open_gem": open_gem.__version__,
            **({} if source.columns is None else {"columns": source.columns}),
            **self.localizer.describe(),
            "weights": self.localizer.fingerprint(),
            "classes": self.classes.describe(),
            "outputs": [name for name in OUTPUTS if name in self.outputs],
            "heatmap_scale": self.heatmap_scale,
            "instances": self.instances,
            "min_area": self.min_area,
        }
        warnings = () if self.localizer.caution is None else (self.localizer.caution,)
        return Manifest(json.loads(to_json(settings)), self.classes.labels, source.root, warnings)

    def prepare(self, item: Item) -> PreparedImage | LabelRow:
        """Read the image and prepare it for the model; return a row with the error if that fails."""
        start = perf_counter()
        try:
            image = decode(read(item, self.read_timeout), self.read_timeout)
            prepared = self.localizer.prepare(image)
            return PreparedImage(item, prepared, perf_counter() - start, image.info.get("pages"))
        except Exception as error:  # no error of a library about one image ends the run
            return failed(item, error, perf_counter() - start)

    def locate(self, group: Sequence[PreparedImage]) -> list[LocatedImage]:
        """Run the model on images of one shape. Raises NotFiniteError if its output is not finite for one of them, and
        torch's errors when memory runs out."""
        start = perf_counter()
        with torch.no_grad():
            prepared = [image.prepared for image in group]
            encoded = self.localizer.encode(prepared, batch_size=max(BATCH, len(group)))
            results = [self.localizer.locate(image, self.classes.vocabulary).to("cpu") for image in encoded]
        share = (perf_counter() - start) / len(group)
        return [
            LocatedImage(image.item, result, image.seconds + share, image.pages)
            for image, result in zip(group, results, strict=True)
        ]

    def objects(self, localization: Localization, label_map: LabelMap | None = None) -> list[Object]:
        """Return the objects of one image, in the order of the labels; paint them on `label_map` too."""
        return localization.objects(
            self.classes.threshold,
            self.heatmap_scale,
            presence=self.classes.presence,
            min_area=self.min_area,
            instances=self.instances,
            masks="masks" in self.outputs,
            visit=None if label_map is None else label_map.add,
        )

    def row(self, located: LocatedImage) -> LabelRow:
        """Return the row of one image."""
        start, result = perf_counter(), located.localization
        try:
            label_map = LabelMap(result.size) if "labelmap" in self.outputs else None
            with PIXELS.taken(result.size.height * result.size.width):  # each label in turn has maps of this size
                objects = self.objects(result, label_map)
            fields = {
                "objects": [self._stored(obj) for obj in objects],
                "labelmap": None if label_map is None else label_map.png(len(self.classes.labels)),
                "similarity": self._similarity(result) if "heatmaps" in self.outputs else None,
            }
        except Exception as error:
            return failed(located.item, error, located.seconds + perf_counter() - start)
        size = {"height": result.size.height, "width": result.size.width}
        seconds = located.seconds + perf_counter() - start
        return _row(located.item, status="ok", pages=located.pages, **size, seconds=seconds, **fields)

    def _stored(self, obj: Object) -> dict[str, Any]:
        stored = {name: getattr(obj, name) for name in ("label", "prompt", "score", "image_score", "presence", "rle")}
        point = list(obj.point) if obj.point is not None and "points" in self.outputs else None
        return {**stored, "xyxy": list(obj.box), "point": point}

    def _similarity(self, result: Localization) -> dict[str, Any]:
        by_label = self.classes.vocabulary.by_label(list(result.similarity))
        grids = [torch.stack(maps).amax(dim=0) for maps in by_label]
        values = torch.stack(grids).to(torch.float16).contiguous().numpy().tobytes()
        return {"labels": list(self.classes.labels), "grid": list(grids[0].shape), "values": values}


def load_labeling(
    classes: Ontology,
    model: str | None = None,
    pretrained: str | None = None,
    *,
    objects: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Labeling:
    """Load a model and return the labeling on it: a function that travels to another process, as a model cannot.

    objects   settings of a `Labeling` after its classes
    settings  as of `load`

    Raises InputError for invalid ones before a model is loaded, and errors as `load`.
    """
    objects = objects or {}
    check_settings(**objects)
    return Labeling(load(model, pretrained, **settings), classes, **objects)


class PixelBudget:
    """Bounds how many pixels threads work on at once; an image larger than the budget goes alone."""

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


PIXELS = PixelBudget(2**26)


def failed(item: Item, error: BaseException, seconds: float) -> LabelRow:
    """Return the row of an image that could not be labelled."""
    if isinstance(error, OpenGemError):
        reason = describe_error(error)
    elif isinstance(error, MemoryError):
        reason = "does not fit into memory"
    else:
        reason = f"{type(error).__name__}: {describe_error(error)}"
    return _row(item, status="error", error=printable(reason), seconds=seconds)


def _row(item: Item, **fields: Any) -> LabelRow:
    return row_of(item.id, printable(absolute(item)), **fields)
