"""A few labelled images, as labelling writes them, for the tests of exports."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from open_gem.export import FORMATS, export
from open_gem.label.parts import Manifest, Parts, row_of

LABELS = ("cat", "Füchse & Co", "dog")
HEIGHT, WIDTH = 40, 60


def filled(*places: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for place in places:
        mask[place] = True
    return mask


SOLID = filled((slice(5, 25), slice(10, 40)))
OVERLAPPING = filled((slice(15, 38), slice(30, 60)))
PIXEL = filled((slice(39, 40), slice(59, 60)))
TWO_PARTS = filled((slice(2, 8), slice(2, 9)), (slice(30, 39), slice(3, 11)))
RING = filled((slice(4, 30), slice(8, 40)))
RING[10:20, 15:30] = False


def rle_of(mask: np.ndarray) -> dict:
    packed: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": packed["counts"].decode()}


def box_of(mask: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


def thing(label: str, score: float, mask: np.ndarray | None, box: list[int] | None = None, **more) -> dict:
    """One object as labelling stores it; with a mask, its box is the mask's."""
    box = box or box_of(SOLID if mask is None else mask)
    return {
        "label": label,
        "prompt": f"a {label}",
        "score": score,
        "image_score": 0.2,
        "presence": 0.9,
        "xyxy": box,
        "rle": None if mask is None else rle_of(mask),
        "point": box[:2],
        "peak": 1.0,
        "probability": score,  # so that confidence ranks as the score does
        "confidence": (more.get("presence", 0.9) or 1) * score,
        **more,
    }


def image(id: str, *objects: dict, **more) -> dict:
    fields = {"status": "ok", "height": HEIGHT, "width": WIDTH, "seconds": 0.1, "objects": list(objects), **more}
    return row_of(id, f"/pictures/{id}", **fields)


IMAGES = [
    image("plain.jpg", thing("cat", 0.31, SOLID), thing("dog", 0.28, OVERLAPPING)),
    image("nothing.jpg"),
    row_of("broken.jpg", "/pictures/broken.jpg", status="error", error="not a picture"),
    image("Ordner/süß 猫.png", thing("Füchse & Co", 0.25, RING), thing("cat", 0.24, TWO_PARTS)),
    image("Ordner/tiny.webp", thing("dog", 0.2, PIXEL, presence=None)),
    image("box.jpg", thing("dog", 0.33, None, [3, 4, 33, 24]), thing("cat", 0.11, None, [50, 30, 60, 40])),
]
GOOD = [one for one in IMAGES if one["status"] == "ok"]


def write_parts(folder: Path, images: list[dict], size: int = 2) -> Path:
    parts = Parts.claim(folder, Manifest({"model": "none"}, LABELS))
    for start in range(0, len(images), size):
        parts.write(f"{start:04d}", images[start : start + size])
    return folder


def exported(labelled: Path, name: str, out: str = "out", **options) -> Path:
    export(labelled, [name], labelled.parent / out, **options)
    return labelled.parent / out / name


def flattened(folder: Path, kind: str) -> Path:
    """The files of a folder without its folders, for readers that know none."""
    flat = folder / "flat"
    flat.mkdir()
    for path in (folder / kind).rglob("*"):
        if path.is_file():
            (flat / path.name).write_bytes(path.read_bytes())
    return flat


def union(mask_or_none: np.ndarray | None, *others: np.ndarray) -> np.ndarray:
    return np.any([mask for mask in (mask_or_none, *others) if mask is not None], axis=0)


def quiet_supervision():
    from open_gem.export.polygons import supervision

    return supervision()


needs_supervision = pytest.mark.skipif(
    FORMATS["yolo"].missing() is not None, reason="supervision is not installed: pip install open_gem[supervision]"
)


def available(name: str):
    """A format as a parameter that is skipped where its package is not installed."""
    missing = FORMATS[name].missing()
    return pytest.param(name, marks=pytest.mark.skipif(missing is not None, reason=str(missing)))


EVERY = [available(name) for name in FORMATS]
