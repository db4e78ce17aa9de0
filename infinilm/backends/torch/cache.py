"""The paged cache: keys and values of every layer, in blocks that the engine hands out.

Knows slots (block * block_size + offset), never which sequence owns them. Behind the last block lies one more that is
never written and stays zero: gathering may point there for padding, so that nothing stale, a NaN perhaps, gets near a
sequence that does not own it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy
import torch
from torch import Tensor

from infinilm_hookspecs import AttentionConfig, CacheSpec, DecoderConfig, DynamicRopeScaling, UnavailableError

BLOCK_SIZE: Final = 16
# Gathers of up to this many tokens write to memory kept for it: fresh pages cost more than the copy.
SCRATCH_TOKENS: Final = 16384

Memory = Callable[[str], tuple[int, int]]
"""`Platform.memory`: free and total bytes of a device."""

CachedLayers = DecoderConfig | Sequence[AttentionConfig]
"""The layers a cache is for: all attention of a decoder, or each by itself, in the order they are numbered."""


def cache_spec(config: CachedLayers, dtype: torch.dtype) -> CacheSpec:
    """Return what a block costs: keys and values of all layers.

    With dynamic rope a key depends on the length of its prompt, so that no other sequence may use it.
    """
    per_token = sum(2 * math.prod(heads) for heads in _heads(config))
    return CacheSpec(
        block_size=BLOCK_SIZE,
        bytes_per_block=BLOCK_SIZE * per_token * dtype.itemsize,
        shareable=not any(
            its.rope and isinstance(its.rope.scaling, DynamicRopeScaling) for its in attention_layers(config)
        ),
    )


class PagedCache:
    """Keys and values of `num_blocks` blocks. Raises `UnavailableError` where the device has no room for them."""

    def __init__(
        self, config: CachedLayers, num_blocks: int, dtype: torch.dtype, device: torch.device, memory: Memory | None
    ) -> None:
        self.dtype = dtype
        self.zero_slot = num_blocks * BLOCK_SIZE
        num_bytes = (num_blocks + 1) * cache_spec(config, dtype).bytes_per_block
        if memory is not None:
            _require_room(num_bytes, str(device), memory)
        # One (num_slots, num_kv_heads, head_dim) each for the keys and values of every layer.
        shapes = [((num_blocks + 1) * BLOCK_SIZE, *heads) for heads in _heads(config)]
        try:
            self._keys = [_zeros(shape, dtype, device) for shape in shapes]
            self._values = [_zeros(shape, dtype, device) for shape in shapes]
        except (MemoryError, RuntimeError, ValueError) as err:
            raise UnavailableError(
                f"no room for a cache of {num_blocks} blocks, {num_bytes} bytes, on {str(device)!r}: {err}"
            ) from err
        self._scratch: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, (num_tokens, num_kv_heads, head_dim), into `slots` (num_tokens,)."""
        self._keys[layer].index_copy_(0, slots, keys)
        self._values[layer].index_copy_(0, slots, values)

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values in `slots` (n,), each (n, num_kv_heads, head_dim), until the next gather."""
        keys, values = self._keys[layer], self._values[layer]
        num_slots = len(slots)
        if num_slots > SCRATCH_TOKENS:
            return keys.index_select(0, slots), values.index_select(0, slots)
        gathered_keys, gathered_values = (scratch[:num_slots] for scratch in self._scratch_like(keys))
        torch.index_select(keys, 0, slots, out=gathered_keys)
        torch.index_select(values, 0, slots, out=gathered_values)
        return gathered_keys, gathered_values

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, all of `pairs` at once: (from, to)."""
        if not pairs:
            return
        sources, targets = torch.tensor(pairs).unbind(1)
        for slots in (*self._keys, *self._values):
            blocks = slots.view(-1, BLOCK_SIZE, *slots.shape[1:])
            blocks[targets.to(slots.device)] = blocks[sources.to(slots.device)]

    def _scratch_like(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        heads = slots.shape[1:]
        if heads not in self._scratch:
            shape = (SCRATCH_TOKENS, *heads)
            self._scratch[heads] = slots.new_empty(shape), slots.new_empty(shape)
        return self._scratch[heads]


def attention_layers(config: CachedLayers) -> list[AttentionConfig]:
    """Return every layer that has a place in the cache, in the order of the places."""
    mixers = [layer.mixer for layer in config.layers] if isinstance(config, DecoderConfig) else config
    return [mixer for mixer in mixers if isinstance(mixer, AttentionConfig)]


def _heads(config: CachedLayers) -> list[tuple[int, int]]:
    """Return (num_kv_heads, head_dim) of every layer."""
    return [(mixer.num_kv_heads, mixer.head_dim) for mixer in attention_layers(config)]


def _require_room(num_bytes: int, device: str, memory: Memory) -> None:
    free, total = memory(device)
    if num_bytes > free:
        raise UnavailableError(
            f"the cache needs {num_bytes} bytes, and {device!r} has {free} of {total} bytes free; "
            "ask for less with kv_cache_memory, max_num_seqs or max_model_len"
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The system hands out zero pages when they are first touched: an empty cache costs neither time nor memory.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(numpy.zeros(num_bytes, numpy.uint8)).view(dtype).view(shape)
