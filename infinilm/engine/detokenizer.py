"""The text of one sequence as its tokens come, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from infinilm_hookspecs import Processor
from infinilm_hookspecs.types import TokenStream

_MAX_UNDECIDED_TOKENS = 8


class Detokenizer:
    """Turns generated tokens into text that continues the prompt.

    Text that could be the beginning of a stop string is held back until that is decided. The stop string that is
    complete first wins, and of two that are complete at the same character the longer; so what is cut depends on the
    text alone, not on where tokens end. With `includes_stop` the stop string is part of the text.

    `context` is the end of the prompt: the stream reads it first, so that a tokenizer that drops the space before a
    text's first word keeps the one after the prompt. It is ignored when it ends in half a character.
    """

    def __init__(
        self,
        processor: Processor,
        stop: Sequence[str],
        context: Sequence[int] = (),
        *,
        includes_stop: bool = False,
        skips_special_tokens: bool = True,
    ) -> None:
        self.stop_reason: str | None = None
        self._processor = processor
        self._skips_special_tokens = skips_special_tokens
        self._includes_stop = includes_stop
        self._stop_strings = [_StopString(text) for text in sorted(stop, key=len, reverse=True)]
        self._pieces: list[str] = []
        self._num_taken = 0
        self._held = ""
        self._token_ids = list(context)
        self._stream = self._new_stream()
        self._streamed = ["".join(self._stream.put(token_id) for token_id in context)]
        if self._streamed[0] != self._decode(self._token_ids):
            self._stream, self._token_ids, self._streamed = self._new_stream(), [], []

    @property
    def text(self) -> str:
        """The text that is certain: no stop string in it, and no beginning of one until the sequence is finished."""
        return "".join(self._pieces)

    def take(self) -> str:
        """Return the text that became certain since the last call."""
        start, self._num_taken = self._num_taken, len(self._pieces)
        return "".join(self._pieces[start:])

    def put(self, token_id: int, *, is_stopping: bool = True) -> str:
        """Take one token and return the text that became certain. `is_stopping=False` looks for no stop string."""
        self._token_ids.append(token_id)
        text = self._stream.put(token_id)
        self._streamed.append(text)
        return self._append(text, is_stopping)

    def finish(self) -> str:
        """Return the rest of the text of all tokens that were put: what was held back is certain now."""
        streamed = "".join(self._streamed)
        text = self._decode(self._token_ids)
        rest = self._append(text[len(streamed) :] if text.startswith(streamed) else "", is_stopping=True)
        if self.stop_reason is None and self._held:
            self._pieces.append(self._held)
            rest, self._held = rest + self._held, ""
        return rest

    def _new_stream(self) -> TokenStream:
        if self._skips_special_tokens:
            return self._processor.stream()
        return _DecodingStream(self._processor)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._processor.decode(token_ids, skip_special_tokens=self._skips_special_tokens)

    def _append(self, text: str, is_stopping: bool) -> str:
        certain = self._cut(text) if self._stop_strings and is_stopping else text
        if certain:
            self._pieces.append(certain)
        return certain

    def _cut(self, text: str) -> str:
        """Return what of the held text and `text` comes before a stop string, or before what may become one."""
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            for stop in self._stop_strings:
                if stop.put(char):
                    self.stop_reason, self._held = stop.text, ""
                    return buffer[: end if self._includes_stop else end - len(stop.text)]
        num_certain = len(buffer) - max(stop.num_matched for stop in self._stop_strings)
        self._held = buffer[num_certain:]
        return buffer[:num_certain]


class _DecodingStream:
    """A stream that shows special tokens: the last tokens, decoded with and without the new one.

    Text that ends in U+FFFD may be half a character and waits, but not for more tokens than a character can have.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._context: list[int] = []
        self._undecided: list[int] = []

    def put(self, token_id: int) -> str:
        """Return the text that is certain now."""
        self._undecided.append(token_id)
        known = self._processor.decode(self._context, skip_special_tokens=False)
        text = self._processor.decode([*self._context, *self._undecided], skip_special_tokens=False)
        if text.endswith("\ufffd") and len(self._undecided) < _MAX_UNDECIDED_TOKENS:
            return ""
        self._context, self._undecided = self._undecided, []
        return text[len(known) :]


class _StopString:
    """How many characters at the end of what was put are the beginning of `text` (Knuth, Morris & Pratt 1977)."""

    __slots__ = ("_borders", "num_matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = [0]  # of text[: i + 1]: its longest proper prefix that is also its suffix
        for char in text[1:]:
            self._borders.append(self._extend(self._borders[-1], char))

    def put(self, char: str) -> bool:
        """Take one character and return whether `text` is complete."""
        self.num_matched = self._extend(self.num_matched, char)
        return self.num_matched == len(self.text)

    def _extend(self, length: int, char: str) -> int:
        while length and self.text[length] != char:
            length = self._borders[length - 1]
        return length + (self.text[length] == char)
