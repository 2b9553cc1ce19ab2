"""Vocabularies of labels and prompts, templates, and text embeddings that are encoded once."""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from open_gem.checks import close_names, did_you_mean, shown
from open_gem.errors import PromptError
from open_gem.numerics import Lock, autocast, check_finite, cpu_by_default
from open_gem.tensors import Version, at_least_float32, check_has_numbers, fingerprint
from open_gem.text_store import TextStore

TEMPLATE = "a photo of a {}."  # the published GEM's, full stop included
ARTICLES = ("a ", "an ", "the ")
SCENES = (  # what MaskCLIP and CLIP Surgery add to the templates of ImageNet
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)
BATCH = 256  # texts encoded at a time: bounds memory when there are thousands
MANY = 512  # texts from which embeddings are kept on disk
PROBE = ("", "a photo of a cat.", "Two dogs, 3 BIRDS & a bicycle", "un café à l’été: “Straße” № 5", "東京の猫 🐱")

V = TypeVar("V")
Template = str | Sequence[str]  # a template, the name of an ensemble, or templates


# Prompts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exemplar:
    """An image, or a region of it, in a prompt's place: what looks like it is located. Models that were trained to
    localize take texts only.

    image  what `read_image` reads, or an `Encoded` of the same localizer
    box    left, top, right, bottom in pixels of the upright image, right and bottom exclusive; None for all of it
    name   what results call it; by default the image's file name and the box

    Raises PromptError for a box that is empty or not of four numbers, and for an empty name.
    """

    image: Any
    box: tuple[float, float, float, float] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.box is not None:
            box = tuple(self.box) if isinstance(self.box, Iterable) else ()
            if len(box) != 4 or not all(isinstance(edge, Real) and not isinstance(edge, bool) for edge in box):
                raise PromptError(f"the exemplar's box is {shown(self.box)}, expected left, top, right, bottom")
            if not (box[0] < box[2] and box[1] < box[3]):
                raise PromptError(
                    f"the exemplar's box {_numbers(box)} is empty, expected left < right and top < bottom"
                )
            object.__setattr__(self, "box", box)
        if not isinstance(self.name, str) or (self.name and not self.name.strip()):
            raise PromptError(f"the exemplar's name is {shown(self.name)}, expected text")
        if not self.name:
            file = Path(self.image).name if isinstance(self.image, str | PathLike) else "exemplar"
            object.__setattr__(self, "name", file if self.box is None else f"{file}:{_numbers(self.box)}")

    def __str__(self) -> str:
        return self.name

    @classmethod
    def read(
        cls, path: str | PathLike[str], box: tuple[float, float, float, float] | None = None, name: str = ""
    ) -> "Exemplar":
        """Read an image file now, so that the exemplar can go where the file is not. Raises PromptError."""
        name = name or cls(path, box).name
        try:
            return cls(Path(path).read_bytes(), box, name)
        except OSError as error:
            raise PromptError(f"cannot read the exemplar {str(path)!r}: {error.strerror or error}") from error

    def describe(self) -> dict[str, Any]:
        """Return its name, box and a hash of its file, as values that JSON can hold."""
        return {"like": self.name, "box": self.box and list(self.box), "sha256": self._sha256}

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> "Exemplar":
        """Return an exemplar of which only what `describe` says is known: it has a name, and cannot be located."""
        exemplar = cls(None, description["box"], description["like"])
        object.__setattr__(exemplar, "_sha256", description["sha256"])
        return exemplar

    @cached_property
    def _sha256(self) -> str | None:
        """12 hex digits of the image's file; None for an image that is in memory."""
        image = self.image
        if isinstance(image, str | PathLike):
            image = Path(image).read_bytes()
        return hashlib.sha256(image).hexdigest()[:12] if isinstance(image, bytes) else None


Prompt = str | Exemplar


def _numbers(box: Iterable[float]) -> str:
    return ",".join(f"{edge:g}" for edge in box)


def check_prompts(prompts: Any) -> tuple[Any, ...]:
    """Return the prompts as a tuple; a single string or `Exemplar` is one prompt. Raises PromptError for none, and for
    empty texts or others."""
    if not isinstance(prompts, Iterable | Exemplar):
        raise PromptError(f"prompts are {type(prompts).__name__}, expected texts")
    texts = (prompts,) if isinstance(prompts, str | Exemplar) else tuple(prompts)
    if not texts:
        raise PromptError("no prompt given, expected at least one such as 'a cat'")
    for index, prompt in enumerate(texts):
        if isinstance(prompt, Exemplar):
            continue
        if not isinstance(prompt, str):
            raise PromptError(f"prompt {index} is {type(prompt).__name__}, expected text")
        if not prompt.strip():
            raise PromptError(f"prompt {index} is empty, expected text such as 'a cat'")
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):  # bytes, not UTF-8
            raise PromptError(f"prompt {index} is {prompt!r}, which is not UTF-8 text")
    return texts


