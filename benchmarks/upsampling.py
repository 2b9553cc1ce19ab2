"""What makes maps follow the edges of the image: refinements and ideas that were not kept, on held-out scenes.

    python benchmarks/upsampling.py quality 256 [images]          mask IoU and mask boundary IoU, per cent
    python benchmarks/upsampling.py costs 480 640 [names …]       time and memory, at that height and width

See docs/validation/findings.md. One thread.
"""

import resource
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from open_gem import readout
from open_gem.data.scenes import HELD_OUT, scene
from open_gem.evaluation.metrics.objects import boundary_overlap, mask_overlap
from open_gem.localizer import load
from open_gem.refine.fgs import Fgs
from open_gem.refine.guided import Guided
from open_gem.refine.pamr import Pamr
from open_gem.types import Size

METHODS = ("gem", "clip_surgery", "sc-clip")


@dataclass(frozen=True)
class Bilinear(Guided):
    """Nothing but what every map gets."""

    def weights(self, image: Tensor) -> None:
        return None

    def __call__(self, weights: None, heatmap: Tensor) -> Tensor:
        return heatmap


@dataclass(frozen=True)
class JointBilateral(Guided):
    """Joint bilateral upsampling (Kopf et al., 2007): a pixel is a mean of the cells around it, by their distance and
    by how close their mean colour is. `cell` in pixels of a 256-pixel image."""

    cell: float = 16.0
    around: int = 2
    color: float = 0.05

    def weights(self, image: Tensor) -> tuple[Tensor, Tensor]:
        size = Size(*image.shape[-2:])
        grid = [max(1, round(side * 256 / self.cell / max(size))) for side in size]
        colors = interpolate(image[None], size=grid, mode="area")[0]
        at = [
            (torch.arange(side, dtype=torch.float32, device="cpu") + 0.5) * cells / side - 0.5
            for side, cells in zip(size, grid, strict=True)
        ]
        offsets = torch.arange(-self.around, self.around + 1, device="cpu")
        cells, logits = [], []
        for down in offsets:
            for right in offsets:
                y, x = (
                    (place.round().long() + by).clamp(0, count - 1)
                    for place, by, count in zip(at, (down, right), grid, strict=True)
                )
                distance = (at[0] - y)[:, None] ** 2 + (at[1] - x)[None] ** 2
                difference = (image - colors[:, y][:, :, x]).square().sum(dim=0)
                logits.append(-distance / 2 - difference / (2 * self.color**2))
                cells.append(y[:, None] * grid[1] + x[None])
        return torch.stack(logits).softmax(dim=0), torch.stack(cells)

    def __call__(self, weights: tuple[Tensor, Tensor], heatmap: Tensor) -> Tensor:
        shares, cells = weights
        rows_and_columns = [max(1, round(side * 256 / self.cell / max(heatmap.shape))) for side in heatmap.shape]
        values = interpolate(heatmap[None, None], size=rows_and_columns, mode="area").flatten()
        result = torch.zeros_like(heatmap)
        for share, cell in zip(shares, cells, strict=True):
            result.addcmul_(share, values[cell])
        return result


@dataclass(frozen=True)
class GuidedFilter(Guided):
    """The fast guided filter (He and Sun, 2015) on a quarter of the sides: in every window a map is a linear function
    of the colours. `radius` in pixels of a 256-pixel image."""

    radius: float = 24.0
    epsilon: float = 1e-3
    iterations: int = 1
    factor: int = 4

    def weights(self, image: Tensor) -> tuple[Tensor, ...]:
        small = interpolate(image[None], scale_factor=1 / self.factor, mode="area")[0]
        average, around = self._average(small, image), (small[:, None] * small[None]).flatten(0, 1)
        covariance = self._average(around, image).unflatten(0, (3, 3)) - average[:, None] * average[None]
        regular = self.epsilon * torch.eye(3, dtype=torch.float32, device="cpu")
        inverse = torch.linalg.inv(covariance.permute(2, 3, 0, 1) + regular).permute(2, 3, 0, 1)
        return image, small, average, inverse

    def __call__(self, weights: tuple[Tensor, ...], heatmap: Tensor) -> Tensor:
        image, small, average, inverse = weights
        values = interpolate(heatmap[None, None], size=small.shape[-2:], mode="area")[0]
        linear = values
        for _ in range(self.iterations):
            level, products = self._average(torch.cat([values, small * values]), image).split([1, 3])
            slopes = (inverse * (products - average * level)[None]).sum(dim=1)
            offset = level - (slopes * average).sum(dim=0, keepdim=True)
            linear = self._average(torch.cat([slopes, offset]), image)
            values = (linear[:3] * small).sum(dim=0, keepdim=True) + linear[3:]
        linear = interpolate(linear[None], size=image.shape[-2:], mode="bilinear", align_corners=False)[0]
        return (linear[:3] * image).sum(dim=0) + linear[3]

    def _average(self, values: Tensor, image: Tensor) -> Tensor:
        radius = max(1, round(self.radius * max(image.shape) / 256 / self.factor))
        rows = avg_pool2d(values, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)
        return avg_pool2d(rows, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)


