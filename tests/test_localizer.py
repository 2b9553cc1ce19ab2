"""The front door on a tiny open_clip model with seeded random weights and the real tokenizer."""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import open_gem
from open_gem import METHODS, Encoded, Localization, Localizer, Maps, Method, readout, run
from open_gem.errors import ImageError, InputError, MethodError, PromptError
from open_gem.locate import Prepared, by_shape
from open_gem.method.table import SelfSelf
from open_gem.towers.loading import Recommended
from open_gem.towers.open_clip import adapt
from open_gem.types import Size

ODD = Size(37, 53)


def tiny_clip() -> open_clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return open_clip.CLIP(
            embed_dim=24,
            vision_cfg=open_clip.CLIPVisionCfg(image_size=32, layers=6, width=32, head_width=8, patch_size=8),
            text_cfg=open_clip.CLIPTextCfg(context_length=20, vocab_size=49408, width=16, heads=2, layers=1),
        ).eval()


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    return tiny_clip()


@pytest.fixture(scope="module")
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=20)


@pytest.fixture(scope="module")
def localizer(model, tokenizer) -> Localizer:
    return open_gem.adapt(model, tokenizer, size="short:32")


class Spied(NamedTuple):
    """A localizer, and what its backbone was asked to compute."""

    localizer: Localizer
    embed: Mock
    encode_text: Mock

    @property
    def batches(self) -> list[int]:
        """How many images were encoded each time."""
        return [len(call.args[0]) for call in self.embed.call_args_list]


@pytest.fixture
def spied(model, tokenizer, monkeypatch) -> Spied:
    backbone = adapt(model, tokenizer)
    embed, encode_text = Mock(wraps=backbone.vision.embed), Mock(wraps=backbone.encode_text)
    monkeypatch.setattr(backbone.vision, "embed", embed)
    monkeypatch.setattr(backbone, "encode_text", encode_text)
    return Spied(Localizer(backbone, size="short:32"), embed, encode_text)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same(ours: Localization, expected: Localization, tolerance: float = 1e-6) -> None:
    assert (ours.labels, ours.size, ours.logit_scale) == (expected.labels, expected.size, expected.logit_scale)
    torch.testing.assert_close(ours.similarity, expected.similarity, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.scores, expected.scores, rtol=0, atol=tolerance)


def batch_of(localizer: Localizer, *images: np.ndarray) -> Tensor:
    """The pixels `(b, 3, y, x)` of images that come to the same size."""
    return torch.stack([pixels for image in images if (pixels := localizer.prepare(image).pixels) is not None])


# One picture and many -------------------------------------------------------------------------------------------------

PICTURES = [picture(*size) for size in (ODD, (40, 40), ODD, (64, 33), (40, 41))]
PICTURES[2] = 255 - PICTURES[0]  # of the same size, but another picture
RAGGED = [["cat"], ["dog", "a cat", "owl"], ["owl", "cat"], ["ant"], ["cat", "cat"]]


def test_a_list_of_pictures_of_mixed_sizes_is_each_one_alone(localizer):
    together = localizer(PICTURES, ["cat", "an owl", "dog"])
    for ours, image in zip(together, PICTURES, strict=True):
        same(ours, localizer(image, ["cat", "an owl", "dog"]))
        assert ours.size == image.shape[:2]
    assert (together[0].similarity - together[2].similarity).abs().max() > 1e-2  # so that a mix-up would show


@pytest.mark.parametrize("kind", [list, tuple])
def test_each_picture_may_have_prompts_of_its_own(kind, localizer):
    together = localizer(kind(PICTURES), kind(kind(some) for some in RAGGED))
    for ours, image, prompts in zip(together, PICTURES, RAGGED, strict=True):
        assert ours.labels == tuple(prompts)
        same(ours, localizer(image, prompts))


