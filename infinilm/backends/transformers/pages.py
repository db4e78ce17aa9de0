"""The paged cache of a model whose layers say for themselves how large their keys and values are.

Behind the last block lies one more that is never written: gathering may point there for padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infinilm.backends.torch.cache import BLOCK_SIZE
from infinilm_hookspecs import UnavailableError


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: the shapes of its keys and of its values, and their dtype."""

    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values."""
        return (torch.Size(self.key).numel() + torch.Size(self.value).numel()) * self.dtype.itemsize


class Pages:
    """Keys and values of `num_blocks` blocks. Layers that `shapes` leaves out are allocated when they first write.

    Raises `UnavailableError` where the device has no room for those of `shapes`.
    """

    def __init__(self, num_blocks: int, device: torch.device, shapes: Mapping[int, LayerShape] | None = None) -> None:
        self.zero_slot = num_blocks * BLOCK_SIZE
        self.shapes: dict[int, LayerShape] = {}
        self._device = device
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        try:
            for layer, shape in (shapes or {}).items():
                self._allocate(layer, shape)
        except (MemoryError, RuntimeError) as err:
            raise UnavailableError(f"no room for a cache of {num_blocks} blocks on {str(device)!r}: {err}") from err

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, (num_tokens, num_kv_heads, size), into `slots` (num_tokens,)."""
        if layer not in self._keys:
            self._allocate(layer, LayerShape(tuple(keys.shape[1:]), tuple(values.shape[1:]), keys.dtype))
        self._keys[layer].index_copy_(0, slots, keys)
        self._values[layer].index_copy_(0, slots, values)

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values in `slots` (n,), each (n, num_kv_heads, size)."""
        return self._keys[layer].index_select(0, slots), self._values[layer].index_select(0, slots)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, all of `pairs` at once: (from, to)."""
        if not pairs:
            return
        sources, targets = torch.tensor(pairs, device=self._device).unbind(1)
        for slots in (*self._keys.values(), *self._values.values()):
            blocks = slots.view(-1, BLOCK_SIZE, *slots.shape[1:])
            blocks[targets] = blocks[sources]

    def _allocate(self, layer: int, shape: LayerShape) -> None:
        num_slots = self.zero_slot + BLOCK_SIZE
        self.shapes[layer] = shape
        self._keys[layer] = torch.zeros((num_slots, *shape.key), dtype=shape.dtype, device=self._device)
        self._values[layer] = torch.zeros((num_slots, *shape.value), dtype=shape.dtype, device=self._device)
