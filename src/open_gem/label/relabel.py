"""New parts from what was kept, by other rules: without the model, and without the images.

    relabel(Parts.open("labels"), rules)                     # or into a new folder

Either all parts are new or none is, whatever happens meanwhile; what was kept stays as it is.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from open_gem.errors import InputError, OutputError
from open_gem.files import to_json
from open_gem.label.done import default_workers
from open_gem.label.kept import kept_vocabulary, restore
from open_gem.label.parts import Manifest, Parts, differences, replacing, row_of, write_part
from open_gem.label.rules import ObjectRules
from open_gem.types import Size

COLUMNS = ("id", "source", "status", "error", "height", "width", "pages", "seconds")  # fields that rules do not decide


def relabelled(parts: Parts, rules: ObjectRules) -> Manifest:
    """Return the manifest that parts have by other rules.

    Raises InputError if what was kept is not enough for them: if nothing was kept, prompts are others, or a refinement
    needs the images.
    """
    kept_vocabulary(parts)
    existing = parts.manifest
    if (refinement := existing.settings.get("refinement")) is not None:
        raise InputError(
            f"maps were refined by {refinement['refinement']!r}, which needs the images: run `open-gem label` again, "
            "with another folder"
        )
    settings = json.loads(to_json({**existing.settings, **rules.describe()}))
    manifest = replace(existing, settings=settings, labels=rules.classes.labels)
    before, after = (replace(version, settings=_prompts(version)) for version in (existing, manifest))
    if before != after:
        raise InputError(f"other prompts need the model, `open-gem label`: {differences(before, after)}")
    return manifest


def _prompts(manifest: Manifest) -> dict[str, Any]:
    classes = manifest.settings["classes"]
    prompts = {label: entry["prompts"] for label, entry in classes["labels"].items()}
    return {"prompts": prompts, "background": classes["background"]}


def relabel(
    parts: Parts,
    rules: ObjectRules,
    out: Path | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> Parts:
    """Make the objects of all images again by other rules, in place or in the folder `out`; return the new parts. The
    caller has the lock of the folder that is written to.

    out       a new folder, or an empty one; it shares what was kept by hard links where it can
    workers   processes, see `default_workers`
    progress  called with the number of images that are done

    Raises InputError as `relabelled`, and if there are labels in `out`; OutputError.
    """
    folder, manifest, parts = out or parts.folder, relabelled(parts, rules), parts.snapshot()
    if out is not None:
        if Manifest.read(out) is not None:
            raise InputError(f"{str(out)!r} holds labels already, expected a new folder")
        Parts.check_claim(out, manifest)
    with replacing(folder, manifest) as staged:
        work = partial(_relabel_part, parts, rules, staged)
        with _each(work, parts.paths(), workers or default_workers()) as counts:
            for count in counts:
                progress(count)
        if out is not None:
            _share(parts, Parts(out, manifest))
    return Parts(folder, manifest)


@contextmanager
def _each(work: Callable[[Path], int], paths: list[Path], workers: int) -> Iterator[Iterator[int]]:
    """Work on several parts at a time, in processes of their own if there are several."""
    workers = min(workers, len(paths))
    if workers < 2:
        yield map(work, paths)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin)
    try:
        yield pool.map(work, paths)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    import torch

    torch.set_num_threads(1)  # each process has a processor


def _relabel_part(parts: Parts, rules: ObjectRules, staged: Path, path: Path) -> int:
    """Write the new part that takes the place of another; return the number of its images."""
    rows, vocabulary = [], rules.classes.vocabulary
    for row, kept in parts.with_kept(path, *COLUMNS):
        if kept is not None:
            row |= rules.fields(restore(kept, vocabulary, Size(row["height"], row["width"])))
        rows.append(row_of(**row))
    write_part(staged / path.name, rows)
    return len(rows)


def _share(parts: Parts, new: Parts) -> None:
    """Give new parts what was kept of the images: files that never change, so links do."""
    try:
        for path in parts.paths():
            old, place = parts.kept_path(path), new.kept_path(path)
            place.parent.mkdir(exist_ok=True)
            place.unlink(missing_ok=True)
            try:
                os.link(old, place)
            except OSError:  # another disk, or one without links
                shutil.copyfile(old, place)
    except OSError as error:
        raise OutputError(f"cannot write {str(new.folder)!r}: {error.strerror or error}") from error
