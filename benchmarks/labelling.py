"""What labelling costs besides the model: `python benchmarks/labelling.py`, see docs/validation/performance.md.

Scenes as JPEG files of 640 × 480 are labelled several ways, in turns, and the best time of each counts, by the clock
and by what processors did:

    model   the passes of the model and its comparison with the prompts, on prepared images: nothing else runs
    loop    reading, model, objects, a batch after the other in one thread: a script without an engine
    local   the local engine, from listing the files to the last part on disk, the model loaded before
    ray     the same by Ray with one actor, from listing to the last part: starts Ray and loads the model
    processes, with --shards N: the local engine in N processes at a time, as torchrun starts them
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from open_gem.data.scenes import CONCEPTS, scene
from open_gem.images.pixels import read_image
from open_gem.label import local, on_ray
from open_gem.label.done import Shard
from open_gem.label.labeling import Labeling, PreparedImage, load_labeling
from open_gem.label.ontology import Ontology
from open_gem.label.parts import Parts
from open_gem.label.reading import read
from open_gem.label.sources import open_source


def random_vit(folder: Path) -> str:
    """A ViT-B/16 with random weights, as a folder that any process can load."""
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-16")
    assert config is not None
    model = open_clip.create_model("ViT-B-16")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"local-dir:{folder}"


def make(model: str, threads: int, dtype: str) -> Labeling:
    torch.set_num_threads(threads)
    if model == "embedded":
        return load_labeling(Ontology.of(CONCEPTS[:20]), "embedded", device="cpu", dtype=dtype)
    classes = Ontology.of(CONCEPTS[:3], presence=0.0)  # random weights: all are looked for
    return load_labeling(classes, model, device="cpu", dtype=dtype)


def in_batches(labeling: Labeling, ready: list[PreparedImage], batch_size: int) -> float:
    start = time.perf_counter()
    for at in range(0, len(ready), batch_size):
        labeling.locate(ready[at : at + batch_size])
    return time.perf_counter() - start


def in_a_loop(labeling: Labeling, folder: Path, batch_size: int) -> float:
    start = time.perf_counter()
    items = list(open_source(str(folder)).items())
    for at in range(0, len(items), batch_size):
        prepared = [labeling.prepare(item) for item in items[at : at + batch_size]]
        for located in labeling.locate([image for image in prepared if isinstance(image, PreparedImage)]):
            labeling.row(located)
    return time.perf_counter() - start


def by_engine(labeling: Labeling, folder: Path, run: Callable, **settings: object) -> float:
    source = open_source(str(folder))
    with tempfile.TemporaryDirectory() as out:
        parts = Parts.claim(Path(out), labeling.manifest(source))  # hashes the weights: once, however many images
        start = time.perf_counter()
        tally = run(parts, labeling, source, **settings)
        seconds = time.perf_counter() - start
        assert tally.labeled + tally.failed == len(list(parts.rows("id")))
    return seconds


def _share(model: str, dtype: str, folder: Path, shard: Shard, ready: multiprocessing.Barrier, batch_size: int) -> None:  # pyright: ignore[reportInvalidTypeForm, reportGeneralTypeIssues]
    labeling = make(model, 1, dtype)
    ready.wait()
    by_engine(labeling, folder, local.run, shard=shard, batch_size=batch_size, workers=1)
    ready.wait()


def in_processes(model: str, dtype: str, folder: Path, count: int, batch_size: int) -> float:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(count + 1)
    shards = [
        context.Process(target=_share, args=(model, dtype, folder, Shard(n, count), ready, batch_size))
        for n in range(count)
    ]
    for process in shards:
        process.start()
    ready.wait()
    start = time.perf_counter()
    ready.wait()
    seconds = time.perf_counter() - start
    for process in shards:
        process.join()
    return seconds


def print_shares(labeling: Labeling, folder: Path, ready: list[PreparedImage], turns: int) -> None:
    """Processor time of each step of the loop besides the model."""
    items = list(open_source(str(folder)).items())
    located = [result for image in ready for result in labeling.locate([image])]
    steps: dict[str, Callable[[], object]] = {
        "decoding": lambda: [read_image(read(item)) for item in items],
        "decoding, shrinking, normalising": lambda: [labeling.prepare(item) for item in items],
        "objects": lambda: [labeling.row(image) for image in located],
    }
    for name, step in steps.items():
        times = []
        for _ in range(turns):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
        print(f"{name:33} {1000 * min(times) / len(items):6.2f} ms an image, of processors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["embedded", "vit-b-16"], default="embedded")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--workers", type=int, default=1, help="threads that read and make objects")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--shards", type=int, nargs="*", default=[])
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as place:
        photos, weights = Path(place, "photos"), Path(place, "weights")
        for folder in (photos, weights):
            folder.mkdir()
        for seed in range(options.images):
            Image.fromarray(scene(seed, (480, 640)).image).save(photos / f"{seed:05}.jpg", quality=90)
        model = random_vit(weights) if options.model == "vit-b-16" else options.model
        labeling = make(model, options.threads, options.dtype)
        prepared = [labeling.prepare(item) for item in open_source(str(photos)).items()]
        ready = [image for image in prepared if isinstance(image, PreparedImage)]
        in_batches(labeling, ready[: options.batch_size], options.batch_size)
        ways: dict[str, Callable[[], float]] = {
            "model": partial(in_batches, labeling, ready, options.batch_size),
            "loop": partial(in_a_loop, labeling, photos, options.batch_size),
            "local": partial(
                by_engine, labeling, photos, local.run, batch_size=options.batch_size, workers=options.workers
            ),
        }
        if options.ray:
            again = partial(make, model, options.threads, options.dtype)
            ways["ray"] = partial(
                by_engine, labeling, photos, on_ray.run, make=again, batch_size=options.batch_size, workers=1
            )
        for count in options.shards:
            ways[f"{count} processes"] = partial(in_processes, model, options.dtype, photos, count, options.batch_size)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(options.turns):
            for name, way in ways.items():
                before = time.process_time()
                times[name].append((way(), time.process_time() - before))
        best = {name: [min(column) for column in zip(*pairs, strict=True)] for name, pairs in times.items()}
        for name, (clock, processors) in best.items():
            shares = [
                f"{seconds / of - 1:+6.1%}" for seconds, of in zip((clock, processors), best["model"], strict=True)
            ]
            speed = f"{options.images / clock:7.2f} images/s  {clock:7.2f} s {shares[0]}"
            elsewhere = "" if name in ("model", "loop", "local") else " (other processes not counted)"
            print(f"{name:12} {speed}   of processors {processors:7.2f} s {shares[1]}{elsewhere}")
        print_shares(labeling, photos, ready, options.turns)


if __name__ == "__main__":
    main()
