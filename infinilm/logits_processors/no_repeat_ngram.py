"""`extra_args={"no_repeat_ngram_size": n}`: no n tokens in a row stand twice in prompt and answer together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from infinilm_hookspecs import Processor, RequestError, hookimpl
from infinilm_hookspecs.types import LogitsProcessorFactory

if TYPE_CHECKING:
    from torch import Tensor


@hookimpl
def provide_logits_processors(processor: Processor | None) -> Mapping[str, LogitsProcessorFactory]:
    """Offer it under the name that transformers' generation configs have for it."""
    return {"no_repeat_ngram_size": NoRepeatNgram}


class NoRepeatNgram:
    """Forbids every token that would complete a run of `size` tokens that was there before.

    As in Paulus et al. 2017 (arXiv:1705.04304), section 2.5. Raises `RequestError` for a size below 1.
    """

    def __init__(self, size: Any) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise RequestError(f"extra_args: no_repeat_ngram_size={size!r} is not allowed; it takes 1 or above")
        self._size = size
        self._last: tuple[int, ...] = ()  # of the tokens read, the last size - 1
        self._followers: dict[tuple[int, ...], set[int]] = defaultdict(set)
        self._num_read = 0

    def __call__(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], logits: Tensor) -> Tensor:
        """Return the logits, -inf where a run would stand twice."""
        num_prompt_tokens = len(prompt_token_ids)
        unread = [*prompt_token_ids[self._num_read :], *token_ids[max(self._num_read - num_prompt_tokens, 0) :]]
        for token_id in unread:
            if len(self._last) == self._size - 1:
                self._followers[self._last].add(token_id)
            self._last = (*self._last, token_id)[max(len(self._last) + 2 - self._size, 0) :]
        self._num_read += len(unread)
        forbidden = self._followers.get(self._last)
        if forbidden and len(self._last) == self._size - 1:
            logits[list(forbidden)] = -math.inf
        return logits
