"""From phrases to embeddings: what is refused, what is encoded, and that it is encoded once."""

import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from torch import Tensor

from open_gem.errors import InputError, PromptError
from open_gem.text import (
    ENSEMBLES,
    SCENES,
    TEMPLATE,
    FrozenModel,
    TextCache,
    TextTower,
    Vocabulary,
    check_prompts,
    check_template,
    fill,
    find_templates,
)
from open_gem.towers.loading import Backbone
from open_gem.towers.open_clip import adapt

WORDS = "{}"  # the template that adds nothing


class ShortText(TextTower):
    """A text tower of a small context, in letters."""

    context = 10_000

    def encode(self, texts: list[str]) -> Tensor:
        return torch.stack([CountingEncoder.embedding(text) for text in texts])

    def truncated(self, text: str) -> str:
        return text[self.context :]


class CountingEncoder(FrozenModel):
    """A model that counts how often it was asked for each text; a text's embedding says which text it is."""

    def __init__(self, context: int = 10_000, pause: float = 0.0):
        super().__init__("counting", torch.nn.Linear(1, 1), text := ShortText(None, None))
        self.encoded: Counter[str] = Counter()
        self.calls = 0
        self.pause, text.context = pause, context

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        assert texts, "the encoder was asked for nothing"
        self.calls += 1
        self.encoded.update(texts)
        sleep(self.pause)
        return super().encode_text(texts)

    @staticmethod
    def embedding(text: str) -> Tensor:
        number = sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 1009
        return torch.tensor([float(number), float(len(text))])


def expected(*texts: str) -> Tensor:
    return torch.stack([CountingEncoder.embedding(text) for text in texts])


def mean_of(*texts: str) -> Tensor:
    """The mean of directions, as long as the embeddings are on average."""
    rows = [CountingEncoder.embedding(text).tolist() for text in texts]
    lengths = [math.hypot(*row) for row in rows]
    units = [[value / length if length else 0.0 for value in row] for row, length in zip(rows, lengths, strict=True)]
    direction = [sum(values) for values in zip(*units, strict=True)]
    scale = sum(lengths) / len(lengths) / math.hypot(*direction)
    return torch.tensor([value * scale for value in direction])


# Phrases --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("a cat", ("a cat",)),
        (["cat"], ("cat",)),
        (("cat", "dog", "cat"), ("cat", "dog", "cat")),
        ((word for word in ["cat", "Dog "]), ("cat", "Dog ")),
        (["猫", "🐱"], ("猫", "🐱")),
    ],
)
def test_prompts_are_taken_as_they_are(given, taken):
    assert check_prompts(given) == taken


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no prompt"),
        ("", "prompt 0 is empty"),
        (["cat", " \t\n"], "prompt 1 is empty"),
        (["cat", "dog", 3], "prompt 2 is int"),
        ([None], "prompt 0 is NoneType"),
        ([["cat"]], "prompt 0 is list"),
        ([b"cat"], "prompt 0 is bytes"),
    ],
)
def test_what_cannot_be_grounded_is_refused(given, words):
    with pytest.raises(PromptError, match=words) as caught:
        check_prompts(given)
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("cat", "cat"),
        ("a cat", "cat"),
        ("an apple", "apple"),
        ("the  cat ", "cat"),
        ("  A cat", "cat"),
        ("The Beatles", "Beatles"),
        ("AN APPLE", "APPLE"),
        ("apple", "apple"),  # not "pple"
        ("another cat", "another cat"),
        ("theatre", "theatre"),
        ("cat in the hat", "cat in the hat"),
        ("the a cat", "a cat"),  # one article, not all
        ("a", "a"),
        ("the", "the"),
        (" An ", "An"),
        ("a {}", "{}"),
        ("a 100% {wild} cat\\", "100% {wild} cat\\"),
    ],
)
def test_an_article_gives_way_to_the_templates(prompt, phrase):
    assert fill(TEMPLATE, prompt) == f"a photo of a {phrase}."
    assert fill("{} in the wild", prompt) == f"{phrase} in the wild"
    assert fill(WORDS, prompt) == prompt.strip()