@dataclass(frozen=True)
class Vocabulary:
    """Labels, the prompts that stand for them, and prompts for everything else.

    labels      what is reported, one or more
    prompts     the prompts of each label, texts or exemplars, at least one; a label's score at a pixel is the maximum
                over them
    background  distractors ("sky", "wall", or what the labels are mistaken for): part of the softmax, never predicted

    Raises PromptError for empty or non-text prompts, and for a repeated label or prompt of a label ("a cat" is "cat").
    Labels may repeat if each is its own only prompt, as with a plain list. A prompt may belong to a label and to the
    background, as "bed" does in SCLIP's class file of COCO-Object.
    """

    labels: tuple[str, ...]
    prompts: tuple[tuple[Prompt, ...], ...]
    background: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        labels = tuple(map(str, _checked("labels", self.labels)))
        if len(self.prompts) != len(labels):
            raise PromptError(f"{len(self.prompts)} lists of prompts for {len(labels)} labels, expected one a label")
        places = [f"label {label!r}" for label in labels]
        prompts = tuple(_checked(place, texts) for place, texts in zip(places, self.prompts, strict=True))
        if prompts != tuple((label,) for label in labels):
            label, times = Counter(labels).most_common(1)[0]
            if times > 1:
                raise PromptError(f"label {label!r} occurs {times} times, expected each label once")
            _check_distinct(zip(places, prompts, strict=True))
        background = _checked("background", self.background) if self.background else ()
        for name, value in (("labels", labels), ("prompts", prompts), ("background", background)):
            object.__setattr__(self, name, value)  # as tuples

    @property
    def all_prompts(self) -> tuple[Prompt, ...]:
        """The prompts of the first label, of the second, …, and of the background."""
        return (*chain.from_iterable(self.prompts), *self.background)

    @property
    def exemplars(self) -> tuple[Exemplar, ...]:
        """Those of `all_prompts` that are exemplars."""
        return tuple(prompt for prompt in self.all_prompts if isinstance(prompt, Exemplar))

    @property
    def shared_with_background(self) -> tuple[str, ...]:
        """Prompts of labels that belong to the background too, articles aside."""
        background = {without_article(prompt) for prompt in self.background}
        own = chain.from_iterable(self.prompts)
        return tuple(str(prompt) for prompt in own if without_article(prompt) in background)

    @property
    def groups(self) -> tuple[int, ...]:
        """The index of the label of each of `all_prompts`, −1 for background."""
        indices = [index for index, texts in enumerate(self.prompts) for _ in texts]
        return (*indices, *[-1] * len(self.background))

    def by_label(self, values: Sequence[V]) -> list[list[V]]:
        """Group values of prompts by label: one value a prompt → the values of each label's prompts."""
        of_label: list[list[V]] = [[] for _ in self.labels]
        for value, group in zip(values, self.groups, strict=True):
            if group >= 0:
                of_label[group].append(value)
        return of_label

    def best(self, scores: Float[Tensor, " q"]) -> Float[Tensor, " p"]:
        """Return the maximum over each label's prompts of their scores `(q,)`: `(p,)`."""
        groups = torch.tensor(self.groups, dtype=torch.int64, device=scores.device)
        own = groups >= 0
        lowest = scores.new_full((len(self.labels),), -torch.inf)
        return lowest.scatter_reduce(0, groups[own], scores[own], "amax")

    @classmethod
    def of(cls, prompts: "Prompts") -> "Vocabulary":
        """Make a vocabulary of prompts that are their own labels, or of a mapping of labels to one or more prompts
        each.

        Raises PromptError as the class.
        """
        if isinstance(prompts, Vocabulary):
            return prompts
        if isinstance(prompts, Mapping):
            labels: Any = tuple(prompts)  # checked by the class
            return cls(labels, tuple(_checked(f"label {label!r}", texts) for label, texts in prompts.items()))
        own = check_prompts(prompts)
        return cls(tuple(map(str, own)), tuple((prompt,) for prompt in own))

    @classmethod
    def read(cls, path: str | PathLike[str], background: bool = False) -> "Vocabulary":
        """Read a class file as SCLIP, ClearCLIP, NACLIP and ProxyCLIP have them, UTF-8: one class a line, its synonyms
        after commas. The first prompt of a line is the label.

        A line with a semicolon is split there only, and keeps its commas (ProxyCLIP). Blank lines and space around
        prompts do not count. `background`: the first line holds the distractors.

        Raises PromptError for a file that cannot be read or holds no class, and for a repeated prompt, with both lines.
        """
        lines = _class_lines(path)
        classes = lines[1:] if background else lines
        if not classes:
            after = " after the background's line" if lines else ""
            raise PromptError(f"no class in {str(path)!r}{after}, expected one a line")
        _check_distinct((f"line {number} of {str(path)!r}", texts) for number, texts in classes)
        prompts = tuple(texts for _, texts in classes)
        return cls(tuple(first for first, *_ in prompts), prompts, lines[0][1] if background else ())

    def with_background(self, prompts: Prompt | Iterable[Prompt]) -> "Vocabulary":
        """Return the same labels with more distractors. Raises PromptError as `check_prompts`."""
        return replace(self, background=(*self.background, *_checked("background", prompts)))


