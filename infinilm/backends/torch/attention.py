"""Causal attention of a ragged batch over the paged cache.

A step is planned once and every layer follows the plan: sequences with one new token are decoded together, in groups
of similar length whose contexts are gathered side by side; every other sequence is a prefill by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from infinilm.backends.torch.cache import BLOCK_SIZE, SCRATCH_TOKENS, PagedCache
from infinilm_hookspecs import AttentionConfig, ForwardBatch

Indices = numpy.ndarray[Any, numpy.dtype[numpy.integer[Any]]]

# Padding a context by this much costs less than one more call of the attention kernel.
_CHEAP_PADDING: Final = 256
# Queries of a long prefill are attended in tiles of this many, so that a mask stays small.
_QUERY_TILE: Final = 1024


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Several new tokens of one sequence: rows [start, stop) of the batch.

    `slots` (context_length,) hold its whole context, these tokens included; `None` where they are the whole context.
    """

    start: int
    stop: int
    slots: Tensor | None


@dataclass(frozen=True, slots=True)
class _Decode:
    """One new token each of several sequences, whose contexts are padded to the longest of them."""

    rows: Tensor  # (num_rows,) of the batch
    slots: Tensor  # (num_rows * longest,)
    mask: Tensor | None  # (num_rows, 1, 1, longest), True where there is context; None: nothing is padded


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the sequences of one batch are attended, the same for every layer."""

    slot_mapping: Tensor  # (num_tokens,)
    prefills: Sequence[_Prefill]
    decodes: Sequence[_Decode]


def plan_attention(batch: ForwardBatch, zero_slot: int, device: torch.device) -> AttentionPlan:
    """Plan `batch`; contexts are padded with `zero_slot`."""
    starts = batch.query_starts.tolist()
    prefills, decodes = [], []
    for sequence, (start, stop) in enumerate(pairwise(starts)):
        if stop - start == 1:
            decodes.append(sequence)
            continue
        length = int(batch.context_lengths[sequence])
        slots = None if stop - start == length else index_tensor(_context_slots(batch, sequence, length), device)
        prefills.append(_Prefill(start, stop, slots))
    return AttentionPlan(
        slot_mapping=index_tensor(batch.slot_mapping, device),
        prefills=prefills,
        decodes=[_decode(batch, group, zero_slot, device) for group in _groups(batch, decodes)],
    )


def attend(
    config: AttentionConfig,
    plan: AttentionPlan,
    cache: PagedCache,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """Write the new keys and values to the cache and return every token's attention over its own context.

    `query` and the result are (num_tokens, num_heads, head_dim), `key` and `value` (num_tokens, num_kv_heads,
    head_dim).
    """
    cache.write(layer, plan.slot_mapping, key, value)
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    attended = query.new_empty(query.shape)
    for prefill in plan.prefills:
        rows = slice(prefill.start, prefill.stop)
        if prefill.slots is None:
            attended[rows] = _attend_whole(query[rows], key[rows], value[rows], scale)
        else:
            attended[rows] = _attend_chunk(query[rows], *cache.gather(layer, prefill.slots), scale)
    for decode in plan.decodes:
        attended[decode.rows] = _attend_decode(decode, query[decode.rows], *cache.gather(layer, decode.slots), scale)
    return attended


# ---------------------------------------------------------------- kernels
#
# torch's attention wants (batch, heads, tokens, head_dim). Key-value heads take the place of the batch, and the query
# heads that share one take the place of the heads: nothing is repeated in memory.


def _attend_whole(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    grouped = _by_kv_head(query, key.shape[1])
    key, value = _for_group(key, grouped.shape[1]), _for_group(value, grouped.shape[1])
    attended = F.scaled_dot_product_attention(grouped, key, value, is_causal=True, scale=scale)
    return attended.flatten(0, 1).transpose(0, 1)


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    num_cached = len(key) - len(query)
    grouped = _by_kv_head(query, key.shape[1])
    key, value = _for_group(key, grouped.shape[1]), _for_group(value, grouped.shape[1])
    tiles = []
    for start in range(0, len(query), _QUERY_TILE):
        tile = grouped[:, :, start : start + _QUERY_TILE]
        num_keys = num_cached + start + tile.shape[2]
        mask = torch.ones(tile.shape[2], num_keys, dtype=torch.bool, device=query.device).tril(num_cached + start)
        visible = key[:, :, :num_keys], value[:, :, :num_keys]
        tiles.append(F.scaled_dot_product_attention(tile, *visible, attn_mask=mask, scale=scale))
    return torch.cat(tiles, dim=2).flatten(0, 1).transpose(0, 1)


def _attend_decode(decode: _Decode, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    num_rows, _, head_dim = query.shape
    num_kv_heads = key.shape[1]
    # The query heads of a group stand where a prefill has its tokens: all of them see the same context.
    grouped = query.reshape(num_rows, num_kv_heads, -1, head_dim)
    key, value = (
        cached.view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2)  # (num_rows, num_kv_heads, longest, head_dim)
        for cached in (key, value)
    )
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=decode.mask, scale=scale)
    return attended.flatten(1, 2)


def _by_kv_head(query: Tensor, num_kv_heads: int) -> Tensor:
    """Return queries as (num_kv_heads, group, num_tokens, head_dim)."""
    num_tokens, num_heads, head_dim = query.shape
    return query.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)


def _for_group(heads: Tensor, group: int) -> Tensor:
    """Return keys or values as (num_kv_heads, group, num_tokens, head_dim), the group a view of one head."""
    return heads.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


# ---------------------------------------------------------------- planning, in integers


def _groups(batch: ForwardBatch, sequences: Sequence[int]) -> Iterator[list[int]]:
    """Yield sequences of similar length together: padding at most doubles a context that is not short anyway."""
    lengths = batch.context_lengths
    group: list[int] = []
    for sequence in sorted(sequences, key=lambda sequence: -int(lengths[sequence])):
        longest = int(lengths[group[0]]) if group else 0
        too_short = longest > 2 * int(lengths[sequence]) + _CHEAP_PADDING
        if group and (too_short or (len(group) + 1) * longest > SCRATCH_TOKENS):
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _decode(batch: ForwardBatch, group: Sequence[int], zero_slot: int, device: torch.device) -> _Decode:
    lengths = batch.context_lengths[group]
    longest = int(lengths.max())
    inside = numpy.arange(longest) < lengths[:, None]  # (num_rows, longest)
    slots = numpy.where(inside, _context_slots(batch, group, longest), zero_slot)
    return _Decode(
        rows=index_tensor(batch.query_starts[group], device),
        slots=index_tensor(slots.reshape(-1), device),
        mask=None if inside.all() else torch.from_numpy(inside[:, None, None]).to(device),
    )


def _context_slots(batch: ForwardBatch, sequences: int | Sequence[int], length: int) -> Indices:
    """Return the slots (..., length) of the first `length` positions of one sequence or of several."""
    blocks = batch.block_tables[sequences, : -(-length // BLOCK_SIZE)].astype(numpy.int64)
    slots = blocks[..., None] * BLOCK_SIZE + numpy.arange(BLOCK_SIZE)
    return slots.reshape(*blocks.shape[:-1], -1)[..., :length]


def index_tensor(indices: Indices, device: torch.device) -> Tensor:
    """Return a copy of `indices` on `device`, int64 as torch's indexing wants it."""
    return torch.from_numpy(indices.astype(numpy.int64)).to(device)
