"""Byte-level BPE from `vocab.json` and `merges.txt`, for folders from before `tokenizer.json`.

The format is that of openai/gpt-2, `src/encoder.py`. The files do not say how a text is cut into words, which BPE never
merges across: the `tokenizer_class` of `tokenizer_config.json` does. A folder without one is GPT-2's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from infinilm.processors._checkpoint_json import read_json
from infinilm.processors._special_tokens import AddedToken, read_added_tokens, special_tokens
from infinilm_hookspecs import Checkpoint, CheckpointError

_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class _Words:
    """How a class of tokenizers cuts words. `pattern=None` is GPT-2's, which `tokenizers` has built in."""

    pattern: str | None = None
    is_composed: bool = False
    """Whether the text becomes NFC first."""


_WORDS = {
    "GPT2Tokenizer": _Words(),
    "CodeGenTokenizer": _Words(),
    "Qwen2Tokenizer": _Words(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        is_composed=True,
    ),
}


def open_byte_level_bpe(checkpoint: Checkpoint) -> Tokenizer:
    """Build the tokenizer. Raises `CheckpointError` for damaged files, and for a class whose words are not known."""
    config = read_json(checkpoint, "tokenizer_config.json")
    name = config.get("tokenizer_class") or "GPT2Tokenizer"
    words = _WORDS.get(str(name).removesuffix("Fast"))
    vocab_path, merges_path = checkpoint.file("vocab.json"), checkpoint.file("merges.txt")
    assert vocab_path is not None
    assert merges_path is not None
    if words is None:
        raise CheckpointError(
            f"{str(vocab_path.parent)!r} has no tokenizer.json, and how {name!r} cuts words is known of "
            f"{', '.join(_WORDS)} alone; write one with transformers: AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...), or take another tokenizer with --tokenizer"
        )
    tokenizer, added = _read_model(checkpoint, vocab_path, merges_path)
    if words.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(words, config.get("add_prefix_space") is True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_as_theirs(token) for token in added if token.is_special])
    tokenizer.add_tokens([_as_theirs(token) for token in added if not token.is_special])
    _frame(tokenizer, checkpoint)
    return tokenizer


def _read_model(checkpoint: Checkpoint, vocab_path: Path, merges_path: Path) -> tuple[Tokenizer, list[AddedToken]]:
    try:
        vocab, merges = models.BPE.read_file(str(vocab_path), str(merges_path))
        added = read_added_tokens(checkpoint, vocab.get)
        if not any(token.content == _END_OF_TEXT for token in added) and _END_OF_TEXT in vocab:
            added.append(AddedToken(_END_OF_TEXT, vocab[_END_OF_TEXT], is_special=True))
        # In the vocabulary they keep their ids; `tokenizers` would number them itself.
        return Tokenizer(models.BPE(vocab | {token.content: token.token_id for token in added}, merges)), added
    except CheckpointError:
        raise
    except Exception as err:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"{vocab_path} and {merges_path.name} are not a vocabulary and its merges: {err}; download them again"
        ) from err


def _pre_tokenizer(words: _Words, has_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    if words.pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=has_prefix_space)
    split = pre_tokenizers.Split(Regex(words.pattern), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=has_prefix_space, use_regex=False)]
    )


def _as_theirs(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.is_special,
    )


def _frame(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Put the special tokens around a text that `add_bos_token` and `add_eos_token` ask for."""
    config, names = read_json(checkpoint, "tokenizer_config.json"), special_tokens(checkpoint)
    around = {}
    for side in ("bos", "eos"):
        content = names.get(f"{side}_token", _END_OF_TEXT)
        token_id = tokenizer.token_to_id(content)
        if config.get(f"add_{side}_token") is True and token_id is not None:
            around[side] = (content, token_id)
    if around:
        pieces = [around["bos"][0] if "bos" in around else None, "$A", around["eos"][0] if "eos" in around else None]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[piece for piece in pieces if piece is not None], special_tokens=list(set(around.values()))
        )
