"""A checkpoint that is a folder in Hugging Face's layout: its config, and files that must stay inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infinilm_hookspecs import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises `CheckpointError` naming the file when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise CheckpointError(f"{str(path.parent)!r} has no {path.name}") from err
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON: {err}") from err
    except RecursionError as err:
        raise CheckpointError(f"{str(path)!r} is nested too deeply to be read") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{str(path)!r} holds a JSON {type(value).__name__}, and an object is wanted")
    return value


def file_inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`. Raises `CheckpointError` for a name that leads out of it."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise CheckpointError(f"{str(folder)!r}: the file name {name!r} leads out of the folder")
    return folder / path


def read_shard_index(path: Path) -> Mapping[str, str]:
    """Return the `weight_map` of an index file: tensor name to file name."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{str(path)!r} has no 'weight_map' from tensor names to file names")
    return weight_map
