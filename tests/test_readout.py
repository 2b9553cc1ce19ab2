"""Each readout against a loop that a student could write."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from open_gem import readout
from open_gem.errors import InputError
from open_gem.readout import Components, components, min_max, peak, peak_inside, upsample, whole
from open_gem.tensors import at_least_float32, similarity
from open_gem.types import Size

SIZES = [Size(7, 11), Size(32, 48), Size(37, 53), Size(3, 4), Size(2, 2), Size(1, 9)]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


# Similarity -----------------------------------------------------------------------------------------------------------


def test_similarity_is_the_cosine_of_each_pair():
    patches, text = random(2, 5, 6, scale=30), random(3, 6, seed=1, scale=0.01)
    ours = similarity(patches, text)
    assert ours.shape == (2, 3, 5)
    close(similarity(patches[1], text), ours[1])
    for image in range(2):
        for prompt in range(3):
            for patch in range(5):
                a, b = patches[image, patch].tolist(), text[prompt].tolist()
                dot = sum(x * y for x, y in zip(a, b, strict=True))
                expected = dot / math.hypot(*a) / math.hypot(*b)
                assert ours[image, prompt, patch].item() == pytest.approx(expected, abs=1e-6)


def test_a_patch_of_zeros_is_like_nothing():
    assert torch.equal(similarity(torch.zeros(2, 4), random(3, 4)), torch.zeros(3, 2))


# Upsampling -----------------------------------------------------------------------------------------------------------


def bilinear(grid_map: Tensor, size: Size) -> Tensor:
    """Pixel centres at (i + ½) · grid / pixels − ½, clamped to the centres of the border cells."""
    values = grid_map.tolist()

    def neighbours(index: int, pixels: int, cells: int) -> tuple[int, int, float]:
        place = min(max((index + 0.5) * cells / pixels - 0.5, 0), cells - 1)
        low = int(place)
        return low, min(low + 1, cells - 1), place - low

    output = torch.empty(*size)
    for y in range(size.height):
        top, bottom, down = neighbours(y, size.height, len(values))
        for x in range(size.width):
            left, right, along = neighbours(x, size.width, len(values[0]))
            upper = values[top][left] * (1 - along) + values[top][right] * along
            lower = values[bottom][left] * (1 - along) + values[bottom][right] * along
            output[y, x] = upper * (1 - down) + lower * down
    return output


@pytest.mark.parametrize("size", SIZES)
def test_upsample_is_bilinear_with_corners_not_aligned(size):
    maps = random(3, 4, 6)
    ours = upsample(maps, size)
    assert ours.shape == (3, *size)
    for one, upsampled in zip(maps, ours, strict=True):
        close(upsampled, bilinear(one, size), 5e-6)
        close(upsample(one, size), upsampled)
        expected = interpolate(one[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
        close(upsampled, expected)


# One map --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_min_max_spans_zero_to_one_and_keeps_the_order(scale):
    heatmap = random(9, 13, scale=scale) - 3 * scale
    ours = min_max(heatmap)
    assert (ours.min().item(), ours.max().item()) == (0.0, 1.0)
    low, high = heatmap.min(), heatmap.max()
    close(ours, (heatmap - low) / (high - low))
    assert ours.argmax() == heatmap.argmax()
    assert ours.argmin() == heatmap.argmin()


@pytest.mark.parametrize("value", [0.0, -0.3, 1e9])
def test_nothing_stands_out_in_a_constant_map(value):
    assert torch.equal(min_max(torch.full((3, 4), value)), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.3, np.float64(0.3), 1, math.inf])
def test_above_is_what_torch_says(dtype, threshold):
    values = torch.tensor([[0.1, 0.3, 0.5], [math.nan, math.inf, -math.inf]], dtype=dtype, requires_grad=True)
    assert torch.equal(readout.above(values, threshold), at_least_float32(values) > float(threshold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rounding_of_an_upsampled_constant_is_not_stretched(dtype):
    for value in (-0.1, 0.217, 0.3):
        for size in (Size(37, 53), Size(300, 400)):
            assert not min_max(upsample(torch.full((14, 14), value, dtype=dtype), size)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_faint_map_is_still_stretched(dtype):
    """Noise is a few units of the last place; a hundredth of a cosine is not noise."""
    faint = min_max(upsample(torch.tensor([[0.25, 0.26], [0.25, 0.26]], dtype=dtype), Size(8, 8)))
    assert (faint.min(), faint.max()) == (0, 1)


def test_what_is_no_number_stays_none():
    broken = torch.tensor([[0.1, float("nan")], [0.3, 0.5]])
    assert min_max(broken).isnan().all()


def test_peak_is_x_then_y_and_the_first_among_equals():
    heatmap = torch.zeros(5, 8)
    assert peak(heatmap) == (0, 0)
    heatmap[4, 1] = heatmap[3, 7] = heatmap[3, 6] = 1
    assert peak(heatmap) == (6, 3)
    heatmap[1, 7] = 2
    assert peak(heatmap) == (7, 1)


def test_the_peak_inside_a_region_is_x_then_y_and_the_first_among_equals():
    values, region = np.zeros((5, 8), np.float32), np.zeros((5, 8), bool)
    values[0, 0] = 9  # outside
    region[2:, 3:] = True
    assert peak_inside(values, region) == (3, 2)
    values[4, 5] = values[3, 7] = 1
    assert peak_inside(values, region) == (7, 3)


# Components -----------------------------------------------------------------------------------------------------------


def flood(mask: Tensor) -> list[set[tuple[int, int]]]:
    """The pixels (y, x) of each component, in reading order, by flooding from every pixel not yet wet."""
    dry = {(y, x) for y, x in mask.nonzero().tolist()}
    parts = []
    while dry:
        wet, front = set(), [min(dry)]
        dry.discard(front[0])
        while front:
            y, x = front.pop()
            wet.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & dry
            dry -= near
            front += near
        parts.append(wet)
    return parts


def pixels_of(parts: Components) -> list[set[tuple[int, int]]]:
    numbers = range(1, len(parts.spans) + 1)
    return [{(y, x) for y, x in np.argwhere(parts.labels == number).tolist()} for number in numbers]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_components_are_those_of_a_flood_fill(seed, share):
    mask = torch.rand(9, 14, generator=torch.Generator().manual_seed(seed + 100)) < share
    ours = components(mask)
    assert pixels_of(ours) == flood(mask)
    for part, (rows, columns) in zip(pixels_of(ours), ours.spans, strict=True):
        ys, xs = zip(*part, strict=True)
        assert (rows, columns) == (slice(min(ys), max(ys) + 1), slice(min(xs), max(xs) + 1))


def test_corners_touch():
    mask = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert components(mask).spans == [(slice(0, 2), slice(0, 2)), (slice(0, 1), slice(4, 5))]


@pytest.mark.parametrize("numbering", [components, whole])
def test_an_empty_mask_has_no_component_and_a_full_one_is_one(numbering):
    assert numbering(torch.zeros(4, 6, dtype=torch.bool)).spans == []
    assert numbering(torch.ones(4, 6, dtype=torch.bool)).spans == [(slice(0, 4), slice(0, 6))]


@pytest.mark.parametrize("seed", range(4))
def test_the_whole_mask_is_one_component(seed):
    mask = torch.zeros(9, 14, dtype=torch.bool)
    mask[1:7, 2:12] = torch.rand(6, 10, generator=torch.Generator().manual_seed(seed)) < 0.1
    [pixels] = pixels_of(whole(mask))
    assert pixels == {(y, x) for y, x in mask.nonzero().tolist()}


# The label map --------------------------------------------------------------------------------------------------------


def segment(grid_logits: Tensor, size: Size, background: float | None) -> Tensor:
    """One label a phrase, from logits on the patch grid."""
    found = readout.softmax_argmax(upsample(logit, size) for logit in grid_logits)
    return readout.segment(found, range(len(grid_logits)), background)


def dense_segment(grid_logits: Tensor, size: Size, background: float | None) -> Tensor:
    """All maps at once, in double: what `segment` must be without ever holding them."""
    logits = interpolate(grid_logits[None].double(), size=tuple(size), mode="bilinear", align_corners=False)[0]
    probability, label = logits.softmax(dim=0).max(dim=0)
    return label if background is None else label.masked_fill(probability < background, -1)


@pytest.mark.parametrize("background", [None, 0.0, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("prompts", [2, 7])
def test_segment_is_softmax_and_argmax_over_the_upsampled_logits(prompts, scale, background):
    logits = random(prompts, 4, 6, seed=prompts, scale=scale)
    ours = segment(logits, Size(29, 41), background)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, dense_segment(logits, Size(29, 41), background))


def test_segment_has_both_labels_and_background_to_tell_apart():
    """The comparison above means something: labels and background both occur, at every threshold between."""
    for background in (0.3, 0.5, 0.8):
        found = segment(random(7, 4, 6, seed=7, scale=4.0), Size(29, 41), background).unique().tolist()
        assert -1 in found
        assert len(found) > 4


def test_labels_do_not_depend_on_the_order_of_prompts():
    logits = random(6, 4, 5, scale=3)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    first, shuffled = segment(logits, Size(20, 30), 0.6), segment(logits[order], Size(20, 30), 0.6)
    assert torch.equal(torch.where(shuffled < 0, -1, order[shuffled]), first)


@pytest.mark.parametrize("background", [None, 0.0, 0.8, 1.0])
def test_one_prompt_is_everywhere(background):
    assert torch.equal(segment(random(1, 3, 3), Size(8, 9), background), torch.zeros(8, 9, dtype=torch.int64))


@pytest.mark.parametrize(("background", "label"), [(None, 0), (0.5, 0), (0.51, -1)])
def test_the_first_of_two_equals_with_half_the_probability_each(background, label):
    logits = random(1, 3, 3, scale=5).expand(2, 3, 3)
    assert torch.equal(segment(logits, Size(6, 6), background), torch.full((6, 6), label))


@pytest.mark.parametrize("offset", [-1e4, 1e4, 1e30])
def test_huge_logits_do_not_overflow(offset):
    logits = torch.tensor([0.0, offset, 0.5 * offset])[:, None, None].expand(3, 2, 2)
    best = int(logits[:, 0, 0].argmax())
    assert torch.equal(segment(logits, Size(4, 4), 0.99), torch.full((4, 4), best))
    equal = torch.full((3, 2, 2), offset)
    assert torch.equal(segment(equal, Size(4, 4), 0.3), torch.zeros(4, 4, dtype=torch.int64))  # 1/3 each
    assert torch.equal(segment(equal, Size(4, 4), 0.4), torch.full((4, 4), -1))


def test_half_logits_are_worked_on_in_full_precision():
    logits = random(50, 7, 9, scale=30).half()
    expected = dense_segment(logits.float(), Size(60, 80), 0.9)
    assert torch.equal(segment(logits, Size(60, 80), 0.9), expected)
    assert -1 in expected


@pytest.mark.parametrize("background", [None, 0.3])
def test_phrases_of_one_label_share_it_and_those_of_the_background_have_none(background):
    """As the field's evaluators: softmax over all phrases, the best of a label's counts, not their sum."""
    logits, groups, size = random(6, 4, 5, scale=2), [0, 0, 1, 2, -1, -1], Size(13, 17)
    probability = interpolate(logits[None], size=tuple(size), mode="bilinear")[0].softmax(dim=0)
    by_label = torch.stack(
        [probability[[i for i, g in enumerate(groups) if g == label]].amax(0) for label in (-1, 0, 1, 2)]
    )
    best, label = by_label.max(dim=0)
    expected = label - 1 if background is None else (label - 1).masked_fill(best < background, -1)
    found = readout.softmax_argmax(upsample(logit, size) for logit in logits)
    assert torch.equal(readout.segment(found, groups, background), expected)
    assert expected.unique().tolist() == [-1, 0, 1, 2]


def test_the_mass_is_the_softmaxs_denominator():
    logits = random(9, 5, 6, scale=40)
    found = readout.softmax_argmax(logits)
    close(found.log_sum_exp, logits.logsumexp(dim=0), 1e-4)
    assert torch.equal(found.best, logits.amax(0))
    assert torch.equal(found.winner, logits.argmax(0))


@pytest.mark.parametrize("cells", [1, 500, 1 << 18])
@pytest.mark.parametrize("size", [Size(29, 41), Size(3, 100), Size(4, 6), Size(2, 3), Size(1, 1)])
@pytest.mark.parametrize("prompts", [1, 9])
def test_a_contest_on_the_grid_is_that_of_upsampled_maps(prompts, size, cells, monkeypatch):
    monkeypatch.setattr(readout, "CELLS", cells)
    logits = random(prompts, 4, 6, seed=3, scale=20)
    ours, theirs = (
        readout.grid_softmax_argmax(logits, size),
        readout.softmax_argmax(upsample(logit, size) for logit in logits),
    )
    close(ours.best, theirs.best, 3e-5)  # of values up to 60
    close(ours.log_sum_exp, theirs.log_sum_exp, 3e-5)
    assert torch.equal(ours.winner, theirs.winner)


def test_a_contest_on_the_grid_keeps_the_first_of_equals_and_what_is_not_a_number():
    logits = random(1, 3, 3).expand(5, 3, 3).clone()
    assert readout.grid_softmax_argmax(logits, Size(7, 8)).winner.unique().tolist() == [0]
    logits[3, 0, 0] = torch.nan
    assert readout.grid_softmax_argmax(logits, Size(7, 8)).best.isnan().any()


@pytest.mark.parametrize("size", [Size(29, 41), Size(3, 100), Size(4, 6), Size(2, 3), Size(1, 1)])
@pytest.mark.parametrize("prompts", [1, 2, 300])
@pytest.mark.parametrize("cells", [1, 3000, 1 << 18])
def test_the_winners_alone_are_those_of_all_prompts(prompts, size, cells, monkeypatch):
    monkeypatch.setattr(readout, "CELLS", cells)
    logits = random(prompts, 4, 6, seed=4, scale=20)
    best, winner = readout.grid_argmax(logits, size)
    expected = readout.grid_softmax_argmax(logits, size)
    assert torch.equal(best, expected.best)
    assert torch.equal(winner, expected.winner)


def test_few_prompts_can_win_between_four_patches(monkeypatch):
    widths = []
    theirs = readout._candidates

    def counted(*rows):
        for columns, prompts in theirs(*rows):
            widths.append(prompts.shape[1])
            yield columns, prompts

    monkeypatch.setattr(readout, "_candidates", counted)
    smooth = upsample(random(500, 3, 3, seed=5, scale=20), Size(12, 12))  # as neighbours are in a map
    readout.grid_argmax(smooth, Size(100, 100))
    assert 1 < max(widths) < 50


def test_winners_alone_keep_the_first_of_equals_and_what_is_not_a_number():
    logits = random(1, 3, 3).expand(5, 3, 3).clone()
    assert readout.grid_argmax(logits, Size(7, 8))[1].unique().tolist() == [0]
    logits[3, 0, 0] = torch.nan
    assert readout.grid_argmax(logits, Size(7, 8))[0].isnan().any()


# Redundancy -----------------------------------------------------------------------------------------------------------


def test_redundancy_removal_is_clip_surgerys_in_closed_form():
    """The published way: the product of features and texts, element by element, less its mean over the phrases."""
    patches, text, pooled = (random(*shape, seed=seed) for seed, shape in enumerate([(12, 8), (5, 8), (8,)]))
    patches, text, pooled = (some / some.norm(dim=-1, keepdim=True) for some in (patches, text, pooled))
    weights = (2 * pooled @ text.T).softmax(-1)
    weights = weights / weights.mean()
    features = patches[:, None] * text * weights[:, None]
    expected = (features - features.mean(1, keepdim=True)).sum(-1)
    maps = (text @ patches.T).unflatten(-1, (3, 4))
    ours = readout.remove_redundancy(maps, text @ pooled)
    close(ours, expected.T.unflatten(-1, (3, 4)))
    close(readout.remove_redundancy(torch.stack([maps, 2 * maps]), text @ pooled)[1], 2 * ours)


def test_of_one_phrase_nothing_is_left():
    assert torch.equal(readout.remove_redundancy(random(1, 3, 4), random(1)), torch.zeros(1, 3, 4))


def test_each_region_gets_the_label_of_most_of_its_pixels():
    labels = torch.tensor([[0, 0, 2, -1], [1, 0, 2, -1], [1, 2, 2, 5]])
    regions = torch.tensor([[9, 9, 4, 4], [9, 9, 4, 4], [0, 0, 4, 4]])
    expected = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 2], [1, 2, 2, 2]])
    assert torch.equal(readout.majority(labels, regions), expected)
    with pytest.raises(InputError, match=r"regions are \(2, 2\) pixels, labels \(3, 4\): expected the same"):
        readout.majority(labels, torch.zeros(2, 2, dtype=torch.int64))
