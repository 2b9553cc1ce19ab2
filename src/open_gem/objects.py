"""One object of an image: boxes, rows of labelling, exports and answers of a server are made of it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
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
    score        highest raw cosine inside it, in [-1, 1] (a probability for models trained to localize)
    image_score  image-level cosine of the label, or None
    presence     that score as a probability in [0, 1], or None
    box          left, top, right, bottom in pixels, right and bottom exclusive
    point        its most confident pixel (x, y), or None
    rle          its mask as COCO's compressed RLE, {"size": [height, width], "counts": str}; None if it is a box alone
    peak         `score` after min-max scaling of the label's map, in [0, 1]: 1 for the label's best object of an image;
                 of predicted boxes, the share of the best box's score. None if unknown
    probability  softmax probability of the label, the sum over its prompts, against all prompts, those of the
                 background included, at the patch of `point`, in [0, 1]; None if unknown, or if scores are
                 probabilities themselves
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
    probability: float | None = None
    mask_quality: float | None = None

    @property
    def confidence(self) -> float:
        """`presence` × `peak` × `probability`, in [0, 1]: ranks objects of all labels and images.

        It is high if the image as a whole shows the label, the object is the label's best place in it, and no other
        label is likelier there. What is None is left out of the product; if all are, it is the score, limited to
        [0, 1]. `benchmarks/confidence.py` compares it with other formulas.
        """
        known = [value for value in (self.presence, self.peak, self.probability) if value is not None]
        return round(prod(known) if known else min(1.0, max(0.0, self.score)), 6)

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
        """Return label, prompt, score, confidence, presence, box, mask as run lengths, point and the mask's quality (if
        there are any), as values that JSON can hold."""
        return {
            "label": self.label,
            "prompt": self.prompt,
            "score": round(self.score, 6),
            "confidence": self.confidence,
            "presence": None if self.presence is None else round(self.presence, 6),
            "box": list(self.box),
            **({} if self.rle is None else {"mask": self.rle}),
            "point": None if self.point is None else list(self.point),
            **({} if self.mask_quality is None else {"mask_quality": round(self.mask_quality, 6)}),
        }


# Non-maximum suppression ----------------------------------------------------------------------------------------------


def check_nms(iou: float | None) -> None:
    """Raise InputError unless it is None or an IoU in [0, 1]."""
    if iou is not None and not 0 <= iou <= 1:
        raise InputError(f"nms is {iou!r}, expected an IoU in [0, 1], or None")


def suppressed(objects: Sequence[Object], iou: float) -> list[Object]:
    """Return the objects without each whose box has an IoU above `iou` with that of a more confident object that stays,
    of any label; in the order they come in."""
    import torch
    from torchvision.ops import nms

    boxes, confidences = ([obj.box for obj in objects], [obj.confidence for obj in objects])
    kept = nms(
        torch.tensor(boxes, dtype=torch.float32, device="cpu").reshape(-1, 4),
        torch.tensor(confidences, dtype=torch.float32, device="cpu"),
        iou,
    )
    return [objects[index] for index in sorted(kept.tolist())]


# For other libraries, which are imported when they are asked for ------------------------------------------------------


def to_frame(objects: Sequence[Object]) -> "DataFrame":
    """Return objects as a table of pandas, one per row. Raises InputError if pandas is missing."""
    try:
        import pandas
    except ImportError as error:
        raise InputError("pandas is not installed: pip install pandas") from error
    columns = ["label", "prompt", "score", "confidence", "presence", "left", "top", "right", "bottom", "area", "x", "y"]
    rows = [
        (
            obj.label,
            obj.prompt,
            obj.score,
            obj.confidence,
            obj.presence,
            *obj.box,
            obj.area,
            *(obj.point or (None, None)),
        )
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

    `xyxy`, `mask`, `confidence`, `class_id` (the label's position), and per object in `data` `class_name`,
    `prompt`, `score` and `presence` (NaN for none). If only some objects have masks, those of the others are empty.

    Raises InputError if supervision is missing.
    """
    import numpy as np

    masks = [obj.mask for obj in objects]
    empty = np.zeros(size, bool)
    return supervision().Detections(
        xyxy=np.array([obj.box for obj in objects], np.float32).reshape(-1, 4),
        mask=None if all(mask is None for mask in masks) else np.stack([empty if m is None else m for m in masks]),
        confidence=np.array([obj.confidence for obj in objects], np.float32),
        class_id=np.array([obj.index for obj in objects], int),
        data={
            "class_name": np.array([obj.label for obj in objects], str),
            "prompt": np.array([obj.prompt for obj in objects], str),
            "score": np.array([obj.score for obj in objects], np.float32),
            "presence": np.array([obj.presence for obj in objects], np.float32),  # None becomes NaN
        },
    )
