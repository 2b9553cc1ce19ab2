"""Refinements: make localizations follow the edges of the image. One file and one row each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from PIL import Image

from open_gem.checks import did_you_mean
from open_gem.errors import InputError
from open_gem.localization import Localization


class Refinement(ABC):
    """Makes a localization follow the edges of its image. A frozen dataclass: its fields are its settings."""

    @abstractmethod
    def refine(self, image: Image.Image, localization: Localization) -> Localization:
        """Refine a localization by the RGB `image` that it is of.

        Raises InputError if the image has another size than the one localized.
        """

    def describe(self) -> dict[str, Any]:
        """Return the refinement's name and settings, as values that JSON can hold."""
        return {"refinement": type(self).__name__.lower(), **asdict(self)}  # pyright: ignore[reportArgumentType]


def _pamr() -> Refinement:
    from open_gem.refine.pamr import Pamr

    return Pamr()


def _fgs() -> Refinement:
    from open_gem.refine.fgs import Fgs

    return Fgs()


def _lposs_plus() -> Refinement:
    from open_gem.refine.lposs import LpossPlus

    return LpossPlus()


REFINEMENTS: Mapping[str, Callable[[], Refinement]] = {"pamr": _pamr, "fgs": _fgs, "lposs+": _lposs_plus}
"""Names of refinements → functions that make them with their usual settings."""


def find_refinement(name: str) -> Refinement:
    """Return the refinement called `name`, with its usual settings. Raises InputError that lists the known ones."""
    if name not in REFINEMENTS:
        raise InputError(
            f"unknown refinement {name!r}{did_you_mean(name, REFINEMENTS)}; known: {', '.join(REFINEMENTS)}"
        )
    return REFINEMENTS[name]()
