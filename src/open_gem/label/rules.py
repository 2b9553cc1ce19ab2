"""Which objects an image has, by settings that need no model: from a localization to the fields of a row."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import Any

from open_gem.errors import InputError
from open_gem.label.label_map import LabelMap
from open_gem.label.ontology import Ontology
from open_gem.localization import ABSENT, INSTANCES, MIN_AREA, SCALES, Localization
from open_gem.objects import Object, check_nms

OUTPUTS = ("boxes", "masks", "points", "labelmap")
SETTINGS = ("heatmap_scale", "instances", "min_area", "exclusive", "nms", "absent", "keep")
"""Names of settings of `ObjectRules` that a manifest has as they are."""


@dataclass(frozen=True, eq=False)
class ObjectRules:
    """All that decides a row once the model has seen the image.

    classes        labels, their prompts and thresholds
    outputs        names from `OUTPUTS`; boxes are always written
    heatmap_scale  scale of the maps that the labels' thresholds apply to, see `Localization.heatmaps`
    instances      "component": one object per connected component of a mask; "label": one per label
    min_area       smallest share of the image's pixels that an object may have, in [0, 1]
    exclusive      masks of different labels do not overlap, see `Localization.objects`
    nms            IoU of boxes above which the less confident object is dropped, see there; None keeps all
    absent         rule for which labels have no objects, see `Localization.present`
    keep           keep what the model saw, for other thresholds later: maps of labels whose presence is not below this
                   floor, in [0, 1]; 0 keeps all maps, None nothing

    Raises InputError for values that do not exist, and for rules that need maps below the floor.
    """

    classes: Ontology
    outputs: tuple[str, ...] = ("boxes", "masks", "points")
    heatmap_scale: str = "minmax"
    instances: str = "component"
    min_area: float = MIN_AREA
    exclusive: bool = False
    nms: float | None = None
    absent: str = "presence"
    keep: float | None = 0.0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.outputs if name not in OUTPUTS]:
            raise InputError(f"output {unknown[0]!r}, expected any of {', '.join(OUTPUTS)}")
        for name, known in (("heatmap_scale", SCALES), ("instances", INSTANCES), ("absent", ABSENT)):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name.replace('_', ' ')} is {value!r}, expected one of {', '.join(known)}")
        if not 0 <= self.min_area <= 1:
            raise InputError(f"min area is {self.min_area!r}, expected a share of the image in [0, 1]")
        check_nms(self.nms)
        if self.keep is not None:
            self._check_keep(self.keep)

    def _check_keep(self, floor: float) -> None:
        if not 0 <= floor <= 1:
            raise InputError(f"keep floor is {floor!r}, expected a presence in [0, 1]")
        if floor and (self.absent != "presence" or self.heatmap_scale == "probability"):
            rule = f"absent {self.absent!r}" if self.absent != "presence" else "heatmap scale 'probability'"
            raise InputError(
                f"{rule} needs the maps of all labels, but those with presence below {floor:g} are not kept"
            )
        lowest = min(self.classes.presence)
        if lowest < floor:
            label = self.classes.labels[self.classes.presence.index(lowest)]
            raise InputError(
                f"presence of label {label!r} is {lowest:g}, expected {floor:g} or more: maps of labels below are not "
                "kept"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "ObjectRules":
        """Return the rules in the settings of a manifest. Raises InputError if there are none."""
        try:
            rest = {name: settings[name] for name in SETTINGS}
            return cls(Ontology.of(settings["classes"]), tuple(settings["outputs"]), **rest)
        except KeyError as error:
            raise InputError(f"the labels have no setting {error}: expected labels made by this version") from error

    def describe(self) -> dict[str, Any]:
        """Return the rules as values that JSON can hold, as a manifest has them."""
        return {
            "classes": self.classes.describe(),
            "outputs": [name for name in OUTPUTS if name in self.outputs],
            **{name: getattr(self, name) for name in SETTINGS},
        }

    def objects(self, localization: Localization, label_map: LabelMap | None = None) -> list[Object]:
        """Return the objects of one image, in the order of the labels; paint them on `label_map` too."""
        return localization.objects(
            self.classes.threshold,
            self.heatmap_scale,
            presence=self.classes.presence,
            absent=self.absent,
            min_area=self.min_area,
            instances=self.instances,
            exclusive=self.exclusive,
            nms=self.nms,
            masks="masks" in self.outputs,
            visit=None if label_map is None else label_map.add,
        )

    def fields(self, localization: Localization) -> dict[str, Any]:
        """Return the fields of a row that rules decide, and the size."""
        size = localization.size
        label_map = LabelMap(size) if "labelmap" in self.outputs else None
        with PIXELS.taken(size.height * size.width):  # each label in turn has maps of this size
            objects = self.objects(localization, label_map)
        return {
            **size._asdict(),
            "objects": [self.stored(obj) for obj in objects],
            "labelmap": None if label_map is None else label_map.png(len(self.classes.labels)),
        }

    def stored(self, obj: Object) -> dict[str, Any]:
        """Return an object as a row has it."""
        names = ("label", "prompt", "score", "image_score", "presence", "peak", "probability", "confidence")
        stored = {name: getattr(obj, name) for name in (*names, "rle", "mask_quality")}
        point = list(obj.point) if obj.point is not None and "points" in self.outputs else None
        return {**stored, "xyxy": list(obj.box), "point": point}


class PixelBudget:
    """Bounds how many pixels threads work on at once; an image larger than the budget goes alone."""

    def __init__(self, pixels: int):
        self._all = self._left = pixels
        self._changed = Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()


PIXELS = PixelBudget(2**26)
