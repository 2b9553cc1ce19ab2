"""Views of a picture: where windows lie, what they show, and what is made of their features and maps."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize, pad
from torch.utils._python_dispatch import TorchDispatchMode

from open_gem import readout
from open_gem.errors import ImageError, InputError
from open_gem.images.pixels import MAX_PATCHES
from open_gem.images.views import WHOLE, Canvas, Views, Window, check_views, crops, plan
from open_gem.method.run import Encoded
from open_gem.types import Grid, Size
from open_gem.windows import EncodedWindows, MergedMaps, merge_features, merge_pooled

PATCH = (16, 16)
FIELD = Views(window=448, stride=224, merge="logits")  # SCLIP, ClearCLIP, NACLIP
PICTURES = [Size(448, 597), Size(448, 448), Size(304, 700), Size(700, 304), Size(256, 400), Size(449, 1200)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def field_windows(size: Size, crop: int, stride: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of slide inference, step by step as evaluators do it."""
    height, width = size
    for row in range(max(height - crop + stride - 1, 0) // stride + 1):
        for col in range(max(width - crop + stride - 1, 0) // stride + 1):
            top, left = row * stride, col * stride
            bottom, right = min(top + crop, height), min(left + crop, width)
            yield max(bottom - crop, 0), bottom, max(right - crop, 0), right


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "whole"),
    [
        (WHOLE, True),
        (Views(), True),
        (Views(scales=(1,)), True),
        (Views(merge="logits"), True),
        (Views(window=448), False),
        (Views(scales=(1.0, 1.0)), False),
        (Views(scales=(1.5,)), False),
        (Views(flip=True), False),
    ],
)
def test_only_one_view_at_the_usual_size_sees_the_whole_image(views: Views, whole: bool) -> None:
    assert views.sees_whole is whole


