"""From who computes how much to the arrays of one `ForwardBatch`, and back: which logits belong to whom."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from infinilm.engine.sequence import Sequence
from infinilm_hookspecs import ForwardBatch

Int32 = np.ndarray[Any, np.dtype[np.int32]]
Chunks = collections.abc.Sequence[tuple[Sequence, int]]
"""Sequences and how many tokens each computes, in batch order."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step's batch, and the rows of its logits.

    `sampled` has each sequence that gets a token, with the row it is sampled from. `scored` has each one whose request
    wants prompt logprobs from this step, with the rows that predict the next prompt tokens it has none for.
    """

    batch: ForwardBatch
    sampled: list[tuple[Sequence, int]]
    scored: list[tuple[Sequence, range]]


def build_step(chunks: Chunks, block_size: int) -> Step:
    """Build the step that computes the next `num_tokens` tokens of each sequence. Blocks and slots are theirs already.

    Logits are wanted of a sequence's last token, once the chunk reaches it, and of every prompt token whose successor
    has no prompt logprobs yet: recomputation after a preemption does not score a position twice.
    """
    logits_indices: list[int] = []
    sampled: list[tuple[Sequence, int]] = []
    scored: list[tuple[Sequence, range]] = []
    query_start = 0
    for sequence, num_tokens in chunks:
        start = sequence.num_computed_tokens
        stop = start + num_tokens
        if start < sequence.num_prompt_tokens:
            unscored = range(max(start, sequence.first_unscored), min(stop, sequence.num_prompt_tokens - 1))
            if unscored:
                scored.append((sequence, range(len(logits_indices), len(logits_indices) + len(unscored))))
                logits_indices.extend(query_start - start + position for position in unscored)
        if stop == len(sequence.token_ids):
            sampled.append((sequence, len(logits_indices)))
            logits_indices.append(query_start + num_tokens - 1)
        query_start += num_tokens
    return Step(_forward_batch(chunks, logits_indices, block_size), sampled, scored)


def _forward_batch(chunks: Chunks, logits_indices: list[int], block_size: int) -> ForwardBatch:
    sequences = [sequence for sequence, _ in chunks]
    counts = np.array([num_tokens for _, num_tokens in chunks], np.int32)  # (num_sequences,)
    starts = np.array([sequence.num_computed_tokens for sequence in sequences], np.int32)  # (num_sequences,)
    query_starts = np.array([0, *accumulate(num_tokens for _, num_tokens in chunks)], np.int32)  # (num_sequences + 1,)
    spans = [
        its.token_ids[its.num_computed_tokens : its.num_computed_tokens + num_tokens] for its, num_tokens in chunks
    ]
    token_ids = np.array(list(chain.from_iterable(spans)), np.int32)  # (num_tokens,)
    tables = _block_tables(sequences)  # (num_sequences, max_blocks)
    rows = np.repeat(np.arange(len(chunks)), counts)  # (num_tokens,): whose token it is
    positions = np.arange(len(token_ids), dtype=np.int32) + (starts - query_starts[:-1])[rows]
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        query_starts=query_starts,
        context_lengths=starts + counts,
        block_tables=tables,
        slot_mapping=tables[rows, positions // block_size] * block_size + positions % block_size,
        slots=np.array([sequence.slot for sequence in sequences], np.int32),
        logits_indices=np.array(logits_indices, np.int32),
        extras=[None] * len(chunks),
        prompt_lengths=np.array([sequence.num_prompt_tokens for sequence in sequences], np.int32),
    )


def _block_tables(sequences: collections.abc.Sequence[Sequence]) -> Int32:
    tables = np.full((len(sequences), max(len(its.block_table.blocks) for its in sequences)), -1, np.int32)
    for row, sequence in zip(tables, sequences, strict=True):
        row[: len(sequence.block_table.blocks)] = sequence.block_table.blocks
    return tables