def test_pictures_of_one_size_are_encoded_together_and_texts_once(spied):
    spied.localizer(PICTURES, RAGGED)
    assert sorted(spied.batches) == [1, 2, 2]  # 32×48 twice, 32×32 twice, 64×32
    texts = spied.encode_text.call_count
    spied.localizer(PICTURES, RAGGED)
    assert (spied.embed.call_count, spied.encode_text.call_count) == (6, texts)


def test_one_prompt_may_be_a_string(localizer):
    alone = localizer(PICTURES[0], "a cat")
    assert alone.labels == ("a cat",)
    same(alone, localizer(PICTURES[0], ["a cat"]))
    same(alone, localizer([PICTURES[0]], "a cat")[0])


def test_similarity_and_scores_are_the_cosines_of_patches_and_texts(localizer, model, tokenizer):
    found = localizer(PICTURES[1], ["cat", "a dog"])
    pixels = batch_of(localizer, PICTURES[1])
    assert pixels.shape == (1, 3, 32, 32)
    gem = run(localizer.backbone.vision, pixels, {"gem": METHODS["gem"]})["gem"]
    with torch.no_grad():
        text = model.encode_text(tokenizer(["a photo of a cat.", "a photo of a dog."]), normalize=True)
        image = model.encode_image(pixels, normalize=True)
    patches = gem.patches[0] / gem.patches[0].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.similarity, (patches @ text.T).T.reshape(2, 4, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.scores, (text @ image.T)[:, 0], rtol=0, atol=1e-5)
    assert found.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert not found.similarity.requires_grad


def test_the_template_is_used(localizer):
    plain = replace(localizer, template="{}")
    same(replace(plain(PICTURES[0], "a photo of a cat."), labels=("cat",)), localizer(PICTURES[0], "cat"))


def test_prepare_encode_and_locate_are_the_call(localizer):
    image, prompts = PICTURES[0], ["cat", "dog"]
    prepared = localizer.prepare(image)
    assert (prepared.original, prepared.pixels.shape) == (ODD, (3, 32, 48))
    for encoded in (localizer.encode(image), localizer.encode(prepared)):
        assert (encoded.size, encoded.original, len(encoded.tokens)) == ((32, 48), ODD, 1)
        same(localizer.locate(encoded, prompts), localizer(image, prompts), 0)


def test_an_image_is_encoded_as_run_encodes_its_pixels(localizer):
    pixels = batch_of(localizer, PICTURES[0], PICTURES[2])
    by_run = run(localizer.backbone.vision, pixels, {"gem": METHODS["gem"]}, pooled=True)["gem"]
    for index, image in enumerate((PICTURES[0], PICTURES[2])):
        ours, alone = localizer.encode(image), by_run.image(index)
        torch.testing.assert_close(ours.tokens, alone.tokens, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.pooled, alone.pooled, rtol=0, atol=1e-6)
        assert (ours.grid, ours.prefix) == (alone.grid, alone.prefix)
    located = localizer.locate(by_run.image(0), "cat")
    assert located.size == (32, 48)  # of the pixels: that of the image is not known
    assert torch.equal(located.similarity, localizer.locate(localizer.encode(PICTURES[0]), "cat").similarity)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_images_is_encoded_in_its_order(kind, localizer):
    mixed = [localizer.prepare(image) if index % 2 else image for index, image in enumerate(PICTURES)]
    together = localizer.encode(kind(mixed))
    assert isinstance(together, list)
    for ours, image in zip(together, PICTURES, strict=True):
        alone = localizer.encode(image)
        assert (ours.size, ours.original) == (alone.size, alone.original) and ours.original == image.shape[:2]
        torch.testing.assert_close(ours.tokens, alone.tokens, rtol=0, atol=1e-6)
    assert localizer.encode(kind([])) == []


def test_images_are_prepared_once_and_encoded_together(spied):
    prepared = [spied.localizer.prepare(image) for image in PICTURES]
    assert spied.batches == []
    spied.localizer.encode(prepared)
    assert sorted(spied.batches) == [1, 2, 2]