def test_scales_of_json_are_as_those_of_python() -> None:
    views = Views(scales=[1, 1.5])  # pyright: ignore[reportArgumentType]
    assert views == Views(scales=(1.0, 1.5))
    assert hash(views) == hash(Views(scales=(1.0, 1.5)))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"window": 0}, ["window is 0", "whole number"]),
        ({"window": 448.0}, ["window is 448.0"]),
        ({"window": True}, ["window is True"]),
        ({"window": 448, "stride": 0}, ["stride is 0"]),
        ({"window": 448, "stride": "half"}, ["stride is 'half'"]),
        ({"window": 448, "stride": 449}, ["stride is 449", "448", "gaps"]),
        ({"stride": 224}, ["stride is 224 without a window"]),
        ({"scales": ()}, ["scales are ()"]),
        ({"scales": 1.0}, ["scales are 1.0"]),
        ({"scales": "1"}, ["scales are '1'"]),
        ({"scales": (1, 0)}, ["scales are (1, 0)", "above 0"]),
        ({"scales": (-1,)}, ["above 0"]),
        ({"scales": (math.nan,)}, ["nan"]),
        ({"scales": (math.inf,)}, ["inf"]),
        ({"scales": (True,)}, ["True"]),
        ({"flip": 1}, ["flip is 1", "True or False"]),
        ({"merge": "maps"}, ["merge is 'maps'", "features, logits"]),
        ({"merge": None}, ["merge is None"]),
    ],
)
def test_impossible_settings(settings: dict, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Views(**settings)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("views", "patch", "parts"),
    [
        (Views(window=450), (16, 16), ["window is 450 pixels", "16x16 patches", "448 or 464"]),
        (Views(window=450, merge="logits"), (16, 16), ["448 or 464"]),
        (Views(window=10), (16, 16), ["window is 10", ": 16"]),
        (Views(window=448), (14, 16), []),
        (Views(window=336), (16, 32), ["16x32", "320 or 352"]),
        (Views(window=448, stride=100), (16, 16), ["stride is 100", "96 or 112"]),
        (Views(window=448, stride=3), (14, 14), ["stride is 3 pixels", ": 14"]),
        (Views(window=448, stride=100, merge="logits"), (16, 16), []),  # windows lie on any pixel
        (WHOLE, (16, 16), []),
    ],
)
def test_windows_fit_the_patches(views: Views, patch: tuple[int, int], parts: list[str]) -> None:
    if not parts:
        check_views(views, patch)
        assert plan(views, "native", Size(600, 600), patch)
        return
    for refuse in (lambda: check_views(views, patch), lambda: plan(views, "native", Size(600, 600), patch)):
        with pytest.raises(InputError) as caught:
            refuse()
        for part in parts:
            assert part in str(caught.value)


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "size", "expected"),
    [
        (WHOLE, (480, 640), [(448, 592)]),
        (Views(scales=(1.0, 0.5, 1.5)), (480, 640), [(448, 592), (224, 304), (672, 896)]),
        (Views(scales=(1.1,)), (480, 640), [(496, 656)]),  # 492.8 and 657.07
        (Views(window=224), (480, 640), [(448, 592)]),
        (FIELD, (480, 640), [(448, 597)]),  # 597.33
        (FIELD, (480, 635), [(448, 593)]),  # 592.67
        (FIELD, (448, 600), [(448, 600)]),
        (FIELD, (640, 480), [(597, 448)]),
        (Views(window=448, scales=(1.0, 0.5), merge="logits"), (480, 640), [(448, 597), (224, 304)]),
        (Views(window=448, scales=(1.5,), merge="logits"), (480, 640), [(672, 896)]),
        (Views(window=512, merge="logits"), (480, 640), [(448, 597)]),  # one side in patches, one in pixels
        (Views(scales=(1.0, 0.5), merge="logits"), (480, 640), [(448, 592), (224, 304)]),  # no windows: patches
    ],
)
def test_sizes_of_canvases(views: Views, size: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    assert [canvas.size for canvas in plan(views, "short:448", Size(*size), PATCH)] == expected


@pytest.mark.parametrize("width", range(448, 700, 3))
def test_pixels_are_rounded_as_the_field_does(width: int) -> None:
    """int(side · scale + 0.5), in floats; no tie is near for a short side of 480."""
    [canvas] = plan(FIELD, "short:448", Size(480, width), PATCH)
    factor = 448 / min(480, width)
    expected = tuple(int(side * factor + 0.5) for side in (480, width))
    assert canvas.size == expected


@pytest.mark.parametrize("size", PICTURES)
@pytest.mark.parametrize(("window", "stride"), [(448, 224), (448, 448), (448, 100), (224, 112), (224, 7)])
def test_windows_are_those_of_slide_inference(size: Size, window: int, stride: int) -> None:
    [canvas] = plan(Views(window, stride, merge="logits"), "native", size, PATCH)
    ours = [(w.top, w.top + w.height, w.left, w.left + w.width) for w in canvas.windows]
    assert ours == list(field_windows(canvas.size, window, stride))
    assert all(
        (w.height, w.width) == (min(window, canvas.size.height), min(window, canvas.size.width)) for w in canvas.windows
    )
    assert all(w.height % 16 == 0 and w.width % 16 == 0 for w in canvas.windows)
    seen = torch.zeros(*canvas.size, dtype=torch.bool)
    for w in canvas.windows:
        seen[w.top : w.top + w.height, w.left : w.left + w.width] = True
    assert seen.all()


@pytest.mark.parametrize("size", PICTURES)
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (14, 28)])
@pytest.mark.parametrize("stride", [None, 112, 336])
def test_windows_of_features_lie_on_patches(size: Size, patch: tuple[int, int], stride: int | None) -> None:
    views = Views(window=336, stride=stride, scales=(1.0, 0.7), flip=True)
    for canvas in plan(views, "native", size, patch):
        assert canvas.size.height % patch[0] == canvas.size.width % patch[1] == 0
        for w in canvas.windows:
            assert w.top % patch[0] == w.height % patch[0] == w.left % patch[1] == w.width % patch[1] == 0


@pytest.mark.parametrize(
    ("window", "merge", "expected"),
    [(448, "logits", 224), (336, "logits", 168), (448, "features", 224), (336, "features", 160), (16, "features", 16)],
)
def test_the_default_stride_is_half_a_window(window: int, merge: str, expected: int) -> None:
    [canvas] = plan(Views(window, merge=merge), "native", Size(window, 2000), PATCH)
    assert canvas.windows[1].left == expected


