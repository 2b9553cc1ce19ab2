"""Maps pooled over the regions of an image, by tiny random models and by hand."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sam_checkpoints import enliven, model, save

import open_gem
from open_gem import Localization
from open_gem.errors import InputError, UnsupportedModelError
from open_gem.refine.regions import Regions, pool
from open_gem.types import Size

SIZE = Size(60, 97)


def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((SIZE.width, SIZE.height), Image.Resampling.BILINEAR)


@pytest.fixture(scope="session")
def mask2former(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mask2former")
    backbone = transformers.AutoConfig.for_model(
        "swin",
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=2,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.AutoConfig.for_model(
        "mask2former",
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=8,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random = transformers.Mask2FormerForUniversalSegmentation(config).eval()  # pyright: ignore[reportArgumentType]
    enliven(random)
    random.class_predictor.bias.data[-1] = -20.0  # every query is sure of an object
    random.class_predictor.weight.data.mul_(20)
    random.save_pretrained(folder)
    settings = {"image_processor_type": "Mask2FormerImageProcessor", "size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def sam(tmp_path_factory) -> Path:
    """Its masks have edges: those of random weights hardly do, and the pipeline leaves out what has none."""
    folder = tmp_path_factory.mktemp("sam")
    sharp = copy.deepcopy(model("sam"))
    for head in sharp.mask_decoder.output_hypernetworks_mlps:
        for weight in head.proj_out.parameters():
            weight.data.mul_(1000)
    save("sam", folder)
    sharp.save_pretrained(folder)
    return folder


def test_a_region_has_the_mean_of_its_pixels_and_others_stay():
    values = torch.tensor([[1.0, 3.0, 8.0], [5.0, -1.0, 7.0]])
    regions = torch.tensor([[0, 0, -1], [0, 4, 4]])
    assert pool(values, regions).tolist() == [[3.0, 3.0, 8.0], [3.0, 3.0, 3.0]]


def test_pooled_cosines_are_those_of_pooled_features():
    """Up to a factor that all labels share."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(6, 7, 5, generator=generator), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(3, 5, generator=generator), dim=-1)
    regions = torch.zeros(6, 7, dtype=torch.int64)
    pooled = torch.stack([pool(features @ text, regions)[0, 0] for text in texts])
    mean = features.mean(dim=(0, 1))
    torch.testing.assert_close(pooled, texts @ mean / mean.norm() * mean.norm())


def test_segments_of_a_mask2former_are_the_librarys(mask2former):
    regions = Regions(str(mask2former)).regions(picture(), torch.device("cpu"))
    network = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    processor = transformers.Mask2FormerImageProcessor.from_pretrained(mask2former)
    with torch.no_grad():
        answer = network(**processor(images=picture(), return_tensors="pt"))
    [theirs] = processor.post_process_panoptic_segmentation(answer, label_ids_to_fuse=set(), target_sizes=[SIZE])
    assert regions.shape == SIZE and regions.max() >= 1
    assert torch.equal(regions, theirs["segmentation"].long() - 1)


def test_masks_of_a_segment_anything_model_are_the_pipelines(sam):
    regions = Regions(str(sam), points=4).regions(picture(), torch.device("cpu"))
    network = transformers.SamModel.from_pretrained(sam).eval()
    processor = transformers.SamImageProcessorPil.from_pretrained(sam)
    drawn = transformers.pipeline("mask-generation", model=network, image_processor=processor, device="cpu")
    masks = [torch.as_tensor(mask) for mask in drawn(picture(), points_per_crop=4, points_per_batch=64)["masks"]]
    assert len(masks) > 0
    covered = torch.stack(masks).any(dim=0)
    assert torch.equal(regions >= 0, covered)
    smallest = min(masks, key=lambda mask: int(mask.sum()))
    assert len(regions[smallest].unique()) == 1  # on top of the others


def test_maps_are_even_in_regions_and_the_image_is_segmented_once(mask2former, monkeypatch):
    result = Localization(("cat", "dog"), torch.rand(2, 6, 10), SIZE)
    refined = Regions(str(mask2former)).refine(picture(), result)
    regions, calls = Regions(str(mask2former)).regions(picture(), torch.device("cpu")), []
    segment = Regions.regions
    monkeypatch.setattr(Regions, "regions", lambda *given: calls.append(1) or segment(*given))
    maps = refined.heatmaps("cosine").stack()
    for number in regions.unique().tolist():
        own = maps[:, regions == number]
        if number >= 0:
            assert (own.amax(dim=1) - own.amin(dim=1)).max() < 1e-6
    assert calls == [1]
    assert torch.equal(pickle.loads(pickle.dumps(refined)).heatmaps("cosine").stack(), maps)


def test_it_is_found_by_name(mask2former):
    localizer = open_gem.load("embedded", device="cpu").acknowledge()
    named = localizer.configured(refinement=f"regions:{mask2former}")
    assert named.refinement == Regions(str(mask2former))
    assert named(picture(), ["a cat", "a dog"]).segment(0.5).shape == SIZE


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(InputError, match="points is 0, expected a whole number, 1 or more"):
        Regions("a/b", points=0)
    with pytest.raises(InputError, match="checkpoint is None, expected a repository or a folder"):
        Regions(None)  # pyright: ignore[reportArgumentType]
    transformers.CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"\(clip\) draws no regions .* sam, sam2, .* mask2former"):
        Regions(str(tmp_path)).load(torch.device("cpu"))
