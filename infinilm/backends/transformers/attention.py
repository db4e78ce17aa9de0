"""Causal attention of a ragged batch on the engine's paged cache, as a function of transformers' attention interface.

transformers keeps attention functions by name, for the whole process; what one forward works on is reached through a
context variable, so that two backends do not mix. A model takes part as long as it does what the interface says:
hand new keys and values to the cache, make its masks through the mask interface, and hand all three to this function.
Anything else raises `UnpagedError`, and the model is run on its own cache instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import ref

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from infinilm.backends.torch.attention import AttentionPlan, index_tensor, plan_attention
from infinilm.backends.transformers.pages import Pages
from infinilm_hookspecs import ForwardBatch

NAME: Final = "infinilm_paged"

# A long prefill is attended in tiles of this many queries, so that masks and scores stay small.
_QUERY_TILE: Final = 512
# What models hand to attention functions for other kernels, or for themselves: nothing that changes the result here.
_HARMLESS: Final = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "dropout",
        "is_causal",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)

MaskFunction = Callable[[Any, Any, Any, Any], Any]


class UnpagedError(Exception):
    """A model does something that cannot be done on the paged cache; the message says what."""


class _MissingError(UnpagedError, AttributeError):
    """What a model asks for is not there; whoever asks whether it is gets an answer too."""


@dataclass(frozen=True, slots=True)
class Visible:
    """Which keys a layer's tokens see, in place of a mask: all before them, a window of them, or what `function` says.

    `function` takes a batch row, a head, a query's position and a key's, as transformers' mask functions do.
    """

    window: int | None = None
    function: MaskFunction | None = None

    def __getattr__(self, name: str) -> Any:
        raise _MissingError(f"it computes with its masks: {name}")

    def __getitem__(self, index: object) -> Any:
        raise UnpagedError("it computes with its masks: a slice")


@dataclass(slots=True)
class Step:
    """One forward: its batch, the pages, and the keys and values that layers handed over, each with its layer.

    They are not kept alive: a long prefill has many.
    """

    batch: ForwardBatch
    pages: Pages
    device: torch.device
    written: list[tuple[ref[Tensor], ref[Tensor], int]] = field(default_factory=list)
    attended: set[int] = field(default_factory=set)
    plans: dict[int | None, AttentionPlan] = field(default_factory=dict)

    def plan(self, window: int | None) -> AttentionPlan:
        """Return how the batch is attended by layers with this window."""
        if window not in self.plans:
            self.plans[window] = plan_attention(self.batch, window, self.pages.zero_slot, self.device)
        return self.plans[window]

    def layer_of(self, key: Tensor, value: Tensor) -> int:
        """Return the layer that wrote these keys and values, maybe for another that shares them."""
        for written_key, written_value, layer in reversed(self.written):
            if key is written_key() and value is written_value():
                return layer
        raise UnpagedError("it attends to keys or values that are not those it put in the cache")


_step: ContextVar[Step] = ContextVar("infinilm_paged_step")


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make `step` the one that attention functions work on, inside this block of this thread."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def register() -> None:
    """Make the attention function known to transformers by `NAME`. Once more changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, describe_mask)


class StepCache:
    """What a model takes for its cache: it writes to the pages of a step, and says that nothing came before."""

    is_compileable = False
    is_initialized = True

    def __init__(self, step: Step) -> None:
        self._step = step

    def __getattr__(self, name: str) -> Any:
        raise _MissingError(f"it asks its cache for {name}")

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values, (1, num_kv_heads, num_tokens, size), and return them alone."""
        slots = self._step.plan(None).slot_mapping
        self._step.pages.write(layer, slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        self._step.written.append((ref(key), ref(value), layer))
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        """Return that nothing is cached: positions are given."""
        return 0

    def get_query_offset(self, layer: int = 0) -> int:
        """Return where the queries begin, for a mask that nobody builds."""
        return 0

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        """Return the sizes of a mask that nobody builds."""
        return query_length, 0


# ---------------------------------------------------------------- what transformers calls


def describe_mask(
    *, mask_function: MaskFunction, local_size: int | None = None, use_vmap: bool = False, **options: Any
) -> Visible:
    """Return in words which keys are visible, where transformers would have a mask built."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return Visible()
    at = torch.arange(8)
    if bool((mask_function(0, 0, at[:, None], at[None]) & (at[None] > at[:, None])).any()):
        raise UnpagedError("its tokens see those after them")
    if local_size is not None and not use_vmap and _is_window(mask_function, local_size):
        return Visible(window=local_size)
    return Visible(function=mask_function)


