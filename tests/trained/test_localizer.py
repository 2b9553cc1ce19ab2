"""Models trained to localize: what comes out is what transformers' own end results say, on tiny random checkpoints."""

import copy
import json
import pickle
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import sam_checkpoints
import torch
import transformers
from browser import serving
from PIL import Image
from published import check_row
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

import open_gem
from open_gem import Boxes, Localization, TrainedLocalizer, readout
from open_gem.cli import app
from open_gem.data import scenes
from open_gem.errors import (
    ImageError,
    InputError,
    NotFiniteError,
    PromptError,
    UnknownModelError,
    UnsupportedModelError,
    WeightsError,
)
from open_gem.towers.families import LOCALIZING, check_not_trained
from open_gem.trained import boxes as boxes_of_models
from open_gem.trained import clipseg, owl
from open_gem.trained import registry as trained
from open_gem.trained.boxes import paint
from open_gem.trained.registry import adapt_trained
from open_gem.types import Grid, Size
from open_gem.verify.checkers import Captioned, Concept
from open_gem.verify.values import VALUES

SIZES = {"wide": (60, 97), "tall": (83, 41), "square": (64, 64), "large": (250, 333)}
PROMPTS = ["cat", "a red sofa", "dog", "sky", "tree"]


def picture(height: int, width: int) -> Image.Image:
    """Coarse noise, so that patches differ."""
    noise = np.random.default_rng(height * width).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


PICTURES = [picture(*size) for size in SIZES.values()]

# Checkpoints ----------------------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "vocab_size": 514,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
STATISTICS: dict[str, Any] = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}

