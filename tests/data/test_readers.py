"""Readers of data sets, on small copies of the real layouts: the same folders, names and file formats."""

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from open_gem import cli
from open_gem.data import (
    ALIASES,
    CONCEPTS,
    DATASETS,
    IGNORE,
    LabelFile,
    MapSource,
    Points,
    Segmentation,
    find_dataset,
    open_dataset,
    read_context,
    scene,
    scenes,
)
from open_gem.data.context import KEPT, decode_runs
from open_gem.data.names import NAMES, WITH_BACKGROUND, read_names
from open_gem.errors import DatasetError, ImageError, InputError, PromptError

SIZE = (9, 13)  # height, width of the pictures here


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def jpeg(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)


def palette_png(path: Path, ids: np.ndarray) -> None:
    """As VOC's: indices into VOC's palette, whose colours have the bits of the index spread over their channels."""
    colours = [
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(colours)
    assert image.mode == "P"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def grey_png(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint8)).save(path)


def ids_of(allowed: list[int], seed: int = 0) -> np.ndarray:
    """A map in which ids are drawn from `allowed`, each at least once where there is room."""
    values = np.random.default_rng(seed).choice(allowed, size=SIZE)
    first = np.array(allowed[: values.size])
    values.flat[: len(first)] = first
    return values


def renamed(raw: np.ndarray, meaning: Mapping[int, int]) -> np.ndarray:
    """Pixel by pixel."""
    return np.array([[meaning[int(one)] for one in row] for row in raw], dtype=np.uint8)


def segmentation(name: str, root: Path, split: str | None = None) -> Segmentation:
    data = open_dataset(name, root, split)
    assert isinstance(data, Segmentation)
    return data


def point_data(root: Path, split: str | None = None) -> Points:
    data = open_dataset("openimages", root, split)
    assert isinstance(data, Points)
    return data


# PascalVOC ------------------------------------------------------------------------------------------------------------

VOC_IDS = [*range(21), 255]


def make_voc(root: Path, year: int = 2012, ids: tuple[str, ...] = ("2007_000033", "2007_000042")) -> Path:
    home = root / "VOCdevkit" / f"VOC{year}"
    for index, one in enumerate(ids):
        jpeg(home / "JPEGImages" / f"{one}.jpg")
        palette_png(home / "SegmentationClass" / f"{one}.png", ids_of(VOC_IDS, index))
    jpeg(home / "JPEGImages" / "2007_000027.jpg")  # of detection only, in no list
    lists = home / "ImageSets" / "Segmentation"
    write(lists / "val.txt", "".join(f"{one}\n" for one in ids))
    write(lists / "train.txt", f"{ids[0]}\n")
    write(lists / "trainval.txt", "".join(f"{one}\n" for one in reversed(ids)))
    return home


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_from_any_root(tmp_path, below):
    make_voc(tmp_path)
    data = segmentation("voc2012", tmp_path / below)
    assert [sample.id for sample in data] == ["2007_000033", "2007_000042"]
    assert (data.name, data.split, data.background, len(data.classes)) == ("voc2012", "val", 0, 21)
    assert data.classes[:2] == ("background", "aeroplane") and data.classes[20] == "tvmonitor"
    for index, sample in enumerate(data):
        labels = sample.labels()
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, ids_of(VOC_IDS, index))
        assert sample.read_image().mode == "RGB" and sample.read_image().size == SIZE[::-1]
    assert len(segmentation("voc2012", tmp_path, "train")) == 1
    assert [sample.id for sample in segmentation("voc2012", tmp_path, "trainval")] == ["2007_000042", "2007_000033"]


def test_voc_with_background_ignored(tmp_path):
    make_voc(tmp_path)
    data = segmentation("voc20", tmp_path)
    assert (data.name, data.background, data.classes[0], len(data.classes)) == ("voc2012-20", None, "aeroplane", 20)
    meaning = {0: IGNORE, 255: IGNORE, **{one: one - 1 for one in range(1, 21)}}
    for index, sample in enumerate(data):
        assert np.array_equal(sample.labels(), renamed(ids_of(VOC_IDS, index), meaning))


def test_years_are_not_mixed_up(tmp_path):
    home = make_voc(tmp_path, 2010)
    assert len(segmentation("voc2010", home)) == 2
    for root in (home, tmp_path):
        with pytest.raises(DatasetError, match="VOC2012"):
            open_dataset("voc2012", root)


def test_a_copy_under_another_name_is_fine(tmp_path):
    make_voc(tmp_path).rename(tmp_path / "pascal")
    assert len(segmentation("voc2012", tmp_path / "pascal")) == 2


def test_lists_with_blank_lines_and_crlf(tmp_path):
    home = make_voc(tmp_path)
    write(home / "ImageSets/Segmentation/val.txt", "\ufeff2007_000042\r\n\r\n  2007_000033 \r\n\r\n")
    assert [sample.id for sample in segmentation("voc2012", home)] == ["2007_000042", "2007_000033"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2007_000033\n2007_000042  1\n", "line 2 .*'2007_000042  1'.*one id a line"),
        ("2007_000033\n\n2007_000033\n", "'2007_000033' more than once"),
        ("\n\n", "no line in"),
    ],
)
def test_malformed_lists_are_refused(tmp_path, text, said):
    home = make_voc(tmp_path)
    write(home / "ImageSets/Segmentation/val.txt", text)
    with pytest.raises(DatasetError, match=said):
        open_dataset("voc2012", home)


def test_a_list_that_is_not_text_is_refused(tmp_path):
    home = make_voc(tmp_path)
    (home / "ImageSets/Segmentation/val.txt").write_bytes(b"\xff\xfe2\x000\x00")
    with pytest.raises(DatasetError, match="not UTF-8 text"):
        open_dataset("voc2012", home)


