"""One answer's text as it comes: content, reasoning and tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

from infinilm.server.tools import ToolUse
from infinilm_hookspecs import ParsedText
from infinilm_hookspecs.types import ResponseParser


class Answer(Protocol):
    """Takes the text of one answer piece by piece. All it returns adds up to the answer."""

    def put(self, text: str) -> ParsedText:
        """Return what is certain now."""

    def finish(self) -> ParsedText:
        """Return what was held back: the answer has ended."""


def new_answer(tools: ToolUse, new_parser: Callable[[], ResponseParser]) -> Answer:
    """Return what reads one answer of a request that uses tools like that."""
    if tools.mode == "named":
        return _Arguments(tools.name or "")
    if tools.mode == "required":
        return _Calls()
    return new_parser() if tools.is_parallel else _FirstCallOnly(new_parser())


class _Arguments:
    """The arguments of one function, known by name."""

    def __init__(self, name: str) -> None:
        self._start = {"name": name}

    def put(self, text: str) -> ParsedText:
        call = {"index": 0, **self._start, "arguments": text}
        self._start = {}
        return ParsedText(tool_calls=(call,))

    def finish(self) -> ParsedText:
        return ParsedText()


class _Calls:
    """A JSON list of calls. Each is told when it is whole: before that, its name may still be to come."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._num_calls = 0

    def put(self, text: str) -> ParsedText:
        self._text += text
        calls = []
        while "}" in text and "{" in self._text[self._position :]:
            start = self._text.index("{", self._position)
            try:
                call, self._position = json.JSONDecoder().raw_decode(self._text, start)
            except (json.JSONDecodeError, RecursionError):
                break
            arguments = json.dumps(call["parameters"])
            calls.append({"index": self._num_calls, "name": call["name"], "arguments": arguments})
            self._num_calls += 1
        return ParsedText(tool_calls=tuple(calls))

    def finish(self) -> ParsedText:
        """Return what is left of an answer that broke off inside a call as content: it is a call of nothing yet."""
        rest = self._text[self._position :].strip(" ,[]\n")
        return ParsedText(content=rest)


class _FirstCallOnly:
    """The first tool call and no other, as `parallel_tool_calls: false` wants it."""

    def __init__(self, parser: ResponseParser) -> None:
        self._parser = parser

    def put(self, text: str) -> ParsedText:
        return self._cut(self._parser.put(text))

    def finish(self) -> ParsedText:
        return self._cut(self._parser.finish())

    def _cut(self, parsed: ParsedText) -> ParsedText:
        first = tuple(call for call in parsed.tool_calls if call["index"] == 0)
        return ParsedText(parsed.content, parsed.reasoning, first)