CONFIGS: dict[str, dict[str, Any]] = {
    "groupvit": {
        "text_config": TEXT,
        "vision_config": {
            **VISION,
            "image_size": 448,
            "patch_size": 32,
            "depths": [1, 1, 1],
            "num_group_tokens": [8, 4, 0],
            "num_output_groups": [8, 4, 4],
        },
        "projection_dim": 12,
        "projection_intermediate_dim": 20,
    },
    "clipseg": {
        "text_config": TEXT,
        "vision_config": {**VISION, "image_size": 64, "patch_size": 16},
        "projection_dim": 12,
        "extract_layers": [0, 1, 2],
        "reduce_dim": 8,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "use_complex_transposed_convolution": True,
    },
    **{
        kind: {
            "text_config": {**TEXT, "max_position_embeddings": 24},
            "vision_config": {**VISION, "image_size": 96, "patch_size": 8},
            "projection_dim": 16,
        }
        for kind in ("owlv2", "owlvit")
    },
}
CONFIGS["grounding-dino"] = {
    "backbone_config": {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 2],
        "window_size": 2,
        "image_size": 64,
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "text_config": {
        "model_type": "bert",
        "vocab_size": 1100,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "d_model": 64,
    "num_queries": 30,
    "encoder_layers": 1,
    "encoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 24,
    "decoder_attention_heads": 2,
    "max_text_len": 24,
}
CONFIGS["sam3"] = sam_checkpoints.SAM3
IMAGES: dict[str, dict[str, Any]] = {
    "groupvit": {"size": {"shortest_edge": 448}, "crop_size": {"height": 448, "width": 448}},
    "clipseg": {"size": {"height": 64, "width": 64}, "resample": 2},
    "owlv2": {"size": {"height": 96, "width": 96}},
    "owlvit": {"size": {"height": 96, "width": 96}},
    "grounding-dino": {"size": {"shortest_edge": 64, "longest_edge": 107}},
    "sam3": {"size": sam_checkpoints.SQUARE3},
}
LIBRARY: dict[str, tuple[Any, Any]] = {
    "groupvit": (transformers.CLIPProcessor, transformers.CLIPImageProcessorPil),
    "clipseg": (transformers.CLIPSegProcessor, transformers.ViTImageProcessorPil),
    "owlv2": (transformers.Owlv2Processor, transformers.Owlv2ImageProcessorPil),
    "owlvit": (transformers.OwlViTProcessor, transformers.OwlViTImageProcessorPil),
    "grounding-dino": (transformers.GroundingDinoProcessor, transformers.GroundingDinoImageProcessorPil),
    "sam3": (transformers.Sam3Processor, transformers.Sam3ImageProcessor),
}


def tokenizer_of(name: str) -> Any:
    """BERT's for Grounding DINO, which knows the numbers of some words by heart; CLIP's for the others."""
    return words_of_bert() if name == "grounding-dino" else tokenizer()


def words_of_bert() -> BertTokenizer:
    """A word for each letter, and [CLS], [SEP], "." and "?" under BERT's own numbers."""
    words = [f"[unused{index}]" for index in range(1100)]
    words[0], words[100], words[101], words[102], words[1012], words[1029] = (
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        ".",
        "?",
    )
    for index, letter in enumerate(ascii_lowercase):
        words[200 + 2 * index], words[201 + 2 * index] = letter, f"##{letter}"
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def tokenizer() -> CLIPTokenizer:
    """CLIP's, without merges: a word for each letter."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


def enliven(model: nn.Module) -> None:
    """Random weights of such size that results depend on everything; as made, much is zero or next to it."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + noise.abs())
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.add_(0.3 * noise)
        elif tensor.ndim == 3 or "embedding." in name:
            tensor.copy_(noise)
        elif tensor.ndim > 1:
            size = next((size for part, size in _SIZES.items() if part in name), 2.0)
            tensor.copy_(size * noise / tensor[0].numel() ** 0.5)


_SIZES = {
    "logit_s": 1.0,
    "bbox_embed": 0.1,
    "box_head.dense2": 0.5,
    "assign.": 4.0,
    "mlp_inter": 6.0,
    "text_model": 6.0,
}  # the others 2


class Kind(NamedTuple):
    """A saved checkpoint, what we load from it, and the library's own model and processor."""

    name: str
    folder: Path
    ours: TrainedLocalizer
    model: Any
    processor: Any

    def library(self, texts: Sequence[str], image: Image.Image) -> Any:
        """The library's inputs for texts and one picture."""
        padding = {} if self.name == "sam3" else {"padding": True}
        return self.processor(text=list(texts), images=image, return_tensors="pt", **padding)


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


def make(name: str, folder: Path) -> Kind:
    row = LOCALIZING[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, row.model)(transformers.AutoConfig.for_model(name, **CONFIGS[name])).eval()
    enliven(model)
    if "owl" in name:
        model.class_head.logit_shift.bias.data.fill_(-2.0)  # else all boxes are probable
    model.save_pretrained(folder)
    tokenizer_of(name).save_pretrained(folder)
    processor_class, image_class = LIBRARY[name]
    images = image_class(**IMAGES[name], **STATISTICS)
    images.save_pretrained(folder)
    processor = processor_class(image_processor=images, tokenizer=tokenizer_of(name))
    return Kind(name, folder, open_gem.load_trained(f"local-dir:{folder}", device="cpu"), model, processor)


@pytest.fixture(params=CONFIGS)
def kind(request, kinds) -> Kind:
    return kinds[request.param]


@pytest.fixture(params=["owlv2", "owlvit"])
def detector(request, kinds) -> Kind:
    return kinds[request.param]


def same(ours: Localization, expected: Localization, tolerance: float = 1e-5) -> None:
    assert (ours.labels, ours.size, ours.logit_scale) == (expected.labels, expected.size, expected.logit_scale)
    torch.testing.assert_close(ours.similarity, expected.similarity, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.scores, expected.scores, rtol=0, atol=tolerance)
    assert (ours.detections is None) == (expected.detections is None)
    for mine, theirs in zip(ours.detections or (), expected.detections or (), strict=True):
        assert torch.equal(mine.xyxy, theirs.xyxy)
        torch.testing.assert_close(mine.scores, theirs.scores, rtol=0, atol=tolerance)


# GroupViT -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def groupvit(kind: Kind, model: Any, texts: Sequence[str], pixels: Tensor) -> Any:
    tokens = kind.processor(text=list(texts), return_tensors="pt", padding=True)
    return model(**tokens, pixel_values=pixels, output_segmentation=True)


def agrees(found: Localization, theirs: Any, size: tuple[int, int]) -> None:
    """What was found, at the size of the library's map, is that map."""
    scale = found.logit_scale
    assert scale is not None
    logits = theirs.segmentation_logits[0]
    assert logits.shape[1:] == size
    maps = torch.stack([readout.upsample(one, Size(*size)) for one in found.similarity])
    torch.testing.assert_close(maps, logits / scale**2, rtol=0, atol=1e-5)
    assert found.scores is not None
    torch.testing.assert_close(found.scores * scale, theirs.logits_per_image[0], rtol=0, atol=1e-4)
    assert found.similarity.std(dim=(1, 2)).min() > 1e-3  # so that a mix-up would show
    assert found.similarity.abs().max() <= 1


def test_groupvit_at_its_own_size_is_the_library_end_to_end(kinds):
    kind, image = kinds["groupvit"], picture(448, 448)
    words = [*PROMPTS, "boat", "bus", "hen", "zebra", "person", "wheel", "it", "quartz", "vex", "jug", "mouse", "fog"]
    texts = [f"a photo of a {word.removeprefix('a ')}." for word in words]
    found = kind.ours(image, words)
    theirs = groupvit(kind, kind.model, texts, kind.library(texts, image)["pixel_values"])
    agrees(found, theirs, (448, 448))
    assert found.similarity.shape == (17, 14, 14)
    best, second = theirs.segmentation_logits[0].topk(2, dim=0).values
    certain = best - second > 1e-3
    assert certain.float().mean() > 0.9
    assert torch.equal(found.segment()[certain], theirs.segmentation_logits[0].argmax(0)[certain])
    assert len(found.segment().unique()) > 1


@pytest.mark.parametrize(("name", "size"), [("wide", (448, 736)), ("tall", (896, 448)), ("large", (448, 608))])
def test_groupvit_sees_all_of_a_picture_of_any_shape(name, size, kinds):
    kind, image = kinds["groupvit"], picture(*SIZES[name])
    model = copy.deepcopy(kind.model)
    embeddings = model.vision_model.embeddings  # the library's forward has no way to ask for this, but its parts do
    embeddings.forward = partial(embeddings.forward, interpolate_pos_encoding=True)
    sides = {"height": size[0], "width": size[1]}
    pixels = kind.processor.image_processor(image, size=sides, do_center_crop=False, return_tensors="pt").pixel_values
    found = kind.ours(image, PROMPTS)
    texts = [f"a photo of a {prompt.removeprefix('a ')}." for prompt in PROMPTS]
    agrees(found, groupvit(kind, model, texts, pixels), size)
    assert found.size == SIZES[name]
    assert kind.ours.model.size_rule == "short:448"


def test_groupvit_needs_a_patch(kinds):
    with pytest.raises(ImageError, match="smaller than one 32x32 patch"):
        kinds["groupvit"].ours(picture(20, 100), "cat")


# CLIPSeg --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clipseg_logits(kind: Kind, prompts: Sequence[str], image: Image.Image) -> Tensor:
    texts = [f"a photo of a {prompt.removeprefix('a ')}." for prompt in prompts]
    inputs = kind.processor(text=texts, images=[image] * len(texts), padding=True, return_tensors="pt")
    return kind.model(**inputs).logits.reshape(len(texts), 64, 64)


@pytest.mark.parametrize("image", PICTURES)
def test_clipseg_is_the_library(image, kinds):
    kind = kinds["clipseg"]
    found = kind.ours(image, PROMPTS)
    logits = clipseg_logits(kind, PROMPTS, image)
    torch.testing.assert_close(found.similarity, logits.sigmoid(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.scores, logits.sigmoid().flatten(1).amax(1), rtol=0, atol=1e-5)
    assert found.similarity.std(dim=(1, 2)).min() > 1e-3
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    assert found.logit_scale is None and found.detections is None
    assert kind.ours.model.size_rule == "square:64"


def test_clipseg_decodes_in_bounded_parts_and_encodes_the_picture_once(kinds, monkeypatch):
    kind = kinds["clipseg"]
    seen: dict[str, list[int]] = {"vision": [], "decoder": []}
    model = kind.ours.model.model
    handles = [
        model.clip.vision_model.register_forward_hook(lambda *_: seen["vision"].append(1)),
        model.decoder.register_forward_hook(lambda _, given, made: seen["decoder"].append(len(made.logits))),
    ]
    expected = kind.ours(PICTURES[0], PROMPTS)
    monkeypatch.setattr(clipseg, "DECODED", 2)
    parts = kind.ours(PICTURES[0], PROMPTS)
    for handle in handles:
        handle.remove()
    same(parts, expected)
    assert seen == {"vision": [1, 1], "decoder": [5, 2, 2, 1]}


# OWLv2 and OWL-ViT ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def detections(kind: Kind, prompts: Sequence[str], image: Image.Image, threshold: float) -> dict[str, Any]:
    """The library's own, to the end: boxes in pixels, scores, and which prompt each is of."""
    texts = [[f"a photo of a {prompt.removeprefix('a ')}" for prompt in prompts]]
    inputs = kind.processor(text=texts, images=image, return_tensors="pt", padding=True)
    [found] = kind.processor.post_process_grounded_object_detection(
        kind.model(**inputs), threshold=threshold, target_sizes=[(image.height, image.width)], text_labels=texts
    )
    return found


def whole(boxes: Tensor, image: Image.Image) -> list[list[int]]:
    """Boxes cut to the picture, to the nearest pixel; a loop that a student could write."""
    limits = [image.width, image.height] * 2
    return [
        [min(max(round(edge), 0), limit) for edge, limit in zip(box, limits, strict=True)] for box in boxes.tolist()
    ]


@pytest.mark.parametrize("image", PICTURES)
def test_a_detector_finds_what_the_library_finds_for_each_prompt(image, detector):
    found = detector.ours(image, PROMPTS)
    assert found.detections is not None and found.scores is not None
    for index, prompt in enumerate(PROMPTS):
        theirs = detections(detector, [prompt], image, threshold=0.0)
        boxes = whole(theirs["boxes"], image)
        inside = [left < right and top < bottom for left, top, right, bottom in boxes]
        order = [i for i in theirs["scores"].argsort(descending=True, stable=True).tolist() if inside[i]][
            : boxes_of_models.BOXES
        ]
        ours = found.detections[index]
        assert ours.xyxy.tolist() == [boxes[i] for i in order]
        torch.testing.assert_close(ours.scores, theirs["scores"][order], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.scores[index], ours.scores[0])
        assert theirs["scores"].min() < 0.5 and theirs["scores"].std() > 0.005  # so that a mistake would show
    assert len({len(boxes.scores) for boxes in found.detections}) == 1
    assert (found.detections[0].scores[:3] - found.detections[1].scores[:3]).abs().max() > 1e-3


def test_a_detector_asked_for_several_finds_what_the_library_finds_for_several(detector, monkeypatch):
    """There a patch shows its best prompt only."""
    monkeypatch.setattr(boxes_of_models, "BOXES", 10_000)
    image, threshold = PICTURES[0], 0.15
    theirs = detections(detector, PROMPTS, image, threshold)
    found = detector.ours(image, PROMPTS).boxes(threshold, "cosine")
    ours = {(index, *box) for index, boxes in enumerate(found) for box in boxes.xyxy.tolist()}
    expected = {
        (label, *box)
        for label, box in zip(theirs["labels"].tolist(), whole(theirs["boxes"], image), strict=True)
        if box[0] < box[2] and box[1] < box[3]
    }
    assert len(expected) > 20 and expected <= ours


def test_a_detector_keeps_the_best_boxes_only(detector):
    found = detector.ours(PICTURES[2], PROMPTS)
    assert [boxes.xyxy.shape for boxes in found.detections] == [(100, 4)] * 5
    for boxes in found.detections:
        assert torch.equal(boxes.scores, boxes.scores.sort(descending=True).values)


@pytest.mark.parametrize("image", PICTURES)
def test_a_detectors_map_is_made_of_its_boxes(image, detector):
    found = detector.ours(image, ["cat", "dog"])
    height, width = found.size
    rows, cols = found.similarity.shape[1:]
    assert max(rows, cols) == 12 and abs(rows / cols - height / width) < 1 / 12 * max(1, height / width)
    for boxes, ours in zip(found.detections, found.similarity, strict=True):
        expected = torch.zeros(rows, cols)
        for (left, top, right, bottom), score in zip(boxes.xyxy.tolist(), boxes.scores, strict=True):
            row, col = round(top * rows / height), round(left * cols / width)
            row, col = min(row, rows - 1), min(col, cols - 1)
            stop, end = max(round(bottom * rows / height), row + 1), max(round(right * cols / width), col + 1)
            expected[row:stop, col:end] = torch.maximum(expected[row:stop, col:end], score)
        assert torch.equal(ours, expected)
        assert ours.max() == boxes.scores[0]


def test_boxes_are_cut_to_the_picture_and_rounded_and_those_that_hold_nothing_of_it_are_left_out():
    boxes = [[-3.2, -0.4, 4.4, 7.6], [3.5, 2.6, 30.0, 9.9], [9.6, 0.0, 12.0, 5.0], [2.1, 1.0, 2.4, 5.0]]
    xyxy, inside = boxes_of_models.whole_pixels(torch.tensor(boxes), Size(6, 9))
    assert xyxy[inside].tolist() == [[0, 0, 4, 6], [4, 3, 9, 6]]
    assert inside.tolist() == [True, True, False, False]


def test_a_small_box_takes_a_cell_wherever_it_is():
    size, grid = Size(100, 200), Grid(5, 10)
    for left, top in [(0, 0), (199, 99), (37, 52), (195, 3)]:
        boxes = Boxes(torch.tensor([[left, top, left + 1, top + 1]]), torch.tensor([0.7]))
        painted = paint(boxes, size, grid)
        assert painted.count_nonzero() == 1 and painted.max() == pytest.approx(0.7)
    assert paint(Boxes(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0)), size, grid).tolist() == [[0.0] * 10] * 5
    everything = Boxes(torch.tensor([[0, 0, 200, 100]]), torch.tensor([0.2]))
    assert (paint(everything, size, grid) == torch.tensor(0.2)).all()


def test_a_picture_without_a_box_inside(kinds, monkeypatch):
    monkeypatch.setattr(owl, "whole_pixels", lambda boxes, size: (boxes.long(), torch.zeros(len(boxes)).bool()))
    found = kinds["owlv2"].ours(PICTURES[0], ["cat", "dog"])
    assert found.scores.tolist() == [0, 0] and found.similarity.count_nonzero() == 0
    assert [boxes.xyxy.shape for boxes in found.boxes()] == [(0, 4)] * 2
    assert found.points().shape == (2, 2)
    assert found.segment(0.1).unique().tolist() == [-1]


def test_size_rules_of_detectors(kinds):
    assert kinds["owlv2"].ours.model.size_rule == "pad:96"
    assert kinds["owlvit"].ours.model.size_rule == "square:96"


# Grounding DINO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", PICTURES)
def test_grounding_dino_finds_what_the_library_finds_for_each_caption(image, kinds):
    kind = kinds["grounding-dino"]
    found = kind.ours(image, PROMPTS)
    assert found.detections is not None and found.scores is not None
    for index, prompt in enumerate(PROMPTS):
        inputs = kind.processor(images=image, text=f"{prompt.removeprefix('a ')}.", return_tensors="pt")
        with torch.no_grad():
            answer = kind.model(**inputs)
        [theirs] = kind.processor.post_process_grounded_object_detection(
            answer, threshold=0.0, target_sizes=[(image.height, image.width)]
        )
        boxes = whole(theirs["boxes"], image)
        inside = [left < right and top < bottom for left, top, right, bottom in boxes]
        order = [i for i in theirs["scores"].argsort(descending=True, stable=True).tolist() if inside[i]]
        ours = found.detections[index]
        assert sorted(ours.xyxy.tolist()) == sorted(boxes[i] for i in order)
        torch.testing.assert_close(ours.scores, theirs["scores"][order], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.scores[index], ours.scores[0])
        assert theirs["scores"].std() > 1e-4 and len(order) > 5  # so that a mistake would show
    assert kind.ours.model.size_rule == "short:64, at most 107"


def test_grounding_dino_computes_the_features_of_an_image_once(kinds):
    kind, seen = kinds["grounding-dino"], []
    backbone = kind.ours.model.model.model.backbone
    handle = backbone.register_forward_hook(lambda *_: seen.append(1))
    kind.ours(PICTURES[0], PROMPTS)
    handle.remove()
    assert len(seen) == 1
    assert kind.ours.model.model.model.backbone is backbone


# SAM 3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", PICTURES)
def test_sam_3_is_the_library(image, kinds):
    """By the library's own post-processing: of semantic maps, and of instances, whose scores have presence in them."""
    kind = kinds["sam3"]
    found = kind.ours(image, PROMPTS)
    assert found.scores is not None and found.detections is None
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            answer = kind.model(**kind.processor(images=image, text=prompt, return_tensors="pt"))
        [semantic] = kind.processor.image_processor.post_process_semantic_segmentation(
            answer, return_segmentation_scores=True
        )
        [boxes] = kind.processor.post_process_object_detection(answer, threshold=0.0)
        presence = answer.presence_logits.sigmoid()[0, 0]
        instances = (answer.pred_masks[0].sigmoid() * boxes["scores"][:, None, None]).amax(0)
        expected = torch.maximum(semantic.segmentation_scores[0] * presence, instances)
        torch.testing.assert_close(found.similarity[index], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.scores[index], presence, rtol=0, atol=1e-6)
        assert expected.std() > 1e-3
    assert found.similarity.shape == (5, 32, 32)
    assert (found.similarity[0] - found.similarity[2]).abs().max() > 1e-3
    assert kind.ours.model.size_rule == "square:112"


def test_sam_3_encodes_an_image_once(kinds):
    kind, seen = kinds["sam3"], []
    handle = kind.ours.model.model.vision_encoder.register_forward_hook(lambda *_: seen.append(1))
    kind.ours(PICTURES[0], PROMPTS)
    handle.remove()
    assert len(seen) == 1


def test_a_checkpoint_of_sam_3_for_video_is_its_detector(tmp_path):
    folder = sam_checkpoints.save("sam3_video", tmp_path)
    tokenizer().save_pretrained(folder)
    whole_model = sam_checkpoints.model("sam3_video").state_dict()
    for name, weight in open_gem.load_trained(str(folder), device="cpu").model.model.state_dict().items():
        assert torch.equal(weight, whole_model[f"detector_model.{name}"]), name


@pytest.mark.parametrize("name", ["sam3", "grounding-dino"])
def test_models_that_see_all_words_of_a_prompt_take_one_template(name, kinds):
    with pytest.raises(PromptError, match=r"7 templates given, .* expected one template"):
        TrainedLocalizer(kinds[name].ours.model, "imagenet-7")


@pytest.mark.parametrize(
    "row", [row for row in VALUES if isinstance(row, Captioned | Concept)], ids=lambda row: row.compared
)
def test_a_published_row_is_checked_against_what_the_library_gives(row, kinds, tmp_path):
    kind = kinds["sam3" if isinstance(row, Concept) else "grounding-dino"]

    def library(image: Image.Image) -> Tensor:
        text = row.concept if isinstance(row, Concept) else row.caption
        with torch.no_grad():
            answer = kind.model(**kind.processor(images=image, text=text, return_tensors="pt"))
        if isinstance(row, Captioned):
            return (answer.pred_boxes if row.output == "boxes" else answer.logits)[0, :3, :3].flatten()
        highest = answer.pred_logits[0].topk(3)
        if row.output == "scores":
            return highest.values.sigmoid()
        return answer.pred_masks[0, highest.indices[0], :3, :3].flatten()

    check_row(row, kind.folder, PICTURES[0], tmp_path, library)


# Localizations with predicted boxes, and with probabilities -----------------------------------------------------------


def predicted() -> Localization:
    boxes = [
        Boxes(torch.tensor([[0, 0, 5, 3], [1, 1, 2, 2], [4, 0, 8, 6]]), torch.tensor([0.8, 0.5, 0.3])),
        Boxes(torch.tensor([[2, 2, 8, 5]]), torch.tensor([0.04])),
        Boxes(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0)),
    ]
    maps = torch.stack([paint(some, Size(6, 8), Grid(6, 8)) for some in boxes])
    return Localization(("cat", "dog", "fog"), maps, Size(6, 8), torch.tensor([0.8, 0.04, 0]), None, tuple(boxes))


