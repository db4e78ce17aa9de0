"""Causal attention of a ragged batch over the paged cache.

A step is planned once for every width of window, and layers follow their plan: sequences with one new token are
decoded together, in groups of similar length whose contexts are gathered side by side; every other sequence is a
prefill by itself. What lies before a window is never gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
# Smaller ones where a window makes most of a wide tile's mask empty, or a cap keeps the scores of all heads in memory.
_SMALL_QUERY_TILE: Final = 256


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Several new tokens of one sequence: rows [start, stop) of the batch.

    `slots` (num_seen,) hold all that any of them sees, these tokens included and last; `None` where they see no others.
    """

    start: int
    stop: int
    slots: Tensor | None


@dataclass(frozen=True, slots=True)
class _Decode:
    """One new token each of several sequences. What they see of their contexts is padded to the longest of them."""

    rows: Tensor  # (num_rows,) of the batch
    slots: Tensor  # (num_rows * longest,)
    mask: Tensor | None  # (num_rows, 1, 1, longest), True where there is context; None: nothing is padded


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the sequences of one batch are attended, the same for every layer with the same window."""

    slot_mapping: Tensor  # (num_tokens,)
    prefills: Sequence[_Prefill]
    decodes: Sequence[_Decode]


def plan_attention(batch: ForwardBatch, window: int | None, zero_slot: int, device: torch.device) -> AttentionPlan:
    """Plan `batch` for layers where a token sees `window` positions, its own included; `None`: all there are.

    Contexts are padded with `zero_slot`.
    """
    prefills, decodes = [], []
    for sequence, (start, stop) in enumerate(pairwise(batch.query_starts.tolist())):
        if stop - start == 1:
            decodes.append(sequence)
        else:
            prefills.append(_prefill(batch, sequence, start, stop, window, device))
    seen = batch.context_lengths if window is None else numpy.minimum(batch.context_lengths, window)
    return AttentionPlan(
        slot_mapping=index_tensor(batch.slot_mapping, device),
        prefills=prefills,
        decodes=[_decode(batch, seen, group, zero_slot, device) for group in _groups(seen, decodes)],
    )


Plans = Mapping[int | None, AttentionPlan]
"""The plans of one step by the window they are for."""


def plan_windows(batch: ForwardBatch, windows: Iterable[int | None], zero_slot: int, device: torch.device) -> Plans:
    """Plan `batch` for layers with each of `windows`."""
    return {window: plan_attention(batch, window, zero_slot, device) for window in windows}


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
    head_dim). `plan` is one for `config.sliding_window`.
    """
    cache.write(layer, plan.slot_mapping, key, value)
    attended = query.new_empty(query.shape)
    for prefill in plan.prefills:
        rows = slice(prefill.start, prefill.stop)
        seen = (key[rows], value[rows]) if prefill.slots is None else cache.gather(layer, prefill.slots)
        attended[rows] = _attend_prefill(config, query[rows], *seen)
    for decode in plan.decodes:
        seen = cache.gather(layer, decode.slots)
        attended[decode.rows] = _attend_decode(config, query[decode.rows], *seen, decode.mask)
    return attended


# ---------------------------------------------------------------- kernels
#
# torch's attention wants (batch, heads, tokens, head_dim). Key-value heads take the place of the batch, and the query
# heads that share one take the place of the heads: nothing is repeated in memory.


def _attend_prefill(config: AttentionConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend the last `len(query)` of `len(key)` positions."""
    num_queries, num_keys = len(query), len(key)
    grouped = _by_kv_head(query, config.num_kv_heads)
    key, value = key.transpose(0, 1), value.transpose(0, 1)  # (num_kv_heads, num_keys, head_dim)
    is_plain = config.softcap is None and (config.sliding_window is None or config.sliding_window >= num_keys)
    if is_plain and num_queries == num_keys:
        attended = _attend_whole(config, grouped, key, value)
    else:
        size = _QUERY_TILE if is_plain else _SMALL_QUERY_TILE
        starts = range(num_keys - num_queries, num_keys, size)
        tiles = zip(starts, torch.split(grouped, size, dim=2), strict=True)
        attended = torch.cat([_attend_tile(config, start, tile, key, value) for start, tile in tiles], dim=2)
    return attended.flatten(0, 1).transpose(0, 1)


def _attend_whole(config: AttentionConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = _for_group(key, query.shape[1]), _for_group(value, query.shape[1])
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=_scale(config))


def _attend_tile(config: AttentionConfig, start: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend queries (num_kv_heads, group, tile, head_dim) at positions from `start` on, among those of `key`."""
    num_queries = query.shape[2]
    stop = start + num_queries
    first = 0 if config.sliding_window is None else max(0, start - config.sliding_window + 1)
    key, value = key[:, first:stop], value[:, first:stop]
    # The key at a query's own position is as many to the right as there are more keys than queries.
    mask = torch.ones(num_queries, stop - first, dtype=torch.bool, device=query.device).tril(start - first)
    if config.sliding_window is not None:
        mask = mask.triu(start - first - config.sliding_window + 1)
    if config.softcap is not None:
        return _attend_capped(config, config.softcap, query, key, value, mask)
    key, value = _for_group(key, query.shape[1]), _for_group(value, query.shape[1])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=_scale(config))


