"""What a plugin must be: the mistakes that pluggy lets pass in silence, each with a clear error."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection

from infinilm_hookspecs import PluginError, hookspecs
from infinilm_hookspecs.markers import PROJECT_NAME


def is_plugin(value: object) -> bool:
    """Return whether `value` has a function marked as a hook."""
    return bool(_marked(value))


def _marked(plugin: object) -> list[str]:
    return [a for a in dir(plugin) if hasattr(_member(plugin, a), f"{PROJECT_NAME}_impl")]


def check_hooks(plugin: object, name: str) -> None:
    """Refuse what pluggy accepts in silence. Raises `PluginError` saying what to do."""
    known = sorted(_hook_names())
    if inspect.isclass(plugin):
        raise PluginError(f"plugin {name!r} is the class {plugin.__qualname__}; register an instance of it")
    if type(plugin).__hash__ is None:
        raise PluginError(f"plugin {name!r} is unhashable, and plugins are kept in sets; give its class a __hash__")
    marked = _marked(plugin)
    for attribute in marked:
        options = getattr(_member(plugin, attribute), f"{PROJECT_NAME}_impl")
        hook = options.get("specname") or attribute
        if hook not in known:
            hint = did_you_mean(hook, known)
            raise PluginError(f"plugin {name!r} implements {hook!r}, which is no hook{hint}; hooks: {', '.join(known)}")
    if not marked:
        plain = [hook for hook in known if callable(_member(plugin, hook))]
        why = f"; {', '.join(plain)} lacks the @hookimpl of infinilm_hookspecs" if plain else ""
        raise PluginError(f"plugin {name!r} has no hook{why}")


def _member(plugin: object, attribute: str) -> object:
    """Return an attribute without running properties."""
    found = inspect.getattr_static(plugin, attribute, None)
    return None if isinstance(found, property) else getattr(plugin, attribute, None)


def _hook_names() -> set[str]:
    return {name for name, spec in vars(hookspecs).items() if hasattr(spec, f"{PROJECT_NAME}_spec")}


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return ", did you mean 'x'?" for the nearest of `known`, or "" where none is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
