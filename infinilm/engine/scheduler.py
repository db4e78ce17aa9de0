"""Who computes how many tokens in the next step. Integers only, never tensors.

There is no prefill phase and no decode phase: every running request wants its `num_tokens - num_computed_tokens`, and
gets as many as the budget of the step has left, first come, first served. A long prompt is so cut into chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from infinilm.engine.kv_cache import BlockPool
from infinilm.engine.request import Request


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: how many tokens each request computes, and the slots of those that were preempted to make room."""

    num_tokens: Mapping[str, int]  # by request id, in batch order
    released_slots: tuple[int, ...]


class Scheduler:
    """Continuous batching. A running request holds a slot and the blocks of all its tokens; a waiting one nothing."""

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the most recently started last
        self.num_preemptions = 0
        self._pool = pool
        self._max_num_batched_tokens = max_num_batched_tokens
        self._free_slots = list(reversed(range(max_num_seqs)))

    def add(self, request: Request) -> None:
        """Put a new request at the end of the queue."""
        self.waiting.append(request)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step. Every request in it owns a slot and blocks for all its tokens.

        Whoever runs goes before whoever waits, and gets at least one token: all had one in the step before, and only
        the last started can want more. Nobody starts in a step that preempts: the preempted wait in front, and of their
        blocks some are taken.
        """
        budget = self._max_num_batched_tokens
        num_tokens: dict[str, int] = {}
        released_slots: list[int] = []
        for request in self.running:  # preemption takes from its end, which the loop has not reached
            if not self._make_room(request, released_slots):
                break
            num_tokens[request.request_id] = min(request.num_pending_tokens, budget)
            budget -= num_tokens[request.request_id]
        while self.waiting and self._free_slots and budget > 0:
            request = self.waiting[0]
            if not self._pool.grow(request.block_table, request.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            request.slot = self._free_slots.pop()
            num_tokens[request.request_id] = min(request.num_pending_tokens, budget)
            budget -= num_tokens[request.request_id]
        return SchedulerOutput(num_tokens, tuple(released_slots))

    def remove(self, request: Request) -> int | None:
        """Forget a request, running or waiting, and free its blocks. Return the slot it held, if any."""
        if request.slot is None:
            self.waiting.remove(request)
            return None
        self.running.remove(request)
        return self._take_back(request)

    def _make_room(self, request: Request, released_slots: list[int]) -> bool:
        """Give `request` blocks for all its tokens; return `False` when it had to make room itself."""
        while not self._pool.grow(request.block_table, request.num_tokens):
            victim = self.running.pop()
            released_slots.append(self._take_back(victim))
            victim.num_computed_tokens = 0
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is request:
                return False
        return True

    def _take_back(self, request: Request) -> int:
        slot, request.slot = request.slot, None
        assert slot is not None, f"request {request.request_id!r} runs without a slot"
        self._pool.release(request.block_table)
        self._free_slots.append(slot)
        return slot
