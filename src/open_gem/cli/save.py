"""Results as files: the drawings and documents of one located image, each written whole or not at all."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from open_gem.errors import InputError
from open_gem.files import to_json, write_file
from open_gem.images.draw import plain, segmentation
from open_gem.images.sheet import Head, sheet
from open_gem.localization import MIN_AREA, PRESENCE, Localization
from open_gem.localization.drawing import BARS, best, head_of, overlay_of
from open_gem.objects import Object

MAX_SLUG, MAX_BASE_NAME = 40, 120  # most characters of a label and bytes of an image's name in a file name


# Names of files -------------------------------------------------------------------------------------------------------


def slugs(labels: Sequence[str]) -> list[str]:
    """Return a short plain ASCII name for each label, distinct even if case is ignored."""
    return _distinct([_slug(label) or "label" for label in labels])


def _slug(label: str) -> str:
    letters = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    words = "".join(letter if letter.isalnum() else " " for letter in letters).split()
    return "-".join(words)[:MAX_SLUG].strip("-")


def base_names(paths: Sequence[str]) -> list[str]:
    """Return the beginning of the file names of each image's results: the image's own name, distinct."""
    names = [Path(path).stem.encode("utf-8", "ignore")[:MAX_BASE_NAME] for path in paths]
    return _distinct([name.decode("utf-8", "ignore") or "image" for name in names])


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with their position appended if an earlier one is equal (ignoring case)."""
    taken: set[str] = set()
    distinct = []
    for position, name in enumerate(names, start=1):
        while name.lower() in taken:
            name = f"{name}-{position}"
        taken.add(name.lower())
        distinct.append(name)
    return distinct


# Results and their files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelRow:
    """One label of one image, for a table."""

    label: str
    presence: float | None
    is_present: bool
    score: float
    point: list[int]
    box: list[int] | None


