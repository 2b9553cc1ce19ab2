"""Maps that follow the gradient of a text's score: Grad-CAM, the training-free half of CLIP-ES, and LeGrad.

The host runs once, before any prompt, up to its last blocks. Then, for each prompt c, with A = ln_1 of the last block's
input and the pooled embedding that the block leads to,

    w_c = mean over patches of ∂ s_c / ∂ A        map_c = relu(A w_c), stretched to [0, 1]

where s_c is the scaled cosine (Grad-CAM), or its softmax over all prompts (CLIP-ES). CLIP-ES then spreads each map by
the host's own attention, averaged over heads and the last blocks: normalised by columns and rows in turn three times,
made symmetric and squared. Only what lies in the boxes of the map's components above THRESHOLD is spread.

LeGrad follows the attention weights W `(h, n, n)` of each of the last blocks instead, two as published. A block's score
s_c is the cosine with its own output: the mean of all tokens, brought to the joint space by the host's head.

    map_c = sum over blocks of the mean over heads and queries i of relu(∂ s_c / ∂ W_ij), stretched to [0, 1].

Gradients end at A, or at W: nothing of the host changes, none of its weights gets one, and callers may be in inference
mode.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from open_gem import readout
from open_gem.method.attention import query_key
from open_gem.method.run import Text
from open_gem.method.table import ClassActivation, Gradient, Method
from open_gem.method.tower import VisionTower
from open_gem.numerics import check_finite, cpu_by_default, without_autocast
from open_gem.tensors import at_least_float32
from open_gem.types import Grid, Size

THRESHOLD = 0.4  # share of a map's maximum above which its components have boxes
NORMALIZATIONS = 3  # of the attention, by columns and rows in turn
EPS = 1e-7  # added to a map's maximum, as published


@dataclass(frozen=True, eq=False)
class BeforeLastBlocks:
    """Images before the last blocks of their host, and before any prompt: used like an `Encoded`.

    tower        the host, which is read and never changed
    logit_scale  of its cosines
    stream       `(b, n, d)` tokens that enter its last blocks, as many as the method has depth
    attention    `(b, m, m)` attention of patches to patches, mean over heads and the last blocks, if it is used
    pooled       `(b, e)` the host's image-level embedding
    """

    tower: VisionTower
    logit_scale: float
    stream: Float[Tensor, "b n d"]
    attention: Float[Tensor, "b m m"] | None
    pooled: Float[Tensor, "b e"]
    grid: Grid
    size: Size
    method: Method
    original: Size | None = None
    source: Image.Image | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in (self.stream, self.pooled, self.attention) if part is not None)

    def image(self, index: int) -> "BeforeLastBlocks":
        """Return one image of the batch, as a batch of one."""
        return self._each(lambda tensor: tensor[index : index + 1])

    def to(self, device: torch.device | str) -> "BeforeLastBlocks":
        """Move to another device."""
        return self._each(lambda tensor: tensor.to(device))

    def clone(self) -> "BeforeLastBlocks":
        """Return a copy that shares no memory."""
        return self._each(torch.clone)

    def maps(self, text: Text, adjust: Callable[[Tensor], Tensor]) -> Float[Tensor, "q r k"]:
        """Return maps in [0, 1] of all texts but the last, which is the empty prompt: the rival of a single one."""
        assert isinstance(text, Tensor), "a step on text is refused before"
        settings = self.method.attention
        if isinstance(settings, ClassActivation):
            targets = text if settings.softmax and len(text) == 2 else text[:-1]
            maps = class_activations(self, targets)[: len(text) - 1]
        else:
            maps = attention_gradients(self, text[:-1])
        if self.attention is not None:
            maps = torch.stack([spread(values, self.attention[0]) for values in maps])
        return adjust(torch.cat([maps, torch.zeros_like(maps[:1])])[None])[0]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "BeforeLastBlocks":
        attention = None if self.attention is None else change(self.attention)
        return replace(self, stream=change(self.stream), pooled=change(self.pooled), attention=attention)


@torch.no_grad()
@cpu_by_default()
def run_to_last_blocks(
    tower: VisionTower, pixels: Float[Tensor, "b 3 y x"], method: Method, logit_scale: float
) -> BeforeLastBlocks:
    """Run the host up to its last blocks, and once through them for the pooled embedding."""
    spreading = method.attention.blocks if isinstance(method.attention, ClassActivation) else 0
    x, grid = tower.embed(pixels)
    stream, attention = x, []
    blocks = tower.blocks(grid)
    for index, block in enumerate(blocks):
        heads = block.qkv(block.norm(x))
        if index == len(blocks) - method.depth:
            stream = x
        if index >= len(blocks) - spreading:
            weights = (heads.q @ heads.k.transpose(-2, -1) * heads.q.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)
            attention.append(weights[:, tower.prefix :, tower.prefix :])
        x = x + block.out(query_key(heads))
        x = x + block.mlp(x)
    pooled = tower.pool(x)
    check_finite("features", tower, stream, pooled)
    mean = at_least_float32(torch.stack(attention)).mean(dim=0) if attention else None
    return BeforeLastBlocks(tower, logit_scale, stream, mean, pooled, grid, Size(*pixels.shape[-2:]), method)


@without_autocast()
def class_activations(encoded: BeforeLastBlocks, texts: Float[Tensor, "p e"]) -> Float[Tensor, "p r k"]:
    """Return the class activation map in [0, 1] of each text for the single image."""
    settings: Any = encoded.method.attention
    tower, maps = encoded.tower, []
    with torch.inference_mode(False), torch.enable_grad():
        stream, texts = encoded.stream.detach().clone(), texts.detach().clone()
        block = tower.blocks(encoded.grid)[-1]
        normed = block.norm(stream).detach().requires_grad_()
        x = stream + block.out(query_key(block.qkv(normed)))
        pooled = normalize(at_least_float32(tower.pool(x + block.mlp(x))), dim=-1)
        logits = encoded.logit_scale * (pooled @ normalize(at_least_float32(texts), dim=-1).T)[0]
        for score in logits.softmax(dim=-1) if settings.softmax else logits:
            (gradient,) = torch.autograd.grad(score, normed, retain_graph=True)
            weights = at_least_float32(gradient[0, tower.prefix :]).mean(dim=0)
            values = at_least_float32(normed.detach()[0, tower.prefix :]) @ weights
            maps.append(_stretched(values.relu().view(tuple(encoded.grid))))
    return torch.stack(maps)


@without_autocast()
def attention_gradients(encoded: BeforeLastBlocks, texts: Float[Tensor, "p e"]) -> Float[Tensor, "p r k"]:
    """Return LeGrad's map in [0, 1] of each text for the single image."""
    tower = encoded.tower
    with torch.inference_mode(False), torch.enable_grad():
        x, texts = encoded.stream.detach().clone(), normalize(at_least_float32(texts.detach().clone()), dim=-1)
        total = torch.zeros(len(texts), encoded.grid.patches, dtype=torch.float32, device=x.device)
        for block in tower.blocks(encoded.grid)[-encoded.method.depth :]:
            heads = block.qkv(block.norm(x))
            mixed = query_key(heads).detach().requires_grad_()  # W v, so ∂ s / ∂ W = (∂ s / ∂ W v) vᵀ
            after = x + block.out(mixed)
            after = after + block.mlp(after)
            embedding = tower.project(after.mean(dim=1, keepdim=True))[0]
            for index, score in enumerate((normalize(at_least_float32(embedding), dim=-1) @ texts.T)[0]):
                (gradient,) = torch.autograd.grad(score, mixed, retain_graph=True)
                weights = at_least_float32(gradient[0]) @ at_least_float32(heads.v.detach()[0]).transpose(-2, -1)
                total[index] += weights.relu().mean(dim=(0, 1))[tower.prefix :]
            x = after.detach()
    return torch.stack([readout.min_max(values).view(tuple(encoded.grid)) for values in total])


def spread(values: Float[Tensor, "r k"], attention: Float[Tensor, "m m"]) -> Float[Tensor, "r k"]:
    """Return a map spread by the attention of patches: CLIP-ES's class-aware attention-based affinity."""
    weights = attention
    for _ in range(NORMALIZATIONS):
        weights = weights / weights.sum(dim=0, keepdim=True)
        weights = weights / weights.sum(dim=1, keepdim=True)
    weights = (weights + weights.T) / 2
    boxes = torch.zeros_like(values)
    for rows, columns in readout.components(values > THRESHOLD * values.max()).spans:
        boxes[rows, columns] = 1
    return _stretched((weights @ (weights @ (boxes * values).flatten())).view_as(values))


def _stretched(values: Tensor) -> Tensor:
    shifted = values - values.min()
    return shifted / (EPS + shifted.max())


def is_gradient(method: Any) -> bool:
    """Return True if a method needs prompts and gradients."""
    return isinstance(method, Method) and isinstance(method.attention, Gradient)
