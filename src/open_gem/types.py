"""The nouns everything else is written in, and the axis legend.

Axes, always in this order: b images, w windows, p labels or texts, q prompts (of all labels, then of the background),
h heads, n tokens (prefix tokens such as [CLS] first, then patches row by row), m patches alone, d width, c head width,
e joint width, r×k patch grid (rows, columns), y×x pixels (height, width).
Boxes are `xyxy` in pixels of the original image, right and bottom exclusive; points are `xy` pixels.
"""

from typing import NamedTuple


class Grid(NamedTuple):
    """A patch grid: `rows` × `cols` patches."""

    rows: int
    cols: int

    @property
    def patches(self) -> int:
        """Number of patches, rows × cols."""
        return self.rows * self.cols


class Size(NamedTuple):
    """An image's size in pixels, height before width."""

    height: int
    width: int
