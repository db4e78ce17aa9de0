"""JSON files that lie beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from infinilm_hookspecs import Checkpoint, CheckpointError


def read_json(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """Return the object in the file `name`, empty where there is no such file.

    Raises `CheckpointError` when the file is not JSON, or is something else than an object.
    """
    path = checkpoint.file(name)
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:  # of the JSON or of the UTF-8
        raise CheckpointError(f"{path} is not JSON: {err}; download it again") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object; download it again")
    return value
