"""Python's cyclic collector, kept away from planning, which makes hundreds of thousands of objects and no cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the cyclic collector; a decorator too. Nests.

    What was made meanwhile joins the oldest generation, or the next collection of the youngest would go through all of
    it: half a second of the two and a half that a hundred thousand tensors took.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # objects that the program froze stay so
                gc.freeze()
                gc.unfreeze()
            gc.enable()
