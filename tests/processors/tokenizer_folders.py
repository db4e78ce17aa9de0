"""Folders with a tokenizer trained here, one per kind of vocabulary, and a checkpoint that shows their files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, again and again",
    "seven plus eight is fifteen; nine minus four is five\n\n",
    "Grüße aus Köln — ça va? Ελληνικά, русский язык, 日本語のテキスト",
    "emoji: 😀 👩‍👩‍👧 ✅   and    spaces\ttabs",
] * 4
SPECIAL = ["<s>", "</s>", "<|user|>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}\n{% endfor %}"


@dataclass
class FolderCheckpoint:
    """The part of a `Checkpoint` that processors look at."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.exists() else None


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Unigram with byte fallback and llama's decoder, over a corpus that lacks most characters."""
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyzé日"]
    words = [(word, -3.0) for word in ("▁", "▁the", "▁quick", "▁a", "▁▁", "qu", "ick")]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *bytes_, *letters, *words]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["<unk>", *SPECIAL])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "seven": 1, "plus": 2, "eight": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_level_in_a_sequence() -> Tokenizer:
    """Decodes as `byte_level` does, by a decoder that is not recognised."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "word_piece": word_piece,
    "words": words,
    "byte_level_in_a_sequence": byte_level_in_a_sequence,
}


def write_folder(path: Path, tokenizer: Tokenizer, **tokenizer_config: Any) -> FolderCheckpoint:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**config, **tokenizer_config}))
    return FolderCheckpoint(path)
