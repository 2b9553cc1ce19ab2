"""The second streams against the formulas, the host untouched, and no work that nobody asked for."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from method.test_attention import explicit_self_self, explicit_softmax
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from open_gem import METHODS, Method, run, towers
from open_gem.errors import InputError, MethodError
from open_gem.method import attention, calibration, kernels
from open_gem.method.attention import Heads, query_key
from open_gem.method.calibration import outliers, repair
from open_gem.method.kmeans import spherical_kmeans
from open_gem.method.table import (
    IDENTITY,
    QUERY_KEY,
    Attention,
    CrossBlock,
    KMeans,
    Plain,
    Recursive,
    SelfCalibrated,
    SelfSelf,
    Tempered,
    find_method,
)
from open_gem.method.tower import Block, VisionTower
from open_gem.types import Grid, Size

GEM = METHODS["gem"]
SCLIP = asdict(METHODS["sclip"].attention)
VARIATIONS = METHODS | {
    "no residual": GEM.replace(residual=False),
    "mlp": GEM.replace(mlp=True),
    "mlp, no residual": GEM.replace(mlp=True, residual=False, depth=2),
    "depth 1": GEM.replace(depth=1),
    "depth 3": GEM.replace(depth=3),
    "K 0": GEM.replace(iterations=0),
    "K 3": GEM.replace(iterations=3),
    "kv, not normalised": GEM.replace(projections="kv", normalize=False, temperature="trained"),
    "tau": GEM.replace(temperature=0.25),
    "sharper": GEM.replace(temperature_scale=0.5),
    "blunter tau": GEM.replace(temperature=0.25, temperature_scale=3.0),
    "trained, scaled": METHODS["clip_surgery"].replace(temperature_scale=0.3),
    "q-k, no mlp": Method(QUERY_KEY, depth=3),
    "q-k, no residual": Method(QUERY_KEY, depth=3, mlp=True, residual=False),
    "the host from further down": METHODS["clip"].replace(depth=4),
    "identity, deep": METHODS["maskclip"].replace(depth=4),
    "sum": GEM.replace(combine="sum"),
    "near": GEM.replace(gaussian=1.5),
    "nearer": METHODS["naclip"].replace(gaussian=1.0),
    "cross-block, half": METHODS["resclip-rcs"].replace(share=0.5),
    "cross-block, plain gain": METHODS["resclip-rcs"].replace(gain=1.0),
    "cross-block beside sclip": METHODS["sclip"].replace(attention=CrossBlock(**SCLIP), depth=2),
    "three clusters": METHODS["gem-kmeans"].replace(clusters=3),
    "another seed": METHODS["gem-kmeans"].replace(clusters=3, seed=1),
    "unit clusters": METHODS["gem-kmeans"].replace(normalize=True, temperature="adaptive", depth=2),
}


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def close(ours: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


# The method -----------------------------------------------------------------------------------------------------------


def explicit_temperatures(attention: Tempered, heads: Heads, normed: Tensor) -> list[float]:
    """τ of each image."""
    head_width = heads.v.shape[-1]
    if attention.temperature == "adaptive":
        taus = [len(image) * head_width**0.5 / sum(token.norm().item() for token in image) for image in normed]
    else:
        taus = [head_width**0.5 if attention.temperature == "trained" else float(attention.temperature)] * len(normed)
    return [tau * attention.temperature_scale for tau in taus]


def explicit_attention(heads: Heads) -> Tensor:
    return explicit_softmax(heads.q @ heads.k.mT / heads.v.shape[-1] ** 0.5)


def explicit_bias(grid: Grid, std: float) -> Tensor:
    """NACLIP's ω for one token before the patches, by the distances of all pairs."""
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid)).reshape(-1, 2)
    bias = torch.zeros(len(places) + 1, len(places) + 1)
    bias[1:, 1:] = torch.exp(-torch.cdist(places, places).square() / (2 * std**2))
    return bias