@pytest.mark.parametrize(
    ("threshold", "scale", "instances", "counts"),
    [
        (0.5, "minmax", "component", [2, 1, 0]),
        (0.3, "minmax", "component", [3, 1, 0]),
        (0.7, "minmax", "component", [1, 1, 0]),
        (0.2, "cosine", "component", [3, 0, 0]),
        (0.4, "cosine", "component", [2, 0, 0]),
        (0.0, "cosine", "component", [3, 1, 0]),
        (0.0, "cosine", "label", [1, 1, 0]),
        (0.9, "cosine", "label", [0, 0, 0]),
    ],
)
def test_predicted_boxes_above_a_threshold(threshold, scale, instances, counts):
    found = predicted()
    boxes = found.boxes(threshold, scale, instances=instances)
    assert [len(some.scores) for some in boxes] == counts
    for some, all_of_them in zip(boxes, found.detections or (), strict=True):
        assert torch.equal(some.xyxy, all_of_them.xyxy[: len(some.xyxy)])
        assert torch.equal(some.scores, all_of_them.scores[: len(some.scores)])


def test_predicted_boxes_are_asked_for_like_others():
    with pytest.raises(InputError, match="instances is 'pixel'"):
        predicted().boxes(instances="pixel")
    with pytest.raises(InputError, match="scale is 'raw'"):
        predicted().boxes(scale="raw")


