"""Labels on disk: Parquet parts, one row an image, and a manifest that says what made them.

    parts = Parts.open(Path("labels"))
    parts.manifest.labels                     # the labels, in order
    for row in parts.rows():                  # one dict an image, one part in memory at a time
        row["id"], row["status"], [(stored["label"], stored["xyxy"]) for stored in row["objects"]]

A part is written whole or not at all and never changed, so after a crash all existing parts are valid. Each image is
in one part, once. Whoever reads Parquet reads the folder: `pandas.read_parquet("labels")`, DuckDB's
`read_parquet('labels/*.parquet')`, `datasets.load_dataset("labels")`.

What the model saw of each image is kept beside its part, in the folder `KEPT`, which these readers skip: it is ten
times as large as the rows. See `label.kept`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_gem.errors import InputError, OutputError
from open_gem.files import digest, to_json, write_file

if TYPE_CHECKING:
    import pyarrow

LabelRow = dict[str, Any]  # an image, with the fields of `schema`

MANIFEST, SUMMARY, SHEET = "_manifest.json", "_summary.json", "_samples.html"
"""Names of files beside the parts: readers of folders of Parquet skip names that start with _ or a dot."""
FOR_DATASETS = (".huggingface.yaml", b"configs:\n- config_name: default\n  data_files: part-*.parquet\n")
"""`datasets` would read JSON as data: this file names the data."""
PARTS = "part-*.parquet"
KEPT = "_kept"  # folder beside the parts: a file for each part, Parquet under an ending that nobody reads by itself
STAGED = ".relabel"  # folder beside the parts: new parts, which replace all others once its manifest is there
READ = 64  # rows decoded to Python at a time: bounds memory where rows hold label maps


@cache
def schema() -> "pyarrow.Schema":
    """Return the fields of a row. Boxes are `xyxy` pixels of the original image, right and bottom exclusive; points are
    `xy`.

    id           of a file in a folder: its path relative to the folder, with /
    source       absolute path, also of a file:// URL; otherwise the URL as given
    status       "ok", or "error": then `error` is the reason, and `objects` is empty
    pages        number of pages of the file if there are several: the first is the image, the others are ignored
    seconds      spent on the image: reading it, its share of the model's time, making objects
    objects      in the order of the manifest's labels, best first within one
      prompt       the label's prompt that is most similar at `point`
      score        highest cosine inside the object
      confidence   ranks objects of all labels and images: presence × peak × probability, see `Object`
      image_score  cosine of the label with the image as a whole; presence: the same as a probability
      rle          its mask in COCO's compressed run-length encoding; size is (height, width)
      point        where the cosine is highest
    mask_quality the IoU with the object that the mask's segmenter predicts; null if the mask is a region of the map
    labelmap     a PNG of 8 bits (16 with more than 255 labels): 0 is background, n the manifest's n-th label, from 1
    """
    import pyarrow as pa

    text, count, number = pa.string(), pa.int32(), pa.float32()
    stored = [(name, text) for name in ("label", "prompt")]
    stored += [(name, number) for name in ("score", "image_score", "presence", "peak", "probability", "confidence")]
    stored += [("xyxy", pa.list_(count, 4)), ("rle", pa.struct([("size", pa.list_(count)), ("counts", text)]))]
    stored += [("point", pa.list_(count)), ("mask_quality", number)]
    fields = [(name, text) for name in ("id", "source", "status", "error")]
    fields += [(name, count) for name in ("height", "width", "pages")]
    fields += [("seconds", number), ("objects", pa.list_(pa.struct(stored))), ("labelmap", pa.binary())]
    return pa.schema(fields)


@cache
def kept_schema() -> "pyarrow.Schema":
    """Return the fields of what is kept of an image: one row for each row of the part without an error, in the same
    order. Prompts are in the manifest's order, those of the background last.

    id           as in the part
    grid         rows and columns of the patch grid
    logit_scale  factor of cosines before a softmax over prompts, if there is one
    scores       cosine of each label with the image as a whole; presence: the same as a probability
    low, high    lowest and highest cosine of each prompt's map; null if the map was not kept
    values       the maps that were kept, as uint16, little-endian, C order, maps × rows × cols: n stands for the cosine
                 low + n (high - low) / 65535
    """
    import pyarrow as pa

    numbers = pa.list_(pa.float32())
    fields = [("id", pa.string()), ("grid", pa.list_(pa.int32(), 2)), ("logit_scale", pa.float64())]
    fields += [(name, numbers) for name in ("scores", "presence", "low", "high")]
    return pa.schema([*fields, ("values", pa.binary())])


def row_of(id: str, source: str, **fields: Any) -> LabelRow:
    """Return a row with these fields; the others are empty. `kept`, if anything is, goes into a file of its own."""
    return {**dict.fromkeys(schema().names), "id": id, "source": source, "objects": [], **fields}


@dataclass(frozen=True)
class Manifest:
    """The settings that made the parts of a folder.

    settings  all that decides a row, as values that JSON can hold
    labels    in order
    root      the folder or URL that ids are relative to; None if ids stand for themselves
    warnings  what the labels are not to be trusted for, one line each
    """

    settings: Mapping[str, Any]
    labels: tuple[str, ...]
    root: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """First 12 hex digits of a hash of the settings and labels."""
        return digest({"settings": self.settings, "labels": self.labels})

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Return the manifest of a folder, None if there is none. Raises InputError if it cannot be read."""
        path = folder / MANIFEST
        settle(folder)
        try:
            document = json.loads(path.read_text("utf-8"))
            warnings = tuple(document.get("warnings", ()))
            return cls(document["settings"], tuple(document["labels"]), document["root"], warnings)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{str(path)!r} is not a manifest of labels: {error!r}") from error

    def write(self, folder: Path) -> None:
        document = {"fingerprint": self.fingerprint, **asdict(self)}
        write_file(folder / FOR_DATASETS[0], FOR_DATASETS[1])
        write_file(folder / MANIFEST, to_json(document, indent=1).encode())


