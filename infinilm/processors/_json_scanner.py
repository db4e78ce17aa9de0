"""One JSON value (RFC 8259), read character by character: where it ends, and the first character that breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum, auto

SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LITERALS = {word[0]: word for word in ("true", "false", "null")}


class Verdict(Enum):
    """What one more character makes of a value."""

    MORE = auto()
    DONE = auto()
    """The value ends with this character."""
    ENDED = auto()
    """The value ended before this character: only a number ends so."""
    BROKEN = auto()
    """With this character it is no JSON."""


class JsonScanner:
    """Follows one value without keeping it, however deep it is."""

    def __init__(self) -> None:
        self._read: Callable[[str], Verdict] = self._value
        self._open: list[str] = []  # the brackets and braces around the next character
        self._is_key = False
        self._text = ""  # the rest of a literal, or a number so far
        self._num_digits = 0

    def put(self, char: str) -> Verdict:
        """Take the next character."""
        return self._read(char)

    def _value(self, char: str) -> Verdict:
        if char in SPACE:
            return Verdict.MORE
        if char in "{[":
            self._open.append(char)
            return self._to(self._first_key if char == "{" else self._first_item)
        if char == '"':
            self._is_key = False
            return self._to(self._string)
        if char in _LITERALS:
            self._text = _LITERALS[char][1:]
            return self._to(self._literal)
        if char in "-0123456789":
            self._text = char
            return self._to(self._number)
        return Verdict.BROKEN

    def _first_item(self, char: str) -> Verdict:
        return self._close(char) if char == "]" else self._value(char)

    def _first_key(self, char: str) -> Verdict:
        return self._close(char) if char == "}" else self._key(char)

    def _key(self, char: str) -> Verdict:
        if char == '"':
            self._is_key = True
            return self._to(self._string)
        return Verdict.MORE if char in SPACE else Verdict.BROKEN

    def _colon(self, char: str) -> Verdict:
        if char == ":":
            return self._to(self._value)
        return Verdict.MORE if char in SPACE else Verdict.BROKEN

    def _after(self, char: str) -> Verdict:
        if char in SPACE:
            return Verdict.MORE
        if char == ",":
            return self._to(self._key if self._open[-1] == "{" else self._value)
        return self._close(char)

    def _close(self, char: str) -> Verdict:
        if {"{": "}", "[": "]"}[self._open[-1]] != char:
            return Verdict.BROKEN
        self._open.pop()
        return self._end()

    def _string(self, char: str) -> Verdict:
        if char == '"':
            return self._to(self._colon) if self._is_key else self._end()
        if char == "\\":
            return self._to(self._escape)
        return Verdict.BROKEN if char < " " else Verdict.MORE

    def _escape(self, char: str) -> Verdict:
        if char == "u":
            self._num_digits = 0
            return self._to(self._hex_digit)
        return self._to(self._string) if char in '"\\/bfnrt' else Verdict.BROKEN

    def _hex_digit(self, char: str) -> Verdict:
        self._num_digits += 1
        if char not in "0123456789abcdefABCDEF":
            return Verdict.BROKEN
        return self._to(self._string) if self._num_digits == 4 else Verdict.MORE

    def _literal(self, char: str) -> Verdict:
        if char != self._text[0]:
            return Verdict.BROKEN
        self._text = self._text[1:]
        return Verdict.MORE if self._text else self._end()

    def _number(self, char: str) -> Verdict:
        if char in "0123456789+-.eE":
            self._text += char
            return Verdict.MORE
        if not _NUMBER.fullmatch(self._text):
            return Verdict.BROKEN
        if not self._open:
            return Verdict.ENDED
        self._end()
        return self._after(char)

    def _end(self) -> Verdict:
        """A value is complete: the one that was asked for, or one inside it."""
        self._read = self._after
        return Verdict.MORE if self._open else Verdict.DONE

    def _to(self, read: Callable[[str], Verdict]) -> Verdict:
        self._read = read
        return Verdict.MORE
