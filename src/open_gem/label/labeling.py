"""Label images in steps that any engine can spread over threads and machines:

    prepared = labeling.prepare(item)              # read and decoded; a row with the reason if that fails
    located  = labeling.locate([prepared, …])      # the model, on images of one shape
    row      = labeling.row(located[0])            # objects, masks, label map

A label is looked for only in images that contain it as a whole (`Localization.presence` at or above the label's
threshold): the map of an absent thing has a maximum too, and after min-max scaling it looks like a detection.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch

import open_gem
from open_gem.errors import OpenGemError
from open_gem.files import to_json
from open_gem.label.decoding import decode
from open_gem.label.kept import keep, restore
from open_gem.label.ontology import Ontology
from open_gem.label.parts import LabelRow, Manifest, row_of
from open_gem.label.reading import READ_TIMEOUT, absolute, describe_error, read
from open_gem.label.rules import ObjectRules
from open_gem.label.sources import Item, Source, printable
from open_gem.localization import Localization
from open_gem.localizer import load
from open_gem.locate import BATCH, AnyLocalizer, Prepared


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
class _OnLocalizer:
    localizer: AnyLocalizer


@dataclass(frozen=True, eq=False)
class Labeling(ObjectRules, _OnLocalizer):
    """A localizer and the settings of labelling, `Labeling(localizer, classes, …)`: those of `ObjectRules`, and

    read_timeout   seconds for reading a remote image, and for decoding one; on expiry the row records an error

    Nothing is kept, and `keep` becomes None, if the localizer's maps on the patch grid do not decide the objects: if it
    merges maps at pixel size, or predicts boxes itself. Raises InputError for values that do not exist.
    """

    read_timeout: float = READ_TIMEOUT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.localizer.check(self.classes.vocabulary)
        if self.localizer.merges_maps or self.localizer.predicts_boxes:
            object.__setattr__(self, "keep", None)

    def manifest(self, source: "Source") -> Manifest:
        """Return the manifest: all that decides a row, and where the images are."""
        settings = {
            "open_gem": open_gem.__version__,
            **({} if source.columns is None else {"columns": source.columns}),
            **self.localizer.describe(),
            "weights": self.localizer.fingerprint(),
            **self.describe(),
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

    def row(self, located: LocatedImage) -> LabelRow:
        """Return the row of one image. Its objects are made of what is kept of it, if anything is."""
        start, result = perf_counter(), located.localization
        try:
            kept = None if self.keep is None else keep(result, self.keep)
            if kept is not None:
                unrefined = restore(kept, self.classes.vocabulary, result.size)
                result = replace(unrefined, refiner=result.refiner, segmenter=result.segmenter)
            fields = self.fields(result)
        except Exception as error:
            return failed(located.item, error, located.seconds + perf_counter() - start)
        seconds = located.seconds + perf_counter() - start
        return _row(located.item, status="ok", pages=located.pages, seconds=seconds, kept=kept, **fields)


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
    ObjectRules(classes, **{name: value for name, value in objects.items() if name != "read_timeout"})
    return Labeling(load(model, pretrained, **settings), classes, **objects)


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
