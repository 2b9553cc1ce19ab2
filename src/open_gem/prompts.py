"""From the phrases a person types to unit-norm text embeddings, encoded once."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from open_gem.errors import PromptError

TEMPLATE = "a photo of a {}."  # the published GEM's, full stop included
ARTICLES = ("a ", "an ", "the ")


class TextEncoder(Protocol):
    """What prompts need of a model: its text half."""

    @property
    def weights_version(self) -> Hashable:
        """Changes whenever the weights do."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Texts → embeddings `(p, e)` of unit norm."""
        ...

    def truncated(self, prompt: str) -> str:
        """The end of a text that the context has no room for."""
        ...


def check_prompts(prompts: Any) -> tuple[str, ...]:
    """The prompts as a tuple; a single string is one prompt. Raises PromptError for none, empty or non-text ones."""
    if not isinstance(prompts, Iterable):
        raise PromptError(f"prompts are {type(prompts).__name__}, expected phrases")
    given = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not given:
        raise PromptError("no prompt given, expected at least one phrase such as 'a cat'")
    for index, prompt in enumerate(given):
        if not isinstance(prompt, str):
            raise PromptError(f"prompt {index} is {type(prompt).__name__}, expected text")
        if not prompt.strip():
            raise PromptError(f"prompt {index} is empty, expected a phrase such as 'a cat'")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python holds bytes that are not UTF-8
            raise PromptError(f"prompt {index} is {prompt!r}, which is not UTF-8 text")
    return given


def check_template(template: str) -> str:
    """The template itself. Raises PromptError unless it has exactly one place `{}` for the phrase."""
    if template.count("{}") != 1:
        raise PromptError(f"template is {template!r}, expected text with one {{}} where the phrase goes")
    return template


def fill(template: str, prompt: str) -> str:
    """The sentence that is encoded. A leading article goes, so that "a cat" and "cat" are the same phrase.

    The template's own article stays as the field writes it ("a photo of a apple."); the template "{}" takes prompts as
    they are, but for space around them.
    """
    phrase = prompt.strip()
    if template != "{}":
        article = next((word for word in ARTICLES if phrase.lower().startswith(word)), "")
        phrase = phrase[len(article) :].strip() or phrase
    return template.replace("{}", phrase)


class TextCache:
    """Text embeddings of one encoder, each text encoded once; may be shared between threads.

    Keeps the `capacity` most recently used texts, and forgets all when the encoder's weights change.
    """

    def __init__(self, encoder: TextEncoder, template: str = TEMPLATE, capacity: int = 10_000):
        self.encoder, self.template, self.capacity = encoder, check_template(template), capacity
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._version: Hashable = None
        self._lock = Lock()
        self._warned = False

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings `(p, e)` of unit norm, one a prompt, in order. Warns once where one is too long for the model."""
        texts = [fill(self.template, prompt) for prompt in prompts]
        with self._lock:  # encoding under the lock: two threads never encode the same text twice
            if self._version != (version := self.encoder.weights_version):
                self._known.clear()
                self._version = version
            found = {text: self._known[text] for text in texts if text in self._known}
            missing = [text for text in dict.fromkeys(texts) if text not in found]
            if missing:
                self._warn_of_cuts(missing)
                rows = self.encoder.encode_text(missing)
                found.update((text, row.clone()) for text, row in zip(missing, rows, strict=True))
            for text in dict.fromkeys(texts):
                self._known[text] = found[text]
                self._known.move_to_end(text)
            while len(self._known) > self.capacity:
                self._known.popitem(last=False)
        return torch.stack([found[text] for text in texts])

    def _warn_of_cuts(self, texts: Sequence[str]) -> None:
        truncated: Callable[[str], str] = self.encoder.truncated
        cut = next(((text, end) for text in texts if not self._warned and (end := truncated(text))), None)
        if cut is not None:
            self._warned = True
            warnings.warn(
                f"prompt {_shorten(cut[0])!r} is longer than the model's context; cut off: {_shorten(cut[1])!r} "
                "(further long prompts are cut without a warning)",
                stacklevel=2,
            )


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
