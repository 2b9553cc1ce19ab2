"""On seeded weights, the numbers are those of the published implementations, and the host's are the host's."""

import json

import numpy as np
import pytest
import torch
from conftest import PARITY

from open_gem import METHODS, Method, run, towers
from open_gem.readout import min_max, upsample
from open_gem.tensors import similarity

TOLERANCE = 2e-5


def published_cases() -> list[tuple[str, str]]:
    return [
        (folder, case["key"])
        for folder in ("gem_square", "gem_resampled")
        for case in json.loads((PARITY / folder / "cases.json").read_text())
    ]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def settings(case: dict) -> Method:
    inverse = case["inverse_temperature"]
    temperature = "adaptive" if inverse is None else 1 / inverse
    return METHODS["gem"].replace(depth=case["blocks"], iterations=case["iterations"], temperature=temperature)


@pytest.mark.parametrize(("folder", "key"), published_cases())
def test_gem_is_the_published_gem(folder, key, square, resampled):
    reference = {"gem_square": square, "gem_resampled": resampled}[folder]
    arrays = reference.arrays()
    features = run(reference.backbone.vision, arrays["image"], {"gem": settings(reference.cases[key])})["gem"]
    close(features.tokens, arrays[f"{key}__tokens"])


@pytest.mark.parametrize("folder", ["gem_square", "gem_resampled"])
def test_heatmaps_are_the_published_ones(folder, square, resampled):
    reference = {"gem_square": square, "gem_resampled": resampled}[folder]
    arrays = reference.arrays()
    keys = [key for key in reference.cases if f"{key}__heatmaps" in arrays]
    assert len(keys) == 3
    for key in keys:
        features = run(reference.backbone.vision, arrays["image"], {"gem": settings(reference.cases[key])})["gem"]
        cosines = similarity(features.patches, arrays["text_features"]).unflatten(-1, tuple(features.grid))
        ours = torch.stack([torch.stack([min_max(upsample(m, features.size)) for m in image]) for image in cosines])
        # min-max divides by the range of a map, so the tolerance of the tokens grows by its inverse
        torch.testing.assert_close(ours, arrays[f"{key}__heatmaps"], rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    "name", ["clip_surgery", "gem-v-raw", "maskclip", "maskclip-reduced", "clearclip", "sclip", "naclip", "kk"]
)
def test_neighbours_are_the_published_ones(name, square):
    peers = square.arrays("peers")
    features = run(square.backbone.vision, peers["image"], {name: METHODS[name]})[name]
    key = {"gem-v-raw": "clip_surgery", "kk": "kk_reduced"}.get(name, name.replace("-", "_"))
    close(features.patches, peers[key])


@pytest.mark.parametrize("folder", ["gem_square", "gem_resampled"])
def test_host_tokens_are_the_published_hosts(folder, square, resampled):
    reference = {"gem_square": square, "gem_resampled": resampled}[folder]
    arrays = reference.arrays()
    for exact in (False, True):
        features = run(reference.backbone.vision, arrays["image"], {"clip": METHODS["clip"]}, exact=exact)["clip"]
        close(features.tokens, arrays["vanilla_tokens"])


def test_text_is_the_hosts(square):
    arrays = square.arrays()
    with torch.no_grad():
        close(square.backbone.model.encode_text(arrays["text_tokens"], normalize=True), arrays["text_features"])


@torch.no_grad()
def test_exact_stream_is_the_hosts_own_to_the_last_bit(square):
    model, image = square.backbone.model, square.arrays()["image"]
    features = run(square.backbone.vision, image, METHODS, pooled=True, exact=True)["clip"]
    visual = model.visual
    tokens = visual.ln_post(visual.transformer(visual._embeds(image))) @ visual.proj
    assert torch.equal(features.tokens, tokens)
    assert features.pooled is not None
    assert torch.equal(features.pooled, model.encode_image(image))


@torch.no_grad()
def test_fused_stream_is_the_hosts_own_within_tolerance(square):
    model, image = square.backbone.model, square.arrays()["image"]
    features = run(square.backbone.vision, image, METHODS, pooled=True)["clip"]
    assert features.pooled is not None
    close(features.pooled, model.encode_image(image))


def test_sc_clip_is_the_published_one():
    backbone = towers.load(f"local-dir:{PARITY / 'sc_clip'}", device="cpu")
    with np.load(PARITY / "sc_clip" / "sc_clip.npz") as arrays:
        image, tokens, pooled = (torch.from_numpy(arrays[name]) for name in ("image", "tokens", "pooled"))
    encoded = run(backbone.vision, image, {"sc-clip": METHODS["sc-clip"]}, pooled=True)["sc-clip"]
    close(encoded.patches, tokens)
    close(encoded.pooled, pooled)  # type: ignore[arg-type]
