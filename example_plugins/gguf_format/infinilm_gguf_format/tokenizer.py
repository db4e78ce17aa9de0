"""The tokenizer in GGUF's metadata, as the `tokenizer.json` and `tokenizer_config.json` that it amounts to.

Two kinds: byte-level BPE ("gpt2"), which says by a name how text is cut into words, and sentencepiece's BPE ("llama"),
whose merges follow from the scores: sentencepiece joins the two neighbours that make the piece of the highest score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from infinilm_hookspecs import CheckpointError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # `TokenType` of the gguf package
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How words are cut, by `tokenizer.ggml.pre`; `None` is GPT-2's way, which `tokenizers` has built in.
WORDS = {
    "gpt-2": None,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
}
# Whose words are tokens before they are merged from parts, and whose texts begin with bos unless the file says no.
WHOLE_WORDS = {_LLAMA3, _TEKKEN}


def tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """Return the text of `tokenizer.json`. Raises `CheckpointError` for a kind that is not known."""
    if "tokenizer.huggingface.json" in metadata:
        return str(metadata["tokenizer.huggingface.json"])
    kind = metadata["tokenizer.ggml.model"]
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"tokenizer.ggml.model is {kind!r:.80}; known: gpt2, llama")
    tokens = _strings(metadata, "tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise CheckpointError(
            f"it lists {len(tokens)} tokens, {len(set(tokens))} of them different, {len(types)} types"
        )
    build = _byte_level if kind == "gpt2" else _sentencepiece
    try:
        tokenizer, has_bos = build(metadata, tokens, types)
        _add_tokens(tokenizer, tokens, types)
        _frame(tokenizer, metadata, tokens, has_bos)
        return tokenizer.to_str()
    except CheckpointError:
        raise
    except Exception as err:  # tokenizers raises nothing narrower
        raise CheckpointError(f"its tokens are no tokenizer: {err}") from err


def tokenizer_config_json(metadata: Mapping[str, Any]) -> str:
    """Return the text of `tokenizer_config.json`: special tokens by name, and the chat template."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    config: dict[str, Any] = {}
    for name, key in SPECIAL.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token_id) is int and 0 <= token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    templates = {"default": metadata.get("tokenizer.chat_template")}
    for name in metadata.get("tokenizer.chat_templates", ()):
        templates[name] = metadata.get(f"tokenizer.chat_template.{name}")
    given = [{"name": name, "template": text} for name, text in templates.items() if text]
    if given:
        config["chat_template"] = given[0]["template"] if len(given) == 1 else given
    return json.dumps(config)


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre")
    if name not in WORDS:
        raise CheckpointError(f"tokenizer.ggml.pre is {name!r:.80}; how words are cut is known of {', '.join(WORDS)}")
    words = WORDS[name]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _strings(metadata, "merges"))]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=words in WHOLE_WORDS))
    if words is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(words), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if words == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words in WHOLE_WORDS


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> tuple[Tokenizer, bool]:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocabulary, _merges(metadata, tokens, types), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    parts: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces = [normalizers.Prepend("▁"), *spaces]
        parts = [*parts, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer, True


def _merges(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[tuple[str, str]]:
    """Return every way to join two pieces into one, that of the highest score first."""
    scores = metadata.get("tokenizer.ggml.scores", ())
    if len(scores) != len(tokens):
        raise CheckpointError(f"it lists {len(scores)} scores for {len(tokens)} tokens")
    ranks = {token: at for at, token in enumerate(tokens) if types[at] == NORMAL}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=lambda token: -scores[ranks[token]]):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += sorted(
            [(a, b) for a, b in halves if a in ranks and b in ranks], key=lambda pair: (ranks[pair[0]], ranks[pair[1]])
        )
    return merges


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Have tokens that no text is cut into found whole: those that control, and those that a user defined."""
    for kind, is_special in (CONTROL, True), (USER_DEFINED, False):
        added = [token for token, its_type in zip(tokens, types) if its_type == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special) for token in added])


def _frame(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], has_bos: bool) -> None:
    """Put around a text what the file says belongs there."""
    around: dict[str, int] = {}
    for side, default in ("bos", has_bos), ("eos", False):
        token_id = metadata.get(f"tokenizer.ggml.{side}_token_id")
        if metadata.get(f"tokenizer.ggml.add_{side}_token", default) and token_id is not None:
            around[side] = token_id
    if around:
        pieces = [tokens[around["bos"]]] if "bos" in around else []
        pieces += ["$A"] + ([tokens[around["eos"]]] if "eos" in around else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pieces, special_tokens=[(tokens[token_id], token_id) for token_id in set(around.values())]
        )


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"tokenizer.ggml.{name} is no list of strings")
    return value
