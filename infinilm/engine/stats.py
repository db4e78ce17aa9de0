"""`EngineStats`: numbers of an engine for a metrics endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infinilm.outputs import FinishReason


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Numbers between two steps. What counts, counts from the start; the rest is what is now.

    Running and waiting are sequences: a request with `n` answers counts `n` times. `num_free_blocks` includes cached
    blocks that nobody holds. `num_prompt_tokens` were computed or taken from the prefix cache, once per sequence;
    `prefix_cache_queries` and `prefix_cache_hits` are tokens looked up and found there. `num_finished` counts answers.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_finished: Mapping[FinishReason, int]
    weight_version: str
