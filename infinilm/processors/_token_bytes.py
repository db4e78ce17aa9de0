"""The bytes a token stands for, by the kind of vocabulary: byte-level, sentencepiece with byte fallback, plain."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How tokens become bytes.

    With `is_exact`, the text of a sequence is the UTF-8 of its tokens' bytes, less `num_stripped` spaces at its
    start. Otherwise tokens change in company, and only the tokenizer's own decoder knows the text.
    """

    to_bytes: Callable[[str], bytes]
    is_exact: bool
    num_stripped: int = 0


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Look at the tokenizer's decoder."""
    steps = _decoder_steps(tokenizer)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Vocabulary(_byte_level, is_exact=True)
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        pattern, content = steps[0]["pattern"].get("String"), steps[0]["content"]
        strip: Mapping[str, Any] = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        if pattern is not None and strip["content"] == " " and strip["stop"] == 0:
            return Vocabulary(_byte_fallback(pattern, content), is_exact=True, num_stripped=strip["start"])
    replacement = next((step["replacement"] for step in steps if step["type"] == "Metaspace"), "")
    return Vocabulary(lambda token: token.replace(replacement or "\0", " ").encode(), is_exact=False)


def _decoder_steps(tokenizer: Tokenizer) -> Sequence[Mapping[str, Any]]:
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps: Sequence[Mapping[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _byte_fallback(pattern: str, content: str) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(match[1]) if match else token.replace(pattern, content).encode()

    return to_bytes


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTES_BY_CHARACTER[character] for character in token)
    except KeyError:  # an added token, which is written as it is
        return token.encode()


def _bytes_by_character() -> dict[str, int]:
    """Invert GPT-2's `bytes_to_unicode` (openai/gpt-2, src/encoder.py): printable bytes are themselves, the rest are
    numbered from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES_BY_CHARACTER = _bytes_by_character()