@dataclass(frozen=True)
class Parts:
    """The parts in a folder, and the manifest of all of them. `listed` are those of a snapshot, see there."""

    folder: Path
    manifest: Manifest
    listed: tuple[Path, ...] | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Parts":
        """Return the parts in `folder`. Raises InputError if there are none."""
        place = Path(folder)
        if (manifest := Manifest.read(place)) is None:
            raise InputError(f"no labels in {str(folder)!r}: expected a folder that `open-gem label --out` filled")
        return cls(place, manifest)

    @classmethod
    def claim(cls, folder: Path, manifest: Manifest) -> "Parts":
        """Prepare the folder for parts by these settings; create it if needed.

        Raises InputError if it holds labels made with other settings, OutputError if it cannot be written.
        """
        cls.check_claim(folder, manifest)
        if Manifest.read(folder) != manifest:
            manifest.write(folder)  # including the place of the images
        return cls(folder, manifest)

    @classmethod
    def check_claim(cls, folder: Path, manifest: Manifest) -> None:
        """Raise InputError as `claim` does; write nothing."""
        if (existing := Manifest.read(folder)) is None:
            if next(folder.glob(PARTS), None) is not None:
                raise InputError(f"{str(folder)!r} has parts without a {MANIFEST}: expected an empty or new folder")
            return
        if existing.fingerprint != manifest.fingerprint:
            raise InputError(
                f"{str(folder)!r} holds labels made with other settings, expected the same or another folder: "
                + differences(existing, manifest)
            )
        if existing.root != manifest.root and existing.root is not None and _is_elsewhere(existing.root, manifest.root):
            raise InputError(
                f"{str(folder)!r} holds labels of images in {existing.root!r}, which still exists, and ids are "
                f"relative to it: expected another folder for those in {manifest.root!r}"
            )

    def paths(self) -> list[Path]:
        """Return the parts, ordered by name and so by time."""
        return sorted(self.folder.glob(PARTS)) if self.listed is None else list(self.listed)

    def snapshot(self) -> "Parts":
        """Return the current parts: later reads do not see parts that labelling adds meanwhile."""
        return replace(self, listed=tuple(self.paths()))

    def write(self, name: str, rows: Sequence[LabelRow]) -> Path:
        """Write a part, or the same part again: a name stands for the same images. What is kept of them is written
        first, so no part is ever without it. Raises OutputError."""
        if kept := encode_kept(rows):
            write_file(self.kept_path(self.path(name)), kept, durable=True)
        write_part(self.path(name), rows)
        return self.path(name)

    def path(self, name: str) -> Path:
        """Return the path of the part with this name."""
        return self.folder / f"part-{name}.parquet"

    def kept_path(self, path: Path) -> Path:
        """Return the path of what is kept of the images of a part."""
        return self.folder / KEPT / f"{path.stem}.kept"

    def with_kept(self, path: Path, *names: str) -> Iterator[tuple[LabelRow, LabelRow | None]]:
        """Yield the rows of a part, or some of their fields with id and status, each with what was kept of the image;
        None for an image with an error. Raises OutputError if either file cannot be read, or they do not belong
        together."""
        place = self.kept_path(path)
        kept = rows_in(place) if place.exists() else iter(())
        for row in rows_in(path, *names):
            own = None if row["status"] == "error" else next(kept, None)
            if row["status"] != "error" and (own is None or own["id"] != row["id"]):
                raise OutputError(
                    f"{str(place)!r} has not what was kept of {row['id']!r}: remove {path.name!r} to label its images "
                    "again"
                )
            yield row, own

    def forget_errors(self, which: Callable[[LabelRow], bool] = lambda row: True) -> list[str]:
        """Remove the rows of images that could not be labelled, so that they are tried again; return their ids.

        which  takes id, source and status of each such row, and returns whether to remove it

        Raises OutputError.
        """
        forgotten: list[str] = []
        for path in self.paths():
            if ids := {row["id"] for row in errors_in(path) if which(row)}:
                write_part(path, [row for row in rows_in(path) if row["id"] not in ids])
                forgotten += ids
        return forgotten

    def columns(self, *names: str) -> Iterator["pyarrow.RecordBatch"]:
        """Yield all rows, or some of their columns (nested fields, too: "objects.list.element.label"), a few rows at a
        time.

        Raises OutputError for a part that cannot be read.
        """
        for path in self.paths():
            yield from _batches(path, names)

    def rows(self, *names: str) -> Iterator[LabelRow]:
        """Yield all rows as dicts, or some of their fields, with a few of them in memory at a time. Errors as
        `columns`."""
        for path in self.paths():
            yield from rows_in(path, *names)

    def find(self, places: Mapping[str, Path], *names: str) -> Iterator[LabelRow]:
        """Yield rows, or some of their fields with their id, by ids and the parts that have them. Errors as
        `columns`."""
        for path in sorted(set(places.values())):
            for batch in _batches(path, names):
                ids = enumerate(batch.column("id").to_pylist())
                yield from batch.take([number for number, id in ids if id in places]).to_pylist()