def test_encode_uses_another_method_when_asked(localizer):
    image = PICTURES[0]
    for method in ("clip", Method(depth=2)):
        ours = localizer.encode(image, method)
        assert isinstance(ours, Encoded)
        assert torch.equal(ours.tokens, replace(localizer, method=method).encode(image).tokens)
        assert not torch.equal(ours.tokens, localizer.encode(image).tokens)


def test_several_methods_come_by_name_or_by_label_from_one_pass(spied):
    encoded = spied.localizer.encode(PICTURES[0], ["gem", "clip"])
    assert list(encoded) == ["gem", "clip"]
    assert spied.embed.call_count == 1
    torch.testing.assert_close(encoded["gem"].tokens, spied.localizer.encode(PICTURES[0]).tokens)
    labelled = spied.localizer.encode(
        [PICTURES[1], PICTURES[0]], {"mine": METHODS["gem"].replace(iterations=0), "theirs": "clip"}
    )
    assert [list(one) for one in labelled] == [["mine", "theirs"]] * 2
    torch.testing.assert_close(labelled[1]["theirs"].tokens, encoded["clip"].tokens)
    assert not torch.equal(labelled[1]["mine"].tokens, encoded["gem"].tokens)
    assert list(spied.localizer.encode(PICTURES[0], ["gem"])) == ["gem"]  # a list of one is a list


def test_the_stream_of_a_method_can_be_traced(localizer):
    encoded = localizer.encode(PICTURES[0], ["gem", "clip"], trace=["gem"])
    assert list(encoded["gem"].trace) == [1, 2, 3, 4, 5, 6] and not encoded["clip"].trace
    last = localizer.backbone.vision.project(encoded["gem"].trace[6])
    torch.testing.assert_close(last, encoded["gem"].tokens)


def test_without_pooling_there_are_no_scores(localizer):
    pixels = batch_of(localizer, PICTURES[0])
    encoded = run(localizer.backbone.vision, pixels, {"gem": METHODS["gem"]})["gem"]
    assert encoded.pooled is None
    found = localizer.locate(encoded, ["cat"])
    assert found.scores is None
    assert found.heatmaps()[0].shape == (32, 48)
    assert localizer.encode(PICTURES[0]).pooled is not None


def test_localizers_on_one_backbone_in_threads_agree_with_one_thread(model, tokenizer):
    def localizers() -> list[Localizer]:
        backbone = adapt(model, tokenizer)  # with nothing cached
        return [Localizer(backbone, "gem", "short:32"), Localizer(backbone, "clip_surgery", "long:48")]

    def work(localizer: Localizer) -> list[Localization]:
        return [localizer(image, prompts) for image, prompts in zip(PICTURES, RAGGED, strict=True)] * 2

    alone = [work(localizer) for localizer in localizers()]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, localizers() * 2))
    for ours, expected in zip(together, alone * 2, strict=True):
        for one, other in zip(ours, expected, strict=True):
            same(one, other)


# Temperature ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharper(model, tokenizer) -> Localizer:
    backbone = adapt(model, tokenizer, recommended=Recommended("square:32", temperature_scale=0.25))
    return Localizer(backbone)


