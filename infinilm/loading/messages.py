"""Many messages that differ in numbers alone, as few: `model.layers.{0-31}.mlp.up_proj.weight is missing`.

Ranges of one line that are equal run together, `l.{0-31} from h.{0-31}` being 32 messages; different ones stand for
every combination.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

# Numbers as `str` writes them: "007" and "7" are not the same text.
_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,17})(?![0-9])")

Box = tuple[frozenset[int], ...]  # every combination of these numbers, one set for each kind of number in a message


def group_messages(messages: Iterable[str]) -> list[str]:
    """Return `messages`, those that differ only in numbers on as few lines as say exactly the same.

    Order of first appearance is kept, and what was said twice is said once.
    """
    groups: dict[tuple[str, ...], dict[tuple[int, ...], None]] = {}
    for message in messages:
        pieces = _NUMBER.split(message)
        groups.setdefault(tuple(pieces[::2]), {})[tuple(map(int, pieces[1::2]))] = None
    return [line for texts, rows in groups.items() for line in _fold(texts, list(rows))]


def _fold(texts: Sequence[str], rows: Sequence[tuple[int, ...]]) -> Iterator[str]:
    """Yield the lines for messages that have `texts` in common, and between them the numbers of one of `rows`."""
    columns = list(zip(*rows, strict=True))
    kinds = list(dict.fromkeys(columns))  # columns that are the same in every message are one kind
    kind_of = [kinds.index(column) for column in columns]
    boxes: list[Box] = [tuple(frozenset([n]) for n in row) for row in zip(*kinds, strict=True)]
    for kind in reversed(range(len(kinds))):
        boxes = _merge(boxes, kind)
    for box in boxes or [()]:
        for one in _without_equal_ranges(box):
            numbers = [_describe(one[kind]) for kind in kind_of]
            yield "".join(text + number for text, number in zip(texts, [*numbers, ""], strict=True))


def _merge(boxes: Iterable[Box], kind: int) -> list[Box]:
    """Make one of all boxes that differ in one kind of number alone."""
    merged: dict[Box, set[int]] = {}
    for box in boxes:
        merged.setdefault((*box[:kind], *box[kind + 1 :]), set()).update(box[kind])
    return [(*others[:kind], frozenset(numbers), *others[kind:]) for others, numbers in merged.items()]


def _without_equal_ranges(box: Box) -> Iterator[Box]:
    """Yield `box`, taken apart where two kinds have the same range: it would read as one."""
    for kind, numbers in enumerate(box):
        if len(numbers) > 1 and numbers in box[kind + 1 :]:
            for number in sorted(numbers):
                yield from _without_equal_ranges((*box[:kind], frozenset([number]), *box[kind + 1 :]))
            return
    yield box


def _describe(numbers: frozenset[int]) -> str:
    if len(numbers) == 1:
        return str(next(iter(numbers)))
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][-1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
