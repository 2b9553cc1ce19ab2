"""Query by example: an `Exemplar` as an embedding that stands where a text's would, and on a text's scale.

Patches of images are far more similar to each other than to any text, and what a model gives all patches alike hides
what is particular to some. So an exemplar is its region minus its surroundings,

    e = mean of unit patch features inside − CONTEXT · mean of those outside,

and its cosines x are calibrated on its own image, where the answer is known: x_own is the highest inside the region. A
patch that is LIKELY times as similar is as likely as not:

    logit = SHARPNESS · (x / x_own − LIKELY).

A text's logit is logit_scale · (cosine − neutral), so neutral + logit / logit_scale is comparable with its cosine;
neutral is where a text's presence is ½: at the empty prompt, or at the bias of a model trained with a sigmoid.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.errors import ImageError, PromptError
from open_gem.images.pixels import read_image
from open_gem.method.run import Encoded
from open_gem.numerics import Lock
from open_gem.tensors import at_least_float32
from open_gem.text import Exemplar
from open_gem.types import Grid, Size

CONTEXT = 0.5  # share of the surroundings that is subtracted; as LIKELY, chosen on validation scenes
LIKELY = 0.7  # share of the exemplar's own similarity at which presence is ½
SHARPNESS = 12.0  # logits by which the exemplar itself exceeds a patch without any similarity
KEPT = 64  # most ways of encoding whose features an exemplar keeps; one more drops all of them
FRAME = 2  # side of the grey square around an exemplar without surroundings, as a multiple of its longer side

Box = tuple[float, float, float, float]


class ExemplarFeatures(NamedTuple):
    """One exemplar by one method.

    embedding  `(e,)` of unit norm
    own        highest cosine of a patch of its region
    patches    `(n, e)` all patches of its image, of unit norm
    """

    embedding: Float[Tensor, " e"]
    own: float
    patches: Float[Tensor, "n e"]

    def calibrate(self, cosines: Tensor, neutral: float, logit_scale: float) -> Tensor:
        """Return cosines with the exemplar on the scale of cosines with texts: see the module."""
        return neutral + SHARPNESS / logit_scale * (cosines / self.own - LIKELY)


def coverage(box: Box, size: Size, grid: Grid) -> Float[Tensor, " n"]:
    """Return the share `(r·k,)` in [0, 1] of each patch that `box`, in pixels of an image of `size`, covers; row by
    row."""

    def along(low: float, high: float, cells: int, length: int) -> Tensor:
        edges = torch.arange(cells + 1, dtype=torch.float32, device="cpu")
        return ((high * cells / length) - edges[:-1]).clamp(0, 1) - ((low * cells / length) - edges[:-1]).clamp(0, 1)

    left, top, right, bottom = box
    return torch.outer(along(top, bottom, grid.rows, size.height), along(left, right, grid.cols, size.width)).flatten()


def pool(encoded: Encoded, box: Box) -> ExemplarFeatures | None:
    """Return the features of a region of one encoded image; None if it touches all patches, so that nothing surrounds
    it."""
    weights = coverage(box, encoded.original or encoded.size, encoded.grid).to(encoded.patches.device)
    outside = weights == 0
    if not outside.any():
        return None
    patches = normalize(at_least_float32(encoded.patches[0]), dim=-1)
    region = weights.to(patches) @ patches / weights.sum()
    embedding = normalize(region - CONTEXT * patches[outside].mean(dim=0), dim=-1)
    own = (patches[~outside] @ embedding).max().item()
    return ExemplarFeatures(embedding, max(own, torch.finfo(torch.float32).eps), patches)


def check_exemplar(exemplar: Exemplar) -> None:
    """Raise PromptError for an exemplar of an encoded image that has no features."""
    if not isinstance(exemplar.image, Encoded):
        raise PromptError("an exemplar needs features of patches: use another method, and one view of the image")
    encode_exemplar(exemplar, lambda image: image)


def encode_exemplar(exemplar: Exemplar, encode: Callable[[Any], Any]) -> ExemplarFeatures:
    """Return the features of an exemplar; `encode` makes an `Encoded` of an image. Without surroundings it is set into
    a grey square. Raises PromptError for an image that cannot be read and a box that leaves it."""
    if isinstance(encoded := exemplar.image, Encoded):
        box = check_box(exemplar, encoded.original or encoded.size)
        features = pool(encoded, box)
        if features is None:
            raise PromptError(f"the exemplar {exemplar.name!r} touches every patch, expected patches around its box")
        return features
    try:
        image = read_image(exemplar.image)
    except ImageError as error:
        raise PromptError(f"cannot read the exemplar {exemplar.name!r}: {error}") from error
    box = check_box(exemplar, Size(image.height, image.width))
    features = None if exemplar.box is None else pool(encode(image), box)
    if features is None:
        left, top, right, bottom = map(round, box)
        framed, box = _frame(image.crop((left, top, right, bottom)))
        features = pool(encode(framed), box)
    assert features is not None, "the frame surrounds it"
    return features


def check_box(exemplar: Exemplar, size: Size) -> Box:
    """Return the exemplar's box, or all of its image. Raises PromptError if it leaves the image."""
    left, top, right, bottom = exemplar.box or (0, 0, size.width, size.height)
    if left < 0 or top < 0 or right > size.width or bottom > size.height:
        raise PromptError(
            f"the box of the exemplar {exemplar.name!r} leaves its image of {size.width}x{size.height} pixels "
            "(width x height), expected left, top, right, bottom inside it"
        )
    return left, top, right, bottom


def _frame(image: Image.Image) -> tuple[Image.Image, Box]:
    """Return an image in the middle of a grey square, and its box there."""
    side = FRAME * max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(image, (left, top))
    return square, (left, top, left + image.width, top + image.height)


class ExemplarCache:
    """Features of exemplars, each encoded once by each method until the weights change or the exemplar is gone; may be
    shared between threads. A copy starts empty."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Exemplar, dict[Hashable, ExemplarFeatures]] = WeakKeyDictionary()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __call__(self, exemplar: Exemplar, how: Hashable, encode: Callable[[Any], Any]) -> ExemplarFeatures:
        """Return the features of an exemplar. `how` is all that decides them in addition to it."""
        with self._lock:
            known = self._known.setdefault(exemplar, {})
            if how not in known:
                if len(known) == KEPT:
                    known.clear()
                known[how] = encode_exemplar(exemplar, encode)
            return known[how]