def test_a_recommended_temperature_is_for_names_whose_temperature_adapts(sharper, localizer):
    assert sharper.resolve("gem") == METHODS["gem"].replace(temperature_scale=0.25)
    for name in ("clip_surgery", "clearclip"):
        assert sharper.resolve(name) == METHODS[name]
    explicit = Method(SelfSelf(temperature_scale=3.0))
    assert sharper.resolve(explicit) == explicit
    assert sharper.resolve(METHODS["gem"]) == METHODS["gem"]
    assert localizer.resolve("gem") == METHODS["gem"]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_name_computes_follows_the_recommendation(name, sharper):
    pixels = batch_of(sharper, PICTURES[0])
    assert pixels.shape == (1, 3, 32, 32)  # the recommended size
    ours = replace(sharper, method=name).encode(PICTURES[0]).tokens  # with its steps
    adaptive = name in ("gem", "gem-q", "gem-k", "gem-v", "gem-mlp")
    settings = METHODS[name].replace(temperature_scale=0.25) if adaptive else METHODS[name]
    encoded = run(sharper.backbone.vision, pixels, {"it": settings}, pooled=True)["it"]
    assert torch.equal(ours, encoded.stepped(settings.steps).tokens)
    as_is = sharper.encode(PICTURES[0], METHODS[name]).tokens
    assert torch.equal(ours, as_is) == (not adaptive)


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_a_model_in_training_mode_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"eval\(\)"):
        open_gem.adapt(tiny_clip().train(), tokenizer)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"method": "gme"}, MethodError),
        ({"template": "a photo"}, PromptError),
        ({"size": "short"}, InputError),
        pytest.param({"method": Method(depth=7)}, MethodError),
    ],
)
def test_a_localizer_that_cannot_work_is_not_made(settings, error, localizer):
    with pytest.raises(error):
        replace(localizer, **settings)


