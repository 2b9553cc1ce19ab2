"""Grad-CAM, CLIP-ES and LeGrad, against autograd through the library's own forward and loops over patches."""

import copy
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch.nn.functional import linear, normalize

import open_gem
from open_gem import Exemplar, Localizer, Views
from open_gem.errors import MethodError, PromptError
from open_gem.gradients import EPS, THRESHOLD, spread
from open_gem.method.run import run
from open_gem.method.table import GRADIENTS

PROMPTS = ["a cat", "a dog", "the sky"]


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return open_clip.CLIP(
            embed_dim=24,
            vision_cfg=open_clip.CLIPVisionCfg(image_size=32, layers=4, width=32, head_width=8, patch_size=8),
            text_cfg=open_clip.CLIPTextCfg(context_length=20, vocab_size=49408, width=16, heads=2, layers=1),
        ).eval()


@pytest.fixture(scope="module")
def localizer(model: open_clip.CLIP) -> Localizer:
    return open_gem.adapt(model, SimpleTokenizer(context_length=20), size="native")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def naive_maps(model: open_clip.CLIP, localizer: Localizer, image: Image.Image, softmax: bool) -> list[np.ndarray]:
    """Grad-CAM by hooks on a copy of the library's model: its own forward, its own backward."""
    theirs, seen = copy.deepcopy(model), {}

    def keep(_module, _inputs, output):
        output.retain_grad()
        seen["normed"] = output

    theirs.visual.transformer.resblocks[-1].ln_1.register_forward_hook(keep)  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    pixels = localizer.prepare(image).pixels
    assert pixels is not None
    text = localizer.text(PROMPTS).detach()
    maps = []
    for index in range(len(PROMPTS)):
        logits = localizer.backbone.logit_scale * normalize(theirs.encode_image(pixels[None]), dim=-1) @ text.T
        (logits.softmax(-1) if softmax else logits)[0, index].backward()
        activations, gradients = (part[0, 1:].detach() for part in (seen["normed"], seen["normed"].grad))
        summed = sum(activations[:, d] * gradients[:, d].mean() for d in range(activations.shape[1]))
        summed = np.maximum(summed.numpy(), 0).reshape(4, 4)  # pyright: ignore[reportAttributeAccessIssue]
        maps.append((summed - summed.min()) / (EPS + (summed - summed.min()).max()))
    return maps


def test_gradcam_is_autograd_through_the_librarys_forward(model, localizer: Localizer, image):
    found = localizer.configured(method="gradcam")(image, PROMPTS)
    for ours, theirs in zip(found.similarity, naive_maps(model, localizer, image, softmax=False), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-4)
    assert found.logit_scale is None and found.presence is not None


def naive_legrad(model: open_clip.CLIP, localizer: Localizer, image: Image.Image, depth: int) -> list[np.ndarray]:
    """LeGrad with the attention weights of the library's last blocks as leaves of autograd, written out."""
    visual: Any = copy.deepcopy(model).visual.requires_grad_(False)
    blocks, entering = visual.transformer.resblocks[-depth:], []
    for block in blocks:
        block.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0]))
    pixels = localizer.prepare(image).pixels
    assert pixels is not None
    visual(pixels[None])
    maps = [np.zeros(16) for _ in PROMPTS]
    for block, x in zip(blocks, entering, strict=True):
        projected = linear(block.ln_1(x)[0], block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(0, 1) for part in projected.chunk(3, dim=-1))
        weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(dim=-1).requires_grad_()  # (h, n, n)
        y = x + block.attn.out_proj((weights @ v).transpose(0, 1).flatten(1))[None]
        y = y + block.mlp(block.ln_2(y))
        pooled = normalize(visual.ln_post(y[0].mean(dim=0)) @ visual.proj, dim=-1)
        for index, text in enumerate(localizer.text(PROMPTS).detach()):
            (gradient,) = torch.autograd.grad(pooled @ text, weights, retain_graph=True)
            for head in gradient.numpy():
                for query in head:
                    maps[index] += np.maximum(query[1:], 0) / (4 * 17)
    return [((values - values.min()) / (values.max() - values.min())).reshape(4, 4) for values in maps]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_legrad_is_autograd_at_attention_written_out(depth: int, model, localizer: Localizer, image):
    ours = localizer.configured(method=GRADIENTS["legrad"].replace(depth=depth))(image, PROMPTS)
    for our, their in zip(ours.similarity, naive_legrad(model, localizer, image, depth), strict=True):
        np.testing.assert_allclose(our.numpy(), their, atol=2e-4)
    if depth == GRADIENTS["legrad"].depth:
        assert torch.equal(localizer.configured(method="legrad")(image, PROMPTS).similarity, ours.similarity)


