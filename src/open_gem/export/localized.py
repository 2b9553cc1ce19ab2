"""A `Localization` as exporters know images: without parts on disk."""

from typing import Any

from open_gem.export.labelled import LabelledImage
from open_gem.localization import Localization


def image_of(result: Localization, *, image_id: str = "", source: str = "", **settings: Any) -> LabelledImage:
    """The objects of a result, best score first; `settings` as of `Localization.objects`."""
    objects = sorted(result.objects(**settings), key=lambda obj: -obj.score)
    return LabelledImage(image_id, source, result.size, tuple(objects), lambda: None, dict)