def test_the_base_comes_first_then_scales_and_mirrors() -> None:
    canvases = plan(Views(scales=(0.5, 1.0), flip=True), "native", Size(320, 640), PATCH)
    assert [(canvas.size, canvas.mirrored) for canvas in canvases] == [
        ((160, 320), False),
        ((160, 320), True),
        ((320, 640), False),
        ((320, 640), True),
    ]


def test_the_whole_is_one_window_over_everything() -> None:
    [canvas] = plan(WHOLE, "short:448", Size(480, 640), PATCH)
    assert canvas == Canvas(Size(448, 592), (Window(0, 0, 448, 592),), False)


def test_windows_bound_what_is_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Size(5000, 6000)
    with pytest.raises(ImageError, match="patches"):
        plan(WHOLE, "native", large, PATCH)
    assert len(plan(Views(window=448), "native", large, PATCH)[0].windows) == 22 * 26
    with pytest.raises(ImageError, match=r"the limit is [0-9]* pixels"):
        plan(Views(window=448, scales=(1.0, 2.0)), "native", large, PATCH)


# What windows show ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["features", "logits"])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_show_the_windows_in_order(merge: str, flip: bool) -> None:
    for canvas in plan(Views(64, 32, flip=flip, merge=merge), "native", Size(150, 101), PATCH):
        pixels = random(3, *canvas.size)
        seen = pixels.flip(-1) if canvas.mirrored else pixels
        ours = list(crops(pixels, canvas))
        assert len(canvas.windows) == len(ours) > 4
        for window, shown in zip(canvas.windows, ours, strict=True):
            top, left = window.top, window.left
            assert torch.equal(shown, seen[:, top : top + window.height, left : left + window.width])


def test_the_whole_view_shows_the_picture() -> None:
    [canvas] = plan(WHOLE, "native", Size(64, 96), PATCH)
    pixels = random(3, 64, 96)
    [shown] = crops(pixels, canvas)
    assert torch.equal(shown, pixels)


def test_crops_are_views_of_the_pixels_made_when_asked_for() -> None:
    [canvas] = plan(Views(64, 32), "native", Size(128, 128), PATCH)
    pixels = random(3, 128, 128)
    for crop in crops(pixels, canvas):
        assert crop.untyped_storage().data_ptr() == pixels.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(3, 64, 80), (3, 96, 64), (1, 3, 64, 96), (64, 96)])
def test_pixels_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    [canvas] = plan(WHOLE, "native", Size(64, 96), PATCH)
    with pytest.raises(InputError, match=r"expected the canvas's \(3, 64, 96\)"):
        next(crops(torch.zeros(*shape), canvas))


# Features ------------------------------------------------------------------------------------------------------------


def encode(pixels: Tensor, cell: int, prefix: int = 1) -> Encoded:
    """A model that sees each cell by itself: features are its mean colour, pooled the mean of all."""
    cells = avg_pool2d(pixels, cell)
    grid = Grid(*cells.shape[-2:])
    patches = cells.flatten(2).transpose(1, 2)
    tokens = torch.cat([torch.full((len(pixels), prefix, 3), 1e9), patches], dim=1)
    return Encoded(tokens, grid, Size(*pixels.shape[-2:]), prefix, pixels.mean(dim=(2, 3)))


def look(pixels: Tensor, canvases: tuple[Canvas, ...], see: Callable[[Tensor], Encoded]) -> list[list[Encoded]]:
    """What `see` makes of each canvas, in batches of 2; other scales are sampled from `pixels`."""

    def at(size: Size) -> Tensor:
        return pixels if size == pixels.shape[-2:] else interpolate(pixels[None], tuple(size), mode="bilinear")[0]

    def parts(canvas: Canvas) -> Iterator[Encoded]:
        windows = crops(at(canvas.size), canvas)
        while some := list(islice(windows, 2)):
            yield see(torch.stack(some))

    return [list(parts(canvas)) for canvas in canvases]


