"""Each metric against a loop that a student could write, and against itself in parts."""

import pytest
import torch

from open_gem.metrics import Confusion, Mean, confusion, mask_overlap, pointing_game


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def test_pointing_game_reads_x_then_y():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[:, 1, 5] = True
    assert pointing_game(torch.tensor([[5, 1], [1, 3]]), mask) == Mean(1, 2)
    assert Mean(1, 2) + Mean(2, 2) == Mean(3, 4)
    assert Mean(3, 4).value == 0.75


def test_mask_overlap_against_a_loop(random):
    predicted, true = torch.rand(2, 5, 7, 9, generator=random) > 0.6
    expected = 0.0
    for one, other in zip(predicted, true, strict=True):
        pairs = list(zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
        expected += sum(p and t for p, t in pairs) / sum(p or t for p, t in pairs)
    whole = mask_overlap(predicted, true)
    assert whole.sum == pytest.approx(expected)
    parts = mask_overlap(predicted[:2], true[:2]) + mask_overlap(predicted[2:], true[2:])
    assert (parts.sum, parts.count) == (pytest.approx(whole.sum), 5)
    assert mask_overlap(torch.zeros(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)).value == 1


def test_mean_iou_against_a_loop(random):
    classes, ignore = 5, 255
    predicted = torch.randint(0, classes - 1, (6, 8, 8), generator=random)  # the last class occurs nowhere
    true = torch.randint(0, classes - 1, (6, 8, 8), generator=random)
    true[torch.rand(true.shape, generator=random) < 0.2] = ignore
    ious = []
    for c in range(classes - 1):
        hits = ((predicted == c) & (true == c)).sum().item()
        missed = ((predicted != c) & (true == c)).sum().item()
        false = ((predicted == c) & (true != c) & (true != ignore)).sum().item()
        ious.append(hits / (hits + missed + false))
    whole = confusion(predicted, true, classes)
    assert whole.mean_iou == pytest.approx(sum(ious) / len(ious))
    assert whole.class_iou[-1].isnan()
    parts = confusion(predicted[:2], true[:2], classes) + confusion(predicted[2:], true[2:], classes)
    assert isinstance(parts, Confusion)
    assert torch.equal(parts.counts, whole.counts)