Prompts = Prompt | Iterable[Prompt] | Mapping[str, Prompt | Iterable[Prompt]] | Vocabulary  # what `Vocabulary.of` takes


def _checked(place: str, prompts: Any) -> tuple[Any, ...]:
    try:
        return check_prompts(prompts)
    except PromptError as error:
        raise PromptError(f"{place}: {error}") from error


def _check_distinct(places: Iterable[tuple[str, Iterable[Prompt]]]) -> None:
    """Raise PromptError, with both places, if a prompt is repeated, articles aside."""
    known: dict[str, str] = {}
    for place, prompts in places:
        for prompt in prompts:
            if (bare := without_article(prompt)) in known:
                raise PromptError(f"{str(prompt)!r} of {place} is in {known[bare]} already, expected each prompt once")
            known[bare] = place


def _class_lines(path: str | PathLike[str]) -> list[tuple[int, tuple[str, ...]]]:
    """Return the number, from 1, and the prompts of each line that is not blank."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PromptError(f"cannot read classes from {str(path)!r}: line {line} is not UTF-8 text") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"cannot read classes from {str(path)!r}: {reason}") from error
    classes = []
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.split(";" if ";" in line else ",")
        if prompts := tuple(prompt for part in parts if (prompt := part.strip())):
            classes.append((number, prompts))
        elif line.strip():
            raise PromptError(f"line {number} of {str(path)!r} is {line.strip()!r}, expected a class and its synonyms")
    return classes


# Templates ------------------------------------------------------------------------------------------------------------


def _of_open_clip(name: str) -> tuple[str, ...]:
    from open_clip import zero_shot_metadata  # takes seconds, so only on use

    return tuple(template("{}") for template in getattr(zero_shot_metadata, name))


ENSEMBLES: Mapping[str, Callable[[], tuple[str, ...]]] = {
    # CLIP's own for ImageNet, which most published segmentation uses, and the seven of them that its authors picked
    "imagenet-80": lambda: _of_open_clip("OPENAI_IMAGENET_TEMPLATES"),
    "imagenet-7": lambda: _of_open_clip("SIMPLE_IMAGENET_TEMPLATES"),
    "clip-surgery-85": lambda: (*_of_open_clip("OPENAI_IMAGENET_TEMPLATES"), *SCENES),
}

T = TypeVar("T", bound=Template)


def check_template(template: T) -> T:
    """Return the template itself: text with exactly one `{}` for the prompt, a name of `ENSEMBLES`, or a list or tuple
    of such texts. Raises PromptError for anything else."""
    if isinstance(template, list | tuple):
        if not template:
            raise PromptError("no template given, expected at least one text with one {} where the prompt goes")
        for index, text in enumerate(template):
            if not _has_single_placeholder(text):
                raise PromptError(f"template {index} is {text!r}, expected text with one {{}} where the prompt goes")
    elif not isinstance(template, str):
        raise PromptError(f"template is {type(template).__name__}, expected text, or a list of texts")
    elif template not in ENSEMBLES and not _has_single_placeholder(template):
        raise PromptError(
            f"template is {template!r}, expected text with one {{}} where the prompt goes, a list of such texts, or "
            f"one of {', '.join(ENSEMBLES)}{did_you_mean(template, ENSEMBLES)}"
        )
    return template


def find_templates(template: Template) -> tuple[str, ...]:
    """Return the texts of a template, one or an ensemble, each with one `{}`. Raises PromptError as
    `check_template`."""
    check_template(template)
    if isinstance(template, str):
        return ENSEMBLES[template]() if template in ENSEMBLES else (template,)
    return tuple(template)


def _has_single_placeholder(template: Any) -> bool:
    return isinstance(template, str) and template.count("{}") == 1


def fill(template: str, prompt: str) -> str:
    """Fill a template with a prompt without its leading article, so that "a cat" and "cat" are encoded alike.

    The template's own article stays as the field writes it ("a photo of a apple."); the template "{}" takes prompts as
    they are, without space around them. An empty prompt leaves the template empty.
    """
    return template.replace("{}", prompt.strip() if template == "{}" else without_article(prompt))


def without_article(prompt: Prompt) -> str:
    """Return the prompt, or an exemplar's name, without its leading article."""
    stripped = str(prompt).strip()
    article = next((word for word in ARTICLES if stripped.lower().startswith(word)), "")
    return stripped[len(article) :].strip() or stripped


