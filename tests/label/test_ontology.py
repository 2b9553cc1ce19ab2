"""An ontology file says what is looked for, and what is wrong with it is said in one line."""

import json
import time

import pytest

from open_gem.errors import InputError, PromptError
from open_gem.label.ontology import DEFAULTS, Ontology

FILE = """
labels:
  cat: [cat, kitten]
  fire engine:
    prompts: fire truck
    presence: 0.95
  tree:
background: [sky, grass]
threshold: 0.4
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "classes.yaml"):
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / name

    return write


def test_a_file_with_everything(write):
    found = Ontology.read(write(FILE))
    assert found.labels == ("cat", "fire engine", "tree")
    assert found.vocabulary.prompts == (("cat", "kitten"), ("fire truck",), ("tree",))
    assert found.vocabulary.background == ("sky", "grass")
    assert found.presence == (DEFAULTS["presence"], 0.95, DEFAULTS["presence"])
    assert found.threshold == (0.4, 0.4, 0.4)
    assert json.loads(json.dumps(found.describe())) == found.describe()


def test_what_is_asked_for_goes_before_the_file_but_not_before_a_label(write):
    found = Ontology.read(write(FILE), presence=0.1, threshold=0.2)
    assert found.presence == (0.1, 0.95, 0.1)
    assert found.threshold == (0.2, 0.2, 0.2)


@pytest.mark.parametrize("text", ["{cat: kitten, dog: }", "[cat, dog]", '{"cat": null, "dog": ["dog"]}'])
def test_labels_alone(write, text):
    assert Ontology.read(write(text)).labels == ("cat", "dog")


def test_class_files(write):
    found = Ontology.read(write("sky, wall\ncat, kitten\ndog\n", "classes.txt"), True, presence=0.3)
    assert found.vocabulary.background == ("sky", "wall")
    assert found.vocabulary.prompts == (("cat", "kitten"), ("dog",))
    assert found.presence == (0.3, 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: {cat: {prompt: x}}", "did you mean prompts"),
        ("labels: [cat]\nbackgrounds: [sky]", "did you mean background"),
        ("labels: {cat: {presence: 2}}", r"presence of label 'cat' is 2, expected a number in \[0, 1\]"),
        ("labels: [cat]\nthreshold: -0.5", "threshold of label 'cat' is -0.5"),
        ("labels: [cat]\nthreshold: high", "threshold of label 'cat' is 'high'"),
        ("labels: {no: }", "label False is bool, expected text: put it in quotes"),
        ("{cat: , cat: }", "'cat' occurs twice"),
        ("[cat, cat]", "a label occurs twice"),
        ("{cat: feline, lion: [a feline]}", "is in label 'cat' already"),
        ("{cat: [1]}", "prompt 0 is int, expected text"),
        ("cat", "expected a mapping of labels"),
        ("", "expected a mapping of labels"),
        ("[]", "no label given"),
        ("{", "it is not YAML"),
        ("ontology: [2024-13-45]", "a value in it cannot be read .month must be in 1..12.: put text in quotes"),
        ("[2024-01-02]", r"label datetime.date\(2024, 1, 2\) is date, expected text: put it in quotes"),
        ("labels: [cat]\npresence: " + "9" * 5000, "a value in it cannot be read"),
        (
            "labels: [cat]\npresence: 0x" + "f" * 5000,
            "presence of label 'cat' is int that is too long to show, expected",
        ),
        ("[0x" + "f" * 5000 + "]", "label int that is too long to show is int, expected text"),
        ("{? [a] : b}", "a value in it cannot be read"),
        ("&a [*a]", "in a list, expected text"),
        ("labels: {cat: {1: x}}", "label 'cat' has 1, expected prompts, presence, threshold"),
        ("labels: [cat]\nbackground: {a: b}", "background is {'a': 'b'}, expected a prompt"),
        ("labels: [a cat]\nbackground: [sky, cat]", "'a cat' is a prompt of a label and of the background"),
        ("!!python/object/apply:os.system [ls]", "it is not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_with_the_path(write, text, message):
    with pytest.raises(InputError, match=message) as caught:
        Ontology.read(write(text))
    assert str(caught.value).startswith("'") and "classes.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path, write):
    for name in ("none.yaml", "none.txt"):
        with pytest.raises(InputError, match="No such file"):
            Ontology.read(tmp_path / name)
    with pytest.raises(InputError, match="names its background itself"):
        Ontology.read(write(FILE), first_is_background=True)
    with pytest.raises(PromptError, match="no class"):
        Ontology.read(write("\n", "empty.txt"))


@pytest.mark.parametrize("one", [{"cat": ["cat", "kitten"]}, ["cat", "kitten"]])
def test_a_list_of_labels_with_prompts_says_what_to_write(one):
    with pytest.raises(InputError, match="in a list, expected text: for prompts, a mapping of labels without dashes"):
        Ontology.of([one, "dog"])


def test_yaml_may_merge_mappings(write):
    text = "labels: {cat: &loose {presence: 0.3, threshold: 0.2}, dog: {<<: *loose, threshold: 0.4}}"
    found = Ontology.read(write(text))
    assert (found.presence, found.threshold) == ((0.3, 0.3), (0.2, 0.4))


def test_json_is_json(write):
    assert Ontology.read(write('{\t"cat": null, "dog": ["dog"]}', "classes.json")).labels == ("cat", "dog")
    for text, message in (("{cat: }", "it is not JSON"), ('{"cat": null, "cat": null}', "'cat' occurs twice")):
        with pytest.raises(InputError, match=message):
            Ontology.read(write(text, "classes.json"))
    with pytest.raises(InputError, match="it is not JSON"):
        Ontology.read(write('{"labels": ["cat"], "presence": ' + "9" * 5000 + "}", "classes.json"))


def test_keys_are_compared_in_time_that_grows_with_their_number(write):
    """Each with each, 40,000 keys would take minutes."""
    names = {f"label {number}": None for number in range(40_000)}
    start = time.process_time()
    assert len(Ontology.read(write(json.dumps(names), "classes.json")).labels) == 40_000
    assert time.process_time() - start < 20
