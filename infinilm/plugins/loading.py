"""Loading plugins in order: in-tree, entry points by name, `INFINILM_PLUGINS`, what the user named, then objects.

What is registered last is asked first, so the last, most explicit word wins. What the user named and cannot load is an
error at once; what was discovered and fails is isolated, reported once, and listed. A plugin that fails leaves nothing
behind.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

from infinilm.native.libraries import BackendLibrary, paths_in_environment
from infinilm.plugins import discovery, registry
from infinilm.plugins.checks import did_you_mean, is_plugin
from infinilm.plugins.discovery import Candidate
from infinilm.plugins.host import PluginManager
from infinilm.plugins.model_spec import ModelSpec, ModelSpecs
from infinilm.plugins.report import Origin, PluginRecord, Status
from infinilm_hookspecs import InfinilmError, PluginError

if TYPE_CHECKING:
    from infinilm.plugins.fingerprint import Fingerprint

_log = logging.getLogger("infinilm")

_SLOW_IMPORT_MS = 2000


def create_plugin_manager(
    *, plugins: Iterable[object] = (), autoload: bool = True, like: Fingerprint | None = None
) -> PluginManager:
    """Return a fresh plugin manager.

    `plugins` holds plugin objects and names as `-p` takes them: an entry point, a module, `module:attribute`, a `.py`
    file, or `no:NAME` to block one. `autoload=False` discovers nothing and reads no environment; in-tree plugins are
    always there. `like` is another manager's fingerprint: the same plugins are loaded again in the same order, and
    nothing else. Raises `PluginError` when something named here cannot be loaded, or is not the same.
    """
    return _load_again(like) if like is not None else _create(plugins, autoload=autoload)


def list_plugins(plugins: Iterable[object] = ()) -> list[PluginRecord]:
    """Return what a manager would have, and as failed the backend libraries it would not be made for."""
    return _create(plugins, autoload=True, is_listing=True).records


def _create(plugins: Iterable[object], *, autoload: bool, is_listing: bool = False) -> PluginManager:
    plugins = list(plugins)
    words = {p.removeprefix("no:"): not p.startswith("no:") for p in plugins if isinstance(p, str)}
    in_tree, installed = discovery.in_tree(), discovery.installed()
    known = installed | in_tree
    pm = _new_manager()
    for candidate in known.values():
        if candidate.record.origin is Origin.IN_TREE and candidate.record.name not in words:
            _load(pm, candidate)
    if autoload:
        _fail_taken_names(pm, in_tree, installed)
        _load_discovered(pm, known, words)
        for path in paths_in_environment():
            _load_library(pm, path, is_isolated=is_listing)
    for name in registry.remembered():
        if name not in words:
            _load_named(pm, name, known)
    for spec in registry.process_specs():
        pm.register(spec)
    for name in (name for name, wanted in words.items() if not wanted):
        if _block_library(pm, name):
            continue
        if name not in known:
            raise PluginError(f"-p no:{name} blocks no plugin{did_you_mean(name, known)}")
        pm.note(replace(known[name].record, status=Status.BLOCKED))
    for plugin in plugins:
        if not isinstance(plugin, str):
            register_found(pm, plugin, None, [])
        elif not plugin.startswith("no:") and words.pop(plugin, False):
            _load_named(pm, plugin, known)
    return pm


def _new_manager() -> PluginManager:
    pm = PluginManager()
    pm.is_tracing = discovery.is_switched_on("INFINILM_TRACE_PLUGINS")
    return pm


def _fail_taken_names(pm: PluginManager, in_tree: Mapping[str, Candidate], installed: Mapping[str, Candidate]) -> None:
    """List entry points that are called as an in-tree plugin is, under their distribution's name, as failed."""
    for name in sorted(in_tree.keys() & installed.keys()):
        record = installed[name].record
        reason = f"an in-tree plugin is called {name!r}; rename the entry point"
        pm.note(replace(record, name=f"{record.distribution}:{name}", status=Status.FAILED, error=reason))
        _log.warning("plugin %s failed to load: %s", record.describe(), reason)


def _load_discovered(pm: PluginManager, known: Mapping[str, Candidate], words: Mapping[str, bool]) -> None:
    """Load entry points, and what the environment names; the environment decides which."""
    named = discovery.named_in_environment()
    is_off = discovery.is_switched_on("INFINILM_DISABLE_PLUGIN_AUTOLOAD")
    installed = [c for c in known.values() if c.record.origin is Origin.ENTRY_POINT and c.record.name not in words]
    filtered = [c for c in installed if is_off or (named is not None and c.record.name not in named)]
    for candidate in installed:
        if candidate in filtered:
            pm.note(replace(candidate.record, status=Status.FILTERED))
        elif named is not None:
            _load_named(pm, candidate.record.name, known)
        else:
            _load_isolated(pm, candidate)
    if filtered:
        variable = "INFINILM_DISABLE_PLUGIN_AUTOLOAD" if is_off else "INFINILM_PLUGINS"
        names = ", ".join(candidate.record.name for candidate in filtered)
        _log.warning("%s keeps these plugins from being loaded: %s", variable, names)
    for name in named or ():
        if name not in known and name not in words:
            _load_named(pm, name, known)