def naive_spread(values: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Written out over patches, with boxes by flood fill."""
    weights, n = attention.astype(np.float64), attention.shape[0]
    for _ in range(3):
        weights = np.array([[weights[i, j] / sum(weights[:, j]) for j in range(n)] for i in range(n)])
        weights = np.array([[weights[i, j] / sum(weights[i]) for j in range(n)] for i in range(n)])
    weights = (weights + weights.T) / 2
    weights = weights @ weights
    high = values > THRESHOLD * values.max()
    inside, left = np.zeros_like(values), {tuple(cell) for cell in np.argwhere(high)}
    while left:
        part, queue = set(), [left.pop()]
        while queue:
            y, x = queue.pop()
            part.add((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            queue += near
        rows, columns = zip(*part, strict=True)
        inside[min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = 1
    result = ((weights * inside.flatten()[None]) @ values.flatten()).reshape(values.shape)
    return (result - result.min()) / (EPS + (result - result.min()).max())


def test_clip_es_spreads_the_map_of_the_softmax_by_attention(model, localizer: Localizer, image):
    found = localizer.configured(method="clip-es")(image, PROMPTS)
    pixels = localizer.prepare(image).pixels
    assert pixels is not None
    vision, attention = localizer.backbone.vision, []
    with torch.no_grad():
        x, grid = vision.embed(pixels[None])
        for block in vision.blocks(grid):
            q, k, _ = block.qkv(block.norm(x))
            heads = [(q[0, h] @ k[0, h].T / q.shape[-1] ** 0.5).softmax(-1)[1:, 1:] for h in range(q.shape[1])]
            attention.append(sum(heads) / len(heads))
            x = block.forward(x)
    mean = (sum(attention) / len(attention)).numpy()  # pyright: ignore[reportAttributeAccessIssue]
    for ours, theirs in zip(found.similarity, naive_maps(model, localizer, image, softmax=True), strict=True):
        np.testing.assert_allclose(ours.numpy(), naive_spread(theirs, mean), atol=2e-3)


def test_spreading_follows_its_formula():
    random = np.random.default_rng(1)
    values, attention = random.random((3, 5), np.float32) ** 3, random.random((15, 15), np.float32)
    ours = spread(torch.from_numpy(values), torch.from_numpy(attention))
    np.testing.assert_allclose(ours.numpy(), naive_spread(values, attention), atol=1e-5)


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_host_is_untouched_also_for_callers_in_inference_mode(name: str, model, localizer: Localizer, image):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    needs = [weight.requires_grad for weight in model.parameters()]
    chosen = localizer.configured(method=name)
    expected = chosen(image, PROMPTS).similarity
    with torch.inference_mode():
        assert torch.equal(chosen(image, PROMPTS).similarity, expected)
    with torch.no_grad():
        assert torch.equal(chosen(image, PROMPTS).similarity, expected)
    assert not expected.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [weight.requires_grad for weight in model.parameters()] == needs
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(part._forward_hooks or part._backward_hooks for part in model.modules())


@pytest.mark.parametrize("name", GRADIENTS)
def test_batches_and_methods_side_by_side(name: str, localizer: Localizer, image):
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for alone, encoded in zip([image, mirrored], localizer.encode([image, mirrored], ["gem", name]), strict=True):
        single = localizer.configured(method=name)(alone, PROMPTS).similarity
        located = localizer.locate(encoded[name].clone(), PROMPTS).similarity
        torch.testing.assert_close(located, single, atol=1e-4, rtol=0)


def test_a_single_prompt_competes_with_the_empty_one(localizer: Localizer, image):
    assert localizer.configured(method="clip-es")(image, "a cat").similarity.max() > 0.9


def test_what_cannot_be_is_refused(localizer: Localizer, image):
    with pytest.raises(MethodError, match="steps on text"):
        localizer.configured(text_step="cass").encode(image, "clip-es")
    with pytest.raises(MethodError, match="whole image"):
        localizer.configured(method="gradcam", views=Views(flip=True))(image, PROMPTS)
    with pytest.raises(MethodError, match="cosines"):
        localizer.configured(method="gradcam", remove_redundancy=True)(image, PROMPTS)
    for setting in ("residual", "mlp"):
        with pytest.raises(MethodError, match="whole blocks"):
            GRADIENTS["legrad"].replace(**{setting: False})
    with pytest.raises(PromptError, match="gradients follow texts"):
        localizer.configured(method="gradcam")(image, Exemplar(image, (0, 0, 9, 9)))
    pixels = localizer.prepare(image).pixels
    assert pixels is not None
    with pytest.raises(MethodError, match="use a Localizer"):
        run(localizer.backbone.vision, pixels[None], {"it": GRADIENTS["gradcam"]})
