"""What some modules remember from one forward to the next outside of any cache: a memory for every sequence.

Most models keep all there is to a sequence in the cache that is handed to them. A few write a recurrent state, or the
frequencies of the longest sequence seen, to attributes of their modules: with several sequences in turn, each would
then go on from another's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Place = tuple[Any, str]  # a module, and the attribute or buffer of it
_PLUMBING = ("_parameters", "_modules", "_buffers")


class ModuleMemory:
    """The attributes and buffers of `module`'s parts that forwards change, as far as it is known which they are."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._places: list[Place] = [place for part in module.modules() for place in _rope_places(part)]
        self._has_ropes = bool(self._places)
        self._fresh = [_copy(_read(place)) for place in self._places]

    @property
    def has_stateful_rope(self) -> bool:
        """Whether rotary frequencies depend on the longest sequence seen."""
        return self._has_ropes

    @property
    def is_empty(self) -> bool:
        """Whether nothing is remembered."""
        return not self._places

    def watch(self) -> dict[Place, Any]:
        """Return what all modules hold now, for `learn` to compare with."""
        return {(part, key): value for part in self._module.modules() for key, value in _holdings(part)}

    def learn(self, before: dict[Place, Any]) -> None:
        """Take for remembered whatever is no longer as it was before a forward; modules that are new have no past."""
        known = {part for part, _ in before}
        for part in known.intersection(self._module.modules()):
            for key, value in _holdings(part):
                was = before.get((part, key))
                if not _is_same(value, was) and not any(one is part and name == key for one, name in self._places):
                    self._places.append((part, key))
                    self._fresh.append(_copy(was))

    def save(self) -> list[Any]:
        """Return what is remembered now."""
        return [_read(place) if not self._has_ropes else _copy(_read(place)) for place in self._places]

    def restore(self, saved: list[Any] | None) -> None:
        """Remember what was saved; `None`: what there was before the first forward."""
        values = [_copy(value) for value in self._fresh] if saved is None else saved
        for (part, key), value in zip(self._places, values, strict=True):
            if key in part._buffers:
                part._buffers[key] = value
            else:
                part.__dict__[key] = value


def _holdings(part: Any) -> list[tuple[str, Any]]:
    plain = [(key, value) for key, value in vars(part).items() if key not in _PLUMBING and _can_be_state(value)]
    return [*plain, *part._buffers.items()]


def _can_be_state(value: object) -> bool:
    return value is None or (isinstance(value, Tensor | int | float) and not isinstance(value, bool))


def _is_same(value: Any, was: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(was, Tensor):
        return value is was
    return bool(value == was)


def _rope_places(part: Any) -> list[Place]:
    """Return the memory of a rotary embedding that chooses its frequencies by the length of a sequence."""
    kinds = getattr(part, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    if not any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in named):
        return []
    plain = [key for key in vars(part) if key.endswith("max_seq_len_cached") or key == "attention_scaling"]
    return [(part, key) for key in (*plain, *part._buffers)]


def _read(place: Place) -> Any:
    part, key = place
    return part._buffers[key] if key in part._buffers else vars(part).get(key)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
