"""Precision and recall of labels by their thresholds, against marks or true objects, and thresholds that follow.

    judged = judge_marks(parts, read_marks(Path("marks.csv")))      # or judge(parts, Truth.read(Path("truth.json")))
    curve = curves(judged)["cat"]                                   # precision and recall at each presence
    best_point(curve, 0.9)                                          # the threshold with the most recall

A detection is right or wrong by itself. Its presence is that of its label in its image, so a presence threshold keeps
all detections of an image and label, or none. Intervals are Wilson's, at 95 %, and take detections as independent:
with many of them in an image they are too narrow.
"""

import contextlib
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from open_gem.checks import listed
from open_gem.errors import InputError
from open_gem.files import to_json, write_file
from open_gem.label.kept import kept_images
from open_gem.label.marks import Detection
from open_gem.label.ontology import FILES as CLASS_FILES
from open_gem.label.ontology import Ontology
from open_gem.label.parts import LabelRow, Parts
from open_gem.label.rules import ObjectRules
from open_gem.types import Size

FEWEST = 10  # detections from which a threshold is chosen
LOWEST = 0.1  # presence from which kept maps are looked at
STEPS = 10_000  # presence thresholds are whole multiples of 1/STEPS
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of heatmaps, that are tried where maps are kept
FIELDS = tuple(f"objects.list.element.{name}" for name in ("label", "presence", "confidence", "xyxy"))


class Rate(NamedTuple):
    """A share of counted things, `hits` of `of`, with its Wilson interval at 95 %; all NaN if there are none."""

    hits: int
    of: int

    @property
    def value(self) -> float:
        return self.hits / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.of:
            return math.nan, math.nan
        low, high = binomtest(self.hits, self.of).proportion_ci(method="wilson")
        return float(low), float(high)

    def document(self) -> dict[str, Any]:
        """Return values that JSON can hold."""
        return {"value": self.value, "low": self.interval[0], "high": self.interval[1], "of": self.of}


class Point(NamedTuple):
    """Detections of a label whose presence is not below `presence`, by a `threshold` of heatmaps: how many of them are
    right, and how many of all that is to be detected they are."""

    presence: float
    threshold: float
    precision: Rate
    recall: Rate

    def document(self) -> dict[str, Any]:
        """Return values that JSON can hold."""
        return {
            "presence": self.presence,
            "threshold": self.threshold,
            "precision": self.precision.document(),
            "recall": self.recall.document(),
        }


@dataclass
class Judged:
    """Detections of a label by one threshold of heatmaps: the presence of each, and whether it is right.

    wanted  objects to be detected: the true ones; None if only detections were marked: those that are right
    """

    threshold: float
    presence: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    wanted: int | None = None

    def add(self, presence: float | None, right: bool) -> None:
        self.presence.append(1.0 if presence is None else presence)
        self.right.append(right)

    def curve(self) -> list[Point]:
        """Return precision and recall at each presence that a detection has, rounded down, lowest first."""
        presence, right = np.array(self.presence, np.float64), np.array(self.right, bool)
        wanted = int(right.sum()) if self.wanted is None else self.wanted
        points = []
        for limit in np.unique(np.floor(presence * STEPS) / STEPS):
            kept = presence >= limit
            hits = int(right[kept].sum())
            points.append(Point(float(limit), self.threshold, Rate(hits, int(kept.sum())), Rate(hits, wanted)))
        return points


def at_presence(points: Sequence[Point], presence: float) -> Point | None:
    """Return the point of a curve for a presence threshold; None if no detection reaches it."""
    return next((point for point in points if point.presence >= math.floor(presence * STEPS) / STEPS), None)


def best_point(points: Iterable[Point], precision: float) -> Point | None:
    """Return the point with the most recall among those of at least `precision`, from `FEWEST` detections or more; None
    if there is none. Among equals, the more precise."""
    enough = [point for point in points if point.precision.of >= FEWEST and point.precision.value >= precision]
    return max(enough, key=lambda point: (point.recall.hits, point.precision.value), default=None)


