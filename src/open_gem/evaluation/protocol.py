"""Protocols: everything besides the model and the method that decides a score."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from open_gem.checks import did_you_mean
from open_gem.errors import InputError
from open_gem.files import to_json
from open_gem.images.views import Views
from open_gem.localization import Localization, check_absent
from open_gem.locate import AnyLocalizer
from open_gem.method.table import Method
from open_gem.method.text_steps import TextStep
from open_gem.refine import Refinement
from open_gem.text import TEMPLATE, Template


@dataclass(frozen=True)
class EvalProtocol:
    """The settings of an evaluation.

    size        size rule; None: what the checkpoint recommends, otherwise "short:448"
    template    what class names are put into
    names       which variant of the class names; None: the first that the data set has
    views       the views of each image
    background  for data sets with a background class: a pixel is background if its best softmax probability is below
                this, by data set ("" for all others)
    logit_scale what cosines are multiplied by before that softmax; None: what the model was trained with
    threshold   of min-max maps, for tasks in which each class has a mask of its own (points, objects)
    refinement  of maps
    remove_redundancy
                see `Localizer`
    text_step   see `Localizer`
    absent      which labels win no pixel of an image: a rule of `localization.ABSENT`, see `Localization.present`
    """

    size: str | None = None
    template: Template = TEMPLATE
    names: str | None = None
    views: Views = field(default_factory=Views)
    background: Mapping[str, float] = field(default_factory=lambda: {"": 0.8})
    logit_scale: float | None = 100.0
    threshold: float = 0.5
    refinement: Refinement | None = None
    remove_redundancy: bool = False
    text_step: TextStep | None = None
    absent: str = "none"

    def __post_init__(self) -> None:
        check_absent(self.absent)

    def background_of(self, dataset: str) -> float:
        """Return the threshold of the background, for a data set that has one."""
        return self.background.get(dataset, self.background[""])

    def settle(self, localizer: AnyLocalizer) -> AnyLocalizer:
        """Return the model with the settings of this protocol; a model that was trained to localize keeps its own."""
        return localizer.configured(
            size=self.size,
            template=self.template,
            views=self.views,
            refinement=self.refinement,
            remove_redundancy=self.remove_redundancy,
            text_step=self.text_step,
        )

    def rescaled(self, result: Localization) -> Localization:
        """Return the result with this protocol's logit scale, if both have one."""
        if self.logit_scale is None or result.logit_scale is None:
            return result
        return replace(result, logit_scale=self.logit_scale)

    def describe(self) -> dict[str, Any]:
        """Return the protocol as values that JSON can hold."""
        own = None if self.refinement is None else self.refinement.describe()
        return json.loads(to_json({**asdict(self), "refinement": own}))


@dataclass(frozen=True)
class Variant:
    """A method with a rule for absent classes or a refinement of its own, in place of the protocol's: read from the
    same pass of the model as the method itself. None: the protocol's."""

    method: Method
    absent: str | None = None
    refinement: Refinement | None = None

    def protocol(self, usual: EvalProtocol) -> EvalProtocol:
        """Return the protocol `usual` with what is different here."""
        return replace(usual, absent=self.absent or usual.absent, refinement=self.refinement or usual.refinement)

    def describe(self) -> dict[str, Any]:
        """Return the method's settings and what is different here, as values that JSON can hold."""
        absent = {} if self.absent is None else {"absent": self.absent}
        refinement = {} if self.refinement is None else {"refinement": self.refinement.describe()}
        return {**self.method.describe(), **absent, **refinement}


PROTOCOLS: Mapping[str, EvalProtocol] = {
    # The paper's text: shorter side 448, one template, softmax of 100 × cosine below 0.8 is background.
    "paper": EvalProtocol(),
    # The published code and its README: images squashed to 448 × 448, 0.85. Corrected: that code takes the softmax of
    # min-max maps, of which with 20 classes none exceeds 0.125, so that all would be background; here it is of cosines.
    "official": EvalProtocol(size="square:448", background={"": 0.85}),
    # The evaluators of the field, with ClearCLIP's settings, under which GEM was measured too: slide inference, 80
    # templates, logits × 50, a threshold for each data set.
    "field": EvalProtocol(
        size="short:448",
        template="imagenet-80",
        names="sclip",
        views=Views(window=448, stride=224, merge="logits"),
        background={"": 0.0, "voc2012": 0.5, "voc2010": 0.5, "context60": 0.15, "coco-object": 0.4},
        logit_scale=50.0,
    ),
}


def name_of(protocol: EvalProtocol) -> str:
    """Return the protocol's name in `PROTOCOLS`, or "own"."""
    return next((name for name, row in PROTOCOLS.items() if row == protocol), "own")


def find_protocol(name: str) -> EvalProtocol:
    """Return the row of `PROTOCOLS` called `name`. Raises InputError that lists the known ones."""
    if name not in PROTOCOLS:
        hint = did_you_mean(name, PROTOCOLS)
        raise InputError(f"unknown protocol {name!r}{hint}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