@dataclass(frozen=True, eq=False)
class ImageResult:
    """An image with its localization, and its drawings and documents.

    scale     of the heatmaps that are drawn and thresholded, see `Localization.heatmaps`
    presence  below which a label is absent; min_area, exclusive and nms of objects: see `Localization.objects`
    absent    the rule for it; None: "presence" for drawings and objects, "none" for masks and segmentations
    method    its name, if several are compared
    caution   what the model is not for, see `AnyLocalizer.caution`
    regions   of which each has a single label in the segmentation
    """

    path: str
    image: Image.Image
    result: Localization
    threshold: float = 0.5
    background: float | None = None
    scale: str = "minmax"
    presence: float = PRESENCE
    absent: str | None = None
    min_area: float = MIN_AREA
    exclusive: bool = False
    nms: float | None = None
    method: str = ""
    caution: str | None = None
    regions: Tensor | None = None

    @cached_property
    def objects(self) -> list[Object]:
        """The objects of all present labels."""
        return self.result.objects(
            self.threshold, self.scale, **self.rule, min_area=self.min_area, exclusive=self.exclusive, nms=self.nms
        )

    @property
    def rule(self) -> dict[str, Any]:
        """Which labels are absent, for drawings and objects: settings of `Localization.present`."""
        return {"presence": self.presence, "absent": self.absent or "presence"}

    @property
    def mask_rule(self) -> dict[str, Any]:
        """Which labels are absent, for masks and segmentations."""
        return {"presence": self.presence, "absent": self.absent or "none"}

    @cached_property
    def slugs(self) -> list[str]:
        return slugs(self.result.labels)

    def rows(self, count: int) -> list[LabelRow]:
        """Return the `count` labels with the highest scores, for a table."""
        boxes = {obj.index: list(obj.box) for obj in reversed(self.objects)}  # the best of each label
        entries = self._labels
        return [
            LabelRow(
                entries[index]["label"],
                entries[index]["presence"],
                entries[index]["present"],
                entries[index]["score"],
                entries[index]["point"],
                boxes.get(index),
            )
            for index in best(self.result, count)
        ]

    @cached_property
    def _labels(self) -> list[dict[str, Any]]:
        return self.result.labels_to_dict(**self.rule)

    def document(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return everything about the image that JSON can hold."""
        return {
            "path": self.path,
            "size": self.result.size._asdict(),
            **settings,
            "threshold": self.threshold,
            "scale": self.scale,
            **self.rule,
            "min_area": self.min_area,
            "exclusive": self.exclusive,
            "nms": self.nms,
            "warnings": [self.caution] if self.caution else [],
            "labels": [{**entry, "slug": slug} for entry, slug in zip(self._labels, self.slugs, strict=True)],
            "objects": [obj.to_dict() for obj in self.objects],
        }

    def overlay(self, index: int, *, caption: str | None = None, bar: bool = False) -> Image.Image:
        """Draw one label's heatmap, boxes and point on the image, see `overlay_of`."""
        return overlay_of(
            self.result,
            self.image,
            index,
            self.objects,
            scale=self.scale,
            **self.rule,
            caption=caption,
            bar=bar,
        )

    def write(self, out: Path, base_name: str, kinds: Iterable[str], few: int, settings: dict[str, Any]) -> None:
        """Write files of these kinds; drawings of single labels only for the `few` with the highest scores."""
        for kind in kinds:
            if kind in DRAWINGS:
                for index in best(self.result, few):
                    save_image(out / f"{base_name}.{self.slugs[index]}.{kind}.png", DRAWINGS[kind](self, index))
            else:
                ending, write = DOCUMENTS[kind]
                write_file(out / f"{base_name}.{ending}", partial(write, self, settings))


def save_image(path: Path, image: Image.Image) -> None:
    """Write an image as PNG."""
    write_file(path, partial(image.save, format="PNG"))


def side_by_side(by_method: Sequence[ImageResult], few: int) -> Image.Image:
    """Draw the image, and overlays of the `few` labels with the highest scores: a row for each label, a column for each
    method. A label's presence does not depend on the method, so it stands above its row, unless the method decides it
    ("denoise")."""
    first = by_method[0]
    shown = best(first.result, few)
    rows = [[plain(first.image), *(located.overlay(index, caption="") for located in by_method)] for index in shown]
    columns = [Head("image"), *(Head(located.method) for located in by_method)]
    if first.absent == "denoise":
        names = [[Head(first.result.labels[index])] for index in shown]
    else:
        names = [[head_of(first.result, index, **first.rule)] for index in shown]
    return sheet(rows, columns=columns, names=names, bar=BARS[first.scale], tile=340)


def _overlay(located: ImageResult, index: int) -> Image.Image:
    return located.overlay(index, bar=True)


def _heatmap(located: ImageResult, index: int) -> Image.Image:
    """Return a map in 16 bits: 0 to 65535 for the lowest to the highest value, probabilities of 0 to 1, or cosines of
    -1 to 1."""
    heatmap = located.result.heatmaps(located.scale)[index].cpu().numpy()
    shares = (heatmap + 1) / 2 if located.scale == "cosine" else heatmap
    return Image.fromarray((shares.clip(0, 1) * 65535).round().astype("uint16"))


def _mask(located: ImageResult, index: int) -> Image.Image:
    """Return the mask of a label; with `exclusive` what its objects have of it."""
    if located.exclusive:
        none = np.zeros(located.result.size, bool)
        mask = np.any(
            [none, *(obj.mask for obj in located.objects if obj.index == index and obj.mask is not None)], axis=0
        )
    else:
        mask = located.result.masks(located.threshold, located.scale, **located.mask_rule)[index].cpu().numpy()
    return Image.fromarray(mask.astype("uint8") * 255)


def _write_segmentation(located: ImageResult, settings: dict[str, Any], file: BinaryIO) -> None:
    labels = located.result.segment(located.background, **located.mask_rule, regions=located.regions)
    segmentation(located.image, labels, located.result.labels).save(file, format="PNG")


def _write_npz(located: ImageResult, settings: dict[str, Any], file: BinaryIO) -> None:
    result = located.result
    assert result.scores is not None, "a localizer always gives them"
    np.savez(
        file,
        similarity=result.similarity.float().cpu().numpy(),
        labels=np.array(result.labels),
        prompts=np.array(
            result.labels if result.vocabulary is None else list(map(str, result.vocabulary.all_prompts))
        ),  # one per similarity map
        size=np.array(result.size),
        scores=np.array(result.scores.tolist(), dtype=np.float32),
        logit_scale=np.float32(result.logit_scale),  # NaN if similarities are probabilities
    )


def _write_document(located: ImageResult, settings: dict[str, Any], file: BinaryIO) -> None:
    write_json(located.document(settings), file)


def write_json(document: dict[str, Any], file: BinaryIO) -> None:
    file.write(to_json(document, indent=1).encode() + b"\n")


# What can be saved: one drawing per label, or one file per image.
DRAWINGS: dict[str, Callable[[ImageResult, int], Image.Image]] = {
    "overlay": _overlay,
    "heatmap": _heatmap,
    "mask": _mask,
}
DOCUMENTS: dict[str, tuple[str, Callable[[ImageResult, dict[str, Any], BinaryIO], None]]] = {
    "segmentation": ("segmentation.png", _write_segmentation),
    "npz": ("npz", _write_npz),
    "json": ("json", _write_document),  # last: once it exists, so do the others
}
KINDS = (*DRAWINGS, *DOCUMENTS)


def find_kinds(text: str) -> list[str]:
    """Return the kinds in a comma-separated list, in the order of `KINDS`. Raises InputError for an unknown one."""
    kinds = {kind.strip() for kind in text.split(",")}
    unknown = sorted(kinds - {*KINDS, "none"})
    if unknown:
        raise InputError(f"cannot save {', '.join(map(repr, unknown))}, expected {', '.join(KINDS)}, or none")
    return [kind for kind in KINDS if kind in kinds]
