"""Data sets of label maps: a folder of images, a folder of maps, and perhaps a list. One reader, a row each."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from open_gem.data.base import IGNORE, LabelFile, Sample, Segmentation, Source, Survey, first_few
from open_gem.data.names import NAMES, read_names
from open_gem.errors import DatasetError, ImageError

READ_BY_CHECK = 16  # label maps that `check` reads


class Maps(NamedTuple):
    """One way of storing label maps: their folder, with {split} for the split's own name, the end of their names, and
    the meaning of their ids (see `LabelFile`)."""

    folder: str
    suffix: str
    ids: Mapping[int, int]


class _Paths(NamedTuple):
    """The places of the files of one split."""

    home: Path
    images: Path
    maps: tuple[Maps, ...]  # the rows whose folder exists
    listed: Path | None


@dataclass(frozen=True, kw_only=True)
class MapSource(Source):
    """A data set of label maps.

    family      row of `NAMES`
    background  whether class 0 stands for everything else
    homes       folders below the root that may hold its files, "" for the root itself
    images      folders that may hold the images, with {split} for the split's own name
    suffix      the end of their names
    maps        how label maps may be stored, the best first
    listed      the file of ids, one a line; "" for all images of the folder
    own         split → its name in paths
    """

    family: str
    background: bool = False
    homes: tuple[str, ...]
    images: tuple[str, ...]
    suffix: str = ".jpg"
    maps: tuple[Maps, ...]
    listed: str = ""
    own: Mapping[str, str]

    def open(self, root: str | Path | None = None, split: str | None = None) -> Segmentation:
        """See `Source.open`."""
        split = self.split_of(split)
        paths, samples, missing = self._survey(root, split)
        if missing:
            raise self.error(f"{len(missing)} files are missing in {str(paths.home)!r}: {first_few(missing)}")
        names = {variant: read_names(self.family, variant, self.background) for variant in NAMES[self.family]}
        official = names["official"].labels
        return Segmentation(
            self.name,
            split,
            ("background", *official) if self.background else official,
            0 if self.background else None,
            names,
            samples,
        )

    def check(self, root: str | Path | None = None, split: str | None = None) -> Survey:
        """See `Source.check`; the first few label maps are read and compared to their images' sizes."""
        split = self.split_of(split)
        paths, samples, missing = self._survey(root, split)
        absent = set(missing)
        complete = [item for item in samples if not absent & {_below(paths.home, path) for path in _files(item)}]
        broken = [error for sample in complete[:READ_BY_CHECK] if (error := _error_of(sample)) is not None]
        notes = (f"the first {len(complete[:READ_BY_CHECK])} images and label maps were read",)
        return Survey(paths.home, len(samples), self.splits[split], missing, notes, tuple(broken))

    def home(self, root: str | Path | None) -> Path:
        """Return the folder, at or below `root`, that holds its image folders. Raises DatasetError."""
        folder = self.folder(root)
        images = list(dict.fromkeys(path.format(split=own) for path in self.images for own in self.own.values()))
        homes = [folder / home for home in self.homes if home or self._may_be_home(folder)]
        existing = next((home for home in homes if _first(home, images)), None)
        if existing is None:
            where = " or ".join(repr(str(home)) for home in homes)
            raise self.error(f"no {' or '.join(map(repr, images))} in {where}")
        return existing

    def _survey(self, root: str | Path | None, split: str) -> tuple[_Paths, tuple[Sample, ...], tuple[str, ...]]:
        """Return the places of the split, all its samples, and the missing files."""
        paths = self._find(self.folder(root), self.own[split])
        images = _names_below(paths.images, self.suffix)
        ids = sorted(images) if paths.listed is None else read_list(paths.listed)
        if not ids:
            where = paths.images if paths.listed is None else paths.listed
            raise self.error(f"no {'*' + self.suffix if paths.listed is None else 'line'} in {str(where)!r}")
        folder, maps = self._stored(paths, self.own[split], ids)
        samples = tuple(
            Sample(id, paths.images / f"{id}{self.suffix}", LabelFile(folder / f"{id}{maps.suffix}", maps.ids))
            for id in ids
        )
        labelled = _names_below(folder, maps.suffix)
        missing = [
            _below(paths.home, path)
            for sample in samples
            for path, existing in zip(_files(sample), (images, labelled), strict=True)
            if sample.id not in existing
        ]
        return paths, samples, tuple(missing)

    def _stored(self, paths: _Paths, own: str, ids: Iterable[str]) -> tuple[Path, Maps]:
        """Return the folder and the row of `maps` with the most label maps."""

        def present(maps: Maps) -> int:
            return len(_names_below(paths.home / maps.folder.format(split=own), maps.suffix).intersection(ids))

        best = max(paths.maps, key=present)  # the first of equals
        return paths.home / best.folder.format(split=own), best

    def _find(self, root: Path, own: str) -> _Paths:
        homes = [root / home for home in self.homes if home or self._may_be_home(root)]
        needed = {
            "images": [folder.format(split=own) for folder in self.images],
            "label maps": [maps.folder.format(split=own) for maps in self.maps],
            **({"list": [self.listed.format(split=own)]} if self.listed else {}),
        }
        absent = [[kind for kind in needed if not _first(home, needed[kind])] for home in homes]
        home, missing = min(zip(homes, absent, strict=True), key=lambda pair: len(pair[1]))
        if missing:
            expected = dict.fromkeys(needed[missing[0]])
            where = [str(home)] if len(missing) < len(needed) else list(map(str, homes))  # one may hold a part
            raise self.error(f"no {' or '.join(map(repr, expected))} in {' or '.join(map(repr, where))}")
        existing = tuple(maps for maps in self.maps if (home / maps.folder.format(split=own)).exists())
        images = _first(home, needed["images"])
        assert images is not None
        return _Paths(home, images, existing, _first(home, needed["list"]) if self.listed else None)

    def _may_be_home(self, root: Path) -> bool:
        """Return False if the folder's name says that it is of another year."""
        year = re.fullmatch(r"VOC\d{4}", root.resolve().name)
        return year is None or any(home.endswith(year[0]) for home in self.homes)