def _attend_decode(config: AttentionConfig, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    num_rows, _, head_dim = query.shape
    # The query heads of a group stand where a prefill has its tokens: all of them see the same context.
    grouped = query.reshape(num_rows, config.num_kv_heads, -1, head_dim)
    key, value = (
        cached.view(num_rows, -1, *cached.shape[1:]).transpose(1, 2)  # (num_rows, num_kv_heads, longest, head_dim)
        for cached in (key, value)
    )
    if config.softcap is not None:
        attended = _attend_capped(config, config.softcap, grouped, key, value, mask)
    else:
        attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=_scale(config))
    return attended.flatten(1, 2)


def _attend_capped(
    config: AttentionConfig, softcap: float, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """Attend with scores through `softcap * tanh(scores / softcap)`, which torch's attention does not know.

    `query` is (num_kv_heads, group, num_tokens, head_dim) with keys and values (num_kv_heads, num_keys, head_dim), or
    (num_rows, num_kv_heads, group, head_dim) with (num_rows, num_kv_heads, num_keys, head_dim).
    """
    axes = ("kgnd", "kmd", "kgnm") if key.ndim == 3 else ("rkgd", "rkmd", "rkgm")
    scores = torch.einsum(f"{axes[0]},{axes[1]}->{axes[2]}", query, key)
    # The softmax of low-precision scores is taken in float32, as torch's attention does.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.mul_(_scale(config) / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf)
    weights = scores.softmax(-1).to(value.dtype)
    return torch.einsum(f"{axes[2]},{axes[1]}->{axes[0]}", weights, value)


def _scale(config: AttentionConfig) -> float:
    scale: float = config.head_dim**-0.5 if config.scale is None else config.scale
    return scale


def _by_kv_head(query: Tensor, num_kv_heads: int) -> Tensor:
    """Return queries as (num_kv_heads, group, num_tokens, head_dim)."""
    num_tokens, num_heads, head_dim = query.shape
    return query.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)


def _for_group(heads: Tensor, group: int) -> Tensor:
    """Return keys or values as (num_kv_heads, group, num_keys, head_dim), the group a view of one head."""
    return heads.unsqueeze(1).expand(-1, group, -1, -1)


# ---------------------------------------------------------------- planning, in integers


def _groups(seen: Indices, sequences: Sequence[int]) -> Iterator[list[int]]:
    """Yield sequences that see similarly much together: padding at most doubles what is not short anyway."""
    group: list[int] = []
    for sequence in sorted(sequences, key=lambda sequence: -int(seen[sequence])):
        longest = int(seen[group[0]]) if group else 0
        too_short = longest > 2 * int(seen[sequence]) + _CHEAP_PADDING
        if group and (too_short or (len(group) + 1) * longest > SCRATCH_TOKENS):
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _prefill(
    batch: ForwardBatch, sequence: int, start: int, stop: int, window: int | None, device: torch.device
) -> _Prefill:
    length = int(batch.context_lengths[sequence])
    num_computed = length - (stop - start)
    first = 0 if window is None else max(0, num_computed - window + 1)
    if first == num_computed:
        return _Prefill(start, stop, None)
    slots = _context_slots(batch, [sequence], numpy.array([first]), length - first)
    return _Prefill(start, stop, index_tensor(slots[0], device))


def _decode(batch: ForwardBatch, seen: Indices, group: Sequence[int], zero_slot: int, device: torch.device) -> _Decode:
    longest = int(seen[group].max())
    inside = numpy.arange(longest) < seen[group][:, None]  # (num_rows, longest)
    slots = _context_slots(batch, group, (batch.context_lengths - seen)[group], longest)
    return _Decode(
        rows=index_tensor(batch.query_starts[group], device),
        slots=index_tensor(numpy.where(inside, slots, zero_slot).reshape(-1), device),
        mask=None if inside.all() else torch.from_numpy(inside[:, None, None]).to(device),
    )


def _context_slots(batch: ForwardBatch, sequences: Sequence[int], starts: Indices, length: int) -> Indices:
    """Return the slots (num_sequences, length) of as many positions of each sequence, from its own start on.

    What lies behind the end of a sequence is any slot.
    """
    tables, num_blocks = batch.block_tables, -(-length // BLOCK_SIZE)
    if not starts.any():
        return _block_slots(tables[sequences, :num_blocks])[:, :length]
    # One block more, because a start may lie inside of one; then what comes before it in the block is skipped.
    columns = (starts[:, None] // BLOCK_SIZE + numpy.arange(num_blocks + 1)).clip(max=tables.shape[1] - 1)
    slots = _block_slots(tables[numpy.array(sequences)[:, None], columns])
    runs = numpy.lib.stride_tricks.sliding_window_view(slots, length, axis=1)
    return runs[numpy.arange(len(slots)), starts % BLOCK_SIZE]


def _block_slots(blocks: Indices) -> Indices:
    """Return the slots (num_rows, num_blocks * BLOCK_SIZE) of blocks (num_rows, num_blocks)."""
    slots = blocks.astype(numpy.int64)[:, :, None] * BLOCK_SIZE + numpy.arange(BLOCK_SIZE)
    return slots.reshape(len(blocks), -1)


def index_tensor(indices: Indices, device: torch.device) -> Tensor:
    """Return a copy of `indices` on `device`, int64 as torch's indexing wants it."""
    return torch.from_numpy(indices.astype(numpy.int64)).to(device)
