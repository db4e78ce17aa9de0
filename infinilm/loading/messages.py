"""Many messages that differ in numbers alone, as one: `model.layers.{0-31}.mlp.up_proj.weight is missing`."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"\d+")


def group_messages(messages: Iterable[str]) -> list[str]:
    """Return `messages` with those that differ only in numbers, all of which run together, folded into one.

    Order of first appearance is kept. Messages in which two numbers vary independently are folded where they cover
    every combination; others stay as they are.
    """
    groups: dict[str, list[str]] = {}
    for message in dict.fromkeys(messages):
        groups.setdefault(_NUMBER.sub("#", message), []).append(message)
    folded: list[str] = []
    for alike in groups.values():
        one = _fold(alike)
        folded += alike if one is None else [one]
    return folded


def _fold(alike: list[str]) -> str | None:
    columns = list(zip(*(_NUMBER.findall(message) for message in alike), strict=True))
    varying = [set(column) for column in columns if len(set(column)) > 1]
    combinations = len({tuple(column) for column in columns if len(set(column)) > 1})
    expected = len(varying[0]) if varying and combinations == 1 else 1
    if combinations > 1:
        for distinct in {tuple(column): set(column) for column in columns if len(set(column)) > 1}.values():
            expected *= len(distinct)
    if expected != len(alike):
        return None
    ranges = iter(_ranges(column) for column in columns)
    return _NUMBER.sub(lambda _: next(ranges), alike[0])


def _ranges(column: Iterable[str]) -> str:
    numbers = sorted({int(number) for number in column})
    if len(numbers) == 1:
        return next(iter(column))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][-1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
