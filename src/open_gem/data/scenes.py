"""Synthetic scenes: nameable objects on varied backgrounds, with exact masks and boxes.

    >>> drawn = scene(7, size=128)
    >>> drawn.image.shape, drawn.names, drawn.masks.shape, drawn.boxes.shape

A scene is a pure function of its seed and size. The layout is decided in fractions of the image, so one seed shows the
same scene at every size of one aspect ratio. Each use of scenes has seeds of its own:

    HELD_OUT ...    localization is evaluated on these
    VALIDATION ...  watched while the embedded model trains; its recommended settings are chosen on these
    TRAINING ...    the embedded model learns from these

The objects are glyphs of Noto Color Emoji (see NOTICE.txt), stored as an atlas of square sprites beside this module.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from open_gem.errors import InputError

__all__ = ["CONCEPTS", "HELD_OUT", "MAX_OBJECTS", "MIN_VISIBLE", "TRAINING", "VALIDATION", "Scene", "scene"]

HELD_OUT, VALIDATION, TRAINING = 0, 500_000, 1_000_000  # first seed of each range
MAX_OBJECTS = 4
MIN_VISIBLE = 0.4  # least share of an object, cut by the frame or covered by others, that still counts as shown
MIN_SIDE = 32  # pixels; smaller images cannot show four objects

_SMALLEST = 0.30  # least side of an object, as a share of the image's shorter side
_LARGEST = (0.65, 0.60, 0.52, 0.46)  # greatest side by number of objects: fewer may be larger
_TILT = 30.0  # greatest rotation either way, degrees
_OUTSIDE = 0.12  # greatest share of an object's side beyond the frame
_TRIES = 12  # placements tried before an object is left out
_PLAN_SIDE = 48  # pixels of the shorter side of the canvas on which a layout is decided

Floats = NDArray[np.floating]  # float32 for whatever has the size of an image


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and its objects, back to front, one for each concept shown."""

    image: np.ndarray  # (height, width, 3) uint8, RGB
    names: tuple[str, ...]  # 1 to MAX_OBJECTS different members of CONCEPTS
    masks: np.ndarray  # (objects, height, width) bool, disjoint: the visible pixels of each object
    boxes: np.ndarray  # (objects, 4) int64, xyxy pixels around each mask, right and bottom exclusive


class _Placement(NamedTuple):
    """The place and look of one sprite; lengths in shares of the image."""

    sprite: int
    center: tuple[float, float]  # (y, x), shares of height and width
    side: float  # share of the shorter side
    angle: float  # degrees, anticlockwise
    mirrored: bool


_FOLDER = resources.files("open_gem.data")
_TABLE = json.loads(_FOLDER.joinpath("sprites.json").read_text(encoding="utf-8"))
_SPRITE_CONCEPTS: tuple[str, ...] = tuple(_TABLE["sprites"])  # which concept each atlas cell shows

CONCEPTS: tuple[str, ...] = tuple(dict.fromkeys(_SPRITE_CONCEPTS))
"""The names of everything that can appear in a scene."""


def scene(seed: int, size: int | tuple[int, int] = 128) -> Scene:
    """Draw the scene of `seed` at `size` pixels: one side of a square, or (height, width)."""
    height, width = _checked(seed, size)
    random = np.random.default_rng(seed)
    placements = _plan(random, height / width)
    canvas = _background(random, height, width)
    masks = np.zeros((len(placements), height, width), dtype=bool)
    for index, placement in enumerate(placements):
        masks[:index] &= ~_draw(canvas, masks[index], placement, light=random.uniform(0.85, 1.15))
    return Scene(
        image=_lit(random, canvas),
        names=tuple(_SPRITE_CONCEPTS[placement.sprite] for placement in placements),
        masks=masks,
        boxes=np.stack([_box(mask) for mask in masks]),
    )