def _error_of(sample: Sample) -> str | None:
    """Return what is wrong with an image or its label map; None if nothing is."""
    try:
        (height, width), image = sample.labels().shape, sample.read_image()
    except (DatasetError, ImageError) as error:
        return str(error)
    if image.size == (width, height):
        return None
    return f"{sample.id}: labels are {height}x{width}, the image {image.height}x{image.width}"


def _first(home: Path, names: Iterable[str]) -> Path | None:
    return next((home / name for name in names if (home / name).exists()), None)


def _below(home: Path, path: Path) -> str:
    return path.relative_to(home).as_posix()


def _files(sample: Sample) -> tuple[Path, Path]:
    assert isinstance(sample.image, Path) and isinstance(sample.truth, LabelFile)
    return sample.image, sample.truth.path


def _names_below(folder: Path, suffix: str) -> set[str]:
    """Return the files below `folder` that end in `suffix`, without it: "a" of a.png, "aachen/b" of aachen/b.png."""
    return {
        (Path(parent).relative_to(folder) / name).as_posix().removesuffix(suffix)
        for parent, _, names in os.walk(folder, followlinks=True)  # data sets often consist of symbolic links
        for name in names
        if name.endswith(suffix) and not name.startswith(".")
    }


def read_list(path: Path) -> tuple[str, ...]:
    """Read the ids of a list, one a line; blank lines, CRLF and space around ids do not count.

    Raises DatasetError for a line with more than one word, and for an id that is listed repeated.
    """
    try:
        lines = [line.strip() for line in path.read_bytes().decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DatasetError(f"cannot read the list {str(path)!r}: {reason}") from error
    for number, line in enumerate(lines, start=1):
        if len(line.split()) > 1:
            raise DatasetError(f"line {number} of {str(path)!r} is {line!r}, expected one id a line")
    ids = [line for line in lines if line]
    repeated = [id for id, times in Counter(ids).items() if times > 1]
    if repeated:
        raise DatasetError(f"{str(path)!r} lists {first_few(repeated)} more than once, expected each id once")
    return tuple(ids)


# The rows -------------------------------------------------------------------------------------------------------------

_SPLITS = {"val": "val", "train": "train", "trainval": "trainval"}


def _same(count: int) -> dict[int, int]:
    return {id: id for id in range(count)}


def _reduce_zero(count: int) -> dict[int, int]:
    """Return ids → classes: class k is k + 1 in the file, whose 0 is ignored ("reduce zero label")."""
    return {0: IGNORE, **{index + 1: index for index in range(count)}}


def _classes(ids: Sequence[int]) -> dict[int, int]:
    """Return ids → classes: these ids are classes 0, 1, …"""
    return {id: index for index, id in enumerate(ids)}


def _voc(year: int, counts: Mapping[str, int | None], archive: str, background: bool) -> MapSource:
    return MapSource(
        name=f"voc{year}" if background else f"voc{year}-20",
        about=f"PascalVOC {year}, {'20 classes and background' if background else '20 classes, background ignored'}",
        page=f"http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{archive}",
        tree=f"""\
VOCdevkit/VOC{year}/                      (or the folder above, or VOC{year} itself)
    JPEGImages/2007_000033.jpg
    SegmentationClass/2007_000033.png    palette indices: 0 background, 1–20, 255 void
    ImageSets/Segmentation/train.txt, val.txt, trainval.txt""",
        splits=counts,
        names=NAMES["voc"],
        family="voc",
        background=background,
        homes=("", f"VOC{year}", f"VOCdevkit/VOC{year}"),
        images=("JPEGImages",),
        maps=(Maps("SegmentationClass", ".png", _same(21) if background else _reduce_zero(20)),),
        listed="ImageSets/Segmentation/{split}.txt",
        own=_SPLITS,
    )


def _context(background: bool) -> MapSource:
    name = "context60" if background else "context59"
    return MapSource(
        name=name,
        about=f"Pascal Context, 59 classes {'and background' if background else 'with background ignored'}",
        page=(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar and "
            "https://codalabuser.blob.core.windows.net/public/trainval_merged.json"
        ),
        tree="""\
VOCdevkit/VOC2010/                       (or the folder above, or VOC2010 itself)
    JPEGImages/2008_000002.jpg
    SegmentationClassContext/2008_000002.png        0 background, 1–59
    ImageSets/SegmentationContext/train.txt, val.txt
    trainval_merged.json                 the last two are made of it:
        open-gem data context --json trainval_merged.json --root VOCdevkit/VOC2010""",
        splits={"val": 5104, "train": 4996},
        names=NAMES["context"],
        family="context",
        background=background,
        homes=("", "VOC2010", "VOCdevkit/VOC2010"),
        images=("JPEGImages",),
        maps=(Maps("SegmentationClassContext", ".png", _same(60) if background else _reduce_zero(59)),),
        listed="ImageSets/SegmentationContext/{split}.txt",
        own=_SPLITS,
    )


# Ids of the 182 things and stuffs of COCO-Stuff, minus one as in its maps, without those that no map uses.
_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
_COCO_IDS = [id for id in range(182) if id not in _UNUSED]
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of 34 ids

_FOLDERS = ("annotations/{split}", "stuffthingmaps/{split}")


def _objects(ids: Sequence[int]) -> dict[int, int]:
    """Return ids → classes: the first 80 of `ids` are classes 1 to 80; all others are background, and so are pixels
    without a label, as in GroupViT's conversion."""
    return {255: 0, **{id: index + 1 if index < 80 else 0 for index, id in enumerate(ids)}}


def _coco(name: str, about: str, suffix: str, background: bool, maps: tuple[Maps, ...]) -> MapSource:
    family = name.replace("-", "_")
    return MapSource(
        name=name,
        about=about,
        page="https://github.com/nightrome/cocostuff#downloads (val2017.zip and stuffthingmaps_trainval2017.zip)",
        tree=f"""\
coco_stuff164k/                          (or the folder above)
    images/val2017/000000000139.jpg
    annotations/val2017/000000000139{suffix}
        or 000000000139.png, as stuffthingmaps_trainval2017.zip has it""",
        splits={"val": 5000, "train": 118287},
        own={"val": "val2017", "train": "train2017"},
        names=NAMES[family],
        family=family,
        background=background,
        homes=("", "coco_stuff164k", "coco"),
        images=("images/{split}", "{split}"),
        maps=maps,
    )


MAP_SOURCES = (
    _voc(2012, {"val": 1449, "train": 1464, "trainval": 2913}, "VOCtrainval_11-May-2012.tar", background=True),
    _voc(2012, {"val": 1449, "train": 1464, "trainval": 2913}, "VOCtrainval_11-May-2012.tar", background=False),
    _voc(2010, {"val": 964, "train": 964, "trainval": 1928}, "VOCtrainval_03-May-2010.tar", background=True),
    _voc(2010, {"val": 964, "train": 964, "trainval": 1928}, "VOCtrainval_03-May-2010.tar", background=False),
    _context(background=False),
    _context(background=True),
    _coco(
        "coco-object",
        "COCO's 80 things and background, as GroupViT makes them of COCO-Stuff",
        "_instanceTrainIds.png   0 background, 1–80",
        background=True,
        maps=(
            Maps(_FOLDERS[0], "_instanceTrainIds.png", _same(81)),
            Maps(_FOLDERS[0], "_labelTrainIds.png", _objects(range(171))),
            *(Maps(folder, ".png", _objects(_COCO_IDS)) for folder in _FOLDERS),
        ),
    ),
    _coco(
        "coco-stuff",
        "COCO-Stuff 164k, 80 things and 91 stuffs",
        "_labelTrainIds.png      0–170, 255 without a label",
        background=False,
        maps=(
            Maps(_FOLDERS[0], "_labelTrainIds.png", _same(171)),
            *(Maps(folder, ".png", _classes(_COCO_IDS)) for folder in _FOLDERS),
        ),
    ),
    MapSource(
        name="ade20k",
        about="ADE20K of the scene parsing challenge, 150 classes",
        page="http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        tree="""\
ADEChallengeData2016/                    (or the folder above)
    images/validation/ADE_val_00000001.jpg
    annotations/validation/ADE_val_00000001.png     0 other, 1–150""",
        splits={"val": 2000, "train": 20210},
        own={"val": "validation", "train": "training"},
        names=NAMES["ade20k"],
        family="ade20k",
        homes=("", "ADEChallengeData2016", "ade/ADEChallengeData2016"),
        images=("images/{split}",),
        maps=(Maps("annotations/{split}", ".png", _reduce_zero(150)),),
    ),
    MapSource(
        name="cityscapes",
        about="Cityscapes, fine annotations, 19 classes",
        page="https://www.cityscapes-dataset.com/downloads/ (leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip)",
        tree="""\
cityscapes/                              (or the folder above)
    leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png
    gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelTrainIds.png     0–18, 255
        or …_gtFine_labelIds.png, as gtFine_trainvaltest.zip has it""",
        splits={"val": 500, "train": 2975},
        own=_SPLITS,
        names=NAMES["cityscapes"],
        family="cityscapes",
        homes=("", "cityscapes"),
        images=("leftImg8bit/{split}",),
        suffix="_leftImg8bit.png",
        maps=(
            Maps("gtFine/{split}", "_gtFine_labelTrainIds.png", _same(19)),
            Maps(
                "gtFine/{split}",
                "_gtFine_labelIds.png",
                {**dict.fromkeys(range(34), IGNORE), **_classes(_CITYSCAPES_IDS)},
            ),
        ),
    ),
)