# All parts replaced at once -------------------------------------------------------------------------------------------


@contextmanager
def replacing(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Open a folder for new parts of the same names, by other settings. On success they replace those in `folder`, and
    `manifest` its manifest; otherwise nothing changes. The caller has the lock of `folder`.

    Raises OutputError.
    """
    staged = folder / STAGED
    shutil.rmtree(staged, ignore_errors=True)
    try:
        yield staged
        manifest.write(staged)  # from now on `settle` finishes it, whatever happens to this process
    finally:
        settle(folder)
        shutil.rmtree(staged, ignore_errors=True)


def settle(folder: Path) -> None:
    """Move new parts to their places if all of them are there, so that a crash leaves either the old or the new ones.
    Several processes may do so at once. Raises OutputError."""
    staged = folder / STAGED
    if not (staged / MANIFEST).exists():
        return
    try:
        for path in (*staged.glob(PARTS), staged / FOR_DATASETS[0], staged / MANIFEST):  # the manifest comes last
            with suppress(FileNotFoundError):  # another process was faster
                path.replace(folder / path.name)
        shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot replace the parts in {str(folder)!r}: {error.strerror or error}") from error


def tidy(folder: Path) -> None:
    """Finish or remove what killed writers left: new parts, and what was kept of parts that were never written. The
    caller has the lock of `folder`, for all shards."""
    settle(folder)
    shutil.rmtree(folder / STAGED, ignore_errors=True)
    for path in (folder / KEPT).glob("*.kept"):
        if not (folder / f"{path.stem}.parquet").exists():
            path.unlink(missing_ok=True)


# Rows -----------------------------------------------------------------------------------------------------------------


def rows_in(path: Path, *names: str) -> Iterator[LabelRow]:
    """Yield the rows of one part, or some of their fields. Errors as `Parts.columns`."""
    for batch in _batches(path, names):
        yield from batch.to_pylist()


def errors_in(path: Path) -> Iterator[LabelRow]:
    """Yield id, source and status of the images of a part that could not be labelled. Errors as `Parts.columns`."""
    return (row for row in rows_in(path, "id", "source", "status") if row["status"] == "error")


def encode(rows: Sequence[LabelRow], fields: "pyarrow.Schema | None" = None) -> bytes:
    """Encode rows as a part, or as a file of other `fields`."""
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(list(rows), schema=schema() if fields is None else fields)
    parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def encode_kept(rows: Sequence[LabelRow]) -> bytes:
    """Encode what is kept of the images of rows that are going to be written; empty if nothing is."""
    kept = [{"id": row["id"], **row["kept"]} for row in rows if row.get("kept") is not None]
    return encode(kept, kept_schema()) if kept else b""


def write_part(path: Path, rows: Sequence[LabelRow]) -> None:
    """Write a part. Raises OutputError."""
    write_file(path, encode(rows), durable=True)


def _batches(path: Path, names: Sequence[str]) -> Iterator["pyarrow.RecordBatch"]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as part:
            yield from part.iter_batches(64 * READ if names else READ, columns=list(names) or None)
    except (OSError, ArrowException) as error:
        reason = " ".join(str(error).split())
        raise OutputError(f"cannot read {str(path)!r}: {reason}; remove it to label its images again") from error


def _is_elsewhere(root: str, now: str | None) -> bool:
    """Return True if images may still exist at `root`, and `now` is not another name for it; remote roots are not
    checked."""
    if "://" in root:
        return True
    return Path(root).exists() and (now is None or not Path(now).exists() or not Path(root).samefile(now))


def differences(existing: Manifest, wanted: Manifest) -> str:
    """Describe how two manifests differ, for a message: the first few settings; a change common to many is listed
    once."""
    old, new = ({**_flat(manifest.settings), "labels": list(manifest.labels)} for manifest in (existing, wanted))
    changes: dict[str, list[str]] = {}
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            change = f"was {_short(old.get(name))}, is {_short(new.get(name))}"
            changes.setdefault(f"{name.rpartition('.')[2]} {change}", []).append(f"{name} {change}")
    lines = [same[0] if len(same) == 1 else f"{same[0]} (and {len(same) - 1} more such)" for same in changes.values()]
    return "; ".join([*lines[:3], f"{len(lines) - 3} more"] if len(lines) > 3 else lines)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = to_json(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
