"""The functions model integrators know: load plugins by name for the process, and adapt a config by itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from infinilm.plugins import discovery, registry
from infinilm.plugins.host import PluginManager
from infinilm.plugins.lineage import trace_lineage
from infinilm.plugins.loading import create_plugin_manager, register_found
from infinilm.plugins.model_spec import thaw
from infinilm_hookspecs import InfinilmError, PluginError


def load_plugin(name_or_path: str) -> Any:
    """Load a plugin for the process, and return its module, object or function.

    Takes what `-p` takes: an entry point, a module, `module:attribute` or a `.py` file. Every later manager loads it
    after the entry points. Raises `PluginError`, the cause chained, and then remembers nothing.
    """
    candidate = discovery.by_name(name_or_path, discovery.installed() | discovery.in_tree())
    if candidate.refusal is not None:
        raise PluginError(f"plugin {candidate.record.describe()} is refused: {candidate.refusal}")
    try:
        with registry.collecting(candidate.record.reference or candidate.record.name) as specs:
            found = candidate.load()
            if inspect.isroutine(found):
                found()
        register_found(PluginManager(), found, candidate.record, specs)
    except InfinilmError:
        raise
    except Exception as err:
        raise PluginError(f"plugin {name_or_path!r} cannot be loaded: {type(err).__name__}: {err}") from err
    registry.remember([candidate.record.reference or candidate.record.name])
    return found


def load_plugins(*names_or_paths: str) -> list[Any]:
    """Load several plugins for the process, in order; see `load_plugin`."""
    return [load_plugin(name) for name in names_or_paths]


def adapt_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Run the lineage of a config and return its last raw config: what the family it came to knows it as."""
    adapted: dict[str, Any] = thaw(trace_lineage(create_plugin_manager(), config).last_raw())
    return adapted
