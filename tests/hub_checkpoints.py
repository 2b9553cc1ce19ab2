"""Tiny checkpoints in Hugging Face's format, with random weights and tokenizers made here: no download."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from open_gem.towers.check import randomize

KINDS = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "siglip": "SiglipModel",
    "blip": "BlipForImageTextRetrieval",
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
OTHER: dict[str, dict[str, Any]] = {
    "clip": {"projection_dim": 24},
    "metaclip_2": {"projection_dim": 24},
    "siglip": {},
    "blip": {"image_text_hidden_size": 24},
}
PICTURES = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255, "resample": 3}
WORDS = ["a", "photo", "of", "the", "cat", "dog", "red", "bus", "on", "grass", ",", ".", "un", "##seen", "##s", "cats"]


def configuration(kind: str, words: int, vision: dict[str, Any] | None = None, **text: Any) -> Any:
    """The configuration of a tiny model that knows so many words."""
    vision = {**VISION, **(vision or {})}
    if kind == "blip":
        vision["initializer_range"] = 0.02  # its default is 1e-10
        text = {"sep_token_id": 3, "bos_token_id": None, **text}
    if kind == "clip":
        text = {"bos_token_id": 49406, "eos_token_id": 49407, **text}
    if kind == "metaclip_2":
        text = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, **text}
    if kind == "siglip":
        text = {"bos_token_id": None, "eos_token_id": 1, **text}
    text = {**TEXT, "vocab_size": words, **text}
    return transformers.AutoConfig.for_model(kind, vision_config=vision, text_config=text, **OTHER[kind])


def model(kind: str, vision: dict[str, Any] | None = None, **text: Any) -> Any:
    """A model with random weights, no parameter of which is all zeros or ones."""
    config = configuration(kind, len(tokenizer(kind)), vision, **text)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, KINDS[kind])(config).eval()
    randomize(made)
    return made


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of the class that such models have."""
    return {"clip": clip_tokenizer, "blip": bert_tokenizer, "siglip": gemma_like, "metaclip_2": xlm_like}[kind]()


def clip_tokenizer() -> Any:
    """CLIP's own, of the vocabulary that comes with open_clip."""
    theirs = open_clip.tokenizer.SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): index for token, index in theirs.encoder.items()}
    merges: Any = list(theirs.bpe_ranks)
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def bert_tokenizer() -> Any:
    """A BERT tokenizer of a few words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return transformers.BertTokenizer(vocab={word: index for index, word in enumerate([*special, *WORDS])})


def gemma_like() -> Any:
    """As SigLIP 2 has: it tells upper from lower case, and ends each text with <eos>."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    return _fast([*special, *WORDS, "CAT", "Cat"], "<eos>", "$A <eos>", unk_token="<unk>", pad_token="<pad>")


def xlm_like() -> Any:
    """As MetaCLIP 2 has: <s> and </s> around each text, which are 0 and 2, with <pad> between them."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>"}
    return _fast([*special, *WORDS], "</s>", "<s> $A </s>", **tokens)


def _fast(words: list[str], end: str, template: str, **tokens: str) -> Any:
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    named = [(word, vocabulary[word]) for word in template.split() if word != "$A"]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, padding_side="right", **tokens)


def sentencepiece_tokenizer(folder: Path) -> Any:
    """As SigLIP 1 has, of a vocabulary trained on a few words."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        model_type="unigram",
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return transformers.SiglipTokenizer(str(folder / "spiece.model"))


def checkpoint(folder: Path, kind: str, made: Any = None, words: Any = None, **pictures: Any) -> str:
    """A folder as `save_pretrained` writes it: a model, its tokenizer, and what is said of pictures. Its name."""
    (model(kind) if made is None else made).save_pretrained(folder)
    (words or tokenizer(kind)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PICTURES, **pictures}))
    return f"local-dir:{folder}"


