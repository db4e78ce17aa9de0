"""Weight rules: what `remap_weight` returns, and how a table of templates becomes a function.

A table's keys are whole names. `{braces}` capture an integer, which the value may use again; the most literal key that
fits wins, and two that fit equally well are an error. A value is a template, `DROP`, or a callable that gets the weight
and the captured integers by name. A name that no key fits passes unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from string import Formatter
from typing import Final

from infinilm_hookspecs.errors import WeightError
from infinilm_hookspecs.state_dicts import RuleChain, StateDictRule
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
WeightRule = Callable[[Weight], Mapped] | Mapping[str, str | Drop | Callable[..., Mapped]] | StateDictRule | RuleChain

_INTEGER = re.compile(r"([0-9]+)")

Skeleton = tuple[str, ...]  # what stands around the integers of a name


class _Entry:
    """One key of a table: which names it fits and what it makes of them."""

    __slots__ = ("captures", "has_repeats", "key", "literals", "num_fixed", "skeleton", "template", "value")

    def __init__(self, key: object, value: object) -> None:
        if not isinstance(key, str):
            raise WeightError(f"key {key!r} of a weight table: a key is the whole name of a weight")
        self.key = key
        self.value = value
        pieces = [""]  # text and integers in turn, as `_INTEGER.split` returns them
        self.captures: dict[int, str] = {}  # which integer of the name is called what
        try:
            parts = list(Formatter().parse(key))
        except ValueError as err:
            raise self._malformed(str(err)) from err
        for literal, name, spec, conversion in parts:
            text, *more = _INTEGER.split(literal)
            pieces[-1] += text
            pieces += more
            if name is None:
                continue
            if not name.isidentifier() or spec or conversion:
                raise self._malformed(f"{{{name}}} must be a plain name in braces")
            self.captures[len(pieces) // 2] = name
            pieces += ["", ""]
        self._check_neighbours(pieces)
        self.skeleton: Skeleton = tuple(pieces[::2])
        numbers = pieces[1::2]
        self.literals = {at: number for at, number in enumerate(numbers) if at not in self.captures}
        free = set(self.captures.values())
        self.num_fixed = len(numbers) - len(free)  # integers of a name that are not free: the more, the more literal
        self.has_repeats = len(free) < len(self.captures)
        self._check_value()
        self.template = self._by_position(value) if isinstance(value, str) else None

    def _malformed(self, what: str) -> WeightError:
        return WeightError(f"key {self.key!r} of a weight table: {what}")

    def _check_neighbours(self, pieces: Sequence[str]) -> None:
        """Refuse two integers with nothing between them: no name says where one ends."""
        for at in range(1, len(pieces[::2]) - 1):
            if not pieces[2 * at]:
                one, other = self.captures.get(at - 1), self.captures.get(at)
                both = f"{{{one}}} and {{{other}}} touch" if one and other else f"{{{one or other}}} touches a digit"
                raise self._malformed(f"{both}, and nothing says where one number ends")

    def _check_value(self) -> None:
        where = f"weight table {self.key!r}: {self.value!r}"
        if isinstance(self.value, str):
            known = set(self.captures.values())
            try:
                wanted = {name for _, name, _, _ in Formatter().parse(self.value) if name is not None}
                if wanted <= known:
                    self.value.format(**dict.fromkeys(known, 0))
            except (ValueError, LookupError) as err:
                raise WeightError(f"{where}: {err}") from err
            if not wanted <= known:
                raise WeightError(f"{where} uses {', '.join(sorted(wanted - known))}, which the key lacks")
        elif not isinstance(self.value, Drop) and not callable(self.value):
            raise WeightError(f"{where} is neither a template, DROP, nor a callable")

    def _by_position(self, value: str) -> str:
        """Return a template with every name replaced by where its integer stands: `str.format` fills that in faster."""
        positions = {name: at for at, name in reversed(self.captures.items())}
        text = ""
        for literal, name, spec, conversion in Formatter().parse(value):
            text += literal.replace("{", "{{").replace("}", "}}")
            if name is not None:
                conversion, spec = f"!{conversion}" if conversion else "", f":{spec}" if spec else ""
                text += f"{{{positions[name]}{conversion}{spec}}}"
        return text

    def fits(self, numbers: Sequence[str]) -> bool:
        """Return whether the captures of a name with this skeleton and these literals agree with each other."""
        if not self.has_repeats:
            return True
        seen: dict[str, str] = {}
        return all(seen.setdefault(name, numbers[at]) == numbers[at] for at, name in self.captures.items())

    def map(self, weight: Weight, numbers: Sequence[str]) -> Mapped:
        """Return what the value makes of a weight whose name fits."""
        if self.template is not None:
            return weight.rename(self.template.format(*map(int, numbers)))
        if isinstance(self.value, Drop):
            return self.value
        captured = {name: int(numbers[at]) for at, name in self.captures.items()}
        mapped: Mapped = self.value(weight, **captured)  # type: ignore[operator]  # _check_value saw that it is callable
        return mapped


_Shelf = dict[tuple[str, ...], list[_Entry]]
_Shelves = Sequence[tuple[tuple[int, tuple[int, ...]], _Shelf]]
_Direct = tuple[Callable[[Sequence[str]], object], Mapping[object, _Entry]]
"""What of a name's integers to look at, and the one entry for every value of it."""


