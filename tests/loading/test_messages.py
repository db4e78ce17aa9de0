"""Folding messages that differ in numbers: what is one line, and that no line says more or less than its messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.loading.messages import group_messages

_RANGE = re.compile(r"\{[0-9,-]+\}")


def expand(line: str) -> set[str]:
    """Return the messages a folded line stands for: equal ranges run together, different ones are independent."""
    ranges = list(dict.fromkeys(_RANGE.findall(line)))
    messages = set()
    for choice in product(*map(numbers_of, ranges)):
        chosen = dict(zip(ranges, choice, strict=True))
        messages.add(_RANGE.sub(lambda found, chosen=chosen: chosen[found[0]], line))  # type: ignore[misc]  # default
    return messages


def numbers_of(text: str) -> list[str]:
    found: list[str] = []
    for run in text.strip("{}").split(","):
        first, _, last = run.partition("-")
        found += [str(number) for number in range(int(first), int(last or first) + 1)]
    return found


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], []),
        (["a is missing"], ["a is missing"]),
        (["h.0.w", "h.0.w"], ["h.0.w"]),
        ([f"h.{i}.w is missing" for i in range(32)], ["h.{0-31}.w is missing"]),
        ([f"h.{i}.w" for i in (10, 1, 2, 0)], ["h.{0-2,10}.w"]),
        ([f"l.{i} from h.{i}" for i in range(3)], ["l.{0-2} from h.{0-2}"]),
        ([f"l.{i} from h.{i + 1}" for i in range(2)], ["l.0 from h.1", "l.1 from h.2"]),
        ([f"l.{i}.e.{e}" for i in range(2) for e in range(3)], ["l.{0-1}.e.{0-2}"]),
        ([f"l.{i}.e.{e}.{i}" for i in range(2) for e in range(3)], ["l.{0-1}.e.{0-2}.{0-1}"]),
        ([f"l.{i} is [4, 4]" for i in range(3)], ["l.{0-2} is [4, 4]"]),
        (["a.0", "b.0", "a.1", "c", "b.1"], ["a.{0-1}", "b.{0-1}", "c"]),
        (["h.007", "h.7"], ["h.007", "h.7"]),
        (["a#1", "a1#"], ["a#1", "a1#"]),
        (["x # 1", "x 2 1"], ["x # 1", "x 2 1"]),
    ],
)
def test_folded(messages: Sequence[str], expected: Sequence[str]) -> None:
    assert group_messages(messages) == expected


def test_one_gap_among_many_costs_a_line_and_not_all_of_them() -> None:
    messages = [f"l.{i}.e.{e}.w" for i in range(4) for e in range(8) if (i, e) != (2, 5)]
    assert group_messages(messages) == ["l.{0-1,3}.e.{0-7}.w", "l.2.e.{0-4,6-7}.w"]


def test_independent_ranges_that_look_alike_are_not_written_as_one() -> None:
    """Equal ranges on a line run together: 2 layers of 2 experts are four messages, and {0-1}.{0-1} would be two."""
    assert group_messages([f"l.{i}.e.{e}" for i in range(2) for e in range(2)]) == ["l.0.e.{0-1}", "l.1.e.{0-1}"]


WORDS = st.sampled_from(["h.", "w", " is ", "[", ", ", "]", "#", "01", "."])
NUMBERS = st.integers(0, 12).map(str) | st.sampled_from(["007", "10", "4294967296", "\N{ARABIC-INDIC DIGIT ONE}"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(WORDS | NUMBERS, min_size=1, max_size=6).map("".join), max_size=12),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), max_size=40),
)
def test_nothing_is_lost_and_nothing_invented(loose: list[str], cells: list[tuple[int, int, int]]) -> None:
    messages = [*loose, *(f"l.{i}.e.{e}.w{k}, from l.{i}" for i, e, k in cells)]
    lines = group_messages(messages)
    expanded = [expand(line) for line in lines]
    assert set().union(*expanded) == set(messages)
    assert sum(len(one) for one in expanded) == len(set(messages))  # and nothing is said twice


def test_order_is_that_of_the_first_of_each_kind() -> None:
    messages = ["z.1", "a", "z.2", "b.3", "z.3"]
    assert group_messages(messages) == ["z.{1-3}", "a", "b.3"]
