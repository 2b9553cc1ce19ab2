"""The windows of one image merged: their features, before any prompt, or their similarity maps, after.

Merging features is one pass for any number of prompts and gives a value to cache. Merging maps (`merge="logits"`) is
what the evaluators of the field do, among them SCLIP, ClearCLIP and NACLIP, after mmsegmentation's slide inference.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from open_gem import readout
from open_gem.errors import InputError
from open_gem.images.views import Canvas
from open_gem.method.run import Encoded, Text
from open_gem.method.table import Method
from open_gem.tensors import at_least_float32
from open_gem.types import Grid, Size


@dataclass(frozen=True, eq=False)
class EncodedWindows:
    """One image by one method, window by window, for maps to be merged: used like an `Encoded`.

    canvases  as `plan` gives them
    windows   for each canvas its encoded windows, in batches, in the order of the windows
    original  the size of the image itself
    source    the image itself, if a refinement needs it
    """

    canvases: tuple[Canvas, ...]
    windows: Sequence[Sequence[Encoded]]
    original: Size | None = None
    source: Image.Image | None = None

    @property
    def size(self) -> Size:
        """Pixels of the base canvas."""
        return self.canvases[0].size

    @property
    def grid(self) -> Grid:
        """Rows and columns of its maps, which are pixels."""
        return Grid(*self.size)

    @property
    def method(self) -> Method | None:
        """Whose features these are."""
        return self.windows[0][0].method

    @property
    def pooled(self) -> Float[Tensor, "1 e"] | None:
        """One image-level embedding `(1, e)`, see `merge_pooled`."""
        return merge_pooled(self.windows)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for parts in self.windows for part in parts)

    def maps(self, text: Text, adjust: Callable[[Tensor], Tensor]) -> "MergedMaps":
        """Return cosines of each window's patches with `text`, adjusted by canvas `(w, p, r, k)`, as maps of the
        image."""

        def cosines(part: Encoded) -> Tensor:
            if not callable(text):
                return part.similarity(text)
            return torch.cat(
                [part.image(index).similarity(text(patches)) for index, patches in enumerate(part.patches)]
            )

        merged = (torch.cat([cosines(part) for part in parts]) for parts in self.windows)
        return MergedMaps(self.canvases, [adjust(maps) for maps in merged])

    def to(self, device: torch.device | str) -> "EncodedWindows":
        """Move to another device."""
        return replace(self, windows=[[part.to(device) for part in parts] for parts in self.windows])

    def clone(self) -> "EncodedWindows":
        """Return a copy that shares no memory."""
        return replace(self, windows=[[part.clone() for part in parts] for parts in self.windows])


def merge_features(canvases: Sequence[Canvas], encoded: Sequence[Sequence[Encoded]]) -> Encoded:
    """Merge windows into one `Encoded` of the whole image: one image, no prefix tokens.

    encoded  for each canvas its encoded windows, in batches, in the order of the windows

    Patch features are averaged where windows overlap, mirrored ones turned back, those of other canvases resampled
    (bilinear, corners not aligned) to the grid of the first, and all canvases averaged. Sums are made in float32 at
    least, the result has the type it came in. The grid may be finer than the model's patches. `pooled` is
    `merge_pooled`.

    Raises:
        InputError: if windows do not lie on one grid, as those of `plan` for "logits" do not.
    """
    if not canvases:
        raise InputError("no canvas to merge, expected at least one")
    tokens, grid = _merge(canvases, [[part.patches for part in parts] for parts in encoded], encoded)
    blocks = encoded[0][0].taps
    taps = {
        block: _merge(canvases, [[part.taps[block] for part in parts] for parts in encoded], encoded)[0]
        for block in blocks
    }
    method = encoded[0][0].method
    return Encoded(tokens, grid, canvases[0].size, 0, merge_pooled(encoded), taps=taps, method=method)


def _merge(
    canvases: Sequence[Canvas], patches: Sequence[Sequence[Tensor]], encoded: Sequence[Sequence[Encoded]]
) -> tuple[Tensor, Grid]:
    """Merge patch tokens `(b, n, c)` of each canvas's windows into those of the image, `(1, r·k, c)`, and return their
    grid."""
    merged = None
    for canvas, parts, known in zip(canvases, patches, encoded, strict=True):
        cells = _unmirror(_join_patches(canvas, parts, known[0].grid), canvas)
        if merged is None:
            merged = cells
        else:
            fits = cells.shape == merged.shape
            merged += cells if fits else interpolate(cells[None], merged.shape[-2:], mode="bilinear")[0]
    assert merged is not None
    tokens = (merged / len(canvases)).flatten(1).T[None].to(patches[0][0].dtype)
    return tokens, Grid(*merged.shape[-2:])


def _join_patches(canvas: Canvas, parts: Sequence[Tensor], grid: Grid) -> Tensor:
    """Join patch tokens of all windows on the canvas's own grid, averaged where they overlap: `(c, r, k)`."""
    window = canvas.windows[0]

    def in_cells(pixels: tuple[int, int]) -> tuple[int, int]:
        y, x = pixels[0] * grid.rows, pixels[1] * grid.cols
        if y % window.height or x % window.width:
            raise InputError(
                f"windows of a {canvas.size.height}x{canvas.size.width} canvas do not lie on one grid of "
                f"{grid.rows}x{grid.cols} features a window: merge their maps instead (merge='logits')"
            )
        return y // window.height, x // window.width

    places = [in_cells((window.top, window.left)) for window in canvas.windows]
    cells = (patches.T.unflatten(-1, tuple(grid)) for part in parts for patches in part)
    return _average(cells, places, Size(*in_cells(canvas.size)))


