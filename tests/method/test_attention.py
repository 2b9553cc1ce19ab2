"""Every way to mix values against the paper's equations, written out with explicit n×n matrices in float64."""

from itertools import product

import pytest
import torch
from torch import Tensor

from open_gem.method.attention import Heads, adaptive_inverse_temperature, gaussian, identity, query_key, self_self
from open_gem.types import Grid


def explicit_softmax(logits: Tensor) -> Tensor:
    """Rows of exp(a_ij) / Σ_k exp(a_ik) (eq. 5; the largest taken off first, which changes nothing)."""
    raised = (logits - logits.amax(-1, keepdim=True)).exp()
    return raised / raised.sum(-1, keepdim=True)


def explicit_self_self(
    p: Tensor,
    values: Tensor,
    temperatures: list[float],
    *,
    normalize: bool,
    iterations: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Eqs. 2–5, one image and head at a time; `temperatures` is τ of each image."""
    output = torch.zeros_like(values, dtype=torch.float64)
    added = 0 if bias is None else bias.double()
    for image, tau in enumerate(temperatures):
        for head in range(values.shape[1]):
            tokens = p[image, head].double()
            for left in range(iterations, -1, -1):
                if normalize:
                    tokens = tokens / tokens.square().sum(-1, keepdim=True).sqrt()
                attention = explicit_softmax(tokens @ tokens.T / tau + added)
                if left:
                    tokens = attention @ tokens
                else:
                    output[image, head] = attention @ values[image, head].double()
    return output


def random_heads(dtype: torch.dtype = torch.float64) -> Heads:
    """Two images, three heads, seven tokens; q, k, v of different scales, so that none passes for another."""
    generator = torch.Generator().manual_seed(3)
    scales = (0.7, 1.1, 1.6)
    return Heads(*(scale * torch.randn(2, 3, 7, 4, generator=generator, dtype=dtype) for scale in scales))


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("taus", [[0.4, 0.4], [0.3, 1.7]], ids=["number", "an-image-each"])
@pytest.mark.parametrize("iterations", [0, 1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_self_self_is_equations_2_to_5(biased, normalize, iterations, taus):
    heads = random_heads()
    inverse = 1 / taus[0] if taus[0] == taus[1] else 1 / torch.tensor(taus, dtype=torch.float64)[:, None, None, None]
    bias = torch.linspace(-1, 2, 49, dtype=torch.float64).view(7, 7) if biased else None
    for p in heads:
        settings = {"normalize": normalize, "iterations": iterations, "bias": bias}
        ours = self_self([p], heads.v, inverse, **settings)
        close(ours, explicit_self_self(p, heads.v, taus, **settings))


def test_self_self_leaves_its_input_alone_and_keeps_its_type():
    heads = random_heads(torch.float32)
    before = [part.clone() for part in heads]
    mixed = self_self([heads.v], heads.v, torch.tensor([2.0, 3.0])[:, None, None, None], normalize=False, iterations=1)
    assert mixed.dtype == torch.float32
    assert all(torch.equal(now, then) for now, then in zip(heads, before, strict=True))


def test_normalisation_makes_the_length_of_a_projected_token_immaterial():
    heads = random_heads()
    longer = heads.k * torch.linspace(0.1, 50, 7, dtype=torch.float64)[:, None]
    close(
        self_self([longer], heads.v, 2.0, normalize=True, iterations=1),
        self_self([heads.k], heads.v, 2.0, normalize=True, iterations=1),
    )


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("grid", "std"), [((3, 4), 5.0), ((4, 2), 0.7), ((1, 1), 1.0), ((1, 6), 2.0)])
def test_the_gaussian_bias_falls_with_the_distance_of_patches_and_spares_the_prefix(grid, std, prefix):
    bias = gaussian(Grid(*grid), prefix, std)
    places = list(product(range(grid[0]), range(grid[1])))
    assert bias.shape == (prefix + len(places),) * 2
    expected = torch.zeros_like(bias)
    for one, (row, col) in enumerate(places):
        for other, (other_row, other_col) in enumerate(places):
            squared = (row - other_row) ** 2 + (col - other_col) ** 2
            expected[prefix + one, prefix + other] = 2.718281828459045 ** (-squared / (2 * std**2))
    close(bias, expected, 1e-6)


def test_query_key_is_the_trained_attention():
    heads = random_heads()
    for image in range(2):
        for head in range(3):
            q, k, v = (part[image, head] for part in heads)
            close(query_key(heads)[image, head], explicit_softmax(q @ k.T / 2) @ v)  # √4


def test_identity_gives_the_values():
    heads = random_heads()
    assert torch.equal(identity(heads), heads.v)


@pytest.mark.parametrize("head_width", [4, 9])
def test_adaptive_temperature_is_the_formula_of_each_image(head_width):
    normed = torch.randn(3, 5, 12, dtype=torch.float64) * torch.tensor([1.0, 4.0, 0.2])[:, None, None]
    ours = adaptive_inverse_temperature(normed, head_width)
    assert ours.shape == (3, 1, 1, 1)
    for image in range(3):
        lengths = [sum(float(value) ** 2 for value in token) ** 0.5 for token in normed[image]]
        tau = len(lengths) * head_width**0.5 / sum(lengths)
        assert 1 / ours[image].item() == pytest.approx(tau, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adaptive_temperature_keeps_half_types_and_does_not_overflow_in_them(dtype):
    ours = adaptive_inverse_temperature(torch.full((1, 600, 64), 200.0, dtype=dtype), 64)
    assert ours.dtype == dtype
    assert ours.item() == 200.0  # 200 √64 / √64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_that_is_all_zero_stays_finite_in_half_precision(dtype):
    """As pruned heads are; 1e-12, which guards the norm, is 0 in float16."""
    zero = torch.zeros(1, 2, 5, 8, dtype=dtype)
    values = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mixed = self_self([zero], values, 4.0, normalize=True, iterations=1)
    torch.testing.assert_close(
        mixed.float(), values.float().mean(2, keepdim=True).expand(mixed.shape), rtol=0, atol=1e-2
    )


def test_the_adaptive_temperature_of_doubles_is_in_doubles():
    normed = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inverse = adaptive_inverse_temperature(normed, 4)
    expected = normed.norm(dim=-1).mean(dim=-1) / 2
    torch.testing.assert_close(inverse.flatten(), expected, rtol=1e-14, atol=0)
