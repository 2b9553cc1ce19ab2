"""Text embeddings on disk: read by the next run, never for another model, tokenizer or template, and never an error."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_text import WORDS, expected
from test_text import CountingEncoder as Random
from torch import Tensor

from open_gem import text, text_store
from open_gem.text import PROBE, TextCache
from open_gem.text_store import TextStore

NAMES = [f"thing {number}" for number in range(12)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of stores; ten texts are many, and two prompts a query."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(text, "MANY", 10)
    monkeypatch.setattr(text_store, "ASKED", 2)
    return tmp_path / "open_gem" / "texts"


class CountingEncoder(Random):
    """Of the same weights every time."""

    def __init__(self, context: int = 10_000):
        super().__init__(context)
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)


def asked(encoder: CountingEncoder) -> set[str]:
    return set(encoder.encoded) - set(PROBE)


def test_the_next_run_reads_what_this_one_encoded():
    TextCache(CountingEncoder(), WORDS)(NAMES)
    encoder = CountingEncoder()
    assert torch.equal(TextCache(encoder, WORDS)([*NAMES, "new"]), expected(*NAMES, "new"))
    assert asked(encoder) == {"new"}


def test_a_few_texts_touch_no_disk(folder):
    TextCache(CountingEncoder(), WORDS)(NAMES[:9])
    assert not folder.exists()


def test_an_ensemble_counts_its_texts_and_has_a_file_of_its_own(folder):
    for templates in (["a {}.", "the {}"], ["a {}.", "that {}"]):
        first = TextCache(CountingEncoder(), templates)(NAMES[:5])
        encoder = CountingEncoder()
        assert torch.equal(TextCache(encoder, templates)(NAMES[:5]), first)
        assert not asked(encoder)
    assert len(list(folder.glob("*.sqlite"))) == 2


class OtherTokenizer(CountingEncoder):
    """Of the same weights, and of other embeddings."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return super().encode_text([f"{text}!" for text in texts])


class OtherAccents(CountingEncoder):
    """A tokenizer that differs where letters are not ASCII."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return super().encode_text([text.encode("ascii", "ignore").decode() for text in texts])


class OtherType(CountingEncoder):
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return super().encode_text(texts).half()


def test_what_another_model_encoded_is_not_read():
    TextCache(CountingEncoder(), WORDS)(NAMES)
    tuned = CountingEncoder()
    with torch.no_grad():
        tuned.model.weight += 1
    for encoder in (tuned, OtherTokenizer(), OtherAccents(), OtherType()):
        TextCache(encoder, WORDS)(NAMES)
        assert sum(encoder.encoded.values()) == len(NAMES) + len(PROBE), encoder


def test_a_prompt_that_is_cut_is_warned_of_by_every_run():
    for _ in range(2):
        with pytest.warns(UserWarning, match="longer than the model's context"):
            TextCache(CountingEncoder(context=9), WORDS)([*NAMES, "a long thing"])


def test_a_killed_run_keeps_what_it_had():
    class Killed(CountingEncoder):
        def encode_text(self, texts: Sequence[str]) -> Tensor:
            if "thing 11" in texts:
                raise KeyboardInterrupt
            return super().encode_text(texts)

    with pytest.raises(KeyboardInterrupt):
        TextCache(Killed(), WORDS)(NAMES)
    encoder = CountingEncoder()
    TextCache(encoder, WORDS)(NAMES)
    assert asked(encoder) == {"thing 10", "thing 11"}


def test_a_damaged_row_is_encoded_again(folder):
    TextCache(CountingEncoder(), WORDS)(NAMES)
    (file,) = folder.glob("*.sqlite")
    with sqlite3.connect(file) as database:
        database.execute("UPDATE texts SET row = zeroblob(8) WHERE prompt = 'thing 3'")
        database.execute("UPDATE texts SET row = x'00' WHERE prompt = 'thing 4'")
    encoder = CountingEncoder()
    assert torch.equal(TextCache(encoder, WORDS)(NAMES), expected(*NAMES))
    assert asked(encoder) == {"thing 3", "thing 4"}


def test_a_damaged_file_is_replaced(folder):
    TextCache(CountingEncoder(), WORDS)(NAMES)
    (file,) = folder.glob("*.sqlite")
    file.write_bytes(b"no database" * 1000)
    encoder = CountingEncoder()
    assert torch.equal(TextCache(encoder, WORDS)(NAMES), expected(*NAMES))
    TextCache(encoder := CountingEncoder(), WORDS)(NAMES)
    assert not asked(encoder)


def test_where_nothing_can_be_written_nothing_is_kept(folder, monkeypatch):
    folder.parent.mkdir()
    folder.write_text("in the way")
    assert torch.equal(TextCache(CountingEncoder(), WORDS)(NAMES), expected(*NAMES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert torch.equal(TextCache(CountingEncoder(), WORDS)(NAMES), expected(*NAMES))


def test_a_store_that_is_locked_is_tried_once(folder, monkeypatch):
    store = TextStore([b""], torch.zeros(2))
    store.save({"cat": torch.ones(2)})
    (file,) = folder.glob("*.sqlite")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0))
    other = connect(file)
    other.execute("BEGIN EXCLUSIVE")
    assert store.load(["cat"]) == {}
    other.rollback()
    other.close()
    assert store.load(["cat"]) == {}
    assert TextStore([b""], torch.zeros(2)).load(["cat"])["cat"].tolist() == [1, 1]


def test_without_users_nothing_is_kept(folder, monkeypatch):
    monkeypatch.delattr("os.getuid")  # as on Windows
    assert torch.equal(TextCache(CountingEncoder(), WORDS)(NAMES), expected(*NAMES))
    assert not folder.exists()


def test_the_least_recently_used_files_go_first(folder, monkeypatch):
    stores = [TextStore([bytes([number])], torch.zeros(1000)) for number in range(3)]
    for store in stores[:2]:
        store.save({"cat": torch.ones(1000)})
    assert stores[0].path is not None
    monkeypatch.setattr(text_store, "LIMIT", 2.5 * stores[0].path.stat().st_size)
    assert stores[0].load(["cat"]) and stores[1].load(["cat"])
    assert stores[0].load(["cat"])  # so the second is the oldest
    stores[2].save({"cat": torch.ones(1000)})
    assert [bool(store.load(["cat"])) for store in stores] == [True, False, True]
