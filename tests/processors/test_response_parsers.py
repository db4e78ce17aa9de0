"""Parsers of answers: every cut of a text gives the same, nothing is lost, and no piece of a marker gets out."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.processors import AnswerParser, ContentParser, ToolCallMarkup
from infinilm_hookspecs import ParsedText

TAGGED = ToolCallMarkup(begin="<tool_call>", end="</tool_call>")
LISTED = ToolCallMarkup(begin="[TOOL_CALLS]", name_end="[ARGS]", id_begin="[CALL_ID]")
BARE = ToolCallMarkup(begin="<|python_tag|>", separator=";", may_be_bare=True)
THINK = ("<think>", "</think>")
MARKUPS = {"tagged": TAGGED, "listed": LISTED, "bare": BARE, "none": None}


def make(markup: ToolCallMarkup | None, **options: Any) -> AnswerParser:
    return AnswerParser(**{"reasoning": THINK, "tool_calls": markup, "tool_names": {"f", "g"}, **options})


def parse(markup: ToolCallMarkup | None, *pieces: str, **options: Any) -> ParsedText:
    parser = make(markup, **options)
    total = ParsedText()
    for piece in pieces:
        total += parser.put(piece)
    return total + parser.finish()


def cut(text: str, at: list[int]) -> list[str]:
    bounds = [0, *sorted(min(position, len(text)) for position in at), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def call(index: int, name: str, arguments: str, **more: str) -> dict[str, Any]:
    return {"index": index, "name": name, "arguments": arguments, **more}


# ---------------------------------------------------------------- what answers mean

TAGGED_ANSWERS = {
    '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": null}]}}\n</tool_call>': (
        "",
        [call(0, "f", '{"a": [1, {"b": null}]}')],
    ),
    'Let me see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"arguments": {"x": 1}, '
    '"name": "g"}\n</tool_call>\n': ("Let me see.", [call(0, "f", "{}"), call(1, "g", '{"x": 1}')]),
    '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\\"}"}}</tool_call> and\nmore ': (
        " and\nmore ",
        [call(0, "f", '{"a": "</tool_call>\\"}"}')],
    ),
    # the end marker forgotten, at the end and before the next call
    '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}': (
        "",
        [call(0, "f", "{}"), call(1, "g", "{}")],
    ),
    '<tool_call>{"name": "f", "arguments": {}}</tool_ca': ("", [call(0, "f", "{}")]),
    '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "parameters": {}}]</tool_call>': (
        "",
        [call(0, "f", "{}"), call(1, "g", "{}")],
    ),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\u00e9\\"}"}</tool_call>': ("", [call(0, "f", '{"a": "é"}')]),
    '<tool_call>{"name": "f", "arguments": null}</tool_call>': ("", [call(0, "f", "{}")]),
    '<tool_call>{"name": "f"}</tool_call>': ("", [call(0, "f", "{}")]),
    '<tool_call>{"name": "unheard of", "why": [1.5], "arguments": {}}</tool_call>': ("", [call(0, "unheard of", "{}")]),
    '<tool_call>{"name": "f", "arguments": {},}</tool_call>': ("", [call(0, "f", "{}")]),
    # cut off
    '<tool_call>{"name": "f", "arguments": {"a": "wor': ("", [call(0, "f", '{"a": "wor')]),
    '<tool_call>{"name": "f", "arguments": {}, "id": "a': ("", [call(0, "f", "{}")]),
    'so <tool_call>\n{"name": "f", "argum': ('so <tool_call>\n{"name": "f", "argum', []),
    "so <tool_c": ("so <tool_c", []),
    # broken before the arguments: all of it is content; in them: what comes after
    '<tool_call>{"name": f}</tool_call> hm': ('<tool_call>{"name": f}</tool_call> hm', []),
    "<tool_call><function=f></tool_call>": ("<tool_call><function=f></tool_call>", []),
    '<tool_call>{"arguments": {}}</tool_call>': ('<tool_call>{"arguments": {}}</tool_call>', []),
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>': (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [],
    ),
    '<tool_call>{"name": "\\ud800", "arguments": {}}': ('<tool_call>{"name": "\\ud800", "arguments": {}}', []),
    '<tool_call>{"name": "f", "name": "g", "arguments": {}}': (
        '<tool_call>{"name": "f", "name": "g", "arguments": {}}',
        [],
    ),
    '<tool_call>{"name": "f", "arguments": {"a": 1,,}}</tool_call>': (
        ",}}</tool_call>",
        [call(0, "f", '{"a": 1,')],
    ),
    'a <tool_call>? <tool_call>{"name": "f", "arguments": {}}</tool_call>': ("a <tool_call>?", [call(0, "f", "{}")]),
    '<tool_call>{"name": "f", "arguments": {1<tool_call>{"name": "g", "arguments": {}}': (
        "1",
        [call(0, "f", "{"), call(1, "g", "{}")],
    ),
}
LISTED_ANSWERS = {
    '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]': (
        "",
        [call(0, "f", '{"x": 1}'), call(1, "g", "{}")],
    ),
    '[TOOL_CALLS][{"id": "abcdefghi", "name": "f", "arguments": {}}]': ("", [call(0, "f", "{}", id="abcdefghi")]),
    'On it.[TOOL_CALLS]f[ARGS]{"x": "[ARGS]"}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{"y": {}}': (
        "On it.",
        [call(0, "f", '{"x": "[ARGS]"}'), call(1, "g", '{"y": {}}', id="123456789")],
    ),
    '[TOOL_CALLS]f{"x": 1}': ("", [call(0, "f", '{"x": 1}')]),
    '[TOOL_CALLS]f [ARGS]{"x": 1}': ('[TOOL_CALLS]f [ARGS]{"x": 1}', []),
    '[TOOL_CALLS]{"x": 1}': ('[TOOL_CALLS]{"x": 1}', []),
    "[TOOL_CALLS]f[ARGS": ("[TOOL_CALLS]f[ARGS", []),
    "[TOOL_CALLS]f(x)": ("[TOOL_CALLS]f(x)", []),
    '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": 1}]': (', {"name": 1}]', [call(0, "f", "{}")]),
    '[TOOL_CALLS][{"name": "f", "arguments": {}}': ("", [call(0, "f", "{}")]),
}
BARE_ANSWERS = {
    ' {"name": "f", "parameters": {"x": "1"}}; {"type": "function", "name": "g", "parameters": {}}': (
        "",
        [call(0, "f", '{"x": "1"}'), call(1, "g", "{}")],
    ),
    '<|python_tag|>{"name": "f", "parameters": {}}': ("", [call(0, "f", "{}")]),
    '<|python_tag|>f.call(query="x")': ('<|python_tag|>f.call(query="x")', []),
    # JSON that is somebody's answer
    '{"name": "Bob", "parameters": {}}': ('{"name": "Bob", "parameters": {}}', []),
    '{"name": "f"}': ('{"name": "f"}', []),
    '{"name": "f", "age": 3, "parameters": {}}': ('{"name": "f", "age": 3, "parameters": {}}', []),
    '{"name": "f", "age": 3}': ('{"name": "f", "age": 3}', []),
    'So: {"name": "f", "parameters": {}}': ('So: {"name": "f", "parameters": {}}', []),
}
ANSWERS = [
    *((TAGGED, answer, *expected) for answer, expected in TAGGED_ANSWERS.items()),
    *((LISTED, answer, *expected) for answer, expected in LISTED_ANSWERS.items()),
    *((BARE, answer, *expected) for answer, expected in BARE_ANSWERS.items()),
]


@pytest.mark.parametrize(("markup", "answer", "content", "calls"), ANSWERS, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_answer_is_sorted(
    markup: ToolCallMarkup, answer: str, content: str, calls: list[dict[str, Any]], size: int
) -> None:
    pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
    assert parse(markup, *pieces) == ParsedText(content, "", tuple(calls))
    thought = ["<think>\n", "hm <tool_call>", "\n</think>\n\n"]
    assert parse(markup, *thought, *pieces) == ParsedText(content.lstrip(), "hm <tool_call>", tuple(calls))


REASONING = {
    "<think>\na  <b\n</think>\n\nc": ("c", "a  <b"),
    "<think>\n\n</think>\n\nc ": ("c ", ""),
    "\n<think>a</think>": ("", "a"),
    "<think>a </thin": ("", "a </thin"),
    "<think>a\n": ("", "a\n"),
    "<think": ("<think", ""),
    " no <think>x</think> ": (" no <think>x</think> ", ""),
    "x</think>y": ("x</think>y", ""),
    "": ("", ""),
    " \n": (" \n", ""),
}


@pytest.mark.parametrize(("answer", "expected"), REASONING.items())
@pytest.mark.parametrize("markup", [TAGGED, None])
def test_reasoning_comes_first(markup: ToolCallMarkup | None, answer: str, expected: tuple[str, str]) -> None:
    assert parse(markup, answer) == parse(markup, *answer) == ParsedText(*expected)


def test_an_answer_may_start_inside_its_reasoning() -> None:
    answer = 'a < b\n</think>\n\nc <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    expected = ParsedText("c", "a < b", (call(0, "f", "{}"),))
    assert parse(TAGGED, *answer, starts_in_reasoning=True) == expected
    assert parse(TAGGED, "\n a", starts_in_reasoning=True) == ParsedText(reasoning="a")


# ---------------------------------------------------------------- as it comes


def test_text_that_only_looks_like_a_marker_goes_out_once_it_is_certain() -> None:
    parser = make(TAGGED)
    assert parser.put("a <") == ParsedText("a")
    assert parser.put("tool") == ParsedText()
    assert parser.put("box") == ParsedText(" <toolbox")
    assert parser.put(" \n") == ParsedText()
    assert parser.put("b") == ParsedText(" \nb")
    assert parser.put(" <tool_call>") == ParsedText()
    assert parser.finish() == ParsedText(" <tool_call>")


def test_a_call_is_told_of_when_its_arguments_begin_and_they_follow_character_by_character() -> None:
    parser = make(TAGGED)
    assert parser.put('<tool_call>{"name": "f", "arguments": ') == ParsedText()
    assert parser.put("{") == ParsedText(tool_calls=(call(0, "f", "{"),))
    assert parser.put('"a": 1') == ParsedText(tool_calls=({"index": 0, "arguments": '"a": 1'},))
    assert parser.put("}}\n</tool_call>").tool_calls == ({"index": 0, "arguments": "}"},)
    assert parser.finish() == ParsedText()


def test_json_that_is_the_answer_goes_out_at_the_first_key_that_no_call_has() -> None:
    parser = make(BARE)
    assert parser.put('{"name": "f", "age"') == ParsedText()
    assert parser.put(": ") == ParsedText('{"name": "f", "age":')
    assert make(BARE).put('{"name": "Bob", ') == ParsedText('{"name": "Bob",')


def test_without_tools_whitespace_does_not_wait() -> None:
    parser = make(None)
    assert parser.put("a ") == ParsedText("a ")
    assert parser.put("\n<tool_call>") == ParsedText("\n<tool_call>")


@pytest.mark.parametrize("text", [" ", "<tool_call>", '<tool_call>{"', "<", "x", "<tool_call>{", "</think>", "</"])
def test_what_waits_in_the_buffer_is_never_more_than_a_piece_of_a_marker(text: str) -> None:
    """So the time an answer takes is linear, whatever it repeats."""
    for options in ({}, {"starts_in_reasoning": True}):
        parser = make(TAGGED, **options)
        for _ in range(200):
            parser.put(text)
            assert len(parser._buffer) < len("</tool_call>")


def test_all_of_it_is_content_to_the_parser_of_a_model_nobody_knows() -> None:
    parser = ContentParser()
    assert parser.put("<think>x ") + parser.finish() == ParsedText("<think>x ")


# ---------------------------------------------------------------- properties

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<tool", "_call>", "<", "</", "<think>", "</think>", "th", "ink>", "[TOOL_CALLS]"),
    *(
        "[TOOL",
        "_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        ";",
        '"',
        "\\",
        "\\u00",
    ),
    *(
        '"name"',
        '"f"',
        '"arguments"',
        '"parameters"',
        '"id"',
        '{"name": "f", "arguments": {',
        '{"x": 1}',
        "null",
        "1",
        "-",
    ),
    *(" ", "\n", "a", "é", "f", "}}"),
]
FUZZ = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
CUTS = st.lists(st.integers(0, 200), max_size=12)


def is_subsequence(text: str, whole: str) -> bool:
    characters = iter(whole)
    return all(char in characters for char in text)


@pytest.mark.parametrize("markup", MARKUPS.values(), ids=MARKUPS)
@given(text=FUZZ, at=CUTS, starts_in_reasoning=st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_every_cut_of_a_text_gives_the_same_and_invents_nothing(
    markup: ToolCallMarkup | None, text: str, at: list[int], starts_in_reasoning: bool
) -> None:
    whole = parse(markup, text, starts_in_reasoning=starts_in_reasoning)
    assert parse(markup, *cut(text, at), starts_in_reasoning=starts_in_reasoning) == whole
    assert parse(markup, *text, starts_in_reasoning=starts_in_reasoning) == whole
    assert is_subsequence(whole.content, text)
    assert is_subsequence(whole.reasoning, text)
    assert [part["index"] for part in whole.tool_calls] == list(range(len(whole.tool_calls)))
    assert all(part["name"] for part in whole.tool_calls)


@pytest.mark.parametrize("markup", MARKUPS.values(), ids=MARKUPS)
@given(text=FUZZ, at=CUTS)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_text_without_a_whole_opening_marker_is_content_to_the_last_space(
    markup: ToolCallMarkup | None, text: str, at: list[int]
) -> None:
    for marker in (THINK[0], *([markup.begin] if markup else ["<think>"])):
        text = text.replace(marker, "")
    if any(marker in text for marker in (THINK[0], markup.begin if markup else "<think>")) or text.lstrip()[:1] == "{":
        text = "- " + text.replace("<", "").replace("[", "")
    assert parse(markup, *cut(text, at)) == ParsedText(text)


ARGUMENTS = st.dictionaries(st.text(max_size=4), st.integers() | st.text() | st.lists(st.booleans()), max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["f", "g"]), ARGUMENTS), max_size=3)
WORDS = st.text(alphabet="ab<>[/ \n", max_size=12).map(str.strip)


def write_tagged(name: str, arguments: str) -> str:
    return f'\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def write_named(name: str, arguments: str) -> str:
    return f"[TOOL_CALLS]{name}[ARGS]{arguments}"


@pytest.mark.parametrize(("markup", "write"), [(TAGGED, write_tagged), (LISTED, write_named)])
@given(reasoning=WORDS, content=WORDS, calls=CALLS, is_ascii=st.booleans(), at=CUTS)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_a_model_meant_comes_back(
    markup: ToolCallMarkup, write: Any, reasoning: str, content: str, calls: Any, is_ascii: bool, at: list[int]
) -> None:
    written = [(name, json.dumps(arguments, ensure_ascii=is_ascii)) for name, arguments in calls]
    answer = f"<think>\n{reasoning}\n</think>\n\n{content}" + "".join(write(*item) for item in written)
    parsed = parse(markup, *cut(answer, at))
    assert (parsed.reasoning, parsed.content) == (reasoning, content)
    assert [(part["name"], part["arguments"]) for part in parsed.tool_calls] == written
    assert [json.loads(part["arguments"]) for part in parsed.tool_calls] == [arguments for _, arguments in calls]


@given(parts=st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3)), max_size=6), at=st.integers(0, 6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pieces_add_up_in_any_grouping(parts: list[tuple[int, str]], at: int) -> None:
    pieces = [ParsedText("c", "r", ({"index": index, "arguments": text},)) for index, text in parts]
    assert sum(pieces[at:], sum(pieces[:at], ParsedText())) == sum(pieces[:at], ParsedText()) + sum(
        pieces[at:], ParsedText()
    )
