"""The scanner against Python's `json`: the same texts are JSON, and they end at the same character."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.processors._json_scanner import JsonScanner, Verdict

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
PIECES = [*'{}[]:," \n\\0123456789-+.eEabx', "true", "false", "null", '"a"', '"a":', "\\u00e9", "\\n", "\t"]


def is_json(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def scan(text: str) -> tuple[int, Verdict]:
    """Return how many characters were taken, and the verdict on the last that was put."""
    scanner, verdict = JsonScanner(), Verdict.MORE
    for at, char in enumerate(text):
        verdict = scanner.put(char)
        if verdict is not Verdict.MORE:
            return at + (verdict is Verdict.DONE), verdict
    return len(text), verdict


@given(value=VALUES, indent=st.sampled_from([None, 0, 2]), is_ascii=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_value_ends_where_it_ends(value: object, indent: int | None, is_ascii: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
    expected = Verdict.ENDED if isinstance(value, int | float) and not isinstance(value, bool) else Verdict.DONE
    assert scan(text + " x") == (len(text), expected)


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=14), value=VALUES, at=st.integers(0, 40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_what_is_json_is_what_python_takes(pieces: list[str], value: object, at: int) -> None:
    whole = json.dumps(value)
    for text in ("".join(pieces), whole[:at] + "".join(pieces[:2]) + whole[at:]):
        taken, verdict = scan(text + " ")
        is_value = verdict in (Verdict.DONE, Verdict.ENDED) and not text[taken:].strip(" \t\n\r")
        assert is_value == is_json(text), text


@pytest.mark.parametrize(
    "text", ["01", "1.", "-", "+1", "1e", "tru ", "nan", "[1,]", '{"a":1,}', "{1:2}", "[1 2]", "]"]
)
def test_what_is_nearly_json_breaks(text: str) -> None:
    assert scan(text + " ")[1] is Verdict.BROKEN


@pytest.mark.parametrize("text", ['"\\x"', '"\\u12g4"', '"\n"', "{]", "[}", '{"a" 1', '{"a":}'])
def test_the_first_wrong_character_breaks_it(text: str) -> None:
    taken, verdict = scan(text)
    assert verdict is Verdict.BROKEN
    assert not is_json(text)
    assert taken < len(text)


def test_depth_costs_nothing() -> None:
    assert scan("[" * 100_000 + "]" * 100_000) == (200_000, Verdict.DONE)
