"""One thing that was located in an image: what rows of labelling, exports and answers of a server are made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from open_gem.rle import mask_of

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Object:
    """One object of an image.

    label        its label
    index        which of the labels that is
    prompt       the text of the label that is most similar where the object is
    score        highest raw cosine inside it, in [-1, 1] (of models trained to localize, a probability): ranks objects
    image_score  image-level cosine of the label, or None
    presence     that score as a probability in [0, 1], or None
    box          left, top, right, bottom in pixels, right and bottom exclusive
    point        its most confident pixel (x, y), or None
    rle          its mask as COCO's compressed RLE, {"size": [height, width], "counts": str}, or None: a box alone
    """

    label: str
    index: int
    prompt: str
    score: float
    image_score: float | None
    presence: float | None
    box: tuple[int, int, int, int]
    point: tuple[int, int] | None = None
    rle: dict[str, Any] | None = None

    @property
    def mask(self) -> "np.ndarray | None":
        """bool `(y, x)` of the whole image, decoded each time; None if there is a box alone."""
        return None if self.rle is None else mask_of(self.rle)

    @property
    def xywh(self) -> list[int]:
        """The box as COCO has it: left, top, width, height."""
        left, top, right, bottom = self.box
        return [left, top, right - left, bottom - top]

    @property
    def area(self) -> int:
        """Pixels of the mask, or of the box if there is no mask."""
        if self.rle is None:
            return self.xywh[2] * self.xywh[3]
        from pycocotools import mask as coco

        return int(coco.area(cast(Any, self.rle)))