def as_downloaded(folder: Path, home: Path, repository: str) -> None:
    """Lay a folder out as the hub's client keeps a repository below `home`: blobs named by their hash, a snapshot of
    links to them, and the commit of the branch."""
    place, commit = home / "hub" / f"models--{repository.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
    snapshot = place / "snapshots" / commit
    for part in (snapshot, place / "blobs", place / "refs"):
        part.mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)


def offline(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line, or a program behind "-c", as a person without network runs it, with `home` for a cache."""
    if arguments[0] != "-c":
        arguments = ("-c", "from open_gem.cli import main; main()", *arguments)
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=home, check=False)


# The same weights under other names -----------------------------------------------------------------------------------


def from_open_clip(theirs: nn.Module, config: dict[str, Any]) -> Any:
    """A CLIPModel with the weights of open_clip's CLIP of configuration `config` (embed_dim, vision_cfg, text_cfg)."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    shared = {"hidden_act": act}
    made = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={
                **shared,
                "hidden_size": vision["width"],
                "intermediate_size": 4 * vision["width"],
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["width"] // vision["head_width"],
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
            },
            text_config={
                **shared,
                "hidden_size": text["width"],
                "intermediate_size": 4 * text["width"],
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "max_position_embeddings": text["context_length"],
                "vocab_size": text["vocab_size"],
                "bos_token_id": 49406,
                "eos_token_id": 49407,
            },
            projection_dim=config["embed_dim"],
        )
    )
    made.load_state_dict(dict(_renamed(name, value) for name, value in _unpacked(theirs.state_dict())))
    return made.eval()


def _unpacked(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """open_clip's weights, with queries, keys and values apart."""
    rows: list[tuple[str, Tensor]] = []
    for name, value in state.items():
        if name.endswith(("in_proj_weight", "in_proj_bias")):
            kind = name.rpartition("_")[2]
            parts = zip("qkv", value.chunk(3), strict=True)
            rows += [(name.replace(f"in_proj_{kind}", f"{part}_proj.{kind}"), rows_) for part, rows_ in parts]
        elif name != "attn_mask":
            rows.append((name, value))
    return rows


_OPEN_CLIP = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def _renamed(name: str, value: Tensor) -> tuple[str, Tensor]:
    value = value.T.contiguous() if name in ("visual.proj", "text_projection") else value
    for pattern, replacement in _OPEN_CLIP:
        name = re.sub(pattern, replacement, name)
    return name, value


def salesforce(made: Any, temperature: float = 0.05) -> dict[str, Tensor]:
    """The weights of a BLIP as Salesforce's pre-training saves them, with all that goes beside them there."""
    names: dict[str, str] = {
        "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
        "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
        "vision_model.embeddings.patch_embedding.weight": "visual_encoder.patch_embed.proj.weight",
        "vision_model.embeddings.patch_embedding.bias": "visual_encoder.patch_embed.proj.bias",
        "vision_model.post_layernorm.weight": "visual_encoder.norm.weight",
        "vision_model.post_layernorm.bias": "visual_encoder.norm.bias",
    }
    parts = {
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for index in range(made.config.vision_config.num_hidden_layers):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"vision_model.encoder.layers.{index}.{ours}.{kind}"] = (
                    f"visual_encoder.blocks.{index}.{theirs}.{kind}"
                )
    state = {names.get(str(name), str(name)): value for name, value in made.state_dict().items()}
    momentum = {re.sub(r"^(\w+?)\.", r"\1_m.", name): value + 1 for name, value in state.items() if "itm" not in name}
    decoder = {f"text_decoder.bert.{name}": value for name, value in made.text_encoder.state_dict().items()}
    beside = {
        "temp": torch.tensor(temperature),
        "image_queue": torch.zeros(24, 8),
        "text_queue": torch.zeros(24, 8),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        "text_encoder.embeddings.position_ids": torch.arange(16)[None],
    }
    return {**state, **momentum, **decoder, **beside}
