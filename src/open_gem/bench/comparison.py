"""Runs of `open-gem bench` as files, and how a later run compares with an earlier one."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from open_gem.bench.cases import PLAIN
from open_gem.checks import is_positive
from open_gem.errors import InputError

Times = Mapping[str, tuple[float, ...]]
"""Seconds of each turn of each case; cases took turns."""


class Change(NamedTuple):
    """How one case changed, in times of the plain forward pass of the same turn.

    before  median over turns of the earlier run
    after   likewise of the later one
    ratio   after / before: above 1 is slower
    least   the smallest ratio of a later to an earlier turn
    most    the largest
    """

    case: str
    before: float
    after: float
    ratio: float
    least: float
    most: float


def read_run(path: Path) -> dict[str, Any]:
    """Read a file that `open-gem bench --save` wrote. Raises InputError if it is no such file."""
    try:
        document = json.loads(path.read_bytes())
        for run in document["runs"]:
            if not isinstance(run["setting"], dict):
                raise TypeError
            times = times_of(run)
            turns = {len(seconds) for seconds in times.values()}
            if len(turns) != 1 or not all(is_positive(s) for seconds in times.values() for s in seconds):
                raise ValueError
            times[PLAIN][0]
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not a run of open-gem bench, expected a file that --save wrote") from error
    return document


def times_of(run: Mapping[str, Any]) -> Times:
    """Return the seconds of each case of a run."""
    return {cost["case"]: tuple(cost["seconds"]) for cost in run["costs"]}


def run_like(document: Mapping[str, Any], setting: Mapping[str, Any]) -> Times:
    """Return the times of the run in `document` with this setting. Raises InputError without any."""
    for run in document["runs"]:
        if run["setting"] == setting:
            return times_of(run)
    known = "; ".join(_words(run["setting"]) for run in document["runs"][:3])
    raise InputError(f"the run to compare with has no setting {_words(setting)}, but {known or 'none'}")


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())[:120]


def compare(earlier: Times, later: Times) -> list[Change]:
    """Compare the cases that both runs have, but for the plain forward pass, which all are divided by."""
    return [_change(case, earlier, later) for case in later if case in earlier and case != PLAIN]


def _change(case: str, earlier: Times, later: Times) -> Change:
    before, after = ([a / b for a, b in zip(run[case], run[PLAIN], strict=True)] for run in (earlier, later))
    middle = median(before), median(after)
    return Change(case, *middle, middle[1] / middle[0], least=min(after) / max(before), most=max(after) / min(before))
