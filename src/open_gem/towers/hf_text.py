"""Text halves of the package transformers, of backbones and of models that were trained to localize."""

from typing import Any, ClassVar

from torch import Tensor

from open_gem.text import TextTower


class HfText(TextTower):
    """A model with `get_text_features`: texts are padded to the longest of their batch, and masked."""

    padding: ClassVar[str] = "longest"
    masked: ClassVar[bool] = True

    @property
    def length(self) -> int:
        """The most tokens of a text, special ones included."""
        return self.model.config.text_config.max_position_embeddings

    def clean(self, text: str) -> str:
        """Return a text as its tokenizer expects it."""
        return text

    def encode(self, texts: list[str]) -> Tensor:
        with self._lock:
            made = self.tokenizer(
                [self.clean(text) for text in texts],
                padding=self.padding,
                truncation=True,
                max_length=self.length,
                return_attention_mask=True,
                return_tensors="pt",
            )
        names = ("input_ids", "attention_mask") if self.masked else ("input_ids",)
        return self.embed({name: made[name].to(self.device) for name in names})

    def embed(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return text embeddings `(p, e)` of tokens `(p, n)`."""
        return self.model.get_text_features(**tokens).pooler_output

    def truncated(self, text: str) -> str:
        with self._lock:
            return cut_off(self.tokenizer, self.clean(text), self.length)


class SiglipText(HfText):
    """SigLIP: every text is padded to the full length, and the padding attended to, as in training.

    Both generations were trained on lower case. The tokenizer of the first changes texts to it, and drops punctuation;
    that of the second, Gemma's, does not.
    """

    padding = "max_length"
    masked = False

    def clean(self, text: str) -> str:
        return text.lower()


class Tipsv2Text(HfText):
    """TIPSv2: a mean over the words. Its temperature divides cosines."""

    @property
    def logit_scale(self) -> float:
        return 1 / self.model.temperature.detach().float().item()


class BlipText(HfText):
    """BLIP: a BERT without its cross-attention, 35 tokens, `text_proj` of its [CLS].

    The temperature is a weight of Salesforce's own files. transformers leaves it out; then it is 0.07, where training
    starts.
    """

    def __init__(self, model: Any, tokenizer: Any, temperature: float = 0.07):
        super().__init__(model, tokenizer)
        self.temperature = temperature

    @property
    def logit_scale(self) -> float:
        return 1 / self.temperature

    @property
    def length(self) -> int:
        return min(35, super().length)

    def embed(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.model.text_proj(self.model.text_encoder(**tokens).last_hidden_state[:, 0])


def cut_off(tokenizer: Any, text: str, length: int) -> str:
    """Return the end of `text` that exceeds `length` tokens of a transformers tokenizer, special ones included."""
    tokens = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return tokenizer.decode(tokens[length - tokenizer.num_special_tokens_to_add() :]).strip()
