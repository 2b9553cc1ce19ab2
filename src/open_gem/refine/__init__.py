"""Refinements: make localizations follow the edges of the image. One file and one row each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from inspect import signature
from typing import Any

import torch
from PIL import Image

from open_gem.checks import did_you_mean
from open_gem.errors import InputError
from open_gem.images.read import size_of
from open_gem.localization import Localization


class Refinement(ABC):
    """Makes a localization follow the edges of its image. A frozen dataclass: its fields are its settings."""

    @abstractmethod
    def refine(self, image: Image.Image, localization: Localization) -> Localization:
        """Refine a localization by the RGB `image` that it is of.

        Raises InputError if the image has another size than the one localized.
        """

    def load(self, device: torch.device) -> Any:
        """Load what it computes with, so that errors come before the first image. Here: nothing."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the refinement's name and settings, as values that JSON can hold."""
        return {"refinement": type(self).__name__.lower(), **asdict(self)}  # pyright: ignore[reportArgumentType]


def check_image(image: Image.Image, localization: Localization) -> None:
    """Raise InputError unless the image has the size of the one localized."""
    if size_of(image) != localization.size:
        actual, expected = ("×".join(map(str, size)) for size in (size_of(image), localization.size))
        raise InputError(f"the image is {actual} (height × width), expected the one localized: {expected}")


def _pamr() -> Refinement:
    from open_gem.refine.pamr import Pamr

    return Pamr()


def _fgs() -> Refinement:
    from open_gem.refine.fgs import Fgs

    return Fgs()


def _lposs_plus() -> Refinement:
    from open_gem.refine.lposs import LpossPlus

    return LpossPlus()


def _sam(checkpoint: str = "") -> Refinement:
    from open_gem.refine.sam import Sam

    return Sam(checkpoint) if checkpoint else Sam()


def _regions(checkpoint: str = "") -> Refinement:
    from open_gem.refine.regions import Regions

    return Regions(checkpoint) if checkpoint else Regions()


REFINEMENTS: Mapping[str, Callable[..., Refinement]] = {
    "pamr": _pamr,
    "fgs": _fgs,
    "lposs+": _lposs_plus,
    "sam": _sam,
    "regions": _regions,
}
"""Names of refinements → functions that make them with their usual settings. What follows a colon after the name is the
function's one argument, if it has a parameter: "name:argument"."""


def find_refinement(name: str) -> Refinement:
    """Return the refinement called `name`, or "name:argument", with its usual settings.

    Raises InputError that lists the known ones, and for an argument that is missing or one too many.
    """
    row, colon, argument = name.partition(":")
    if row not in REFINEMENTS:
        raise InputError(f"unknown refinement {name!r}{did_you_mean(row, REFINEMENTS)}; known: {', '.join(_known())}")
    parameters = signature(REFINEMENTS[row]).parameters.values()
    needed = any(parameter.default is parameter.empty for parameter in parameters)
    if bool(colon) > bool(parameters) or bool(argument) < max(bool(colon), needed):
        raise InputError(f"refinement {name!r}, expected {' or '.join(_known(row))}")
    return REFINEMENTS[row](*filter(None, [argument]))


def names_alone() -> list[str]:
    """Return the names of refinements that take no argument: they load no checkpoint."""
    return [name for name, make in REFINEMENTS.items() if not signature(make).parameters]


def _known(*names: str) -> list[str]:
    """Return how these refinements are asked for, or all."""
    forms = []
    for name in names or REFINEMENTS:
        parameters = signature(REFINEMENTS[name]).parameters.values()
        if all(parameter.default is not parameter.empty for parameter in parameters):
            forms.append(name)
        forms += [f"{name}:{parameter.name.upper()}" for parameter in parameters]
    return forms
