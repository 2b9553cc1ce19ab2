"""CVAT: a function that annotates the images of a task.

    cvat-cli task auto-annotate 42 --function-module open_gem.serve.cvat -p "prompts=str:cat,remote control"
    cvat-cli task auto-annotate 42 --function-module open_gem.serve.cvat -p classes=str:classes.yaml

`cvat-cli` (which knows the server and logs in) calls `create` with the -p arguments, then `detect` for each image. A
class file has prompts, presence and threshold of each label, see `label.ontology`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from open_gem.errors import InputError
from open_gem.localization import INSTANCES, MIN_AREA

if TYPE_CHECKING:
    from open_gem.label.labeling import Labeling
    from open_gem.objects import Object

SHAPES = ("mask", "rectangle")


def create(
    prompts: str = "",
    classes: str = "",
    model: str = "",
    pretrained: str = "",
    method: str = "gem",
    size: str = "",
    refine: str = "",
    shape: str = "mask",
    presence: float | None = None,
    threshold: float | None = None,
    min_area: float = MIN_AREA,
    instances: str = INSTANCES[0],
    device: str = "auto",
) -> "Function":
    """Make the function and load its model.

    prompts     comma-separated labels, each its own prompt; or instead
    classes     a class file with labels and prompts, as `open-gem label --classes` reads it
    model …     as `open_gem.load`; "" for the default
    refine      name of a refinement, such as "pamr"; "" for none
    shape       "mask" (polygons, if CVAT asks to convert them) or "rectangle"
    presence    default image-level presence threshold of labels; without it, the file's, or 0.5. `cvat-cli
                --conf-threshold` replaces those of all labels
    threshold   default heatmap threshold of labels, in [0, 1]; without it, the file's, or 0.5
    min_area …  as `Localization.objects`

    Raises InputError for invalid settings, and what `open_gem.load` raises.
    """
    from open_gem.label.labeling import Labeling
    from open_gem.label.ontology import Ontology
    from open_gem.label.rules import ObjectRules
    from open_gem.localizer import load
    from open_gem.refine import find_refinement

    if shape not in SHAPES:
        raise InputError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")
    if bool(prompts) == bool(classes):
        raise InputError("expected prompts (comma-separated labels) or classes (a file), and not both")
    levels: dict[str, Any] = {"presence": presence, "threshold": threshold}
    labels = [prompt.strip() for prompt in prompts.split(",")]
    ontology = Ontology.read(classes, **levels) if classes else Ontology.of(labels, **levels)
    objects: dict[str, Any] = {
        "min_area": min_area,
        "instances": instances,
        "keep": None,
        "outputs": ("boxes", "masks"),
    }
    ObjectRules(ontology, **objects)  # errors come before the model
    refinement = find_refinement(refine) if refine else None
    localizer = load(
        model or None, pretrained or None, method=method, size=size or None, refinement=refinement, device=device
    )
    return Function(Labeling(localizer, ontology, **objects), shape)


@dataclass(frozen=True, eq=False)
class Function:
    """What CVAT calls: `spec` lists the labels, `detect` locates them in an image."""

    labeling: "Labeling"
    shape: str

    @cached_property
    def spec(self) -> Any:
        from cvat_sdk import auto_annotation  # pyright: ignore[reportMissingImports]

        labels = self.labeling.classes.labels
        return auto_annotation.DetectionFunctionSpec(
            labels=[auto_annotation.label_spec(label, index, type=self.shape) for index, label in enumerate(labels)]
        )

    def detect(self, context: Any, image: Any) -> list[Any]:
        """Return the shapes in a PIL image, best first within a label."""
        labeling = self.labeling
        if (least := context.conf_threshold) is not None:
            labels = labeling.classes.labels
            labeling = replace(labeling, classes=replace(labeling.classes, presence=(least,) * len(labels)))
        objects = labeling.objects(labeling.localizer(image, labeling.classes.vocabulary).to("cpu"))
        return [shape for obj in objects for shape in self._shapes(obj, context.conv_mask_to_poly)]

    def _shapes(self, obj: "Object", as_polygons: bool) -> Iterator[Any]:
        import numpy as np
        from cvat_sdk import auto_annotation, masks  # pyright: ignore[reportMissingImports]

        from open_gem.export.polygons import polygons

        left, top, right, bottom = obj.box
        mask = obj.mask
        if self.shape == "rectangle" or mask is None:
            yield auto_annotation.rectangle(obj.index, [float(left), float(top), float(right), float(bottom)])
        elif not as_polygons:
            yield auto_annotation.mask(obj.index, masks.encode_mask(mask, obj.box))
        else:
            thin = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])  # no polygon of its own
            for corners in polygons(mask) or [thin]:
                yield auto_annotation.polygon(obj.index, corners.astype(float).ravel().tolist())
