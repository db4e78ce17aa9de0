"""Where plugins come from: candidates, each with a way to load it. Nothing is imported here but to find a spec.

A candidate is refused before its import when two distributions share its name, or when its distribution or module
declares a range of infinilm versions that this one is not in.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from infinilm import __version__
from infinilm.native.libraries import is_library, open_library
from infinilm.plugins.checks import did_you_mean
from infinilm.plugins.report import Origin, PluginRecord, Status
from infinilm_hookspecs import PluginError
from infinilm_hookspecs.markers import PROJECT_NAME

RANGE_ATTRIBUTE = "requires_infinilm"
"""What a module without a distribution calls its range of infinilm versions, such as ">=0.1,<0.3"."""

_IN_TREE_PACKAGES = ("platforms", "checkpoints", "models", "backends", "processors", "logits_processors")
_ASKED_LAST = "transformers"  # it takes whatever nobody else does
_ASKED_FIRST = "cpu"  # of the backends here: where it runs a model, it is the fastest


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin that may be loaded, and how. `refusal` says why it must not be."""

    record: PluginRecord
    load: Callable[[], object]
    refusal: str | None = None


def in_tree() -> dict[str, Candidate]:
    """Return every in-tree plugin by name, in the order they are registered: the last is asked first.

    Each public module of the packages that hold them is one.
    """
    found: dict[str, Candidate] = {}
    for package in _IN_TREE_PACKAGES:
        folder = Path(__file__).parent.parent / package
        names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
        for name in (name for name in names if not name.startswith("_")):
            module = f"{PROJECT_NAME}.{package}.{name}"
            record = PluginRecord(
                name, Status.ACTIVE, Origin.IN_TREE, PROJECT_NAME, __version__, reference=name, module=module
            )
            load: Callable[[], object] = partial(importlib.import_module, module)
            if name in found:
                load = partial(_JoinedModules, found[name].load, load)
            found[name] = Candidate(record, load)
    return dict(sorted(found.items(), key=lambda item: (item[0] != _ASKED_LAST, item[0] == _ASKED_FIRST)))


class _JoinedModules:
    """One in-tree plugin whose hooks are in modules of two packages, each of which imports nothing of the other."""

    def __init__(self, *loads: Callable[[], object]) -> None:
        self.in_tree_parts = tuple(load() for load in loads)
        for part in self.in_tree_parts:
            for name, value in vars(part).items():
                if hasattr(value, f"{PROJECT_NAME}_impl"):
                    assert name not in vars(self), f"{name} is implemented twice"
                    setattr(self, name, value)


def installed() -> dict[str, Candidate]:
    """Return every entry point of the group `infinilm` by name, sorted."""
    by_name: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=PROJECT_NAME):
        by_name.setdefault(point.name, []).append(point)
    return {name: _of_entry_points(name, points) for name, points in sorted(by_name.items())}


def _of_entry_points(name: str, points: list[EntryPoint]) -> Candidate:
    point = points[0]
    dist = point.dist
    record = PluginRecord(name, Status.ACTIVE, Origin.ENTRY_POINT, reference=name, module=point.module)
    if dist is not None:
        record = replace(record, distribution=dist.name, version=dist.version)
    if len(points) > 1:
        owners = " and ".join(sorted(f"{p.dist.name} {p.dist.version}" if p.dist else p.value for p in points))
        return Candidate(record, point.load, f"{owners} both have an entry point {name!r}; uninstall one of them")
    return Candidate(record, point.load, _refuse_requirement(dist.requires or []) if dist is not None else None)


def _refuse_requirement(requirements: list[str]) -> str | None:
    """Return why a distribution with these requirements must not be loaded into this host, or `None`."""
    ours = [requirement for requirement in requirements if requirement.lower().startswith(PROJECT_NAME)]
    if not ours:
        return None
    from packaging.requirements import InvalidRequirement, Requirement

    for text in ours:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as err:
            return f"its requirement {text!r} is no requirement: {err}"
        if requirement.name != PROJECT_NAME or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            return f"it requires {PROJECT_NAME}{requirement.specifier}, and this is {PROJECT_NAME} {__version__}"
    return None


def by_name(name: str, known: Mapping[str, Candidate]) -> Candidate:
    """Return what the user named: one of `known`, a `.py` file, a backend library, a module or `module:attribute`.

    Raises `PluginError` for a word that can be none of these.
    """
    if name in known:
        return replace(known[name], record=replace(known[name].record, origin=Origin.NAMED))
    record = PluginRecord(name, Status.ACTIVE, Origin.NAMED, reference=name)
    if name.endswith(".py"):
        path = Path(name).absolute()
        if not path.is_file():
            raise PluginError(f"plugin file {name!r} does not exist")
        record = replace(record, name=path.name, reference=str(path), module=_module_name(path))
        return Candidate(record, partial(import_file, path), _refuse_source(path))
    if is_library(name):
        return of_library(name)
    module = name.partition(":")[0]
    if not all(part.isidentifier() for part in module.split(".")):
        raise PluginError(
            f"-p {name!r} names no plugin: an entry point, a module, module:attribute, a .py or a .so file is wanted "
            "(the prompt of a generation is --prompt)"
        )
    record = replace(record, module=module)
    source = _find_source(module)
    refusal = _refuse_source(source) if source is not None else None
    return Candidate(record, partial(_import_attribute, name, tuple(known)), refusal)


def of_library(path: str) -> Candidate:
    """Return a backend library as the candidate it is; it is opened, and has its name, once it is loaded."""
    real = os.path.realpath(path)
    record = PluginRecord(Path(path).name, Status.ACTIVE, Origin.NAMED, reference=real, library=real)
    return Candidate(record, partial(open_library, path))


def _find_source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None  # the import itself says what is wrong
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _refuse_source(path: Path) -> str | None:
    """Return why the module in `path`, read but not run, must not be loaded into this host, or `None`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # the import itself says what is wrong
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if RANGE_ATTRIBUTE in names:
                return _refuse_requirement([PROJECT_NAME + str(node.value.value)])
    return None


def _module_name(path: Path) -> str:
    return f"infinilm_plugin_file_{path.stem}"


def import_file(path: Path) -> object:
    """Import a `.py` file as a module of its own."""
    module_name = _module_name(path)
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


def _import_attribute(name: str, known: tuple[str, ...]) -> object:
    """Import `module` or `module:attribute`. Raises `PluginError` saying what was looked for."""
    module_name, _, attribute = name.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        if err.name is None or not f"{module_name}.".startswith(f"{err.name}."):
            raise
        raise PluginError(
            f"there is no plugin {name!r}: no entry point of group {PROJECT_NAME!r} has this name, and no module"
            f"{did_you_mean(name, known)}"
        ) from err
    for part in attribute.split(".") if attribute else ():
        found = getattr(found, part)
    return found


# ---------------------------------------------------------------- the environment


def named_in_environment() -> list[str] | None:
    """Return the items of `INFINILM_PLUGINS`, comma-separated, or `None` when it is not set."""
    value = os.environ.get("INFINILM_PLUGINS")
    return None if value is None else [item.strip() for item in value.split(",") if item.strip()]


def is_switched_on(variable: str) -> bool:
    """Return whether an environment variable is 1. Raises `PluginError` for anything but 0, 1 or nothing."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise PluginError(f"the environment variable {variable} is {value!r}; it takes 0 or 1")
    return value == "1"
