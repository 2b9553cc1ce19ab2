"""Each metric against a loop that a student could write, and against itself in parts."""

import json
import math
from collections import defaultdict
from fractions import Fraction
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from open_gem.errors import InputError
from open_gem.evaluation.metrics import contrast as contrast_module
from open_gem.evaluation.metrics import intervals as intervals_module
from open_gem.evaluation.metrics.contrast import Sides, object_contrast, patch_similarity, text_contrast, to_grid
from open_gem.evaluation.metrics.counts import Records, mean_counts
from open_gem.evaluation.metrics.intervals import bootstrap, bootstrap_difference, interval, resample
from open_gem.evaluation.metrics.objects import boundary_overlap, box_overlap, mask_overlap, pointing_game
from open_gem.evaluation.metrics.points import image_means, pair_means, point_counts
from open_gem.evaluation.metrics.scores import (
    class_iou,
    frequency_weighted_iou,
    mean_accuracy,
    mean_iou,
    micro_iou,
    pixel_accuracy,
    point_accuracy,
    ratio,
)
from open_gem.evaluation.metrics.segmentation import boundary_counts, region_counts
from open_gem.evaluation.tasks import scores
from open_gem.types import Grid

REGION_SCORES = [mean_iou, micro_iou, pixel_accuracy, mean_accuracy, frequency_weighted_iou]


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def mean_of(counts) -> float:
    """The mean that counts of (sum, count) stand for."""
    [(total, count)] = counts.values()
    return total / count


# One object -----------------------------------------------------------------------------------------------------------


def test_pointing_game_reads_x_then_y():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[:, 1, 5] = True
    assert pointing_game(torch.tensor([[5, 1], [1, 3]]), mask) == {0: (1, 2)}
    with pytest.raises(InputError, match="x below 6 and y below 4"):
        pointing_game(torch.tensor([[1, 5], [1, 3]]), mask)
    assert pointing_game(torch.tensor([[5.9, 1.9], [1.0, 3.0]]), mask) == {0: (1, 2)}
    for off in (-0.5, torch.nan):
        with pytest.raises(InputError, match="x below 6 and y below 4"):
            pointing_game(torch.tensor([[off, 1.0], [1.0, 3.0]]), mask)
    with pytest.raises(InputError, match="masks of type uint8 given, expected bool"):
        pointing_game(torch.tensor([[5, 1], [1, 3]]), mask.to(torch.uint8))


def test_mask_overlap_against_a_loop(random):
    predicted, true = torch.rand(2, 5, 7, 9, generator=random) > 0.6
    expected = 0.0
    for one, other in zip(predicted, true, strict=True):
        pairs = list(zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
        expected += sum(p and t for p, t in pairs) / sum(p or t for p, t in pairs)
    assert mask_overlap(predicted, true) == {0: (pytest.approx(expected), 5)}
    assert mask_overlap(torch.zeros(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)) == {0: (1, 1)}
    with pytest.raises(InputError, match="one shape"):
        mask_overlap(predicted, true[:, :3])
    for dtype in (torch.uint8, torch.float32):
        with pytest.raises(InputError, match="expected bool"):
            mask_overlap(predicted, true.to(dtype))


def test_box_overlap_against_pixels_and_torchvision(random):
    from torchvision.ops import box_iou

    corners = torch.randint(0, 12, (40, 2, 4), generator=random)
    boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:] + 1], dim=-1)
    expected = []
    for (left, top, right, bottom), (x0, y0, x1, y1) in boxes.tolist():
        one, other = (set() for _ in range(2))
        for y in range(30):
            for x in range(30):
                one |= {(x, y)} if left <= x < right and top <= y < bottom else set()
                other |= {(x, y)} if x0 <= x < x1 and y0 <= y < y1 else set()
        expected.append(len(one & other) / len(one | other))
    assert 0 < sum(iou == 0 for iou in expected) < 40
    predicted, true = boxes[:, 0], boxes[:, 1]
    spare = torch.tensor([[0, 0, 30, 30]])  # worse boxes do not matter
    assert box_overlap([torch.cat([box[None], spare]) for box in predicted], true) == mean_counts(expected)
    paired = box_iou(predicted.double(), true.double()).diagonal()
    assert mean_of(box_overlap([box[None] for box in predicted], true)) == pytest.approx(paired.mean().item())


def test_a_missing_box_agrees_only_with_a_missing_true_box():
    none = torch.zeros(0, 4)
    assert box_overlap([none, none], torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])) == {0: (1, 2)}
    with pytest.raises(InputError, match="as many"):
        box_overlap([none], torch.zeros(2, 4))


