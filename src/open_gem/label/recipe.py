"""How to come to a `Labeling` in any process: plain values that travel, where a model cannot."""

from dataclasses import dataclass, field

from open_gem.images.pixels import check_size_rule
from open_gem.images.views import WHOLE, Views
from open_gem.label.labeling import Labeling, check_settings
from open_gem.label.ontology import Ontology
from open_gem.label.reading import SECONDS
from open_gem.localizer import load
from open_gem.method.table import check_name
from open_gem.refine.pamr import Pamr
from open_gem.text import TEMPLATE, Template, check_template


@dataclass(frozen=True)
class Recipe:
    """The settings of `load` and of `Labeling`. Raises InputError for ones that make no sense, before a model is
    loaded."""

    ontology: Ontology
    model: str = "embedded"
    pretrained: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    method: str = "gem"
    size: str | None = None
    template: Template = TEMPLATE
    views: Views = WHOLE
    refinement: Pamr | None = None
    outputs: tuple[str, ...] = field(default=("boxes", "masks", "points"))
    scale: str = "minmax"
    per: str = "component"
    least_area: float = 0.0005
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        check_name(self.method)
        check_template(self.template)
        if self.size is not None:
            check_size_rule(self.size)
        check_settings(self.outputs, self.scale, self.per, self.least_area)

    def make(self) -> Labeling:
        """The labeling, on a model of its own. Errors as of `towers.load`."""
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
        return Labeling(localizer, self.ontology, self.outputs, self.scale, self.per, self.least_area, self.seconds)