def test_the_template_is_the_published_one():
    assert fill(TEMPLATE, "apple") == "a photo of a apple."


@pytest.mark.parametrize("nothing", ["", "  "])
def test_an_empty_prompt_leaves_the_template_with_nothing_in_it(nothing):
    assert fill(TEMPLATE, nothing) == "a photo of a ."
    assert fill(WORDS, nothing) == ""
    cache = TextCache(CountingEncoder(), ("a {}.", "{}"))
    torch.testing.assert_close(cache([nothing, "cat"]), torch.stack([mean_of("a .", ""), mean_of("a cat.", "cat")]))


# Templates ------------------------------------------------------------------------------------------------------------


MISTAKEN = ["", "a photo", "a {} on a {}", "a {0}", "a {thing}", "a { }", "imagenet", "Imagenet-80"]
NOT_TEMPLATES = [[], (), ["a {}.", "a photo"], ["imagenet-80"], ["a {}.", 3], [["a {}."]], None, 80, {"a {}."}, b"{}"]


@pytest.mark.parametrize("template", [*MISTAKEN, *NOT_TEMPLATES])
def test_a_template_has_exactly_one_place(template):
    for use in (check_template, find_templates, lambda given: TextCache(CountingEncoder(), given)):
        with pytest.raises(PromptError, match="template") as caught:
            use(template)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", MISTAKEN)
def test_a_mistaken_template_is_told_what_there_is(template):
    with pytest.raises(PromptError) as caught:
        check_template(template)
    message = str(caught.value)
    assert f"template is {template!r}" in message
    assert "one {} where the prompt goes" in message
    assert "imagenet-80, imagenet-7, clip-surgery-85" in message


@pytest.mark.parametrize(
    ("given", "meant"),
    [("imagenet80", "imagenet-80"), ("imagenet_7", "imagenet-7"), ("clip-surgery", "clip-surgery-85"), ("photo", None)],
)
def test_a_name_that_is_nearly_one_is_recognised(given, meant):
    with pytest.raises(PromptError) as caught:
        check_template(given)
    assert str(caught.value).endswith(f"(did you mean {meant}?)" if meant else "clip-surgery-85")


def test_of_many_templates_the_wrong_one_is_named():
    with pytest.raises(PromptError, match="template 1 is 'a photo', expected"):
        check_template(["a {}.", "a photo", "the {}."])


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        (TEMPLATE, (TEMPLATE,)),
        (WORDS, (WORDS,)),
        ("itap of {}, {{really}}", ("itap of {}, {{really}}",)),
        (["a {}.", "the {}."], ("a {}.", "the {}.")),
        (("{}",), ("{}",)),
    ],
)
def test_a_good_template_is_given_back(template, texts):
    assert check_template(template) is template
    assert find_templates(template) == texts


@pytest.mark.parametrize(
    ("name", "functions", "more"),
    [
        ("imagenet-80", OPENAI_IMAGENET_TEMPLATES, ()),
        ("imagenet-7", SIMPLE_IMAGENET_TEMPLATES, ()),
        ("clip-surgery-85", OPENAI_IMAGENET_TEMPLATES, SCENES),
    ],
)
def test_an_ensemble_says_what_open_clips_says(name, functions, more):
    assert check_template(name) == name
    templates = find_templates(name)
    assert len(templates) == len(set(templates)) == int(name.rsplit("-", 1)[1])
    assert templates[len(functions) :] == more
    for ours, theirs in zip(templates, functions, strict=False):
        assert fill(ours, "old {cat}") == theirs("old {cat}")
    assert check_template(templates) is templates  # each has its one place


def test_every_ensemble_is_tested():
    assert set(ENSEMBLES) == {"imagenet-80", "imagenet-7", "clip-surgery-85"}