def test_the_point_is_the_middle_of_the_best_box():
    assert predicted().points().tolist() == [[2, 1], [4, 3], [0, 0]]


def test_probabilities_need_no_softmax():
    maps = torch.tensor([[[0.9, 0.2]], [[0.3, 0.4]]])
    found = Localization(("cat", "dog"), maps, Size(1, 2), logit_scale=None)
    assert found.segment().tolist() == [[0, 1]]
    assert found.segment(0.5).tolist() == [[0, -1]]
    assert found.segment(0.4).tolist() == [[0, 1]]


# Any of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", PICTURES)
def test_many_prompts_are_each_one_alone(image, kind):
    together = kind.ours(image, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        alone = kind.ours(image, prompt)
        boxes = together.detections and together.detections[index : index + 1]
        part = slice(index, index + 1)
        same(
            alone,
            Localization(
                (prompt,), together.similarity[part], together.size, together.scores[part], together.logit_scale, boxes
            ),
        )


def test_a_list_of_pictures_is_each_one_alone(kind):
    ragged = [["cat"], ["dog", "a cat"], "owl", ["cat", "cat", "ant"]]
    ragged = [[some] if isinstance(some, str) else some for some in ragged]
    for prompts, by_image in [(["cat", "dog"], [["cat", "dog"]] * 4), (ragged, ragged), ("cat", ["cat"] * 4)]:
        together = kind.ours(PICTURES, prompts)
        assert isinstance(together, list)
        for ours, image, own in zip(together, PICTURES, by_image, strict=True):
            same(ours, kind.ours(image, own))
            assert ours.size == (image.height, image.width)


def test_results_have_the_sizes_of_the_picture(kind):
    found = kind.ours(np.asarray(PICTURES[0]), PROMPTS)
    assert found.labels == tuple(PROMPTS)
    assert found.heatmaps().stack().shape == found.masks().stack().shape == (5, 60, 97)
    assert found.segment(0.5).shape == (60, 97)
    assert found.scores.shape == (5,) and found.similarity.dtype == torch.float32
    limits = torch.tensor([97, 60])
    assert (found.points() >= 0).all() and (found.points() < limits).all()
    for boxes in found.boxes():
        assert (boxes.xyxy[:, :2] >= 0).all() and (boxes.xyxy[:, 2:] <= limits).all()
        assert (boxes.xyxy[:, :2] < boxes.xyxy[:, 2:]).all() and boxes.xyxy.dtype == torch.int64


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3), (2, 2), (1, 3)])
def test_pictures_of_any_shape_are_seen_as_pictures(size, kinds):
    """transformers guesses where the channels are: three rows look to it like channels."""
    image = picture(*size)
    for name in ("clipseg", "owlv2", "owlvit"):
        model = kinds[name].ours.model
        array = np.asarray(image)
        tripled = np.repeat(np.repeat(array, 8, 0), 8, 1)  # the same picture, unmistakable
        large = model.prepare(Image.fromarray(tripled))
        assert model.prepare(image).shape == large.shape
        torch.testing.assert_close(model.prepare(image).mean((1, 2)), large.mean((1, 2)), rtol=0, atol=0.25)
        assert kinds[name].ours(image, "cat").size == size


