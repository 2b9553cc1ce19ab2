"""What every data set is to those who measure: samples that are read when they are asked for.

    data = open_dataset("voc2012", "VOCdevkit")          # a Segmentation
    sample = data[0]
    sample.picture()                                     # RGB, as the file stores it
    sample.labels()                                      # (y, x) uint8: 0 .. len(data.classes) - 1, IGNORE elsewhere

Readers translate the ids of files ("reduce zero label", train ids) so that nobody else sees them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from open_gem.errors import DatasetError, ImageError

if TYPE_CHECKING:
    from open_gem.text import Vocabulary

IGNORE = 255  # a pixel that does not count


# Files ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelFile:
    """A picture of class ids, 8 bits in one channel (grey, or a palette's indices), and what each id means.

    A palette may hold the colours of ids in another order, as after a program that quantises colours: see `_ids_of`.

    ids  id in the file -> class, or IGNORE; 255 is IGNORE where it is not among them. All other ids are errors.
    """

    path: Path
    ids: Mapping[int, int]

    def read(self) -> NDArray[np.uint8]:
        """`(y, x)`, classes and IGNORE. Raises DatasetError, naming the file, for what is no such picture and for ids
        that nothing is known of."""
        raw = self._raw()
        meanings = {255: IGNORE, **self.ids}
        present = np.flatnonzero(np.bincount(raw.ravel(), minlength=256))
        unknown = [int(one) for one in present if int(one) not in meanings]
        if unknown:
            few = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
            raise DatasetError(f"{str(self.path)!r} holds the ids {few}, expected only {_ranges(meanings)}")
        table = np.full(256, IGNORE, dtype=np.uint8)
        for given, meaning in meanings.items():
            table[given] = meaning
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
                f"{str(self.path)!r} is a picture of mode {mode}, expected class ids in 8 bits: grey (L) or palette (P)"
            )
        return raw if colours is None else self._ids_of(raw, colours)

    def _ids_of(self, raw: NDArray[np.uint8], colours: NDArray[np.int_]) -> NDArray[np.uint8]:
        """The ids of a palette's indices.

        They are the indices themselves, unless the palette has VOC's colours in another order, as after a program that
        quantises colours: then each index is the id of its colour.

        Raises:
            DatasetError: where VOC's colours are out of place and others among them, or where all colours are grey and
                an id each, so that either may be meant.
        """
        used = np.unique(raw)
        used = used[used < len(colours)].tolist()
        shown = [tuple(colours[index].tolist()) for index in used]
        ids = {255, *self.ids}
        by_colour = [next((one for one in ids if VOC_COLOURS[one] == colour), None) for colour in shown]
        greys = [colour[0] for colour in shown if len(set(colour)) == 1 and colour[0] in ids]
        if used in (by_colour, greys) or len(np.unique(colours, axis=0)) == 1:
            return raw
        either = len(set(greys)) == len(used)
        if None not in by_colour and len(set(by_colour)) == len(used) and not either:
            table = np.zeros(256, dtype=np.uint8)
            table[used] = np.array(by_colour, dtype=np.uint8)
            return table[raw]
        seen = zip(used, by_colour, shown, strict=True)
        misplaced = any(one not in (None, index) and len(set(colour)) > 1 for index, one, colour in seen)
        if either or misplaced:
            few = ", ".join(f"{index} is {colour}" for index, colour in zip(used[:5], shown[:5], strict=True))
            raise DatasetError(
                f"{str(self.path)!r} has a palette in another order than its ids, whose colours do not say which id is "
                f"meant ({few}): save the ids in grey, or with VOC's palette"
            )
        return raw


def _voc_colours() -> list[tuple[int, int, int]]:
    """The palette of PascalVOC's label maps: three bits of an id at a time make the next lower bit of each channel."""

    def channel(index: int, of: int) -> int:
        return sum((index >> 3 * place + of & 1) << 7 - place for place in range(3))

    return [(channel(index, 0), channel(index, 1), channel(index, 2)) for index in range(256)]


VOC_COLOURS = _voc_colours()


def _ranges(ids: Mapping[int, int]) -> str:
    """Whole numbers in short: 0–20, 255."""
    runs: list[list[int]] = []
    for one in sorted(ids):
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)


def read_picture(path: Path) -> Image.Image:
    """A picture of a data set as RGB, the pixels as stored: annotations refer to those, so an EXIF orientation is not
    applied, unlike in `imaging.read_image`. Raises ImageError, naming the file, where it cannot be read."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ImageError(f"cannot read {str(path)!r}: {reason}") from error
    picture.info.clear()  # above all the orientation, which whoever reads on would apply
    picture.getexif().clear()
    return picture


# Segmentation ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture and the class of each of its pixels; files are read when asked for.

    id      the picture's name in the data set
    image   its file, or the pixels `(y, x, 3)` uint8, RGB
    truth   where its labels are, or they themselves
    """

    id: str
    image: Path | np.ndarray
    truth: LabelFile | NDArray[np.uint8]

    def picture(self) -> Image.Image:
        """RGB, as stored (see `read_picture`). Raises ImageError."""
        return read_picture(self.image) if isinstance(self.image, Path) else Image.fromarray(self.image)

    def labels(self) -> NDArray[np.uint8]:
        """`(y, x)`: the class of each pixel, IGNORE where it does not count. Raises DatasetError."""
        return self.truth.read() if isinstance(self.truth, LabelFile) else self.truth


