"""`tekken.json`, Mistral's byte-level BPE, as the `tokenizer.json` that it amounts to.

The file lists tokens by rank, and tiktoken merges the two neighbours whose union ranks first. The `tokenizers` library
wants the merges: every way to cut a token into two others is one, and their order is the rank of what they make.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from infinilm.checkpoints import read_json_object
from infinilm_hookspecs import CheckpointError

# What files of the versions before v11 leave out: `DEPRECATED_SPECIAL_TOKENS` of mistral_common/tokens/tokenizers.
SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
LEFT_OUT_UP_TO = ("v3", "v7")


def to_tokenizer_json(path: Path) -> str:
    """Return the text of a `tokenizer.json`. Raises `CheckpointError` naming the file for one that is not tekken."""
    data = read_json_object(path)
    try:
        return _build(data).to_str()
    except CheckpointError as err:
        raise CheckpointError(f"{str(path)!r} {err}") from err
    except (LookupError, TypeError, ValueError, AttributeError, binascii.Error) as err:
        raise CheckpointError(f"{str(path)!r} is not a tekken tokenizer: {type(err).__name__}: {err}") from err


def _build(data: Mapping[str, Any]) -> Tokenizer:
    special = _special_tokens(data)
    size = data["config"]["default_vocab_size"] - len(special)
    tokens = [_spell(base64.b64decode(entry["token_bytes"])) for entry in data["vocab"][:size]]
    if len(tokens) != size or len(set(tokens)) != size:
        raise CheckpointError(f"lists {len(set(tokens))} tokens, and {size} are wanted")
    vocabulary = {token: rank for rank, token in enumerate(special)}
    vocabulary |= {token: rank for rank, token in enumerate(tokens, start=len(special))}
    if len(vocabulary) != size + len(special):
        raise CheckpointError("has a token that is spelt like a special one")
    # What is a token as a whole is never built up: tiktoken looks there first.
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(tokens), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(data["config"]["pattern"]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
    )
    return tokenizer


def _special_tokens(data: Mapping[str, Any]) -> list[str]:
    """Return the special tokens by rank, the ones that only hold a place included."""
    listed = data.get("special_tokens")
    if listed is None and data["config"].get("version") not in LEFT_OUT_UP_TO:
        raise CheckpointError(f"is of version {data['config'].get('version')!r} and has no special_tokens")
    by_rank = sorted(listed or (), key=lambda entry: entry["rank"])
    names = [str(entry["token_str"]) for entry in by_rank] if by_rank else [*SPECIAL_TOKENS]
    if by_rank and [entry["rank"] for entry in by_rank] != list(range(len(by_rank))):
        raise CheckpointError("has special_tokens whose ranks are not 0, 1, 2, ...")
    total = data["config"]["default_num_special_tokens"]
    return names + [f"<SPECIAL_{rank}>" for rank in range(len(names), total)]


def _merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for token in tokens:
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += sorted(
            [(a, b) for a, b in halves if a in ranks and b in ranks], key=lambda pair: (ranks[pair[0]], ranks[pair[1]])
        )
    return merges


def _spell(token: bytes) -> str:
    """Return a character for every byte of a token, as byte-level BPE spells it."""
    return token.decode("latin-1").translate(_CHARACTERS)


def _characters() -> dict[int, str]:
    """Return GPT-2's `bytes_to_unicode` (openai/gpt-2, src/encoder.py): printable bytes are themselves, and the others
    are numbered from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(256 + at) for at, byte in enumerate(others)}


_CHARACTERS = _characters()
