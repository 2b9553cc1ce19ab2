"""Crisp masks by Segment Anything models: tiny random checkpoints of every type that is read, and a stand-in that is
right by construction."""

import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from browser import serving
from PIL import Image
from published import check_row
from safetensors.torch import load_file, save_file
from sam_checkpoints import PROMPTABLE, model, save
from torch import Tensor
from typer.testing import CliRunner

import open_gem
from open_gem import Localization, Vocabulary
from open_gem.cli import app
from open_gem.data.scenes import scene
from open_gem.errors import InputError, NotFiniteError, UnknownModelError, UnsupportedModelError, WeightsError
from open_gem.localization.crisp import CrispMask, Region, Segmenter
from open_gem.refine import Refinement, sam
from open_gem.refine.sam import Prompt, PromptedModel, Sam, load_prompted
from open_gem.types import Size
from open_gem.verify.checkers import PromptedMasks
from open_gem.verify.values import VALUES

SIZE = Size(60, 97)
POINTS = torch.tensor([[[10.0, 20.0]], [[50.0, 30.0]], [[90.0, 55.0]]])
BOXES = torch.tensor([[0.0, 0, 30, 40], [40, 10, 90, 50], [80, 40, 97, 60]])
SIGNS = torch.ones(3, 1, dtype=torch.int64)
PROCESSORS = {"sam": "SamProcessor", "sam3_tracker": "Sam3TrackerProcessor", "sam3_video": "Sam3TrackerProcessor"}


def picture(size: Size = SIZE) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size.width, size.height), Image.Resampling.BILINEAR)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in PROMPTABLE}


@pytest.fixture(params=PROMPTABLE)
def kind(request) -> str:
    return request.param


@pytest.fixture
def loaded(kind, folders) -> PromptedModel:
    return load_prompted(str(folders[kind]), device="cpu")


@pytest.fixture(scope="session")
def localizer() -> open_gem.Localizer:
    return open_gem.load("embedded", device="cpu").acknowledge()


# The library ----------------------------------------------------------------------------------------------------------


def library(loaded: PromptedModel, kind: str, **prompts: Any) -> tuple[Any, Any]:
    """The library's own processor for the same prompts, and its model's answer in one call."""
    processor = getattr(transformers, PROCESSORS.get(kind, "Sam2Processor"))(loaded.processor)
    inputs = processor(images=picture(), return_tensors="pt", **prompts)
    with torch.no_grad():
        answer = loaded.model(**inputs, multimask_output="input_labels" in prompts)
    sizes = [inputs["original_sizes"]] + ([inputs["reshaped_input_sizes"]] if kind == "sam" else [])
    return answer, processor.post_process_masks(answer.pred_masks, *sizes)[0]


