"""From phrases to embeddings: what is refused, what is encoded, and that it is encoded once."""

import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest
import torch
from torch import Tensor

from open_gem.errors import InputError, PromptError
from open_gem.prompts import TEMPLATE, TextCache, check_prompts, check_template, fill

WORDS = "{}"  # the template that adds nothing


class CountingEncoder:
    """An encoder that knows how often it was asked for each text; a text's embedding says which text it is."""

    def __init__(self, room: int = 10_000, pause: float = 0.0):
        self.encoded: Counter[str] = Counter()
        self.calls = 0
        self.room, self.pause = room, pause

    weights_version = 0

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        assert prompts, "the encoder was asked for nothing"
        self.calls += 1
        self.encoded.update(prompts)
        sleep(self.pause)
        return torch.stack([self.embedding(prompt) for prompt in prompts])

    def truncated(self, prompt: str) -> str:
        return prompt[self.room :]

    @staticmethod
    def embedding(text: str) -> Tensor:
        number = sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 1009
        return torch.tensor([float(number), float(len(text))])


def expected(*texts: str) -> Tensor:
    return torch.stack([CountingEncoder.embedding(text) for text in texts])


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


@pytest.mark.parametrize("template", ["", "a photo", "a {} on a {}", "a {0}", "a {thing}", "a { }"])
def test_a_template_has_exactly_one_place(template):
    with pytest.raises(PromptError, match="template"):
        check_template(template)
    with pytest.raises(PromptError, match="template"):
        TextCache(CountingEncoder(), template)


@pytest.mark.parametrize("template", [TEMPLATE, WORDS, "itap of {}, {{really}}"])
def test_a_good_template_is_given_back(template):
    assert check_template(template) == template


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
        def encode_text(self, prompts: Sequence[str]) -> Tensor:
            if "bad" in prompts:
                raise RuntimeError("no")
            return super().encode_text(prompts)

    encoder = Failing()
    cache = TextCache(encoder, WORDS)
    with pytest.raises(RuntimeError):
        cache(["cat", "bad"])
    assert torch.equal(cache(["cat"]), expected("cat"))


def test_a_long_prompt_is_warned_of_once_with_what_is_lost():
    cache = TextCache(CountingEncoder(room=8), WORDS)
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
        TextCache(CountingEncoder(room=20), WORDS)(["word " * 500])
    assert len(str(caught[0].message)) < 300


def test_texts_are_encoded_again_when_the_weights_have_changed():
    encoder = CountingEncoder()
    cache = TextCache(encoder, WORDS)
    cache(["cat"])
    encoder.weights_version = 1
    cache(["cat"])
    assert encoder.encoded["cat"] == 2