class Drawn(Sequence[Sample]):
    """Samples that are made when they are asked for; their `ids` are known before."""

    ids: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Segmentation(Sequence[Sample]):
    """Pictures whose every pixel has one of `classes`, or none that counts.

    classes       the names of the labels 0, 1, …, as the data set has them
    background    the class that stands for everything else, None where there is none
    vocabularies  variants of the names, by who used them, the one to use first; labels are the `foreground` in order
    """

    name: str
    split: str
    classes: tuple[str, ...]
    background: int | None
    vocabularies: "Mapping[str, Vocabulary]"
    samples: Sequence[Sample]

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all pictures, in order."""
        return self.samples.ids if isinstance(self.samples, Drawn) else tuple(sample.id for sample in self.samples)

    @property
    def foreground(self) -> tuple[int, ...]:
        """The class of each label of a vocabulary: all but the background."""
        return tuple(index for index in range(len(self.classes)) if index != self.background)

    def vocabulary(self, variant: str | None = None) -> "Vocabulary":
        """The names of a variant; None: the first. Raises DatasetError for one that is not there."""
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
    """A picture, and points at which people said whether something is there.

    id       the picture's name in the data set
    image    its file
    classes  which classes of the data set there are points of, ascending
    names    their names
    xy       `(n, 2)` float64, x and y in [0, 1]: shares of width and height, from the left and the top
    of       `(n,)` which of `classes` each point is about
    yes      `(n,)` bool, whether it is there
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
        """Indices into `names` of those with at least one point that says yes."""
        return tuple(np.unique(self.of[self.yes]).tolist())

    def picture(self) -> Image.Image:
        """RGB, as stored (see `read_picture`). Raises ImageError."""
        return read_picture(self.image)


@dataclass(frozen=True, eq=False)
class Points(Sequence[PointSample]):
    """Pictures with points; what is read of them is kept in arrays, 21 bytes a point.

    names     of the classes that there are points of; two classes may have the same
    ids       of the pictures that have points and a file
    images    their files
    starts    `(len + 1,)` where the points of each picture start in `xy`, `label` and `yes`
    label     `(points,)` the class of each point
    missing   ids of pictures that have points but no file: those points are left out
    dropped   why points were left out -> how many
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
        names = tuple(self.names[one] for one in classes)
        return PointSample(
            self.ids[index], self.images[index], tuple(classes.tolist()), names, self.xy[part], of, self.yes[part]
        )

    def __iter__(self) -> Iterator[PointSample]:
        return (self[index] for index in range(len(self)))


# What there is --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What is there of one split.

    home      the folder that holds it
    images    pictures that are listed
    expected  how many the data set's authors published; None where that is unknown
    missing   files that should be there and are not
    notes     what else was seen, a line each
    broken    what is wrong with files that were read, a line each
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

    name    what it is asked for as
    about   one line
    page    where it is to be had
    tree    the files as they are expected, for people
    splits  its parts -> how many pictures were published, None where that is unknown; the first is the usual one
    names   whose class names there are, the usual first; none for points
    """

    name: str
    about: str
    page: str
    tree: str
    splits: Mapping[str, int | None]
    names: tuple[str, ...] = ()

    def open(self, root: str | Path | None = None, split: str | None = None) -> Segmentation | Points:
        """The data set below the folder `root`; `split` as in `splits`, None: the first. Raises DatasetError, with what
        was looked for and where, unless all of it is there."""
        raise NotImplementedError

    def check(self, root: str | Path | None = None, split: str | None = None) -> Survey:
        """What is there of it. Raises DatasetError where not even folders and lists are."""
        raise NotImplementedError

    def error(self, text: str) -> DatasetError:
        """`text`, and where to read on."""
        return DatasetError(
            f"{self.name}: {text} (the expected files: open-gem data show {self.name}; download: {self.page})"
        )

    def split_of(self, split: str | None) -> str:
        """The split itself, the first for None. Raises DatasetError for one that there is not."""
        chosen = next(iter(self.splits)) if split is None else split
        if chosen not in self.splits:
            raise DatasetError(f"{self.name} has no split {split!r}, expected one of {', '.join(self.splits)}")
        return chosen

    def folder(self, root: str | Path | None) -> Path:
        """The folder `root`. Raises DatasetError where there is none."""
        if root is None:
            raise self.error("no folder was given, expected the one that holds its files")
        if not (folder := Path(root)).is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise self.error(f"{str(root)!r} {what}, expected the folder that holds its files")
        return folder


def some(names: Sequence[str], few: int = 3) -> str:
    """The first few, and that there are more."""
    return ", ".join(map(repr, names[:few])) + (", …" if len(names) > few else "")