def _load_library(pm: PluginManager, path: str, *, is_isolated: bool) -> None:
    """Load a backend library that the environment names."""
    candidate = discovery.of_library(path)
    try:
        _load(pm, _forgotten(pm, candidate))
    except PluginError as err:
        if not is_isolated:
            raise
        pm.note(replace(candidate.record, status=Status.FAILED, error=str(err)))


def _block_library(pm: PluginManager, name: str) -> bool:
    """Take out the backend library `name`, which is known only now that it is loaded. Return whether there is one."""
    record = next((record for record in pm.records if record.name == name and record.library is not None), None)
    if record is None:
        return False
    pm.forget(name)
    pm.note(replace(record, status=Status.BLOCKED))
    return True


def _load(pm: PluginManager, candidate: Candidate) -> None:
    """Import and register one plugin, and remember how long the import took. Raises whatever the plugin raises."""
    if candidate.refusal is not None:
        raise PluginError(f"plugin {candidate.record.describe()} is refused: {candidate.refusal}")
    started = time.perf_counter()
    with registry.collecting(candidate.record.reference or candidate.record.name) as specs:
        found = candidate.load()
        if inspect.isroutine(found):
            found()
    elapsed = (time.perf_counter() - started) * 1e3
    if elapsed > _SLOW_IMPORT_MS:
        _log.warning("plugin %s took %.1f s to import", candidate.record.describe(), elapsed / 1e3)
    if isinstance(found, ModuleType) and not specs:
        specs = registry.registered_by(found.__name__)  # it was imported before, by somebody else
    register_found(pm, found, replace(candidate.record, import_ms=elapsed), specs)


def _load_isolated(pm: PluginManager, candidate: Candidate) -> None:
    reason = candidate.refusal
    try:
        if reason is None:
            _load(pm, candidate)
    except (Exception, SystemExit) as err:  # whatever goes wrong in somebody's import must not take the host down
        reason = str(err) if isinstance(err, InfinilmError) else f"{type(err).__name__}: {err}"
    if reason is not None:
        pm.note(replace(candidate.record, status=Status.FAILED, error=reason))
        _log.warning("plugin %s failed to load: %s", candidate.record.describe(), reason)


def _load_named(pm: PluginManager, name: str, known: Mapping[str, Candidate]) -> None:
    """Load what the user named, anew where it was loaded before. Raises `PluginError`, the cause chained."""
    candidate = discovery.by_name(name, known)
    try:
        _load(pm, _forgotten(pm, candidate))
    except InfinilmError:
        raise
    except Exception as err:
        raise PluginError(f"plugin {name!r} cannot be loaded: {type(err).__name__}: {err}") from err


def _forgotten(pm: PluginManager, candidate: Candidate) -> Candidate:
    """Forget what was loaded from the same place, and return the candidate to load in its stead."""
    for record in pm.records:
        if record.reference == candidate.record.reference and record.status is Status.ACTIVE:
            pm.forget(record.name)
    return candidate


def _load_again(fingerprint: Fingerprint) -> PluginManager:
    """Load what another manager had, in its order. Raises `PluginError` saying what differs."""
    known = discovery.installed() | discovery.in_tree()
    pm = _new_manager()
    for entry in fingerprint.entries:
        if entry.name in {record.name for record in pm.records}:
            continue  # the specs of a module come with the module
        if entry.reference is None:
            raise PluginError(
                f"plugin {entry.name!r} is an object of the process that registered it and cannot be loaded again; "
                "give it as an entry point, a module or a .py file"
            )
        candidate = discovery.by_name(entry.reference, known)
        candidate = replace(candidate, record=replace(candidate.record, origin=Origin(entry.origin)))
        try:
            _load(pm, candidate)
        except Exception as err:
            raise PluginError(f"plugin {entry.name!r} cannot be loaded again: {type(err).__name__}: {err}") from err
    difference = fingerprint.explain_difference(pm.fingerprint())
    if difference:
        raise PluginError("the plugins here are not those of the other process:\n  " + "\n  ".join(difference))
    return pm


def register_found(pm: PluginManager, found: object, record: PluginRecord | None, specs: Sequence[ModelSpec]) -> None:
    """Register what a name led to, and the specs that were registered while it was loaded.

    `found` may be a module or object with hooks, a `ModelSpec` or a sequence of them, or a module or function whose
    point is `specs`. Raises `PluginError` when there is neither a hook nor a spec, leaving nothing behind.
    """
    if isinstance(found, Sequence) and found and all(isinstance(item, ModelSpec) for item in found):
        found = ModelSpecs(found)
    if isinstance(found, BackendLibrary):
        known = record or PluginRecord(found.name, Status.ACTIVE, Origin.REGISTERED)
        path = found.path
        record = replace(known, name=found.name, version=found.version, reference=path, library=path)
    if not specs:
        if inspect.isroutine(found):
            called = record.describe() if record else repr(found)
            raise PluginError(f"plugin {called} is a function that registered no model; call register_model in it")
        pm.register(found, record=record)
        return
    models = ModelSpecs(specs)
    if not is_plugin(found):
        pm.register(models, record=record)
        return
    name = pm.register(found, record=record)
    assert name is not None
    try:
        pm.register(models, record=replace(record, name=f"{name}:models") if record else None)
    except PluginError:
        pm.forget(name)
        raise