def one_line(error: pytest.ExceptionInfo[DatasetError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("gone", ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation/val.txt"])
def test_missing_folders_are_named_with_their_expected_paths(tmp_path, gone):
    home = make_voc(tmp_path)
    (home / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError) as error:
        open_dataset("voc2012", tmp_path)
    text = one_line(error)
    assert f"no '{gone}' in '{home}' (" in text
    assert "open-gem data show voc2012" in text and "VOCtrainval_11-May-2012.tar" in text


def test_impossible_roots_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"'JPEGImages' in '.*' or '.*VOC2012' or '.*VOCdevkit/VOC2012'"):
        open_dataset("voc2012", tmp_path)
    with pytest.raises(DatasetError, match="does not exist"):
        open_dataset("voc2012", tmp_path / "nothing")
    write(tmp_path / "file.tar", "")
    with pytest.raises(DatasetError, match="is a file"):
        open_dataset("voc2012", tmp_path / "file.tar")
    with pytest.raises(DatasetError, match="no folder was given"):
        open_dataset("voc2012")
    with pytest.raises(DatasetError, match="no split 'test', expected one of val, train, trainval"):
        open_dataset("voc2012", tmp_path, "test")


def test_missing_files_are_named(tmp_path):
    home = make_voc(tmp_path)
    (home / "SegmentationClass/2007_000042.png").unlink()
    (home / "JPEGImages/2007_000033.jpg").unlink()
    with pytest.raises(DatasetError, match=r"2 files are missing.*JPEGImages/2007_000033.jpg.*Class/2007_000042.png"):
        open_dataset("voc2012", home)


# Label maps -----------------------------------------------------------------------------------------------------------


def test_unexpected_ids_are_named_with_their_file(tmp_path):
    home = make_voc(tmp_path)
    raw = ids_of(VOC_IDS)
    raw[3, 4], raw[5, 6] = 21, 254
    palette_png(home / "SegmentationClass/2007_000042.png", raw)
    data = segmentation("voc2012", home)
    data[0].labels()
    with pytest.raises(DatasetError, match=r"2007_000042.png' holds the ids 21, 254, expected only 0–20, 255") as error:
        data[1].labels()
    one_line(error)


@pytest.mark.parametrize("mode", ["RGB", "1", "I;16"])
def test_maps_of_other_modes_are_refused(tmp_path, mode):
    kinds: dict[str, np.ndarray] = {"RGB": np.zeros((*SIZE, 3), np.uint8), "1": np.zeros(SIZE, bool)}
    Image.fromarray(kinds.get(mode, np.zeros(SIZE, np.uint16))).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=rf"a.png' is an image of mode {mode}, expected class ids"):
        LabelFile(tmp_path / "a.png", {0: 0}).read()


def test_a_palette_of_few_colours_is_still_read_as_indices(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8))
    image.putpalette([9, 9, 9] * 4)
    image.save(tmp_path / "a.png", bits=2)
    assert LabelFile(tmp_path / "a.png", {0: IGNORE, 1: 0, 2: 1, 3: 7}).read().tolist() == [[IGNORE, 0], [1, 7]]


VOC = {0: (0, 0, 0), 7: (128, 128, 128), 12: (64, 0, 128), 15: (192, 128, 128), 255: (224, 224, 192)}


def with_palette(path: Path, *colours: tuple[int, int, int]) -> LabelFile:
    """Each index once, and the colour of each; ids are those of VOC."""
    image = Image.fromarray(np.arange(len(colours), dtype=np.uint8)[None])
    image.putpalette([level for colour in colours for level in colour])
    image.save(path / "a.png")
    return LabelFile(path / "a.png", {one: one for one in range(21)})


def test_a_palette_of_vocs_colours_in_another_order_is_read_by_colour(tmp_path):
    picture = Image.fromarray(np.array([[VOC[15], VOC[0]], [VOC[255], VOC[12]]], np.uint8))
    picture.quantize(256, dither=Image.Dither.NONE).save(tmp_path / "quantised.png")
    maps = LabelFile(tmp_path / "quantised.png", {one: one for one in range(21)})
    assert maps.read().tolist() == [[15, 0], [IGNORE, 12]]
    assert with_palette(tmp_path, VOC[12], VOC[0], VOC[15]).read().tolist() == [[12, 0, 15]]
    assert with_palette(tmp_path, VOC[0], VOC[7]).read().tolist() == [[0, 7]]


@pytest.mark.parametrize(
    "colours",
    [
        (VOC[0], VOC[15], (255, 0, 255)),  # VOC's, and one that is no id's
        (VOC[15], VOC[0], VOC[15]),  # one id twice, and what is index 0?
        ((3, 3, 3), (0, 0, 0), (2, 2, 2)),  # the levels are ids, and so are the indices
    ],
)
def test_ambiguous_palettes_are_refused(tmp_path, colours):
    with pytest.raises(
        DatasetError, match=r"a.png' has a palette in another order than its ids, .*: save the ids"
    ) as error:
        with_palette(tmp_path, *colours).read()
    one_line(error)


@pytest.mark.parametrize(
    "colours",
    [
        ((0, 0, 0), (1, 1, 1), (2, 2, 2)),
        ((0, 0, 0), (128, 0, 0), (255, 255, 255)),  # as VOC's, and white for one
        ((10, 20, 30), (40, 50, 60), (70, 80, 90)),
    ],
)
def test_other_palettes_are_read_as_indices(tmp_path, colours):
    assert with_palette(tmp_path, *colours).read().tolist() == [[0, 1, 2]]