class _Table:
    """The entries of a table by skeleton, then by the integers that are literal: few have to be tried for a name."""

    def __init__(self, rule: Mapping[str, object]) -> None:
        # skeleton -> (how literal, which integers are) -> those integers -> entries
        shelves: dict[Skeleton, dict[tuple[int, tuple[int, ...]], _Shelf]] = {}
        for key, value in rule.items():
            entry = _Entry(key, value)
            shelf = shelves.setdefault(entry.skeleton, {}).setdefault((entry.num_fixed, tuple(entry.literals)), {})
            rivals = shelf.setdefault(tuple(entry.literals.values()), [])
            for rival in rivals:
                if _groups(rival) == _groups(entry):
                    raise WeightError(f"weight table: {rival.key!r} and {key!r} fit the same names")
            rivals.append(entry)
        self._shelves = {skeleton: sorted(found.items(), reverse=True) for skeleton, found in shelves.items()}
        self._direct = {skeleton: direct for skeleton, found in shelves.items() if (direct := _direct_entries(found))}

    def __call__(self, weight: Weight) -> Mapped:
        pieces = _INTEGER.split(weight.name)
        skeleton, numbers = tuple(pieces[::2]), pieces[1::2]
        direct = self._direct.get(skeleton)
        if direct is None:
            return self._choose(weight, self._shelves.get(skeleton, ()), numbers)
        pick, entries = direct
        entry = entries.get(pick(numbers))
        if entry is None:
            return None
        if entry.template is not None:
            return weight.rename(entry.template.format(*map(int, numbers)))
        return entry.map(weight, numbers)

    def _choose(self, weight: Weight, shelves: _Shelves, numbers: Sequence[str]) -> Mapped:
        """Map `weight` by the most literal entry that fits, of those of its skeleton."""
        best: _Entry | None = None
        for (num_fixed, literal), shelf in shelves:
            if best is not None and num_fixed < best.num_fixed:
                break
            for entry in shelf.get(tuple([numbers[at] for at in literal]), ()):
                if not entry.fits(numbers):
                    continue
                if best is not None:
                    raise WeightError(
                        f"weight table: {best.key!r} and {entry.key!r} both fit; give {weight.name!r} a key of its own"
                    )
                best = entry
        return None if best is None else best.map(weight, numbers)


def _direct_entries(shelves: Mapping[tuple[int, tuple[int, ...]], _Shelf]) -> _Direct | None:
    """Return how to look an entry up at once, as most skeletons allow; `None` where several may fit one name."""
    ((_, positions), shelf), *others = shelves.items()
    if others or any(len(rivals) > 1 or rivals[0].has_repeats for rivals in shelf.values()):
        return None
    if not positions:
        ((entry,),) = shelf.values()
        return (lambda numbers: None), {None: entry}
    return itemgetter(*positions), {itemgetter(*range(len(key)))(key): entry for key, (entry,) in shelf.items()}


def compile_rule(rule: WeightRule) -> Callable[[Weight], Mapped]:
    """Return a rule as a function of one weight. Raises `WeightError` for a table that is not well-formed."""
    if callable(rule):
        return rule
    if not isinstance(rule, Mapping):
        raise WeightError(f"a weight rule is a function or a table, not {rule!r}")
    return _Table(rule)


def _groups(entry: _Entry) -> list[int]:
    """Return for every capture the first integer that must equal it: what is left of a key without its names."""
    names = list(entry.captures.values())
    return [names.index(name) for name in names]