def test_only_who_uses_an_ensemble_waits_for_open_clip():
    code = """if True:
        import sys
        from open_gem.text import TextCache, check_template, find_templates
        check_template("imagenet-80"), find_templates(("a {}.", "the {}.")), TextCache(None)
        assert "open_clip" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# The cache ------------------------------------------------------------------------------------------------------------


def test_each_text_is_encoded_once_and_answers_keep_the_order():
    encoder = CountingEncoder()
    cache = TextCache(encoder, WORDS)
    assert torch.equal(cache(["cat", "dog", "cat"]), expected("cat", "dog", "cat"))
    assert torch.equal(cache(["owl", "dog", "ant", "cat"]), expected("owl", "dog", "ant", "cat"))
    assert torch.equal(cache(["ant"]), expected("ant"))
    assert encoder.encoded == dict.fromkeys(["cat", "dog", "owl", "ant"], 1)
    assert encoder.calls == 2  # and together


def test_the_same_phrase_with_and_without_article_is_one_text():
    encoder = CountingEncoder()
    cache = TextCache(encoder)
    assert torch.equal(cache(["a cat", "cat", " the cat"]), expected(*["a photo of a cat."] * 3))
    assert encoder.encoded == {"a photo of a cat.": 1}


def test_the_least_recently_used_text_is_forgotten():
    encoder = CountingEncoder()
    cache = TextCache(encoder, WORDS, capacity=2)
    cache(["cat", "dog"])
    cache(["cat"])  # so dog is the oldest
    cache(["owl"])
    cache(["cat", "owl"])
    assert encoder.encoded == {"cat": 1, "dog": 1, "owl": 1}
    assert torch.equal(cache(["dog"]), expected("dog"))
    assert encoder.encoded["dog"] == 2


@pytest.mark.parametrize("capacity", [0, 1, 3])
def test_a_call_may_be_larger_than_the_cache(capacity):
    texts = [f"thing {number}" for number in range(9)]
    encoder = CountingEncoder()
    cache = TextCache(encoder, WORDS, capacity=capacity)
    assert torch.equal(cache(texts + texts[:2]), expected(*texts, *texts[:2]))
    assert set(encoder.encoded.values()) == {1}
    assert torch.equal(cache(texts), expected(*texts))


def test_threads_never_encode_a_text_twice():
    encoder = CountingEncoder(pause=0.002)
    cache = TextCache(encoder, WORDS)
    asked = [[f"thing {(start + step) % 12}" for step in range(5)] for start in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(cache, asked))
    assert all(torch.equal(answer, expected(*texts)) for answer, texts in zip(answers, asked, strict=True))
    assert len(encoder.encoded) == 12
    assert set(encoder.encoded.values()) == {1}


def test_an_encoder_that_fails_leaves_the_cache_usable():
    class Failing(CountingEncoder):
        def encode_text(self, texts: Sequence[str]) -> Tensor:
            if "bad" in texts:
                raise RuntimeError("no")
            return super().encode_text(texts)

    encoder = Failing()
    cache = TextCache(encoder, WORDS)
    with pytest.raises(RuntimeError):
        cache(["cat", "bad"])
    assert torch.equal(cache(["cat"]), expected("cat"))


def test_a_long_prompt_is_warned_of_once_with_what_is_lost():
    cache = TextCache(CountingEncoder(context=8), WORDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache(["8 letter"])  # it just fits
    with pytest.warns(UserWarning) as caught:
        cache(["cat", "a cat on a mat", "a dog on a bed"])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "'a cat on a mat'" in message
    assert "' a mat'" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache(["a fish on a bicycle"])
        cache(["a cat on a mat"])


def test_the_warning_stays_short():
    with pytest.warns(UserWarning) as caught:
        TextCache(CountingEncoder(context=20), WORDS)(["word " * 500])
    assert len(str(caught[0].message)) < 300


def test_texts_are_encoded_again_when_the_weights_have_changed():
    encoder = CountingEncoder()
    cache = TextCache(encoder, WORDS)
    cache(["cat"])
    with torch.no_grad():
        encoder.model.weight += 1
    cache(["cat"])
    assert encoder.encoded["cat"] == 2


# Ensembles in the cache -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return open_clip.CLIP(
            embed_dim=24,
            vision_cfg=open_clip.CLIPVisionCfg(image_size=16, layers=1, width=16, head_width=8, patch_size=8),
            text_cfg=open_clip.CLIPTextCfg(context_length=20, vocab_size=49408, width=32, heads=2, layers=2),
        ).eval()


@pytest.fixture(scope="module")
def backbone(clip) -> Backbone:
    return adapt(clip, SimpleTokenizer(context_length=20))


WORDS_OF = ["cat", "old dog", "potted plant", "猫"]
SOME = ("{}", "art of the {}.", "a {} in a video game.")


@pytest.mark.parametrize(
    ("template", "theirs"),
    [
        ("imagenet-80", OPENAI_IMAGENET_TEMPLATES),
        ("imagenet-7", SIMPLE_IMAGENET_TEMPLATES),
        (SOME, SOME),
        (TEMPLATE, (TEMPLATE,)),
        ((TEMPLATE,), (TEMPLATE,)),
    ],
)
def test_an_ensemble_is_open_clips_zero_shot_classifier(template, theirs, clip, backbone):
    ours = TextCache(backbone, template)(WORDS_OF)
    classifier = open_clip.build_zero_shot_classifier(clip, SimpleTokenizer(context_length=20), WORDS_OF, theirs)
    torch.testing.assert_close(ours, classifier.T, rtol=0, atol=2e-6)
    assert (ours[0] - ours[1]).abs().max() > 1e-2  # so that a mix-up would show


@pytest.mark.parametrize("template", [SOME, "clip-surgery-85"])
def test_an_ensemble_is_the_mean_of_unit_embeddings(template, clip, backbone):
    tokenizer = SimpleTokenizer(context_length=20)
    ours = TextCache(backbone, template)(["cat", "", "old dog"])
    for row, phrase in zip(ours, ["cat", "", "old dog"], strict=True):
        total = torch.zeros(24, dtype=torch.float64)
        for one in find_templates(template):
            with torch.no_grad():
                embedding = clip.encode_text(tokenizer([one.replace("{}", phrase)]))[0].double()
            total += embedding / embedding.norm()
        torch.testing.assert_close(row.double(), total / total.norm(), rtol=0, atol=1e-6)


def test_an_ensemble_of_embeddings_that_are_not_unit_is_as_long_as_they_are():
    """As some models were trained with them; directions count alike, however long."""
    cache = TextCache(CountingEncoder(), ["a {}.", "the {} there"])
    for ours, phrase in zip(cache(["cat", "old dog"]), ["cat", "old dog"], strict=True):
        torch.testing.assert_close(ours, mean_of(f"a {phrase}.", f"the {phrase} there"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_mean_has_the_type_of_what_it_is_made_of(dtype):
    class Typed(CountingEncoder):
        def encode_text(self, texts: Sequence[str]) -> Tensor:
            return super().encode_text(texts).to(dtype)

    ours = TextCache(Typed(), ["a {}.", "the {}."])(["cat"])
    assert ours.dtype == dtype
    exact = mean_of("a cat.", "the cat.")
    torch.testing.assert_close(ours[0].float(), exact, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0)


def test_each_filled_text_is_encoded_once():
    encoder = CountingEncoder()
    cache = TextCache(encoder, ["a {}.", "a clean {}.", "a {}."])
    first = cache(["cat", "clean cat", "the cat"])  # "a clean cat." by two ways
    assert encoder.encoded == {"a cat.": 1, "a clean cat.": 1, "a clean clean cat.": 1}
    assert encoder.calls == 1
    torch.testing.assert_close(first[0], mean_of("a cat.", "a clean cat.", "a cat."))
    torch.testing.assert_close(first[1], mean_of("a clean cat.", "a clean clean cat.", "a clean cat."))
    assert torch.equal(first[0], first[2])
    assert torch.equal(cache(["clean cat", "a cat"]), first[[1, 0]])
    assert encoder.calls == 1


def test_where_a_template_keeps_articles_they_tell_phrases_apart():
    encoder = CountingEncoder()
    apart = TextCache(encoder, ["my {}.", WORDS])(["a cat", "cat", " cat "])
    assert encoder.encoded == {"my cat.": 1, "a cat": 1, "cat": 1}
    torch.testing.assert_close(apart, torch.stack([mean_of("my cat.", "a cat"), *[mean_of("my cat.", "cat")] * 2]))


def test_one_article_goes_not_two_with_any_template():
    for template in (TEMPLATE, ("a photo of a {}.",), ("a photo of a {}.", "a photo of a {}.")):
        encoder = CountingEncoder()
        TextCache(encoder, template)(["the a cat"])
        assert encoder.encoded == {"a photo of a a cat.": 1}


def test_of_an_ensemble_phrases_are_counted_not_texts():
    encoder = CountingEncoder()
    cache = TextCache(encoder, ["a {}.", "the {}."], capacity=2)
    cache(["cat", "dog"])
    cache(["cat"])  # so dog is the oldest
    cache(["owl"])
    cache(["cat", "owl"])
    assert set(encoder.encoded.values()) == {1}
    cache(["dog"])
    assert encoder.encoded["a dog."] == encoder.encoded["the dog."] == 2


def test_threads_never_encode_a_text_of_an_ensemble_twice():
    encoder = CountingEncoder(pause=0.002)
    cache = TextCache(encoder, ["a {}.", "the {}."])
    asked = [[f"thing {(start + step) % 12}" for step in range(5)] for start in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(cache, asked))
    for answer, phrases in zip(answers, asked, strict=True):
        torch.testing.assert_close(answer, torch.stack([mean_of(f"a {one}.", f"the {one}.") for one in phrases]))
    assert len(encoder.encoded) == 24
    assert set(encoder.encoded.values()) == {1}


@pytest.mark.parametrize("template", [WORDS, ("{}", "{}")])
def test_what_is_kept_is_not_what_was_given(template):
    """Whoever changes an answer changes nobody else's; and one phrase does not keep a batch of others alive."""
    cache = TextCache(CountingEncoder(), template)
    cache(["cat", "dog"]).zero_()
    torch.testing.assert_close(cache(["cat"]), expected("cat"))
    assert all(row.untyped_storage().nbytes() == row.nbytes for row in cache._known.values())