def explicit_mix(mix: Attention, everything: Sequence[Heads], index: int, normed: Tensor, grid: Grid) -> Tensor:
    """What block `index` mixes; `everything` has q, k, v of all blocks."""
    heads = everything[index]
    if mix == IDENTITY:
        return heads.v
    if mix == QUERY_KEY:
        return explicit_attention(heads) @ heads.v
    assert isinstance(mix, Tempered)
    taus = explicit_temperatures(mix, heads, normed)
    if isinstance(mix, KMeans):
        return explicit_k_means(mix, heads, taus)
    assert isinstance(mix, SelfSelf), "write the formula of another attention here"
    mixed = sum(
        explicit_self_self(
            getattr(heads, name),
            heads.v,
            taus,
            normalize=mix.normalize,
            iterations=mix.iterations,
            bias=None if mix.gaussian is None else explicit_bias(grid, mix.gaussian),
        )
        for name in mix.projections
    )
    mixed = (mixed / len(mix.projections) if mix.combine == "mean" else mixed).to(normed.dtype)  # type: ignore[union-attr, operator]
    if isinstance(mix, CrossBlock):
        assert len(everything) == 6
        middle = torch.stack([explicit_attention(everything[block]) for block in (2, 3)]).mean(0)  # 5/12 to 9/12 of six
        return mix.gain * ((1 - mix.share) * mixed + mix.share * (middle @ heads.v))
    return mixed


def explicit_k_means(mix: KMeans, heads: Heads, taus: Sequence[float]) -> Tensor:
    """Eq. 10, one image and head at a time, from the labels that the clustering gives."""
    labels = spherical_kmeans(heads.v, mix.clusters, seed=mix.seed, iterations=mix.max_iter).labels
    output = torch.zeros_like(heads.v)
    for image, tau in enumerate(taus):
        for head, values in enumerate(heads.v[image]):
            centroids = torch.stack([values[labels[image, head] == own].mean(0) for own in range(mix.clusters)])
            query, key = values, centroids
            if mix.normalize:
                query, key = (part / part.norm(dim=-1, keepdim=True) for part in (query, key))
            output[image, head] = explicit_softmax(query @ key.T / tau) @ centroids
    return output


def explicit_recursive(mix: Recursive, heads: Heads, x: Tensor, last: Block) -> Tensor:
    """RADSeg's last block, head by head."""
    trained = last.out(explicit_attention(heads) @ heads.v)
    mixed = torch.zeros_like(heads.v)
    for head, tokens in enumerate(trained.chunk(heads.v.shape[1], dim=-1)):
        cosines = normalize(tokens, dim=-1) @ normalize(tokens, dim=-1).mT
        weights = explicit_softmax((mix.scale * cosines).masked_fill(cosines < 0, -torch.inf))
        mixed[:, head] = weights @ heads.v[:, head]
    y = x + last.out(mixed)
    return y + last.mlp(y)


def explicit_calibrated(mix: SelfCalibrated, stream: Sequence[Tensor], last: Block, grid: Grid) -> Tensor:
    """SC-CLIP on six blocks, image by image, with whole matrices; outliers are those that `outliers` finds."""
    assert len(stream) == 7
    early, middle, end, before = 2, 4, 5, 5  # 4, 9, 10 and 11 of twelve

    def aggregated(tokens: Tensor, cosines: Tensor) -> Tensor:
        weights = cosines * (cosines >= mix.least)
        return weights @ tokens / (weights.sum(dim=1, keepdim=True) + 1e-6)

    def attended(tokens: Tensor, cosines: Tensor) -> Tensor:
        heads = last.qkv(last.norm(tokens[None, 1:]))
        excess = cosines - cosines.mean()
        weights = explicit_softmax((mix.scale * excess).masked_fill(excess < 0, -torch.inf))
        keys = explicit_softmax(heads.k @ heads.k.mT / heads.k.shape[-1] ** 0.5)
        return last.out((weights + keys) / 2 @ heads.v)[0] + mix.cls * tokens[0]

    results = []
    for image in range(len(stream[0])):
        patches = [tokens[image, 1:] for tokens in stream]
        wrong = outliers(patches[before], mix.neighbors, mix.share)
        unit = normalize(repair(patches[middle], grid, wrong), dim=-1)
        calibrated = aggregated(repair(patches[before], grid, wrong), unit @ unit.T)
        summed = torch.stack([tokens[image] for tokens in stream[early : end + 1]]).sum(dim=0)
        guide = normalize(patches[early], dim=-1)
        parts = [torch.cat([stream[before][image, :1], calibrated]), summed]
        first, second = (aggregated(attended(part, unit @ unit.T), guide @ guide.T) for part in parts)
        results.append(torch.cat([stream[before][image, :1], first + second]))
    return torch.stack(results)


