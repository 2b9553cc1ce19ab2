"""Checks of settings, and words for the messages of errors."""

import math
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from numbers import Real
from reprlib import Repr
from typing import Any

from open_gem.errors import MethodError


def is_count(value: Any, least: int = 1) -> bool:
    """Return True for a whole number of `least` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: Any) -> bool:
    """Return True for a finite number above 0."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) > 0
    except OverflowError:  # a whole number too large for a float
        return False


def close_names(name: Any, known: Iterable[str], most: int = 3) -> list[str]:
    """Return up to `most` of the known names that are spelled like `name`, the closest first; case does not count."""
    by_letters: dict[str, list[str]] = {}
    for candidate in known:
        by_letters.setdefault(candidate.lower(), []).append(candidate)
    close = get_close_matches(str(name).lower(), by_letters, n=most)
    return [candidate for letters in close for candidate in by_letters[letters]][:most]


def shown(value: Any, most: int = 80) -> str:
    """Return any value as an error quotes it, shortened: long numbers and nested lists too."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # Python refuses to write very long numbers
        text = f"{type(value).__name__} that is too long to show"
    return text if len(text) <= most else f"{text[: most - 1]}…"


_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return what follows an unknown name in a message: " (did you mean gem?)", or nothing if no known name is
    close."""
    close = close_names(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return the first names as a message lists them, those with a comma in quotation marks: "cat, 'car, parked'"."""
    shown = ", ".join(repr(name) if "," in name else name for name in names[:most])
    return shown if len(names) <= most else f"{shown} … ({len(names)} in all)"


def require(owner: Any, name: str, fits: Callable[[Any], bool], expected: str) -> None:
    """Raise MethodError for a setting of `owner` that does not fit."""
    value = getattr(owner, name)
    if not fits(value):
        raise MethodError(f"{name} is {value!r}, expected {expected}")
