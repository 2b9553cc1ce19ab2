"""Captions of scenes as tokens of CLIP: what the image shows in words, never where."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from open_gem.data.scenes import CONCEPTS

TEMPLATES: tuple[str, ...] = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}.",
    "a photo of a {}",
    "a photo of the {}.",
    "a picture of a {}",
    "an image of a {}.",
    "a drawing of a {}",
    "there is a {} in the scene.",
)
"""Prompts of one concept; `fill` puts a name into one."""


_TOKENIZER = SimpleTokenizer()
_PARTIAL = 0.25  # share of captions that may leave some objects unmentioned
_UNGRAMMATICAL = 0.3  # share of prompts formatted as callers do, "a photo of a apple."
_FRAMES = ("{}", "{}", "a photo of {}.", "a picture of {}", "there is {}", "a scene with {}.")
_PAIRS = (" and ", " and ", " next to ", " beside ", " with ", ", ")


def fill(template: str, name: str) -> str:
    """`template` with `name` in place of `{}`, its article made to fit: "a photo of an apple."."""
    if name[:1].lower() in set("aeiou"):
        template = re.sub(r"\ba \{\}", "an {}", template)
    return template.format(name)


@cache
def _word_tokens(word: str) -> tuple[int, ...]:
    return tuple(_TOKENIZER.encode(word))


def tokens(texts: list[str]) -> Tensor:
    """Token ids (texts, longest) as the CLIP tokenizer gives them, padded with 0 no further than the longest text.

    Byte-pair encoding never crosses a space, so words are encoded once and remembered.
    """
    start, end = _TOKENIZER.sot_token_id, _TOKENIZER.eot_token_id
    rows = [[start, *(token for word in text.split() for token in _word_tokens(word)), end] for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def concept_prompts(random: np.random.Generator) -> list[str]:
    """One prompt for every concept, each in a random template."""
    templates = random.choice(len(TEMPLATES), size=len(CONCEPTS))
    return [_prompt(random, TEMPLATES[template], name) for template, name in zip(templates, CONCEPTS, strict=True)]


def scene_caption(random: np.random.Generator, concepts: np.ndarray) -> tuple[str, np.ndarray]:
    """A caption of a scene that shows `concepts` (indices into CONCEPTS), and the concepts it mentions."""
    mentioned = random.permutation(concepts)
    if random.random() < _PARTIAL:
        mentioned = mentioned[: random.integers(1, len(mentioned) + 1)]
    if len(mentioned) == 1:
        template = TEMPLATES[random.integers(len(TEMPLATES))]
        return _prompt(random, template, CONCEPTS[mentioned[0]]), mentioned
    nouns = [fill("a {}", CONCEPTS[concept]) for concept in mentioned]
    listed = ", ".join(nouns[:-1]) + _PAIRS[random.integers(len(_PAIRS))] + nouns[-1]
    return _FRAMES[random.integers(len(_FRAMES))].format(listed), mentioned


def used_tokens() -> Tensor:
    """Every token id that any caption can contain."""
    nouns = [fill(template, name) for template in TEMPLATES for name in CONCEPTS]
    return tokens([*nouns, *TEMPLATES, *_FRAMES, *_PAIRS]).unique()[1:]  # the first is the padding, 0


def _prompt(random: np.random.Generator, template: str, name: str) -> str:
    return template.format(name) if random.random() < _UNGRAMMATICAL else fill(template, name)
