"""The cases that can be measured: a table of names and functions from a subject to the work of one turn."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from open_gem.bench.subject import IMAGE_SIZE, Subject
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
    """A case.

    about      a description for people
    make       subject → the work of one turn
    counts     whether its FLOPs can be counted
    """

    about: str
    make: Callable[[Subject], Work]
    counts: bool = False


def methods_pass(*names: str, pooled: bool = False) -> Callable[[Subject], Work]:
    """Read methods from one pass."""

    def make(subject: Subject) -> Work:
        methods = {name: METHODS[name].fitted(subject.tower.layers) for name in names}
        return partial(run, subject.tower, subject.pixels, methods, pooled=pooled)

    return make


def _plain(subject: Subject) -> Work:
    return lambda: subject.tower.library_forward(subject.pixels)


def _matrix_product(subject: Subject) -> Work:
    """Multiply all tokens by the first layer of an MLP: the shape of most of the work."""
    tokens, _ = subject.tower.embed(subject.pixels)
    rows, width = tokens.flatten(0, -2), tokens.shape[-1]
    weights = torch.randn(width, 4 * width, dtype=rows.dtype, device=rows.device)
    return lambda: rows @ weights


def _texts(subject: Subject, warm: bool) -> Work:
    cache, prompts = TextCache(subject.localizer.backbone), subject.prompts
    if warm:
        cache(prompts)
        return lambda: cache(prompts)
    return lambda: TextCache(subject.localizer.backbone)(prompts)


def _masks(subject: Subject) -> Work:
    """Locate prompts in images of 480 × 640 pixels, a mask of that size for each; texts are cached."""
    return lambda: [result.masks().stack() for result in subject.localizer(subject.photographs, subject.prompts)]


def _label_map(subject: Subject) -> Work:
    """Make a label for each of 480 × 640 pixels from similarities on the grid of patches."""
    results = subject.localizer(subject.photographs, subject.prompts)
    return lambda: [replace(result).segment() for result in results]  # a copy, since a localization caches


def _trained(name: str) -> Callable[[Subject], Work]:
    """Run a model that was trained to localize through transformers, each image with all prompts."""

    def make(subject: Subject) -> Work:
        from open_gem.trained.registry import forward_pass

        if (subject.setting.device, subject.setting.dtype) != ("cpu", "float32"):
            raise InputError(f"{name} is measured in float32 on a CPU only")
        return forward_pass(name, subject.setting.batch, subject.setting.prompts)

    return make


CASES: Mapping[str, Case] = {
    CEILING: Case("one product of matrices, as large as the model's largest", _matrix_product, True),
    PLAIN: Case("the library's own forward pass, to the pooled embedding", _plain, True),
    **{name: Case(method.about, methods_pass(name), True) for name, method in METHODS.items()},
    TOGETHER: Case("all methods from one pass", methods_pass(*METHODS), True),
    "texts": Case("the prompts encoded, nothing cached", partial(_texts, warm=False)),
    "texts-cached": Case("the prompts encoded, all cached", partial(_texts, warm=True)),
    "masks": Case("images to a mask for each prompt, texts cached", _masks),
    "label-map": Case(f"similarities to labels of {IMAGE_SIZE.height} × {IMAGE_SIZE.width} pixels", _label_map),
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
    """Return cases by their names and names of groups, after the two that all are compared with. Raises InputError for
    unknown names."""
    chosen = [name for group in names for name in GROUPS.get(group, (group,))]
    for name in chosen:
        if name not in CASES:
            known = (*GROUPS, *CASES)
            raise InputError(f"unknown case {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return {name: CASES[name] for name in dict.fromkeys((CEILING, PLAIN, *chosen))}
