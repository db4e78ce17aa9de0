"""Drive a backend by hand: sequences in any blocks and slots, and the batches of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from infinilm_hookspecs import ForwardBatch


@dataclass(slots=True)
class Context:
    """A sequence on its way through a backend: its tokens, the blocks that hold it in any order, and its slot.

    `prompt_length` of the tokens were given and not generated; `None`: all.
    """

    tokens: list[int]
    blocks: list[int]
    prompt_length: int | None = None
    slot: int = 0
    num_computed: int = field(default=0, kw_only=True)


Work = Sequence[tuple[Context, int]]
"""Which sequences compute how many of their next tokens in one step."""


def make_batch(
    work: Work, block_size: int, logits_indices: Sequence[int] | None = None, *, table_width: int = 0
) -> ForwardBatch:
    """Return the batch of a step, as the engine would make it. By default all rows' logits are wanted.

    Block tables are as wide as the longest of them, and at least `table_width`.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    mapping: list[int] = []
    width = max(table_width, *(len(context.blocks) for context, _ in work))
    tables = np.full((len(work), width), -1, np.int32)
    for row, (context, count) in enumerate(work):
        span = range(context.num_computed, context.num_computed + count)
        token_ids += [context.tokens[position] for position in span]
        positions += span
        mapping += [context.blocks[position // block_size] * block_size + position % block_size for position in span]
        tables[row, : len(context.blocks)] = context.blocks
    counts = [count for _, count in work]
    lengths = [context.prompt_length or len(context.tokens) for context, _ in work]
    return ForwardBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        query_starts=np.cumsum([0, *counts], dtype=np.int32),
        context_lengths=np.array([context.num_computed + count for context, count in work], np.int32),
        block_tables=tables,
        slot_mapping=np.array(mapping, np.int32),
        slots=np.array([context.slot for context, _ in work], np.int32),
        logits_indices=np.array(range(len(token_ids)) if logits_indices is None else logits_indices, np.int32),
        extras=[None] * len(work),
        prompt_lengths=np.array(lengths, np.int32),
    )


def advance(work: Work) -> None:
    """Take note that a step was run."""
    for context, count in work:
        context.num_computed += count