# What adds ------------------------------------------------------------------------------------------------------------


def test_means_keep_exact_sums():
    order = Random(1)
    values = [order.random() * 10 ** order.randrange(-12, 3) for _ in range(40)]
    assert sum(values) != sum(values[::-1])  # floats would not
    assert mean_counts(values) == mean_counts(values[::-1]) == {0: (float(sum(map(Fraction, values))), 40)}


def test_means_of_nothing():
    assert mean_counts([]) == mean_counts([math.nan]) == {}
    assert mean_counts([0.5, math.nan, 0.25]) == {0: (0.75, 2)}
    assert str(mean_counts([0.5, 0.5])) == "{0: (1, 2)}"  # whole sums are whole numbers
    with pytest.raises(InputError, match="finite"):
        mean_counts([math.inf])


def region_records(images=30, classes=5, seed=0) -> Records:
    """Some classes rare, some images empty, ids out of order."""
    order = Random(seed)
    rows = {}
    for image in range(images):
        seen = [c for c in range(classes) if order.random() < 0.6 / (c + 1)]
        rows[f"{order.randrange(10**6):06d}-{image}"] = {
            c: (order.randrange(50), order.randrange(50), order.randrange(50)) for c in seen
        }
    return Records(rows)


def mean_records(seed=0) -> Records:
    order = Random(seed)
    return Records({f"{i:03d}": mean_counts([order.random() for _ in range(i % 3)]) for i in range(40)})


def shuffled(records: Records, seed: int) -> Records:
    """The same records, their images and classes in another order."""
    order = Random(seed)
    images = order.sample(list(records.rows.items()), len(records.rows))
    rows: dict[str, Any] = {image: dict(order.sample(list(row.items()), len(row))) for image, row in images}
    return Records(rows)


@pytest.mark.parametrize("records", [region_records(), mean_records()], ids=["regions", "means"])
def test_the_order_of_counting_does_not_matter(records):
    stored = json.dumps(records.to_json())
    for seed in range(4):
        again = shuffled(records, seed)
        assert json.dumps(again.to_json()) == stored
        assert again.total.tolist() == records.total.tolist()
        for score in [ratio] if records.total.shape[1] == 2 else REGION_SCORES:
            assert again.value(score) == records.value(score)
            assert bootstrap(again, score, samples=20) == bootstrap(records, score, samples=20)
    assert Records.from_json(json.loads(stored)) == records


def test_totals_against_a_loop():
    records = region_records()
    for label, total in zip(records.classes, records.total.tolist(), strict=True):
        expected = [0.0, 0.0, 0.0]
        for row in records.rows.values():
            for k, count in enumerate(row.get(label, (0, 0, 0))):  # type: ignore[arg-type]
                expected[k] += count
        assert total == expected
    assert records.total.dtype == np.int64
    means = mean_records()
    assert means.total[0, 0] == math.fsum(row[0][0] for row in means.rows.values() if row)  # type: ignore[index]
    assert means.value(ratio) == means.total[0, 0] / means.total[0, 1]


def test_empty_and_malformed_records():
    assert math.isnan(Records().value(mean_iou))
    assert math.isnan(Records({"seen": {}}).value(mean_iou))
    assert Records().total.shape == (0, 0)
    with pytest.raises(InputError, match="same number"):
        Records({"a": {0: (1, 2, 3), 1: (1, 2)}})
    with pytest.raises(InputError, match="int, str given"):
        Records({"a": {0: (1,)}, "b": {"cat": (1,)}})
    for count in (math.nan, math.inf, np.int64(1), "1"):
        with pytest.raises(InputError, match="image 'a'"):
            Records({"a": {0: (count,)}})  # type: ignore[dict-item]
    for stored in ([], {"a": 3}, {"a": [[]]}, {"a": [3]}, {"a": [[0, "1"]]}):
        with pytest.raises(InputError, match="expected"):
            Records.from_json(stored)  # type: ignore[arg-type]


# Label maps -----------------------------------------------------------------------------------------------------------

CLASSES, IGNORE = 5, 255


def label_maps(random, shape=(6, 8, 8), nobody=0.1, void=0.2):
    """The last class occurs nowhere; some pixels are given to no class, some are void."""
    predicted = torch.randint(0, CLASSES - 1, shape, generator=random)
    true = torch.randint(0, CLASSES - 1, shape, generator=random)
    predicted[torch.rand(shape, generator=random) < nobody] = -1
    true[torch.rand(shape, generator=random) < void] = IGNORE
    return predicted, true