def test_texts_are_encoded_once_and_anew_when_the_weights_change(kind):
    model = copy.deepcopy(kind.ours.model.model)
    localizer, calls = TrainedLocalizer(adapt_trained(model, kind.processor)), []
    encode = localizer.model.text.encode
    localizer.model.text.encode = lambda texts: calls.append(texts) or encode(texts)
    filled = ("cat", "dog", "a dog") if localizer.model.template == "{}" else ("cat", "dog")
    before = localizer(PICTURES[:2], [["cat", "dog"], ["a dog", "cat"]])
    localizer(PICTURES[0], "cat")
    assert [text for texts in calls for text in texts] == [
        localizer.model.template.replace("{}", prompt) for prompt in filled
    ]
    encoded = len(calls)
    with torch.no_grad():
        for weight in text_part(localizer.model.text.model).parameters():
            weight.add_(0.5 * torch.rand_like(weight))
    after = localizer(PICTURES[0], ["cat", "dog"])
    assert len(calls) == encoded + 1
    assert (after.similarity - before[0].similarity).abs().max() > 1e-4


def text_part(model: Any) -> nn.Module:
    """What encodes texts in a model of the library."""
    names = ("text_model", "text_encoder")
    return next((getattr(model, name) for name in names if hasattr(model, name)), None) or model.model.text_backbone


