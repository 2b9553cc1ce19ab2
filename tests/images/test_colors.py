"""Colours that everybody can tell apart: measured under simulated colour-vision deficiencies."""

from itertools import combinations

import numpy as np
import pytest

from open_gem.images.colors import ACCENT, HEAT, LABELS, label_color, voc_color

VISION = {  # linear RGB as seen: Machado, Oliveira and Fernandes, "A Physiologically-based Model", 2009, severity 1
    "trichromacy": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(colors: object, vision: str) -> np.ndarray:
    """sRGB of 8 bits `(n, 3)` → CIE L*a*b* (D65) of what is seen."""
    share = np.asarray(colors, dtype=float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.asarray(VISION[vision]).T).clip(0, 1) @ XYZ.T / XYZ.sum(axis=1)
    x, y, z = np.where(seen > 216 / 24389, np.cbrt(seen), (24389 / 27 * seen + 16) / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def delta_e(first: np.ndarray, second: np.ndarray) -> float:
    """CIEDE2000 (Sharma, Wu and Dalal, 2005) of two colours in L*a*b*."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(mean**7 / (mean**7 + 25**7))
    c1, c2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0
    hue = (h1 + turn / 2) % 360 if c1 * c2 else h1 + h2
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    lightness, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    terms = ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63))
    t = 1 + sum(weight * np.cos(np.radians(times * hue + shift)) for weight, times, shift in terms)
    sl = 1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2)
    sc, sh = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + 25**7))
    rotation *= np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2))))
    dl, dc, dh = dl / sl, dc / sc, dh / sh
    return float(np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh))


@pytest.mark.parametrize(  # of the paper's table of test data
    ("first", "second", "expected"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ],
)
def test_the_distance_is_ciede2000(first, second, expected):
    assert delta_e(np.array(first), np.array(second)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", VISION)
def test_the_first_labels_stay_apart(vision):
    assert len(LABELS) == 12
    distances = [delta_e(*pair) for pair in combinations(lab(LABELS, vision), 2)]
    assert min(distances) > 15  # from 10 on, two colours differ at a glance


@pytest.mark.parametrize("vision", VISION)
def test_heat_grows_lighter_in_even_steps(vision):
    lightness = lab(HEAT, vision)[:, 0]
    assert (len(HEAT), lightness[0] < 5, lightness[-1] > 95) == (256, True, True)
    steps = np.diff(lightness[::15])
    assert steps.min() > 0.4 * steps.mean()  # under any vision, and in grey


@pytest.mark.parametrize("vision", VISION)
def test_no_heat_has_the_colour_of_marks(vision):
    [mark] = lab([ACCENT], vision)
    assert min(delta_e(mark, heat) for heat in lab(HEAT[::5], vision)) > 10


def test_labels_beyond_the_first_have_pascal_vocs_colours():
    assert [voc_color(index) for index in range(3)] == [(128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert len({label_color(index) for index in range(6000)}) == 6000
    assert [label_color(0), label_color(4000)] == [LABELS[0], voc_color(4000)]
