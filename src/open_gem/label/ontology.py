"""What is looked for: labels, the phrases that mean them, words for everything else, and the thresholds of each label.

labels:
  cat: [cat, kitten]            # phrases of a label
  fire engine:
    prompts: fire engine
    presence: 0.95              # of this label alone
  tree:                         # its own one phrase
background: [sky, grass]
presence: 0.8                   # of labels that say nothing
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from open_gem.checks import did_you_mean, shown
from open_gem.errors import InputError, PromptError
from open_gem.text import Vocabulary

DEFAULTS = {"presence": 0.9, "threshold": 0.5}
"""Of a label, in [0, 1]: the probability that it is in the image above which it is looked for at all, see
`Localization.presence`; and the level of its map, whichever scale that has, above which a pixel belongs to it."""

TOP, OF_LABEL = ("labels", "background", *DEFAULTS), ("prompts", *DEFAULTS)  # names that a file may use
FILES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Ontology:
    """Labels with their phrases, and thresholds in [0, 1], one a label: see `DEFAULTS`.

    Raises InputError for a number of thresholds that is not that of the labels, or one outside [0, 1], and PromptError
    for a label's phrase that is also the background's: it could never be found, being no likelier than itself.
    """

    vocabulary: Vocabulary
    presence: tuple[float, ...]
    threshold: tuple[float, ...]

    def __post_init__(self) -> None:
        if contested := self.vocabulary.contested:
            raise PromptError(f"{contested[0]!r} is a label's phrase and the background's, expected it in one of them")
        for name in DEFAULTS:
            values = getattr(self, name)
            if len(values) != len(self.labels):
                raise InputError(f"{len(values)} {name} thresholds for {len(self.labels)} labels, expected one a label")
            for label, value in zip(self.labels, values, strict=True):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                    raise InputError(f"{name} of label {label!r} is {shown(value)}, expected a number in [0, 1]")

    @property
    def labels(self) -> tuple[str, ...]:
        return self.vocabulary.labels

    @classmethod
    def of(cls, document: Any, **thresholds: float | None) -> "Ontology":
        """From what a file holds: a mapping as above, a mapping of labels alone, or a list of labels.

        `thresholds`, where not None, are of labels that have none of their own. Raises InputError or PromptError.
        """
        top = document if isinstance(document, Mapping) and "labels" in document else {"labels": document}
        _check_names("the ontology", top, TOP)
        labels = _labels(top["labels"])
        phrases = {label: _phrases(label, told) for label, told in labels.items()}
        vocabulary = Vocabulary.of(phrases)
        if background := top.get("background"):
            if not isinstance(background, str | list | tuple):
                raise InputError(f"background is {shown(background)}, expected a phrase, or a list of phrases")
            vocabulary = vocabulary.with_background(background)
        usual = {
            name: top.get(name, default) if thresholds.get(name) is None else thresholds[name]
            for name, default in DEFAULTS.items()
        }
        return cls(vocabulary, **{name: _of_labels(labels, name, value) for name, value in usual.items()})

    @classmethod
    def read(
        cls, path: str | PathLike[str], first_is_background: bool = False, **thresholds: float | None
    ) -> "Ontology":
        """From a file: YAML or JSON as above, or with any other ending a class file, see `Vocabulary.read`.

        Raises InputError or PromptError, with the path.
        """
        if Path(path).suffix.lower() not in FILES:
            vocabulary = Vocabulary.read(path, first_is_background)
            found = cls.of(list(vocabulary.labels), **thresholds)
            return replace(found, vocabulary=vocabulary)
        if first_is_background:
            raise InputError(f"{str(path)!r} names its background itself, expected a class file for its first line")
        try:
            return cls.of(_load(Path(path)), **thresholds)
        except InputError as error:
            raise type(error)(f"{str(path)!r}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """Everything that decides what is found: values that JSON can hold."""
        labels = {
            label: {"prompts": list(prompts), "presence": presence, "threshold": threshold}
            for label, prompts, presence, threshold in zip(
                self.labels, self.vocabulary.synonyms, self.presence, self.threshold, strict=True
            )
        }
        return {"labels": labels, "background": list(self.vocabulary.background)}


def _labels(given: Any) -> dict[str, Any]:
    """Labels and what is told of each."""
    if isinstance(given, str) or not isinstance(given, Mapping | Sequence):
        raise InputError(f"labels are {shown(given)}, expected a mapping of labels to phrases, or a list of labels")
    if not isinstance(given, Mapping) and (odd := [one for one in given if isinstance(one, Mapping | list)]):
        raise InputError(
            f"label {shown(odd[0])} in a list, expected text: for phrases, a mapping of labels without dashes"
        )
    if odd := [label for label in given if not isinstance(label, str)]:
        raise InputError(f"label {shown(odd[0])} is {type(odd[0]).__name__}, expected text: put it in quotes")
    labels = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given)
    if len(labels) != len(given):
        raise InputError("a label is there twice, expected each once")
    if not labels:
        raise PromptError("no label given, expected at least one")
    return labels


def _phrases(label: str, told: Any) -> Any:
    """The phrases of a label of which nothing, a phrase, phrases, or a mapping is told."""
    if isinstance(told, Mapping):
        _check_names(f"label {label!r}", told, OF_LABEL)
        told = told.get("prompts")
    return label if told is None else told


def _of_labels(labels: Mapping[str, Any], name: str, usual: Any) -> tuple[float, ...]:
    return tuple(told.get(name, usual) if isinstance(told, Mapping) else usual for told in labels.values())


def _check_names(place: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            close = did_you_mean(name, known) if isinstance(name, str) else ""
            raise InputError(f"{place} has {shown(name)}, expected {', '.join(known)}{close}")


def _load(path: Path) -> Any:
    """What a YAML or JSON file holds. Raises InputError where it cannot be read, or a key is there twice."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(getattr(error, "strerror", None) or "it is not UTF-8 text") from error
    return _of_json(text) if path.suffix.lower() == ".json" else _of_yaml(text)


def _of_json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once([key for key, _ in pairs])
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"it is not JSON: {error}") from error


def _of_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        _check_once([loader.construct_object(key) for key in own])  # pyright: ignore[reportUnknownMemberType]
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)  # a SafeLoader: makes plain values only
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.YAMLError | RecursionError):
            raise InputError(f"it is not YAML: {reason}") from error
        # Python refuses dates that do not exist, numbers of 5000 digits, lists as keys
        raise InputError(f"a value in it cannot be read ({reason}): put text in quotes") from error


def _check_once(keys: list[Any]) -> None:
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            raise InputError(f"{shown(key)} is there twice, expected it once")
        seen.add(key)
