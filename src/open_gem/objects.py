"""One object of an image: boxes, rows of labelling, exports and answers of a server are made of it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from open_gem.errors import InputError
from open_gem.rle import mask_of
from open_gem.types import Size

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame
    from supervision import Detections


@dataclass(frozen=True, eq=False)
class Object:
    """One object of an image.

    label        what is reported
    index        the label's position in `Localization.labels`
    prompt       the label's prompt that is most similar at the object's most confident pixel
    score        highest raw cosine inside it, in [-1, 1] (a probability for models trained to localize): ranks objects
    image_score  image-level cosine of the label, or None
    presence     that score as a probability in [0, 1], or None
    box          left, top, right, bottom in pixels, right and bottom exclusive
    point        its most confident pixel (x, y), or None
    rle          its mask as COCO's compressed RLE, {"size": [height, width], "counts": str}; None if it is a box alone
    peak         `score` after min-max scaling, in [0, 1]: the share of the label's best; None if the threshold was of
                 another scale
    mask_quality  the IoU with the object that the mask's segmenter predicts (about [0, 1]), see `Sam`; None if the mask
                 is a region of the map itself
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
    peak: float | None = None
    mask_quality: float | None = None

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

    def to_dict(self) -> dict[str, Any]:
        """Return label, prompt, score, presence, box, mask as run lengths, point and the mask's quality (if there are
        any), as values that JSON can hold."""
        return {
            "label": self.label,
            "prompt": self.prompt,
            "score": round(self.score, 6),
            "presence": None if self.presence is None else round(self.presence, 6),
            "box": list(self.box),
            **({} if self.rle is None else {"mask": self.rle}),
            "point": None if self.point is None else list(self.point),
            **({} if self.mask_quality is None else {"mask_quality": round(self.mask_quality, 6)}),
        }


# For other libraries, which are imported when they are asked for ------------------------------------------------------


def to_frame(objects: Sequence[Object]) -> "DataFrame":
    """Return objects as a table of pandas, one per row. Raises InputError if pandas is missing."""
    try:
        import pandas
    except ImportError as error:
        raise InputError("pandas is not installed: pip install pandas") from error
    columns = ["label", "prompt", "score", "presence", "left", "top", "right", "bottom", "area", "x", "y"]
    rows = [
        (obj.label, obj.prompt, obj.score, obj.presence, *obj.box, obj.area, *(obj.point or (None, None)))
        for obj in objects
    ]
    return pandas.DataFrame(rows, columns=columns)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=1)
def supervision() -> Any:
    """Return the package supervision. Raises InputError if it is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OpenCV")  # supervision's own contours are enough
        try:
            import supervision
        except ImportError as error:
            raise InputError('supervision is not installed: pip install "open_gem[supervision]"') from error
    return supervision


def to_detections(objects: Sequence[Object], size: Size) -> "Detections":
    """Return objects of an image of `size` as supervision's `Detections`, for its annotators, trackers and metrics.

    `xyxy`, `mask`, `confidence` (the raw cosine), `class_id` (the label's position), and per object in `data`
    `class_name`, `prompt`, `presence` (NaN for none). If only some objects have masks, those of the others are empty.

    Raises InputError if supervision is missing.
    """
    import numpy as np

    masks = [obj.mask for obj in objects]
    empty = np.zeros(size, bool)
    return supervision().Detections(
        xyxy=np.array([obj.box for obj in objects], np.float32).reshape(-1, 4),
        mask=None if all(mask is None for mask in masks) else np.stack([empty if m is None else m for m in masks]),
        confidence=np.array([obj.score for obj in objects], np.float32),
        class_id=np.array([obj.index for obj in objects], int),
        data={
            "class_name": np.array([obj.label for obj in objects], str),
            "prompt": np.array([obj.prompt for obj in objects], str),
            "presence": np.array([obj.presence for obj in objects], np.float32),  # None becomes NaN
        },
    )