def test_the_template_may_be_another(kind):
    model = kind.ours.model
    bare = TrainedLocalizer(model, "{}")
    same(bare(PICTURES[0], model.template.replace("{}", "cat")), renamed(kind.ours(PICTURES[0], "cat"), model.template))
    if model.template != "{}":
        assert (bare(PICTURES[0], "cat").similarity - kind.ours(PICTURES[0], "cat").similarity).abs().max() > 1e-4


def renamed(found: Localization, template: str) -> Localization:
    prompts = tuple(template.replace("{}", prompt) for prompt in found.labels)
    return Localization(prompts, found.similarity, found.size, found.scores, found.logit_scale, found.detections)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(kind):
    long = "cat on a mat with a hat and a bat and much more beside"
    with pytest.warns(UserWarning, match=r"longer than the model's context; cut off: .*beside"):
        found = TrainedLocalizer(kind.ours.model)(PICTURES[0], long)
    assert found.similarity.isfinite().all()


def test_the_model_is_untouched(kind):
    model = kind.ours.model.model
    texts = [kind.ours.model.template.replace("{}", "cat")]
    inputs = kind.library(texts, picture(448, 448))
    with torch.no_grad():
        before, weights = model(**inputs), copy.deepcopy(model.state_dict())
        kind.ours(PICTURES, PROMPTS)
        after = model(**inputs)
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    named = {"groupvit": "logits_per_image", "sam3": "pred_logits"}.get(kind.name, "logits")
    assert torch.equal(before[named], after[named])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(kind, dtype):
    half = open_gem.load_trained(f"local-dir:{kind.folder}", device="cpu", dtype=dtype)
    assert str(half.model.dtype) == f"torch.{dtype}"
    ours, full = half(PICTURES[0], PROMPTS), kind.ours(PICTURES[0], PROMPTS)
    assert ours.similarity.dtype == torch.float32 and ours.similarity.isfinite().all()
    assert (ours.scores - full.scores).abs().max() < 0.2
    assert ours.logit_scale == full.logit_scale  # kept in float32