def merge_pooled(encoded: Sequence[Sequence[Encoded]]) -> Float[Tensor, "1 e"] | None:
    """Return the mean `(1, e)` of all views' image-level embeddings, each of unit norm first; that of a single view as
    it is; None if a view has none."""
    pooled = [part.pooled for parts in encoded for part in parts]
    known = [embedding for embedding in pooled if embedding is not None]
    if len(known) < len(pooled) or not known:
        return None
    if sum(map(len, known)) == 1:
        return known[0]
    views = torch.cat([normalize(at_least_float32(embedding), dim=-1) for embedding in known])
    return views.mean(dim=0, keepdim=True).to(known[0].dtype)


class MergedMaps(Sequence[Tensor]):
    """The similarity maps `(y, x)` of several views merged, at the base canvas's size, each made on access.

    canvases  as `plan` gives them
    maps      for each canvas the small maps of its windows, `(w, p, r, k)`

    Each window's map is upsampled (`readout.upsample`) to the window's pixels; the canvas has their mean where they
    overlap. Mirrored canvases are turned back, those of other sizes resampled (bilinear, corners not aligned) to the
    size of the first, and all averaged. Nothing of the size prompts × pixels is ever held: index it, iterate, or
    `stack()` if memory allows. Raises InputError if maps and windows are not equally many.
    """

    def __init__(self, canvases: Sequence[Canvas], maps: Sequence[Float[Tensor, "w p r k"]]):
        self.canvases, self.maps = tuple(canvases), tuple(maps)
        windows, counts = [len(canvas.windows) for canvas in self.canvases], [len(maps) for maps in self.maps]
        if windows != counts or not windows:
            raise InputError(f"maps are of {counts} windows, expected those of the canvases: {windows}")

    def __len__(self) -> int:
        return self.maps[0].shape[1]

    @overload
    def __getitem__(self, which: int) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice | list[int]) -> "MergedMaps": ...
    def __getitem__(self, which: int | slice | list[int]) -> "Tensor | MergedMaps":
        if not isinstance(which, int):  # tensors cannot step backwards
            chosen = list(range(len(self))[which]) if isinstance(which, slice) else which
            return MergedMaps(self.canvases, [maps[:, chosen] for maps in self.maps])
        index, size = range(len(self))[which], self.canvases[0].size
        merged = None
        for canvas, maps in zip(self.canvases, self.maps, strict=True):
            seen = _unmirror(_join_maps(canvas, maps[:, index]), canvas)
            seen = seen if canvas.size == size else readout.upsample(seen, size)
            merged = seen if merged is None else merged.add_(seen)
        assert merged is not None
        return merged.div_(len(self.canvases))

    def __repr__(self) -> str:
        return f"MergedMaps({'x'.join(map(str, self.shape))})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(p, y, x), the shape of `stack()`."""
        size = self.canvases[0].size
        return len(self), size.height, size.width

    @property
    def device(self) -> torch.device:
        """The device on which maps are made."""
        return self.maps[0].device

    def to(self, device: torch.device | str) -> "MergedMaps":
        """Move to another device."""
        return MergedMaps(self.canvases, [maps.to(device) for maps in self.maps])

    def stack(self) -> Float[Tensor, "p y x"]:
        """Return all maps at once, `(p, y, x)`."""
        return torch.stack(list(self))


def _join_maps(canvas: Canvas, maps: Tensor) -> Tensor:
    """Join maps `(w, r, k)` of the windows, upsampled, on the canvas `(y, x)`, averaged where they overlap."""
    window = Size(canvas.windows[0].height, canvas.windows[0].width)
    return _average(
        (readout.upsample(window_map, window) for window_map in maps),
        [(w.top, w.left) for w in canvas.windows],
        canvas.size,
    )


def _average(pieces: Iterable[Tensor], places: Sequence[tuple[int, int]], size: Size) -> Tensor:
    """Average pieces `(..., wy, wx)` laid on one `(..., y, x)` at their (top, left), where they overlap."""
    total = count = None
    for piece, (top, left) in zip(pieces, places, strict=True):
        if total is None or count is None:
            total = at_least_float32(piece).new_zeros(*piece.shape[:-2], *size)
            count = total.new_zeros(*size)
        height, width = piece.shape[-2:]
        total[..., top : top + height, left : left + width] += piece
        count[top : top + height, left : left + width] += 1
    assert total is not None and count is not None, "a canvas has windows"
    return total.div_(count)


def _unmirror(seen: Tensor, canvas: Canvas) -> Tensor:
    return seen.flip(-1) if canvas.mirrored else seen
