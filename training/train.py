"""Train the embedded CLIP from scratch, on synthetic scenes, with image-level contrast only.

    python training/train.py --work /somewhere/large --minutes 85

The loss sees an image's class token and sentences about what the image shows; no mask, box or point.  `--work` takes
the rendered pool, the log (JSON lines), the checkpoint (`--resume` continues from it) and a loadable snapshot; the
finished model goes to `--output`.  Both are loaded with `open_clip.create_model_from_pretrained("local-dir:...")`.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from captions import concept_prompts, fill, scene_caption, tokens, used_tokens
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from pool import Pool, pool_on_disk, render
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from towers import Clip, embed_patches, embed_texts

from open_gem.data.scenes import CONCEPTS, TRAINING, VALIDATION
from open_gem.files import to_json

SIDE, PATCH = 128, 16  # pixels
PATCHES = (SIDE // PATCH) ** 2
CONTEXT = 32  # tokens
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIDE, "patch_size": PATCH, "layers": 6, "width": 240, "head_width": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "layers": 2, "width": 64, "heads": 4},
}
PREPROCESS = {
    "mean": list(OPENAI_DATASET_MEAN),
    "std": list(OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

VALIDATION_SCENES = 500
PROMPT = "a photo of a {}."

WORKERS = 2  # threads, each with a part of the batch
WARM_UP = 0.01  # share of the run
WHOLE_IMAGES = 0.85  # progress from which all patches are kept, as they are in use
KEPT_PATCHES = PATCHES // 2  # until then
MAX_SHIFT = 8  # pixels
EMA_DECAY = 0.998

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "open_gem" / "towers" / "embedded"


class Batch(NamedTuple):
    """What one step learns from."""

    patches: Tensor  # (b, n, 3*PATCH*PATCH) float, normalized
    positions: Tensor  # (b, n) places of the patches in the grid
    prompts: Tensor  # (concepts, tokens)
    shown: Tensor  # (b, concepts) bool: which concepts each image shows
    captions: Tensor  # (b, tokens)
    fitting: Tensor  # (b, b) bool: which images (rows) each caption (columns) is true of


# --- data -------------------------------------------------------------------------------------------------------------


def draw_batch(random: np.random.Generator, pool: Pool, size: int, kept: int) -> Batch:
    """A random batch of `size` images of the pool, each augmented and cut down to `kept` random patches."""
    chosen = np.sort(random.integers(len(pool.images), size=size))
    images = np.stack([_moved(random, pool.images[index]) for index in chosen])
    patches = _patches(torch.from_numpy(images))
    positions = torch.from_numpy(random.random((size, PATCHES)).argsort(axis=1)[:, :kept])
    patches = patches[torch.arange(size)[:, None], positions]
    shown = pool.shown[chosen]
    described = [scene_caption(random, row.nonzero()[0]) for row in shown]
    mentioned = np.zeros_like(shown)
    for row, (_, concepts) in zip(mentioned, described, strict=True):
        row[concepts] = True
    missing = (~shown).astype(np.float32) @ mentioned.T.astype(np.float32)  # mentioned concepts an image lacks
    return Batch(
        patches=_normalized(random, patches),
        positions=positions,
        prompts=tokens(concept_prompts(random)),
        shown=torch.from_numpy(shown),
        captions=tokens([text for text, _ in described]),
        fitting=torch.from_numpy(missing == 0),
    )


def _moved(random: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """`image` (3, SIDE, SIDE) shifted by up to MAX_SHIFT pixels, its border repeated, mirrored half of the time."""
    dy, dx = random.integers(-MAX_SHIFT, MAX_SHIFT + 1, size=2)
    rows, columns = (np.clip(np.arange(SIDE) + shift, 0, SIDE - 1) for shift in (dy, dx))
    return image.take(rows, axis=1).take(columns[::-1] if random.random() < 0.5 else columns, axis=2)


def _patches(images: Tensor) -> Tensor:
    """Images (b, 3, SIDE, SIDE) as rows of patches (b, PATCHES, 3*PATCH*PATCH), in the layout of a convolution."""
    grid = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (b, 3, rows, PATCH, columns, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _normalized(random: np.random.Generator, patches: Tensor) -> Tensor:
    """uint8 patches as CLIP normalizes them, each image under a slightly different light."""
    count = len(patches)
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    gain = torch.from_numpy(random.uniform(0.85, 1.15, size=(count, 3)).astype(np.float32))
    offset = torch.from_numpy(random.uniform(-0.08, 0.08, size=(count, 3)).astype(np.float32))
    scale, shift = (gain / (255 * std))[:, None, :, None], ((offset - mean) / std)[:, None, :, None]
    return (patches.unflatten(-1, (3, -1)) * scale + shift).flatten(-2)


# --- objective --------------------------------------------------------------------------------------------------------


def objective(model: Clip, batch: Batch) -> Tensor:
    """Contrast of images with the prompts of all concepts, and of images with the batch's captions."""
    # The cache of cast weights is shared by all threads, and so are the graphs through it: off.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        images = embed_patches(model, batch.patches, batch.positions)
        prompts = embed_texts(model, batch.prompts)
        captions = embed_texts(model, batch.captions)
    images, prompts, captions = (F.normalize(part.float(), dim=-1) for part in (images, prompts, captions))
    scale = model.logit_scale.exp()
    return _contrast(scale * images @ prompts.T, batch.shown) + _contrast(scale * images @ captions.T, batch.fitting)


