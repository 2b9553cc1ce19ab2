"""Labels of several phrases, background, presence, redundancy, several methods, views and refinement, together."""

import io
import json
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

import open_gem
from open_gem import METHODS, Localization, Localizer, Vocabulary, readout, run
from open_gem.data.scenes import CONCEPTS, scene
from open_gem.errors import ImageError, InputError, PromptError
from open_gem.images.pixels import to_pixels
from open_gem.images.views import Views
from open_gem.localization import ABSENT
from open_gem.method.run import Encoded
from open_gem.method.steps import Scga, StepContext
from open_gem.refine.pamr import Pamr
from open_gem.tensors import similarity
from open_gem.types import Size
from open_gem.windows import EncodedWindows, MergedMaps

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 140, 3), dtype=np.uint8))
SYNONYMS = {"cat": ["cat", "kitten"], "dog": ["dog", "puppy", "hound"], "owl": "owl"}


@pytest.fixture(scope="module")
def localizer(tiny) -> Localizer:
    return open_gem.load(tiny, device="cpu")


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def pixelwise(found: Localization) -> Tensor:
    """Cosines of all phrases at pixels, `(q, y, x)`."""
    maps = found.similarity[None]
    return interpolate(maps, size=tuple(found.size), mode="bilinear", align_corners=False)[0]


# Labels and their phrases ---------------------------------------------------------------------------------------------


