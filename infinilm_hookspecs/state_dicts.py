"""Rules for what a rule of one weight cannot say: remappers of whole state dicts, and several rules in a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infinilm_hookspecs.rules import WeightRule
    from infinilm_hookspecs.weight import SymbolicTensor


@dataclass(frozen=True, slots=True)
class StateDictRule:
    """A rule over all weights of a stage at once, as remappers of state dicts are written.

    `function` is called with the weights by name and returns the dict that replaces it. A weight of which it uses
    nothing is dropped; `DROP` under a weight's name says that what it did not use of that one is not wanted.
    """

    function: Callable[[dict[str, SymbolicTensor]], Mapping[str, SymbolicTensor]]


@dataclass(frozen=True, slots=True)
class RuleChain:
    """Several rules of one stage, each seeing the names the one before made.

    `is_final` ends the walk: the rules of later stages are skipped.
    """

    rules: tuple[WeightRule, ...]
    is_final: bool = False
