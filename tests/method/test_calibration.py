"""What SC-CLIP is made of, each against its definition written out."""

import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor
from torch.nn.functional import normalize

from open_gem import METHODS, run
from open_gem.errors import MethodError
from open_gem.method import calibration
from open_gem.method.calibration import aggregate, outliers, repair
from open_gem.types import Grid


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_lonely_token_is_an_outlier():
    tokens = random(60, 8)
    tokens[17] += 40
    factors = -LocalOutlierFactor(n_neighbors=10).fit(tokens.numpy()).negative_outlier_factor_
    assert factors.argmax() == 17
    for strip in (60 * 60, 60 * 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "STRIP", strip)
            wrong = outliers(tokens, neighbors=10, share=0.01)
        assert torch.nonzero(wrong).flatten().tolist() == [17]


def test_equal_tokens_and_a_single_token_have_no_outliers():
    assert not outliers(torch.ones(12, 4)).any()
    assert not outliers(random(1, 4)).any()


def test_an_outlier_becomes_the_mean_of_its_good_neighbours():
    tokens, wrong = random(20, 3), torch.zeros(20, dtype=torch.bool)
    wrong[[6, 7]] = True
    repaired = repair(tokens, Grid(4, 5), wrong)
    assert torch.equal(repaired[~wrong], tokens[~wrong])
    around = [0, 1, 2, 5, 10, 11, 12]  # of patch 6, which is row 1, column 1; 7 is wrong too
    torch.testing.assert_close(repaired[6], tokens[around].mean(dim=0))


def test_an_outlier_among_outliers_stays():
    tokens = random(9, 3)
    assert torch.equal(repair(tokens, Grid(3, 3), torch.ones(9, dtype=torch.bool)), tokens)


def test_aggregation_weighs_by_cosines_above_the_least(monkeypatch):
    tokens, guide = random(30, 5), random(30, 4)
    cosines = normalize(guide, dim=-1) @ normalize(guide, dim=-1).T
    weights = torch.where(cosines < 0.4, 0, cosines)
    expected = weights @ tokens / weights.sum(dim=1, keepdim=True)
    monkeypatch.setattr(calibration, "STRIP", 4 * 30)
    torch.testing.assert_close(aggregate(tokens, guide), expected, rtol=0, atol=1e-5)


def test_images_of_a_batch_do_not_mix(tiny_localizer):
    pixels = random(2, 3, 64, 64)
    methods = {"sc-clip": METHODS["sc-clip"]}
    both = run(tiny_localizer.backbone.vision, pixels, methods)["sc-clip"].tokens
    each = [run(tiny_localizer.backbone.vision, image[None], methods)["sc-clip"].tokens for image in pixels]
    torch.testing.assert_close(both, torch.cat(each), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("neighbors", 0), ("share", 1), ("least", -0.1), ("scale", 0), ("cls", -1), ("share", "x")]
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(MethodError, match=f"{name} is {value!r}, expected a"):
        METHODS["sc-clip"].replace(**{name: value})
