"""Published numbers against those of this machine."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from open_gem.checks import did_you_mean
from open_gem.errors import ImageError, InputError, ModelError, NotFiniteError
from open_gem.verify.checkers import Published
from open_gem.verify.images import ImageStore
from open_gem.verify.values import VALUES

PASSED, FAILED, SHOWN, NOT_CHECKED = "passed", "failed", "shown", "not checked"


@dataclass(frozen=True)
class Result:
    """What became of one published group of numbers.

    measured  the numbers of this machine; None if they are not checked
    status    `PASSED`, `FAILED`, `SHOWN` (certainty C is not judged) or `NOT_CHECKED`
    reason    why they are not checked, or have no numbers
    """

    published: Published
    measured: tuple[float, ...] | None
    status: str
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """The largest absolute difference; infinite if a measured number is not one."""
        if self.measured is None:
            return None
        pairs = zip(self.measured, self.published.expected, strict=True)
        return max(abs(got - expected) if math.isfinite(got) else math.inf for got, expected in pairs)

    def document(self) -> dict[str, Any]:
        """Return the result as values that JSON can hold."""
        row = self.published
        return {
            "checkpoint": row.checkpoint,
            "pretrained": row.pretrained,
            "kind": row.kind,
            "image": row.image,
            "compared": row.compared,
            "expected": row.expected,
            "measured": self.measured and [number if math.isfinite(number) else None for number in self.measured],
            "difference": self.difference if math.isfinite(self.difference or 0) else None,
            "tolerance": row.tolerance,
            "certainty": row.certainty,
            "source": row.source,
            "status": self.status,
            "reason": self.reason,
        }


def find_values(names: Sequence[str]) -> list[Published]:
    """Return the published numbers of these checkpoints, or all; a tag may follow a name: "ViT-B-32, openai".

    Raises InputError for a name without any.
    """
    known = {name for row in VALUES for name in (row.checkpoint, row.name)}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise InputError(f"no published values of {name!r}{hint}; known: {'; '.join(sorted(known))}")
    return [row for row in VALUES if not names or {row.checkpoint, row.name} & set(names)]


def cached_repositories() -> set[str]:
    """Repositories of models in the Hugging Face cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return {repository.repo_id for repository in scan_cache_dir().repos if repository.repo_type == "model"}
    except CacheNotFound:
        return set()


def verify(rows: Iterable[Published], images: ImageStore, **where: Any) -> Iterator[Result]:
    """Check each of these numbers. `where`: device and cache_dir, as of `towers.load`."""
    for row in rows:
        try:
            image = images(row.image)
            model = row.load(**where)
        except (ImageError, ModelError) as error:
            yield Result(row, None, NOT_CHECKED, str(error))
            continue
        try:
            yield judge(row, tuple(row.measure(model, image).tolist()))
        except NotFiniteError as error:
            yield Result(row, None, FAILED, str(error))


def judge(row: Published, measured: tuple[float, ...]) -> Result:
    """Return the result of measured numbers."""
    result = Result(row, measured, PASSED)
    assert result.difference is not None
    if row.certainty == "C":
        return Result(row, measured, SHOWN)
    return result if result.difference <= row.tolerance else Result(row, measured, FAILED)