def test_a_prompt_too_long_for_one_template_of_many_is_warned_of_once():
    cache = TextCache(CountingEncoder(context=8), ["a {}", "an old {}", "a very old {}"])
    with pytest.warns(UserWarning, match="'an old cat' is longer") as caught:
        cache(["cat", "dog"])
    assert len(caught) == 1


@pytest.mark.parametrize("template", [TEMPLATE, "imagenet-7", SOME, list(SOME)])
def test_the_template_is_kept_as_given_for_json(template):
    kept = TextCache(CountingEncoder(), template).template
    assert kept == (tuple(template) if isinstance(template, list) else template)
    assert json.loads(json.dumps(kept)) == (list(kept) if isinstance(kept, tuple) else kept)


# Vocabularies ---------------------------------------------------------------------------------------------------------

PETS = Vocabulary(("cat", "dog"), (("cat", "kitten"), ("dog",)), ("sky", "grass"))


def test_phrases_come_with_their_labels():
    assert PETS.all_prompts == ("cat", "kitten", "dog", "sky", "grass")
    assert PETS.groups == (0, 0, 1, -1, -1)
    assert hash(PETS) == hash(Vocabulary(["cat", "dog"], [["cat", "kitten"], "dog"], ["sky", "grass"]))  # type: ignore