@torch.no_grad()
def explicit_run(host: VisionTower, pixels: Tensor, method: Method) -> Tensor:
    """One method from the formulas: first the whole host, then the second stream beside its last blocks."""
    x, grid = host.embed(pixels)
    stream, blocks = [x], host.blocks(grid)
    for block in blocks:
        stream.append(block.forward(stream[-1]))
    everything = [block.qkv(block.norm(x)) for block, x in zip(blocks, stream[:-1], strict=True)]
    if isinstance(method.attention, SelfCalibrated):
        return host.project(explicit_calibrated(method.attention, stream, blocks[-1], grid))
    if isinstance(method.attention, Recursive):
        return host.project(explicit_recursive(method.attention, everything[-1], stream[-2], blocks[-1]))
    start = host.layers - method.depth
    y = stream[start] if method.residual else torch.zeros_like(stream[start])
    for index in range(start, host.layers):
        mixed = explicit_mix(method.attention, everything, index, blocks[index].norm(stream[index]), grid)
        y = y + blocks[index].out(mixed)
        if method.mlp:
            y = y + blocks[index].mlp(y)
    return host.project(y)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", VARIATIONS)
def test_every_method_is_its_formula(name, size, square):
    pixels = pictures(*size)
    features = run(square.backbone.vision, pixels, {"it": VARIATIONS[name]})["it"]
    close(features.tokens, explicit_run(square.backbone.vision, pixels, VARIATIONS[name]))


def test_settings_that_differ_give_different_features(square):
    """No setting is ignored: all rows and variations differ, but for the two that are the host and those that are
    the same settings."""
    found = run(square.backbone.vision, pictures(32, 32), VARIATIONS)
    names = {method: name for name, method in reversed(VARIATIONS.items())}
    distinct = [name for name in names.values() if name != "the host from further down"]
    assert set(VARIATIONS) - set(distinct) == {"the host from further down", "gem-v-raw", "mlp"}
    for index, name in enumerate(distinct):
        for other in distinct[:index]:
            assert (found[name].tokens - found[other].tokens).abs().max() > 1e-4, (name, other)


def test_many_methods_in_one_pass_equal_each_alone(square):
    pixels = pictures(24, 40)
    together = run(square.backbone.vision, pixels, VARIATIONS, pooled=True)
    assert list(together) == list(VARIATIONS)
    for name, method in VARIATIONS.items():
        close(together[name].tokens, run(square.backbone.vision, pixels, {name: method})[name].tokens, 5e-6)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_exact_equals_fused(size, square):
    pixels = pictures(*size)
    exact = run(square.backbone.vision, pixels, VARIATIONS, pooled=True, exact=True)
    fused = run(square.backbone.vision, pixels, VARIATIONS, pooled=True)
    for name in VARIATIONS:
        close(fused[name].tokens, exact[name].tokens)
        close(fused[name].pooled, exact[name].pooled)  # type: ignore[arg-type]


def test_features_say_what_they_are(square):
    features = run(square.backbone.vision, pictures(24, 40), {"gem": GEM})["gem"]
    assert (features.grid, features.size, features.prefix) == (Grid(3, 5), Size(24, 40), 1)
    assert features.tokens.shape == (2, 16, 48)
    assert torch.equal(features.patches, features.tokens[:, 1:])
    assert features.pooled is None
    assert not features.tokens.requires_grad


def test_pooled_is_the_hosts_image_embedding_under_every_method(square):
    pixels = pictures(32, 32)
    found = run(square.backbone.vision, pixels, {"gem": GEM, "shallow": GEM.replace(depth=1)}, pooled=True)
    with torch.no_grad():
        expected = square.backbone.model.encode_image(pixels)
    for features in found.values():
        assert features.pooled is not None
        assert not features.pooled.requires_grad
        close(features.pooled, expected)


