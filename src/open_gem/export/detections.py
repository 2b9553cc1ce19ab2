"""The objects of an image as supervision's `Detections`, for its annotators, trackers and metrics."""

from typing import TYPE_CHECKING, Any

from open_gem.export.labelled import LabelledImage
from open_gem.localization import Localization
from open_gem.objects import to_detections

if TYPE_CHECKING:
    from supervision import Detections


def to_supervision(image: LabelledImage | Localization, **settings: Any) -> "Detections":
    """Return the objects of a labelled image, or of a `Localization` by `settings` as of its `objects`; see
    `objects.to_detections`. Raises InputError if supervision is missing."""
    if isinstance(image, Localization):
        return image.to_supervision(**settings)
    return to_detections(image.objects, image.size)