# Embeddings -----------------------------------------------------------------------------------------------------------


class TextTower(ABC):
    """The text half of a library's `model`, with the `tokenizer` that goes with it."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self._lock = Lock()  # tokenizers are not thread-safe: how they cut and pad is their state

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def logit_scale(self) -> float:
        """The factor of cosines before a softmax over prompts (about 100 for CLIP)."""
        return self.model.logit_scale.detach().float().exp().item()

    @property
    def logit_bias(self) -> float | None:
        """The bias of scaled cosines before the sigmoid of a model that was trained with one; None for others."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.detach().float().item()

    @abstractmethod
    def encode(self, texts: list[str]) -> Float[Tensor, "p e"]:
        """Encode a few texts: embeddings `(p, e)`, of any norm."""

    @abstractmethod
    def truncated(self, text: str) -> str:
        """Return the end of `text` that exceeds the context; empty if it fits."""

    @property
    def concepts(self) -> tuple[str, ...]:
        """Everything the model can name, if that is a list; empty for an open vocabulary."""
        return ()

    def knows(self, prompt: str) -> bool:
        """Return False if no word of `prompt` means anything to the model, so that all such prompts are alike."""
        return True


@dataclass(eq=False, repr=False)
class FrozenModel:
    """A library's model, which is read and never changed, and its text half.

    name   for people
    model  the library's own, whole
    text   see `TextTower`

    Raises InputError for weights without numbers (on the device "meta").
    """

    name: str
    model: Any
    text: TextTower
    _version: Version = field(default_factory=Version, init=False)

    def __post_init__(self) -> None:
        check_has_numbers(self.model)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def weights_version(self) -> Hashable:
        """A value that changes whenever the weights do (moved, cast, tuned): see `Version` for what it notices."""
        return self._version(self.model.parameters())

    def fingerprint(self) -> str:
        """Return 12 hex digits for the weights, see `tensors.fingerprint`."""
        return fingerprint(self.model)

    @torch.no_grad()
    @cpu_by_default()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "p e"]:
        """Encode texts: embeddings `(p, e)`; at least one text. Raises NotFiniteError if they are not finite."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # a batch costs what its longest does
        batches = (order[start : start + BATCH] for start in range(0, len(order), BATCH))
        rows = torch.cat([self.text.encode([texts[index] for index in batch]) for batch in batches])
        check_finite("text embeddings", self, rows)
        return rows[torch.tensor(order, device=rows.device, dtype=torch.int64).argsort()]


class TextCache:
    """Text embeddings of a model, each prompt encoded once; may be shared between threads.

    `template` as `check_template`. With an ensemble, a prompt's embedding is the mean over the templates of unit-norm
    embeddings, scaled to the mean norm they had: unit norm for backbones, as open_clip's zero-shot classifiers.

    Keeps the `capacity` most recently used prompts, or all of the last call, and drops all when the weights change.
    Embeddings made under autocast serve that autocast only. A copy starts empty. Where a call has `MANY` new texts they
    are looked up in the user's cache folder, and kept there, see `TextStore`.
    """

    def __init__(self, model: FrozenModel, template: Template = TEMPLATE, capacity: int = 10_000):
        self.model, self.templates, self.capacity = model, find_templates(template), capacity
        self.template: str | tuple[str, ...] = template if isinstance(template, str) else self.templates
        self._known: OrderedDict[Hashable, Tensor] = OrderedDict()  # by prompt, and by how it was computed
        self._version: Hashable = None
        self._fingerprint: bytes | None = None
        self._lock = Lock()
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.template, self.capacity)

    def __call__(self, prompts: Sequence[str]) -> Float[Tensor, "p e"]:
        """Return embeddings `(p, e)`, one per prompt, in order. Warns once of a prompt that is too long for the model.

        Raises PromptError as `check`.
        """
        keys = [self._key(prompt) for prompt in prompts]
        prompt_of = dict(zip(keys, prompts, strict=True))
        with self._lock:  # encoding under the lock: two threads never encode the same text twice
            if self._version != (version := self.model.weights_version):
                self._known.clear()
                self._version, self._fingerprint = version, None
            how = frozenset(autocast().items())
            rows = {key: self._known[key, how] for key in prompt_of if (key, how) in self._known}
            missing = {key: prompt for key, prompt in prompt_of.items() if key not in rows}
            if missing:
                self.check(missing.values())
                rows |= self._encode(missing)
            for key in prompt_of:
                self._known[key, how] = rows[key]
                self._known.move_to_end((key, how))
            while len(self._known) > max(self.capacity, len(prompt_of)):
                self._known.popitem(last=False)
        return torch.stack([rows[key] for key in keys])

    @cpu_by_default()
    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raise PromptError for a prompt of which the model knows no word: all such would mean the same to it; and for
        an exemplar."""
        known = self.model.text.concepts
        for prompt in prompts:
            if isinstance(prompt, Exemplar):
                raise PromptError(
                    f"{self.model.name} locates texts only, not the exemplar {prompt.name!r}: use a model with "
                    "training-free methods"
                )
            if known and prompt and not self.model.text.knows(prompt):  # other prompts are compared with the empty one
                close = close_names(without_article(prompt), known) or known[:5]
                raise PromptError(
                    f"the model knows no word of prompt {prompt!r}, only {len(known)} concepts such as "
                    f"{', '.join(close)}; expected one of them, or an open-vocabulary model (`open-gem models`)"
                )

    def _key(self, prompt: str) -> str:
        """Return a key that is equal for prompts that fill all templates alike, and for no others."""
        return fill("{}", prompt) if "{}" in self.templates else without_article(prompt)

    def _encode(self, prompts: Mapping[str, str]) -> dict[str, Tensor]:
        """Encode prompts, by key. Of `MANY` texts, what is known on disk is read and the rest is kept there."""
        store = self._store() if len(prompts) * len(self.templates) >= MANY else None
        rows = {} if store is None else store.load(list(prompts))
        rest = [key for key in prompts if key not in rows]
        step = max(1, MANY // len(self.templates))
        for start in range(0, len(rest), step):  # an ensemble has many texts a prompt
            filled = {
                key: [fill(template, prompts[key]) for template in self.templates] for key in rest[start : start + step]
            }
            texts = list(dict.fromkeys(chain.from_iterable(filled.values())))
            self._warn_of_cuts(texts)
            of_text = dict(zip(texts, self.model.encode_text(texts), strict=True))
            new = {key: _mean([of_text[text] for text in own]) for key, own in filled.items()}
            if store is not None:
                store.save({key: row for key, row in new.items() if not any(map(self._cut, filled[key]))})
            rows |= new
        return rows

    def _store(self) -> TextStore:
        """Return the embeddings on disk. A probe says what weights do not: a tokenizer, an activation, a kernel."""
        if self._fingerprint is None:
            self._fingerprint = self.model.fingerprint().encode()
        probe = self.model.encode_text(PROBE)
        values = probe.cpu().view(torch.uint8).numpy().tobytes()
        return TextStore((self._fingerprint, values, *map(str.encode, self.templates)), probe[0])

    @cpu_by_default()  # tokenizers make tensors
    def _cut(self, text: str) -> str:
        return self.model.text.truncated(text)

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        cut = next(((text, end) for text in texts if not self._warned and (end := self._cut(text))), None)
        if cut is not None:
            self._warned = True
            warnings.warn(
                f"prompt {_shorten(cut[0])!r} is longer than the model's context; cut off: {_shorten(cut[1])!r} "
                "(further long prompts are cut without a warning)",
                stacklevel=3,
            )


def _mean(rows: Sequence[Tensor]) -> Tensor:
    """Return the mean direction of embeddings `(e,)`, as long as they are on average; one embedding is itself."""
    if len(rows) == 1:
        return rows[0].clone()  # a row of its own, not a view that keeps all others alive
    stacked = torch.stack(list(rows))
    exact = at_least_float32(stacked)
    direction = normalize(normalize(exact, dim=-1).mean(dim=0), dim=-1)
    return (direction * exact.norm(dim=-1).mean()).to(stacked.dtype)


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
