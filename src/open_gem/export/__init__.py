"""Export labels: from the parts that labelling writes to the formats of other tools, one image in memory at a time.

    from open_gem.export import export
    export("labels", ["coco", "yolo"], "out")  # out/coco, out/yolo

A format is one function and one row of `FORMATS`. Images whose row is an error are left out of every format.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

from open_gem.checks import did_you_mean
from open_gem.errors import InputError
from open_gem.export.coco import write_coco, write_panoptic
from open_gem.export.fiftyone import write_fiftyone
from open_gem.export.geojson import write_geojson
from open_gem.export.label_studio import write_brush, write_polygons
from open_gem.export.labelled import Labelled, LabelledImage, Object
from open_gem.export.labelme import write_labelme
from open_gem.export.maps import write_semantic
from open_gem.export.output import LINKS, Output
from open_gem.export.split import UNSPLIT, Split
from open_gem.export.voc import write_voc
from open_gem.export.yolo import write_yolo
from open_gem.files import check_writable, whole_folder

__all__ = [
    "FORMATS",
    "Format",
    "Labelled",
    "LabelledImage",
    "Object",
    "Output",
    "Split",
    "export",
    "find_formats",
    "write_formats",
]


@dataclass(frozen=True)
class Format:
    """One format.

    about   what it is, for a list
    write   fills a new folder
    extra   of open_gem that it needs, "" for none
    needs   the module that this extra is for
    sets    whether it tells the sets of a split apart
    images whether images have a place in its folder
    """

    about: str
    write: Callable[[Labelled, Output], None]
    extra: str = ""
    needs: str = ""
    sets: bool = True
    images: bool = False

    def missing(self) -> str | None:
        """Return what to install; None if nothing is missing."""
        if not self.needs or find_spec(self.needs) is not None:
            return None
        return f'{self.needs} is not installed: pip install "open_gem[{self.extra}]"'


FORMATS: dict[str, Format] = {
    "coco": Format("COCO instances and results, masks as RLE", write_coco, images=True),
    "panoptic": Format("COCO panoptic: JSON and PNGs of segment ids", write_panoptic),
    "semantic": Format("label maps as PNG in Pascal VOC's colours", write_semantic),
    "voc": Format("Pascal VOC: XML boxes and both segmentations", write_voc, images=True),
    "yolo": Format("YOLO segmentation: polygons in text files", write_yolo, "supervision", "supervision", images=True),
    "labelme": Format(
        "LabelMe: polygons in a JSON an image", write_labelme, "supervision", "supervision", sets=False, images=True
    ),
    "label-studio": Format(
        "Label Studio: tasks with polygons as predictions", write_polygons, "supervision", "supervision"
    ),
    "label-studio-brush": Format(
        "Label Studio: tasks with masks as predictions", write_brush, "label-studio", "label_studio_sdk"
    ),
    "fiftyone": Format("FiftyOne: a data set of objects and points", write_fiftyone),
    "geojson": Format(
        "GeoJSON: outlines of objects in georeferenced tiles", write_geojson, "geo", "rasterio", sets=False
    ),
}
"""All formats by name."""


def find_formats(names: Sequence[str]) -> dict[str, Format]:
    """Return the formats of these names. Raises InputError for an unknown one, or one whose package is not
    installed."""
    for name in names:
        if name not in FORMATS:
            raise InputError(f"unknown format {name!r}{did_you_mean(name, FORMATS)}; known: {', '.join(FORMATS)}")
        if missing := FORMATS[name].missing():
            raise InputError(f"cannot write {name}: {missing}")
    return {name: FORMATS[name] for name in names}


def export(
    folder: str | PathLike[str],
    formats: Sequence[str],
    out: str | PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    min_score: float | None = None,
    min_presence: float | None = None,
    images: Path | None = None,
    split: Split = UNSPLIT,
    link_images: str | None = None,
    skip: Callable[[str, str], None] = lambda image_id, reason: None,
    note: Callable[[str, str], None] = lambda image_id, what: None,
    progress: Callable[[int], None] = lambda images: None,
) -> None:
    """Write `out/<format>` for each format, whole or not at all.

    folder        holds the parts and `_manifest.json`
    labels        those to export; by default all
    min_score     leave out objects whose cosine is below this
    min_presence  leave out objects whose label is less probable in the image than this
    images        folder where the images are now, by their ids; by default the place they were read from
    split         the sets to divide the images into; by default one
    link_images   put the images into the folder of each format: "hard" or "sym" links, or a "copy"
    skip          called with the id of each image that a format cannot hold, and the reason
    note          called with the id of each image that a format holds only in part, and what is missing
    progress      called with the number of images that went by

    Raises:
        InputError: for an unknown format or label, a missing package, a folder without parts, one that exists
            already, or a format that has no sets or no place for images.
        OutputError: if a part cannot be read or the disk cannot be written; that format then leaves nothing.
    """
    find_formats(formats)
    least = {"min_score": min_score, "min_presence": min_presence}
    labelled = Labelled.open(folder, labels, **least, images=images, progress=progress)
    write_formats(labelled, formats, out, skip, note, split, link_images)


def write_formats(
    labelled: Labelled,
    formats: Sequence[str],
    out: str | PathLike[str],
    skip: Callable[[str, str], None] = lambda image_id, reason: None,
    note: Callable[[str, str], None] = lambda image_id, what: None,
    split: Split = UNSPLIT,
    link_images: str | None = None,
) -> None:
    """Export as `export` does, from parts opened before: all formats get the same images, even if labelling adds more
    meanwhile."""
    chosen, place = find_formats(formats), Path(out)
    if split.shares:
        _check_able(chosen, "sets", "has no sets of images: leave out --split")
        _warn_of_empty_sets(labelled, split)
    if link_images is not None:
        if link_images not in LINKS:
            raise InputError(f"cannot link images by {link_images!r}, expected {', '.join(LINKS)}")
        _check_able(chosen, "images", "has no place for images: leave out --link-images")
    for name in chosen:
        if (place / name).exists():
            raise InputError(f"{str(place / name)!r} exists already: remove it, or choose another folder with --out")
    check_writable(place)
    for name, chosen_format in chosen.items():
        with whole_folder(place / name) as new:
            chosen_format.write(labelled, Output(new, skip, note, split, link_images or ""))


def _check_able(chosen: Mapping[str, Format], ability: str, reason: str) -> None:
    """Raise InputError for a format that lacks an ability, a field of `Format`."""
    for name, chosen_format in chosen.items():
        if not getattr(chosen_format, ability):
            able = ", ".join(known for known, other in FORMATS.items() if getattr(other, ability))
            raise InputError(f"{name} {reason} or {name}; it goes with {able}")


def _warn_of_empty_sets(labelled: Labelled, split: Split) -> None:
    empty = set(split.names)
    for image_id in labelled.ids():
        empty.discard(split.of(image_id))
        if not empty:
            return
    names = ", ".join(name for name in split.names if name in empty)
    warnings.warn(f"no image is in {names}: choose larger shares or another seed of the split", stacklevel=3)
