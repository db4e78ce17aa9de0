"""Progress bars for work that takes a while: on a terminal only, never in a pipe."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bytes_bar(total: int, description: str) -> tqdm[Any]:
    """Return a bar that counts `total` bytes, with rate and time left."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, file=sys.stderr, disable=None, leave=False)


def requests_bar(total: int, description: str, *, enabled: bool = True) -> tqdm[Any]:
    """Return a bar that counts `total` requests."""
    disable = None if enabled else True
    return tqdm(total=total, desc=description, unit="request", file=sys.stderr, disable=disable, leave=False)