@pytest.mark.parametrize(
    ("images", "prompts", "error"),
    [
        (picture(16, 16), [], PromptError),
        (picture(16, 16), ["cat", ""], PromptError),
        (picture(16, 16), [["cat"]], PromptError),
        ([picture(16, 16)] * 2, [], PromptError),
        ([picture(16, 16)] * 2, [["cat"]], PromptError),
        ([picture(16, 16)] * 2, [["cat"], []], PromptError),
        ([picture(16, 16)] * 2, [["cat"], [1]], PromptError),
        ([picture(16, 16), picture(40, 40).astype(int)], "cat", ImageError),
        ([picture(16, 16), "no such file.png"], "cat", ImageError),
        ([picture(16, 16), picture(4, 40)], "cat", ImageError),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(images, prompts, error, spied):
    with pytest.raises(error) as caught:
        spied.localizer(images, prompts)
    assert "\n" not in str(caught.value)
    assert not spied.embed.called and not spied.encode_text.called


def test_encode_says_which_image_cannot_be_read(spied):
    with pytest.raises(ImageError, match=r"^image 1: "):
        spied.localizer.encode([PICTURES[0], "no such file.png"])
    with pytest.raises(ImageError, match=r"^(?!image )"):
        spied.localizer.encode("no such file.png")
    assert not spied.embed.called


@pytest.mark.parametrize(
    ("methods", "part"), [("gme", "gme"), (["gem", "gme"], "gme"), ([METHODS["gem"]], "no label"), ([], "no method")]
)
def test_encode_refuses_methods_that_make_no_sense(methods, part, spied):
    with pytest.raises(MethodError, match=part):
        spied.localizer.encode(PICTURES[0], methods)
    assert not spied.embed.called


def test_no_picture_gives_no_localization(localizer):
    assert localizer([], "cat") == []


def test_a_model_that_was_moved_stays_current(tokenizer):
    model = tiny_clip()
    localizer = open_gem.adapt(model, tokenizer, size="short:32")
    localizer(PICTURES[1], ["cat", "dog"])
    model.double()
    moved = localizer(PICTURES[1], ["cat"])  # a text that is known from before
    assert moved.similarity.dtype == torch.float64


def test_a_text_tower_that_was_tuned_stays_current(tokenizer):
    model = tiny_clip()
    localizer = open_gem.adapt(model, tokenizer, size="short:32")
    before = localizer(PICTURES[1], "cat").similarity
    with torch.no_grad():
        model.get_parameter("text_projection").neg_()
    torch.testing.assert_close(localizer(PICTURES[1], "cat").similarity, -before)


def fused_adamw(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def through_data(model: torch.nn.Module) -> None:
    for weight in model.parameters():
        weight.data.mul_(1.5).add_(0.01)


def one_through_data(model: torch.nn.Module) -> None:
    model.get_parameter("text_projection").data.neg_()


def positions_through_data(model: torch.nn.Module) -> None:
    model.get_parameter("visual.positional_embedding").data.neg_()


@pytest.mark.parametrize("write", [fused_adamw, through_data, one_through_data, positions_through_data])
def test_weights_written_past_torchs_counter_stay_current(write, tokenizer):
    model = tiny_clip()
    localizer = open_gem.adapt(model, tokenizer, size="short:32")
    before = localizer(PICTURES[1], ["cat", "dog"]).similarity
    write(model)
    after = localizer(PICTURES[1], ["cat", "dog"]).similarity
    assert not torch.equal(after, before)
    fresh = open_gem.adapt(model, tokenizer, size="short:32")(PICTURES[1], ["cat", "dog"]).similarity
    torch.testing.assert_close(after, fresh, rtol=0, atol=0)


def test_several_encoded_images_are_not_one(localizer):
    pixels = batch_of(localizer, PICTURES[0], PICTURES[2])
    both = run(localizer.backbone.vision, pixels, {"gem": METHODS["gem"]}, pooled=True)["gem"]
    with pytest.raises(InputError, match=r"2 encoded images, expected one: take one by `encoded.image\(index\)`"):
        localizer.locate(both, "cat")


@pytest.mark.parametrize("count", [1, 3])
def test_one_list_of_prompts_an_image(count, localizer):
    with pytest.raises(PromptError, match=f"{count} lists of prompts for 2 images"):
        localizer(PICTURES[:2], [["cat"]] * count)


def test_an_encoded_image_has_one_list_of_prompts(localizer):
    with pytest.raises(PromptError):
        localizer.locate(localizer.encode(PICTURES[0]), [["cat"]])


def test_pixels_without_a_batch_axis_are_refused(localizer):
    with pytest.raises(InputError, match="pixels have shape"):
        run(localizer.backbone.vision, localizer.prepare(PICTURES[0]).pixels, {"gem": METHODS["gem"]})


# Views ----------------------------------------------------------------------------------------------------------------


def made_up(size: Size = ODD) -> Localization:
    """Bright bottom right, bright top left, and the same everywhere; cosines, on a grid that is not square."""
    maps = torch.full((3, 2, 4), -0.1)
    maps[0, 1, 3], maps[1, 0, 0] = 0.3, 0.25
    return Localization(("cat", "dog", "fog"), maps, size, logit_scale=50.0)


@pytest.mark.parametrize("size", [ODD, Size(8, 16), Size(3, 5), Size(1, 7), Size(300, 2)])
def test_views_have_the_size_of_the_original(size, localizer):
    found = made_up(size)
    for maps in (found.heatmaps(), found.heatmaps("cosine"), found.masks()):
        assert [tuple(one.shape) for one in maps] == [size] * 3
        assert maps.stack().shape == (3, *size)
    assert found.masks()[0].dtype == torch.bool
    assert found.segment().shape == size
    points = found.points()
    assert points.shape == (3, 2)
    assert not points.is_floating_point()
    assert ((points >= 0) & (points < torch.tensor([size.width, size.height]))).all()
    for boxes in [*found.boxes(), *found.boxes(instances="label")]:
        left, top, right, bottom = boxes.xyxy.unbind(dim=-1)
        assert ((left >= 0) & (left < right) & (right <= size.width)).all()
        assert ((top >= 0) & (top < bottom) & (bottom <= size.height)).all()


def test_the_views_of_a_picture_have_its_size(localizer):
    found = localizer(picture(*ODD), ["cat", "dog"])
    assert found.similarity.shape == (2, 4, 6)
    assert found.heatmaps().stack().shape == (2, *ODD)


def test_views_are_the_right_way_round():
    found = made_up(Size(20, 40))
    points = found.points().tolist()
    assert points[0][0] >= 34 and points[0][1] >= 14
    assert points[1][0] <= 5 and points[1][1] <= 5
    assert found.segment()[19, 39] == 0
    assert found.segment()[0, 0] == 1
    (cat,), (dog,) = (boxes.xyxy.tolist() for boxes in found.boxes()[:2])
    assert cat[2:] == [40, 20] and cat[0] > 20
    assert dog[:2] == [0, 0] and dog[2] < 20


def test_views_are_the_readouts_of_the_upsampled_cosines():
    found = made_up()
    cosines = readout.upsample(found.similarity, ODD)
    for index, cosine in enumerate(cosines):
        stretched = readout.min_max(cosine)
        assert torch.equal(found.heatmaps("cosine")[index], cosine)
        assert torch.equal(found.heatmaps()[index], stretched)
        assert torch.equal(found.masks(0.7)[index], stretched > 0.7)
        assert torch.equal(found.masks(0.1, "cosine")[index], cosine > 0.1)
        assert tuple(found.points()[index].tolist()) == readout.peak(cosine)
        for instances, numbering in (("component", readout.components), ("label", readout.whole)):
            for threshold, scale, shown in ((0.7, "minmax", stretched), (0.1, "cosine", cosine)):
                ours = found.boxes(threshold, scale, instances=instances)[index]
                numbered, spans = numbering(shown > threshold)
                best = [cosine[torch.from_numpy(numbered == number)].max() for number in range(1, len(spans) + 1)]
                expected = {
                    (x.start, y.start, x.stop, y.stop): score for (y, x), score in zip(spans, best, strict=True)
                }
                assert {tuple(box) for box in ours.xyxy.tolist()} == expected.keys()
                assert ours.scores.tolist() == sorted(map(float, best), reverse=True)  # cosines under either scale


def test_nothing_stands_out_of_fog():
    found = made_up()
    assert not found.heatmaps()["fog"].any()
    assert not found.masks()["fog"].any()
    assert found.boxes()[2].xyxy.shape == found.boxes(instances="label")[2].xyxy.shape == (0, 4)


def test_segment_weighs_cosines_by_the_logit_scale():
    found = made_up()
    logits = 50.0 * readout.upsample(found.similarity, ODD)
    probability, label = logits.softmax(0).max(0)
    assert torch.equal(found.segment(), label)
    assert torch.equal(found.segment(0.8), label.masked_fill(probability < 0.8, -1))
    assert set(found.segment(0.8).unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("background", [-0.1, 1.1, 80, float("nan")])
def test_background_is_a_probability(background):
    with pytest.raises(InputError, match="background is"):
        made_up().segment(background)


@pytest.mark.parametrize("background", [0, 1, None])
def test_the_bounds_of_a_probability_are_fine(background):
    assert made_up().segment(background).shape == ODD


@pytest.mark.parametrize("view", ["heatmaps", "masks", "boxes", "objects"])
def test_an_unknown_scale_is_refused_at_once(view):
    with pytest.raises(InputError, match="scale is 'log', expected one of minmax, cosine"):
        getattr(made_up(), view)(scale="log")


@pytest.mark.parametrize("view", ["boxes", "objects"])
def test_unknown_instances_are_refused(view):
    with pytest.raises(InputError, match="instances is 'image', expected one of component, label"):
        getattr(made_up(), view)(instances="image")


# Maps -----------------------------------------------------------------------------------------------------------------


class Making:
    """Makes map i as a tensor full of i, and remembers which ones it was asked for."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, index: int) -> Tensor:
        self.made.append(index)
        return torch.full((2, 3), index)


@pytest.fixture
def making() -> Making:
    return Making()


@pytest.fixture
def maps(making) -> Maps:
    return Maps(("cat", "dog", "owl", "dog"), making)


@pytest.mark.parametrize(
    ("which", "made"),
    [(0, 0), (3, 3), (-1, 3), (-4, 0), ("owl", 2), ("dog", 1), (np.int64(2), 2), (torch.tensor(1), 1)],
)
def test_a_map_is_made_when_asked_for(which, made, maps, making):
    assert making.made == []
    assert torch.equal(maps[which], torch.full((2, 3), made))
    assert making.made == [made]


@pytest.mark.parametrize("which", [4, -5, 100])
def test_an_index_out_of_range_is_an_index_error(which, maps, making):
    with pytest.raises(IndexError):
        maps[which]
    assert making.made == []


def test_an_unknown_prompt_lists_those_there_are(maps):
    with pytest.raises(PromptError, match="no label 'cow' here, expected one of cat, dog, owl, dog"):
        maps["cow"]


@pytest.mark.parametrize(
    "which", [slice(1, 3), slice(None, None, -1), slice(-2, None), slice(None, None, 2), slice(2, 2), slice(None)]
)
def test_a_slice_is_maps_that_are_not_made_yet(which, maps, making):
    chosen = maps[which]
    assert isinstance(chosen, Maps)
    assert making.made == []
    assert chosen.labels == ("cat", "dog", "owl", "dog")[which]
    assert len(chosen) == len(chosen.labels)
    assert [int(one[0, 0]) for one in chosen] == list(range(4))[which]
    assert [int(one[0, 0]) for one in chosen[1:]] == list(range(4))[which][1:]


def test_maps_are_iterated_one_at_a_time_and_end(maps, making):
    iterator = iter(maps)
    next(iterator)
    assert making.made == [0]
    assert len(list(iterator)) == 3
    assert making.made == [0, 1, 2, 3]
    assert [int(one[0, 0]) for one in reversed(maps)] == [3, 2, 1, 0]
    index = 0
    try:  # the old protocol: index until IndexError
        while True:
            maps[index]
            index += 1
    except IndexError:
        assert index == 4


def test_a_prompt_is_in_its_maps(maps, making):
    assert "owl" in maps
    assert "cow" not in maps
    assert making.made == []


def test_maps_stack(maps):
    assert maps.stack().shape == (4, 2, 3)
    assert torch.equal(maps.stack(), torch.stack(list(maps)))
    assert torch.equal(maps[1:3].stack(), maps.stack()[1:3])


# Memory ---------------------------------------------------------------------------------------------------------------


class LivingMaps(TorchDispatchMode):
    """The most map-sized tensors that lived at the same time, and the size of the largest."""

    def __init__(self, pixels: int):
        super().__init__()
        self.pixels, self.most, self.largest = pixels, 0, 0
        self.living: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.numel() >= self.pixels and id(leaf) not in self.living:
                self.largest = max(self.largest, leaf.numel())
                self.living.add(id(leaf))
                self.most = max(self.most, len(self.living))
                weakref.finalize(leaf, self.living.discard, id(leaf))
        return output


SIZE = Size(300, 400)


@pytest.fixture(scope="module")
def many() -> Localization:
    """60 prompts on 120,000 pixels."""
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(60, 3, 4, generator=generator)
    return Localization(tuple(f"thing {index}" for index in range(60)), similarity, SIZE)


VIEWS = {
    "boxes": lambda found: found.boxes(),
    "boxes of labels": lambda found: found.boxes(instances="label"),
    "objects": lambda found: found.objects(),
    "objects of labels": lambda found: found.objects(instances="label", masks=False),
    "points": lambda found: found.points(),
    "segment": lambda found: found.segment(0.5),
    "heatmaps": lambda found: [float(heatmap.mean()) for heatmap in found.heatmaps()],
    "masks": lambda found: [int(mask.sum()) for mask in found.masks()],
    "maps not looked at": lambda found: (found.heatmaps()[20:], found.masks()),
}


@pytest.mark.parametrize("view", VIEWS)
def test_no_view_holds_prompts_times_pixels(view, many):
    pixels = SIZE.height * SIZE.width
    with LivingMaps(pixels) as watch:
        kept = VIEWS[view](many)
    assert kept is not None
    assert watch.largest <= 2 * pixels  # `nonzero` gives two numbers a pixel
    assert watch.most <= (0 if view == "maps not looked at" else 15)


def test_the_watch_would_see_maps_that_are_kept(many):
    with LivingMaps(SIZE.height * SIZE.width) as watch:
        kept = list(many.heatmaps("cosine")[:30])
    assert len(kept) == 30
    assert watch.most >= 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pixels_of_another_type_are_no_concern_of_the_caller(dtype, tokenizer):
    localizer = open_gem.adapt(tiny_clip().to(dtype), tokenizer, size="short:32")
    assert batch_of(localizer, PICTURES[0]).dtype == torch.float32
    found = localizer(PICTURES[0], "cat")
    assert found.similarity.dtype == torch.promote_types(dtype, torch.float32)
    assert found.heatmaps()[0].isfinite().all()


def test_many_images_are_encoded_in_batches(spied):
    results = spied.localizer([picture(32, 32)] * 40, "cat")
    assert len(results) == sum(spied.batches) == 40
    assert max(spied.batches) <= 16


# Groups of one shape --------------------------------------------------------------------------------------------------


def grouped(items: str, limit: int | Callable[[], int], waiting: int | None = None) -> list[str]:
    """Letters by their case, digits each alone."""
    groups = by_shape(items, lambda one: None if one.isdigit() else one.isupper(), limit, waiting)
    return ["".join(group) for group in groups]


def test_groups_are_of_one_shape_and_full_ones_go_first():
    assert grouped("aBcDe", 2) == ["ac", "BD", "e"]
    assert grouped("aBcDe", 5) == ["ace", "BD"]
    assert grouped("", 3) == []


def test_an_item_without_a_shape_goes_alone_and_at_once():
    assert grouped("a1B2c", 2) == ["1", "2", "ac", "B"]


def test_the_largest_group_goes_if_too_many_wait():
    assert grouped("aBCDefG", 9, 4) == ["BCD", "aef", "G"]
    assert grouped("aBCDefG", 9) == ["aef", "BCDG"]


def test_a_limit_may_change_meanwhile():
    limits = iter([3, 3, 1, 1, 1])
    assert grouped("abcde", lambda: next(limits)) == ["abc", "d", "e"]


def test_only_what_is_needed_later_is_kept_of_an_image(localizer):
    prepared = localizer.prepare(PICTURES[0])
    assert isinstance(prepared, Prepared) and prepared.image is None and prepared.shape == (3, 32, 48)
    refined = replace(localizer, refinement=open_gem.Pamr()).prepare(PICTURES[0])
    assert refined.image is not None and refined.shape == (3, 32, 48)
    windows = replace(localizer, views=open_gem.Views(window=16)).prepare(PICTURES[0])
    assert windows.pixels is None and windows.image is not None and windows.shape is None


@pytest.mark.parametrize("settings", [{"method": "gam"}, {"size": "huge"}, {"template": "no place"}])
def test_settings_are_checked_before_anything_is_loaded(settings, monkeypatch):
    monkeypatch.setattr(open_gem.towers, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError):
        open_gem.load("ViT-B-16", "openai", **settings)


# What a caller may mix up ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [PICTURES[0], {"gem": None}])
def test_only_what_was_encoded_is_located_in(given, localizer):
    with pytest.raises(InputError, match="expected what `encode` gives for one image and one method"):
        localizer.locate(given, "cat")


def test_a_trace_of_an_unknown_label_is_refused(localizer):
    with pytest.raises(MethodError, match="trace names 'gem', expected labels of `methods`"):
        localizer.encode(PICTURES[0], "gem", trace=["gem"])
    assert localizer.encode(PICTURES[0], ["gem"], trace=["gem"])["gem"].trace


def test_run_takes_settings_and_no_names(localizer):
    pixels = batch_of(localizer, PICTURES[0])
    with pytest.raises(MethodError, match="method 'gem' is 'gem', expected settings such as METHODS"):
        run(localizer.backbone.vision, pixels, {"gem": "gem"})  # pyright: ignore[reportArgumentType]


def test_a_refinement_may_be_named(localizer):
    assert localizer.configured(refinement="pamr").refinement == open_gem.Pamr()
    with pytest.raises(InputError, match=r"unknown refinement .pamir.*did you mean pamr"):
        localizer.configured(refinement="pamir")
