"""Ways to make GEM faster on a CPU that were tried, whether they worked or not, beside what each would replace.

    python benchmarks/ideas.py [attention|linear|whole|half|small] [turns]

Shapes are those of ViT-B/16 at 448 pixels; values are random. Cases take turns; medians and ratios are printed. `small`
is the embedded model at 160 pixels, in one thread, and at one patch, where all time is spent around the numbers.
"""

import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize, scaled_dot_product_attention

from open_gem.bench.measuring import interleave, turn_of
from open_gem.method import kernels
from open_gem.method.kernels import attention, linear
from open_gem.method.run import run
from open_gem.method.table import METHODS
from open_gem.towers.check import random_images
from open_gem.towers.loading import build_tower, load
from open_gem.types import Size

IMAGES, HEADS, TOKENS, WIDTH = 4, 12, 785, 64
TAU = 0.4

Cases = Mapping[str, Callable[[], Any]]


def heads() -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a packed projection gives them."""
    packed = torch.randn(IMAGES, TOKENS, 3, HEADS, WIDTH)
    return tuple(packed.permute(2, 0, 3, 1, 4))  # type: ignore[return-value]


def step(p: Tensor, values: Tensor) -> Tensor:
    return scaled_dot_product_attention(p / TAU, p, values, scale=1.0)


def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each projection by itself: a refinement, then the assignment to the values."""
    mixed = 0
    for p in (q, k, v):
        p = normalize(step(normalize(p, dim=-1), normalize(p, dim=-1)), dim=-1)
        mixed = mixed + step(p, v)
    return mixed / 3  # type: ignore[return-value]


def stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All three in one call of attention."""
    p = normalize(torch.cat([q, k, v]), dim=-1)
    p = normalize(step(p, p), dim=-1)
    return step(p, v.repeat(3, 1, 1, 1)).unflatten(0, (3, -1)).mean(dim=0)


def contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads copied, so that tokens of a head lie together."""
    return separate(q.contiguous(), k.contiguous(), v.contiguous())