# Settings that make no sense ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("attention", value) for value in ("", "self", "SELF-SELF")],
        *[("projections", value) for value in ("", "x", "qq", "qkvx", "QKV", "q k")],
        *[("iterations", value) for value in (-1,)],
        ("temperature", 10**400),
        *[("temperature", value) for value in (0, -1.0, float("nan"), float("inf"), "warm", None)],
        *[("temperature_scale", value) for value in (0, -2, float("nan"), float("inf"), "adaptive", None)],
        *[("depth", value) for value in (0, -6)],
        *[("combine", value) for value in ("", "max", None)],
        *[("gaussian", value) for value in (0, -1.0, float("nan"), "5")],
    ],
)
def test_impossible_settings_are_refused_in_one_line_that_names_the_field(field, value):
    with pytest.raises(MethodError) as caught:
        GEM.replace(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} is ")
    assert str(value) in message
    assert "expected" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention", ["self-self"]),
        ("attention", KMeans),
        ("projections", ["q", "k"]),
        ("projections", None),
        ("iterations", 1.5),
        ("iterations", "1"),
        ("depth", 2.5),
        ("depth", None),
        ("temperature", True),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_too(field, value):
    with pytest.raises(MethodError, match=f"^{field} is "):
        GEM.replace(**{field: value})


@pytest.mark.parametrize(("given", "meant"), [("gme", "gem"), ("maskclip-reduce", "maskclip-reduced"), ("zzz", None)])
def test_an_unknown_method_lists_the_known_and_suggests(given, meant):
    with pytest.raises(MethodError) as caught:
        find_method(given)
    message = str(caught.value)
    assert repr(given) in message
    assert f"known: {', '.join(METHODS)}" in message
    assert ("did you mean" in message) == (meant is not None)
    assert meant is None or f"did you mean {meant}?" in message


def test_a_known_method_is_its_row():
    assert all(find_method(name) is method for name, method in METHODS.items())


@pytest.mark.parametrize(
    ("attention", "settings"),
    [
        (KMeans, {"clusters": 0}),
        (KMeans, {"clusters": 2.0}),
        (KMeans, {"seed": -1}),
        (KMeans, {"max_iter": 0}),
        (CrossBlock, {"share": 0}),
        (CrossBlock, {"share": 1.5}),
        (CrossBlock, {"gain": -1}),
    ],
)
def test_impossible_settings_of_an_attention_are_refused(attention, settings):
    [name] = settings
    with pytest.raises(MethodError, match=f"^{name} is .*expected"):
        attention(**settings)


def test_a_method_that_borrows_from_blocks_to_come_is_refused(square):
    deep = METHODS["resclip-rcs"].replace(depth=4)
    with pytest.raises(MethodError, match="borrows from block 4 of 6: expected depth 3 at most"):
        run(square.backbone.vision, pictures(32, 32), {"deep": deep})
    run(square.backbone.vision, pictures(32, 32), {"deep": deep.replace(depth=3)})


def test_any_function_of_q_k_and_v_is_an_attention(square):
    halved = Method(Plain(lambda heads: heads.v / 2), depth=1, residual=False)
    twice = {"halved": halved, "whole": METHODS["maskclip-reduced"]}
    blocks = square.backbone.vision.blocks(Grid(4, 4))
    with torch.no_grad():
        x = pictures(32, 32)
        found = run(square.backbone.vision, x, twice)
        tokens = square.backbone.vision.embed(x)[0]
        for block in blocks[:-1]:
            tokens = block.forward(tokens)
        expected = square.backbone.vision.project(blocks[-1].out(blocks[-1].qkv(blocks[-1].norm(tokens)).v / 2))
    close(found["halved"].tokens, expected)


@pytest.mark.parametrize("name", METHODS)
def test_settings_become_json(name):
    document = json.loads(json.dumps(METHODS[name].describe()))
    assert document["depth"] == METHODS[name].depth
    assert isinstance(document["attention"], str)


def test_settings_of_an_attention_are_part_of_the_description():
    described = METHODS["gem-kmeans"].replace(clusters=3).describe()
    assert described.items() >= {"attention": "KMeans", "clusters": 3, "seed": 0, "max_iter": 20, "depth": 6}.items()