def _contrast(logits: Tensor, positive: Tensor) -> Tensor:
    """Softmax cross-entropy in both directions, its target spread evenly over the positives of a row.

    Rows without a positive are left out.
    """
    return (_one_way(logits, positive) + _one_way(logits.T, positive.T)) / 2


def _one_way(logits: Tensor, positive: Tensor) -> Tensor:
    counts = positive.sum(dim=1)
    target = positive / counts.clamp(min=1)[:, None]
    losses = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    return losses[counts > 0].mean()


# --- model ------------------------------------------------------------------------------------------------------------


def build_model() -> Clip:
    """The model at its random start; tokens of no caption are zero, and stay so because they get no gradient."""
    model: Clip = CLIP(**MODEL)
    embedding = model.token_embedding.weight
    used = torch.zeros(len(embedding), 1)
    used[used_tokens()] = 1
    with torch.no_grad():
        embedding.mul_(used)
    return model


def build_optimizers(model: Clip, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, in WORKERS parts that step side by side; AdamW for all else."""
    names = {name for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2}
    matrices = [p for name, p in model.named_parameters() if name in names]
    others = [p for name, p in model.named_parameters() if name not in names]
    parts = [matrices[worker::WORKERS] for worker in range(WORKERS)]
    return [
        *(torch.optim.Muon(part, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw") for part in parts),
        torch.optim.AdamW(others, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def export(model: nn.Module, folder: Path) -> None:
    """Write `model` in half precision as a folder that open_clip loads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(to_json(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    partial = folder / "open_clip_model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(folder / "open_clip_model.safetensors")


@torch.inference_mode()
def accuracy(model: Clip, scenes: Pool) -> dict[str, float]:
    """How well the model names what images show, with open_clip's own forward pass.

    top1: share of images whose best concept is in the image.
    recall: share of the n concepts of an image that are among its n best, averaged over images.
    """
    model.eval()
    mean, std = (torch.tensor(value)[:, None, None] for value in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    images = (torch.from_numpy(scenes.images) / 255 - mean) / std
    prompts = SimpleTokenizer(context_length=CONTEXT)([fill(PROMPT, c) for c in CONCEPTS])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        texts = model.encode_text(prompts, normalize=True)
        scores = torch.cat([model.encode_image(part, normalize=True) @ texts.T for part in images.split(100)])
    ranked = np.take_along_axis(scenes.shown, (-scores.float()).argsort(dim=1).numpy(), axis=1)
    counts = scenes.shown.sum(axis=1)
    found = np.cumsum(ranked, axis=1)[np.arange(len(counts)), counts - 1]
    return {"top1": float(ranked[:, 0].mean()), "recall": float((found / counts).mean())}


# --- training ---------------------------------------------------------------------------------------------------------


class Trainer:
    """Everything that a checkpoint holds, and the steps that change it."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        torch.set_num_threads(1)  # the workers are the parallelism: one meeting a step instead of one an operation
        self.options = options
        self.randoms = [np.random.default_rng((options.seed, worker)) for worker in range(WORKERS)]
        self.workers = ThreadPoolExecutor(WORKERS)
        self.model = build_model()
        self.average: Any = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.optimizers = build_optimizers(self.model, options.lr)
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.step = 0
        self.images = 0
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0..1."""
        if self.options.steps is not None:
            return self.step / self.options.steps
        return self.seconds / (60 * self.options.minutes)

    def advance(self, pool: Pool) -> float:
        """Take one step; returns its loss."""
        started = time.monotonic()
        self._set_rates()
        kept = KEPT_PATCHES if self.progress < WHOLE_IMAGES else PATCHES
        shards = self.workers.map(lambda random: self._shard(random, pool, kept), self.randoms)
        losses, gradients = zip(*shards, strict=True)
        for parameter, parts in zip(self.model.parameters(), zip(*gradients, strict=True), strict=True):
            parameter.grad = torch.stack(parts).mean(dim=0)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        list(self.workers.map(lambda optimizer: optimizer.step(), self.optimizers))
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
        self.average.update_parameters(self.model)
        self.step += 1
        self.images += self.options.batch
        self.seconds += time.monotonic() - started
        return sum(losses) / WORKERS

    def _shard(self, random: np.random.Generator, pool: Pool, kept: int) -> tuple[float, tuple[Tensor, ...]]:
        """Loss and gradients of one worker's share of the step, contrasted within itself."""
        batch = draw_batch(random, pool, self.options.batch // WORKERS, kept)
        loss = objective(self.model, batch)
        return loss.item(), torch.autograd.grad(loss, tuple(self.model.parameters()))

    def _set_rates(self) -> None:
        """Learning rates of this step: a linear warm-up, then half a cosine down to zero."""
        share = min(self.progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * min(1.0, self.progress)))
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * share

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "randoms": [random.bit_generator.state for random in self.randoms],
            "counters": (self.step, self.images, self.seconds),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for random, saved in zip(self.randoms, state["randoms"], strict=True):
            random.bit_generator.state = saved
        self.step, self.images, self.seconds = state["counters"]


def record(trainer: Trainer, measured: dict[str, float]) -> dict:
    """What the finished model is and how it came to be."""
    options = trainer.options
    length = f"--steps {options.steps}" if options.steps is not None else f"--minutes {options.minutes:g}"
    settings = f"--batch {options.batch} --lr {options.lr:g} --seed {options.seed} --scenes {options.scenes}"
    return {
        "data": f"{options.scenes} scenes of {len(CONCEPTS)} concepts at {SIDE} px, seeds from {TRAINING}",
        "objective": "image-level contrast: class token against prompts of all concepts and against captions",
        "command": f"python training/train.py {length} {settings}",
        "seed": options.seed,
        "steps": trainer.step,
        "images": trainer.images,
        "minutes": round(trainer.seconds / 60, 1),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "validation": {"scenes": VALIDATION_SCENES, "first_seed": VALIDATION, **measured},
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pool, log, checkpoint and snapshot")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the finished model")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="train for this many steps")
    length.add_argument("--minutes", type=float, help="train for this long; the schedule follows the clock")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=100_000, help="size of the pool")
    parser.add_argument("--every", type=float, default=4, help="minutes between validations, checkpoints, snapshots")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    pool = pool_on_disk(options.work, TRAINING, options.scenes, SIDE)
    validation = render(VALIDATION, VALIDATION_SCENES, SIDE)
    trainer = Trainer(options)
    if options.resume:
        trainer.restore(options.work / "checkpoint.pt")

    losses: list[float] = []
    next_stop = trainer.seconds + 60 * options.every
    while trainer.progress < 1:
        losses.append(trainer.advance(pool))
        if trainer.seconds < next_stop and trainer.progress < 1:
            continue
        next_stop = trainer.seconds + 60 * options.every
        measured = accuracy(trainer.average.module, validation)
        line = {"step": trainer.step, "images": trainer.images, "minutes": round(trainer.seconds / 60, 2)}
        line |= {"progress": round(trainer.progress, 4), "loss": round(float(np.mean(losses)), 4)}
        line |= {"scale": round(trainer.model.logit_scale.exp().item(), 2), **measured}
        losses.clear()
        with (options.work / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(to_json(line) + "\n")
        print(to_json(line), flush=True)
        trainer.save(options.work / "checkpoint.pt")
        export(trainer.average.module, options.work / "snapshot")

    export(trainer.average.module, options.output)
    summary = record(trainer, accuracy(trainer.average.module, validation))
    (options.output / "training.json").write_text(to_json(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(parse_options())
