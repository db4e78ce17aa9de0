"""What `register_model` and `load_plugin` are asked to keep: the only state of the process.

A spec registered while a plugin is loaded belongs to that plugin, and is given to every later manager that loads it.
One registered outside belongs to the process, and every later manager has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from infinilm.plugins.model_spec import ModelSpec
from infinilm_hookspecs import PluginError


@dataclass(slots=True)
class _Registry:
    """Specs by the plugin that registered them (`None`: the process), those of the process by the module that called
    `register_model`, and the names that `load_plugin` was given."""

    specs: dict[str | None, list[ModelSpec]] = field(default_factory=dict)
    callers: dict[str, list[ModelSpec]] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)


_registry = _Registry()
_loading: ContextVar[list[ModelSpec] | None] = ContextVar("specs registered by the plugin that is being loaded")
_in_hook: ContextVar[bool] = ContextVar("whether a plugin's hook is running", default=False)


def register_model(spec: ModelSpec | None = None, /, **fields: Any) -> ModelSpec:
    """Register a model, given as a spec or as the fields of one, and return the spec.

    Registering the same spec again is fine. Raises `PluginError` when another spec has one of its model types.
    """
    if (spec is None) == (not fields):
        raise PluginError("register_model takes a ModelSpec, or the fields of one")
    spec = ModelSpec(**fields) if spec is None else spec
    if not isinstance(spec, ModelSpec):
        raise PluginError(f"register_model takes a ModelSpec, not {spec!r:.80}")
    collected = _loading.get(None)
    if collected is not None:
        _add(collected, spec)
    else:
        _add(_registry.specs.setdefault(None, []), spec)
        _registry.callers.setdefault(sys._getframe(1).f_globals.get("__name__", ""), []).append(spec)
    return spec


def _add(specs: list[ModelSpec], spec: ModelSpec) -> None:
    if spec in specs:
        return
    for other in specs:
        taken = [model_type for model_type in spec.model_types if model_type in other.model_types]
        if taken:
            raise PluginError(f"model_type {taken[0]!r} is registered already, with another spec: {other!r:.200}")
    specs.append(spec)


def registered_model_types() -> list[str]:
    """Return every model type that was registered in this process, sorted."""
    return sorted({model_type for spec in _all_specs() for model_type in spec.model_types})


def get_model_spec(model_type: str) -> ModelSpec | None:
    """Return the spec registered for `model_type`, or `None`."""
    return next((spec for spec in _all_specs() if model_type.lower() in spec.model_types), None)


def _all_specs() -> Iterator[ModelSpec]:
    # The process's own word comes last and is asked first, as in a manager.
    for owner in reversed(list(_registry.specs)):
        yield from _registry.specs[owner]


@contextmanager
def collecting(owner: str) -> Iterator[list[ModelSpec]]:
    """Collect what is registered while the plugin `owner` is loaded. Nothing of it is kept when the body raises.

    A module registers only when it is first imported: what is yielded afterwards holds what it registered then.
    """
    collected: list[ModelSpec] = []
    token = _loading.set(collected)
    try:
        yield collected
    finally:
        _loading.reset(token)
    if collected:
        _registry.specs[owner] = list(collected)
    else:
        collected += _registry.specs.get(owner, [])


def registered_by(module: str) -> list[ModelSpec]:
    """Return the specs that code of `module` registered while no plugin was loaded."""
    return list(_registry.callers.get(module, []))


def process_specs() -> list[ModelSpec]:
    """Return the specs that no plugin registered, but the process."""
    return list(_registry.specs.get(None, []))


@contextmanager
def running_hook() -> Iterator[None]:
    """Take note that a plugin's hook is running: what it asks for is for itself."""
    token = _in_hook.set(True)
    try:
        yield
    finally:
        _in_hook.reset(token)


def is_inside_plugin() -> bool:
    """Return whether a plugin is being loaded, or one of its hooks is running."""
    return _in_hook.get() or _loading.get(None) is not None


def remember(names: Iterable[str]) -> None:
    """Have every later manager load the plugins `names` after its entry points."""
    _registry.named += [name for name in names if name not in _registry.named]


def remembered() -> list[str]:
    """Return the names `remember` was given."""
    return list(_registry.named)