@pytest.mark.parametrize("setting", ["iterations", "temperature_scale", "clusters"])
def test_a_setting_that_a_method_does_not_have_is_refused_with_those_it_has(setting):
    with pytest.raises(MethodError, match=f"^{setting}: no setting of a method with query_key attention, which has"):
        METHODS["clip"].replace(**{setting: 2})


def test_more_clusters_than_tokens_make_each_its_own(square):
    pixels = pictures(16, 16)  # five tokens
    many = METHODS["gem-kmeans"].replace(clusters=50)
    values = many.replace(attention=Plain(lambda heads: query_key(Heads(heads.v, heads.v, heads.v))))
    found = run(square.backbone.vision, pixels, {"many": many, "values": values})
    close(found["many"].tokens, found["values"].tokens)


# Work not asked for is not done ---------------------------------------------------------------------------------------


class CountingHost(VisionTower):
    """A backbone whose every function counts its calls: `calls["mlp", 5]`, `calls["embed"]`."""

    def __init__(self, tower: VisionTower):
        self.calls: Counter[Any] = Counter()
        self.patch, self.prefix, self.layers = tower.patch, tower.prefix, tower.layers
        self.tower = tower
        self._blocks = [self._counted_block(index, block) for index, block in enumerate(tower.blocks(Grid(4, 4)))]

    def embed(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        return self._counted("embed", self.tower.embed)(pixels)

    def project(self, tokens: Tensor) -> Tensor:
        return self._counted("project", self.tower.project)(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        return self._counted("pool", self.tower.pool)(tokens)

    def blocks(self, grid: Grid) -> Sequence[Block]:
        return self._blocks

    def _counted(self, key: Any, function: Callable) -> Callable:
        def counting(*given: Any) -> Any:
            self.calls[key] += 1
            return function(*given)

        return counting

    def _counted_block(self, index: int, block: Block) -> Block:
        names = ("norm", "qkv", "out", "mlp", "forward")
        return Block(**{name: self._counted((name, index), getattr(block, name)) for name in names})

    def count(self, methods: dict[str, Method], **settings: Any) -> Counter[Any]:
        self.calls.clear()
        run(self, pictures(32, 32, 1), methods, **settings)
        return self.calls


def test_a_trace_is_the_stream_after_each_block(square):
    """Of the host all blocks, as its modules have them; of a method its own, the last of which is projected."""
    pixels, chosen = pictures(32, 32, 2), {"clip": METHODS["clip"], "gem": METHODS["gem"].replace(depth=2)}
    layers = square.backbone.vision.layers
    plain = run(square.backbone.vision, pixels, chosen)
    found = run(square.backbone.vision, pixels, chosen, trace=["clip", "gem"], exact=True)
    assert list(found["clip"].trace) == list(range(1, layers + 1))
    assert list(found["gem"].trace) == [layers - 1, layers]
    tokens, grid = square.backbone.vision.embed(pixels)
    with torch.no_grad():
        for number, block in enumerate(square.backbone.vision.blocks(grid), start=1):
            tokens = block.forward(tokens)
            assert torch.equal(found["clip"].trace[number], tokens)
        for name in chosen:
            assert torch.equal(square.backbone.vision.project(found[name].trace[layers]), found[name].tokens)
    one = found["gem"].image(1)
    assert torch.equal(one.tokens[0], found["gem"].tokens[1])
    assert torch.equal(one.trace[layers][0], found["gem"].trace[layers][1])
    assert all(not features.trace for features in plain.values())
    assert not run(square.backbone.vision, pixels, chosen, trace=["gem"])["clip"].trace


@pytest.fixture
def counting(square) -> CountingHost:
    return CountingHost(square.backbone.vision)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.is_host])
