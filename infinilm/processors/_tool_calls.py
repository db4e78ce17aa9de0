"""Tool calls as models write them: the markup, as data, and a reader that follows it character by character."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infinilm.processors._json_scanner import SPACE, JsonScanner, Verdict
from infinilm_hookspecs import PluginError

_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)

_Steps = Generator[None, str, str]
"""Takes characters as long as they are its own, and returns the first that is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallMarkup:
    """How a family writes calls of tools.

    After `begin` comes a JSON object with a "name" and "arguments" or "parameters", or several: as a JSON array, or
    with `separator` between them; `end` closes them. Where there is `name_end`, a call may also be written as its name,
    then `id_begin` and an id if it has one, then `name_end` and the arguments; or as name and arguments alone. With
    `may_be_bare`, an answer may be calls without `begin`: then only tools that there are can be called, and every key
    must be known. Raises `PluginError` for markup that could not be found.
    """

    begin: str
    end: str = ""
    separator: str = ""
    name_end: str = ""
    id_begin: str = ""
    may_be_bare: bool = False

    def __post_init__(self) -> None:
        if not self.begin:
            raise PluginError(f"{self}: give begin, the marker before a call")
        if self.id_begin and not self.name_end:
            raise PluginError(f"{self}: an id stands between a name and name_end, which is missing")

    @property
    def markers(self) -> tuple[str, ...]:
        """What must be seen of an answer to read it."""
        return tuple(filter(None, (self.begin, self.end, self.name_end, self.id_begin)))


class _NoCallError(Exception):
    """The text is not what the markup says."""


