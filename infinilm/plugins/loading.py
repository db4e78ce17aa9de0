"""Where plugins come from, and in which order: in-tree, entry points by name, then what the user named.

What is registered last is asked first, so the last, most explicit word wins. What the user named and cannot load is an
error at once; what was discovered and fails is isolated, reported once, and listed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from infinilm.plugins.host import PluginManager, did_you_mean
from infinilm.plugins.report import Origin, PluginRecord, Status
from infinilm_hookspecs import InfinilmError, PluginError
from infinilm_hookspecs.markers import PROJECT_NAME

_IN_TREE_PACKAGES = ("platforms", "checkpoints", "models", "backends", "processors")

_log = logging.getLogger("infinilm")


def create_plugin_manager(*, plugins: Iterable[object] = (), autoload: bool = True) -> PluginManager:
    """Return a fresh plugin manager.

    `plugins` holds plugin objects and names as `-p` takes them: an entry point, a module, `module:attribute`, a `.py`
    file, or `no:NAME` to block one. `autoload=False` discovers no entry points; in-tree plugins are always there.
    Raises `PluginError` when something named here cannot be loaded.
    """
    pm = PluginManager()
    plugins = list(plugins)
    words = _last_words(plugins)
    in_tree = in_tree_modules()
    discovered = {point.name: point for point in sorted(entry_points(group=PROJECT_NAME), key=lambda p: p.name)}
    for name, module in in_tree.items():
        if name not in words:
            _load(pm, PluginRecord(name, Status.ACTIVE, Origin.IN_TREE), partial(importlib.import_module, module))
    for name, point in discovered.items() if autoload else ():
        if name not in words:
            _load_discovered(pm, point)
    known = {name: PluginRecord(name, Status.ACTIVE, Origin.IN_TREE) for name in in_tree}
    known |= {name: _record_of(point, Origin.ENTRY_POINT) for name, point in discovered.items()}
    for name in (name for name, wanted in words.items() if not wanted):
        if name not in known:
            raise PluginError(f"-p no:{name} blocks no plugin{did_you_mean(name, known)}")
        pm.note(replace(known[name], status=Status.BLOCKED))
    for plugin in plugins:
        if not isinstance(plugin, str):
            pm.register(plugin)
        elif not plugin.startswith("no:") and words.pop(plugin, False):
            _load_named(pm, plugin, in_tree, discovered)
    return pm


def in_tree_modules() -> dict[str, str]:
    """Return the module of every in-tree plugin by name: each public module of the packages that hold them."""
    found: dict[str, str] = {}
    for package in _IN_TREE_PACKAGES:
        folder = Path(__file__).parent.parent / package
        names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
        found |= {name: f"infinilm.{package}.{name}" for name in names if not name.startswith("_")}
    return found


def _last_words(plugins: Iterable[object]) -> dict[str, bool]:
    """Return for every name whether it is wanted or blocked; the last word on a name wins."""
    return {p.removeprefix("no:"): not p.startswith("no:") for p in plugins if isinstance(p, str)}


def _load(pm: PluginManager, record: PluginRecord, load: Callable[[], object]) -> None:
    """Import and register one plugin, and remember how long the import took."""
    started = time.perf_counter()
    plugin = load()
    elapsed = (time.perf_counter() - started) * 1e3
    pm.register(plugin, record=replace(record, import_ms=elapsed))


def _load_discovered(pm: PluginManager, point: EntryPoint) -> None:
    record = _record_of(point, Origin.ENTRY_POINT)
    try:
        _load(pm, record, point.load)
    except Exception as err:  # anything at all may go wrong in somebody's import, and must not take the host down
        reason = str(err) if isinstance(err, InfinilmError) else f"{type(err).__name__}: {err}"
        pm.note(replace(record, status=Status.FAILED, error=reason))
        _log.warning("plugin %s failed to load: %s", record.describe(), reason)


def _load_named(pm: PluginManager, name: str, in_tree: Mapping[str, str], discovered: Mapping[str, EntryPoint]) -> None:
    """Load what the user named. Raises `PluginError`, the cause chained."""
    record = PluginRecord(name, Status.ACTIVE, Origin.NAMED)
    load: Callable[[], object] = partial(_import_attribute, name, {*in_tree, *discovered})
    if name in discovered:
        record, load = _record_of(discovered[name], Origin.NAMED), discovered[name].load
    elif name in in_tree:
        load = partial(importlib.import_module, in_tree[name])
    elif name.endswith(".py"):
        record, load = replace(record, name=Path(name).name), partial(import_file, Path(name))
    try:
        _load(pm, record, load)
    except InfinilmError:
        raise
    except Exception as err:
        raise PluginError(f"plugin {name!r} cannot be loaded: {type(err).__name__}: {err}") from err


def _record_of(point: EntryPoint, origin: Origin) -> PluginRecord:
    dist = point.dist
    return PluginRecord(point.name, Status.ACTIVE, origin, dist.name if dist else None, dist.version if dist else None)


def import_file(path: Path) -> object:
    """Import a `.py` file as a module of its own. Raises `PluginError` when there is none."""
    if not path.is_file():
        raise PluginError(f"plugin file {str(path)!r} does not exist")
    module_name = f"infinilm_plugin_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _import_attribute(name: str, known: set[str]) -> object:
    """Import `module` or `module:attribute`. Raises `PluginError` saying what was looked for."""
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise PluginError(
            f"-p {name!r} names no plugin: an entry point, a module, module:attribute or a .py file is wanted "
            "(the prompt of a generation is --prompt)"
        )
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        if err.name != module_name.partition(".")[0] and err.name != module_name:
            raise
        raise PluginError(
            f"there is no plugin {name!r}: no entry point of group {PROJECT_NAME!r} has this name, and no module"
            f"{did_you_mean(name, known)}"
        ) from err
    for part in attribute.split(".") if attribute else ():
        found = getattr(found, part)
    return found