def test_the_hosts_last_block_waits_until_somebody_needs_it(name, exact, counting):
    method = METHODS[name].replace(mlp=False)
    again = 2 if isinstance(method.attention, SelfCalibrated) else 0  # readings of the block for its two halves
    own = 2 if isinstance(method.attention, SelfCalibrated | Recursive) else 1
    alone = counting.count({name: method}, exact=exact).copy()
    assert alone["embed"] == alone["project"] == 1
    assert alone["norm", 5] == alone["qkv", 5] == 1 + again
    assert alone["out", 5] == own
    assert alone["mlp", 5] == alone["forward", 5] == alone["pool"] == 0
    for more in (
        counting.count({name: method}, pooled=True, exact=exact).copy(),
        counting.count({name: method, "clip": METHODS["clip"]}, exact=exact).copy(),
    ):
        last = {"forward": 1, "out": own, "mlp": 0} if exact else {"forward": 0, "out": own + 1, "mlp": 1}
        assert {key: more[key, 5] for key in last} == last
        assert more["norm", 5] == more["qkv", 5] == 1 + again
        assert more["embed"] == 1


def test_pooling_is_done_once_and_only_where_asked(counting):
    assert counting.count(METHODS, pooled=True)["pool"] == 1
    assert counting.count(METHODS)["pool"] == 0


@pytest.mark.parametrize("pooled", [False, True])
def test_equal_mixtures_are_computed_once_a_block(pooled, counting):
    sweep = {
        **{f"depth {depth}": GEM.replace(depth=depth) for depth in range(1, 5)},
        "no residual": GEM.replace(depth=4, residual=False),
        "mlp": GEM.replace(depth=4, mlp=True),
    }
    calls = counting.count(sweep, pooled=pooled)
    for index in range(2, 6):
        host_goes_on = pooled or index < 5
        assert calls["out", index] == 1 + host_goes_on
        assert calls["mlp", index] == 1 + host_goes_on  # the one stream that has it
        assert calls["qkv", index] == calls["norm", index] == 1
    assert calls["out", 1] == 1  # the host alone


TABLE_1 = ["clip", *(f"gem{projection}{norm}" for norm in ("-raw", "") for projection in ("-v", "-k", "-q", ""))]


@pytest.fixture
def attended(monkeypatch) -> Counter[str]:
    """How often torch's attention and our own kernels were called."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counted(*given: Any, **settings: Any) -> Tensor:
            calls[name] += 1
            return function(*given, **settings)

        monkeypatch.setattr(owner, name, counted)

    count(attention, "scaled_dot_product_attention")
    count(attention.native, "self_self")
    count(attention.native, "query_key")
    return calls


def steps(method: Method) -> int:
    """Attentions that the formula of a row of `METHODS` has in one block."""
    if isinstance(method.attention, SelfSelf):
        return len(method.attention.projections) * (method.attention.iterations + 1)
    if isinstance(method.attention, SelfCalibrated):
        return 2  # k-k attention for each half
    return 0 if method.attention == IDENTITY else 1


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].is_host])
def test_no_method_attends_more_often_than_its_formula_needs(name, counting, attended, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "0")
    method = METHODS[name]
    counting.count({name: method})
    borrowed = len(method.attention.borrows(6))  # attention of other blocks, over this block's values
    assert attended == {"scaled_dot_product_attention": 5 + method.depth * (steps(method) + borrowed)}


@pytest.mark.parametrize("name", ["gem", "gem-q", "gem-v", "gem-mlp"])
def test_a_normalised_method_is_one_call_of_the_kernel_a_block(name, counting, attended):
    counting.count({name: METHODS[name]})
    assert attended == {"query_key": 5, "self_self": 6}


@pytest.mark.parametrize(("switch", "raw", "normalised"), [("0", 3, 6), ("1", 3, 3)])
def test_all_rows_of_table_1_cost_the_host_once(switch, raw, normalised, counting, attended, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, switch)
    rows = {name: METHODS[name] for name in TABLE_1}
    assert len(rows) == 9
    calls = counting.count(rows)
    assert all(calls["qkv", index] == calls["norm", index] == 1 for index in range(6))
    # a block: the host's; of q, k and v one step each without normalisation, two with, or both in one call; the means
    # of three cost nothing
    assert attended.total() == 6 * (1 + raw + normalised)


def test_different_mixtures_are_not_confused(counting):
    different = {str(iterations): GEM.replace(iterations=iterations, depth=2) for iterations in range(3)}
    assert counting.count(different)["out", 5] == 3


@pytest.mark.parametrize(
    ("methods", "words"), [({"deep": Method(depth=7)}, ["'deep'", "7", "6"]), ({}, ["gem", "clip"])]
)
def test_what_cannot_be_run_is_refused_before_anything_is_computed(methods, words, counting):
    with pytest.raises(MethodError) as caught:
        run(counting, pictures(32, 32), methods)
    assert all(word in str(caught.value) for word in words)
    assert not counting.calls


@pytest.mark.parametrize(
    "shape", [(1, 3, 33, 32), (1, 3, 32, 36), (1, 3, 0, 32), (3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3), (32, 32)]
)
def test_pixels_that_do_not_fit_are_refused(shape, square):
    with pytest.raises(InputError, match="pixels"):
        run(square.backbone.vision, torch.zeros(shape), {"gem": GEM})


# No n×n ---------------------------------------------------------------------------------------------------------------


class LargestOutput(TorchDispatchMode):
    """The most elements that any operation gave back."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))])
        return output