def test_boxes_and_points_are_the_librarys(kind, loaded):
    prompts = {"input_points": [POINTS.tolist()], "input_boxes": [BOXES.tolist()]}
    theirs, masks = library(loaded, kind, **prompts)
    encoded = loaded.encode(picture())
    logits, quality = loaded.predict(encoded, Prompt(POINTS, SIGNS, BOXES), several=False)
    torch.testing.assert_close(logits, theirs.pred_masks[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quality, theirs.iou_scores[0], rtol=1e-4, atol=1e-5)
    ours = torch.stack([loaded.upsample(mask[0], encoded) > 0 for mask in logits])
    assert ours.shape == (3, *SIZE)
    assert (ours != masks[:, 0]).float().mean() < 1e-3
    assert theirs.pred_masks.std() > 0.1 and theirs.iou_scores.std() > 1e-3  # so that a mistake would show


def test_points_alone_are_the_librarys(kind, loaded):
    points = torch.tensor([[[10.0, 20.0], [60.0, 5.0]], [[50.0, 30.0], [1.0, 58.0]]])
    signs = torch.tensor([[1, 0], [1, 1]])
    theirs, _ = library(loaded, kind, input_points=[points.tolist()], input_labels=[signs.tolist()])
    logits, quality = loaded.predict(loaded.encode(picture()), Prompt(points, signs), several=True)
    torch.testing.assert_close(logits, theirs.pred_masks[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quality, theirs.iou_scores[0], rtol=1e-4, atol=1e-5)
    assert quality.shape == (2, 3)


def test_the_map_is_a_prompt_in_the_frame_of_the_image(kind, loaded):
    encoded, ramp = loaded.encode(picture()), torch.linspace(0, 1, 97).expand(60, 97)
    framed = loaded.framed(ramp, encoded)
    assert framed.shape == (32, 32)
    rows = 20 if kind == "sam" else 32  # SAM pads below, the others squash
    assert framed[rows:].abs().max() == 0 if rows < 32 else True
    torch.testing.assert_close(
        framed[:rows], torch.linspace(0.5 / 32, 1 - 0.5 / 32, 32).expand(rows, 32), rtol=0, atol=0.02
    )
    prompt = Prompt(POINTS, SIGNS, BOXES)
    without = loaded.predict(encoded, prompt, several=False)[0]
    plain = loaded.predict(encoded, prompt._replace(dense=ramp), several=False)[0]
    with torch.no_grad():
        theirs = loaded.model(
            image_embeddings=encoded.embeddings,
            input_points=(POINTS * _scale(encoded))[None],
            input_labels=SIGNS[None],
            input_boxes=(BOXES * _scale(encoded).repeat(2))[None],
            input_masks=framed[None, None],
            multimask_output=False,
        )
    assert torch.equal(plain, theirs.pred_masks[0])
    assert (plain - without).abs().max() > 1e-3


def _scale(encoded: sam.EncodedImage) -> Tensor:
    return torch.tensor([encoded.resized.width / SIZE.width, encoded.resized.height / SIZE.height])


def test_a_checkpoint_for_video_is_its_model_for_images(folders):
    """Weight by weight: the tracker's of SAM 3, on the detector's vision encoder and a neck of its own."""
    whole = model("sam3_video").state_dict()
    for name, weight in load_prompted(str(folders["sam3_video"]), device="cpu").model.state_dict().items():
        source = name.replace("vision_encoder.backbone.", "detector_model.vision_encoder.backbone.")
        source = source.replace("vision_encoder.neck.", "tracker_neck.") if source == name else source
        assert torch.equal(weight, whole[source if source != name else f"tracker_model.{name}"]), name
    whole = model("sam2_video").state_dict()
    for name, weight in load_prompted(str(folders["sam2_video"]), device="cpu").model.state_dict().items():
        assert torch.equal(weight, whole[name]), name


TYPES = {"facebook/sam-vit-base": "sam", "facebook/sam2.1-hiera-tiny": "sam2", "yonigozlan/EdgeTAM-hf": "edgetam"}


@pytest.mark.parametrize(
    "row",
    [row for row in VALUES if isinstance(row, PromptedMasks)],
    ids=lambda row: f"{row.checkpoint} {row.image} {row.compared}",
)
def test_a_published_row_is_checked_against_what_the_library_gives(row, folders, tmp_path):
    """Points of one prompt if there is no box; of one each otherwise."""
    kind = TYPES[row.checkpoint]
    loaded = load_prompted(str(folders[kind]), device="cpu")
    processor = getattr(transformers, PROCESSORS.get(kind, "Sam2Processor"))(loaded.processor)
    prompts = {"input_boxes": [[list(box) for box in row.boxes]]} if row.boxes else {}
    if row.points:
        points = [list(point) for point in row.points]
        prompts["input_points"] = [[[point] for point in points] if row.boxes else [points]]

    def library(image: Image.Image) -> Tensor:
        with torch.no_grad():
            answer = loaded.model(
                **processor(images=image, return_tensors="pt", **prompts), multimask_output=row.several
            )
        quality = answer.iou_scores[0]
        return {
            "quality": quality.sort(dim=1, descending=True).values.flatten(),
            "last quality": quality[0, -1:],
            "mask": answer.pred_masks[0, 0, quality[0].argmax(), :3, :3].flatten(),
        }[row.output]

    check_row(row, folders[kind], picture(Size(1300, 1800)), tmp_path, library)


# The recipe -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth(Refinement):
    """A segmenter that returns the object of a scene that is under the prompt, or else is not sure."""

    seed: int
    size: int = 256

    def refine(self, image: Image.Image, localization: Localization) -> Localization:
        masks = torch.from_numpy(scene(self.seed, size=self.size).masks)

        def draw(regions, confidence):
            for region in regions:
                x, y = region.point
                under = [mask for mask in masks if mask[y, x]]
                yield CrispMask(under[0], 0.95) if under else None

        return replace(localization, segmenter=draw)


def iou(mask: Any, truth: np.ndarray) -> float:
    mask = np.asarray(mask)
    return (mask & truth).sum() / (mask | truth).sum()


def test_where_the_point_is_right_the_mask_is(localizer):
    """Component, prompt, choice and fallback, with the model in the package and scenes that nobody chose."""
    coarse, crisp, labelled = [], [], []
    for seed in range(12):
        drawn = scene(seed, size=256)
        image = Image.fromarray(drawn.image)
        plain = localizer(image, drawn.names)
        refined = localizer.configured(refinement=Truth(seed))(image, drawn.names)
        rough, sharp = plain.objects(presence=0), refined.objects(presence=0)
        segmented = refined.segment(0.8)
        for index, truth in enumerate(drawn.masks):
            best = next((obj for obj in sharp if obj.index == index), None)
            if best is None or not truth[best.point[1], best.point[0]]:
                continue
            crisp.append(iou(best.mask, truth))
            coarse.append(iou(next(obj for obj in rough if obj.index == index).mask, truth))
            assert best.mask_quality == 0.95
            if (segmented == index).any():
                labelled.append(iou(segmented == index, truth))
    assert len(crisp) > 15
    assert np.mean(crisp) > 0.9 > np.mean(coarse)
    assert np.mean(labelled) > 0.8


def located(*maps: Tensor, segmenter: Segmenter | None = None, **settings: Any) -> Localization:
    labels = ("cat", "dog")[: len(maps)]
    size = Size(*maps[0].shape)
    return Localization(labels, torch.stack(maps), size, logit_scale=None, segmenter=segmenter, **settings)


def blobs(*boxes: tuple[int, int, int, int, float]) -> Tensor:
    """A map of 20 × 30 with rectangles (left, top, right, bottom) of a value."""
    values = torch.zeros(20, 30)
    for left, top, right, bottom, value in boxes:
        values[top:bottom, left:right] = value
    return values


def drawing(*boxes: tuple[int, int, int, int] | None, quality: float = 0.95) -> Segmenter:
    """A segmenter that draws these boxes, in order; None where it is not sure."""
    left_over = list(boxes)

    def draw(regions, confidence):
        for _ in regions:
            box = left_over.pop(0)
            yield None if box is None else CrispMask(blobs((*box, 1.0)) > 0, quality)

    return draw


TWO = blobs((2, 3, 8, 9, 0.9), (20, 10, 28, 18, 0.7))


def test_an_object_has_the_segmenters_outline_and_the_maps_opinion():
    coarse = located(TWO).objects(min_area=0)
    [first, second] = located(TWO, segmenter=drawing((1, 2, 9, 10), None)).objects(min_area=0)
    assert (first.box, second.box) == ((1, 2, 9, 10), (20, 10, 28, 18))
    assert (first.mask_quality, second.mask_quality) == (0.95, None)
    assert [(obj.score, obj.point, obj.peak) for obj in (first, second)] == [
        (obj.score, obj.point, obj.peak) for obj in coarse
    ]
    assert first.area == 64 and np.asarray(first.mask).sum() == 64
    assert first.to_dict()["mask_quality"] == 0.95 and "mask_quality" not in second.to_dict()


def test_an_empty_mask_is_no_mask():
    found = located(TWO, segmenter=drawing((0, 0, 0, 0), None))
    assert [obj.mask_quality for obj in found.objects(min_area=0)] == [None, None]


def test_all_of_a_label_is_drawn_part_by_part():
    found = located(TWO, segmenter=drawing((1, 2, 9, 10), (19, 9, 29, 19)))
    [whole] = found.objects(min_area=0, instances="label")
    assert whole.box == (1, 2, 29, 19) and whole.area == 64 + 100 and whole.point == (2, 3)
    assert whole.mask_quality == 0.95


def test_masks_are_all_that_was_drawn():
    found = located(TWO, segmenter=drawing((1, 2, 9, 10), None))
    expected = blobs((1, 2, 9, 10, 1.0), (20, 10, 28, 18, 1.0)) > 0
    assert torch.equal(found.masks()[0], expected)
    assert torch.equal(found.heatmaps()[0], located(TWO).heatmaps()[0])


def test_exclusive_masks_that_a_segmenter_draws_do_not_overlap():
    """A label keeps what its map wins; what no map wins belongs to the first that is drawn there."""
    cat, dog = blobs((2, 2, 10, 10, 0.9)), blobs((12, 2, 20, 10, 0.8))
    grown = [(1, 2, 16, 10), (8, 2, 21, 10)]
    overlapping = located(cat, dog, segmenter=drawing(*grown)).objects(min_area=0)
    assert [obj.box for obj in overlapping] == grown
    first, second = located(cat, dog, segmenter=drawing(*grown)).objects(min_area=0, exclusive=True)
    assert (first.box, second.box) == ((1, 2, 12, 10), (12, 2, 21, 10))
    assert (first.area, second.area) == (11 * 8, 9 * 8)
    assert not (np.asarray(first.mask) & np.asarray(second.mask)).any()


def test_a_label_map_is_made_of_masks():
    """A pixel of two masks is that of the more probable label; one that no mask has is background, if there is any."""
    cat, dog = blobs((2, 2, 10, 10, 0.9)), blobs((12, 2, 20, 10, 0.8))
    grown = [(1, 1, 14, 11), (8, 1, 21, 11)]
    found = located(cat, dog, segmenter=drawing(*grown)).segment(0.5)
    assert (found[1:11, 1:8] == 0).all() and (found[1:11, 14:21] == 1).all()
    assert (found[2:10, 8:10] == 0).all() and (found[2:10, 12:14] == 1).all()
    assert found[15].unique().tolist() == [-1]
    shrunk = [(3, 3, 9, 9), (13, 3, 19, 9)]
    assert located(cat, dog, segmenter=drawing(*shrunk)).segment(0.5)[2, 2] == -1
    everywhere = located(cat, dog + 0.01, segmenter=drawing(*shrunk)).segment()
    assert (everywhere[2, 2], everywhere[0, 0]) == (0, 1)  # nothing else can be there


def test_a_background_prompt_takes_what_masks_leave():
    maps = torch.stack([blobs((2, 2, 10, 10, 0.9)), torch.full((20, 30), 0.5)])
    vocabulary = Vocabulary(("cat",), (("cat",),), ("wall",))
    found = Localization(
        ("cat",), maps, Size(20, 30), logit_scale=None, vocabulary=vocabulary, segmenter=drawing((4, 4, 9, 9))
    )
    assert torch.equal(found.segment() == 0, blobs((4, 4, 9, 9, 1.0)) > 0)


# With a model ---------------------------------------------------------------------------------------------------------


def regions() -> list[Region]:
    return [
        Region((slice(10, 30), slice(5, 25)), np.ones((20, 20), bool), (12, 20)),
        Region((slice(0, 1), slice(0, 1)), np.ones((1, 1), bool), (0, 0)),
        Region((slice(20, 55), slice(40, 90)), np.ones((35, 50), bool), (60, 30)),
    ]


def segmenter(folder: Path, **settings: Any) -> Any:
    result = Localization(("cat",), torch.zeros(1, 6, 10), SIZE)
    return Sam(str(folder), **settings).refine(picture(), result).segmenter


def confidence() -> Tensor:
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(1))


def test_regions_are_drawn_by_box_peak_and_map(kind, loaded, folders):
    drawn = list(segmenter(folders[kind], quality=0.0)(regions(), confidence()))
    encoded, values = loaded.encode(picture()), confidence()
    boxes = torch.tensor([[5.0, 10, 25, 30], [40, 20, 90, 55]])
    points = torch.tensor([[[12.0, 20.0]], [[60.0, 30.0]]])
    dense = torch.where(values > 0.1, 0.005 * values, 0)
    logits, quality = loaded.predict(encoded, Prompt(points, SIGNS[:2], boxes, dense), several=False)
    assert drawn[1] is None  # too small
    for mine, mask, sure in zip((drawn[0], drawn[2]), logits, quality, strict=True):
        assert mine.quality == pytest.approx(sure.item(), abs=1e-5)
        assert (mine.mask != (loaded.upsample(mask[0], encoded) > 0)).float().mean() < 1e-3
        assert mine.mask.shape == SIZE


def test_a_mask_that_the_model_is_not_sure_of_is_left(folders):
    qualities = [mask.quality for mask in segmenter(folders["sam2"], quality=0.0)(regions(), confidence()) if mask]
    between = sum(qualities) / 2
    kept = list(segmenter(folders["sam2"], quality=between)(regions(), confidence()))
    assert [mask is not None for mask in (kept[0], kept[2])] == [value > between for value in qualities]
    assert len(set(qualities)) == 2


def test_the_image_is_encoded_once_and_prompts_in_batches(folders, monkeypatch):
    draw = segmenter(folders["sam2"], quality=0.0, min_area=0.0)
    network, seen = draw.settings.load(torch.device("cpu")).model, {"encoder": 0, "decoder": []}
    handles = [
        network.vision_encoder.register_forward_hook(lambda *_: seen.update(encoder=seen["encoder"] + 1)),
        network.mask_decoder.register_forward_hook(lambda _, given, made: seen["decoder"].append(made[0].shape[1])),
    ]
    together = list(draw(regions(), confidence()))
    monkeypatch.setattr(sam, "BATCH", 2)
    parts = list(draw(regions(), confidence()))
    for handle in handles:
        handle.remove()
    assert seen == {"encoder": 1, "decoder": [3, 2, 1]}
    for one, other in zip(together, parts, strict=True):
        assert one.quality == pytest.approx(other.quality, abs=1e-5)
        assert (one.mask != other.mask).float().mean() < 1e-3


def test_points_are_where_the_map_is_high_and_as_many_where_it_is_low():
    values = torch.zeros(16, 16)
    values[2:4, 2:6] = 1.0
    region = Region((slice(2, 4), slice(2, 6)), np.ones((2, 4), bool), (3, 2))
    prompt = sam.point_prompts([region], values)
    assert prompt.points is not None and prompt.signs is not None
    [points], [signs] = prompt.points.tolist(), prompt.signs.tolist()
    inside = [tuple(point) for point, sign in zip(points, signs, strict=True) if sign == 1]
    outside = [tuple(point) for point, sign in zip(points, signs, strict=True) if sign == 0]
    assert inside[0] == (3, 2)  # the peak
    assert set(inside[1:]) == {(x, y) for x in range(2, 6) for y in range(2, 4)}
    assert len(outside) == len(inside) and all(values[int(y), int(x)] == 0 for x, y in outside)
    assert prompt.boxes is None and prompt.dense is None


def test_several_regions_have_as_many_points_each_and_those_missing_are_marked():
    values = blobs((2, 3, 8, 9, 0.9), (20, 10, 22, 12, 0.9))
    masks = [(slice(3, 9), slice(2, 8)), (slice(10, 12), slice(20, 22))]
    made = [
        Region(
            span,
            np.ones((span[0].stop - span[0].start, span[1].stop - span[1].start), bool),
            (span[1].start, span[0].start),
        )
        for span in masks
    ]
    prompt = sam.point_prompts(made, values)
    assert prompt.points is not None and prompt.signs is not None
    assert prompt.points.shape[:2] == prompt.signs.shape
    assert (prompt.signs[0] != -10).all() and (prompt.signs[1] == -10).any()


def test_points_alone_draw_the_best_of_three(folders, loaded, kind):
    drawn = [mask for mask in segmenter(folders[kind], quality=0.0, prompts="points")(regions(), confidence()) if mask]
    prompt = sam.point_prompts([regions()[0], regions()[2]], confidence())
    _, quality = loaded.predict(loaded.encode(picture()), prompt, several=True)
    expected = [value for value in quality.amax(dim=1).tolist() if value > 0]
    assert [mask.quality for mask in drawn] == pytest.approx(expected, abs=1e-5)


def test_a_result_can_be_sent_and_leaves_the_encoded_image_behind(folders):
    draw = segmenter(folders["sam2"], quality=0.0)
    before = [mask.quality for mask in draw(regions(), confidence()) if mask]
    sent = pickle.dumps(draw)
    assert len(sent) < 50_000
    assert [mask.quality for mask in pickle.loads(sent)(regions(), confidence()) if mask] == before


# By name --------------------------------------------------------------------------------------------------------------


def test_it_is_found_by_name(localizer, folders):
    named = localizer.configured(refinement=f"sam:{folders['sam2']}")
    assert named.refinement == Sam(str(folders["sam2"]))
    assert named.describe()["refinement"] == {
        "refinement": "sam",
        "checkpoint": str(folders["sam2"]),
        "quality": 0.9,
        "prompts": "box",
        "min_area": 0.0005,
    }
    result = named(picture(), ["a cat", "a dog"])
    assert result.masks().stack().shape == (2, *SIZE)
    assert result.segment(0.5).shape == SIZE


@pytest.mark.parametrize(
    ("checkpoint", "error", "words"),
    [
        ("./nowhere", WeightsError, "no such folder"),
        ("not a name", UnknownModelError, "unknown model 'not a name'"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_before_the_first_image(checkpoint, error, words, localizer):
    with pytest.raises(error, match=words) as raised:
        localizer.configured(refinement=Sam(checkpoint))
    assert "\n" not in str(raised.value)


def test_other_types_are_refused_with_those_that_there_are(tmp_path):
    transformers.CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"\(clip\) does not draw masks for prompts; .* sam, sam2, sam2_video"
    ):
        load_prompted(str(tmp_path), device="cpu")


def test_missing_weights_are_an_error_and_never_random(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folders["sam"] / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((folders["sam"] / name).read_text())
    with pytest.raises(WeightsError, match="1 missing"):
        load_prompted(str(tmp_path), device="cpu")


def test_damaged_weights_are_an_error_that_names_them(folders):
    broken = load_prompted(str(folders["sam2"]), device="cpu")
    broken.model.no_memory_embedding.data.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="no_memory_embedding"):
        broken.encode(picture())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"checkpoint": ""}, "checkpoint is '', expected a repository or a folder"),
        ({"prompts": "circle"}, "prompts is 'circle', expected one of box, points"),
        ({"quality": 1.2}, r"quality is 1.2, expected a number in \[0, 1\]"),
        ({"min_area": True}, r"min_area is True, expected a number in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        Sam(**settings)


def test_another_image_is_refused():
    result = Localization(("cat",), torch.zeros(1, 6, 10), SIZE)
    with pytest.raises(InputError, match=r"the image is 20×30 .* expected the one localized: 60×97"):
        Sam().refine(picture(Size(20, 30)), result)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    drawn = scene(3, size=96)
    (tmp_path / "images").mkdir()
    Image.fromarray(drawn.image).save(tmp_path / "images" / "scene.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["ground", "images/scene.png", "-p", "a dog", "--save", "mask,json", "--presence", "0"],
        ["label", "images", "-p", "a dog", "--out", "labels"],
        ["evaluate", "scenes", "--limit", "1", "--method", "gem", "--out", "results"],
    ],
    ids=lambda command: command[0],
)
def test_commands_know_it(command, folders, place):
    model = [] if command[0] == "evaluate" else ["--model", "embedded"]
    result = CliRunner().invoke(app, [*command, *model, "--device", "cpu", "--refine", f"sam:{folders['sam2']}", "-q"])
    assert result.exit_code == 0, result.output
    if command[0] == "evaluate":
        [settings] = place.glob("results/*/run.json")
        assert "sam" in json.dumps(json.loads(settings.read_text())["protocol"]["refinement"])


@pytest.fixture(scope="session")
def sure(tmp_path_factory) -> Path:
    """A SAM 2 that predicts a high IoU for every mask; some masks are empty, so that regions stay."""
    folder = save("sam2", tmp_path_factory.mktemp("sure"))
    weights = load_file(folder / "model.safetensors")
    weights["mask_decoder.iou_prediction_head.proj_out.bias"] += 50
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def refined(sure: Path, *command: str) -> Any:
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--refine", f"sam:{sure}"])
    assert result.exit_code == 0, result.output
    return result


def quality_of(obj: dict[str, Any]) -> float:
    return obj.get("mask_quality") or 0


EVERY = ("--model", "embedded", "-p", "a dog", "-p", "tree", "--presence", "0")


def test_ground_and_label_say_what_the_segmenter_predicts(place, sure):
    document = json.loads(refined(sure, "ground", "images/scene.png", *EVERY, "-q", "--json").stdout)
    refined(sure, "label", "images", *EVERY, "-q", "--out", "labels")
    [row] = pq.read_table(next(place.glob("labels/*.parquet"))).to_pylist()
    for objects in (document["objects"], row["objects"]):
        assert max(map(quality_of, objects)) > 0.9


def test_serve_says_what_the_segmenter_predicts(place, sure, monkeypatch):
    applications: list[Any] = []
    monkeypatch.setattr("open_gem.cli.serve.run", lambda application, *_, **__: applications.append(application))
    refined(sure, "serve", "--port", "0", "--model", "embedded")
    with serving(applications.pop()) as address:
        image = httpx.post(f"{address}v1/images", files={"file": Path("images/scene.png").read_bytes()}).json()["id"]
        ask = {"prompts": ["a dog", "tree"], "presence": 0, "mask": "rle"}
        crisp, coarse = (
            httpx.post(f"{address}v1/images/{image}/ground", json=ask | refine, timeout=60).json()["objects"]
            for refine in ({}, {"refine": "none"})
        )
    assert max(map(quality_of, crisp)) > 0.9 and max(map(quality_of, coarse)) == 0
    assert {obj["mask"]["counts"] for obj in crisp} != {obj["mask"]["counts"] for obj in coarse}


def test_evaluate_measures_the_segmenters_masks(place, sure):
    def measured(*refine: str) -> Any:
        command = ["evaluate", "scenes", "--limit", "1", "--method", "gem", "--out", "results", "--json", "-q", *refine]
        result = CliRunner().invoke(app, [*command, "--device", "cpu"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert measured("--refine", f"sam:{sure}") != measured()


def test_a_command_refuses_a_wrong_name_in_one_line(place):
    result = CliRunner().invoke(
        app, ["ground", "images/scene.png", "-p", "a dog", "--model", "embedded", "--refine", "sam:./nowhere"]
    )
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "no such folder: ./nowhere" in result.stderr
