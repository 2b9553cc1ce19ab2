"""A label map painted object by object: which label each pixel of an image has."""

import io

import numpy as np
from PIL import Image

from open_gem.rle import Span
from open_gem.types import Size


class LabelMap:
    """A label map of an image of `size`: each pixel of an object has the label with the highest cosine there."""

    def __init__(self, size: Size):
        self._best = np.full(tuple(size), -np.inf, dtype=np.float32)
        self._winner = np.zeros(tuple(size), dtype=np.uint16)

    def add(self, index: int, span: Span, region: np.ndarray, values: np.ndarray) -> None:
        """Paint an object of label `index`: its `region` in the rows and columns of `span`, and the label's whole map
        of cosines `(y, x)`."""
        best, winner, values = self._best[span], self._winner[span], values[span]
        ahead = region & (values > best)
        best[ahead], winner[ahead] = values[ahead], index + 1

    def png(self, labels: int) -> bytes:
        """Encode as PNG, 0 for background and otherwise 1 + the label's index: 8 bits up to 255 labels, 16 above."""
        file = io.BytesIO()
        Image.fromarray(self._winner.astype(np.uint8) if labels <= 255 else self._winner).save(file, format="PNG")
        return file.getvalue()
