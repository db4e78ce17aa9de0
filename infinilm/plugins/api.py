"""The functions model integrators know: load plugins by name for the process, and adapt a config by itself."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from infinilm.native import libraries
from infinilm.native.libraries import BackendLibrary
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


def load_backend_plugin(path: str | os.PathLike[str]) -> BackendLibrary:
    """Load the backend library at `path`, and return it: a plugin, to be registered or returned by `provide_backend`.

    Called by the user, it is for the process: every later manager has the library as a plugin, after the entry points.
    A plugin that calls it, while it is loaded or in a hook, speaks for the library itself. A file is loaded once,
    whatever its path is written like. Raises `PluginError` saying at which stage it was refused, and why.
    """
    library = libraries.open_library(path)
    if not registry.is_inside_plugin():
        registry.remember([library.path])
    return library


def load_backend_plugins(*paths: str | os.PathLike[str]) -> list[BackendLibrary]:
    """Load several backend libraries, in order; see `load_backend_plugin`."""
    return [load_backend_plugin(path) for path in paths]


def load_backend_plugins_from_env() -> list[BackendLibrary]:
    """Load the libraries in `INFINILM_BACKEND_PLUGINS`, separated by `os.pathsep` or commas.

    A plugin manager does so by itself; this is for those who want the libraries, or the error, sooner.
    """
    return load_backend_plugins(*libraries.paths_in_environment())


def loaded_backend_plugins() -> list[BackendLibrary]:
    """Return every backend library of this process, in the order they were loaded."""
    return libraries.loaded_libraries()


def adapt_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Run the lineage of a config and return its last raw config: what the family it came to knows it as."""
    adapted: dict[str, Any] = thaw(trace_lineage(create_plugin_manager(), config).last_raw())
    return adapted
