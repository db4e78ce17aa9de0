"""Progress bars for work that takes a while: on a terminal only, never in a pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_RATES = 0.2


def bytes_bar(total: int, description: str) -> tqdm[Any]:
    """Return a bar that counts `total` bytes, with rate and time left."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, file=sys.stderr, disable=None, leave=False)


class GenerationBar:
    """Counts finished requests, and says how many tokens a second go in and come out."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        disable = None if enabled else True
        self._bar = tqdm(total=total, desc="generating", unit="request", file=sys.stderr, disable=disable, leave=False)
        self._started = self._shown = time.monotonic()
        self._first: tuple[int, int] | None = None

    def show(self, num_finished: int, num_prompt_tokens: int, num_generation_tokens: int) -> None:
        """Show how far the work is. Tokens are counted from the first call on."""
        if self._bar.disable:
            return
        now = time.monotonic()
        self._first = self._first or (num_prompt_tokens, num_generation_tokens)
        self._bar.update(num_finished - self._bar.n)
        if now - self._shown >= _SECONDS_BETWEEN_RATES:
            self._shown = now
            seconds = now - self._started
            rates = (num_prompt_tokens - self._first[0]) / seconds, (num_generation_tokens - self._first[1]) / seconds
            self._bar.set_postfix_str(f"in {rates[0]:.0f}, out {rates[1]:.0f} tokens/s")

    def __enter__(self) -> GenerationBar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()


def generation_bar(total: int, *, enabled: bool = True) -> GenerationBar:
    """Return a bar that counts `total` requests."""
    return GenerationBar(total, enabled=enabled)
