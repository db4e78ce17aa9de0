"""Fingerprints: which plugins a process runs, exactly, so that another can load the same or say what differs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from infinilm.native.libraries import BackendLibrary


@dataclass(frozen=True, slots=True)
class Entry:
    """One active plugin. `reference` is how to load it again; `files` are SHA-256 digests by name."""

    name: str
    origin: str
    distribution: str | None
    version: str | None
    reference: str | None
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The active plugins of a manager in their order. Pickles, and travels as JSON."""

    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        """Return the fingerprint as JSON."""
        return json.dumps([asdict(entry) for entry in self.entries])

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Return the fingerprint that `to_json` wrote."""
        return cls(tuple(Entry(**fields) for fields in json.loads(text)))

    def explain_difference(self, other: Fingerprint) -> list[str]:
        """Return what `other` has otherwise than this, line by line; nothing when they are equal."""
        ours, theirs = ({entry.name: entry for entry in f.entries} for f in (self, other))
        lines = [f"plugin {name!r} is missing" for name in ours if name not in theirs]
        lines += [f"plugin {name!r} is there in addition" for name in theirs if name not in ours]
        for name in (name for name in ours if name in theirs):
            lines += _differences(ours[name], theirs[name])
        if not lines and list(ours) != list(theirs):
            lines.append(f"the order is {', '.join(theirs)}, and was {', '.join(ours)}")
        return lines


def _differences(ours: Entry, theirs: Entry) -> list[str]:
    lines = []
    for attribute in ("distribution", "version", "origin"):
        was, is_now = getattr(ours, attribute), getattr(theirs, attribute)
        if was != is_now:
            lines.append(f"plugin {ours.name!r} has the {attribute} {is_now}, and had {was}")
    changed = sorted(f for f in ours.files.keys() | theirs.files.keys() if ours.files.get(f) != theirs.files.get(f))
    if changed:
        lines.append(f"plugin {ours.name!r} differs in {', '.join(changed)}")
    return lines


def digest_files(plugin: object, module_name: str | None) -> dict[str, str]:
    """Return the SHA-256 of every source file and library of a plugin's module or package, by name.

    `module_name` is the module it was loaded from; for an object of this process it is the one its class lies in.
    """
    if isinstance(plugin, BackendLibrary):
        return {Path(plugin.path).name: _digest(Path(plugin.path))}
    if isinstance(parts := getattr(plugin, "in_tree_parts", None), tuple):
        return {f"{part.__name__}:{file}": sha for part in parts for file, sha in digest_files(part, None).items()}
    module = plugin if isinstance(plugin, ModuleType) else sys.modules.get(module_name or type(plugin).__module__)
    file = getattr(module, "__file__", None)
    if file is None:
        return {}
    path = Path(file)
    if path.name != "__init__.py":
        return {path.name: _digest(path)}
    return {str(found.relative_to(path.parent)): _digest(found) for found in _code_of(path.parent)}


def _code_of(folder: Path) -> Iterable[Path]:
    return sorted(path for suffix in ("*.py", "*.so") for path in folder.rglob(suffix))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