def _is_window(function: MaskFunction, size: int) -> bool:
    """Return whether `function` is a sliding window, not for instance chunks of the same size."""
    query = torch.tensor([size, size, size, 2 * size])
    key = torch.tensor([0, 1, size, size])
    wanted = [False, size > 1, True, False]
    return [bool(one) for one in function(0, 0, query, key)] == wanted


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend every token to its own context. `query` is (1, num_heads, num_tokens, size), the result is
    (1, num_tokens, num_heads, size of values). `s_aux` (num_heads,) are scores of a key that is always there and has
    no value. Raises `UnpagedError` for what is not known here.
    """
    step = _step.get(None)
    if step is None:
        raise UnpagedError("attention outside of a step")
    _refuse(attention_mask, options)
    layer = step.layer_of(key, value)
    step.attended.add(layer)
    assert attention_mask is not None
    kernel = _Kernel(scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap=softcap, sinks=s_aux)
    attended = _attend_batch(step, kernel, attention_mask, layer, query, key, value)
    return attended[None], None


def _refuse(mask: object, options: dict[str, Any]) -> None:
    if not isinstance(mask, Visible):
        raise UnpagedError(f"it masks attention with {type(mask).__name__}, not through the mask interface")
    if options.get("is_causal") is False:
        raise UnpagedError("its attention is not causal")
    unknown = [name for name, value in options.items() if value is not None and name not in _HARMLESS]
    if unknown:
        raise UnpagedError(f"its attention takes {', '.join(sorted(unknown))}")


# ---------------------------------------------------------------- kernels


@dataclass(frozen=True, slots=True)
class _Kernel:
    """Softmax attention: scores times `scale`, capped at `softcap`, beside `sinks` (num_heads,)."""

    scale: float
    softcap: float | None
    sinks: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend (rows, num_heads, n, size) to (rows, num_kv_heads, m, size), where rows or n is 1.

        `mask` is (rows, 1, n, m), True where a key is seen. Returns (rows, num_heads, n, size of values).
        """
        rows, num_heads, num_queries, size = query.shape
        num_kv_heads = key.shape[1]
        # Nothing is repeated in memory: the heads that share keys stand where a head has its queries, or where there
        # are several queries, key-value heads stand where the rows do.
        if num_queries == 1:
            query = query.reshape(rows, num_kv_heads, -1, size)
            sinks = None if self.sinks is None else self.sinks.view(1, num_kv_heads, -1, 1)
        else:
            query = query.reshape(num_kv_heads, -1, num_queries, size)
            group = query.shape[1]
            key, value = (part[0][:, None].expand(-1, group, -1, -1) for part in (key, value))
            sinks = None if self.sinks is None else self.sinks.view(num_kv_heads, -1, 1, 1)
        if self.softcap is None and sinks is None:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        else:
            attended = self._by_scores(query, key, value, mask, sinks)
        return attended.reshape(rows, num_heads, num_queries, -1)

    def _by_scores(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        scores = (query @ key.transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
        weights = scores.softmax(-1)
        if sinks is not None:
            weights = weights[..., :-1]
        return weights.to(value.dtype) @ value


def _attend_batch(
    step: Step, kernel: _Kernel, visible: Visible, layer: int, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Return (num_tokens, num_heads, size of values)."""
    plan = step.plan(visible.window)
    queries = query[0].transpose(0, 1)  # (num_tokens, num_heads, size)
    attended = queries.new_empty(*queries.shape[:2], value.shape[-1])
    for prefill in plan.prefills:
        rows = slice(prefill.start, prefill.stop)
        if prefill.slots is None:
            seen = key[:, :, rows], value[:, :, rows]
        else:
            seen = _heads_first(step.pages.gather(layer, prefill.slots), 1)
        result = _attend_prefill(kernel, visible, query[:, :, rows], *seen)  # (1, num_heads, n, size)
        attended[rows] = result[0].transpose(0, 1)
    for decode in plan.decodes:
        seen = _heads_first(step.pages.gather(layer, decode.slots), len(decode.rows))
        mask = decode.mask  # (num_rows, 1, 1, longest)
        if visible.function is not None:
            mask = _visible_to_last(visible.function, step.batch, decode.rows, seen[0].shape[2], mask)
        result = kernel(queries[decode.rows][:, :, None], *seen, mask)  # (num_rows, num_heads, 1, size)
        attended[decode.rows] = result[:, :, 0]
    return attended


def _heads_first(cached: tuple[Tensor, Tensor], num_rows: int) -> tuple[Tensor, Tensor]:
    """Return gathered keys and values as (num_rows, num_kv_heads, num_keys, size)."""
    keys, values = (part.view(num_rows, -1, *part.shape[1:]).transpose(1, 2) for part in cached)
    return keys, values


def _attend_prefill(kernel: _Kernel, visible: Visible, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend the last queries of as many keys, in tiles."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    start, tiles = num_keys - num_queries, []
    for tile in torch.split(query, _QUERY_TILE, dim=2):
        stop = start + tile.shape[2]
        first = 0 if visible.window is None else max(0, start - visible.window + 1)
        at = torch.arange(start, stop, device=query.device)[:, None]
        keys_at = torch.arange(first, stop, device=query.device)[None]
        mask = keys_at <= at  # (tile, num_seen)
        if visible.window is not None:
            mask &= keys_at > at - visible.window
        if visible.function is not None:
            mask &= visible.function(0, 0, at, keys_at)
        tiles.append(kernel(tile, key[:, :, first:stop], value[:, :, first:stop], mask[None, None]))
        start = stop
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)


def _visible_to_last(
    function: MaskFunction, batch: ForwardBatch, rows: Tensor, num_keys: int, mask: Tensor | None
) -> Tensor:
    """Return the mask (num_rows, 1, 1, num_keys) of tokens that are the last of their sequences."""
    sequences = numpy.searchsorted(batch.query_starts, rows.cpu().numpy(), side="right") - 1
    at = index_tensor(batch.context_lengths[sequences] - 1, rows.device)[:, None]
    seen = function(0, 0, at, torch.arange(num_keys, device=rows.device)[None])
    seen = torch.as_tensor(seen, device=rows.device).expand(len(rows), num_keys)[:, None, None]
    return seen if mask is None else seen & mask
