"""A localization drawn: one overlay per label, and all of them on a sheet. Absent labels look absent."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from open_gem.images.draw import draw_caption, overlay, plain
from open_gem.images.sheet import Head, contact_sheet
from open_gem.images.sheet import png as png
from open_gem.localization.result import PRESENCE, Localization
from open_gem.objects import Object

MOST = 11  # labels on a sheet, those with the highest scores
BOXES = 3  # boxes per label that are drawn; more would hide the image
BLANK = (52, 54, 62)  # background if the image is unknown

BARS = {
    "minmax": "heat, each map stretched to its own range",
    "cosine": "cosine",
    "probability": "probability among all prompts",
}
"""The meaning of heat on each scale."""


def overlay_of(
    result: Localization,
    image: Image.Image,
    index: int,
    objects: Sequence[Object] = (),
    *,
    scale: str = "minmax",
    presence: float | Sequence[float] = PRESENCE,
    absent: str = "presence",
    caption: str | None = None,
    bar: bool = False,
) -> Image.Image:
    """Draw one label's heatmap over its RGB image, with the best boxes among `objects` and its point. The caption is by
    default the label and its presence.

    A label that is absent by the rule `absent`, see `Localization.present`, is grey and crossed out, without box and
    point.
    """
    is_present, head = result.present(presence, absent=absent)[index], head_of(result, index, presence, absent)
    drawn = overlay(
        image,
        result.heatmaps(scale)[index],
        boxes=[obj.box for obj in objects if obj.index == index][:BOXES] if is_present else (),
        point=result[index].points()[0].tolist() if is_present else None,
        caption=caption or "",
        absent=not is_present,
        bar=bar,
    )
    if caption is None:
        draw_caption(drawn, head.text, head.note, struck=head.struck)
    return drawn


def head_of(
    result: Localization, index: int, presence: float | Sequence[float] = PRESENCE, absent: str = "presence"
) -> Head:
    """Return a label and its presence as a heading."""
    is_present = result.present(presence, absent=absent)[index]
    if result.presence is None:
        return Head(result.labels[index], struck=not is_present)
    value = result.presence[index].item()
    return Head(result.labels[index], f"{'present' if is_present else 'absent'} {value:.2f}", struck=not is_present)


def best(result: Localization, count: int) -> list[int]:
    """Return the indices of the labels with the highest scores, in the order of the labels; the first ones without
    scores."""
    if result.scores is None:
        return list(range(len(result.labels)))[:count]
    return sorted(result.scores.argsort(descending=True, stable=True).tolist()[:count])


def figure(
    result: Localization,
    image: Image.Image | None,
    threshold: float | Sequence[float] = 0.5,
    scale: str = "minmax",
    *,
    presence: float | Sequence[float] = PRESENCE,
    absent: str = "presence",
    **settings: Any,
) -> Image.Image:
    """Draw the image beside an overlay of each label; for a single label, the overlay alone. Settings as of
    `Localization.objects`."""
    objects = result.objects(threshold, scale, presence=presence, absent=absent, **{"masks": False, **settings})
    ground = Image.new("RGB", (result.size.width, result.size.height), BLANK) if image is None else image
    alone = len(result.labels) == 1
    overlays = [
        overlay_of(result, ground, index, objects, scale=scale, presence=presence, absent=absent, bar=alone)
        for index in best(result, MOST)
    ]
    if alone:
        return overlays[0]
    first = [] if image is None else [plain(image)]
    return contact_sheet([*first, *overlays], bar=BARS[scale])
