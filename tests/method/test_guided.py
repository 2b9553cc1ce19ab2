"""Methods that follow another model: CorrCLIP patch by patch and block by block, and masks that reach it."""

import numpy as np
import pytest
import torch
from method.guides import Colours
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from open_gem import Localizer, Views, run
from open_gem.errors import InputError, MethodError
from open_gem.method import guided
from open_gem.method.guided import GUIDED, Correlated, _earlier, check_name
from open_gem.method.table import BlockContext, Method
from open_gem.method.tower import VisionTower
from open_gem.types import Grid, Size


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def regions_of(size: tuple[int, int], seed: int = 0) -> Tensor:
    """Blocks of 8 × 8 pixels that belong to region 0 (none), 3, 7 or 9, in each of two images."""
    coarse = torch.randint(0, 4, (2, 1, size[0] // 8, size[1] // 8), generator=torch.Generator().manual_seed(seed))
    numbers = torch.tensor([0, 3, 7, 9])[coarse]
    return interpolate(numbers.double(), size=size, mode="nearest")[:, 0].int()


def on(grid: Grid, regions: Tensor) -> list[int]:
    """The region at the centre of each patch."""
    height, width = regions.shape
    return [
        int(regions[(2 * row + 1) * height // (2 * grid.rows), (2 * column + 1) * width // (2 * grid.cols)])
        for row in range(grid.rows)
        for column in range(grid.cols)
    ]


def resized(values: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Values `(n, d)` of patches on another grid."""
    maps = values.T.unflatten(-1, tuple(grid))[None]
    return interpolate(maps, size=tuple(to), mode="bilinear")[0].flatten(1).T


@torch.no_grad()
def explicit_corrclip(host: VisionTower, pixels: Tensor, mix: Correlated, regions: Tensor, same: dict) -> Tensor:
    """One image at a time, one pair of patches at a time; `same` says which regions count as another."""
    x, grid = host.embed(pixels)
    stream, blocks = [x], host.blocks(grid)
    for block in blocks:
        stream.append(block.forward(stream[-1]))
    last, to = blocks[-1], mix.guide.grid_for(Size(*pixels.shape[-2:]))
    query, key, _ = mix.guide.projections(pixels)
    features = []
    for image in range(len(pixels)):
        unit = normalize(query[image] + key[image], dim=-1)
        cosines = unit @ unit.T
        place = [same.get(number, number) for number in on(to, regions[image])]
        weights = torch.zeros_like(cosines)
        for i, own in enumerate(place):
            for j, other in enumerate(place):
                attends = cosines[i, j] > cosines.mean() if 0 in (own, other) else own == other
                weights[i, j] = (mix.scale * cosines[i, j]).exp() if attends or i == j else 0
        weights /= weights.sum(dim=1, keepdim=True)

        parts = []
        for tokens in (stream[-2][image], torch.stack([stream[3][image], stream[4][image]]).mean(dim=0)):
            values = last.qkv(last.norm(tokens[None])).v[0, :, 1:]
            mixed = torch.stack([weights @ resized(head, grid, to) for head in values])
            parts.append(host.project(last.out(mixed[None]))[0])

        summaries = {}
        for number in set(on(grid, regions[image])):
            inside = torch.tensor([True, *(own == number for own in on(grid, regions[image]))])
            token = stream[0][image, :1]
            for block, tokens in zip(blocks, stream, strict=False):
                seen = block.qkv(block.norm(tokens[image][None]))
                asks = block.qkv(block.norm(token[None])).q[0]
                scores = asks @ seen.k[0][:, inside].mT / asks.shape[-1] ** 0.5
                token = token + block.out((scores.softmax(dim=-1) @ seen.v[0][:, inside])[None])[0]
                token = token + block.mlp(token[None])[0]
            summaries[number] = host.project(token[None])[0, 0]
        coarse = torch.tensor(on(grid, regions[image])).view(1, 1, *grid).double()
        numbers = interpolate(coarse, size=tuple(to), mode="nearest-exact").flatten().long().tolist()
        semantic = torch.stack([summaries[number] for number in numbers])
        features.append(parts[0] + mix.spatial * parts[1] + mix.semantic * semantic)
    return torch.stack(features)


@pytest.mark.parametrize(
    ("patch", "settings"),
    [(8, {}), (4, {}), (4, {"spatial": 0.3, "semantic": 2.0, "scale": 9.0})],
)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_corrclip_is_its_formula(square, size, patch, settings, monkeypatch):
    monkeypatch.setattr(guided, "STRIP", 300)
    pixels, regions = pictures(*size), regions_of(size)
    mix = Correlated(Colours(patch), **settings, alike=0.0)
    method = Method(mix, depth=1, residual=False)
    features = run(square.backbone.vision, pixels, {"it": method}, regions=regions)["it"]
    assert (features.grid, features.prefix) == (Grid(size[0] // patch, size[1] // patch), 0)
    expected = explicit_corrclip(square.backbone.vision, pixels, mix, regions, {})
    torch.testing.assert_close(features.tokens, expected, rtol=0, atol=5e-5)


def test_regions_that_the_guide_finds_alike_count_as_the_same(square):
    pixels, regions = pictures(32, 32), regions_of((32, 32))
    mix = Correlated(Colours(8), alike=2.0)  # any two cosines
    method = Method(mix, depth=1, residual=False)
    features = run(square.backbone.vision, pixels, {"it": method}, regions=regions)["it"]
    expected = explicit_corrclip(square.backbone.vision, pixels, mix, regions, {3: 1, 7: 1, 9: 1})
    torch.testing.assert_close(features.tokens, expected, rtol=0, atol=5e-5)


def test_without_regions_all_patches_attend_to_all(square):
    pixels, method = pictures(32, 32), GUIDED["corrclip"](Colours(4))
    alone = run(square.backbone.vision, pixels, {"it": method})["it"]
    everywhere = torch.ones(2, 32, 32, dtype=torch.int32)
    same = run(square.backbone.vision, pixels, {"it": method}, regions=everywhere)["it"]
    assert torch.equal(alone.tokens, same.tokens)
    expected = explicit_corrclip(square.backbone.vision, pixels, method.attention, everywhere, {})  # type: ignore
    torch.testing.assert_close(alone.tokens, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("layers", "blocks"), [(12, (6, 10)), (24, (11, 22)), (32, (3, 30)), (6, (3, 4)), (3, (1, 1))])
def test_the_earlier_blocks_are_those_of_the_published_code_for_12_24_and_32(layers, blocks):
    assert _earlier(layers) == blocks


def test_regions_follow_windows_scales_and_flips(square, monkeypatch):
    """What the method is given in a window is the part of the image's regions that the window shows."""
    seen: list[Tensor] = []
    update = Correlated.update

    def watched(self, block, heads, context: BlockContext):
        assert context.regions is not None
        seen.extend(context.regions.clone())
        return update(self, block, heads, context)

    monkeypatch.setattr(Correlated, "update", watched)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    regions = torch.arange(48 * 64, dtype=torch.int32).view(48, 64)
    views = Views(window=32, stride=16, flip=True)
    localizer = Localizer(square.backbone, GUIDED["corrclip"](Colours(8)), size="native", views=views)
    localizer.encode(localizer.prepare(image, regions))
    expected = [
        numbers[top : top + 32, left : left + 32]
        for numbers in (regions, regions.flip(1))
        for top in (0, 16)
        for left in (0, 16, 32)
    ]
    assert len(seen) == len(expected) and all(map(torch.equal, [one.int() for one in seen], expected))


def test_images_with_and_without_regions_share_a_list(square):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    localizer = Localizer(square.backbone, GUIDED["corrclip"](Colours(8)))
    regions = np.kron(np.arange(16).reshape(4, 4), np.ones((8, 8), dtype=int))
    plain, masked = localizer.prepare(image), localizer.prepare(image, regions)
    first, second, third = localizer.encode([plain, masked, plain])
    assert not torch.allclose(first.tokens, second.tokens)
    torch.testing.assert_close(first.tokens, third.tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(second.tokens, localizer.encode(masked).tokens, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (np.zeros((4, 4), dtype=int), r"regions are int64 of shape \(4, 4\), expected whole numbers .* \(32, 32\)"),
        (np.zeros((32, 32)), "regions are float64"),
        (np.zeros((32, 32, 3), dtype=np.uint8), "regions are uint8 of shape"),
        (np.full((32, 32), -1), "regions have numbers from -1 to -1, expected 0 to"),
        ("nothing.png", "cannot read regions from 'nothing.png': No such file"),
    ],
)
def test_other_regions_are_refused(square, regions, message):
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    with pytest.raises(InputError, match=message):
        Localizer(square.backbone).prepare(image, regions)


def test_a_name_of_an_expert_method_needs_the_expert():
    assert check_name("corrclip:facebook/dino-vitb8") == "corrclip:facebook/dino-vitb8"
    with pytest.raises(MethodError, match=r"'lposs:' names no expert, expected for example .lposs:facebook/dino-vitb8"):
        check_name("lposs:")


@pytest.mark.parametrize("setting", ["scale", "spatial", "semantic", "alike"])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(MethodError, match=f"{setting} is -1, expected a number"):
        Correlated(Colours(8), **{setting: -1})