@pytest.mark.parametrize(
    ("given", "labels", "synonyms"),
    [
        ("a cat", ("a cat",), (("a cat",),)),
        (["cat", "dog "], ("cat", "dog "), (("cat",), ("dog ",))),
        ((word for word in ["cat", "dog"]), ("cat", "dog"), (("cat",), ("dog",))),
        (["cat", "dog", "cat"], ("cat", "dog", "cat"), (("cat",), ("dog",), ("cat",))),
        (["cat", "a cat"], ("cat", "a cat"), (("cat",), ("a cat",))),
        ({"cat": "kitten"}, ("cat",), (("kitten",),)),
        ({"pet": ["cat", "dog"], "owl": "owl"}, ("pet", "owl"), (("cat", "dog"), ("owl",))),
        ({"pet": iter(["cat", "dog"])}, ("pet",), (("cat", "dog"),)),
    ],
)
def test_a_vocabulary_of_what_was_asked(given, labels, synonyms):
    vocabulary = Vocabulary.of(given)
    assert vocabulary == Vocabulary(labels, synonyms)
    assert (vocabulary.labels, vocabulary.prompts, vocabulary.background) == (labels, synonyms, ())
    assert len(vocabulary.all_prompts) == len(vocabulary.groups)
    assert [vocabulary.labels[group] for group in vocabulary.groups] == [
        label for label, some in zip(labels, synonyms, strict=True) for _ in some
    ]