class ToolCallReader:
    """Reads what follows one `begin`, up to the first character that does not belong to it.

    `held` is the text that no call stands for yet. `parts` are those of `ParsedText.tool_calls`, to be taken away.
    """

    def __init__(self, markup: ToolCallMarkup, opening: str, index: int, names: Collection[str]) -> None:
        """Begin with call number `index`. An empty `opening` is a bare call, which may be of tools `names` alone."""
        self.held = [opening]
        self.parts: list[dict[str, Any]] = []
        self.index = index
        self.is_in_call = False
        self.is_announced = False
        self._markup = markup
        self._is_bare = not opening
        self._names = names
        self._first = index
        self._name: str | None = None
        self._id: str | None = None
        self._arguments: list[str] | None = None  # what came of them before the name did
        self._is_taken = False  # whether a call stands for the character that was put last
        self._steps = self._read()
        next(self._steps)

    @property
    def has_calls(self) -> bool:
        """Whether a whole call was read."""
        return self.index > self._first

    def put(self, char: str) -> Verdict:
        """Take the next character, unless the verdict is ENDED or BROKEN: then it is somebody else's."""
        self._is_taken = False
        try:
            self._steps.send(char)
        except StopIteration:
            return Verdict.ENDED
        except _NoCallError:
            return Verdict.BROKEN
        if not self._is_taken:
            self.held.append(char)
        return Verdict.MORE

    def _read(self) -> _Steps:
        markup = self._markup
        char = yield from _skip_space((yield))
        if char == "[":
            char = yield from self._read_array()
        elif char == "{":
            char = yield from self._read_objects(char)
        elif markup.name_end:
            char = yield from self._read_named(char)
        else:
            raise _NoCallError
        if not markup.end:
            return char
        yield from self._expect([markup.end], (yield from _skip_space(char)))
        self._take()
        return (yield)

    def _read_array(self) -> _Steps:
        char = ","
        while char == ",":
            char = yield from self._read_object((yield from _skip_space((yield))))
            char = yield from _skip_space(char)
        if char != "]":
            raise _NoCallError
        self._take()
        return (yield)

    def _read_objects(self, char: str) -> _Steps:
        separator = self._markup.separator
        char = yield from self._read_object(char)
        while separator and (char := (yield from _skip_space(char))) == separator[0]:
            yield from self._expect([separator], char)
            char = yield from self._read_object((yield from _skip_space((yield))))
        return char

    def _read_object(self, char: str) -> _Steps:
        """Read one `{"name": ..., "arguments": ...}`."""
        self._start()
        if char != "{":
            raise _NoCallError
        char = yield from _skip_space((yield))
        while char != "}":
            key, char = yield from self._read_string(char)
            if self._is_bare and key not in _KEYS:
                raise _NoCallError
            char = yield from _skip_space(char)
            if char != ":":
                raise _NoCallError
            char = yield from self._read_member(key, (yield from _skip_space((yield))))
            char = yield from _skip_space(char)
            if char == ",":
                char = yield from _skip_space((yield))
            elif char != "}":
                raise _NoCallError
        self._finish_call()
        self._take()
        return (yield)

    def _read_member(self, key: str, char: str) -> _Steps:
        if key == "name" and self._name is None:
            name, char = yield from self._read_string(char)
            self._take_name(name)
            return char
        if key in _ARGUMENTS and self._arguments is None and not self.is_announced:
            return (yield from self._read_arguments(char))
        if key == "name" or key in _ARGUMENTS:
            raise _NoCallError
        if key == "id" and char == '"':
            self._id, char = yield from self._read_string(char)
            return char
        return (yield from self._read_value(char))[1]

    def _read_named(self, char: str) -> _Steps:
        """Read one `name[ARGS]{...}`."""
        self._start()
        markup = self._markup
        name, char = yield from _read_word(char)
        self._take_name(name)
        if char != "{":
            marker = yield from self._expect([markup.id_begin, markup.name_end], char)
            if marker == markup.id_begin:
                self._id, char = yield from _read_word((yield))
                yield from self._expect([markup.name_end], char)
            char = yield from _skip_space((yield))
        char = yield from self._read_arguments(char)
        self._finish_call()
        return char

    def _read_arguments(self, char: str) -> _Steps:
        """Read an object as it comes; or a string that holds one, or null, whole."""
        if char == "{":
            return (yield from self._read_object_of_arguments(char))
        text, char = yield from self._read_value(char)
        arguments = json.loads(text)
        if arguments is None:
            arguments = "{}"
        if not isinstance(arguments, str) or not _is_object(arguments):
            raise _NoCallError
        self._arguments = [arguments]
        if self._name is not None:
            self._announce()
        return char

    def _read_object_of_arguments(self, char: str) -> _Steps:
        scanner, verdict = JsonScanner(), Verdict.MORE
        self._arguments = []
        if self._name is not None:
            self._announce()
        while verdict is Verdict.MORE:
            verdict = scanner.put(char)
            if verdict is Verdict.BROKEN:
                raise _NoCallError
            self._take_argument(char)
            char = yield
        return char

    def _read_string(self, char: str) -> Generator[None, str, tuple[str, str]]:
        if char != '"':
            raise _NoCallError
        text, char = yield from self._read_value(char)
        value: str = json.loads(text)
        if not _is_text(value):
            raise _NoCallError
        return value, char

    def _read_value(self, char: str) -> Generator[None, str, tuple[str, str]]:
        """Read one value and return its text, and the character behind it."""
        scanner = JsonScanner()
        text: list[str] = []
        while True:
            verdict = scanner.put(char)
            if verdict is Verdict.BROKEN:
                raise _NoCallError
            if verdict is Verdict.ENDED:
                return "".join(text), char
            text.append(char)
            char = yield
            if verdict is Verdict.DONE:
                return "".join(text), char

    def _expect(self, markers: Sequence[str], char: str) -> Generator[None, str, str]:
        """Take the characters of a marker up to its last, and return which one it is."""
        text = char
        while text not in markers:
            if not any(marker.startswith(text) for marker in markers):
                raise _NoCallError
            text += yield
        return text

    def _start(self) -> None:
        self.is_in_call, self.is_announced = True, False
        self._name = self._id = self._arguments = None

    def _take(self) -> None:
        """Hold neither the character that was put last nor those before it."""
        self.held.clear()
        self._is_taken = True

    def _take_name(self, name: str) -> None:
        if not name or (self._is_bare and name not in self._names):
            raise _NoCallError
        self._name = name
        if self._arguments is not None:
            self._announce()

    def _take_argument(self, char: str) -> None:
        if self.is_announced:
            self.parts.append({"index": self.index, "arguments": char})
            self._take()
        elif self._arguments is not None:
            self._arguments.append(char)

    def _announce(self) -> None:
        arguments = "{}" if self._arguments is None else "".join(self._arguments)
        given_id: Mapping[str, str] = {"id": self._id} if self._id else {}
        self.parts.append({"index": self.index, **given_id, "name": self._name, "arguments": arguments})
        self.is_announced = True
        self.held.clear()

    def _finish_call(self) -> None:
        if self._name is None or (self._is_bare and not self.is_announced):
            raise _NoCallError
        if not self.is_announced:
            self._announce()
        self.is_in_call = False
        self.index += 1


def _skip_space(char: str) -> _Steps:
    while char in SPACE:
        char = yield
    return char


def _read_word(char: str) -> Generator[None, str, tuple[str, str]]:
    """Read a name or an id and return it, and the character behind it."""
    word = []
    while char.isalnum() or char in "_-.:/":
        word.append(char)
        char = yield
    return "".join(word), char


def _is_object(text: str) -> bool:
    try:
        return _is_text(text) and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _is_text(text: str) -> bool:
    """Return whether no half of an escaped pair is in `text`, which could not be written as UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
