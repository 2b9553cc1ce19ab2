"""Results as files: the drawings and documents of one located image, each written whole or not at all."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from open_gem.errors import InputError
from open_gem.files import to_json, write_file
from open_gem.images.draw import contact_sheet, overlay, segmentation
from open_gem.localization import Localization
from open_gem.objects import Object

SLUG, STEM = 40, 120  # most characters of a prompt and bytes of an image's name in a file name


# Names of files -------------------------------------------------------------------------------------------------------


def slugs(prompts: Sequence[str]) -> list[str]:
    """A short plain ASCII name for each prompt, distinct even if case is ignored."""
    return _distinct([_slug(prompt) or "prompt" for prompt in prompts])


def _slug(prompt: str) -> str:
    letters = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = "".join(letter if letter.isalnum() else " " for letter in letters).split()
    return "-".join(words)[:SLUG].strip("-")


def stems(paths: Sequence[str]) -> list[str]:
    """What the file names of each image's results begin with: the image's own name, distinct."""
    return _distinct(
        [Path(path).stem.encode("utf-8", "ignore")[:STEM].decode("utf-8", "ignore") or "image" for path in paths]
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with their position appended if an earlier one is equal (ignoring case)."""
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
class PromptRow:
    """One prompt of one image, for a table."""

    prompt: str
    score: float
    presence: float | None
    point: list[int]
    box: list[int] | None