@pytest.mark.parametrize("size", [Size(96, 160), Size(64, 64), Size(48, 208), Size(208, 48), Size(32, 32)])
@pytest.mark.parametrize("cell", [16, 8])  # as many features as patches, and twice as many each way
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_features_that_places_determine_come_out_as_seen_at_once(
    size: Size, cell: int, flip: bool, prefix: int
) -> None:
    canvases = plan(Views(window=64, stride=16, flip=flip), "native", size, PATCH)
    pixels = random(3, *size).round()
    ours = merge_features(canvases, look(pixels, canvases, lambda some: encode(some, cell, prefix)))
    whole = encode(pixels[None], cell, prefix)
    assert (ours.grid, ours.size, ours.prefix) == (whole.grid, whole.size, 0)
    assert ours.tokens.shape == whole.patches.shape
    close(ours.patches, whole.patches, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_whole_view_gives_what_it_saw(dtype: torch.dtype) -> None:
    canvases = plan(WHOLE, "native", Size(64, 96), PATCH)
    seen = Encoded(random(1, 1 + 24, 5).to(dtype), Grid(4, 6), Size(64, 96), 1, random(1, 5).to(dtype))
    ours = merge_features(canvases, [[seen]])
    assert torch.equal(ours.tokens, seen.patches)
    assert ours.tokens.dtype == dtype
    assert ours.pooled is not None and seen.pooled is not None
    assert torch.equal(ours.pooled, seen.pooled)
    assert (ours.grid, ours.size, ours.prefix) == (seen.grid, seen.size, 0)


def views_of(canvases: tuple[Canvas, ...], cell: int, width: int = 3) -> list[list[Encoded]]:
    """Random features for each window, in batches of 3."""
    found, seed = [], 0
    for canvas in canvases:
        size = Size(canvas.windows[0].height, canvas.windows[0].width)
        grid, parts = Grid(size.height // cell, size.width // cell), []
        for start in range(0, len(canvas.windows), 3):
            count, seed = len(canvas.windows[start : start + 3]), seed + 1
            tokens = random(count, 1 + grid.patches, width, seed=seed)
            parts.append(Encoded(tokens, grid, size, 1, random(count, width, seed=-seed)))
        found.append(parts)
    return found


@pytest.mark.parametrize("cell", [16, 8])
@pytest.mark.parametrize("stride", [16, 48, 64])
def test_features_are_averaged_cell_by_cell(cell: int, stride: int) -> None:
    """Against a loop over cells that asks every view what it has there."""
    canvases = plan(Views(window=64, stride=stride, flip=True), "native", Size(80, 160), PATCH)
    seen = views_of(canvases, cell)
    ours = merge_features(canvases, seen)
    rows, cols = 80 // cell, 160 // cell
    assert ours.grid == (rows, cols)
    for row in range(rows):
        for col in range(cols):
            means = []
            for canvas, parts in zip(canvases, seen, strict=True):
                at = cols - 1 - col if canvas.mirrored else col
                here = []
                every = [one for part in parts for one in part.patches.double()]
                for window, patches in zip(canvas.windows, every, strict=True):
                    y, x = row - window.top // cell, at - window.left // cell
                    if 0 <= y < window.height // cell and 0 <= x < window.width // cell:
                        here.append(patches[y * (window.width // cell) + x])
                means.append(sum(here[1:], here[0]) / len(here))
            close(ours.patches[0, row * cols + col].double(), sum(means[1:], means[0]) / len(means))


def test_scales_are_resampled_to_the_first_and_averaged() -> None:
    canvases = plan(Views(scales=(1.0, 0.5, 1.5), flip=True), "native", Size(96, 160), PATCH)
    seen = views_of(canvases, 16)
    ours = merge_features(canvases, seen)
    assert (ours.grid, ours.size) == ((6, 10), (96, 160))
    fields = []
    for canvas, [part] in zip(canvases, seen, strict=True):
        field = part.patches[0].double().T.unflatten(1, tuple(part.grid))
        field = field.flip(-1) if canvas.mirrored else field
        fields.append(interpolate(field[None], (6, 10), mode="bilinear", align_corners=False)[0])
    close(ours.patches[0].double(), (sum(fields[1:], fields[0]) / 6).flatten(1).T)


def test_one_scale_that_is_not_1_is_its_own_base() -> None:
    canvases = plan(Views(scales=(2.0,)), "native", Size(48, 80), PATCH)
    [[seen]] = views_of(canvases, 16)
    ours = merge_features(canvases, [[seen]])
    assert (ours.grid, ours.size) == ((6, 10), (96, 160))
    assert torch.equal(ours.patches, seen.patches)


def test_pooled_is_the_mean_of_unit_vectors() -> None:
    pooled = [[random(2, 6), 10 * random(1, 6, seed=1)], [100 * random(1, 6, seed=2)]]
    seen = [[Encoded(torch.zeros(len(one), 4, 6), Grid(2, 2), Size(32, 32), 0, one) for one in some] for some in pooled]
    ours = merge_pooled(seen)
    assert ours is not None
    views = torch.cat([pooled[0][0], pooled[0][1], pooled[1][0]]).double()
    units = [view / view.norm() for view in views]
    close(ours.double(), torch.stack(units).mean(dim=0, keepdim=True))
    seen[1][0] = Encoded(torch.zeros(1, 4, 6), Grid(2, 2), Size(32, 32), 0, None)
    assert merge_pooled(seen) is None
    assert merge_pooled([]) is None


def test_half_precision_is_summed_in_full() -> None:
    """4096 views of 1 have the mean 1; a half-precision sum would stop at 2048."""
    windows = (Window(0, 0, 16, 16),) * 4096
    seen = Encoded(torch.ones(4096, 1, 2, dtype=torch.float16), Grid(1, 1), Size(16, 16), 0)
    ours = merge_features((Canvas(Size(16, 16), windows),), [[seen]])
    assert torch.equal(ours.tokens, torch.ones(1, 1, 2, dtype=torch.float16))


def test_windows_off_the_grid_are_refused() -> None:
    canvases = plan(FIELD, "native", Size(448, 597), PATCH)
    with pytest.raises(InputError, match=r"448x597 canvas .*merge='logits'"):
        merge_features(canvases, views_of(canvases, 16))


def test_nothing_to_merge() -> None:
    with pytest.raises(InputError, match="at least one"):
        merge_features((), [])


# Maps -----------------------------------------------------------------------------------------------------------------


def maps_of(canvases: tuple[Canvas, ...], prompts: int, cell: int = 16) -> list[Tensor]:
    return [
        random(len(canvas.windows), prompts, canvas.windows[0].height // cell, canvas.windows[0].width // cell, seed=at)
        for at, canvas in enumerate(canvases)
    ]


def slide_inference(size: Size, crop: int, stride: int, see: Callable[[int, Size], Tensor]) -> Tensor:
    """Logits `(p, y, x)` as evaluators have them: each window's, padded to the picture, added up and divided by how
    often a pixel was seen. `see` gives the logits `(p, wy, wx)` of a window by its number."""
    total, count = torch.zeros(1), torch.zeros(1, *size)
    for index, (top, bottom, left, right) in enumerate(field_windows(size, crop, stride)):
        logits = see(index, Size(bottom - top, right - left))
        total = total + pad(logits, (left, size.width - right, top, size.height - bottom))
        count[:, top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize("size", PICTURES)
@pytest.mark.parametrize(("window", "stride"), [(448, 224), (224, 112), (224, 224), (224, 75)])
def test_merged_maps_are_slide_inference(size: Size, window: int, stride: int) -> None:
    [canvas] = plan(Views(window, stride, merge="logits"), "native", size, PATCH)
    [maps] = maps_of((canvas,), 2)

    def see(index: int, seen: Size) -> Tensor:
        return interpolate(maps[index][None], size=tuple(seen), mode="bilinear", align_corners=False)[0]

    ours = MergedMaps((canvas,), [maps])
    assert ours.shape == (2, *canvas.size)
    expected = slide_inference(canvas.size, window, stride, see)
    close(ours.stack(), expected)
    close(ours[1], expected[1])


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5), (0.5, 1.0, 1.7)])
@pytest.mark.parametrize("flip", [False, True])
def test_scales_and_mirrors_are_averaged_at_the_first_size(
    window: int | None, scales: tuple[float, ...], flip: bool
) -> None:
    views = Views(window, None if window is None else 40, scales, flip, "logits")
    canvases = plan(views, "native", Size(101, 150), PATCH)
    every = maps_of(canvases, 3)
    fields = []
    for canvas, maps in zip(canvases, every, strict=True):

        def see(index: int, seen: Size, maps: Tensor = maps) -> Tensor:
            return interpolate(maps[index][None], size=tuple(seen), mode="bilinear", align_corners=False)[0]

        seen = slide_inference(canvas.size, window or 10_000, 40, see)
        seen = seen.flip(-1) if canvas.mirrored else seen
        fields.append(interpolate(seen[None], tuple(canvases[0].size), mode="bilinear", align_corners=False)[0])
    assert len(fields) == len(scales) * (1 + flip)
    close(MergedMaps(canvases, every).stack(), sum(fields[1:], fields[0]) / len(fields))


def test_from_pixels_to_maps_as_evaluators_do() -> None:
    """All of it, with a model for which it matters what else is in the window."""
    canvases = plan(Views(64, 32, flip=True, merge="logits"), "native", Size(80, 133), PATCH)
    text, pixels = random(4, 3), random(3, *canvases[0].size)

    def see(some: Tensor) -> Encoded:
        return encode(some - some.mean(dim=(2, 3), keepdim=True) + some[:, :, :1, :1], 16)

    encoded = EncodedWindows(canvases, look(pixels, canvases, see))
    ours = encoded.maps(text, lambda cosines: cosines).stack()

    def logits(picture: Tensor) -> Tensor:
        windows = list(field_windows(canvases[0].size, 64, 32))

        def see_one(index: int, size: Size) -> Tensor:
            top, bottom, left, right = windows[index]
            seen = see(picture[None, :, top:bottom, left:right])
            cosines = normalize(text, dim=-1) @ normalize(seen.patches[0], dim=-1).T
            small = cosines.unflatten(1, tuple(seen.grid))
            return interpolate(small[None], size=tuple(size), mode="bilinear", align_corners=False)[0]

        return slide_inference(canvases[0].size, 64, 32, see_one)

    close(ours, (logits(pixels) + logits(pixels.flip(-1)).flip(-1)) / 2, 2e-6)
    assert encoded.size == canvases[0].size


def test_encoded_windows_are_used_like_an_encoded_image() -> None:
    canvases = plan(Views(window=64, scales=(1.0, 1.5), merge="logits"), "native", Size(96, 160), PATCH)
    seen, text = views_of(canvases, 16), random(4, 3)
    ours, pooled = EncodedWindows(canvases, seen, Size(200, 300)), merge_pooled(seen)
    assert ours.pooled is not None and pooled is not None and torch.equal(ours.pooled, pooled)
    assert (ours.size, ours.original) == ((96, 160), (200, 300))
    every = [normalize(torch.cat([part.patches for part in parts]), dim=-1) for parts in seen]
    cosines = [
        (normalize(text, dim=-1) @ tokens.mT).unflatten(-1, tuple(parts[0].grid))
        for tokens, parts in zip(every, seen, strict=True)
    ]
    close(ours.maps(text, lambda maps: maps).stack(), MergedMaps(canvases, cosines).stack())
    close(ours.maps(text, lambda maps: maps[:, 1:]).stack(), MergedMaps(canvases, cosines).stack()[1:])
    assert ours.nbytes == sum(part.nbytes for parts in seen for part in parts)
    assert seen[0][0].nbytes == 4 * 3 * 3 * (1 + 16 + 1)  # three windows of 17 tokens and a pooled one, in float32
    moved = ours.to("cpu")
    assert moved.original == (200, 300) and torch.equal(moved.windows[1][0].tokens, seen[1][0].tokens)


@pytest.mark.parametrize("views", [Views(window=64, stride=32, flip=True), Views(scales=(1.0, 0.5))])
def test_taps_are_merged_as_features_are(views: Views) -> None:
    """The host's tokens of a block, which steps after stitching read, in place of the features."""
    canvases = plan(views, "native", Size(96, 160), PATCH)
    seen, taps = views_of(canvases, 16), views_of(canvases, 16, width=5)
    tapped = [
        [replace(one, taps={3: tap.patches, 6: one.patches}) for one, tap in zip(ones, own, strict=True)]
        for ones, own in zip(seen, taps, strict=True)
    ]
    ours = merge_features(canvases, tapped)
    assert torch.equal(ours.taps[3], merge_features(canvases, taps).tokens)
    assert torch.equal(ours.taps[6], ours.tokens)


def test_merged_maps_of_the_whole_view_are_the_upsampled_map() -> None:
    canvases = plan(Views(merge="logits"), "native", Size(64, 96), PATCH)
    [maps] = maps_of(canvases, 3)
    for ours, one in zip(MergedMaps(canvases, [maps]), maps[0], strict=True):
        assert torch.equal(ours, readout.upsample(one, Size(64, 96)))


def test_merged_maps_are_a_sequence() -> None:
    canvases = plan(Views(64, 32, merge="logits"), "native", Size(80, 133), PATCH)
    merged = MergedMaps(canvases, maps_of(canvases, 5))
    every = merged.stack()
    assert len(merged) == len(list(merged)) == 5
    assert merged.shape == every.shape
    assert torch.equal(merged[-1], every[4])
    assert torch.equal(merged[3:0:-2].stack(), every[[3, 1]])
    assert torch.equal(merged.to("cpu").stack(), every)
    assert merged.device == every.device
    assert repr(merged) == "MergedMaps(5x80x133)"
    for index in (5, -6):
        with pytest.raises(IndexError):
            merged[index]


def test_asking_twice_gives_the_same() -> None:
    """Sums are made in place: never in what was given."""
    canvases = plan(Views(scales=(1.0, 0.5), flip=True, merge="logits"), "native", Size(64, 96), PATCH)
    maps = maps_of(canvases, 2)
    before = [some.clone() for some in maps]
    merged = MergedMaps(canvases, maps)
    assert torch.equal(merged[1], merged[1])
    assert all(map(torch.equal, maps, before))
    seen = views_of(canvases, 16)
    assert torch.equal(merge_features(canvases, seen).tokens, merge_features(canvases, seen).tokens)


@pytest.mark.parametrize("drop", ["canvas", "window"])
def test_maps_without_windows_are_refused(drop: str) -> None:
    canvases = plan(Views(64, 32, flip=True, merge="logits"), "native", Size(80, 133), PATCH)
    maps = maps_of(canvases, 2)
    maps = maps[:1] if drop == "canvas" else [maps[0], maps[1][1:]]
    with pytest.raises(InputError, match="expected those of the canvases"):
        MergedMaps(canvases, maps)


def test_half_precision_maps_are_averaged_in_full() -> None:
    canvases = plan(Views(64, 32, merge="logits"), "native", Size(80, 133), PATCH)
    halves = [maps.half() for maps in maps_of(canvases, 1)]
    ours = MergedMaps(canvases, halves)[0]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, MergedMaps(canvases, [maps.float() for maps in halves])[0])


class Largest(TorchDispatchMode):
    """The most values that any tensor made meanwhile has."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.values = max(self.values, made.numel())
        return made


def test_no_tensor_is_larger_than_one_map() -> None:
    """200 prompts on three megapixels would be 2.4 GB."""
    canvases = plan(Views(448, flip=True, merge="logits"), "native", Size(1500, 2003), PATCH)
    merged = MergedMaps(canvases, [random(200, 28, 28).expand(len(canvas.windows), -1, -1, -1) for canvas in canvases])
    # What is shared costs nothing, and is as large as the views into it.
    with Largest() as largest:
        assert merged[170].shape == (1500, 2003)
    assert largest.values == 1500 * 2003


def test_the_limits_are_imagings() -> None:
    assert MAX_PATCHES == 256 * 256
    with pytest.raises(ImageError, match="grid of 257x257 = 66049 patches"):
        plan(WHOLE, "native", Size(4112, 4112), PATCH)
    assert plan(Views(window=32), "native", Size(4112, 32), PATCH)
    with pytest.raises(ImageError, match=r"window of 4112x4112 pixels .* windows of up to 4096"):
        plan(Views(window=4112), "native", Size(5000, 5000), PATCH)
