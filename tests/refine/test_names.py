"""Refinements by name, with and without an argument."""

from dataclasses import dataclass

import pytest

from open_gem import refine
from open_gem.errors import InputError
from open_gem.refine import REFINEMENTS, Refinement, find_refinement


@dataclass(frozen=True)
class Shift(Refinement):
    by: str = "1"

    def refine(self, image, localization):
        return localization


@pytest.fixture(autouse=True)
def table(monkeypatch):
    def needs(pixels: str) -> Refinement:
        return Shift(pixels)

    def may(pixels: str = "1") -> Refinement:
        return Shift(pixels)

    monkeypatch.setattr(refine, "REFINEMENTS", {"pamr": REFINEMENTS["pamr"], "needs": needs, "may": may})


@pytest.mark.parametrize(
    ("name", "by"), [("may", "1"), ("may:2", "2"), ("needs:org/name", "org/name"), ("may:a:b", "a:b")]
)
def test_what_follows_the_colon_is_the_argument(name, by):
    assert find_refinement(name) == Shift(by)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pamr:3", "refinement 'pamr:3', expected pamr"),
        ("needs", "refinement 'needs', expected needs:PIXELS"),
        ("may:", "refinement 'may:', expected may or may:PIXELS"),
        ("mai:2", "unknown refinement 'mai:2' (did you mean may?); known: pamr, needs:PIXELS, may, may:PIXELS"),
    ],
)
def test_a_wrong_name_says_what_is_expected(name, expected):
    with pytest.raises(InputError) as raised:
        find_refinement(name)
    assert str(raised.value) == expected
