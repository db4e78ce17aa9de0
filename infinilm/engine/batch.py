"""From who computes how much to the arrays of one `ForwardBatch`, and back: which logits belong to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from infinilm.engine.request import Request
from infinilm_hookspecs import ForwardBatch

Int32 = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Step:
    """One step's batch, and the rows of its logits.

    `sampled` has each request that gets a token, with the row it is sampled from. `scored` has each request that wants
    prompt logprobs from this step, with the rows that predict the next prompt tokens it has none for.
    """

    batch: ForwardBatch
    sampled: list[tuple[Request, int]]
    scored: list[tuple[Request, range]]


def build_step(chunks: Sequence[tuple[Request, int]], block_size: int) -> Step:
    """Build the step that computes the next `num_tokens` tokens of each request. Blocks and slots are theirs already.

    Logits are wanted of a request's last token, once the chunk reaches it, and of every prompt token whose successor
    has no prompt logprobs yet: recomputation after a preemption does not score a position twice.
    """
    logits_indices: list[int] = []
    sampled: list[tuple[Request, int]] = []
    scored: list[tuple[Request, range]] = []
    query_start = 0
    for request, num_tokens in chunks:
        start = request.num_computed_tokens
        stop = start + num_tokens
        unscored = _unscored(request, start, stop)
        if unscored:
            scored.append((request, range(len(logits_indices), len(logits_indices) + len(unscored))))
            logits_indices.extend(query_start - start + position for position in unscored)
        if stop == request.num_tokens:
            sampled.append((request, len(logits_indices)))
            logits_indices.append(query_start + num_tokens - 1)
        query_start += num_tokens
    return Step(_forward_batch(chunks, logits_indices, block_size), sampled, scored)


def _unscored(request: Request, start: int, stop: int) -> range:
    """Return the positions of [start, stop) that predict a prompt token whose logprobs are wanted and missing."""
    if request.params.prompt_logprobs is None:
        return range(0)
    return range(max(start, len(request.prompt_logprobs) - 1), min(stop, request.num_prompt_tokens - 1))


def _forward_batch(chunks: Sequence[tuple[Request, int]], logits_indices: list[int], block_size: int) -> ForwardBatch:
    requests = [request for request, _ in chunks]
    counts = np.array([num_tokens for _, num_tokens in chunks], np.int32)  # (num_sequences,)
    starts = np.array([request.num_computed_tokens for request in requests], np.int32)  # (num_sequences,)
    query_starts = np.array([0, *accumulate(counts.tolist())], np.int32)  # (num_sequences + 1,)
    token_ids: list[int] = []
    for request, num_tokens in chunks:
        token_ids += request.token_ids[request.num_computed_tokens : request.num_computed_tokens + num_tokens]
    tables = _block_tables(requests)  # (num_sequences, max_blocks)
    rows = np.repeat(np.arange(len(chunks)), counts)  # (num_tokens,): whose token it is
    positions = np.arange(len(token_ids), dtype=np.int32) + (starts - query_starts[:-1])[rows]
    return ForwardBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        query_starts=query_starts,
        context_lengths=starts + counts,
        block_tables=tables,
        slot_mapping=tables[rows, positions // block_size] * block_size + positions % block_size,
        slots=np.array([request.slot for request in requests], np.int32),
        logits_indices=np.array(logits_indices, np.int32),
        extras=[None] * len(chunks),
        prompt_lengths=np.array([request.num_prompt_tokens for request in requests], np.int32),
    )


def _block_tables(requests: Sequence[Request]) -> Int32:
    tables = np.full((len(requests), max(len(request.block_table) for request in requests)), -1, np.int32)
    for row, request in zip(tables, requests, strict=True):
        row[: len(request.block_table)] = request.block_table
    return tables
