"""Time of GEM on each recommended model with random weights, as a share of ViT-B/16's: `relative_time` of their table.

python benchmarks/models.py        # about a minute on two cores; models take turns, ratios are medians over rounds
"""

from statistics import median
from time import perf_counter

import torch

from open_gem import METHODS, run
from open_gem.towers import build_tower
from open_gem.towers.choices import CHOICES

SIDE, ROUNDS = 448, 7  # pixels: a multiple of every patch in the table


@torch.no_grad()
def main() -> None:
    names = list(dict.fromkeys(choice.name for choice in CHOICES))
    towers = {name: build_tower(name) for name in names}
    methods = {name: {"gem": METHODS["gem"].fitted(tower.layers)} for name, tower in towers.items()}
    pixels = torch.randn(1, 3, SIDE, SIDE)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(ROUNDS + 1):  # the first warms up
        for name, tower in towers.items():
            start = perf_counter()
            run(tower, pixels, methods[name], pooled=True)
            if round_number:
                seconds[name].append(perf_counter() - start)
    for name in names:
        ratios = [own / base for own, base in zip(seconds[name], seconds["ViT-B-16"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:20} {median(ratios):5.2f} × ViT-B-16 ({spread}), {1000 * median(seconds[name]):6.0f} ms")


if __name__ == "__main__":
    main()
