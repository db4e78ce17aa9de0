"""Token streams: the text of a sequence that grows, without decoding it from the start again."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence

_MAX_UNDECIDED_TOKENS = 8


def decode_bytes(pieces: Iterable[bytes], num_stripped: int) -> str:
    """Return the text that a `ByteStream` of the same tokens makes, and half a character at the end as U+FFFD."""
    text = b"".join(pieces).decode("utf-8", "replace")
    num_spaces = len(text) - len(text.lstrip(" "))
    return text[min(num_spaces, num_stripped) :]


class ByteStream:
    """For vocabularies whose tokens are bytes: an incremental UTF-8 decoder, which keeps half a character back.

    Of the text, the first `num_stripped` characters are dropped as long as they are spaces.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], num_stripped: int) -> None:
        self._token_bytes = token_bytes
        self._num_stripped = num_stripped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_id: int) -> str:
        """Return the text that is certain now."""
        text = self._decoder.decode(self._token_bytes(token_id))
        while self._num_stripped and text:
            if text[0] != " ":
                self._num_stripped = 0
            else:
                self._num_stripped -= 1
                text = text[1:]
        return text


class WindowStream:
    """For any other tokenizer: decode the last tokens with and without the new ones; the difference is their text.

    The window starts at the token whose text was last found whole, which gives the decoder its context. Text that ends
    in U+FFFD may be half a character and waits, but not for more tokens than a character can have.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._undecided: list[int] = []

    def put(self, token_id: int) -> str:
        """Return the text that is certain now."""
        self._undecided.append(token_id)
        text = self._decode(self._context + self._undecided)
        known = self._decode(self._context)
        is_whole = len(text) > len(known) and not text.endswith("\ufffd")
        if not is_whole and len(self._undecided) < _MAX_UNDECIDED_TOKENS:
            return ""
        if text != known:
            self._context = self._undecided
        self._undecided = []
        return text[len(known) :]