def test_a_label_is_where_its_best_phrase_is(localizer):
    found = localizer(PICTURE, SYNONYMS)
    phrases = localizer(PICTURE, ["cat", "kitten", "dog", "puppy", "hound", "owl"])
    assert found.labels == ("cat", "dog", "owl")
    close(found.similarity, phrases.similarity)
    cosines = pixelwise(phrases)
    by_label = torch.stack([cosines[:2].amax(0), cosines[2:5].amax(0), cosines[5]])
    close(found.heatmaps("cosine").stack(), by_label)
    close(found.scores, torch.stack([phrases.scores[:2].max(), phrases.scores[2:5].max(), phrases.scores[5]]))
    points = [(flat % 140, flat // 140) for flat in by_label.flatten(1).argmax(1).tolist()]
    assert found.points().tolist() == [list(point) for point in points]
    assert len(found.boxes()) == len(found.masks()) == 3


def test_labels_are_segmented_by_the_softmax_over_all_phrases(localizer):
    vocabulary = Vocabulary.of(SYNONYMS).with_background(["sky", "wall"])
    found = localizer(PICTURE, vocabulary)
    assert len(found.similarity) == 8
    probability = (found.logit_scale * pixelwise(found)).softmax(0)
    best = torch.stack([probability[6:].amax(0), probability[:2].amax(0), probability[2:5].amax(0), probability[5]])
    confidence, label = best.max(0)
    assert torch.equal(found.segment(), label - 1)
    assert torch.equal(found.segment(0.3), (label - 1).masked_fill(confidence < 0.3, -1))
    close(found.heatmaps("probability").stack(), best[1:], 1e-5)
    close(found.heatmaps("minmax")["cat"], readout.min_max(pixelwise(found)[:2].amax(0)))
    assert torch.equal(found.masks(0.4, "probability").stack(), found.heatmaps("probability").stack() > 0.4)


def refer_absent(found, rule: str) -> list[bool]:
    """Whether each label is present, from the definitions."""
    if rule == "none":
        return [True] * 3
    if rule == "presence":
        return [value >= 0.5 for value in found.presence.tolist()]
    maps = found.maps if isinstance(found.maps, torch.Tensor) else found.maps.stack()
    highest = (found.logit_scale * maps).softmax(0).flatten(1).amax(1)
    return [highest[:2].max() >= 0.5, highest[2:5].max() >= 0.5, highest[5] >= 0.5]


@pytest.mark.parametrize("background", [None, 0.4])
@pytest.mark.parametrize("merge", ["features", "logits"])
@pytest.mark.parametrize("rule", ABSENT)
def test_absent_labels_win_no_pixel_and_have_no_mask(localizer, rule, merge, background):
    views = replace(localizer, views=Views(window=32, stride=16, merge=merge))
    found = views(PICTURE, Vocabulary.of(SYNONYMS).with_background(["sky"]))
    found = replace(found, presence=torch.tensor([0.7, 0.2, 0.5]), logit_scale=20.0)
    present = refer_absent(found, rule)
    assert list(found.present(absent=rule)) == present
    probability = (found.logit_scale * pixelwise(found)).softmax(0)
    best = torch.stack([probability[6], probability[:2].amax(0), probability[2:5].amax(0), probability[5]])
    best[1:][~torch.tensor(present)] = 0
    confidence, label = best.max(0)
    expected = label - 1 if background is None else (label - 1).masked_fill(confidence < background, -1)
    assert torch.equal(found.segment(background, absent=rule), expected)
    for mask, full, is_present in zip(found.masks(absent=rule), found.masks(), present, strict=True):
        assert torch.equal(mask, full & is_present)
    labels = {obj.label for obj in found.objects(absent=rule)}
    assert labels <= {label for label, is_present in zip(found.labels, present, strict=True) if is_present}


def test_an_image_without_any_present_label_is_background(localizer):
    found = replace(localizer(PICTURE, ["cat", "dog"]), presence=torch.tensor([0.1, 0.2]))
    assert (found.segment(absent="presence") == -1).all()
    assert not found.masks(absent="presence").stack().any()


def test_denoising_uses_what_a_trained_model_calls_probable(localizer):
    found = replace(localizer(PICTURE, ["cat", "dog"]), logit_scale=None)
    values = torch.zeros_like(found.maps)
    values[0, 0, 0] = 0.6
    assert replace(found, maps=values).present(absent="denoise") == (True, False)


def test_an_unknown_rule_of_absence_lists_the_known(localizer):
    found = localizer(PICTURE, ["cat", "dog"])
    for ask in (found.segment, found.masks, found.objects, found.present):
        with pytest.raises(InputError, match="absent is 'maybe', expected one of none, presence, denoise"):
            ask(absent="maybe")


def test_a_phrase_of_label_and_background_is_background(localizer):
    """SCLIP's class file of COCO-Object has "bed" twice; there the background, class 0, wins the tie."""
    found = localizer(PICTURE, Vocabulary.of(["bed"]).with_background(["bed"]))
    assert (found.segment() == -1).all()
    close(found.heatmaps("probability")[0], torch.full((100, 140), 0.5), 1e-5)


def test_plain_prompts_are_labels_of_their_own(localizer):
    found, other = localizer(PICTURE, ["cat", "dog"]), localizer(PICTURE, {"cat": "cat", "dog": ["dog"]})
    assert found.labels == other.labels and torch.equal(found.similarity, other.similarity)


def test_each_image_may_have_a_vocabulary_of_its_own(localizer):
    vocabularies = [SYNONYMS, Vocabulary.of("ant").with_background("sky"), ["dog", "cat"]]
    together = localizer([PICTURE, PICTURE, PICTURE], vocabularies)
    for found, vocabulary in zip(together, vocabularies, strict=True):
        alone = localizer(PICTURE, vocabulary)
        assert found.labels == alone.labels
        close(found.similarity, alone.similarity)
        close(found.presence, alone.presence)
    for found in localizer([PICTURE, PICTURE], SYNONYMS):
        assert found.labels == ("cat", "dog", "owl")


def test_an_ensemble_of_templates_is_used_and_told(localizer):
    ensemble = replace(localizer, template=["a photo of a {}.", "{}"])
    ours = ensemble(PICTURE, "cat").similarity
    text = [localizer.backbone.encode_text([filled])[0] for filled in ("a photo of a cat.", "cat")]
    mean = torch.nn.functional.normalize(torch.stack(text).mean(0), dim=-1)
    encoded = localizer.encode(PICTURE)
    close(ours, similarity(encoded.patches[0], mean[None]).unflatten(-1, tuple(encoded.grid)))
    assert ensemble.describe()["template"] == ("a photo of a {}.", "{}")
    assert replace(localizer, template="imagenet-7")(PICTURE, "cat").similarity.shape == ours.shape


# Presence -------------------------------------------------------------------------------------------------------------


def image_cosines(localizer: Localizer, phrases: list[str]) -> Tensor:
    pooled = localizer.encode(PICTURE).pooled
    assert pooled is not None
    text = localizer.backbone.encode_text([f"a photo of a {phrase}." for phrase in phrases])
    return torch.nn.functional.cosine_similarity(pooled, text)


def test_presence_is_the_phrase_against_the_empty_one(localizer):
    found = localizer(PICTURE, SYNONYMS)
    empty, *cosines = image_cosines(localizer, ["", "cat", "kitten", "dog", "puppy", "hound", "owl"]).double()
    scale = localizer.backbone.logit_scale
    for label, phrases in enumerate([cosines[:2], cosines[2:5], cosines[5:]]):
        best, nothing = scale * max(phrases), scale * empty
        expected = best.exp() / (best.exp() + nothing.exp())
        assert found.presence[label].item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_background_is_a_rival_too(localizer):
    cosines = image_cosines(localizer, ["", "sky", "wall", "cat"])
    found = localizer(PICTURE, Vocabulary.of("cat").with_background(["sky", "wall"]))
    expected = (localizer.backbone.logit_scale * (cosines[3] - cosines[:3].max())).sigmoid()
    close(found.presence, expected[None], 1e-4)


def test_presence_of_a_model_trained_with_a_sigmoid_is_as_trained(localizer, monkeypatch):
    monkeypatch.setattr(type(localizer.backbone), "logit_bias", property(lambda self: -3.0))
    found = localizer(PICTURE, ["cat", "dog"])
    close(found.presence, (localizer.backbone.logit_scale * found.scores - 3.0).sigmoid())


def without_pooled(localizer: Localizer) -> Encoded:
    """The picture encoded without an image-level embedding."""
    pixels = localizer.prepare(PICTURE).pixels
    assert pixels is not None
    return run(localizer.backbone.vision, pixels[None], {"gem": localizer.resolve("gem")})["gem"]


def test_without_scores_there_is_no_presence(localizer):
    found = localizer.locate(without_pooled(localizer), ["cat"])
    assert found.scores is None and found.presence is None


def test_presence_tells_what_is_there_on_scenes():
    """The embedded model on held-out scenes: things there are present, others are not (0.98 and 0.92 of 150 scenes)."""
    localizer = open_gem.load("embedded", device="cpu")
    there, absent = [], []
    for seed in range(12):
        made = scene(seed, 256)
        presence = localizer(made.image, CONCEPTS).presence
        assert presence is not None
        for name, share in zip(CONCEPTS, presence.tolist(), strict=True):
            (there if name in made.names else absent).append(share > 0.5)
    assert np.mean(there) > 0.9
    assert np.mean(absent) < 0.15


# Redundancy -----------------------------------------------------------------------------------------------------------


def test_redundancy_removal_is_that_of_the_readout_and_of_any_method(localizer):
    surgical = replace(localizer, remove_redundancy=True)
    for method in ("gem", "clip_surgery", "clip"):
        plain = replace(localizer, method=method)(PICTURE, SYNONYMS)
        ours = replace(surgical, method=method)(PICTURE, SYNONYMS)
        scores = image_cosines(localizer, ["cat", "kitten", "dog", "puppy", "hound", "owl"])
        close(ours.similarity, readout.remove_redundancy(plain.similarity, scores))
        close(ours.scores, plain.scores)
        close(ours.presence, plain.presence)
        assert (ours.similarity - plain.similarity).abs().max() > 1e-3


def test_of_one_phrase_the_empty_one_is_taken_away(localizer):
    [ours] = replace(localizer, remove_redundancy=True)([PICTURE], "cat")
    plain = localizer(PICTURE, "cat")
    text = localizer.backbone.encode_text(["a photo of a ."])
    encoded = localizer.encode(PICTURE)
    nothing = similarity(encoded.patches[0], text).unflatten(-1, tuple(encoded.grid))
    close(ours.similarity, plain.similarity - nothing)


def test_redundancy_needs_the_pooled_embedding(localizer):
    surgical = replace(localizer, remove_redundancy=True)
    encoded = without_pooled(surgical)
    with pytest.raises(InputError, match="pooled=True"):
        surgical.locate(encoded, ["cat", "dog"])
    assert surgical.locate(encoded, "cat").scores is None  # one phrase needs none


def watch_encoding(localizer: Localizer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all pixels that the vision tower is given from now on."""
    encoded: list[tuple[int, ...]] = []
    embed = localizer.backbone.vision.embed

    def watched(pixels: Tensor) -> Any:
        encoded.append(tuple(pixels.shape))
        return embed(pixels)

    monkeypatch.setattr(localizer.backbone.vision, "embed", watched)
    return encoded


# Several methods -----------------------------------------------------------------------------------------------------


def test_several_methods_from_one_pass_are_each_method_alone(localizer, monkeypatch):
    embedded = watch_encoding(localizer, monkeypatch)
    encoded = localizer.encode(PICTURE, METHODS)
    assert len(embedded) == 1
    assert list(encoded) == list(METHODS)
    for name in ("gem", "naclip", "gem-kmeans"):
        found = localizer.locate(encoded[name], SYNONYMS)
        close(found.similarity, replace(localizer, method=name)(PICTURE, SYNONYMS).similarity)


def test_steps_come_after_the_windows_are_merged(localizer):
    """Not in each window: the step sees the patches of the whole image."""
    stepped = METHODS["gem"].replace(steps=(Scga(),))
    for views in (Views(), Views(window=32, stride=16), Views(scales=(1, 1.5), flip=True)):
        encoded = replace(localizer, views=views).encode(PICTURE, {"plain": METHODS["gem"], "stepped": stepped})
        plain, ours = encoded["plain"], encoded["stepped"]
        close(ours.patches[0], Scga()(plain.patches[0], StepContext(plain.grid)))
        close(ours.pooled, plain.pooled)
        assert (ours.patches - plain.patches).abs().max() > 1e-3


def test_where_maps_are_merged_steps_are_of_each_window(localizer):
    stepped = METHODS["gem"].replace(steps=(Scga(),))
    looking = replace(localizer, views=Views(window=32, stride=16, merge="logits"))
    encoded = looking.encode(PICTURE, {"plain": METHODS["gem"], "stepped": stepped})
    windows = zip(encoded["plain"].windows[0], encoded["stepped"].windows[0], strict=True)
    for plain, ours in windows:
        close(ours.patches[0], Scga()(plain.patches[0], StepContext(plain.grid)))


# Views ----------------------------------------------------------------------------------------------------------------

VIEWS = {
    "windows": Views(window=32, stride=16),
    "windows, maps": Views(window=32, stride=16, merge="logits"),
    "scales": Views(scales=(1, 1.5)),
    "flip": Views(flip=True),
    "all": Views(window=40, scales=(0.75, 1.25), flip=True, merge="logits"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_works_for_every_answer(name, localizer):
    looking = replace(localizer, views=VIEWS[name])
    found = looking(PICTURE, SYNONYMS)
    assert isinstance(found.maps, MergedMaps) == (VIEWS[name].merge == "logits")
    assert found.similarity.isfinite().all()
    assert found.similarity.abs().max() <= 1 + 1e-5
    assert found.heatmaps().stack().shape == found.masks().stack().shape == (3, 100, 140)
    assert found.segment(0.5).shape == (100, 140)
    plain = localizer(PICTURE, SYNONYMS)
    assert (pixelwise(found) - pixelwise(plain)).abs().max() > 1e-4
    [listed] = looking([PICTURE], SYNONYMS)
    close(listed.similarity, found.similarity)


def field_evaluator(localizer: Localizer, vocabulary: list[str], crop: int, stride: int) -> Tensor:
    """Slide inference as the field has it, in plain loops: crops of the resized picture, their maps upsampled to the
    crop, added up, divided by how often a pixel was seen, resized to the picture."""
    short = 64 / min(PICTURE.size)
    size = Size(int(PICTURE.height * short + 0.5), int(PICTURE.width * short + 0.5))
    pixels = to_pixels(PICTURE, size, localizer.backbone.preprocess)
    total, count = torch.zeros(len(vocabulary), *size), torch.zeros(*size)
    for row in range(max(size.height - crop + stride - 1, 0) // stride + 1):
        for col in range(max(size.width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + crop, size.height), min(col * stride + crop, size.width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            window = pixels[None, :, top:bottom, left:right]
            encoded = run(localizer.backbone.vision, window, {"gem": localizer.resolve("gem")})["gem"]
            maps = similarity(encoded.patches[0], localizer.text(vocabulary)).unflatten(-1, tuple(encoded.grid))
            total[:, top:bottom, left:right] += readout.upsample(maps, Size(bottom - top, right - left))
            count[top:bottom, left:right] += 1
    assert count.max() > 1 and count.min() >= 1
    return readout.upsample(total / count, Size(PICTURE.height, PICTURE.width))


def test_windows_are_the_slide_inference_of_the_field(localizer):
    looking = replace(localizer, views=Views(window=32, stride=16, merge="logits"))
    found = looking(PICTURE, ["cat", "dog"])
    assert tuple(found.similarity.shape) == (2, 64, 90)  # 89.6 pixels wide, not a whole number of patches
    close(found.heatmaps("cosine").stack(), field_evaluator(localizer, ["cat", "dog"], 32, 16), 1e-5)


@pytest.mark.parametrize("name", VIEWS)
def test_what_was_encoded_can_be_asked_again(name, localizer):
    looking = replace(localizer, views=VIEWS[name])
    encoded = looking.encode(PICTURE, ["gem", "clip"])
    assert isinstance(encoded["gem"], EncodedWindows) == (VIEWS[name].merge == "logits")
    for method in ("gem", "clip"):
        for prompts in (SYNONYMS, ["owl"]):
            found = looking.locate(encoded[method], prompts)
            assert found.size == (100, 140)
            close(found.similarity, replace(looking, method=method)(PICTURE, prompts).similarity)


@pytest.mark.parametrize("name", VIEWS)
def test_images_of_a_list_are_seen_as_each_alone(name, localizer):
    looking = replace(localizer, views=VIEWS[name])
    images = [PICTURE, PICTURE.resize((90, 120)), PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    together = looking(images, [["cat"], SYNONYMS, ["dog", "owl"]])
    for ours, image, prompts in zip(together, images, (["cat"], SYNONYMS, ["dog", "owl"]), strict=True):
        alone = looking(image, prompts)
        assert (ours.labels, ours.size) == (alone.labels, alone.size)
        close(ours.similarity, alone.similarity)


def test_redundancy_is_removed_from_every_view(localizer):
    views = Views(window=32, stride=16, merge="logits")
    plain = replace(localizer, views=views)
    ours = replace(plain, remove_redundancy=True)(PICTURE, ["cat", "dog"])
    maps, scores = plain(PICTURE, ["cat", "dog"]).similarity, ours.scores
    close(ours.similarity, readout.remove_redundancy(maps, scores), 1e-5)


def test_windows_bound_what_is_encoded_at_once(localizer, monkeypatch):
    encoded = watch_encoding(localizer, monkeypatch)
    large = PICTURE.resize((900, 700))
    replace(localizer, size="native", views=Views(window=64))(large, "cat")
    assert max(batch for batch, *_ in encoded) <= 16
    assert {shape[-2:] for shape in encoded} == {(64, 64)}
    assert sum(batch for batch, *_ in encoded) > 400


def test_a_picture_that_cannot_be_seen_is_found_before_anything_is_computed(localizer, monkeypatch):
    encoded = watch_encoding(localizer, monkeypatch)
    with pytest.raises(ImageError, match="image 2: image is 5x5"):
        replace(localizer, views=Views(flip=True))([PICTURE, PICTURE, PICTURE.crop((0, 0, 5, 5))], "cat")
    assert not encoded


def test_windows_that_do_not_fit_the_patches_are_refused_at_once(localizer):
    with pytest.raises(InputError, match="window is 30 pixels, expected a whole number of 8x8 patches: 24 or 32"):
        replace(localizer, views=Views(window=30))


# Refinement -----------------------------------------------------------------------------------------------------------


def test_refined_maps_follow_the_picture(localizer):
    pamr = Pamr(iterations=3, dilations=(1, 2))
    ours = replace(localizer, refinement=pamr)(PICTURE, SYNONYMS)
    plain = localizer(PICTURE, SYNONYMS)
    weights = pamr.weights(torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1) / 255)
    refined = pamr(weights, pixelwise(plain))
    expected = torch.stack([refined[:2].amax(0), refined[2:5].amax(0), refined[5]])
    close(ours.heatmaps("cosine").stack(), expected, 1e-5)
    close(ours.scores, plain.scores)
    [listed] = replace(localizer, refinement=pamr)([PICTURE], SYNONYMS)
    close(listed.heatmaps("cosine").stack(), expected, 1e-5)
    close(pamr.refine(PICTURE, plain).heatmaps("cosine").stack(), expected, 1e-5)


@pytest.mark.parametrize("name", VIEWS)
def test_a_refinement_is_applied_when_an_encoded_image_is_located(name, localizer):
    pamr = Pamr(iterations=2, dilations=(1,))
    looking = replace(localizer, views=VIEWS[name])
    refining = replace(looking, refinement=pamr)
    encoded = refining.encode(PICTURE, ["gem", "clip"])
    ours = refining.locate(encoded["clip"], ["cat", "dog"])
    expected = pamr.refine(PICTURE, replace(looking, method="clip")(PICTURE, ["cat", "dog"]))
    close(ours.heatmaps("cosine").stack(), expected.heatmaps("cosine").stack())
    assert ours.refiner is not None


def test_a_refinement_needs_the_image(localizer):
    refining = replace(localizer, refinement=Pamr())
    with pytest.raises(InputError, match="encoded without the image"):
        refining.locate(localizer.encode(PICTURE), "cat")


def test_a_refined_result_keeps_the_picture_and_not_its_weights(localizer):
    found = replace(localizer, refinement=Pamr())(PICTURE, "cat")
    found.heatmaps()[0]
    assert len(pickle.dumps(found)) < 4 * 3 * 100 * 140


def test_another_picture_cannot_refine(localizer):
    found = localizer(PICTURE, "cat")
    with pytest.raises(InputError, match=r"99×140 .* expected the one localized: 100×140"):
        Pamr().refine(PICTURE.resize((140, 99)), found)


# What decides a result ------------------------------------------------------------------------------------------------


def test_everything_that_decides_is_told(localizer):
    looking = replace(localizer, views=VIEWS["all"], refinement=Pamr(), remove_redundancy=True, method="gem-kmeans")
    told = json.loads(json.dumps(looking.describe()))
    assert {field.name for field in fields(looking) if field.init} - {"backbone", "size", "text"} <= told.keys()
    assert told["views"] == {"window": 40, "stride": None, "scales": [0.75, 1.25], "flip": True, "merge": "logits"}
    assert told["refinement"] == {"refinement": "pamr", "iterations": 10, "dilations": [8, 16], "std_weight": 0.1}
    assert told["remove_redundancy"] is True
    assert told["method"] == {
        "attention": "KMeans",
        "clusters": 7,
        "seed": 0,
        "max_iter": 20,
        "normalize": False,
        "temperature": "trained",
        "temperature_scale": 1.0,
        "depth": 6,
        "residual": True,
        "mlp": False,
    }


# Results that show themselves -----------------------------------------------------------------------------------------


def shown(**fields: Any) -> Localization:
    """A cat in the upper left, a dog that is absent; an image of one colour to draw on."""
    maps = torch.zeros(2, 6, 8)
    maps[0, :3, :4], maps[1, 4:, 5:] = 0.3, 0.2
    values = {
        "scores": torch.tensor([0.31, 0.12]),
        "presence": torch.tensor([0.98, 0.03]),
        "image": Image.new("RGB", (160, 120), (200, 60, 20)),
    }
    return Localization(("cat", "dog"), maps, Size(120, 160), **{**values, **fields})


def test_one_line_says_what_is_there(localizer):
    assert repr(shown()) == "<Localization of 120x160 pixels: cat 0.98, dog 0.03 (absent)>"
    assert repr(shown(presence=None)) == "<Localization of 120x160 pixels: cat, dog>"
    many = Localization(tuple(map(str, range(1000))), torch.zeros(1000, 1, 1), Size(1, 1))
    assert repr(many).endswith(" 9, 990 more>")
    assert repr(localizer) == f"<Localizer {localizer.name}: gem, {localizer.size_rule}, float32, on cpu>"
    assert "SelfSelf of the last 2 blocks" in repr(replace(localizer, method=METHODS["gem"].replace(depth=2)))


def test_a_call_keeps_a_reference_to_its_image_and_nothing_else_does(localizer, tmp_path):
    assert localizer(PICTURE, "cat").image is PICTURE
    assert [found.image for found in localizer([PICTURE, PICTURE], "cat")] == [PICTURE, PICTURE]
    assert localizer.locate(localizer.encode(PICTURE), "cat").image is None
    PICTURE.save(path := tmp_path / "cat.png")
    found = localizer(path, "cat")
    assert found.image is path
    assert found.plot().tobytes() == localizer(PICTURE, "cat").plot().tobytes()


def test_a_list_may_show_its_progress(localizer, capsys):
    localizer([PICTURE] * 3, "cat", progress=True)
    assert "3/3" in capsys.readouterr().err
    localizer([PICTURE] * 3, "cat")
    assert capsys.readouterr().err == ""


def test_a_notebook_shows_an_image():
    with Image.open(io.BytesIO(shown()._repr_png_())) as image:
        image.load()
        assert image.format == "PNG" and image.width > 2 * 160


def test_a_plot_shows_the_image_beside_its_labels_and_greys_the_absent_one():
    def chroma(image: Image.Image, *box: float) -> float:
        left, top, right, bottom = (round(side * size) for side, size in zip(box, 2 * image.size, strict=True))
        return np.ptp(np.asarray(image, dtype=int)[top:bottom, left:right], axis=-1).mean()

    left, right, below = (0.1, 0.2, 0.4, 0.4), (0.6, 0.2, 0.9, 0.4), (0.1, 0.6, 0.4, 0.8)  # image, cat, dog
    absent, asked = shown().plot(), shown().plot(presence=0)
    assert chroma(absent, *left) > 150 and chroma(absent, *below) < 0.4 * chroma(absent, *left)
    assert chroma(asked, *below) > 0.8 * chroma(asked, *left) > 0
    assert absent.crop((0, 0, absent.width, absent.height // 3)).tobytes() == (
        asked.crop((0, 0, asked.width, asked.height // 3)).tobytes()
    )
    assert chroma(absent, *right) != chroma(absent, *left)


def test_a_plot_without_an_image_shows_maps_alone_and_another_image_is_refused():
    bare = shown(image=None)
    assert bare.plot().tobytes() != shown().plot().tobytes()
    assert bare.plot(shown().image).tobytes() == shown().plot().tobytes()
    with pytest.raises(InputError, match=r"expected the image's \(height, width\): \(10, 20\)"):
        bare.plot(Image.new("RGB", (20, 10)))


def test_a_plot_of_many_labels_has_an_end():
    many = Localization(tuple(map(str, range(300))), torch.rand(300, 2, 2), Size(64, 64), scores=torch.rand(300))
    assert many.plot().width < 2500


@pytest.mark.parametrize(("name", "form"), [("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.webp", "WEBP")])
def test_a_result_is_saved_as_an_image(name, form, tmp_path):
    shown().save(tmp_path / "deep" / name)
    with Image.open(tmp_path / "deep" / name) as image:
        assert image.format == form and image.size == shown().plot().size


def test_a_result_is_saved_as_json_and_other_endings_are_refused(tmp_path):
    shown().save(str(tmp_path / "cat.json"), threshold=0.7)
    assert json.loads((tmp_path / "cat.json").read_text()) == shown().to_dict(threshold=0.7)
    for name in ("cat.txt", "cat"):
        with pytest.raises(InputError, match=r"ends with .png, .jpg, .webp or .json"):
            shown().save(tmp_path / name)


def test_a_dictionary_has_labels_and_objects():
    found = shown()
    told = json.loads(found.to_json())
    assert told == found.to_dict()
    assert told["size"] == {"height": 120, "width": 160}
    point = found.points()[0].tolist()
    assert told["labels"][0] == {"label": "cat", "score": 0.31, "presence": 0.98, "present": True, "point": point}
    assert [entry["present"] for entry in told["labels"]] == [True, False]
    [cat] = told["objects"]
    [expected] = found.objects()
    assert (cat["label"], cat["box"], cat["point"], cat["mask"]) == ("cat", [*expected.box], point, expected.rle)
    assert {obj["label"] for obj in found.to_dict(presence=0, masks=False)["objects"]} == {"cat", "dog"}
    assert "mask" not in found.to_dict(masks=False)["objects"][0]


def test_a_table_of_pandas_has_a_row_per_object():
    table = shown().to_pandas(presence=0)
    assert table.label.tolist() == ["cat", "dog"]
    columns = ["left", "top", "right", "bottom", "x", "y", "score"]
    expected = [[*obj.box, *(obj.point or ()), obj.score] for obj in shown().objects(presence=0)]
    assert table[columns].to_numpy().tolist() == expected
    assert len(shown(presence=torch.zeros(2)).to_pandas()) == 0


def test_detections_of_supervision_are_the_objects():
    pytest.importorskip("supervision")
    found: Any = shown().to_supervision(presence=0)
    objects = shown().objects(presence=0)
    assert found.data["class_name"].tolist() == ["cat", "dog"]
    assert found.xyxy.tolist() == [list(obj.box) for obj in objects]
    assert all((mask == obj.mask).all() for mask, obj in zip(found.mask, objects, strict=True))


def test_one_label_by_itself_is_what_it_is_among_all(localizer):
    vocabulary = Vocabulary.of(SYNONYMS).with_background("sky")
    found = localizer(PICTURE, vocabulary)
    for index, label in enumerate(found.labels):
        alone = found[label]
        assert alone.labels == (label,) == found[index].labels
        for scale in ("minmax", "cosine", "probability"):
            close(alone.heatmaps(scale)[0], found.heatmaps(scale)[label], 1e-6)
        assert torch.equal(alone.segment() == 0, found.segment() == index)
        assert torch.equal(alone.points()[0], found.points()[index])
        assert [obj.box for obj in alone.objects(presence=0)] == [
            obj.box for obj in found.objects(presence=0) if obj.label == label
        ]
        assert alone.scores is not None and found.scores is not None and alone.scores[0] == found.scores[index]
        assert alone.vocabulary is not None and alone.vocabulary.prompts == (vocabulary.prompts[index],)
    assert len(list(found)) == len(found.labels)
    with pytest.raises(PromptError, match="no label 'cow'"):
        found["cow"]
    with pytest.raises(IndexError):
        found[len(found.labels)]


def test_one_label_of_merged_maps(localizer):
    found = replace(localizer, views=VIEWS["all"])(PICTURE, ["cat", "dog", "sky"])
    close(found["dog"].heatmaps("probability")[0], found.heatmaps("probability")["dog"], 1e-6)


def test_a_pickle_has_the_result_and_nothing_that_was_made_of_it(localizer):
    found = replace(localizer(PICTURE, ["cat", "dog"]), image=None)
    before = len(pickle.dumps(found))
    found.segment()
    data = pickle.dumps(found)
    assert len(data) == before
    again = pickle.loads(data)
    assert torch.equal(again.segment(), found.segment()) and again.labels == found.labels


def test_looking_at_a_result_is_what_imports_heavy_packages():
    code = """
import sys, torch
from open_gem.localization import Localization
from open_gem.types import Size
found = Localization(("cat",), torch.rand(1, 2, 2), Size(9, 9))
repr(found), found.to_dict()
print([name for name in ("matplotlib", "pandas", "supervision") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
