"""The second streams against the formulas, the host untouched, and no work that nobody asked for."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_attention import explicit_self_self, explicit_softmax
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from open_gem import PATHWAYS, Pathway, backbones, run
from open_gem.attention import Heads
from open_gem.errors import InputError, PathwayError
from open_gem.pathway import Block, Host, find_pathway
from open_gem.types import Grid, Size

GEM = PATHWAYS["gem"]
VARIATIONS = PATHWAYS | {
    "no residual": replace(GEM, residual=False),
    "mlp": replace(GEM, mlp=True),
    "mlp, no residual": replace(GEM, mlp=True, residual=False, depth=2),
    "depth 1": replace(GEM, depth=1),
    "depth 3": replace(GEM, depth=3),
    "K 0": replace(GEM, iterations=0),
    "K 3": replace(GEM, iterations=3),
    "kv, not normalised": replace(GEM, projections="kv", normalize=False, temperature="trained"),
    "tau": replace(GEM, temperature=0.25),
    "sharper": replace(GEM, temperature_scale=0.5),
    "blunter tau": replace(GEM, temperature=0.25, temperature_scale=3.0),
    "trained, scaled": replace(PATHWAYS["clip_surgery"], temperature_scale=0.3),
    "q-k, no mlp": Pathway(mix="query-key", depth=3),
    "q-k, no residual": Pathway(mix="query-key", depth=3, mlp=True, residual=False),
    "the host from further down": replace(PATHWAYS["clip"], depth=4),
    "identity, deep": replace(PATHWAYS["maskclip"], depth=4),
}


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def close(ours: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


# The method -----------------------------------------------------------------------------------------------------------


def explicit_mix(pathway: Pathway, heads: Heads, normed: Tensor) -> Tensor:
    if pathway.mix == "identity":
        return heads.v
    head_width = heads.v.shape[-1]
    if pathway.mix == "query-key":
        return explicit_softmax(heads.q @ heads.k.mT / head_width**0.5) @ heads.v
    if pathway.temperature == "adaptive":
        taus = [len(image) * head_width**0.5 / sum(token.norm().item() for token in image) for image in normed]
    else:
        taus = [head_width**0.5 if pathway.temperature == "trained" else float(pathway.temperature)] * len(normed)
    taus = [tau * pathway.temperature_scale for tau in taus]
    mixed = explicit_self_self(
        heads,
        taus,
        projections=pathway.projections,
        normalize=pathway.normalize,
        iterations=pathway.iterations,
    )
    return mixed.to(normed.dtype)


@torch.no_grad()
def explicit_run(host: Host, pixels: Tensor, pathway: Pathway) -> Tensor:
    """One pathway from the formulas: first the whole host, then the second stream beside its last blocks."""
    stream = [host.embed(pixels)[0]]
    grid = host.embed(pixels)[1]
    blocks = host.blocks(grid)
    for block in blocks:
        stream.append(block.forward(stream[-1]))
    start = host.layers - pathway.depth
    y = stream[start] if pathway.residual else torch.zeros_like(stream[start])
    for block, x in zip(blocks[start:], stream[start:-1], strict=True):
        normed = block.norm(x)
        y = y + block.out(explicit_mix(pathway, block.qkv(normed), normed))
        if pathway.mlp:
            y = y + block.mlp(y)
    return host.project(y)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", VARIATIONS)
def test_every_pathway_is_its_formula(name, size, square):
    pixels = pictures(*size)
    features = run(square.backbone, pixels, {"it": VARIATIONS[name]})["it"]
    close(features.tokens, explicit_run(square.backbone, pixels, VARIATIONS[name]))


def test_settings_that_differ_give_different_features(square):
    """No setting is ignored: all rows and variations but the two that are the host differ from one another."""
    found = run(square.backbone, pictures(32, 32), VARIATIONS)
    distinct = [name for name in VARIATIONS if name != "the host from further down"]
    for index, name in enumerate(distinct):
        for other in distinct[:index]:
            assert (found[name].tokens - found[other].tokens).abs().max() > 1e-4, (name, other)


def test_many_pathways_in_one_pass_equal_each_alone(square):
    pixels = pictures(24, 40)
    together = run(square.backbone, pixels, VARIATIONS, pooled=True)
    assert list(together) == list(VARIATIONS)
    for name, pathway in VARIATIONS.items():
        close(together[name].tokens, run(square.backbone, pixels, {name: pathway})[name].tokens, 1e-6)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_exact_equals_fused(size, square):
    pixels = pictures(*size)
    exact = run(square.backbone, pixels, VARIATIONS, pooled=True, exact=True)
    fused = run(square.backbone, pixels, VARIATIONS, pooled=True)
    for name in VARIATIONS:
        close(fused[name].tokens, exact[name].tokens)
        close(fused[name].pooled, exact[name].pooled)  # type: ignore[arg-type]


def test_features_say_what_they_are(square):
    features = run(square.backbone, pictures(24, 40), {"gem": GEM})["gem"]
    assert (features.grid, features.size, features.prefix) == (Grid(3, 5), Size(24, 40), 1)
    assert features.tokens.shape == (2, 16, 48)
    assert torch.equal(features.patches, features.tokens[:, 1:])
    assert features.pooled is None
    assert not features.tokens.requires_grad


def test_pooled_is_the_hosts_image_embedding_under_every_pathway(square):
    pixels = pictures(32, 32)
    found = run(square.backbone, pixels, {"gem": GEM, "shallow": replace(GEM, depth=1)}, pooled=True)
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
        *[("mix", value) for value in ("", "self", "SELF-SELF")],
        *[("projections", value) for value in ("", "x", "qq", "qkvx", "QKV", "q k")],
        *[("iterations", value) for value in (-1,)],
        *[("temperature", value) for value in (0, -1.0, float("nan"), float("inf"), "warm", None)],
        *[("temperature_scale", value) for value in (0, -2, float("nan"), float("inf"), "adaptive", None)],
        *[("depth", value) for value in (0, -6)],
    ],
)
def test_impossible_settings_are_refused_in_one_line_that_names_the_field(field, value):
    with pytest.raises(PathwayError) as caught:
        Pathway(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} is ")
    assert str(value) in message
    assert "expected" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mix", ["self-self"]),
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
    with pytest.raises(PathwayError, match=f"^{field} is "):
        Pathway(**{field: value})


@pytest.mark.parametrize(("given", "meant"), [("gme", "gem"), ("maskclip-reduce", "maskclip-reduced"), ("zzz", None)])
def test_an_unknown_pathway_lists_the_known_and_suggests(given, meant):
    with pytest.raises(PathwayError) as caught:
        find_pathway(given)
    message = str(caught.value)
    assert repr(given) in message
    assert message.endswith(f"known: {', '.join(PATHWAYS)}")
    assert ("did you mean" in message) == (meant is not None)
    assert meant is None or f"did you mean {meant}?" in message


def test_a_known_pathway_is_its_row():
    assert all(find_pathway(name) is pathway for name, pathway in PATHWAYS.items())


# Work not asked for is not done ---------------------------------------------------------------------------------------


class CountingHost:
    """A backbone whose every function counts its calls: `calls["mlp", 5]`, `calls["embed"]`."""

    def __init__(self, backbone: Host):
        self.calls: Counter[Any] = Counter()
        self.prefix = backbone.prefix
        self.layers = backbone.layers
        self._blocks = [self._counted_block(index, block) for index, block in enumerate(backbone.blocks(Grid(4, 4)))]
        self.embed = self._counted("embed", backbone.embed)
        self.project = self._counted("project", backbone.project)
        self.pool = self._counted("pool", backbone.pool)

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

    def count(self, pathways: dict[str, Pathway], **settings: bool) -> Counter[Any]:
        self.calls.clear()
        run(self, pictures(32, 32, 1), pathways, **settings)
        return self.calls


@pytest.fixture
def counting(square) -> CountingHost:
    return CountingHost(square.backbone)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", [name for name, pathway in PATHWAYS.items() if not pathway.is_host])
def test_the_hosts_last_block_waits_until_somebody_needs_it(name, exact, counting):
    pathway = replace(PATHWAYS[name], mlp=False)
    alone = counting.count({name: pathway}, exact=exact).copy()
    assert alone["embed"] == alone["norm", 5] == alone["qkv", 5] == alone["out", 5] == alone["project"] == 1
    assert alone["mlp", 5] == alone["forward", 5] == alone["pool"] == 0
    for more in (
        counting.count({name: pathway}, pooled=True, exact=exact).copy(),
        counting.count({name: pathway, "clip": PATHWAYS["clip"]}, exact=exact).copy(),
    ):
        last = {"forward": 1, "out": 1, "mlp": 0} if exact else {"forward": 0, "out": 2, "mlp": 1}
        assert {key: more[key, 5] for key in last} == last
        assert more["norm", 5] == more["qkv", 5] == more["embed"] == 1


def test_pooling_is_done_once_and_only_where_asked(counting):
    assert counting.count(PATHWAYS, pooled=True)["pool"] == 1
    assert counting.count(PATHWAYS)["pool"] == 0


@pytest.mark.parametrize("pooled", [False, True])
def test_equal_mixtures_are_computed_once_a_block(pooled, counting):
    sweep = {
        **{f"depth {depth}": replace(GEM, depth=depth) for depth in range(1, 5)},
        "no residual": replace(GEM, depth=4, residual=False),
        "mlp": replace(GEM, depth=4, mlp=True),
    }
    calls = counting.count(sweep, pooled=pooled)
    for index in range(2, 6):
        host_goes_on = pooled or index < 5
        assert calls["out", index] == 1 + host_goes_on
        assert calls["mlp", index] == 1 + host_goes_on  # the one stream that has it
        assert calls["qkv", index] == calls["norm", index] == 1
    assert calls["out", 1] == 1  # the host alone


def test_different_mixtures_are_not_confused(counting):
    different = {str(iterations): replace(GEM, iterations=iterations, depth=2) for iterations in range(3)}
    assert counting.count(different)["out", 5] == 3


@pytest.mark.parametrize(
    ("pathways", "words"), [({"deep": Pathway(depth=7)}, ["'deep'", "7", "6"]), ({}, ["gem", "clip"])]
)
def test_what_cannot_be_run_is_refused_before_anything_is_computed(pathways, words, counting):
    with pytest.raises(PathwayError) as caught:
        run(counting, pictures(32, 32), pathways)
    assert all(word in str(caught.value) for word in words)
    assert not counting.calls


@pytest.mark.parametrize(
    "shape", [(1, 3, 33, 32), (1, 3, 32, 36), (1, 3, 0, 32), (3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3), (32, 32)]
)
def test_pixels_that_do_not_fit_are_refused(shape, square):
    with pytest.raises(InputError, match="pixels"):
        run(square.backbone, torch.zeros(shape), {"gem": GEM})


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


def test_nothing_grows_with_the_square_of_the_tokens(square):
    heads, tokens, outputs = 4, [65, 257, 577], []
    assert square.backbone.blocks(Grid(1, 1))[0].qkv(torch.zeros(1, 2, 64)).q.shape[1] == heads
    for side, n in zip((8, 16, 24), tokens, strict=True):
        pixels = pictures(8 * side, 8 * side, 1)
        outputs.append(largest(lambda pixels=pixels: run(square.backbone, pixels, VARIATIONS, pooled=True)))
        assert outputs[-1] < heads * n * n
    for (n, few), (more_n, many) in pairwise(zip(tokens, outputs, strict=True)):
        assert many / few == pytest.approx(more_n / n, rel=0.05)


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
    run(square.backbone, pixels, VARIATIONS, pooled=True, exact=exact)
    run(square.backbone, pictures(24, 40), VARIATIONS, exact=exact)
    assert torch.equal(model.encode_image(pixels), embedding)
    assert inventory() == parts
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_threads_share_a_host(square):
    sizes = [(8 * rows, 8 * cols) for rows in (3, 4, 5) for cols in (3, 4, 5)] * 2

    def encode(host: Host, size: tuple[int, int]) -> Tensor:
        return run(host, pictures(*size), {"gem": GEM, "clip": PATHWAYS["clip"]})["gem"].tokens

    expected = [encode(square.backbone, size) for size in sizes]
    fresh = backbones.adapt(square.backbone.model, square.backbone.text.tokenizer)  # nothing cached yet
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda size: encode(fresh, size), sizes))
    for ours, alone in zip(found, expected, strict=True):
        close(ours, alone, 1e-6)
