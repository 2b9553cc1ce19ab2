"""The objects of an image as supervision's `Detections`, for its annotators, trackers and metrics."""

from typing import TYPE_CHECKING, Any

import numpy as np

from open_gem.export.labelled import LabelledImage
from open_gem.export.polygons import supervision

if TYPE_CHECKING:
    from supervision import Detections

    from open_gem.localization import Localization


def to_supervision(image: "LabelledImage | Localization", **settings: Any) -> "Detections":
    """The objects of a labelled image, or of a `Localization` by `settings` as of its `objects`.

    `xyxy`, `mask`, `confidence` (the raw cosine), `class_id` (the label's position), and by object in `data`
    `class_name`, `prompt`, `presence` (NaN for none). If only some objects have masks, the others' are empty.

    Raises InputError if supervision is not installed.
    """
    if not isinstance(image, LabelledImage):
        from open_gem.export.localized import image_of

        image = image_of(image, **settings)
    objects, masks = image.objects, [obj.mask for obj in image.objects]
    empty = np.zeros(image.size, bool)
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
