"""A checkpoint that is a folder in Hugging Face's layout: its config, and files that must stay inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infinilm_hookspecs import CheckpointError

_MAX_DEPTH = 100  # of nested objects and lists; no config comes near, and code that walks it is recursive


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises `CheckpointError` naming the file when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise CheckpointError(f"{str(path.parent)!r} has no {path.name}") from err
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON: {err}") from err
    except RecursionError as err:
        raise _too_deep(path) from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{str(path)!r} holds a JSON {json_kind(value)}, and an object is wanted")
    if _is_too_deep(value):
        raise _too_deep(path)
    return value


def json_kind(value: object) -> str:
    """Return what JSON calls a value that was read from it."""
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


_NESTING = frozenset([dict, list])


def _is_too_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        nested = [one.values() if isinstance(one, dict) else one for one in level]
        # An index has a hundred thousand strings here: those that nest nothing are left out at once.
        level = [item for items in nested for item in items if type(item) in _NESTING]
        if not level:
            return False
    return True


def _too_deep(path: Path) -> CheckpointError:
    return CheckpointError(f"{str(path)!r} is nested too deeply to be read: {_MAX_DEPTH} levels are the most")


def file_inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`. Raises `CheckpointError` for a name that leads out of it."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise CheckpointError(f"{str(folder)!r}: the file name {name!r} leads out of the folder")
    return folder / path


def read_shard_index(path: Path) -> Mapping[str, str]:
    """Return the `weight_map` of an index file: tensor name to file name."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not {*map(type, weight_map.values())} <= {str}:
        raise CheckpointError(f"{str(path)!r} has no 'weight_map' from tensor names to file names")
    return weight_map