def slow_region_counts(predicted: Tensor, true: Tensor, c: int) -> tuple[int, int, int]:
    hits = missed = false = 0
    for p, t in zip(predicted.flatten().tolist(), true.flatten().tolist(), strict=True):
        if t != IGNORE:
            hits += p == c and t == c
            false += p == c and t != c
            missed += p != c and t == c
    return hits, false, missed


def test_scores_of_label_maps_against_a_loop(random):
    predicted, true = label_maps(random)
    counts = {c: slow_region_counts(predicted, true, c) for c in range(CLASSES)}
    ious, accuracies, pixels, weighted, hit = [], [], 0, 0.0, 0
    for hits, false, missed in list(counts.values())[:-1]:
        ious.append(hits / (hits + missed + false))
        accuracies.append(hits / (hits + missed))
        weighted += (hits + missed) * ious[-1]
        pixels += hits + missed
        hit += hits
    assert pixels == (true != IGNORE).sum()
    row = region_counts(predicted, true, CLASSES)
    assert row == {c: counts[c] for c in range(CLASSES - 1)}
    table = by_class(row)
    assert mean_iou(table) == pytest.approx(sum(ious) / len(ious))
    assert class_iou(table)[:-1].tolist() == pytest.approx(ious)
    assert np.isnan(class_iou(table)[-1])
    assert pixel_accuracy(table) == pytest.approx(hit / pixels)
    assert mean_accuracy(table) == pytest.approx(sum(accuracies) / len(accuracies))
    assert frequency_weighted_iou(table) == pytest.approx(weighted / pixels)
    everything = np.array(list(counts.values())).sum(0)
    assert micro_iou(table) == pytest.approx(everything[0] / everything.sum())


def by_class(row) -> np.ndarray:
    """Counts as scores take them, `(classes, 3)`."""
    return np.array([row.get(label, (0, 0, 0)) for label in range(CLASSES)])


def test_counts_of_images_add_up_to_those_of_all(random):
    predicted, true = label_maps(random)
    pairs = zip(predicted, true, strict=True)
    records = Records({str(image): region_counts(*pair, CLASSES) for image, pair in enumerate(pairs)})
    whole = by_class(region_counts(predicted, true, CLASSES))
    assert records.total.tolist() == whole[:-1].tolist()
    for score in REGION_SCORES:
        assert records.value(score) == score(whole)


def test_mean_iou_is_that_of_torchmetrics(random):
    metric = pytest.importorskip("torchmetrics.classification").MulticlassJaccardIndex(
        num_classes=CLASSES, average="macro", ignore_index=IGNORE
    )
    predicted, true = label_maps(random, nobody=0)
    for p, t in zip(predicted, true, strict=True):
        metric.update(p, t)
    ours = mean_iou(by_class(region_counts(predicted, true, CLASSES)))
    assert ours == pytest.approx(metric.compute().item(), abs=1e-6)


def test_accuracies_are_those_of_scikit_learn(random):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score

    predicted, true = label_maps(random, nobody=0, void=0)
    ours, flat = (
        by_class(region_counts(predicted, true, CLASSES)),
        (true.flatten().tolist(), predicted.flatten().tolist()),
    )
    assert pixel_accuracy(ours) == pytest.approx(accuracy_score(*flat))
    assert mean_accuracy(ours) == pytest.approx(balanced_accuracy_score(*flat))
    assert mean_iou(ours) == pytest.approx(jaccard_score(*flat, average="macro"))
    assert frequency_weighted_iou(ours) == pytest.approx(jaccard_score(*flat, average="weighted"))
    assert micro_iou(ours) == pytest.approx(jaccard_score(*flat, average="micro"))


def test_nothing_counted_has_no_score():
    void = torch.full((3, 3), IGNORE)
    assert region_counts(void, void, CLASSES) == {}
    for score in REGION_SCORES:
        assert np.isnan(score(np.zeros((CLASSES, 3))))
    only_false = by_class(region_counts(torch.tensor([1]), torch.tensor([0]), 3))
    assert class_iou(only_false)[:2].tolist() == [0, 0]
    assert mean_accuracy(only_false) == 0


def test_impossible_labels_are_refused():
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(InputError, match="predicted labels from 0 to 7 given, expected -1 to 4"):
        region_counts(torch.tensor([[0, 7], [0, 0]]), zeros, CLASSES)
    for label in (-1, 5):
        with pytest.raises(InputError, match="true labels"):
            region_counts(zeros, torch.tensor([[0, label], [0, 0]]), CLASSES)
    with pytest.raises(InputError, match="one shape"):
        region_counts(zeros, zeros[0], CLASSES)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.uint32])