def scaled_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """1/τ on the scores in place of the query."""

    def step(p: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(p, p, values, scale=1 / TAU)

    parts = [normalize(p, dim=-1) for p in (q, k, v)]
    parts = [normalize(step(p, p), dim=-1) for p in parts]
    return (step(parts[0], v) + step(parts[1], v) + step(parts[2], v)) / 3


def rows_sharing_values(q: Tensor, k: Tensor, v: Tensor, rows: int = 197, group: int = 12) -> Tensor:
    """In torch: some rows of the affinities of all projections at a time, one product with the values."""
    values, out = v.flatten(0, 1), torch.empty(IMAGES * HEADS, TOKENS, WIDTH)
    refined = [normalize(step(normalize(p, dim=-1), normalize(p, dim=-1)), dim=-1).flatten(0, 1) for p in (q, k, v)]
    for first in range(0, len(values), group):
        heads = slice(first, first + group)
        for start in range(0, TOKENS, rows):
            tokens = slice(start, start + rows)
            affinity: Any = 0
            for p in refined:
                e = (p[heads, tokens] @ p[heads].mT - 1).div_(TAU).exp_()
                affinity = affinity + e.div_(e.sum(dim=-1, keepdim=True))
            torch.bmm(affinity, values[heads], out=out[heads, tokens])
    return (out / 3).unflatten(0, (IMAGES, HEADS))


def symmetric_tiles(q: Tensor, k: Tensor, v: Tensor, parts: int = 4) -> Tensor:
    """In torch: tiles above the diagonal once, used twice; sums of rows by a column of ones."""
    cuts = [round(index * TOKENS / parts) for index in range(parts + 1)]
    tiles = [slice(*ends) for ends in pairwise(cuts)]

    def affine(p: Tensor, values: Tensor) -> Tensor:
        out = torch.zeros(*p.shape[:-1], values.shape[-1])
        for i, rows in enumerate(tiles):
            for j, cols in enumerate(tiles[i:], start=i):
                e = (p[:, rows] @ p[:, cols].mT - 1).div_(TAU).exp_()
                out[:, rows].baddbmm_(e, values[:, cols])
                if j > i:
                    out[:, cols].baddbmm_(e.mT, values[:, rows])
        return out

    values = torch.cat([v.flatten(0, 1), torch.ones(IMAGES * HEADS, TOKENS, 1)], dim=-1)
    mixed: Any = 0
    for p in (q, k, v):
        p = normalize(p.flatten(0, 1), dim=-1)
        p = normalize(affine(p, p), dim=-1)
        sums = affine(p, values)
        mixed = mixed + sums[..., :WIDTH] / sums[..., WIDTH:]
    return (mixed / 3).unflatten(0, (IMAGES, HEADS))


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """n×n matrices, for a compiler to fuse."""
    mixed: Any = 0
    for p in (q, k, v):
        p = normalize(p, dim=-1)
        p = normalize(((p @ p.mT - 1) / TAU).exp() @ p, dim=-1)
        e = ((p @ p.mT - 1) / TAU).exp()
        mixed = mixed + (e / e.sum(dim=-1, keepdim=True)) @ v
    return mixed / 3


def attentions() -> Cases:
    qkv = heads()
    compiled = torch.compile(explicit)
    ways: dict[str, Callable[..., Tensor]] = {
        "attention calls, one a projection": separate,
        "q, k, v stacked into one call": stacked,
        "contiguous heads": contiguous,
        "τ on scores, not on the query": scaled_scores,
        "rows at a time, values shared, in torch": rows_sharing_values,
        "symmetric tiles in torch": symmetric_tiles,
        "explicit matrices": explicit,
        "explicit matrices, torch.compile": compiled,
        "our kernel": lambda q, k, v: attention.self_self((q, k, v), v, 1 / TAU, 1),
    }
    expected = separate(*qkv)
    for name, way in ways.items():
        print(f"{name}: differs by {(way(*qkv) - expected).abs().max():.0e}")
    return {name: lambda way=way: way(*qkv) for name, way in ways.items()}


def linears() -> Cases:
    """The MLP of one block, on four images."""
    x, d = torch.randn(IMAGES * TOKENS, HEADS * WIDTH), HEADS * WIDTH
    up, down = torch.nn.Linear(d, 4 * d), torch.nn.Linear(4 * d, d)
    plain = torch.nn.Sequential()
    for name, layer in (("c_fc", up), ("gelu", torch.nn.GELU()), ("c_proj", down)):
        plain.add_module(name, layer)
    fused = linear.feed_forward(plain.eval())
    whole = linear._product
    eighth = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
    exact = plain(x)
    print(f"MLP of int8 weights: off by {(eighth(x) - exact).norm() / exact.norm():.0e} of the length")
    packed = torch.ops.mkldnn._reorder_linear_weight(up.weight.detach(), len(x))

    def in_one(x: Tensor) -> Tensor:
        return whole(whole(x, up.weight, up.bias, "gelu", "none"), down.weight, down.bias)

    return {
        "MLP by torch (MKL)": lambda: plain(x),
        "the same, oneDNN, GELU apart": lambda: whole(
            functional.gelu(whole(x, up.weight, up.bias)), down.weight, down.bias
        ),
        "the same, GELU within": lambda: in_one(x),
        "the same, rows at a time": by_onednn(lambda: fused(x)),
        "the same in torch, weights in int8": lambda: eighth(x),
        "first layer by torch": lambda: up(x),
        "first layer by oneDNN": lambda: whole(x, up.weight, up.bias),
        "first layer by oneDNN, weights packed before": lambda: whole(x, packed, up.bias),
    }


def off(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return the work with our kernels off."""

    def switched() -> None:
        with torch.no_grad():
            before, kernels.are_on = kernels.are_on, lambda: False
            try:
                work()
            finally:
                kernels.are_on = before

    return switched


def wholes() -> Cases:
    """GEM from pixels to tokens."""
    pixels, gem = random_images(Size(448, 448), IMAGES), {"gem": METHODS["gem"]}
    tower, half = build_tower("ViT-B-16"), build_tower("ViT-B-16")
    half.module.bfloat16()
    expected = run(tower, pixels, gem)["gem"].patches

    def away(patches: Tensor) -> str:
        return f"1 - cosine {1 - functional.cosine_similarity(patches.float(), expected, dim=-1).mean():.0e}"

    print("bfloat16:", away(run(half, pixels.bfloat16(), gem)["gem"].patches))

    return {
        "plain forward by open_clip": lambda: tower.library_forward(pixels),
        "GEM": lambda: run(tower, pixels, gem),
        "GEM, kernels off": off(lambda: run(tower, pixels, gem)),
        "GEM, an image at a time": lambda: [run(tower, image, gem) for image in pixels.split(1)],
        "GEM, bfloat16": lambda: run(half, pixels.bfloat16(), gem),
    }


def halves() -> Cases:
    """The same in bfloat16, and of one image."""
    pixels, gem = random_images(Size(448, 448), IMAGES).bfloat16(), {"gem": METHODS["gem"]}
    tower = build_tower("ViT-B-16")
    tower.module.bfloat16()
    return {
        "plain forward by open_clip": lambda: tower.library_forward(pixels),
        "GEM": lambda: run(tower, pixels, gem),
        "GEM, kernels off": off(lambda: run(tower, pixels, gem)),
        "plain forward, one image": lambda: tower.library_forward(pixels[:1]),
        "GEM, one image": lambda: run(tower, pixels[:1], gem),
    }


def smalls() -> Cases:
    """The embedded model, twenty times a turn."""
    torch.set_num_threads(1)
    tower = load("embedded").vision
    gem, clip = ({name: METHODS[name].fitted(tower.layers)} for name in ("gem", "clip"))
    pixels, patch = random_images(Size(160, 160), 1), random_images(Size(*tower.patch), 1)

    def often(work: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [work() for _ in range(20)]

    return {
        "plain forward by open_clip": often(lambda: tower.library_forward(pixels)),
        "GEM": often(lambda: run(tower, pixels, gem)),
        "GEM, linear layers by oneDNN": often(by_onednn(lambda: run(tower, pixels, gem))),
        "GEM, kernels off": often(off(lambda: run(tower, pixels, gem))),
        "the model alone": often(lambda: run(tower, pixels, clip)),
        "plain forward, one patch": often(lambda: tower.library_forward(patch)),
        "GEM, one patch": often(lambda: run(tower, patch, gem)),
    }


def processor_turn(work: Callable[[], Any]) -> Callable[[], float]:
    """Return the work as a turn in seconds of the processor: in one thread, what others do then matters less."""

    def turn() -> float:
        start = process_time()
        work()
        return process_time() - start

    return turn


def by_onednn(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return the work with all linear layers by oneDNN."""

    def switched() -> None:
        before, linear.MIN_WEIGHTS = linear.MIN_WEIGHTS, dict.fromkeys(linear.MIN_WEIGHTS, 0)
        try:
            work()
        finally:
            linear.MIN_WEIGHTS = before

    return switched


def main() -> None:
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    topic, turns = [*sys.argv[1:], *("attention", "7")[len(sys.argv) - 1 :]][:2]
    cases = {"attention": attentions, "linear": linears, "whole": wholes, "half": halves, "small": smalls}[topic]()
    clock = processor_turn if topic == "small" else turn_of
    seconds = interleave({name: clock(work) for name, work in cases.items()}, int(turns))
    first = median(next(iter(seconds.values())))
    for name, times in seconds.items():
        middle, least, most = (1000 * time for time in (median(times), min(times), max(times)))
        print(f"{name:50s} {middle:8.1f} ms ({least:.1f} to {most:.1f}), × {middle / first / 1000:.2f}")


if __name__ == "__main__":
    main()
