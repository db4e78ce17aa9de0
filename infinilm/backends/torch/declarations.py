"""What a module declares of its parameters, by templates of their names: how they are cut, which dtype they keep.

Any module in the tree may have `shards` and `dtypes`: mappings whose keys are names relative to it, in the syntax of
weight tables (`{braces}` capture an integer, the most literal key wins). No torch here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from infinilm_hookspecs import PluginError, Shard, Weight, WeightError
from infinilm_hookspecs.dtypes import ITEM_SIZES
from infinilm_hookspecs.rules import compile_rule

T = TypeVar("T")


def resolve(what: str, declared: Iterable[tuple[str, Mapping[str, T]]], names: Mapping[str, str]) -> dict[str, T]:
    """Return what is declared of each parameter.

    `declared` are mappings, each with the path its keys are relative to; `names` has every name a parameter goes by,
    with its first. Raises `PluginError` for a key that is malformed, that declares nothing, or that is there twice, and
    for a parameter of which its names say different things.
    """
    table: dict[str, T] = {}
    for path, mapping in declared:
        for key, value in mapping.items():
            whole = f"{path}.{key}" if path else key
            if whole in table:
                raise PluginError(f"{what}: {whole!r} is declared twice")
            table[whole] = value
    found: dict[str, T] = {}
    for name, key in _fit(what, list(table), list(names)).items():
        if found.setdefault(names[name], table[key]) != table[key]:
            raise PluginError(f"{what}: {name!r} and {names[name]!r} are one parameter, and are declared differently")
    return found


def _fit(what: str, keys: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the key that fits each name that has one."""
    hits: list[str] = []
    fitting: dict[str, str] = {}
    try:
        rule = compile_rule({key: partial(_note, hits, key) for key in keys})
        for name in names if keys else ():
            hits.clear()
            rule(Weight.stored(name, (), "float32"))
            if hits:
                fitting[name] = hits[0]
    except WeightError as err:
        raise PluginError(f"{what}: {err}") from err
    used = set(fitting.values())
    for key in (key for key in keys if key not in used):
        close = difflib.get_close_matches(re.sub(r"\{\w*\}", "0", key), names, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise PluginError(f"{what}: {key!r} declares no parameter{hint}")
    return fitting


def _note(hits: list[str], key: str, weight: Weight, **numbers: int) -> None:
    hits.append(key)


def check_shard(name: str, shape: Sequence[int], shard: object) -> None:
    """Raise `PluginError` where `shard` is none, or is not one for a parameter of `shape`."""
    if not isinstance(shard, Shard):
        raise PluginError(f"shards: {name!r} is declared {shard!r:.80}, and an infinilm_hookspecs.Shard is wanted")
    if not 0 <= shard.dim < len(shape):
        raise PluginError(f"shards: {name!r} is {list(shape)} and has no dimension {shard.dim} to cut")
    if shard.multiple < 1:
        raise PluginError(f"shards: {name!r} cannot be cut at multiples of {shard.multiple}")
    if shard.segments is not None and sum(shard.segments) != shape[shard.dim]:
        raise PluginError(
            f"shards: the segments {shard.segments} of {name!r} add up to {sum(shard.segments)}, and dimension "
            f"{shard.dim} is {shape[shard.dim]} long"
        )


def check_dtype(name: str, dtype: object) -> None:
    """Raise `PluginError` where `dtype` is not the name of one."""
    if dtype not in ITEM_SIZES:
        raise PluginError(f"dtypes: {name!r} is to be kept in {dtype!r}; known: {', '.join(ITEM_SIZES)}")