def test_all_integer_types_of_labels_count_alike(dtype, random):
    predicted, true = label_maps(random, nobody=0)
    small = region_counts(predicted.to(dtype), true.to(dtype), CLASSES)
    assert small == region_counts(predicted, true, CLASSES)
    assert boundary_counts(predicted[0].to(dtype), true[0].to(dtype), CLASSES) == boundary_counts(
        predicted[0], true[0], CLASSES
    )


@pytest.mark.parametrize("count", [region_counts, boundary_counts])
def test_labels_that_are_not_integers_are_refused(count):
    """0.9 is not class 0."""
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        with pytest.raises(InputError, match=f"predicted labels of type {kind} given, expected whole numbers"):
            count(torch.full((2, 2), 0.9, dtype=dtype), zeros, CLASSES)
        with pytest.raises(InputError, match=f"true labels of type {kind} given"):
            count(zeros, zeros.to(dtype), CLASSES)


# Boundaries -----------------------------------------------------------------------------------------------------------


def band(mask: Tensor, d: int) -> set[tuple[int, int]]:
    """Pixels of the mask that d erosions with a 3 × 3 square take away, one at a time, the outside being no mask."""
    pixels = {(y, x) for y, x in mask.nonzero().tolist()}
    left = pixels
    for _ in range(d):
        left = {(y, x) for y, x in left if all((y + i, x + j) in left for i in (-1, 0, 1) for j in (-1, 0, 1))}
    return pixels - left


