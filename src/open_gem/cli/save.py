"""Results as files: pictures and documents of what was found in one image, each written whole or not at all."""

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
from open_gem.readout import Boxes

SLUG, STEM = 40, 120  # longest parts of a file name, in characters and bytes


# Names of files -------------------------------------------------------------------------------------------------------


def slugs(phrases: Sequence[str]) -> list[str]:
    """A short name for each phrase, plain ASCII and different from all others even where case does not count."""
    return _distinct([_slug(phrase) or "phrase" for phrase in phrases])


def _slug(phrase: str) -> str:
    letters = unicodedata.normalize("NFKD", phrase).encode("ascii", "ignore").decode().lower()
    words = "".join(letter if letter.isalnum() else " " for letter in letters).split()
    return "-".join(words)[:SLUG].strip("-")


def stems(paths: Sequence[str]) -> list[str]:
    """What the names of each picture's files begin with: its own name, different from all others."""
    return _distinct(
        [Path(path).stem.encode("utf-8", "ignore")[:STEM].decode("utf-8", "ignore") or "image" for path in paths]
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, those that were there before (case aside) with their position behind them."""
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
class Row:
    """One phrase of one picture, for a table."""

    phrase: str
    score: float
    presence: float | None
    point: list[int]
    box: list[int] | None


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in one picture, and how it becomes files. `scale` of the heatmaps that are drawn and thresholded:
    see `Localization.heatmaps`; `method`, where several are compared."""

    path: str
    picture: Image.Image
    result: Localization
    threshold: float = 0.5
    background: float | None = None
    scale: str = "minmax"
    method: str = ""

    @cached_property
    def boxes(self) -> list[Boxes]:
        return self.result.boxes(self.threshold, self.scale)

    @cached_property
    def points(self) -> list[list[int]]:
        return self.result.points().tolist()

    @cached_property
    def scores(self) -> list[float]:
        assert self.result.scores is not None  # a Localizer that is called always gives them
        return [round(score, 6) for score in self.result.scores.tolist()]

    @cached_property
    def presence(self) -> list[float | None]:
        presence = self.result.presence
        return [None] * len(self.scores) if presence is None else [round(share, 6) for share in presence.tolist()]

    @cached_property
    def slugs(self) -> list[str]:
        return slugs(self.result.prompts)

    def best(self, count: int) -> list[int]:
        """The phrases with the highest scores, in the order they were given."""
        return sorted(sorted(range(len(self.scores)), key=lambda index: -self.scores[index])[:count])

    def rows(self, count: int) -> list[Row]:
        boxes = {index: self.boxes[index].xyxy[:1].tolist() for index in self.best(count)}
        return [
            Row(
                self.result.prompts[index],
                self.scores[index],
                self.presence[index],
                self.points[index],
                box[0] if box else None,
            )
            for index, box in boxes.items()
        ]

    def document(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Everything about the picture that fits into JSON."""
        prompts = [
            {
                "prompt": prompt,
                "slug": self.slugs[index],
                "score": self.scores[index],
                "presence": self.presence[index],
                "point": self.points[index],
                "boxes": [
                    {"xyxy": xyxy, "score": round(score, 6)}
                    for xyxy, score in zip(*(part.tolist() for part in self.boxes[index]), strict=True)
                ],
            }
            for index, prompt in enumerate(self.result.prompts)
        ]
        size = {"height": self.result.size.height, "width": self.result.size.width}
        views = {"threshold": self.threshold, "scale": self.scale}
        return {"path": self.path, "size": size, **settings, **views, "prompts": prompts}

    def write(self, out: Path, stem: str, kinds: Iterable[str], few: int, settings: dict[str, Any]) -> None:
        """Write files of these kinds; pictures of single phrases for the `few` best only."""
        for kind in kinds:
            if kind in PICTURES:
                for index in self.best(few):
                    save_picture(out / f"{stem}.{self.slugs[index]}.{kind}.png", PICTURES[kind](self, index))
            else:
                ending, write = DOCUMENTS[kind]
                write_file(out / f"{stem}.{ending}", partial(write, self, settings))


def save_picture(path: Path, picture: Image.Image) -> None:
    write_file(path, partial(picture.save, format="PNG"))


def draw_overlay(found: Found, index: int) -> Image.Image:
    return overlay(
        found.picture,
        found.result.heatmaps(found.scale)[index],
        boxes=found.boxes[index].xyxy[:3].tolist(),  # the best few: more hide the picture
        point=found.points[index],
        caption=" · ".join(filter(None, [found.method, found.result.prompts[index]])),
        score=found.scores[index],
    )


def side_by_side(some: Sequence[Found], few: int) -> Image.Image:
    """Overlays of the `few` best phrases, a row each, by several methods, a column each."""
    pictures = [draw_overlay(found, index) for index in some[0].best(few) for found in some]
    return contact_sheet(pictures, columns=len(some))


def _heatmap(found: Found, index: int) -> Image.Image:
    """16 bits: 0 to 65535 for the lowest to the highest value, probabilities of 0 to 1, or cosines of -1 to 1."""
    heatmap = found.result.heatmaps(found.scale)[index].cpu().numpy()
    shares = (heatmap + 1) / 2 if found.scale == "cosine" else heatmap
    return Image.fromarray((shares.clip(0, 1) * 65535).round().astype("uint16"))


def _mask(found: Found, index: int) -> Image.Image:
    return Image.fromarray(found.result.masks(found.threshold, found.scale)[index].cpu().numpy().astype("uint8") * 255)


def _write_segmentation(found: Found, settings: dict[str, Any], file: BinaryIO) -> None:
    labels = found.result.segment(found.background)
    segmentation(found.picture, labels, found.result.prompts).save(file, format="PNG")


def _write_npz(found: Found, settings: dict[str, Any], file: BinaryIO) -> None:
    similarity = found.result.similarity.float().cpu().numpy()
    vocabulary = found.result.vocabulary
    np.savez(
        file,
        similarity=similarity,
        prompts=np.array(found.result.prompts),
        phrases=np.array(found.result.prompts if vocabulary is None else vocabulary.phrases),  # of each similarity map
        size=np.array(found.result.size),
        scores=np.array(found.scores, dtype=np.float32),
        logit_scale=np.float32(found.result.logit_scale),  # NaN where there is none: similarities are probabilities
    )


def _write_found(found: Found, settings: dict[str, Any], file: BinaryIO) -> None:
    write_json(found.document(settings), file)


def write_json(document: dict[str, Any], file: BinaryIO) -> None:
    file.write(to_json(document, indent=1).encode() + b"\n")


# One picture a phrase, and one file an image: what can be saved.
PICTURES: dict[str, Callable[[Found, int], Image.Image]] = {"overlay": draw_overlay, "heatmap": _heatmap, "mask": _mask}
DOCUMENTS: dict[str, tuple[str, Callable[[Found, dict[str, Any], BinaryIO], None]]] = {
    "segmentation": ("segmentation.png", _write_segmentation),
    "npz": ("npz", _write_npz),
    "json": ("json", _write_found),  # last: where it is, the others are
}
KINDS = (*PICTURES, *DOCUMENTS)


def find_kinds(given: str) -> list[str]:
    """The kinds of files to write, in the order of `KINDS`. Raises InputError for an unknown one."""
    asked = {kind.strip() for kind in given.split(",")}
    unknown = sorted(asked - {*KINDS, "none"})
    if unknown:
        raise InputError(f"cannot save {', '.join(map(repr, unknown))}, expected some of {', '.join(KINDS)}, or none")
    return [kind for kind in KINDS if kind in asked]