def test_broken_files_are_named(tmp_path):
    home = make_voc(tmp_path)
    write(home / "SegmentationClass/2007_000033.png", "no png")
    whole = (home / "JPEGImages/2007_000033.jpg").read_bytes()
    (home / "JPEGImages/2007_000033.jpg").write_bytes(whole[: len(whole) // 2])
    sample = segmentation("voc2012", home)[0]
    with pytest.raises(DatasetError, match=r"cannot read labels from .*2007_000033.png"):
        sample.labels()
    with pytest.raises(ImageError, match=r"2007_000033.jpg"):
        sample.read_image()


def test_images_are_read_as_stored(tmp_path):
    """Labels and points refer to stored pixels: an EXIF orientation would turn the picture away from them."""
    home = make_voc(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6
    path = home / "JPEGImages/2007_000033.jpg"
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(path, exif=turned)
    picture = segmentation("voc2012", home)[0].read_image()
    assert picture.size == SIZE[::-1]
    assert 0x0112 not in picture.getexif()


def test_samples_can_be_pickled(tmp_path):
    data = segmentation("voc20", make_voc(tmp_path))
    again = pickle.loads(pickle.dumps(data[1]))
    assert again.id == data[1].id and np.array_equal(again.labels(), data[1].labels())
    assert data[-1].id == data[1].id
    with pytest.raises(IndexError):
        data[2]


# Names ----------------------------------------------------------------------------------------------------------------

COUNTS = {"voc": 20, "context": 59, "coco_object": 80, "coco_stuff": 171, "ade20k": 150, "cityscapes": 19}


@pytest.mark.parametrize(("family", "variant"), [(family, one) for family, all_ in NAMES.items() for one in all_])
def test_every_variant_has_all_classes_and_its_background_words(family, variant):
    names = read_names(family, variant, background=True)
    assert len(names.labels) == COUNTS[family]
    assert bool(names.background) == ((family, variant) in WITH_BACKGROUND)
    assert read_names(family, variant, background=False).background == ()
    assert read_names(family, variant, background=False).labels == names.labels


def different(family: str, variant: str) -> dict[str, str]:
    pairs = zip(read_names(family, "official", False).labels, read_names(family, variant, False).labels, strict=True)
    return {ours: theirs for ours, theirs in pairs if ours != theirs}


def test_names_as_published():
    assert different("voc", "groupvit") == {"diningtable": "table", "pottedplant": "plant", "tvmonitor": "monitor"}
    assert different("voc", "maskclip") == {
        "aeroplane": "airplane",
        "diningtable": "dining table",
        "pottedplant": "potted plant",
        "tvmonitor": "tv monitor",
    }
    assert different("voc", "sclip") == {
        "boat": "ship",
        "diningtable": "table",
        "tvmonitor": "television monitor",
    }
    plants = {"aeroplane": "airplane", "pottedplant": "plant", "tvmonitor": "monitor"}
    assert different("context", "groupvit") == plants
    assert different("context", "sclip") == {}
    sclip = read_names("voc", "sclip", background=True)
    assert len(sclip.background) == 26 and sclip.background[::25] == ("sky", "fence")
    assert len(sclip.prompts[14]) == 7 and sclip.prompts[19][-1] == "screen"
    assert read_names("context", "sclip", background=True).background == ("background",)
    assert read_names("coco_object", "sclip", background=True).prompts[0][-1] == "body"


def test_vocabularies_of_a_data_set(tmp_path):
    make_voc(tmp_path)
    with_background, without = segmentation("voc21", tmp_path), segmentation("voc20", tmp_path)
    assert with_background.vocabulary().labels[10] == "table"  # the paper's are first
    assert with_background.foreground == tuple(range(1, 21)) and without.foreground == tuple(range(20))
    assert len(with_background.vocabulary("sclip").background) == 26
    assert without.vocabulary("sclip").background == ()
    with pytest.raises(DatasetError, match=r"no class names 'gem', expected one of groupvit, maskclip, sclip"):
        without.vocabulary("gem")


# Pascal Context -------------------------------------------------------------------------------------------------------


def encoded(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths by counting, uncompressed."""
    counts, current = [0], 0
    for value in mask.T.ravel().tolist():  # down the columns
        if int(value) != current:
            counts.append(0)
            current = int(value)
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed(runs: dict[str, Any]) -> dict[str, Any]:
    """The text of run lengths, number by number and bit by bit."""
    text, counts = "", runs["counts"]
    for index, count in enumerate(counts):
        number, more = count - (counts[index - 2] if index > 2 else 0), True
        while more:
            bits = number & 31
            number >>= 5
            more = number != (-1 if bits & 16 else 0)
            text += chr(48 + bits + (32 if more else 0))
    return {**runs, "counts": text}


y, x = np.mgrid[:12, :17]
PUBLISHED = [  # texts that pycocotools 2.0 writes for these masks
    ((y - 5) ** 2 + (x - 8) ** 2 < 20, "d1374N0O2O0001N102L^1"),
    (
        (y * 7 + x * 3) % 5 == 0,
        "014000N02000N02030M030M0N02000N02000N02030M030M0N02000N02000N02030M030M0N02000N02000",
    ),
    (np.zeros((12, 17), bool), "\\6"),
    (np.ones((12, 17), bool), "0\\6"),
]


@pytest.mark.parametrize(("mask", "text"), PUBLISHED)
def test_runs_are_decoded_as_published(mask, text):
    assert compressed(encoded(mask))["counts"] == text  # so that what the other tests encode is the real format
    assert np.array_equal(decode_runs({"size": [12, 17], "counts": text}), mask)
    assert np.array_equal(decode_runs(encoded(mask)), mask)


def test_runs_of_any_mask_are_decoded():
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width = random.integers(1, 300, 2)
        runs = random.integers(1, 40, height * width)
        mask = np.repeat(random.random(height * width) < 0.5, runs)[: height * width].reshape(height, width)
        assert np.array_equal(decode_runs(compressed(encoded(mask))), mask)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([[1, 2, 3, 4, 5, 6]], "not a run-length encoding"),  # a polygon
        ({"size": [2, 2], "counts": [1, 2]}, "do not cover 2x2 pixels"),
        ({"size": [2, 2], "counts": [5, -1]}, "broken"),
        ({"size": [2, 2], "counts": "1\n"}, "is not a text of counts"),
        ({"size": [2, 2], "counts": "1P"}, "is not a text of counts"),  # says that more follows
        ({"size": [2, 2], "counts": ""}, "is not a text of counts"),
        ({"size": [2, 2], "counts": "é"}, "is not a text of counts"),
        ({"size": [2, 2], "counts": "3"}, "do not cover 2x2 pixels"),
        ({"size": [2], "counts": [4]}, "broken"),
        ({"size": [2, 2], "counts": "o" * 14 + "0"}, "is not a text of counts"),
    ],
)
def test_malformed_runs_are_refused(given, said):
    with pytest.raises(DatasetError, match=said):
        decode_runs(given)


def context_document() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`trainval_merged.json` of three images with all the keys it has, and their label maps, painted by hand."""
    random = np.random.default_rng(0)
    phases = {2008000002: "train", 2010000084: "val", 2008000007: "val"}
    images, segments, maps = [], [], {}
    for image, phase in phases.items():
        name = f"{image // 10**6}_{image % 10**6:06}"
        images.append(
            {
                "image_id": image,
                "file_name": f"{name}.jpg",
                "phase": phase,
                "height": SIZE[0],
                "width": SIZE[1],
                "date_captured": "31-Oct-2008",
            }
        )
        maps[name] = np.zeros(SIZE, np.uint8)
        for label in random.integers(0, 60, 7).tolist():
            mask = random.random(SIZE) < 0.4
            maps[name][mask] = label
            segments.append(
                {
                    "id": len(segments) + 1,
                    "image_id": image,
                    "category_id": KEPT[label],
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": [0, 0, 2, 3],
                    "parts": [{"part_id": 110, "segmentation": compressed(encoded(mask[::-1]))}],
                    "segmentation": compressed(encoded(mask)),
                }
            )
    document = {
        "info": {"description": "PASCAL in Detail", "version": "1.0"},
        "images": images,
        "annos_segmentation": segments,
        "annos_occlusion": [{"image_id": 2008000002, "ne": 1, "edges": {"indices": [[1, 2]], "edgelabel": [1]}}],
        "annos_boundary": [{"image_id": 2008000002, "boundary_mask": encoded(np.zeros(SIZE, bool))}],
        "annos_joints": [],
        "categories": [{"category_id": one, "name": str(one), "onlysemantic": 0, "parts": []} for one in KEPT],
        "parts": [{"part_id": 110, "name": "mouth", "superpart": "head"}],
    }
    return document, maps


@pytest.fixture
def context_root(tmp_path: Path) -> Path:
    """VOC2010 with pictures, and the document beside it."""
    document, maps = context_document()
    for one in maps:
        jpeg(tmp_path / "VOC2010" / "JPEGImages" / f"{one}.jpg")
    write(tmp_path / "trainval_merged.json", json.dumps(document))
    return tmp_path


def convert(root: Path) -> Result:
    return call("data", "context", "--json", root / "trainval_merged.json", "--root", root / "VOC2010")


def test_the_59_classes_are_those_of_mmsegmentation():
    assert len(KEPT) == 60 and sorted(set(KEPT)) == list(KEPT) and (KEPT[0], KEPT[1], KEPT[59]) == (0, 2, 458)


def test_context_is_made_and_read(context_root):
    result = convert(context_root)
    assert result.exit_code == 0, result.output
    assert "3 label maps made, 0 were there; train 1, val 2" in result.stdout
    home = context_root / "VOC2010"
    assert (home / "ImageSets/SegmentationContext/val.txt").read_bytes() == b"2008_000007\n2010_000084\n"
    assert (home / "ImageSets/SegmentationContext/train.txt").read_bytes() == b"2008_000002\n"
    _, maps = context_document()
    data = segmentation("context60", context_root)
    assert [sample.id for sample in data] == ["2008_000007", "2010_000084"]
    assert (len(data.classes), data.background, data.classes[59]) == (60, 0, "wood")
    for sample in data:
        with Image.open(home / "SegmentationClassContext" / f"{sample.id}.png") as image:
            assert image.mode == "L"
        assert np.array_equal(sample.labels(), maps[sample.id])
    data = segmentation("context59", home, "train")
    meaning = {0: IGNORE, **{one: one - 1 for one in range(1, 60)}}
    assert (len(data.classes), data.background, data.classes[0]) == (59, None, "aeroplane")
    assert np.array_equal(data[0].labels(), renamed(maps["2008_000002"], meaning))


def test_context_resumes(context_root, monkeypatch):
    home = context_root / "VOC2010"
    save = Image.Image.save
    written = 0

    def interrupted(self: Image.Image, *arguments: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:
            arguments[0].write(b"half")
            raise KeyboardInterrupt
        save(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        assert convert(context_root).exit_code != 0
    assert len(list((home / "SegmentationClassContext").iterdir())) == 2  # nothing half made
    assert not (home / "ImageSets").exists()
    result = convert(context_root)
    assert "1 label maps made, 2 were there" in result.stdout
    assert len(segmentation("context59", home)) == 2


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    document, _ = context_document()
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (changed(lambda d: d.pop("annos_segmentation")), "no images and annos_segmentation"),
        (changed(lambda d: d["images"][0].pop("file_name")), "no 'file_name'"),
        (changed(lambda d: d["annos_segmentation"][0].update(image_id=7)), "no 7"),
        (changed(lambda d: d["images"].append(d["images"][1])), "'2010_000084' more than once"),
        (changed(lambda d: d["images"][1].update(phase="test")), "image 2010_000084 .* of phase 'test'"),
        (changed(lambda d: d["annos_segmentation"][6].update(category_id=1)), "2008_000002: category 1 is not one"),
        (changed(lambda d: d["images"][2].update(height=8)), "2008_000007: a segment is 9x13, the image 8x13"),
        (changed(lambda d: d["annos_segmentation"][3].update(segmentation=[[1, 2]])), "2008_000002: a segment is no"),
        ("[1, 2", "cannot read"),
        ("[]", "no images"),
    ],
)
def test_malformed_documents_are_refused(context_root, text, said):
    write(context_root / "trainval_merged.json", text)
    result = convert(context_root)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert re.search(said, result.stderr), result.stderr
    assert not (context_root / "VOC2010/ImageSets").exists()


def test_parts_and_boundaries_are_not_kept(context_root):
    images = read_context(context_root / "trainval_merged.json")
    assert [len(image.segments) for image in images] == [7, 7, 7]
    assert {key for image in images for _, runs in image.segments for key in runs} == {"size", "counts"}


def test_context_needs_the_images(context_root):
    result = call("data", "context", "--json", context_root / "trainval_merged.json", "--root", context_root / "none")
    assert result.exit_code == 2 and "does not exist" in result.stderr
    (context_root / "VOC2010/JPEGImages").rename(context_root / "elsewhere")
    result = convert(context_root)
    assert result.exit_code == 2 and "no 'JPEGImages' in" in result.stderr


# COCO, ADE20K, Cityscapes ---------------------------------------------------------------------------------------------

UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}  # of 182, less one
RAW_COCO = [one for one in range(182) if one not in UNUSED]
TRAIN_IDS = {"road": 7, "sidewalk": 8, "building": 11, "bicycle": 33}
COCO = "000000000139"


def make_coco(root: Path, folder: str, suffix: str, raw: np.ndarray) -> None:
    jpeg(root / "images/val2017" / f"{COCO}.jpg")
    grey_png(root / folder / "val2017" / f"{COCO}{suffix}", raw)


def coco_classes(raw: np.ndarray) -> np.ndarray:
    return renamed(raw, {255: IGNORE, **{one: index for index, one in enumerate(RAW_COCO)}})


def coco_objects(raw: np.ndarray) -> np.ndarray:
    """Things are the first 80 categories, ids up to 90: class + 1, all else is background."""
    return renamed(raw, {one: RAW_COCO.index(one) + 1 if one <= 90 and one != 255 else 0 for one in [*RAW_COCO, 255]})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("folder", ["annotations", "stuffthingmaps"])
def test_coco_from_stuffthingmaps(tmp_path, folder, seed):
    raw = ids_of([*np.random.default_rng(seed).permutation(RAW_COCO).tolist(), 255], seed)
    make_coco(tmp_path, folder, ".png", raw)
    assert np.array_equal(segmentation("coco-stuff", tmp_path)[0].labels(), coco_classes(raw))
    data = segmentation("coco-object", tmp_path)
    assert np.array_equal(data[0].labels(), coco_objects(raw))
    assert data[0].id == COCO and data.classes[:2] == ("background", "person") and len(data.classes) == 81


def test_coco_from_converted_maps(tmp_path):
    home = tmp_path / "coco_stuff164k"
    raw = ids_of([*RAW_COCO[70:120], 255])
    make_coco(home, "annotations", ".png", raw)
    make_coco(home, "annotations", "_labelTrainIds.png", coco_classes(raw))
    stuff = segmentation("coco-stuff", tmp_path)
    assert np.array_equal(stuff[0].labels(), coco_classes(raw))
    assert len(stuff) == 1 and len(stuff.classes) == 171 and stuff.background is None
    assert np.array_equal(segmentation("coco-object", tmp_path)[0].labels(), coco_objects(raw))
    make_coco(home, "annotations", "_instanceTrainIds.png", coco_objects(raw))
    (home / "annotations/val2017" / f"{COCO}.png").unlink()
    assert np.array_equal(segmentation("coco-object", home)[0].labels(), coco_objects(raw))


def test_the_most_complete_kind_of_maps_is_read(tmp_path):
    make_coco(tmp_path, "annotations", ".png", ids_of([5]))
    jpeg(tmp_path / "images/val2017/000000000285.jpg")
    grey_png(tmp_path / "annotations/val2017/000000000285.png", ids_of([13]))
    make_coco(tmp_path, "annotations", "_labelTrainIds.png", ids_of([5]))  # a conversion that was interrupted
    assert [np.unique(one.labels()).tolist() for one in segmentation("coco-stuff", tmp_path)] == [[5], [12]]


def test_coco_ids_that_no_map_uses_are_errors(tmp_path):
    make_coco(tmp_path, "annotations", ".png", ids_of([0, 11]))
    with pytest.raises(DatasetError, match=rf"{COCO}.png' holds the ids 11, expected only 0–10, 12–24, 26–27"):
        segmentation("coco-stuff", tmp_path)[0].labels()


@pytest.mark.parametrize("below", ["", "ADEChallengeData2016", "ade/ADEChallengeData2016"])
def test_ade20k(tmp_path, below):
    home = tmp_path / below
    for split, number in (("validation", 1), ("training", 7)):
        jpeg(home / f"images/{split}/ADE_{split[:3]}_{number:08}.jpg")
        grey_png(home / f"annotations/{split}/ADE_{split[:3]}_{number:08}.png", ids_of(list(range(number, 151))))
    data = segmentation("ade", tmp_path)
    assert [sample.id for sample in data] == ["ADE_val_00000001"]
    assert np.array_equal(data[0].labels(), ids_of(list(range(1, 151))) - 1)
    assert len(data.classes) == 150 and (data.classes[0], data.classes[149]) == ("wall", "flag")
    assert segmentation("ade20k", tmp_path, "train")[0].id == "ADE_tra_00000007"
    zero = ids_of([0, 150])
    grey_png(home / "annotations/validation/ADE_val_00000001.png", zero)
    assert np.array_equal(data[0].labels(), renamed(zero, {0: IGNORE, 150: 149}))


def make_cityscapes(root: Path, suffix: str, raw: np.ndarray) -> None:
    for city in ("munster", "frankfurt"):
        one = f"{city}/{city}_000000_000294"
        path = root / f"leftImg8bit/val/{one}_leftImg8bit.png"
        jpeg(path)
        grey_png(root / f"gtFine/val/{one}_gtFine_{suffix}.png", raw)


def test_cityscapes(tmp_path):
    raw = ids_of(list(range(34)))
    make_cityscapes(tmp_path / "cityscapes", "labelIds", raw)
    make_cityscapes(tmp_path / "cityscapes", "instanceIds", raw)
    data = segmentation("cityscapes", tmp_path)
    names = ["frankfurt/frankfurt_000000_000294", "munster/munster_000000_000294"]
    assert [sample.id for sample in data] == names
    assert data[0].read_image().size == SIZE[::-1]
    labels = data[0].labels()
    for name, given in TRAIN_IDS.items():
        assert (labels[raw == given] == data.classes.index(name)).all()
    counted = sorted(set(labels.ravel().tolist()))
    assert counted == [*range(19), IGNORE]
    assert {int(one) for one in raw[labels == IGNORE]} == {*range(7), 9, 10, 14, 15, 16, 18, 29, 30}
    converted = labels.copy()
    make_cityscapes(tmp_path / "cityscapes", "labelTrainIds", converted)
    assert segmentation("cityscapes", tmp_path)[1].labels().tolist() == converted.tolist()


def test_folders_of_links_are_read(tmp_path):
    make_cityscapes(tmp_path / "far", "labelTrainIds", ids_of(list(range(19))))
    (tmp_path / "near/leftImg8bit/val").mkdir(parents=True)
    (tmp_path / "near/gtFine").symlink_to(tmp_path / "far/gtFine")
    (tmp_path / "near/leftImg8bit/val/frankfurt").symlink_to(tmp_path / "far/leftImg8bit/val/frankfurt")
    assert len(segmentation("cityscapes", tmp_path / "near")) == 1


MAP_SOURCES = [source for source in DATASETS.values() if isinstance(source, MapSource)]


@pytest.mark.parametrize("source", MAP_SOURCES, ids=lambda source: source.name)
def test_rows_are_consistent(source):
    count = len(read_names(source.family, "official", False).labels) + source.background
    for maps in source.maps:
        meanings = set(maps.ids.values())
        assert set(range(count)) <= meanings <= {*range(count), IGNORE}, maps.suffix
        assert max(maps.ids) <= 255
    assert set(source.splits) <= set(source.own)


# OpenImages -----------------------------------------------------------------------------------------------------------

HEADER = "ImageId,X,Y,Label,EstimatedYesNo,Source,YesVotes,NoVotes,UnsureVotes,TextLabel\n"
POINTS = '''\
0001eeaf4aed83f9,0.250000,0.500000,/m/01g317,yes,cc,3,0,0,
0001eeaf4aed83f9,0.75,0.125,/m/01g317,no,cc,0,3,0,
000595fe6fee6369,0,1,/m/0pcq81q,yes,ih,1,0,0,
0001eeaf4aed83f9,0.1,0.9,/m/0pcq81q,no,cc,0,3,0,
000595fe6fee6369,0.5,0.5,/m/01g317,unsure,cc,1,1,1,

0001eeaf4aed83f9,1,0.3,,yes,cc,1,0,0,"striped, red ""thing"""
00075905539074f2,0.4,0.4,/m/01g317,yes,cc,1,0,0,
000595fe6fee6369,0.6,0.7,/m/unknown,yes,cc,1,0,0,
'''
DESCRIPTIONS = '/m/01g317,Person\n/m/0pcq81q,"Soccer, player"\n/m/0zzz,Never asked\n'


def make_open_images(root: Path, points: str = HEADER + POINTS, descriptions: str = DESCRIPTIONS) -> None:
    write(root / "oidv7-val-annotations-point-labels.csv", points)
    write(root / "oidv7-class-descriptions.csv", descriptions)
    jpeg(root / "validation/0001eeaf4aed83f9.jpg")
    jpeg(root / "validation/00/05/000595fe6fee6369.jpg")  # at any depth


@pytest.mark.parametrize("header", ["", "LabelName,DisplayName\n", "\ufeffid,name\n"])
def test_points(tmp_path, header):
    make_open_images(tmp_path, descriptions=header + DESCRIPTIONS)
    with pytest.warns(UserWarning, match=r"1 of 3 images are missing, their points are dropped: '00075905539074f2'"):
        data = point_data(tmp_path)
    assert (data.name, data.split, data.missing) == ("openimages", "val", ("00075905539074f2",))
    assert data.names == ("Person", "Soccer, player", 'striped, red "thing"')
    dropped = {"people were unsure": 1, "their class has no name": 1, "their image is missing": 1}
    assert data.dropped == dropped
    first, second = data
    assert (first.id, second.id) == ("0001eeaf4aed83f9", "000595fe6fee6369")
    assert first.names == data.names and first.classes == (0, 1, 2)
    assert first.xy.tolist() == [[0.25, 0.5], [0.75, 0.125], [0.1, 0.9], [1, 0.3]] and first.xy.dtype == np.float64
    assert first.of.tolist() == [0, 0, 1, 2] and first.yes.tolist() == [True, False, False, True]
    assert first.positive == (0, 2)
    assert second.classes == (1,) and second.names == ("Soccer, player",)
    assert second.xy.tolist() == [[0, 1]] and second.of.tolist() == [0] and second.yes.tolist() == [True]
    assert second.read_image().size == SIZE[::-1]
    assert data[-1].id == second.id
    with pytest.raises(IndexError):
        data[2]


def test_columns_in_any_order(tmp_path):
    points = "X,imageid,Y,TextLabel,Label,EstimatedYesNo\r\n0.5,0001eeaf4aed83f9,0.25,,/m/01g317,Yes\r\n"
    make_open_images(tmp_path, points)
    sample = point_data(tmp_path)[0]
    assert (sample.xy.tolist(), sample.names, sample.positive) == ([[0.5, 0.25]], ("Person",), (0,))


@pytest.mark.parametrize("place", ["images/validation", "images", "val", "pictures/of/mine"])
@pytest.mark.parametrize("tables", ["", "metadata"])
def test_possible_places_of_images_and_tables(tmp_path, place, tables):
    write(tmp_path / tables / "oidv7-val-annotations-point-labels.csv", HEADER + POINTS.splitlines()[0])
    write(tmp_path / tables / "oidv7-class-descriptions.csv", DESCRIPTIONS)
    jpeg(tmp_path / place / "0001eeaf4aed83f9.jpg")
    data = point_data(tmp_path)
    assert len(data) == 1 and data[0].image.is_file()


def test_two_classes_may_have_one_name(tmp_path):
    points = [f"0001eeaf4aed83f9,0.5,0.5,{label},yes,cc,1,0,0,\n" for label in ("/m/1", "/m/2")]
    make_open_images(tmp_path, HEADER + "".join(points), "/m/1,Mouse\n/m/2,Mouse\n")
    sample = point_data(tmp_path)[0]
    assert sample.names == ("Mouse", "Mouse") and sample.classes == (0, 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("0001eeaf4aed83f9,0.5,0.5,/m/01g317,maybe,cc,1,0,0,", "line 3 .*yes, no or unsure"),
        ("0001eeaf4aed83f9,half,0.5,/m/01g317,yes,cc,1,0,0,", "line 3 .*to be numbers"),
        ("0001eeaf4aed83f9,1.5,0.5,/m/01g317,yes,cc,1,0,0,", "line 3 .*in 0 to 1"),
        ("0001eeaf4aed83f9,nan,0.5,/m/01g317,yes,cc,1,0,0,", "line 3 .*in 0 to 1"),
        ("0001eeaf4aed83f9,0.5,0.5,/m/01g317", "line 3 .*10 columns"),
    ],
)
def test_malformed_rows_are_refused(tmp_path, row, said):
    make_open_images(tmp_path, HEADER + POINTS.splitlines()[0] + "\n" + row + "\n")
    with pytest.raises(DatasetError, match=said) as error:
        open_dataset("openimages", tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("points", "descriptions", "said"),
    [
        (POINTS, DESCRIPTIONS, "no column ImageId in its first line"),
        ("", DESCRIPTIONS, "no column ImageId"),
        (HEADER, DESCRIPTIONS, "holds no points"),
        (HEADER.replace("TextLabel", "Text"), DESCRIPTIONS, "no column TextLabel"),
        (HEADER + POINTS, "LabelName,DisplayName\n", "describes no class"),
        (HEADER + POINTS, DESCRIPTIONS + "/m/1\n", "line 4 of .*expected LabelName,DisplayName"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, points, descriptions, said):
    make_open_images(tmp_path, points, descriptions)
    with pytest.raises(DatasetError, match=said):
        open_dataset("openimages", tmp_path)


def test_missing_tables_are_named(tmp_path):
    make_open_images(tmp_path)
    with pytest.raises(DatasetError, match=r"no 'oidv7-test-annotations-point-labels.csv' in"):
        open_dataset("openimages", tmp_path, "test")
    (tmp_path / "oidv7-class-descriptions.csv").write_bytes(b"/m/1,\xff\n")
    with pytest.raises(DatasetError, match=r"cannot read .*class-descriptions.csv"):
        open_dataset("openimages", tmp_path)
    (tmp_path / "oidv7-class-descriptions.csv").unlink()
    with pytest.raises(DatasetError, match=r"no 'oidv7-class-descriptions.csv' in"):
        open_dataset("openimages", tmp_path)


def test_points_without_any_image_are_an_error(tmp_path):
    make_open_images(tmp_path)
    (tmp_path / "validation").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    with pytest.raises(DatasetError, match=r"none of 3 images exists, e.g. '0001eeaf4aed83f9'"):
        open_dataset("openimages", tmp_path)


def test_points_of_many_chunks(tmp_path, monkeypatch):
    """Against a dictionary of lists, with the rows of each picture spread over the file."""
    monkeypatch.setattr("open_gem.data.openimages.CHUNK", 7)
    random = np.random.default_rng(0)
    pictures = [f"{index:016x}" for index in range(9)]
    labels = [f"/m/{index}" for index in range(5)]
    write(tmp_path / "oidv7-class-descriptions.csv", "".join(f"{label},class {label}\n" for label in labels))
    for one in pictures:
        jpeg(tmp_path / f"validation/{one}.jpg")
    rows, expected = [], {}
    for _ in range(200):
        one, label, answer = pictures[random.integers(9)], labels[random.integers(5)], ["no", "yes"][random.integers(2)]
        place = random.random(2).tolist()
        rows.append(f"{one},{place[0]!r},{place[1]!r},{label},{answer},cc,1,0,0,\n")
        expected.setdefault(one, []).append((*place, f"class {label}", answer == "yes"))
    write(tmp_path / "oidv7-val-annotations-point-labels.csv", HEADER + "".join(rows))
    data = point_data(tmp_path)
    assert list(data.ids) == list(expected)
    for sample in data:
        ours = [
            (*place, sample.names[of], yes)
            for place, of, yes in zip(sample.xy.tolist(), sample.of.tolist(), sample.yes.tolist(), strict=True)
        ]
        assert ours == expected[sample.id]


# Scenes ---------------------------------------------------------------------------------------------------------------


def test_scenes_have_the_same_shape():
    data = scenes(range(3, 6), size=64)
    assert (len(data), data.classes, data.background) == (3, CONCEPTS, None)
    assert data.vocabulary().labels == CONCEPTS
    sample, drawn = data[1], scene(4, 64)
    assert sample.id == "scene-4" and np.array_equal(np.asarray(sample.read_image()), drawn.image)
    labels = sample.labels()
    assert labels.dtype == np.uint8 and labels.shape == (64, 64)
    for name, mask in zip(drawn.names, drawn.masks, strict=True):
        assert np.array_equal(labels == CONCEPTS.index(name), mask)
    assert np.array_equal(labels == IGNORE, ~drawn.masks.any(axis=0))
    assert sample.scene.names == drawn.names  # pyright: ignore[reportAttributeAccessIssue]
    assert np.array_equal(data[-1].labels(), data[2].labels())


def test_scenes_need_no_folder():
    data = open_dataset("scenes")
    assert isinstance(data, Segmentation)
    assert (len(data), data.split, data[0].id) == (500, "held-out", "scene-0")
    validation = open_dataset("scenes", split="validation")
    assert validation[0].id == "scene-500000"


# Which data sets there are --------------------------------------------------------------------------------------------


def test_find_dataset():
    assert find_dataset(" COCO_Object ").name == "coco-object"
    assert all(find_dataset(alias).name == name for alias, name in ALIASES.items())
    with pytest.raises(DatasetError, match=r"'vco2012', expected one of .*\(did you mean voc2012\?\)$") as error:
        find_dataset("vco2012")
    assert isinstance(error.value, InputError) and not isinstance(error.value, PromptError)
    with pytest.raises(DatasetError, match=r"scenes$"):
        find_dataset("!")


@pytest.mark.parametrize("name", DATASETS)
def test_show_prints_the_tree_and_the_page(name):
    result = call("data", "show", name)
    assert result.exit_code == 0
    source = DATASETS[name]
    assert source.tree in result.stdout and source.page in result.stdout


def test_the_command_lists_all_data_sets():
    result = call("data")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in DATASETS)
    rows = json.loads(call("data", "--json").stdout)
    assert [row["name"] for row in rows] == list(DATASETS)
    assert rows[0]["splits"] == {"val": 1449, "train": 1464, "trainval": 2913}


def test_check(tmp_path):
    home = make_voc(tmp_path)
    result = call("data", "check", "voc2012", "--root", tmp_path)
    assert result.exit_code == 0
    assert re.search(r"\b2 \w+, 1,449 were published", result.stdout) and "missing files: 0" in result.stdout
    assert "the first 2 images and label maps were read" in result.stdout
    (home / "JPEGImages/2007_000033.jpg").unlink()
    jpeg(home / "JPEGImages/2007_000042.jpg", (5, 6))
    result = call("data", "check", "voc2012", "--root", tmp_path, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["images"], found["expected"], found["missing"]) == (2, 1449, ["JPEGImages/2007_000033.jpg"])
    assert found["broken"] == ["2007_000042: labels are 9x13, the image 5x6"]
    (home / "JPEGImages/2007_000042.jpg").write_bytes(b"no picture")
    jpeg(home / "JPEGImages/2007_000033.jpg", (13, 9))
    result = call("data", "check", "voc2012", "--root", tmp_path)
    assert result.exit_code == 1 and "broken: cannot read" in result.stdout and "000042.jpg" in result.stdout
    result = call("data", "check", "voc2012", "--root", tmp_path / "none")
    assert result.exit_code == 2 and result.stderr.startswith("error: voc2012: ")


def test_the_folder_of_another_year_is_refused(tmp_path, monkeypatch):
    home = make_voc(tmp_path)
    home.rename(home.with_name("VOC2010"))
    monkeypatch.chdir(home.with_name("VOC2010"))
    with pytest.raises(DatasetError, match="voc2012"):
        open_dataset("voc2012", ".")
    assert len(open_dataset("voc2010", ".")) == 2


def test_check_points_and_scenes(tmp_path):
    make_open_images(tmp_path)
    result = call("data", "check", "openimages", "--root", tmp_path)
    assert result.exit_code == 1
    assert re.search(r"\b3 \w+, 36,702", result.stdout) and "  00075905539074f2.jpg" in result.stdout
    assert "5 points of 3 classes" in result.stdout and "1 points dropped: people were unsure" in result.stdout
    assert call("data", "check", "scenes").exit_code == 0


def test_voc_is_downloaded_only_if_it_is_missing(tmp_path, monkeypatch):
    asked = []

    def download(root: str, **options: Any) -> None:
        asked.append(options)
        make_voc(Path(root))

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", download)
    for _ in range(2):
        result = call("data", "voc", "--root", tmp_path / "new")
        assert result.exit_code == 0 and re.search(r"\b2 \w+ of voc2012", result.stdout)
    assert asked == [{"year": "2012", "image_set": "val", "download": True}]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", fail)
    result = call("data", "voc", "--root", tmp_path, "--year", "2010")
    assert result.exit_code == 2 and "no network" in result.stderr
    assert call("data", "voc", "--root", tmp_path, "--year", "2013").exit_code == 2