def blobs(random, height: int, width: int, count: int = 4) -> Tensor:
    """Overlapping rectangles of random classes, so that masks have insides."""
    labels = torch.zeros(height, width, dtype=torch.int64)
    for _ in range(count):
        (y, x), c = (
            (torch.rand(2, generator=random) * torch.tensor([height, width])).long(),
            torch.randint(0, CLASSES - 1, (1,), generator=random),
        )
        labels[y : y + height // 2, x : x + width // 2] = c
    return labels


@pytest.mark.parametrize(("height", "width", "part"), [(30, 41, 0.05), (37, 24, 0.02), (9, 9, 0.5), (1, 6, 0.1)])
def test_boundary_against_slow_erosion(random, height, width, part):
    d = max(1, round(part * math.hypot(height, width)))
    for _ in range(3):
        predicted, true = blobs(random, height, width), blobs(random, height, width)
        void = torch.rand(height, width, generator=random) < 0.01
        predicted[0, : width // 3], true = -1, torch.where(void, IGNORE, true)
        expected = {}
        for c in range(CLASSES):
            given, wanted = band((predicted == c) & ~void, d), band(true == c, d)
            counts = len(given & wanted), len(given - wanted), len(wanted - given)
            if any(counts):
                expected[c] = counts
        assert boundary_counts(predicted, true, CLASSES, width=part) == expected


@pytest.mark.parametrize("part", [0.02, 0.1])
def test_boundary_overlap_against_slow_erosion(random, part):
    predicted, true = (torch.stack([blobs(random, 30, 40) == 0 for _ in range(6)]) for _ in range(2))
    true[0] = predicted[0]
    predicted[1], true[1] = False, False
    expected = []
    for one, other in zip(predicted, true, strict=True):
        bands = [band(mask, max(1, round(part * 50))) for mask in (one, other)]
        union = bands[0] | bands[1]
        expected.append(len(bands[0] & bands[1]) / len(union) if union else 1.0)
    assert mean_of(boundary_overlap(predicted, true, width=part)) == pytest.approx(sum(expected) / 6)
    assert any(0 < value < 1 for value in expected)
    with pytest.raises(InputError, match="expected bool"):
        boundary_overlap(predicted.int(), true)


def test_boundary_iou_is_over_the_data_set(random):
    pictures = [(blobs(random, 30, 40), blobs(random, 30, 40)) for _ in range(4)]
    records = Records({str(i): boundary_counts(*pair, CLASSES) for i, pair in enumerate(pictures)})
    ious = []
    for c in range(CLASSES):
        both = either = 0
        for predicted, true in pictures:
            given, wanted = band(predicted == c, 1), band(true == c, 1)
            both, either = both + len(given & wanted), either + len(given | wanted)
        ious += [both / either] if either else []
    assert records.value(mean_iou) == pytest.approx(sum(ious) / len(ious))


def test_predictions_in_ignored_pixels_do_not_matter(random):
    true = blobs(random, 40, 40)
    true[10:13] = IGNORE
    for in_the_void in (-1, 0, 3):
        predicted = torch.where(true == IGNORE, in_the_void, true)
        row = boundary_counts(predicted, true, CLASSES, width=0.05)
        assert row and all(false == missed == 0 for _, false, missed in row.values())


def test_a_shift_costs_more_at_the_boundary():
    true = torch.zeros(60, 60, dtype=torch.int64)
    true[10:50, 10:50] = 1
    counts = np.array([boundary_counts(true.roll(2, 1), true, 2)[1], region_counts(true.roll(2, 1), true, 2)[1]])
    at_boundary, over_area = class_iou(counts)
    assert at_boundary < 0.6 < 0.9 < over_area


def test_boundary_takes_one_image():
    with pytest.raises(InputError, match="one image"):
        boundary_counts(torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, 3, 3, dtype=torch.uint8), 2)


# Points ---------------------------------------------------------------------------------------------------------------


def test_point_counts_against_a_loop(random):
    for trial in range(20):
        height, width = 5 + trial, 9
        mask = torch.rand(height, width, generator=random) > 0.5
        points = torch.rand(30, 2, generator=random, dtype=torch.float64)
        points[:2] = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        positive = torch.rand(30, generator=random) > 0.4
        counts = defaultdict(int)
        for (x, y), yes in zip(points.tolist(), positive.tolist(), strict=True):
            inside = mask[min(int(y * height), height - 1), min(int(x * width), width - 1)].item()
            counts[inside, yes] += 1
        expected = counts[True, True], counts[True, False], counts[False, True], counts[False, False]
        assert point_counts(mask, points, positive) == expected


def test_impossible_points_are_refused():
    mask, yes = torch.ones(4, 4, dtype=torch.bool), torch.tensor([True])
    with pytest.raises(InputError, match="no positive point"):
        point_counts(mask, torch.zeros(1, 2), ~yes)
    with pytest.raises(InputError, match=r"0\.0 to 1\.5 given"):
        point_counts(mask, torch.tensor([[0, 1.5]]), yes)
    with pytest.raises(InputError, match=r"\(q, 2\)"):
        point_counts(mask, torch.zeros(2, 2), yes)


def point_records(images=25, seed=0) -> Records:
    order = Random(seed)
    rows = {}
    for image in range(images):
        seen = [name for k, name in enumerate(("cat", "dog", "man", "tree")) if order.random() < 0.7 / (k + 1)]
        rows[f"{image:03d}"] = {
            name: (order.randrange(4), order.randrange(3), 1 + order.randrange(3), order.randrange(5)) for name in seen
        }
    return Records(rows)


def point_scores(records: Records) -> dict[str, float]:
    return {name: estimate.value for name, estimate in scores({"points": records}).items()}


def test_the_four_averages_of_points_against_a_loop():
    records = point_records()
    assert any(not row for row in records.rows.values())
    pooled = defaultdict(lambda: [0, 0])
    pairs, images, right, asked = [], [], 0, 0
    for row in records.rows.values():
        mine = []
        for label, (hits, false, missed, rejected) in row.items():
            pooled[label][0] += hits  # type: ignore[assignment]
            pooled[label][1] += hits + false + missed  # type: ignore[assignment]
            mine.append(Fraction(int(hits), int(hits + false + missed)))
            right, asked = right + hits + rejected, asked + hits + false + missed + rejected
        pairs += mine
        images += [sum(mine) / len(mine)] if mine else []
    ours = point_scores(records)
    assert ours == pytest.approx(
        {
            "class_pooled": sum(hits / union for hits, union in pooled.values()) / len(pooled),
            "pair_mean": float(sum(pairs) / len(pairs)),
            "image_mean": float(sum(images) / len(images)),
            "micro": sum(hits for hits, _ in pooled.values()) / sum(union for _, union in pooled.values()),
            "point_accuracy": right / asked,
        },
        rel=1e-14,
    )
    assert len({round(value, 6) for value in ours.values()}) == 5  # they do differ


def test_the_order_of_points_does_not_matter():
    records = point_records()
    assert point_scores(shuffled(records, 1)) == point_scores(records)
    tenths = {1: (1, 0, 9), 2: (2, 0, 8), 3: (3, 0, 7)}  # 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1
    one, other = Records({"a": tenths}), Records({"a": dict(list(tenths.items())[::-1])})
    assert pair_means(one) == pair_means(other)


def test_scores_of_the_wrong_counts_are_refused():
    with pytest.raises(InputError, match="expected 4: hits, false, missed, rejected"):
        point_accuracy(np.ones((2, 3)))
    with pytest.raises(InputError, match="expected 3"):
        mean_iou(np.ones((2, 2)))
    with pytest.raises(InputError, match="sum and count"):
        ratio(np.ones((2, 3)))


# Patches and masks on the grid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "grid"), [(12, 18, Grid(3, 6)), (13, 17, Grid(4, 3)), (5, 3, Grid(7, 4))])
def test_masks_on_the_grid_against_areas(random, height, width, grid):
    """Pixels are cut into `rows` × `cols` crumbs, of which a patch has height × width: no fractions anywhere."""
    masks = torch.rand(3, height, width, generator=random) > 0.45
    void = torch.rand(height, width, generator=random) > 0.6
    ours = to_grid(masks, grid, void)
    for index, mask in enumerate(masks):
        for patch in range(grid.patches):
            row, col = divmod(patch, grid.cols)
            area = empty = 0
            for y in range(row * height, (row + 1) * height):
                for x in range(col * width, (col + 1) * width):
                    area += mask[y // grid.rows, x // grid.cols].item()
                    empty += void[y // grid.rows, x // grid.cols].item()
            is_void, is_in = empty > height * width / 2, area > height * width / 2
            assert ours.inside[index, patch] == (is_in and not is_void)
            assert ours.outside[index, patch] == (not is_in and not is_void)
    without = to_grid(masks, grid)
    assert torch.equal(without.outside, ~without.inside)


def test_half_a_patch_is_not_inside():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :, :1] = True  # half of the left patches
    assert not to_grid(mask, Grid(2, 2)).inside.any()
    assert to_grid(mask, Grid(2, 2), void=mask[0]).outside.all()  # half void is not void
    mask[0, 0, 1] = True
    assert to_grid(mask, Grid(2, 2)).inside.tolist() == [[True, False, False, False]]
    with pytest.raises(InputError, match="expected"):
        to_grid(mask[0], Grid(2, 2))


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / norms if norms else 0.0


def features(random, n=14, e=3) -> Tensor:
    patches = torch.randn(n, e, generator=random, dtype=torch.float64) * torch.rand(n, 1, generator=random) * 40
    patches[3] = 0  # like nothing
    return patches


def test_patch_similarity_against_all_pairs(random):
    blocks = torch.stack([features(random), features(random) + 20])
    ours = patch_similarity(blocks)
    for block, value in zip(blocks.tolist(), ours.tolist(), strict=True):
        pairs = [cosine(a, b) for i, a in enumerate(block) for j, b in enumerate(block) if i != j]
        assert value == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert patch_similarity(torch.ones(5, 3)) == pytest.approx(1)
    assert patch_similarity(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(-1)  # nothing is clamped
    with pytest.raises(InputError, match="2 or more"):
        patch_similarity(torch.ones(1, 3))


def random_sides(random, p=6, n=14) -> Sides:
    inside = torch.rand(p, n, generator=random) > 0.6
    void = torch.rand(n, generator=random) > 0.8
    return Sides(inside & ~void, ~inside & ~void)


def michelson(within: list[float], across: list[float]) -> float:
    """Of lists of cosines, equations 7 to 9."""
    one, other = (sum(max(0.0, value) for value in values) / len(values) for values in (within, across))
    return (one - other) / (one + other) if one + other else 0.0


@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_object_contrast_against_all_pairs(random, monkeypatch, rows):
    monkeypatch.setattr(contrast_module, "ROWS", rows)
    patches, sides = features(random), random_sides(random)
    points = patches.tolist()
    ours = object_contrast(patches, sides).tolist()
    for value, inside, outside in zip(ours, sides.inside.tolist(), sides.outside.tolist(), strict=True):
        inner = [points[i] for i, yes in enumerate(inside) if yes]
        outer = [points[i] for i, yes in enumerate(outside) if yes]
        within = [cosine(a, b) for i, a in enumerate(inner) for j, b in enumerate(inner) if i != j]
        assert value == pytest.approx(michelson(within, [cosine(a, b) for a in inner for b in outer]), abs=1e-12)
    single = object_contrast(patches.float(), sides)
    torch.testing.assert_close(single, torch.tensor(ours, dtype=torch.float64), atol=1e-5, rtol=0)


def test_text_contrast_against_a_loop(random):
    patches, sides = features(random), random_sides(random)
    text = torch.randn(6, 3, generator=random, dtype=torch.float64)
    points, signs = patches.tolist(), set()
    for index, value in enumerate(text_contrast(patches, text, sides).tolist()):
        inner, outer = (
            [cosine(text[index].tolist(), points[i]) for i, yes in enumerate(side[index].tolist()) if yes]
            for side in sides
        )
        assert value == pytest.approx(michelson(inner, outer), abs=1e-12)
        signs.add(value > 0)
    assert signs == {True, False}


def test_extreme_contrasts():
    patches = torch.tensor([[2.0, 0], [3, 0], [0, 1], [0, 5], [-1, 0], [0, -1]])
    everyone = torch.arange(6)

    def sides(*members: set[int]) -> Sides:
        inside = torch.stack([torch.tensor([int(i) in some for i in everyone]) for some in members])
        return Sides(inside, ~inside)

    apart, opposed, split = sides({0, 1}), sides({0, 4}), sides({0, 2})
    assert object_contrast(patches, apart).tolist() == [1]
    assert object_contrast(patches, split).tolist() == [-1]
    assert object_contrast(patches[[0, 4, 2, 3]], Sides(*(s[:, [0, 4, 2, 3]] for s in opposed))).tolist() == [0]  # 0/0
    assert text_contrast(patches, torch.tensor([[1.0, 0]]), apart).tolist() == [1]
    assert text_contrast(patches, torch.tensor([[0.0, 1]]), apart).tolist() == [-1]
    assert text_contrast(patches, torch.tensor([[0.0, 0]]), apart).tolist() == [0]


def test_masks_too_small_for_a_contrast_do_not_count(random):
    patches = features(random, n=6)
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[1, :1], inside[2, :2], inside[3] = True, True, True
    sides = Sides(inside, ~inside)
    assert sides.usable.tolist() == [False, False, True, False]
    for values in (object_contrast(patches, sides), text_contrast(patches, patches[:4], sides)):
        assert values.isnan().tolist() == [True, True, False, True]
        assert mean_counts(values.tolist()) == {0: (values[2].item(), 1)}
    assert object_contrast(patches, Sides(inside[:0], inside[:0])).shape == (0,)


def test_patches_and_masks_of_different_sizes_are_refused(random):
    patches, sides = features(random), random_sides(random, n=13)
    with pytest.raises(InputError, match=r"patches \(14, 3\)"):
        object_contrast(patches, sides)
    with pytest.raises(InputError, match="one for each mask"):
        text_contrast(patches[:13], torch.zeros(2, 3), sides)


# How sure -------------------------------------------------------------------------------------------------------------


def slow_resample(records: Records, score, samples: int, seed: int) -> list[float]:
    """The same draws, counted image by image."""
    random, images = np.random.default_rng(seed), sorted(records.rows)
    values = []
    for _ in range(samples):
        total = defaultdict(lambda: [0.0, 0.0, 0.0])
        for index in random.integers(len(images), size=len(images)):
            for label, counts in records.rows[images[index]].items():
                for k, count in enumerate(counts):
                    total[label][k] += count
        values.append(score(list(total.values())))
    return values


def slow_mean_iou(total: list[list[float]]) -> float:
    ious = [hits / (hits + false + missed) for hits, false, missed in total if hits + false + missed]
    return sum(ious) / len(ious)


def slow_pixel_accuracy(total: list[list[float]]) -> float:
    return sum(hits for hits, _, _ in total) / sum(hits + missed for hits, _, missed in total)


def slow_ratio(total: list[list[float]]) -> float:
    return sum(part for part, *_ in total) / sum(count for _, count, *_ in total)


@pytest.mark.parametrize("cells", [1, 200, 4_000_000])
@pytest.mark.parametrize(
    ("records", "score", "slow"),
    [
        (region_records(), mean_iou, slow_mean_iou),
        (region_records(), pixel_accuracy, slow_pixel_accuracy),
        (mean_records(), ratio, slow_ratio),
        (pair_means(point_records()), ratio, slow_ratio),
        (image_means(point_records()), ratio, slow_ratio),
    ],
)
def test_resampling_against_a_loop(monkeypatch, records, score, slow, cells):
    monkeypatch.setattr(intervals_module, "CELLS", cells)
    ours, expected = resample(records, score, 60, seed=7), slow_resample(records, slow, 60, 7)
    assert ours.tolist() == pytest.approx(expected, rel=1e-12)
    low, high = bootstrap(records, score, 60, seed=7, level=0.8)
    moved = records.value(score) - np.median(expected)
    inside = [low <= value + moved <= high for value in expected]
    assert 46 <= sum(inside) <= 50
    assert low < records.value(score) < high


def test_intervals_contain_the_truth_as_often_as_their_level():
    """Images that hit or miss: 95 % intervals of 80 images, over 200 data sets, and 68 % ones."""
    random = np.random.default_rng(0)
    held = defaultdict(int)
    for trial in range(200):
        hits = random.random(80) < 0.3
        records = Records({f"{i:02d}": {0: (int(hit), 1)} for i, hit in enumerate(hits)})
        values = resample(records, ratio, 200, seed=trial)
        for level in (0.68, 0.95):
            low, high = interval(values, level)
            held[level] += low <= 0.3 <= high
    assert 0.90 <= held[0.95] / 200 <= 0.99
    assert 0.58 <= held[0.68] / 200 <= 0.78


def few_of_many_classes(random: np.random.Generator, images: int = 600, classes: int = 600) -> Records:
    """Images with one to three of many classes; what is missed is given to any class."""
    rows = {}
    for image in range(images):
        tally = np.zeros((classes, 3), dtype=int)
        for label in random.choice(classes, random.integers(1, 4), replace=False):
            hits = random.integers(0, 100)
            tally[label] += (hits, 0, 100 - hits)
            tally[random.integers(classes), 1] += 100 - hits
        rows[f"{image:02d}"] = {label: tuple(counts) for label, counts in enumerate(tally.tolist()) if any(counts)}
    return Records(rows)


def test_intervals_of_mean_iou_contain_the_score_of_similar_data_sets():
    """The percentiles of the draws alone hold it four times in twenty, and their own score once."""
    random = np.random.default_rng(0)
    drawn = [few_of_many_classes(random) for _ in range(20)]
    values = [records.value(mean_iou) for records in drawn]
    found = [bootstrap(records, mean_iou, 200) for records in drawn]
    assert all(low <= value <= high for value, (low, high) in zip(values, found, strict=True))
    assert sum(low <= np.mean(values) <= high for low, high in found) >= 17


def test_paired_differences_have_narrower_intervals():
    order = Random(0)
    easy = {f"{i:03d}": order.random() for i in range(100)}
    one = Records({image: {0: (value, 1)} for image, value in easy.items()})
    other = Records({image: {0: (value + 0.02 + 0.01 * order.random(), 1)} for image, value in easy.items()})
    assert bootstrap(one, ratio).high > bootstrap(other, ratio).low
    low, high = bootstrap_difference(other, one, ratio)
    assert 0.02 < low < high < 0.03
    assert bootstrap_difference(one, other, ratio) == pytest.approx((-high, -low), abs=1e-12)
    with pytest.raises(InputError, match=r"2 are in one of the two"):
        bootstrap_difference(one, Records({**other.rows, "x": {}, "y": {}}), ratio)


def test_differences_against_a_loop():
    one, other = region_records(seed=0), region_records(seed=1)
    other = Records(dict(zip(one.images, other.rows.values(), strict=True)))
    slow = [
        a - b
        for a, b in zip(
            slow_resample(one, slow_mean_iou, 60, 7), slow_resample(other, slow_mean_iou, 60, 7), strict=True
        )
    ]
    moved = one.value(mean_iou) - other.value(mean_iou) - np.median(slow)
    found = bootstrap_difference(one, other, mean_iou, 60, seed=7, level=0.8)
    assert found == pytest.approx(np.quantile(slow, [0.1, 0.9]) + moved, abs=1e-12)


def test_an_interval_of_one_image_or_of_samples_without_counts():
    assert bootstrap(Records({"a": {0: (3, 1, 0)}}), mean_iou) == (0.75, 0.75)
    mostly_empty = Records({"a": {0: (3, 1, 0)}, "b": {}, "c": {}})
    values = resample(mostly_empty, mean_iou, 200)
    assert 0 < np.isnan(values).sum() < 200
    assert interval(values) == (0.75, 0.75)
    assert np.isnan(interval(np.full(3, np.nan))).all()


def test_impossible_intervals_are_refused():
    with pytest.raises(InputError, match="1 images without counts"):
        bootstrap(Records({"a": {}}), mean_iou)
    with pytest.raises(InputError, match="0 samples"):
        bootstrap(region_records(), mean_iou, samples=0)
    for level in (0, 1):
        with pytest.raises(InputError, match="level"):
            bootstrap(region_records(), mean_iou, samples=3, level=level)
