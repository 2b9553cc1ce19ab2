"""The interface of every data set: samples that are read on access.

    data = open_dataset("voc2012", "VOCdevkit")          # a Segmentation
    sample = data[0]
    sample.read_image()                                  # RGB, as the file stores it
    sample.labels()                                      # (y, x) uint8: 0 .. len(data.classes) - 1, IGNORE elsewhere

Readers translate the ids of files ("reduce zero label", train ids), so that only they know them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from open_gem.errors import DatasetError, ImageError
from open_gem.images.colors import voc_color

if TYPE_CHECKING:
    from open_gem.text import Vocabulary

IGNORE = 255  # a pixel that does not count


# Files ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelFile:
    """An image of class ids, 8 bits in one channel (grey, or a palette's indices), and what each id means.

    A palette may hold the colours of ids in another order, as after a program that quantises colours: see `_ids_of`.

    ids  id in the file → class, or IGNORE; 255 is IGNORE unless it is among them. All other ids are errors.
    """

    path: Path
    ids: Mapping[int, int]

    def read(self) -> NDArray[np.uint8]:
        """Return the classes of all pixels `(y, x)`, or IGNORE. Raises DatasetError that names the file if it cannot be
        read or has unknown ids."""
        raw = self._raw()
        meanings = {255: IGNORE, **self.ids}
        present = np.flatnonzero(np.bincount(raw.ravel(), minlength=256))
        unknown = [id for id in present.tolist() if id not in meanings]
        if unknown:
            few = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
            raise DatasetError(f"{str(self.path)!r} holds the ids {few}, expected only {_ranges(meanings)}")
        table = np.full(256, IGNORE, dtype=np.uint8)
        for id, meaning in meanings.items():
            table[id] = meaning
        return table[raw]

    def _raw(self) -> NDArray[np.uint8]:
        try:
            with Image.open(self.path) as image:
                mode = image.mode
                raw = np.array(image) if mode in ("L", "P") else None  # of a palette, the indices: not converted
                colours = np.array(image.getpalette("RGB") or ()).reshape(-1, 3) if mode == "P" else None
        except Exception as error:  # a broken file can make PIL's decoders raise almost any
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise DatasetError(f"cannot read labels from {str(self.path)!r}: {reason}") from error
        if raw is None:
            raise DatasetError(
                f"{str(self.path)!r} is an image of mode {mode}, expected class ids in 8 bits: grey (L) or palette (P)"
            )
        return raw if colours is None else self._ids_of(raw, colours)

    def _ids_of(self, raw: NDArray[np.uint8], colours: NDArray[np.int_]) -> NDArray[np.uint8]:
        """Return the id of each index of a palette.

        They are the indices themselves, unless the palette has VOC's colours in another order, as after a program that
        quantises colours: then each index is the id of its colour. Raises DatasetError if the palette mixes VOC's
        colours in another order with other colours, or if all its colours are greys that are ids themselves: either
        reading is possible then.
        """
        used = np.unique(raw)
        used = used[used < len(colours)].tolist()
        shown = [tuple(colours[index].tolist()) for index in used]
        ids = {255, *self.ids}
        by_colour = [next((id for id in ids if VOC_COLOURS[id] == colour), None) for colour in shown]
        greys = [colour[0] for colour in shown if len(set(colour)) == 1 and colour[0] in ids]
        if used in (by_colour, greys) or len(np.unique(colours, axis=0)) == 1:
            return raw
        ambiguous = len(set(greys)) == len(used)
        if None not in by_colour and len(set(by_colour)) == len(used) and not ambiguous:
            table = np.zeros(256, dtype=np.uint8)
            table[used] = np.array(by_colour, dtype=np.uint8)
            return table[raw]
        entries = zip(used, by_colour, shown, strict=True)
        misplaced = any(id not in (None, index) and len(set(colour)) > 1 for index, id, colour in entries)
        if ambiguous or misplaced:
            few = ", ".join(f"{index} is {colour}" for index, colour in zip(used[:5], shown[:5], strict=True))
            raise DatasetError(
                f"{str(self.path)!r} has a palette in another order than its ids, whose colours do not say which id is "
                f"meant ({few}): save the ids in grey, or with VOC's palette"
            )
        return raw


VOC_COLOURS = [voc_color(id - 1) for id in range(256)]  # of PascalVOC's label maps, by id


def _ranges(ids: Mapping[int, int]) -> str:
    """Format whole numbers as ranges: 0–20, 255."""
    runs: list[list[int]] = []
    for id in sorted(ids):
        if runs and id == runs[-1][1] + 1:
            runs[-1][1] = id
        else:
            runs.append([id, id])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)


def read_stored_image(path: Path) -> Image.Image:
    """Read an image of a data set as RGB, the pixels as stored: annotations refer to those, so the EXIF orientation is
    not applied, unlike in `images.read_image`. Raises ImageError that names a file that cannot be read."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ImageError(f"cannot read {str(path)!r}: {reason}") from error
    image.info.clear()  # the orientation above all, which later readers would apply
    image.getexif().clear()
    return image


# Segmentation ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sample:
    """An image and the class of each of its pixels; files are read on access.

    id      the image's name in the data set
    image   its file, or the pixels `(y, x, 3)` uint8, RGB
    truth   the file of its labels, or the labels themselves
    """

    id: str
    image: Path | np.ndarray
    truth: LabelFile | NDArray[np.uint8]

    def read_image(self) -> Image.Image:
        """Read the image as RGB, as stored (see `read_stored_image`). Raises ImageError."""
        return read_stored_image(self.image) if isinstance(self.image, Path) else Image.fromarray(self.image)

    def labels(self) -> NDArray[np.uint8]:
        """Return the class of each pixel `(y, x)`, IGNORE for pixels that do not count. Raises DatasetError."""
        return self.truth.read() if isinstance(self.truth, LabelFile) else self.truth


class LazySamples(Sequence[Sample]):
    """Samples that are made on access; their `ids` are known before."""

    ids: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Segmentation(Sequence[Sample]):
    """Images whose every pixel has one of `classes`, or is ignored.

    classes       the names of the labels 0, 1, …, as the data set has them
    background    the class that stands for everything else, or None
    vocabularies  variants of the names by who used them, the default first; labels are the `foreground` in order
    """

    name: str
    split: str
    classes: tuple[str, ...]
    background: int | None
    vocabularies: "Mapping[str, Vocabulary]"
    samples: Sequence[Sample]

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all images, in order."""
        return (
            self.samples.ids if isinstance(self.samples, LazySamples) else tuple(sample.id for sample in self.samples)
        )

    @property
    def foreground(self) -> tuple[int, ...]:
        """Return the class of each label of a vocabulary: all except the background."""
        return tuple(index for index in range(len(self.classes)) if index != self.background)

    def vocabulary(self, variant: str | None = None) -> "Vocabulary":
        """Return the names of a variant; None: the first. Raises DatasetError for an unknown one."""
        chosen = next(iter(self.vocabularies)) if variant is None else variant
        if chosen not in self.vocabularies:
            known = ", ".join(self.vocabularies)
            raise DatasetError(f"{self.name} has no class names {variant!r}, expected one of {known}")
        return self.vocabularies[chosen]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:  # pyright: ignore[reportIncompatibleMethodOverride] - no slices
        return self.samples[index]


# Points ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PointSample:
    """An image, and points at which people said whether a class is present.

    id       the image's name in the data set
    image    its file
    classes  the classes of the data set that have points here, ascending
    names    their names
    xy       `(n, 2)` float64, x and y in [0, 1]: shares of width and height, from the left and the top
    of       `(n,)` the index into `classes` of each point
    yes      `(n,)` bool, whether the class is present at the point
    """

    id: str
    image: Path
    classes: tuple[int, ...]
    names: tuple[str, ...]
    xy: NDArray[np.float64]
    of: NDArray[np.intp]
    yes: NDArray[np.bool_]

    @property
    def positive(self) -> tuple[int, ...]:
        """Return the indices into `names` of the classes with at least one positive point."""
        return tuple(np.unique(self.of[self.yes]).tolist())

    def read_image(self) -> Image.Image:
        """Read the image as RGB, as stored (see `read_stored_image`). Raises ImageError."""
        return read_stored_image(self.image)


@dataclass(frozen=True, eq=False)
class Points(Sequence[PointSample]):
    """Images with points, stored in arrays: 21 bytes a point.

    names     of the classes that have points; two classes may have the same name
    ids       of the images that have points and a file
    images    their files
    starts    `(len + 1,)` where the points of each image start in `xy`, `label` and `yes`
    label     `(points,)` the class of each point
    missing   ids of images that have points but no file; their points are dropped
    dropped   why points were dropped → how many
    """

    name: str
    split: str
    names: tuple[str, ...]
    ids: tuple[str, ...]
    images: tuple[Path, ...]
    starts: NDArray[np.int64]
    xy: NDArray[np.float64]
    label: NDArray[np.int32]
    yes: NDArray[np.bool_]
    missing: tuple[str, ...]
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> PointSample:  # pyright: ignore[reportIncompatibleMethodOverride] - no slices
        index = range(len(self))[index]
        part = slice(self.starts[index], self.starts[index + 1])
        classes, of = np.unique(self.label[part], return_inverse=True)
        names = tuple(self.names[index] for index in classes)
        return PointSample(
            self.ids[index], self.images[index], tuple(classes.tolist()), names, self.xy[part], of, self.yes[part]
        )

    def __iter__(self) -> Iterator[PointSample]:
        return (self[index] for index in range(len(self)))


# Sources --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """The files of one split that exist.

    home      the folder that holds it
    images    number of listed images
    expected  number of images that the data set's authors published; None if unknown
    missing   missing files
    notes     other remarks, one line each
    broken    errors of files that were read, one line each
    """

    home: Path
    images: int
    expected: int | None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set that can be read: a row of `DATASETS`.

    name    in `DATASETS`
    about   one line
    page    where to download it
    tree    the expected files, for people
    splits  its splits → number of images that were published, None if unknown; the first is the default
    names   variants of its class names, the default first; none for points
    """

    name: str
    about: str
    page: str
    tree: str
    splits: Mapping[str, int | None]
    names: tuple[str, ...] = ()

    def open(self, root: str | Path | None = None, split: str | None = None) -> Segmentation | Points:
        """Open the data set below the folder `root`; `split` as in `splits`, None: the first. Raises DatasetError that
        says which files are missing, and where they were expected."""
        raise NotImplementedError

    def check(self, root: str | Path | None = None, split: str | None = None) -> Survey:
        """Check which of its files exist. Raises DatasetError if folders or lists are missing."""
        raise NotImplementedError

    def error(self, text: str) -> DatasetError:
        """Return an error with `text` and where to read on."""
        return DatasetError(
            f"{self.name}: {text} (the expected files: open-gem data show {self.name}; download: {self.page})"
        )

    def split_of(self, split: str | None) -> str:
        """Return the split itself, or the first for None. Raises DatasetError for an unknown one."""
        chosen = next(iter(self.splits)) if split is None else split
        if chosen not in self.splits:
            raise DatasetError(f"{self.name} has no split {split!r}, expected one of {', '.join(self.splits)}")
        return chosen

    def folder(self, root: str | Path | None) -> Path:
        """Return the folder `root`. Raises DatasetError if it does not exist."""
        if root is None:
            raise self.error("no folder was given, expected the one that holds its files")
        if not (folder := Path(root)).is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise self.error(f"{str(root)!r} {what}, expected the folder that holds its files")
        return folder


def first_few(names: Sequence[str], count: int = 3) -> str:
    """Format the first names, then "…" if there are more."""
    return ", ".join(map(repr, names[:count])) + (", …" if len(names) > count else "")
