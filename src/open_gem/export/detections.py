"""supervision's Detections: what was found in one image, for its annotators, trackers and metrics."""

from typing import TYPE_CHECKING, Any

import numpy as np

from open_gem.export.labelled import LabelledImage
from open_gem.export.polygons import supervision

if TYPE_CHECKING:
    from supervision import Detections

    from open_gem.localization import Localization


def to_supervision(found: "LabelledImage | Localization", **settings: Any) -> "Detections":
    """The objects of an image that was labelled, or of what a localizer gave, by `settings` as of `localized.image_of`.

    `xyxy`, `mask`, `confidence` (the raw cosine), `class_id` (the label's position), and by object in `data`
    `class_name`, `prompt`, `presence` (NaN for none). Where some objects have masks, those of boxes alone are empty.

    Raises InputError where supervision is not installed.
    """
    if not isinstance(found, LabelledImage):
        from open_gem.export.localized import image_of

        found = image_of(found, **settings)
    some, masks = found.objects, [one.mask() for one in found.objects]
    empty = np.zeros(found.size, bool)
    return supervision().Detections(
        xyxy=np.array([one.xyxy for one in some], np.float32).reshape(-1, 4),
        mask=None if all(mask is None for mask in masks) else np.stack([empty if m is None else m for m in masks]),
        confidence=np.array([one.score for one in some], np.float32),
        class_id=np.array([one.label for one in some], int),
        data={
            "class_name": np.array([one.name for one in some], str),
            "prompt": np.array([one.prompt for one in some], str),
            "presence": np.array([one.presence for one in some], np.float32),  # None becomes NaN
        },
    )
