"""`TorchBackend`: the `Backend` protocol over a `Decoder`, its weights and its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from infinilm.backends.torch.cache import Memory, PagedCache, cache_spec
from infinilm.backends.torch.decoder import Decoder
from infinilm.backends.torch.weights import Weights
from infinilm_hookspecs import CacheSpec, DecoderConfig, ForwardBatch, ParameterSpec, parameters


class TorchBackend:
    """Runs `config` in `dtype` on `device`. Nothing is allocated before it is asked for.

    `memory` is `Platform.memory`; without it, a cache that is too big is noticed by the device alone.
    """

    name = "torch"
    weight_rule = None
    keeps_parameters = True

    def __init__(self, config: DecoderConfig, *, dtype: str, device: str, memory: Memory | None = None) -> None:
        self.config = config
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = torch.device(device)
        self._memory = memory
        self._parameters = parameters(config, dtype)
        self._weights = Weights(self._parameters, self._device)
        self._decoder: Decoder | None = None
        self._cache: PagedCache | None = None

    def parameters(self) -> Mapping[str, ParameterSpec]:
        """Return the canonical parameters of the config."""
        return self._parameters

    def destination(self, name: str) -> Tensor:
        """Return the buffer of a parameter, or its rows of a fused one. A tied parameter has none."""
        return self._weights.destination(name)

    def loaded(self, name: str) -> None:
        """Take note that the buffer of `name` is full."""
        self._weights.loaded(name)

    def finish_loading(self) -> None:
        """Put the model together. Raises `PlanError` where parameters were never loaded."""
        self._weights.require_all()
        self._decoder = Decoder(self.config, self._weights)

    def cache_spec(self) -> CacheSpec:
        """Return what the cache costs: keys and values of all layers, and nothing per slot."""
        return cache_spec(self.config, self._dtype)

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        """Allocate an empty cache in place of the one before. Raises `UnavailableError` where there is no room."""
        self._cache = None
        self._cache = PagedCache(self.config, num_blocks, self._dtype, self._device, self._memory)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy cache blocks: (from, to) pairs."""
        assert self._cache is not None
        self._cache.copy_blocks(pairs)

    def release(self, slots: Sequence[int]) -> None:
        """Do nothing: a sequence's state is its blocks."""

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one step and return float32 logits (len(batch.logits_indices), vocab_size)."""
        assert self._decoder is not None, "forward before finish_loading"
        assert self._cache is not None, "forward before allocate_cache"
        return self._decoder(batch, self._cache)

    def close(self) -> None:
        """Free weights and cache."""
        self._decoder = None
        self._cache = None
        self._weights.free()
