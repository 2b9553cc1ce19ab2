"""The settings of a `Labeling` as plain values: they can be sent to another process, which a model cannot."""

from dataclasses import dataclass, field

from open_gem.images.pixels import check_size_rule
from open_gem.images.views import WHOLE, Views
from open_gem.label.labeling import Labeling, check_settings
from open_gem.label.ontology import Ontology
from open_gem.label.reading import READ_TIMEOUT
from open_gem.localization import MIN_AREA
from open_gem.localizer import load
from open_gem.method.table import check_name
from open_gem.refine import Refinement
from open_gem.text import TEMPLATE, Template, check_template


@dataclass(frozen=True)
class Recipe:
    """The settings of `load` and of `Labeling`. Raises InputError for invalid ones before a model is loaded."""

    classes: Ontology
    model: str | None = None
    pretrained: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    method: str = "gem"
    size: str | None = None
    template: Template = TEMPLATE
    views: Views = WHOLE
    refinement: Refinement | None = None
    outputs: tuple[str, ...] = field(default=("boxes", "masks", "points"))
    heatmap_scale: str = "minmax"
    instances: str = "component"
    min_area: float = MIN_AREA
    read_timeout: float = READ_TIMEOUT

    def __post_init__(self) -> None:
        check_name(self.method)
        check_template(self.template)
        if self.size is not None:
            check_size_rule(self.size)
        check_settings(self.outputs, self.heatmap_scale, self.instances, self.min_area)

    def make(self) -> Labeling:
        """Load a model and return the labeling on it. Errors as of `towers.load`."""
        localizer = load(
            self.model,
            self.pretrained,
            method=self.method,
            size=self.size,
            template=self.template,
            views=self.views,
            refinement=self.refinement,
            device=self.device,
            dtype=self.dtype,
        )
        return Labeling(
            localizer,
            self.classes,
            self.outputs,
            self.heatmap_scale,
            self.instances,
            self.min_area,
            self.read_timeout,
        )
