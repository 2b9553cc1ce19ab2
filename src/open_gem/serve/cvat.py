"""CVAT: a function that annotates the images of a task.

    cvat-cli task auto-annotate 42 --function-module open_gem.serve.cvat -p "prompts=str:cat,remote control"

`cvat-cli` (which knows the server and logs in) calls `create` with what -p says, and then `detect` for each image.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from open_gem.errors import InputError

if TYPE_CHECKING:
    from open_gem.export.labelled import Object
    from open_gem.label.labeling import Labeling

SHAPES = ("mask", "rectangle")


def create(
    prompts: str = "",
    ontology: str = "",
    model: str = "embedded",
    pretrained: str = "",
    method: str = "gem",
    shape: str = "mask",
    presence: float | None = None,
    threshold: float | None = None,
    device: str = "auto",
) -> "Function":
    """The function, its model loaded.

    prompts     labels by commas, each its own phrase; or instead
    ontology    a file of labels and phrases, as `open-gem label --ontology` reads it
    model …     as `open_gem.load`; pretrained "" for none
    shape       "mask" (polygons, where CVAT asks to convert them) or "rectangle"
    presence    of labels without their own: probability that a label is in the image above which it is looked for; else
                the file's, or 0.9. With `cvat-cli --conf-threshold`, that instead, of all labels
    threshold   of labels without their own: level of the heatmap above which a pixel belongs to the label, in [0, 1];
                else the file's, or 0.5

    Raises InputError for settings that make no sense, and what `open_gem.load` raises.
    """
    from open_gem.label.labeling import Labeling
    from open_gem.label.ontology import Ontology
    from open_gem.localizer import load

    if shape not in SHAPES:
        raise InputError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")
    if bool(prompts) == bool(ontology):
        raise InputError("expected prompts (labels by commas) or an ontology (a file), and not both")
    levels: dict[str, Any] = {"presence": presence, "threshold": threshold}
    labels = [prompt.strip() for prompt in prompts.split(",")]
    wanted = Ontology.read(ontology, **levels) if ontology else Ontology.of(labels, **levels)
    localizer = load(model, pretrained or None, method=method, device=device)
    return Function(Labeling(localizer, wanted, outputs=("boxes", "masks")), shape)


@dataclass(frozen=True, eq=False)
class Function:
    """What CVAT calls: `spec` says which labels there are, `detect` finds them in an image."""

    labeling: "Labeling"
    shape: str

    @cached_property
    def spec(self) -> Any:
        from cvat_sdk import auto_annotation  # pyright: ignore[reportMissingImports]

        labels = self.labeling.ontology.labels
        return auto_annotation.DetectionFunctionSpec(
            labels=[auto_annotation.label_spec(label, index, type=self.shape) for index, label in enumerate(labels)]
        )

    def detect(self, context: Any, image: Any) -> list[Any]:
        """The shapes in a PIL image, best first within a label."""
        objects = self._find(context.frame_name, image, context.conf_threshold)
        return [shape for one in objects for shape in self._shapes(one, context.conv_mask_to_poly)]

    def _find(self, name: str, image: Any, least: float | None) -> Iterator["Object"]:
        from open_gem.export.labelled import object_of
        from open_gem.images.pixels import read_image, size_of
        from open_gem.label.labeling import Ready
        from open_gem.label.sources import Item

        labeling, picture = self.labeling, read_image(image)
        if least is not None:
            wanted = labeling.ontology
            labeling = replace(labeling, ontology=replace(wanted, presence=(least,) * len(wanted.labels)))
        ready = Ready(Item(name, name), size_of(picture), 0.0, labeling.localizer.pixels(picture), None)
        for raw in labeling.row(labeling.find([ready])[0])["objects"]:
            yield object_of(raw, labeling.ontology.labels.index(raw["label"]))

    def _shapes(self, one: "Object", as_polygons: bool) -> Iterator[Any]:
        import numpy as np
        from cvat_sdk import auto_annotation, masks  # pyright: ignore[reportMissingImports]

        from open_gem.export.polygons import polygons

        left, top, right, bottom = one.xyxy
        mask = one.mask()
        if self.shape == "rectangle" or mask is None:
            yield auto_annotation.rectangle(one.label, [float(left), float(top), float(right), float(bottom)])
        elif not as_polygons:
            yield auto_annotation.mask(one.label, masks.encode_mask(mask, one.xyxy))
        else:
            thin = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])  # has no polygon of its own
            for corners in polygons(mask) or [thin]:
                yield auto_annotation.polygon(one.label, corners.astype(float).ravel().tolist())
