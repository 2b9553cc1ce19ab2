"""Texts through open_clip's modules, without the padding that has no part in them, against its own `encode_text`."""

from typing import Any

import open_clip
import pytest
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import Transformer

from open_gem.method import kernels
from open_gem.text import FrozenModel
from open_gem.towers.open_clip import OpenClipText, adapt

VISION = CLIPVisionCfg(image_size=16, layers=1, width=16, head_width=8, patch_size=8)
SIZES: dict[str, Any] = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
EOS = 49407
TEXTS = ["a cat", "", "a photo of two old dogs, 3 birds and a bicycle", "word " * 40]

CAUSAL = {
    "CLIP": lambda: open_clip.CLIP(24, VISION, CLIPTextCfg(**SIZES)),
    "CLIP, end of text": lambda: open_clip.CLIP(24, VISION, CLIPTextCfg(**SIZES, pool_type="eos", eos_id=EOS)),
    "text tower apart": lambda: open_clip.CustomTextCLIP(24, VISION, CLIPTextCfg(**SIZES)),
    "linear projection": lambda: open_clip.CustomTextCLIP(24, VISION, CLIPTextCfg(**SIZES, proj_bias=True)),
}
OTHERS = {
    "not causal": lambda: open_clip.CustomTextCLIP(24, VISION, CLIPTextCfg(**SIZES, no_causal_mask=True)),
    "read at the last token": lambda: open_clip.CustomTextCLIP(24, VISION, CLIPTextCfg(**SIZES, pool_type="last")),
    "class token after the text": lambda: open_clip.CustomTextCLIP(24, VISION, CLIPTextCfg(**SIZES, embed_cls=True)),
}


@pytest.fixture
def lengths(monkeypatch) -> list[int]:
    """The number of tokens in each pass through a text transformer."""
    seen = []
    theirs = Transformer.forward

    def forward(self, x, attn_mask=None):
        seen.append(x.shape[1])
        return theirs(self, x, attn_mask=attn_mask)

    monkeypatch.setattr(Transformer, "forward", forward)
    return seen


def model(make) -> FrozenModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return adapt(make().eval(), SimpleTokenizer(context_length=SIZES["context_length"]))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS[:3], TEXTS], ids=["short", "mixed", "full"])
def test_padding_is_left_out_and_nothing_changes(name, texts, lengths):
    backbone = model(CAUSAL[name])
    with torch.no_grad():
        expected = backbone.model.encode_text(backbone.text.tokenizer(texts), normalize=True)
    lengths.clear()
    torch.testing.assert_close(backbone.encode_text(texts), expected, rtol=0, atol=2e-5)
    longest = max(int(row.argmax()) for row in backbone.text.tokenizer(texts)) + 1
    assert lengths == [longest]


@pytest.mark.parametrize("name", OTHERS)
def test_where_padding_counts_it_stays(name, lengths):
    backbone = model(OTHERS[name])
    with torch.no_grad():
        expected = backbone.model.encode_text(backbone.text.tokenizer(TEXTS[:2]), normalize=True)
    lengths.clear()
    torch.testing.assert_close(backbone.encode_text(TEXTS[:2]), expected, rtol=0, atol=1e-6)
    assert lengths == [SIZES["context_length"] + (name == "class token after the text")]


def test_the_librarys_own_pass_runs_without_kernels(monkeypatch, lengths):
    monkeypatch.setenv(kernels.SWITCH, "0")
    backbone = model(CAUSAL["CLIP"])
    assert isinstance(backbone.text, OpenClipText)
    with torch.no_grad():
        expected = backbone.model.encode_text(backbone.text.tokenizer(["a cat"]), normalize=True)
    assert torch.equal(backbone.encode_text(["a cat"]), expected)
    assert set(lengths) == {SIZES["context_length"]}


def test_what_watches_the_text_half_is_called():
    backbone = model(CAUSAL["text tower apart"])
    backbone.model.text.register_forward_hook(lambda module, given, made: made + 1)
    with torch.no_grad():
        expected = backbone.model.encode_text(backbone.text.tokenizer(["a cat"]), normalize=True)
    torch.testing.assert_close(backbone.encode_text(["a cat"]), expected)
    backbone = model(CAUSAL["CLIP"])
    backbone.model.encode_text = lambda tokens: torch.ones(len(tokens), 4)
    assert torch.equal(backbone.encode_text(["a cat"]), torch.full((1, 4), 0.5))


def test_thousands_of_texts_are_encoded_with_others_of_their_length(lengths):
    backbone = model(CAUSAL["CLIP"])
    texts = ["a cat", "word " * 30] * 300
    both = backbone.encode_text(texts)
    assert lengths == [4, 20, 20]
    torch.testing.assert_close(both[::2], both[:1].expand(300, -1), rtol=0, atol=2e-5)
    torch.testing.assert_close(both[1::2], both[1:2].expand(300, -1), rtol=0, atol=2e-5)
    assert (both[0] - both[1]).abs().max() > 0.1