def largest(function: Callable[[], object]) -> int:
    with LargestOutput() as watch:
        function()
    return watch.numel


FAR = {name: method for name, method in VARIATIONS.items() if getattr(method.attention, "gaussian", None) is None}


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch):
    """Strips of rows short enough that an n×n matrix would be seen."""
    monkeypatch.setattr(calibration, "STRIP", 1 << 13)


def largest_outputs(host: VisionTower, methods: dict[str, Method]) -> dict[int, int]:
    """The largest tensor that is made, in elements, for some numbers of tokens."""
    pixels = {side * side + 1: pictures(8 * side, 8 * side, 1) for side in (8, 16, 24)}
    return {n: largest(partial(run, host, some, methods, pooled=True)) for n, some in pixels.items()}


def test_nothing_grows_with_the_square_of_the_tokens(square):
    for (n, few), (more_n, many) in pairwise(largest_outputs(square.backbone.vision, FAR).items()):
        assert many / few == pytest.approx(more_n / n, rel=0.05)


def test_a_bias_is_the_only_thing_that_does_and_has_no_heads(square):
    near = {name: method for name, method in VARIATIONS.items() if name not in FAR}
    assert {"naclip", "resclip-rcs"} <= near.keys()
    outputs = largest_outputs(square.backbone.vision, near)
    assert outputs[577] == 577**2


def test_the_watch_would_see_an_n_by_n_matrix():
    p = torch.randn(1, 4, 65, 16)
    assert largest(lambda: explicit_softmax(p @ p.mT) @ p) == 4 * 65 * 65


# The host stays as it is ----------------------------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


@torch.no_grad()
@pytest.mark.parametrize("exact", [False, True])
def test_the_host_is_read_and_never_changed(exact, square):
    model, pixels = square.backbone.model, pictures(32, 32)

    def inventory() -> list[Any]:
        return [
            (name, type(module), sorted(vars(module)), module.training, [len(getattr(module, hook)) for hook in HOOKS])
            for name, module in model.named_modules()
        ] + [(name, weight.requires_grad, weight.dtype) for name, weight in model.named_parameters()]

    state, parts = {key: value.clone() for key, value in model.state_dict().items()}, inventory()
    random_state, embedding = torch.get_rng_state(), model.encode_image(pixels)
    run(square.backbone.vision, pixels, VARIATIONS, pooled=True, exact=exact)
    run(square.backbone.vision, pictures(24, 40), VARIATIONS, exact=exact)
    assert torch.equal(model.encode_image(pixels), embedding)
    assert inventory() == parts
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_threads_share_a_host(square):
    sizes = [(8 * rows, 8 * cols) for rows in (3, 4, 5) for cols in (3, 4, 5)] * 2

    def encode(host: VisionTower, size: tuple[int, int]) -> Tensor:
        return run(host, pictures(*size), {"gem": GEM, "clip": METHODS["clip"]})["gem"].tokens

    expected = [encode(square.backbone.vision, size) for size in sizes]
    fresh = towers.adapt(square.backbone.model, square.backbone.text.tokenizer)  # nothing cached yet
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda size: encode(fresh.vision, size), sizes))
    for ours, alone in zip(found, expected, strict=True):
        close(ours, alone, 1e-6)
