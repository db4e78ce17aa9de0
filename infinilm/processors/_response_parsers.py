"""Response parsers: which part of an answer's text is content, reasoning or a tool call, decided as it comes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from infinilm.processors._json_scanner import Verdict
from infinilm.processors._tool_calls import ToolCallMarkup, ToolCallReader
from infinilm_hookspecs import ParsedText


class ContentParser:
    """Takes all text for content."""

    reads_special_tokens = False

    def put(self, text: str) -> ParsedText:
        """Return `text` as content."""
        return ParsedText(content=text)

    def finish(self) -> ParsedText:
        """Return nothing: nothing is held back."""
        return ParsedText()


class AnswerParser:
    """Sorts an answer that may begin with reasoning and may call tools.

    Markers and the whitespace beside them are nobody's text. Text that may yet become a marker waits until that is
    decided; of a call whose JSON breaks, what no tool call stands for is content. Takes time linear in the text.
    """

    def __init__(
        self,
        *,
        reasoning: tuple[str, str] | None,
        tool_calls: ToolCallMarkup | None,
        tool_names: Collection[str] = (),
        starts_in_reasoning: bool = False,
        reads_special_tokens: bool = False,
    ) -> None:
        """Look for `reasoning` between two markers at the start, and for `tool_calls`; `None` is not looked for."""
        self.reads_special_tokens = reads_special_tokens
        self._reasoning_markers = reasoning
        self._markup = tool_calls
        self._tool_names = tool_names
        self._buffer = ""
        self._reader: ToolCallReader | None = None
        self._num_calls = 0
        self._content, self._reasoning = _Text(), _Text()
        self._parts: list[dict[str, Any]] = []
        self._step = self._start
        if starts_in_reasoning:
            self._step, self._reasoning.is_trimming = self._reason, True

    def put(self, text: str) -> ParsedText:
        """Return what is certain now."""
        self._buffer += text
        while self._step():
            pass
        return self._taken()

    def finish(self) -> ParsedText:
        """Return what was held back; without more text it is what it looks like."""
        if self._reader is not None:
            is_incomplete = self._reader.is_in_call or not self._reader.has_calls
            if is_incomplete and not self._reader.is_announced:
                self._content.put("".join(self._reader.held))
        elif self._step == self._reason:
            self._reasoning.put(self._buffer)
        else:
            self._content.put(self._buffer)
        self._buffer = ""
        self._reasoning.release()
        if not self._content.is_after_call:
            self._content.release()
        return self._taken()

    # Steps take what they understand from the buffer and return whether another may go on with the rest.

    def _start(self) -> bool:
        """Skip space; then comes reasoning, a bare call, or content."""
        self._skip_space()
        if self._reasoning_markers is not None:
            begin = self._reasoning_markers[0]
            if self._buffer.startswith(begin):
                self._buffer = self._buffer[len(begin) :]
                self._content.drop_space()
                self._reasoning.is_trimming = True
                self._step = self._reason
                return True
            if begin.startswith(self._buffer):
                return False
        self._step = self._begin_content
        return True

    def _reason(self) -> bool:
        assert self._reasoning_markers is not None
        is_found, text = self._take_until(self._reasoning_markers[1])
        self._reasoning.put(text)
        if is_found:
            self._reasoning.drop_space()
            self._content.is_trimming = True
            self._step = self._begin_content
        return is_found

    def _begin_content(self) -> bool:
        self._skip_space()
        if not self._buffer:
            return False
        if self._markup is not None and self._markup.may_be_bare and self._buffer[0] == "{":
            self._open("")
        else:
            self._step = self._read_content
        return True

    def _read_content(self) -> bool:
        if self._markup is None:
            self._content.put(self._buffer)
            self._content.release()
            self._buffer = ""
            return False
        is_found, text = self._take_until(self._markup.begin)
        self._content.put(text)
        if is_found:
            self._open(self._markup.begin)
        return is_found

    def _open(self, opening: str) -> None:
        assert self._markup is not None
        self._reader = ToolCallReader(self._markup, opening, self._num_calls, self._tool_names)
        self._step = self._read_calls

    def _read_calls(self) -> bool:
        reader = self._reader
        assert reader is not None
        for at, char in enumerate(self._buffer):
            verdict = reader.put(char)
            if reader.parts:
                self._content.drop_space()
                self._parts += reader.parts
                reader.parts.clear()
            if verdict is not Verdict.MORE:
                self._close(reader, self._buffer[at:])
                return True
        self._buffer = ""
        return False

    def _close(self, reader: ToolCallReader, rest: str) -> None:
        """Go on with content: what the reader holds, and `rest`."""
        held = "".join(reader.held)
        if reader.has_calls:
            self._content.is_after_call = True
        if reader.has_calls and not reader.is_in_call:
            rest = held + rest  # at most a piece of the closing marker: the next call may begin in it
        else:
            self._content.put(held)
        self._num_calls = reader.index + (reader.is_in_call and reader.is_announced)
        self._reader, self._buffer, self._step = None, rest, self._read_content

    def _skip_space(self) -> None:
        stripped = self._buffer.lstrip()
        self._content.put(self._buffer[: len(self._buffer) - len(stripped)])
        self._buffer = stripped

    def _take_until(self, marker: str) -> tuple[bool, str]:
        """Return whether `marker` is there, and the text before it, or before what may become it."""
        text, found, rest = self._buffer.partition(marker)
        if found:
            self._buffer = rest
            return True, text
        size = next(n for n in range(min(len(text), len(marker) - 1), -1, -1) if text.endswith(marker[:n]))
        self._buffer = text[len(text) - size :]
        return False, text[: len(text) - size]

    def _taken(self) -> ParsedText:
        parts, self._parts = self._parts, []
        return ParsedText(self._content.take(), self._reasoning.take()) + ParsedText(tool_calls=tuple(parts))


class _Text:
    """Text on its way out. Whitespace at its end waits: beside a marker it is not wanted."""

    def __init__(self) -> None:
        self.is_trimming = False
        """Whether whitespace that comes next is not wanted."""
        self.is_after_call = False
        """Whether nothing but whitespace has come since a call."""
        self._certain: list[str] = []
        self._space: list[str] = []

    def put(self, text: str) -> None:
        if self.is_trimming:
            text = text.lstrip()
        stripped = text.rstrip()
        if stripped:
            self._certain += [*self._space, stripped]
            self._space.clear()
            self.is_trimming = self.is_after_call = False
        if len(stripped) < len(text):
            self._space.append(text[len(stripped) :])

    def drop_space(self) -> None:
        self._space.clear()

    def release(self) -> None:
        self._certain += self._space
        self._space.clear()

    def take(self) -> str:
        text = "".join(self._certain)
        self._certain.clear()
        return text
