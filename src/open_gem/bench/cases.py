"""What can be measured: a table of names, and functions from a subject to the work of one turn."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from open_gem.bench.subject import PICTURE, Subject
from open_gem.checks import did_you_mean
from open_gem.errors import InputError
from open_gem.method.run import run
from open_gem.method.table import METHODS
from open_gem.text import TextCache

Work = Callable[[], object]

PLAIN = "plain"
CEILING = "matrix-product"
TOGETHER = "together"


@dataclass(frozen=True)
class Case:
    """`about` for people; `make` what one turn does; `counts` whether its FLOPs can be told; `yardstick`: not one of
    what was asked for, but what to see the others beside."""

    about: str
    make: Callable[[Subject], Work]
    counts: bool = False
    yardstick: bool = False


def read(*names: str, pooled: bool = False) -> Callable[[Subject], Work]:
    """Some methods from one pass."""

    def make(subject: Subject) -> Work:
        methods = {name: METHODS[name].fitted(subject.tower.layers) for name in names}
        return partial(run, subject.tower, subject.pixels, methods, pooled=pooled)

    return make


def _plain(subject: Subject) -> Work:
    return lambda: subject.tower.library_forward(subject.pixels)


def _matrix_product(subject: Subject) -> Work:
    """Of the shape that most of the work has: all tokens by the first layer of an MLP."""
    tokens, _ = subject.tower.embed(subject.pixels)
    rows, width = tokens.flatten(0, -2), tokens.shape[-1]
    weights = torch.randn(width, 4 * width, dtype=rows.dtype, device=rows.device)
    return lambda: rows @ weights


def _texts(subject: Subject, warm: bool) -> Work:
    cache, phrases = TextCache(subject.localizer.backbone), subject.phrases
    if warm:
        cache(phrases)
        return lambda: cache(phrases)
    return lambda: TextCache(subject.localizer.backbone)(phrases)


def _masks(subject: Subject) -> Work:
    """Pictures of 480 × 640 to a mask of that size for each phrase, texts known."""

    def work() -> None:
        for found in subject.localizer(subject.photographs, subject.phrases):
            found.masks().stack()

    return work


def _label_map(subject: Subject) -> Work:
    """From similarities on the grid of patches to a label for each of 480 × 640 pixels."""
    found = subject.localizer(subject.photographs, subject.phrases)
    return lambda: [replace(one).segment() for one in found]  # anew: a localization keeps what it has found out


def _trained(name: str) -> Callable[[Subject], Work]:
    """A model that was trained to localize, as transformers runs it, each picture with all phrases."""

    def make(subject: Subject) -> Work:
        from open_gem.trained.registry import forward_pass

        if (subject.setting.device, subject.setting.dtype) != ("cpu", "float32"):
            raise InputError(f"{name} is measured in float32 on a CPU only")
        return forward_pass(name, subject.setting.batch, subject.setting.prompts)

    return make


CASES: Mapping[str, Case] = {
    CEILING: Case("one product of matrices, as large as the model's largest", _matrix_product, True, yardstick=True),
    PLAIN: Case("the library's own forward pass, to the pooled embedding", _plain, True, yardstick=True),
    **{name: Case(method.about, read(name), True) for name, method in METHODS.items()},
    TOGETHER: Case("all methods from one pass", read(*METHODS), True),
    "texts": Case("the phrases encoded, none of them known", partial(_texts, warm=False)),
    "texts-cached": Case("the same when all are known", partial(_texts, warm=True)),
    "masks": Case("pictures to a mask for each phrase, texts known", _masks),
    "label-map": Case(f"similarities to labels of {PICTURE.height} × {PICTURE.width} pixels", _label_map),
    "clipseg": Case("CLIPSeg at 352 px, its default configuration", _trained("clipseg")),
    "groupvit": Case("GroupViT at 224 px, likewise", _trained("groupvit")),
    "owlv2": Case("OWLv2 at 768 px, likewise (base, patches of 32)", _trained("owlv2")),
}
GROUPS = {
    "methods": (*METHODS, TOGETHER),
    "answers": ("texts", "texts-cached", "masks", "label-map"),
    "trained": ("clipseg", "groupvit", "owlv2"),
}


def find_cases(names: Iterable[str]) -> dict[str, Case]:
    """Cases by names, and names of groups, after the two that are always there. Raises InputError for others."""
    asked = [name for given in names for name in GROUPS.get(given, (given,))]
    for name in asked:
        if name not in CASES:
            known = (*GROUPS, *CASES)
            raise InputError(f"unknown case {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return {name: CASES[name] for name in dict.fromkeys((CEILING, PLAIN, *asked))}
