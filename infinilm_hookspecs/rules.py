"""Weight rules: what `remap_weight` returns, and how a table of templates becomes a function.

A table's keys are whole names. `{braces}` capture an integer, which the value may use again; the most literal key that
fits wins. A value is a template, `DROP`, or a callable that gets the weight and the captured integers by name. A name
that no key fits passes unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any, Final

from infinilm_hookspecs.errors import WeightError
from infinilm_hookspecs.weight import Weight


class Drop:
    """The type of `DROP`."""

    def __repr__(self) -> str:
        return "DROP"

    def __reduce__(self) -> str:
        return "DROP"


DROP: Final = Drop()
"""Says that a stored tensor is not wanted; beside weights in a sequence, that the rest of it is not."""

Mapped = Weight | Sequence[Weight | Drop] | Drop | None
WeightRule = Callable[[Weight], Mapped] | Mapping[str, str | Drop | Callable[..., Mapped]]

_INTEGER = re.compile(r"\d+")


class _Entry:
    """One key of a table: which names it fits and what it makes of them."""

    __slots__ = ("key", "literals", "pattern", "value")

    def __init__(self, key: str, value: object) -> None:
        self.key = key
        self.value = value
        names: list[str] = []
        pattern = ""
        try:
            parts = list(Formatter().parse(key))
        except ValueError as err:
            raise WeightError(f"key {key!r} of a weight table: {err}") from err
        for literal, name, spec, conversion in parts:
            pattern += re.escape(literal)
            if name is None:
                continue
            if not name.isidentifier() or spec or conversion:
                raise WeightError(f"key {key!r} of a weight table: {{{name}}} must be a plain name in braces")
            pattern += f"(?P={name})" if name in names else rf"(?P<{name}>\d+)"
            names.append(name)
        self.pattern = re.compile(pattern)
        self.literals = len(_INTEGER.findall("".join(literal for literal, *_ in parts)))
        self._check_value(names)

    def _check_value(self, names: list[str]) -> None:
        if isinstance(self.value, str):
            wanted = {name for _, name, _, _ in Formatter().parse(self.value) if name is not None}
            if not wanted <= set(names):
                missing = ", ".join(sorted(wanted - set(names)))
                raise WeightError(f"weight table {self.key!r}: {self.value!r} uses {missing}, which the key lacks")
        elif not isinstance(self.value, Drop) and not callable(self.value):
            raise WeightError(f"weight table {self.key!r}: {self.value!r} is neither a template, DROP, nor a callable")

    def skeleton(self) -> str:
        """Return the key with every integer, captured or literal, replaced by `#`."""
        parts = (literal + ("" if name is None else "0") for literal, name, _, _ in Formatter().parse(self.key))
        return _INTEGER.sub("#", "".join(parts))

    def map(self, weight: Weight, numbers: Mapping[str, int]) -> Mapped:
        """Return what the value makes of a weight whose name fits."""
        if isinstance(self.value, str):
            return weight.rename(self.value.format(**numbers))
        if isinstance(self.value, Drop):
            return self.value
        mapped: Mapped = self.value(weight, **numbers)  # type: ignore[operator]  # _check_value saw that it is callable
        return mapped


def compile_rule(rule: WeightRule) -> Callable[[Weight], Mapped]:
    """Return a rule as a function of one weight. Raises `WeightError` for a table that is not well-formed."""
    if callable(rule):
        return rule
    if not isinstance(rule, Mapping):
        raise WeightError(f"a weight rule is a function or a table, not {rule!r}")
    entries: dict[str, list[_Entry]] = {}
    for key, value in rule.items():
        entry = _Entry(key, value)
        rivals = entries.setdefault(entry.skeleton(), [])
        for rival in rivals:
            if rival.literals == entry.literals and _same_names(rival, entry):
                raise WeightError(f"weight table: {rival.key!r} and {key!r} fit the same names")
        rivals.append(entry)
    for rivals in entries.values():
        rivals.sort(key=lambda entry: -entry.literals)

    def run_table(weight: Weight) -> Mapped:
        for entry in entries.get(_INTEGER.sub("#", weight.name), ()):
            fit = entry.pattern.fullmatch(weight.name)
            if fit is not None:
                return entry.map(weight, {name: int(number) for name, number in fit.groupdict().items()})
        return None

    return run_table


def _same_names(one: _Entry, other: _Entry) -> bool:
    """Return whether two keys of one skeleton and as many literals differ in nothing but what they call integers."""

    def anonymous(key: str) -> list[tuple[Any, bool]]:
        return [(literal, name is not None) for literal, name, _, _ in Formatter().parse(key)]

    return anonymous(one.key) == anonymous(other.key)