def verdict(points: Sequence[Point], best: Point | None, precision: float) -> str:
    """Return what the data say about a wanted precision, in words."""
    if best is not None:
        if best.precision.interval[0] >= precision:
            return "shown by the data"
        return f"likely, not shown: {best.precision.of} detections are too few"
    if any(point.precision.value >= precision for point in points):
        return f"not supported: reached by fewer than {FEWEST} detections only"
    if not (enough := [point for point in points if point.precision.of >= FEWEST]):
        most = max((point.precision.of for point in points), default=0)
        return f"not supported: {most} detections, expected {FEWEST} or more"
    highest = max(enough, key=lambda point: point.precision.value)
    return f"not reached: {highest.precision.value:.2f} at most, at presence {highest.presence:.4g}"


# Marks ----------------------------------------------------------------------------------------------------------------


def judge_marks(parts: Parts, marks: Mapping[Detection, bool]) -> dict[str, list[Judged]]:
    """Return the marked detections by label. Raises InputError if a mark is of no detection in the parts."""
    labels, threshold = parts.manifest.labels, thresholds_of(parts)
    judged = {label: Judged(threshold[label]) for label in labels}
    open_marks = dict(marks)
    for row in parts.rows("id", *FIELDS):
        for stored in row["objects"] or ():
            if (mark := open_marks.pop(Detection.of(row["id"], stored), None)) is not None:
                judged[stored["label"]].add(stored["presence"], mark)
    if open_marks:
        first = next(iter(open_marks))
        raise InputError(
            f"{len(open_marks)} of {len(marks)} marks are of no detection in {str(parts.folder)!r}, such as "
            f"{first.label!r} in {first.id!r}: expected marks of these labels, by the same threshold of heatmaps"
        )
    return {label: [own] for label, own in judged.items()}


def thresholds_of(parts: Parts) -> dict[str, float]:
    """Return the threshold of heatmaps of each label. Raises InputError if the manifest has none."""
    try:
        labels = parts.manifest.settings["classes"]["labels"]
        return {label: labels[label]["threshold"] for label in parts.manifest.labels}
    except (KeyError, TypeError) as error:
        raise InputError(f"the labels in {str(parts.folder)!r} have no thresholds: label the images again") from error