def test_a_vocabulary_of_a_vocabulary_is_itself():
    assert Vocabulary.of(PETS) is PETS


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no prompt"),
        ({}, "labels: no prompt"),
        (["cat", ""], "prompt 1 is empty"),
        (None, "prompts are NoneType"),
        ([["cat"]], "prompt 0 is list"),
        ({"cat": []}, "label 'cat': no prompt"),
        ({"cat": None}, "label 'cat': prompts are NoneType"),
        ({"cat": ["cat", " "]}, "label 'cat': prompt 1 is empty"),
        ({"cat": ["cat", 3]}, "label 'cat': prompt 1 is int"),
        ({"": "cat"}, "labels: prompt 0 is empty"),
        ({1: "cat"}, "labels: prompt 0 is int"),
        ({"cat": ["pet", "cat"], "dog": ["dog", "pet"]}, "'pet' of label 'dog' is in label 'cat' already"),
        ({"cat": "the pet", "dog": "a pet "}, "'a pet ' of label 'dog' is in label 'cat' already"),
        ({"cat": ["cat", "a cat"]}, "'a cat' of label 'cat' is in label 'cat' already"),
    ],
)
def test_what_is_no_vocabulary_is_refused(given, words):
    with pytest.raises(PromptError, match=words) as caught:
        Vocabulary.of(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((("cat", "dog"), (("cat",),)), "1 lists of prompts for 2 labels"),
        ((("cat",), (("cat",), ("dog",))), "2 lists of prompts for 1 labels"),
        ((("cat",), ((),)), "label 'cat': no prompt"),
        ((("cat", "dog", "cat"), (("cat",), ("dog",), ("kitten",))), "label 'cat' occurs 2 times"),
        ((("cat",), (("cat",),), ("sky", "")), "background: prompt 1 is empty"),
        ((("cat",), (("cat",),), (None,)), "background: prompt 0 is NoneType"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, words):
    with pytest.raises(PromptError, match=words):
        Vocabulary(*parts)


def test_background_is_added_and_never_an_answer():
    vocabulary = Vocabulary.of(["cat", "dog", "cat"]).with_background("sky").with_background(["wall", "a cat"])
    assert vocabulary.labels == ("cat", "dog", "cat")
    assert vocabulary.all_prompts == ("cat", "dog", "cat", "sky", "wall", "a cat")
    assert vocabulary.groups == (0, 1, 2, -1, -1, -1)
    assert PETS.background == ("sky", "grass")
    for nothing in ([], "", ["sky", " "], None):
        with pytest.raises(PromptError, match="background: "):
            PETS.with_background(nothing)  # type: ignore[arg-type]


# Class files ----------------------------------------------------------------------------------------------------------


def class_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "classes.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "background", "vocabulary"),
    [
        ("cat\ndog", False, Vocabulary.of(["cat", "dog"])),
        ("cat\ndog\n", False, Vocabulary.of(["cat", "dog"])),
        ("\ufeffcat\r\ndog\r\n", False, Vocabulary.of(["cat", "dog"])),
        ("\n cat , kitten,\n\n \t\ndog \n", False, Vocabulary.of({"cat": ["cat", "kitten"], "dog": "dog"})),
        ("tv, television set\n猫", False, Vocabulary.of({"tv": ["tv", "television set"], "猫": "猫"})),
        ("tv, crt; tv ;\nrug, mat", False, Vocabulary.of({"tv, crt": ["tv, crt", "tv"], "rug": ["rug", "mat"]})),
        ("sky\ncat, kitten\ndog", True, Vocabulary.of({"cat": ["cat", "kitten"], "dog": "dog"}).with_background("sky")),
        ("sky, wall\ncat\ndog", True, Vocabulary.of(["cat", "dog"]).with_background(["sky", "wall"])),
        ("sky; wall\ncat", True, Vocabulary.of("cat").with_background(["sky", "wall"])),
        ("background\ncat\ndog", True, Vocabulary.of(["cat", "dog"]).with_background("background")),
        ("\nsky, bed\ncat\nbed", True, Vocabulary.of(["cat", "bed"]).with_background(["sky", "bed"])),
        ("background\ncat", False, Vocabulary.of(["background", "cat"])),
    ],
)  # fmt: skip
def test_a_class_file_is_read(content, background, vocabulary, tmp_path):
    path = class_file(tmp_path, content)
    assert Vocabulary.read(path, background) == vocabulary
    assert Vocabulary.read(str(path), background=background) == vocabulary


