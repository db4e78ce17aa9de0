"""Who computes how many tokens in the next step. Integers only, never tensors.

There is no prefill phase and no decode phase: every running sequence wants its `num_tokens - num_computed_tokens`, and
gets as many as the budget of the step has left, first come, first served. A long prompt is so cut into chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from infinilm.engine.kv_cache import BlockPool, BlockTable


class Schedulable(Protocol):
    """A sequence, as far as scheduling goes."""

    sequence_id: int
    token_ids: list[int]
    num_computed_tokens: int  # changed here: what is cached when it starts, 0 when it is preempted
    block_table: BlockTable
    slot: int | None

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are known and not computed."""

    @property
    def num_reusable_tokens(self) -> int:
        """Of how many of its first tokens no logits are wanted: those may be taken from the cache."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: how many tokens each sequence computes, and the slots of those that were preempted to make room."""

    num_tokens: Mapping[int, int]  # by sequence id, in batch order
    released_slots: tuple[int, ...]


class Scheduler:
    """Continuous batching. A running sequence holds a slot and the blocks of all its tokens; a waiting one nothing."""

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.waiting: deque[Schedulable] = deque()
        self.running: list[Schedulable] = []  # the most recently started last
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # looked up in the prefix cache,
        self.num_cached_tokens = 0  # and found there
        self._pool = pool
        self._max_num_batched_tokens = max_num_batched_tokens
        self._free_slots = list(reversed(range(max_num_seqs)))

    def add(self, sequence: Schedulable) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def add_first(self, sequences: Sequence[Schedulable]) -> None:
        """Put sequences at the front of the queue: they belong to one that runs."""
        self.waiting.extendleft(reversed(sequences))

    def schedule(self) -> SchedulerOutput:
        """Choose the next step. Every sequence in it owns a slot and blocks for all its tokens.

        Whoever runs goes before whoever waits, and gets at least one token: all had one in the step before, and only
        the last started can want more. Nobody starts in a step that preempts.
        """
        budget = self._max_num_batched_tokens
        num_tokens: dict[int, int] = {}
        released_slots: list[int] = []
        for sequence in self.running:  # preemption takes from its end, which the loop has not reached
            if not self._make_room(sequence, released_slots):
                break
            num_tokens[sequence.sequence_id] = min(sequence.num_pending_tokens, budget)
            budget -= num_tokens[sequence.sequence_id]
        while self.waiting and self._free_slots and budget > 0 and not released_slots:
            sequence = self.waiting[0]
            if not self._start(sequence):
                break
            num_tokens[sequence.sequence_id] = min(sequence.num_pending_tokens, budget)
            budget -= num_tokens[sequence.sequence_id]
        return SchedulerOutput(num_tokens, tuple(released_slots))

    def remove(self, sequence: Schedulable) -> int | None:
        """Forget a sequence, running or waiting, and free its blocks. Return the slot it held, if any."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return None
        self.running.remove(sequence)
        return self._take_back(sequence)

    def _start(self, sequence: Schedulable) -> bool:
        """Let the first in the queue run, with the blocks that are cached for it; `False` where it must wait."""
        num_cached = self._pool.reuse(sequence.block_table, sequence.token_ids, sequence.num_reusable_tokens)
        if not self._pool.grow(sequence.block_table, sequence.num_tokens):
            self._pool.release(sequence.block_table)
            return False
        sequence.num_computed_tokens = num_cached
        self.num_queried_tokens += sequence.num_tokens if self._pool.is_sharing else 0
        self.num_cached_tokens += num_cached
        sequence.slot = self._free_slots.pop()
        self.running.append(self.waiting.popleft())
        return True

    def _make_room(self, sequence: Schedulable, released_slots: list[int]) -> bool:
        """Give `sequence` blocks for all its tokens; return `False` when it had to make room itself."""
        while not self._pool.grow(sequence.block_table, sequence.num_tokens):
            victim = self.running.pop()
            released_slots.append(self._take_back(victim))
            victim.num_computed_tokens = 0
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _take_back(self, sequence: Schedulable) -> int:
        slot, sequence.slot = sequence.slot, None
        assert slot is not None, f"sequence {sequence.sequence_id} runs without a slot"
        self._pool.release(sequence.block_table)
        self._free_slots.append(slot)
        return slot