IDEAS: Mapping[str, Guided] = {
    "bilinear": Bilinear(),
    "joint bilateral, 5 × 5 cells of 16": JointBilateral(),
    "joint bilateral, 3 × 3 cells of 16": JointBilateral(around=1),
    "joint bilateral, 5 × 5 cells of 8": JointBilateral(cell=8.0),
    "guided filter, radius 24": GuidedFilter(),
    "guided filter, radius 32, 3 times": GuidedFilter(radius=32.0, iterations=3),
    "pamr": Pamr(),
    "fgs": Fgs(),
    "fgs, 1 iteration": Fgs(iterations=1),
}


def quality(side: int, count: int = 100) -> None:
    localizer = load("embedded", device="cpu").acknowledge()
    rows: dict[str, dict[str, list[Any]]] = {name: {method: [] for method in METHODS} for name in IDEAS}
    for seed in range(HELD_OUT, HELD_OUT + count):
        drawn = scene(seed, side)
        image = torch.from_numpy(drawn.image).permute(2, 0, 1).float() / 255
        masks, encoded = torch.from_numpy(drawn.masks), localizer.encode(drawn.image, METHODS)
        weights = {name: idea.weights(image) for name, idea in IDEAS.items()}
        for method in METHODS:
            maps = list(localizer.locate(encoded[method], drawn.names).heatmaps("cosine"))
            for name, idea in IDEAS.items():
                predicted = torch.stack([readout.min_max(idea(weights[name], values)) > 0.5 for values in maps])
                rows[name][method].append((mask_overlap(predicted, masks), boundary_overlap(predicted, masks)))
    print(f"| {side} pixels, {count} scenes | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}")
    for name, by_method in rows.items():
        cells = []
        for counts in by_method.values():
            both = zip(*counts, strict=True)
            sums = [[sum(row[0][part] for row in kind) for part in (0, 1)] for kind in both]
            cells.append(" / ".join(f"{100 * total / number:.1f}" for total, number in sums))
        print(f"| {name} | {' | '.join(cells)} |")


def cost(name: str, height: int, width: int, turns: int = 3) -> tuple[float, float, float]:
    """Return the seconds of weights and of a map, and the MiB that both add to the peak of a process."""
    torch.set_num_threads(1)
    drawn = torch.from_numpy(scene(0).image).permute(2, 0, 1).float() / 255
    image = interpolate(drawn[None], size=(height, width), mode="bilinear")[0]  # drawing at this size takes more memory
    heatmap = readout.upsample(torch.rand(28, 37, dtype=torch.float32, device="cpu"), Size(height, width))
    before, seconds = _peak(), []
    for _ in range(turns):
        start = perf_counter()
        weights = IDEAS[name].weights(image)
        middle = perf_counter()
        IDEAS[name](weights, heatmap)
        seconds.append((middle - start, perf_counter() - middle))
    making, refining = (mean(times) for times in zip(*seconds, strict=True))
    return making, refining, _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def costs(height: int, width: int, *names: str) -> None:
    print(f"| {height} × {width} | weights, ms | a map, ms | peak, MiB |\n|---|---|---|---|")
    for name in names or IDEAS:
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            weights, one, peak = alone.submit(cost, name, height, width).result()
        print(f"| {name} | {1000 * weights:.0f} | {1000 * one:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *numbers = sys.argv[1:]
    if what == "quality":
        quality(*map(int, numbers))
    else:
        costs(int(numbers[0]), int(numbers[1]), *numbers[2:])
