"""What to look for: labels, their prompts, distractors, and the thresholds of each label.

labels:
  cat: [cat, kitten]            # prompts of a label
  fire engine:
    prompts: fire engine
    presence: 0.95              # of this label alone
  tree:                         # is its own prompt
  mug: [mug, {like: mug.jpg, box: [10, 20, 200, 220]}]  # a text, and what looks like a region of an image
background: [sky, grass]
presence: 0.8                   # default of all labels
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from open_gem.checks import did_you_mean, shown
from open_gem.errors import InputError, PromptError
from open_gem.localization import PRESENCE
from open_gem.text import Exemplar, Prompt, Vocabulary

DEFAULTS = {"presence": PRESENCE, "threshold": 0.5}
"""Default thresholds of a label, in [0, 1]: of image-level presence (`Localization.presence`), below which the label is
absent, and of its heatmap, above which a pixel belongs to it."""

# Names that a file may use, and those of an exemplar that `Ontology.describe` gives.
TOP, OF_LABEL, OF_EXEMPLAR = ("labels", "background", *DEFAULTS), ("prompts", *DEFAULTS), ("like", "box", "name")
DESCRIBED = {"like", "box", "sha256"}
FILES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Ontology:
    """Labels with their prompts and thresholds in [0, 1], one per label: see `DEFAULTS`.

    Raises InputError if there are not as many thresholds as labels, or one is outside [0, 1], and PromptError for a
    label's prompt that is also the background's: it could never win.
    """

    vocabulary: Vocabulary
    presence: tuple[float, ...]
    threshold: tuple[float, ...]

    def __post_init__(self) -> None:
        if contested := self.vocabulary.shared_with_background:
            raise PromptError(f"{contested[0]!r} is a prompt of a label and of the background, expected in one of them")
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
    def of(cls, document: Any, folder: str | PathLike[str] = "", /, **thresholds: float | None) -> "Ontology":
        """Make an ontology of the contents of a file: a mapping as above, a mapping of labels alone, or a list of
        labels; or of what `describe` gives, then without the images of exemplars.

        `folder` is where the images of exemplars are. `thresholds` that are not None replace the document's defaults,
        not those of single labels. Raises InputError or PromptError.
        """
        top = document if isinstance(document, Mapping) and "labels" in document else {"labels": document}
        _check_names("the ontology", top, TOP)
        labels = _labels(top["labels"])
        vocabulary = Vocabulary.of({label: _prompts(label, entry, Path(folder)) for label, entry in labels.items()})
        if background := top.get("background"):
            if not isinstance(background, str | list | tuple):
                raise InputError(f"background is {shown(background)}, expected a prompt, or a list of prompts")
            vocabulary = vocabulary.with_background(_read_all("the background", background, Path(folder)))
        usual = {
            name: top.get(name, default) if thresholds.get(name) is None else thresholds[name]
            for name, default in DEFAULTS.items()
        }
        return cls(vocabulary, **{name: _of_labels(labels, name, value) for name, value in usual.items()})

    @classmethod
    def read(
        cls, path: str | PathLike[str], first_is_background: bool = False, **thresholds: float | None
    ) -> "Ontology":
        """Read a file: YAML or JSON as above, or with any other ending a class file, see `Vocabulary.read`.

        Raises InputError or PromptError, with the path.
        """
        if Path(path).suffix.lower() not in FILES:
            vocabulary = Vocabulary.read(path, first_is_background)
            return replace(cls.of(list(vocabulary.labels), **thresholds), vocabulary=vocabulary)
        if first_is_background:
            raise InputError(f"{str(path)!r} names its background itself, expected a class file for its first line")
        try:
            return cls.of(_load(Path(path)), Path(path).parent, **thresholds)
        except InputError as error:
            raise type(error)(f"{str(path)!r}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a result, as values that JSON can hold."""
        labels = {
            label: {"prompts": _described(prompts), "presence": presence, "threshold": threshold}
            for label, prompts, presence, threshold in zip(
                self.labels, self.vocabulary.prompts, self.presence, self.threshold, strict=True
            )
        }
        return {"labels": labels, "background": _described(self.vocabulary.background)}


def _described(prompts: Sequence[Prompt]) -> list[Any]:
    return [prompt.describe() if isinstance(prompt, Exemplar) else prompt for prompt in prompts]


def _labels(entries: Any) -> dict[str, Any]:
    """Return labels and their entries."""
    if isinstance(entries, str) or not isinstance(entries, Mapping | Sequence):
        raise InputError(f"labels are {shown(entries)}, expected a mapping of labels to prompts, or a list of labels")
    if not isinstance(entries, Mapping) and (odd := [label for label in entries if isinstance(label, Mapping | list)]):
        raise InputError(
            f"label {shown(odd[0])} in a list, expected text: for prompts, a mapping of labels without dashes"
        )
    if odd := [label for label in entries if not isinstance(label, str)]:
        raise InputError(f"label {shown(odd[0])} is {type(odd[0]).__name__}, expected text: put it in quotes")
    labels = dict(entries) if isinstance(entries, Mapping) else dict.fromkeys(entries)
    if len(labels) != len(entries):
        raise InputError("a label occurs twice, expected each once")
    if not labels:
        raise PromptError("no label given, expected at least one")
    return labels


def _prompts(label: str, entry: Any, folder: Path) -> Any:
    """Return the prompts of a label from its entry: nothing, a prompt, prompts, or a mapping."""
    if isinstance(entry, Mapping) and "like" not in entry:
        _check_names(f"label {label!r}", entry, OF_LABEL)
        entry = entry.get("prompts")
    if isinstance(entry, Mapping):
        entry = [entry]
    return label if entry is None else _read_all(f"label {label!r}", entry, folder)


def _read_all(place: str, prompts: Any, folder: Path) -> Any:
    """Return prompts with exemplars in place of their entries."""
    if not isinstance(prompts, list | tuple):
        return prompts
    return [_exemplar(place, prompt, folder) if isinstance(prompt, Mapping) else prompt for prompt in prompts]


def _exemplar(place: str, entry: Mapping[str, Any], folder: Path) -> Exemplar:
    if entry.keys() == DESCRIBED:
        return Exemplar.described(entry)
    _check_names(f"an exemplar of {place}", entry, OF_EXEMPLAR)
    if not isinstance(file := entry.get("like"), str):
        raise InputError(f"an exemplar of {place} is like {shown(file)}, expected an image file")
    return Exemplar.read(folder / file, entry.get("box"), entry.get("name") or "")


def _of_labels(labels: Mapping[str, Any], name: str, usual: Any) -> tuple[float, ...]:
    return tuple(entry.get(name, usual) if isinstance(entry, Mapping) else usual for entry in labels.values())


def _check_names(place: str, entries: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in entries:
        if name not in known:
            close = did_you_mean(name, known) if isinstance(name, str) else ""
            raise InputError(f"{place} has {shown(name)}, expected {', '.join(known)}{close}")


def _load(path: Path) -> Any:
    """Load a YAML or JSON file. Raises InputError if it cannot be read, or repeats a key."""
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
            raise InputError(f"{shown(key)} occurs twice, expected it once")
        seen.add(key)