def test_an_adapted_model_is_the_loaded_one(kind):
    adapted = TrainedLocalizer(adapt_trained(kind.model, kind.processor))
    same(adapted(PICTURES[0], PROMPTS), kind.ours(PICTURES[0], PROMPTS), tolerance=1e-6)


def test_a_folder_needs_no_prefix(kind):
    assert open_gem.load_trained(str(kind.folder), device="cpu").model.name == f"local-dir:{kind.folder}"


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "prompts", "error", "words"),
    [
        (PICTURES[0], [], PromptError, "no prompt given"),
        (PICTURES[0], ["cat", " "], PromptError, "prompt 1 is empty"),
        (PICTURES, [["cat"], ["dog"]], PromptError, "2 lists of prompts for 4 images"),
        ("nowhere.jpg", "cat", ImageError, "does not exist"),
        ([PICTURES[0], "nowhere.jpg"], "cat", ImageError, "image 1: 'nowhere.jpg' does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(images, prompts, error, words, kind, monkeypatch):
    localizer = TrainedLocalizer(kind.ours.model)
    monkeypatch.setattr(type(kind.ours.model), "ground", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr(type(kind.ours.model), "encode_text", lambda *_: pytest.fail("computed"))
    with pytest.raises(error, match=words) as caught:
        localizer(images, prompts)
    assert "\n" not in str(caught.value)


def test_templates_are_checked_before_anything_is_loaded(kind):
    with pytest.raises(PromptError, match="template"):
        TrainedLocalizer(kind.ours.model, "a photo")
    with pytest.raises(PromptError, match="template"):
        open_gem.load_trained("local-dir:nowhere", template="a photo")


@pytest.mark.parametrize(
    ("name", "settings", "error", "words"),
    [
        ("local-dir:nowhere", {}, WeightsError, "no such folder"),
        ("not a name", {}, UnknownModelError, "unknown model"),
        ("local-dir:nowhere", {"device": "abacus"}, InputError, "cannot use device"),
        ("local-dir:nowhere", {"dtype": "int8"}, InputError, "cannot compute in"),
    ],
)
def test_what_cannot_be_loaded(name, settings, error, words):
    with pytest.raises(error, match=words) as caught:
        open_gem.load_trained(name, **settings)
    assert "\n" not in str(caught.value)


def test_other_types_are_refused_with_those_that_there_are(tmp_path):
    transformers.CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        open_gem.load_trained(str(tmp_path), device="cpu")
    for word in ("(clip)", "groupvit, clipseg, owlv2, owlvit", f"open_gem.load('local-dir:{tmp_path}')"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_that_lack_a_part_are_refused(kinds):
    clip = kinds["clipseg"]
    with pytest.raises(UnsupportedModelError, match="cannot read CLIPSegModel: expected GroupViTModel, CLIPSegForImag"):
        adapt_trained(clip.model.clip, clip.processor)


def test_models_in_training_mode_are_refused(kind):
    with pytest.raises(InputError, match=r"call model\.eval\(\)"):
        adapt_trained(copy.deepcopy(kind.model).train(), kind.processor)


def test_prepare_encode_and_locate_are_the_call(kind):
    """As of a `Localizer`, so that labelling, evaluation and serving need not know which it is."""
    localizer, image = kind.ours, PICTURES[0]
    prepared = localizer.prepare(image)
    assert prepared.original == SIZES["wide"]
    called = localizer(image, PROMPTS)
    [listed] = localizer.encode([prepared])
    [(label, labelled)] = localizer.encode(image, {"gem": "gem"}).items()
    assert label == "as trained"  # there is one way only
    for encoded in (localizer.encode(image), localizer.encode(prepared), listed, labelled, listed.to("cpu")):
        ours = localizer.locate(encoded, PROMPTS)
        assert (ours.labels, ours.size) == (called.labels, called.size)
        torch.testing.assert_close(ours.similarity, called.similarity)
        torch.testing.assert_close(ours.scores, called.scores)
    assert localizer.configured(method="clip", size="short:32") is localizer
    assert localizer.layers == 0


def test_backbones_are_told_apart():
    check_not_trained("openai/clip-vit-base-patch16", "clip")
    with pytest.raises(UnsupportedModelError, match=r"use open_gem\.load_trained\('nvidia/groupvit-gcc-yfcc'\)"):
        check_not_trained("nvidia/groupvit-gcc-yfcc", "groupvit")


def test_without_transformers_there_is_advice(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UnsupportedModelError, match=r"pip install \"open_gem\[transformers\]\""):
        trained.load_trained("nvidia/groupvit-gcc-yfcc", device="cpu")


# On the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    PICTURES[0].save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ground(kind: Kind, *arguments: str) -> Any:
    return CliRunner().invoke(
        app, ["ground", "cat.png", "-p", "cat", "-p", "sky", "--model", str(kind.folder), *arguments]
    )


def test_the_command_grounds_with_it(kind, place):
    result = ground(kind, "--json", "-q", "--save", "overlay,heatmap,mask,segmentation,npz,json", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["model"] == f"local-dir:{kind.folder}"
    assert (document["dtype"], document["size_rule"]) == ("bfloat16", kind.ours.model.size_rule)
    assert document["template"] == kind.ours.model.template
    assert "method" not in document
    found = kind.ours("cat.png", ["cat", "sky"])
    assert [entry["score"] for entry in document["labels"]] == pytest.approx(found.scores.tolist(), abs=0.05)
    assert len(list(place.glob("open_gem_out/*"))) == 9  # three pictures a phrase; one segmentation, npz and json


@pytest.mark.parametrize("option", [("--method", "gem"), ("--depth", "2"), ("--image-size", "short:64")])
def test_options_that_it_does_not_have_are_refused(option, kinds, place):
    result = ground(kinds["groupvit"], *option)
    assert result.exit_code == 2
    assert "was trained to localize" in result.stderr and f"no {option[0]}" in result.stderr
    assert result.stderr.count("\n") == 1 and not (place / "open_gem_out").exists()


def test_labelling_refuses_it_with_what_can_be_done(kinds, place):
    command = ["label", ".", "-p", "cat", "--out", "labels", "--model", str(kinds["owlv2"].folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert "load_trained" in result.stderr and result.stderr.count("\n") == 1
    assert not (place / "labels").exists()


def test_the_server_answers_what_it_says(kind, place, monkeypatch):
    served: list[Any] = []
    monkeypatch.setattr("open_gem.cli.serve.run", lambda application, *_, **__: served.append(application))
    model = ["serve", "--port", "0", "--model", str(kind.folder), "--device", "cpu"]
    result = CliRunner().invoke(app, model)
    assert result.exit_code == 0, result.output
    form = {"prompts": ["cat", "sky"], "absent": "none", "min_area": 0}
    with serving(served.pop()) as address:
        answer = httpx.post(f"{address}v1/ground", files={"file": Path("cat.png").read_bytes()}, data=form).json()
    expected = kind.ours("cat.png", ["cat", "sky"]).objects(absent="none", min_area=0)
    assert answer["method"] == "as trained"
    assert [(obj["label"], obj["box"]) for obj in answer["objects"]] == [(obj.label, list(obj.box)) for obj in expected]
    for option in (["--refine", "pamr"], ["--method", "gem"], ["--window", "32"], ["--remove-redundancy"]):
        result = CliRunner().invoke(app, [*model, *option])
        assert result.exit_code == 2 and f"no {option[0]}" in result.stderr, result.output


def test_it_is_measured_as_methods_are(kind, place):
    """By the same questions and counts; what it answers is what it answers when it is called."""
    arguments = ["evaluate", "scenes", "--limit", "2", "--model", str(kind.folder), "--json", "-q"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    assert (line["method"], line["images"]) == ("as trained", 2)
    data, hits, objects = scenes(range(2)), 0, 0
    for sample in data:
        found = kind.ours(sample.read_image(), sample.scene.names)  # pyright: ignore[reportAttributeAccessIssue]
        for (x, y), mask in zip(found.points().tolist(), sample.scene.masks, strict=True):  # pyright: ignore[reportAttributeAccessIssue]
            hits, objects = hits + int(mask[y, x]), objects + 1
    assert line["scores"]["pointing_game"]["value"] == pytest.approx(hits / objects)


# Torch's settings, copies, numbers that are none ----------------------------------------------------------------------


@pytest.fixture
def wide() -> Image.Image:
    return picture(60, 97)


def test_torchs_defaults_decide_no_answer(kind, wide):
    expected = kind.ours(wide, ["cat", "bus"])
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        found = TrainedLocalizer(kind.ours.model)(wide, ["cat", "bus"])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    same(found, expected)
    assert found.similarity.dtype == torch.float32 and found.points().device.type == "cpu"


def test_results_under_autocast_are_float32(kind, wide):
    with torch.autocast("cpu", torch.bfloat16):
        found = kind.ours(wide, ["cat", "bus"])
    assert found.scores is not None
    assert found.similarity.dtype == found.scores.dtype == torch.float32
    same(kind.ours(wide, ["cat", "bus"]), TrainedLocalizer(kind.ours.model)(wide, ["cat", "bus"]))


def test_they_can_be_copied_and_sent(kind, wide):
    expected = kind.ours(wide, ["cat"])
    same(copy.deepcopy(kind.ours)(wide, ["cat"]), expected)
    # On models that it asked for hidden states, transformers leaves local functions.
    if kind.name not in ("clipseg", "grounding-dino"):
        same(pickle.loads(pickle.dumps(kind.ours))(wide, ["cat"]), expected)


def test_damaged_weights_are_an_error_that_names_them(kind, wide):
    broken = copy.deepcopy(kind.ours)
    name, weight = next((n, w) for n, w in broken.model.model.named_parameters() if "vision" in n and w.ndim == 4)
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(
        NotFiniteError, match=f"maps that are infinite or not a number, .* damaged \\({re.escape(name)}"
    ):
        broken(wide, ["cat"])


def test_a_model_without_numbers_is_refused(kind):
    with pytest.raises(InputError, match="'meta'"):
        adapt_trained(copy.deepcopy(kind.model).to("meta"), kind.processor)