# True objects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """True objects in COCO's format.

    coco        pycocotools' `COCO`
    images      file names → image ids
    categories  names → category ids
    has_masks   whether each object has a segmentation; otherwise boxes are compared
    """

    coco: Any
    images: Mapping[str, int]
    categories: Mapping[str, int]
    has_masks: bool

    @classmethod
    def read(cls, path: Path) -> "Truth":
        """Read a file of instances. Raises InputError if it is not COCO's format."""
        from pycocotools.coco import COCO

        try:
            document = json.loads(path.read_text("utf-8-sig"))
            images = {str(image["file_name"]): image["id"] for image in document["images"]}
            categories = {str(category["name"]): category["id"] for category in document["categories"]}
            objects = document["annotations"]
            for number, true in enumerate(objects, start=1):
                _, _, width, height = true["bbox"]
                usual = {"id": number, "iscrowd": 0, "area": width * height}
                required = {name: true[name] for name in ("image_id", "category_id")}
                true |= {**usual, **true, **required}
            coco: Any = COCO()
            coco.dataset = document
            with contextlib.redirect_stdout(io.StringIO()):
                coco.createIndex()
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{str(path)!r} is not COCO's instances ({type(error).__name__}: {error})") from error
        sizes = all("height" in image and "width" in image for image in document["images"])
        has_masks = sizes and bool(objects) and all(true.get("segmentation") for true in objects)
        return cls(coco, images, categories, has_masks)

    def image_of(self, id: str) -> int | None:
        """Return the image id of a labelled image: its file name is the id, or the end of it that no other shares."""
        if id in self.images:
            return self.images[id]
        ends = [
            image for name, image in self.images.items() if f"/{id}".endswith(f"/{name}") or name.endswith(f"/{id}")
        ]
        return ends[0] if len(ends) == 1 else None

    def check_size(self, id: str, image: int, size: Size) -> None:
        """Raise InputError if an image has another size in the truth."""
        stored = self.coco.imgs[image]
        expected = Size(stored.get("height", size.height), stored.get("width", size.width))
        if expected != size:
            raise InputError(
                f"{id!r} is {size.height}x{size.width} pixels (height x width) in the labels and "
                f"{expected.height}x{expected.width} in the truth, expected the same image"
            )


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    """Keep torch to one thread: on maps of one image, several wait for each other most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_single_thread()
def judge(parts: Parts, truth: Truth, iou: float = 0.5) -> dict[str, list[Judged]]:
    """Return all detections by label, each right if it matches a true object.

    They are those of the labels or, if what the model saw is kept, those from a presence of `LOWEST` or the lowest that
    was kept, by the thresholds that made the labels and by each of `THRESHOLDS` (not if these would be cosines). With
    exclusive masks or suppression, another presence may change the detections themselves.

    Matching is that of pycocotools' `COCOeval`: the most confident detection first, IoU of masks if both have them,
    otherwise of boxes, of at least `iou`. Labels that are no category of the truth, and images that are not in it, do
    not count. Raises InputError if no label or no image matches.
    """
    labels = [label for label in parts.manifest.labels if label in truth.categories]
    if not labels:
        known = listed(tuple(truth.categories))
        raise InputError(f"no category of the truth is a label, expected {listed(parts.manifest.labels)}; got {known}")
    by_threshold: dict[float | None, list[dict[str, Any]]] = defaultdict(list)
    images: set[int] = set()
    for image_id, threshold, stored in _detections(parts, truth):
        images.add(image_id)
        by_threshold[threshold] += [
            {**entry, "category_id": truth.categories[label]} for label, entry in stored if label in labels
        ]
    if not images:
        ids = [row["id"] for _, row in zip(range(3), parts.rows("id"), strict=False)]
        raise InputError(
            "no labelled image is in the truth, expected its file names to be ids such as "
            f"{', '.join(map(repr, ids))}; got {', '.join(map(repr, list(truth.images)[:3]))}"
        )
    own = thresholds_of(parts)
    result: dict[str, list[Judged]] = {label: [] for label in labels}
    for threshold, detections in by_threshold.items():
        matched = _match(truth, detections, sorted(images), iou)
        for label in labels:
            category = truth.categories[label]
            judged = Judged(own[label] if threshold is None else threshold, wanted=matched.wanted[category])
            for presence, right in matched.judged[category]:
                judged.add(presence, right)
            result[label].append(judged)
    return result


def _detections(parts: Parts, truth: Truth) -> Iterator[tuple[int, float | None, list[tuple[str, dict[str, Any]]]]]:
    """Yield detections of each image in the truth by threshold; None: those that made the labels."""
    if parts.manifest.settings.get("keep") is None:
        for row in parts.rows("id", "status", "height", "width", "objects"):
            if row["status"] == "ok" and (image := truth.image_of(row["id"])) is not None:
                truth.check_size(row["id"], image, Size(row["height"], row["width"]))
                yield image, None, [(stored["label"], _entry(image, stored)) for stored in row["objects"]]
        return
    rules = ObjectRules.of(parts.manifest.settings)
    for kept in kept_images(parts):
        if (image := truth.image_of(kept.id)) is None:
            continue
        truth.check_size(kept.id, image, kept.localization.size)
        for threshold in (None, *(() if rules.heatmap_scale == "cosine" else THRESHOLDS)):
            limits = rules.classes.threshold if threshold is None else threshold
            objects = kept.localization.objects(
                limits,
                rules.heatmap_scale,
                presence=max(rules.keep or 0.0, LOWEST),
                absent="presence",
                min_area=rules.min_area,
                instances=rules.instances,
                exclusive=rules.exclusive,
                nms=rules.nms,
                masks=truth.has_masks,
            )
            stored = [rules.stored(obj) for obj in objects]
            yield image, threshold, [(obj["label"], _entry(image, obj)) for obj in stored]


def _entry(image: int, stored: LabelRow) -> dict[str, Any]:
    """Return a stored object as a result of COCO."""
    left, top, right, bottom = stored["xyxy"]
    entry = {"image_id": image, "bbox": [left, top, right - left, bottom - top], "score": stored["confidence"]}
    return entry | {"presence": stored["presence"], "segmentation": stored["rle"]}


class Matched(NamedTuple):
    """By category: (presence, whether it is right) of each detection, and how many objects are to be detected."""

    judged: Mapping[int, list[tuple[float | None, bool]]]
    wanted: Mapping[int, int]


def _match(truth: Truth, detections: Sequence[dict[str, Any]], images: Sequence[int], iou: float) -> Matched:
    """Match detections with true objects by `COCOeval`. Those that match a crowd do not count."""
    from pycocotools.cocoeval import COCOeval

    has_masks = truth.has_masks and all(detection["segmentation"] for detection in detections)
    judged: dict[int, list[tuple[float | None, bool]]] = defaultdict(list)
    wanted: Counter[int] = Counter()
    with contextlib.redirect_stdout(io.StringIO()):
        results = _results(truth, detections)
        evaluation = COCOeval(truth.coco, results, "segm" if has_masks else "bbox")
        evaluation.params.imgIds = list(images)
        evaluation.params.iouThrs = np.array([iou])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [10**6]
        evaluation.evaluate()
    for image in filter(None, evaluation.evalImgs):
        category = image["category_id"]
        wanted[category] += sum(not ignored for ignored in image["gtIgnore"])
        for id, match, ignored in zip(image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True):
            if not ignored:
                judged[category].append((results.anns[id]["presence"], match > 0))
    return Matched(judged, wanted)


def _results(truth: Truth, detections: Sequence[dict[str, Any]]) -> Any:
    """Return detections as a `COCO` beside the truth."""
    from pycocotools import mask
    from pycocotools.coco import COCO

    results: Any = COCO()
    annotations = []
    for number, detection in enumerate(detections, start=1):
        rle = detection["segmentation"]
        area = float(mask.area(rle)) if rle else detection["bbox"][2] * detection["bbox"][3]
        annotations.append({**detection, "id": number, "area": area, "iscrowd": 0})
    results.dataset = {**truth.coco.dataset, "annotations": annotations}
    results.createIndex()
    return results


# The class file -------------------------------------------------------------------------------------------------------


def classes_of(parts: Parts) -> Ontology:
    """Return the labels, prompts and thresholds that made labels."""
    thresholds_of(parts)
    return Ontology.of(parts.manifest.settings["classes"])


def check_class_file(path: Path, classes: Ontology) -> None:
    """Raise InputError if a class file cannot be written, or exists with other labels or prompts, which need
    the model."""
    if path.suffix.lower() not in CLASS_FILES:
        raise InputError(
            f"{str(path)!r} is no class file with thresholds, expected an ending of {', '.join(CLASS_FILES)}"
        )
    if exemplars := classes.vocabulary.exemplars:
        raise InputError(
            f"the labels do not hold the image of the exemplar {exemplars[0].name!r}, so no class file can be written: "
            "put the thresholds into your own"
        )
    if not path.exists():
        return
    own, made = Ontology.read(path).describe(), classes.describe()
    for label in dict.fromkeys((*made["labels"], *own["labels"])):
        prompts = [document["labels"].get(label, {}).get("prompts") for document in (made, own)]
        if prompts[0] != prompts[1]:
            shown = ["no such label" if texts is None else ", ".join(map(repr, texts)) for texts in prompts]
            raise InputError(
                f"{str(path)!r} differs from what made the labels at label {label!r}: {shown[0]} there, {shown[1]} in "
                "the file; expected the same labels and prompts, or another file"
            )
    if own["background"] != made["background"]:
        raise InputError(
            f"{str(path)!r} has another background than what made the labels, expected "
            f"{', '.join(map(repr, made['background'])) or 'none'}"
        )


def tuned(classes: Ontology, chosen: Mapping[str, Point]) -> Ontology:
    """Return the classes with chosen thresholds; labels without keep theirs."""
    entries = {
        name: dict(zip(classes.labels, getattr(classes, name), strict=True)) for name in ("presence", "threshold")
    }
    for label, point in chosen.items():
        entries["presence"][label], entries["threshold"][label] = point.presence, point.threshold
    return replace(classes, **{name: tuple(values.values()) for name, values in entries.items()})


def write_class_file(path: Path, classes: Ontology) -> None:
    """Write a class file, YAML or JSON by its ending. Raises OutputError."""
    import yaml

    document = classes.describe()
    if not document["background"]:
        del document["background"]
    is_json = path.suffix.lower() == ".json"
    text = to_json(document, indent=1) if is_json else yaml.safe_dump(document, allow_unicode=True, sort_keys=False)
    write_file(path, text.encode())