def _checked(seed: int, size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of `size`. Raises InputError for an impossible seed or size."""
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}")
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < MIN_SIDE:
        raise InputError(f"a scene needs at least {MIN_SIDE} pixels a side, got height {height} and width {width}")
    return height, width


# --- layout -----------------------------------------------------------------------------------------------------------


def _plan(random: np.random.Generator, aspect: float) -> list[_Placement]:
    """Plan placements, back to front, such that each object keeps MIN_VISIBLE of its area; `aspect` is height / width.

    Decided on a small canvas of its own, so that the outcome does not depend on the size of the image.
    """
    height, width = (round(_PLAN_SIDE * max(1.0, ratio)) for ratio in (aspect, 1 / aspect))
    count = int(random.integers(1, MAX_OBJECTS + 1))
    placements: list[_Placement] = []
    visible: list[np.ndarray] = []  # what each accepted object still shows
    areas: list[int] = []  # pixels of each accepted object, whole
    for concept in random.choice(len(CONCEPTS), size=count, replace=False):
        sprite = int(random.choice(_cells_of(CONCEPTS[concept])))
        for _ in range(_TRIES):
            candidate = _random_placement(random, sprite, _LARGEST[count - 1], height, width)
            cover, area = _cover(candidate, height, width)
            shown = [mask & ~cover for mask in visible] + [cover]
            needed = [MIN_VISIBLE * whole for whole in (*areas, area)]
            if all(mask.sum() >= least for mask, least in zip(shown, needed, strict=True)):
                placements.append(candidate)
                visible, areas = shown, [*areas, area]
                break
    return placements


def _random_placement(random: np.random.Generator, sprite: int, largest: float, height: int, width: int) -> _Placement:
    """Return a placement that leaves at most _OUTSIDE of the object's side beyond the frame of height x width."""
    side = random.uniform(_SMALLEST, largest)
    margins = ((0.5 - _OUTSIDE) * side * min(height, width) / length for length in (height, width))
    y, x = (random.uniform(margin, 1 - margin) for margin in margins)
    return _Placement(sprite, (y, x), side, random.uniform(-_TILT, _TILT), bool(random.random() < 0.5))


def _cover(placement: _Placement, height: int, width: int) -> tuple[np.ndarray, int]:
    """Return which pixels of a height x width canvas the object covers (bool), and how many it has inside and
    outside."""
    stamp = np.asarray(_stamp(_alphas()[placement.sprite], placement, min(height, width))) >= 128
    covered = np.zeros((height, width), dtype=bool)
    inside, part = _overlap(stamp.shape, placement.center, height, width)
    covered[inside] = stamp[part]
    return covered, int(stamp.sum())


# --- sprites ----------------------------------------------------------------------------------------------------------


@cache
def _sprites() -> tuple[Image.Image, ...]:
    """Return every atlas cell, with premultiplied alpha ("RGBa"): resampling then leaks no colour of transparent
    pixels."""
    cell, columns = _TABLE["cell"], _TABLE["columns"]
    with _FOLDER.joinpath("sprites.png").open("rb") as file:
        atlas = Image.open(file).convert("RGBA").convert("RGBa")
    corners = (divmod(index, columns) for index in range(len(_SPRITE_CONCEPTS)))
    return tuple(
        atlas.crop((column * cell, row * cell, (column + 1) * cell, (row + 1) * cell)) for row, column in corners
    )


@cache
def _alphas() -> tuple[Image.Image, ...]:
    """Return the opacity of every sprite ("L"), small: enough to plan a layout with."""
    return tuple(sprite.getchannel("a").resize((_PLAN_SIDE, _PLAN_SIDE)) for sprite in _sprites())


@cache
def _cells_of(concept: str) -> tuple[int, ...]:
    return tuple(index for index, name in enumerate(_SPRITE_CONCEPTS) if name == concept)


def _stamp(sprite: Image.Image, placement: _Placement, shorter: int) -> Image.Image:
    """Return the sprite mirrored, scaled and turned, for an image whose shorter side has `shorter` pixels."""
    side = max(1, round(placement.side * shorter))
    if placement.mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Bilinear resizing averages over the source pixels, so shrinking does not alias.
    scaled = sprite.resize((side, side), Image.Resampling.BILINEAR)
    return scaled.rotate(placement.angle, Image.Resampling.BILINEAR, expand=True)


def _overlap(
    shape: tuple[int, ...], center: tuple[float, float], height: int, width: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where a stamp of `shape` (height, width) meets the canvas: (rows, columns) of the canvas and of the
    stamp."""
    inside, part = [], []
    for length, middle, limit in zip(shape, center, (height, width), strict=True):
        first = round(middle * limit - length / 2)
        start, stop = max(first, 0), min(first + length, limit)
        inside.append(slice(start, stop))
        part.append(slice(start - first, stop - first))
    return (inside[0], inside[1]), (part[0], part[1])


def _draw(canvas: Floats, mask: np.ndarray, placement: _Placement, light: float) -> np.ndarray:
    """Blend one object into `canvas` (height, width, 3; 0..1); mark in `mask`, and return, where it covers pixels.

    A pixel counts as covered from half opacity on.
    """
    height, width = mask.shape
    stamp = np.asarray(_stamp(_sprites()[placement.sprite], placement, min(height, width)), dtype=np.float32) / 255
    inside, part = _overlap(stamp.shape[:2], placement.center, height, width)
    color, alpha = stamp[part][..., :3], stamp[part][..., 3]
    canvas[inside] = canvas[inside] * (1 - alpha[..., None]) + color * light
    mask[inside] = alpha >= 0.5
    return mask


def _box(mask: np.ndarray) -> np.ndarray:
    """Return the tight xyxy box of a mask that is not empty, right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.int64)


# --- light and backgrounds --------------------------------------------------------------------------------------------


def _lit(random: np.random.Generator, canvas: Floats) -> np.ndarray:
    """Return `canvas` (0..1) in a random light (brightness, contrast and tint), as uint8."""
    contrast, brightness = random.uniform(0.7, 1.15), random.uniform(-0.12, 0.12)
    tint = random.uniform(0.88, 1.12, size=3)
    gain = (contrast * tint).astype(np.float32)
    offset = (0.5 * (1 - contrast) + brightness) * tint
    return np.clip((canvas * gain + offset.astype(np.float32)) * 255 + 0.5, 0, 255).astype(np.uint8)


def _background(random: np.random.Generator, height: int, width: int) -> Floats:
    """Return an image without objects, (height, width, 3) in 0..1: two colours mixed by a pattern, with clouds and
    grain."""
    pattern = _PATTERNS[int(random.integers(len(_PATTERNS)))]
    y, x = np.meshgrid(*(_coordinates(length, min(height, width)) for length in (height, width)), indexing="ij")
    first, second = (random.uniform(0, 1, size=3).astype(np.float32) for _ in range(2))
    share = pattern(random, y, x)[..., None]
    clouds = _noise(random, height, width, cells=int(random.integers(3, 9)))
    grain = _noise(random, height, width, cells=64) * np.float32(random.uniform(0, 0.12))
    cloud_color = random.uniform(-0.3, 0.3, size=3).astype(np.float32)
    mixed = first + (second - first) * share + cloud_color * clouds[..., None] + grain[..., None]
    return np.clip(mixed, 0, 1)


def _coordinates(length: int, unit: int) -> Floats:
    """Return the centres of `length` pixels, from -length / 2 to length / 2, in units of `unit` pixels."""
    return ((np.arange(length, dtype=np.float32) + 0.5 - length / 2) / unit).astype(np.float32)


def _noise(random: np.random.Generator, height: int, width: int, cells: int) -> Floats:
    """Return smooth noise in about -1..1, (height, width): a grid of `cells` knots a side, interpolated."""
    knots = random.uniform(-1, 1, size=(cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(knots).resize((width, height), Image.Resampling.BICUBIC))


def _turned(random: np.random.Generator, y: Floats, x: Floats) -> tuple[Floats, Floats]:
    """Return the coordinates (y, x), turned by a random angle."""
    angle = random.uniform(0, math.pi)
    sine, cosine = np.float32(math.sin(angle)), np.float32(math.cos(angle))
    return y * cosine - x * sine, y * sine + x * cosine


def _wave(random: np.random.Generator, along: Floats) -> Floats:
    """Return bands across `along`, 0..1, 2 to 9 to the image's shorter side, with soft edges."""
    frequency, phase = random.uniform(2, 9), random.uniform(0, 1)
    return np.clip(0.5 + 1.5 * np.sin(2 * math.pi * (along * np.float32(frequency) + np.float32(phase))), 0, 1)


def _flat(random: np.random.Generator, y: Floats, x: Floats) -> Floats:
    return np.zeros_like(y)


def _gradient(random: np.random.Generator, y: Floats, x: Floats) -> Floats:
    return np.clip(_turned(random, y, x)[0] + 0.5, 0, 1)


def _halo(random: np.random.Generator, y: Floats, x: Floats) -> Floats:
    center_y, center_x = (np.float32(offset) for offset in random.uniform(-0.4, 0.4, size=2))
    return np.clip(np.hypot(y - center_y, x - center_x), 0, 1)


def _horizon(random: np.random.Generator, y: Floats, x: Floats) -> Floats:
    return np.clip((y - np.float32(random.uniform(-0.2, 0.3))) * 40 + 0.5, 0, 1)


def _stripes(random: np.random.Generator, y: Floats, x: Floats) -> Floats:
    return _wave(random, _turned(random, y, x)[0])


def _checks(random: np.random.Generator, y: Floats, x: Floats) -> Floats:
    first, second = (_wave(random, axis) for axis in _turned(random, y, x))
    return first + second - 2 * first * second


def _dots(random: np.random.Generator, y: Floats, x: Floats) -> Floats:
    first, second = (_wave(random, axis) for axis in _turned(random, y, x))
    return first * second


def _blotches(random: np.random.Generator, y: Floats, x: Floats) -> Floats:
    height, width = y.shape
    clouds = _noise(random, height, width, cells=int(random.integers(4, 14)))
    return np.clip(0.5 + 3 * clouds, 0, 1)


_PATTERNS: tuple[Callable[[np.random.Generator, Floats, Floats], Floats], ...] = (
    _flat,
    _gradient,
    _halo,
    _horizon,
    _stripes,
    _checks,
    _dots,
    _blotches,
)