@pytest.mark.parametrize(
    ("content", "background", "words"),
    [
        ("", False, "no class in '.*classes.txt', expected"),
        (" \n\n", True, "no class in '.*classes.txt', expected"),
        ("sky, wall\n\n", True, "no class in '.*classes.txt' after the background's line"),
        ("cat\n , ,\ndog", False, "line 2 of '.*classes.txt' is ', ,'"),
        ("cat, kitten\n\ndog\nlion, a cat", False, "'a cat' of line 4 of .* is in line 1 of '.*' already"),
        ("cat\ndog\ncat", False, "'cat' of line 3 of .* is in line 1 of"),
        ("sky\ncat\ncat", True, "'cat' of line 3 of .* is in line 2 of"),
        ("cat, cat", False, "'cat' of line 1 of .* is in line 1 of"),
        (b"cat\r\ndog\r\n\xe9\xff\nowl", False, "cannot read classes from '.*classes.txt': line 3 is not UTF-8"),
        ("cat".encode("utf-16"), False, "line 1 is not UTF-8"),
    ],
)
def test_a_class_file_with_a_mistake_is_refused_with_its_place(content, background, words, tmp_path):
    with pytest.raises(PromptError, match=words) as caught:
        Vocabulary.read(class_file(tmp_path, content), background)
    assert "\n" not in str(caught.value)


def test_a_class_file_that_cannot_be_read_is_one_line(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path, "nul\0.txt"):
        with pytest.raises(PromptError, match="cannot read classes from ") as caught:
            Vocabulary.read(path)
        assert os.fspath(path).replace("\0", "\\x00") in str(caught.value)
        assert "\n" not in str(caught.value)