@dataclass(frozen=True, eq=False)
class ImageResult:
    """An image with its localization, and how they become files.

    scale   of the heatmaps that are drawn and thresholded, see `Localization.heatmaps`
    method  its name, if several are compared
    """

    path: str
    image: Image.Image
    result: Localization
    threshold: float = 0.5
    background: float | None = None
    scale: str = "minmax"
    method: str = ""

    @cached_property
    def boxes(self) -> list[list[Object]]:
        """The boxes of each prompt, best first."""
        boxes: list[list[Object]] = [[] for _ in self.result.labels]
        for box in self.result.objects(self.threshold, self.scale, min_area=0, masks=False):
            boxes[box.index].append(box)
        return boxes

    @cached_property
    def points(self) -> list[list[int]]:
        return self.result.points().tolist()

    @cached_property
    def scores(self) -> list[float]:
        assert self.result.scores is not None, "a localizer always gives them"
        return [round(score, 6) for score in self.result.scores.tolist()]

    @cached_property
    def presence(self) -> list[float | None]:
        presence = self.result.presence
        return [None] * len(self.scores) if presence is None else [round(share, 6) for share in presence.tolist()]

    @cached_property
    def slugs(self) -> list[str]:
        return slugs(self.result.labels)

    def best(self, count: int) -> list[int]:
        """Indices of the prompts with the highest scores, in the order of the prompts."""
        return sorted(sorted(range(len(self.scores)), key=lambda index: -self.scores[index])[:count])

    def rows(self, count: int) -> list[PromptRow]:
        """The `count` best prompts, for a table."""
        return [
            PromptRow(
                self.result.labels[index],
                self.scores[index],
                self.presence[index],
                self.points[index],
                list(self.boxes[index][0].box) if self.boxes[index] else None,
            )
            for index in self.best(count)
        ]

    def document(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Everything about the image that JSON can hold."""
        prompts = [
            {
                "prompt": prompt,
                "slug": self.slugs[index],
                "score": self.scores[index],
                "presence": self.presence[index],
                "point": self.points[index],
                "boxes": [{"xyxy": list(box.box), "score": round(box.score, 6)} for box in self.boxes[index]],
            }
            for index, prompt in enumerate(self.result.labels)
        ]
        size = {"height": self.result.size.height, "width": self.result.size.width}
        views = {"threshold": self.threshold, "scale": self.scale}
        return {"path": self.path, "size": size, **settings, **views, "prompts": prompts}

    def write(self, out: Path, stem: str, kinds: Iterable[str], few: int, settings: dict[str, Any]) -> None:
        """Write files of these kinds; drawings of single prompts only for the `few` best."""
        for kind in kinds:
            if kind in PICTURES:
                for index in self.best(few):
                    save_picture(out / f"{stem}.{self.slugs[index]}.{kind}.png", PICTURES[kind](self, index))
            else:
                ending, write = DOCUMENTS[kind]
                write_file(out / f"{stem}.{ending}", partial(write, self, settings))


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write an image as PNG."""
    write_file(path, partial(picture.save, format="PNG"))


def draw_overlay(located: ImageResult, index: int) -> Image.Image:
    """One prompt's heatmap, boxes and point on the image."""
    return overlay(
        located.image,
        located.result.heatmaps(located.scale)[index],
        boxes=[list(box.box) for box in located.boxes[index][:3]],  # more would hide the image
        point=located.points[index],
        caption=" · ".join(filter(None, [located.method, located.result.labels[index]])),
        score=located.scores[index],
    )


def side_by_side(by_method: Sequence[ImageResult], few: int) -> Image.Image:
    """Overlays of the `few` best prompts, one a row, by several methods, one a column."""
    overlays = [draw_overlay(located, index) for index in by_method[0].best(few) for located in by_method]
    return contact_sheet(overlays, columns=len(by_method))


def _heatmap(located: ImageResult, index: int) -> Image.Image:
    """16 bits: 0 to 65535 for the lowest to the highest value, probabilities of 0 to 1, or cosines of -1 to 1."""
    heatmap = located.result.heatmaps(located.scale)[index].cpu().numpy()
    shares = (heatmap + 1) / 2 if located.scale == "cosine" else heatmap
    return Image.fromarray((shares.clip(0, 1) * 65535).round().astype("uint16"))


def _mask(located: ImageResult, index: int) -> Image.Image:
    return Image.fromarray(
        located.result.masks(located.threshold, located.scale)[index].cpu().numpy().astype("uint8") * 255
    )


def _write_segmentation(located: ImageResult, settings: dict[str, Any], file: BinaryIO) -> None:
    labels = located.result.segment(located.background)
    segmentation(located.image, labels, located.result.labels).save(file, format="PNG")


def _write_npz(located: ImageResult, settings: dict[str, Any], file: BinaryIO) -> None:
    similarity = located.result.similarity.float().cpu().numpy()
    vocabulary = located.result.vocabulary
    np.savez(
        file,
        similarity=similarity,
        prompts=np.array(located.result.labels),
        phrases=np.array(
            located.result.labels if vocabulary is None else vocabulary.all_prompts
        ),  # one a similarity map
        size=np.array(located.result.size),
        scores=np.array(located.scores, dtype=np.float32),
        logit_scale=np.float32(located.result.logit_scale),  # NaN if similarities are probabilities
    )


def _write_document(located: ImageResult, settings: dict[str, Any], file: BinaryIO) -> None:
    write_json(located.document(settings), file)


def write_json(document: dict[str, Any], file: BinaryIO) -> None:
    file.write(to_json(document, indent=1).encode() + b"\n")


# What can be saved: one drawing a prompt, or one file an image.
PICTURES: dict[str, Callable[[ImageResult, int], Image.Image]] = {
    "overlay": draw_overlay,
    "heatmap": _heatmap,
    "mask": _mask,
}
DOCUMENTS: dict[str, tuple[str, Callable[[ImageResult, dict[str, Any], BinaryIO], None]]] = {
    "segmentation": ("segmentation.png", _write_segmentation),
    "npz": ("npz", _write_npz),
    "json": ("json", _write_document),  # last: once it exists, so do the others
}
KINDS = (*PICTURES, *DOCUMENTS)


def find_kinds(text: str) -> list[str]:
    """The kinds in a comma-separated list, in the order of `KINDS`. Raises InputError for an unknown one."""
    kinds = {kind.strip() for kind in text.split(",")}
    unknown = sorted(kinds - {*KINDS, "none"})
    if unknown:
        raise InputError(f"cannot save {', '.join(map(repr, unknown))}, expected {', '.join(KINDS)}, or none")
    return [kind for kind in KINDS if kind in kinds]
