"""`PagedBackend`: what every backend on this paged cache has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from infinilm.backends.torch.cache import CachedLayers, Memory, PagedCache, cache_spec
from infinilm_hookspecs import CacheSpec, ForwardBatch, ParameterSpec, WeightRule

Run = Callable[[ForwardBatch, PagedCache], Tensor]
"""Runs one step and returns float32 logits (len(batch.logits_indices), vocab_size)."""


class ParameterStore(Protocol):
    """Parameters in memory, each allocated when it is first asked for."""

    def destination(self, name: str) -> Tensor:
        """Return the buffer of the parameter `name`."""

    def loaded(self, name: str) -> None:
        """Take note that `name` is full."""

    def require_all(self) -> None:
        """Raise `PlanError` naming parameters that were never loaded."""

    def free(self) -> None:
        """Drop every buffer."""


class PagedBackend(ABC):
    """The `Backend` protocol over stores of parameters, a cache for `layers`, and what `_assemble` makes of them.

    `stores` are given with the parameters each of them keeps. Nothing is allocated before it is asked for. `memory` is
    `Platform.memory`; without it, a cache that is too big is noticed by the device alone.
    """

    weight_rule: WeightRule | None = None
    keeps_parameters = True

    def __init__(
        self,
        stores: Sequence[tuple[Mapping[str, ParameterSpec], ParameterStore]],
        layers: CachedLayers,
        *,
        dtype: str,
        device: str,
        memory: Memory | None,
    ) -> None:
        self._parameters = {name: spec for specs, _ in stores for name, spec in specs.items()}
        self._stores = [store for _, store in stores]
        self._store_of = {name: store for specs, store in stores[1:] for name in specs}  # all others are the first's
        self._layers = layers
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = torch.device(device)
        self._memory = memory
        self._run: Run | None = None
        self._cache: PagedCache | None = None

    @abstractmethod
    def _assemble(self) -> Run:
        """Put the model together. Called when every parameter is loaded, and again after each later load."""

    def parameters(self) -> Mapping[str, ParameterSpec]:
        """Return every parameter wanted."""
        return self._parameters

    def destination(self, name: str) -> Tensor:
        """Return the buffer of a parameter, or its rows of a fused one. A tied parameter has none."""
        return self._store_of.get(name, self._stores[0]).destination(name)

    def loaded(self, name: str) -> None:
        """Take note that the buffer of `name` is full."""
        self._store_of.get(name, self._stores[0]).loaded(name)

    def finish_loading(self) -> None:
        """Put the model together. Raises `PlanError` where parameters were never loaded."""
        for store in self._stores:
            store.require_all()
        self._run = self._assemble()

    def cache_spec(self) -> CacheSpec:
        """Return what the cache costs: keys and values of all layers, and nothing per slot."""
        return cache_spec(self._layers, self._dtype)

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        """Allocate an empty cache in place of the one before. Raises `UnavailableError` where there is no room."""
        self._cache = None
        self._cache = PagedCache(self._layers, num_blocks, self._dtype, self._device, self._memory)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy cache blocks: (from, to) pairs."""
        assert self._cache is not None
        self._cache.copy_blocks(pairs)

    def release(self, slots: Sequence[int]) -> None:  # noqa: B027  # empty because there is nothing to forget
        """Do nothing: a sequence's state is its blocks."""

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one step and return float32 logits (len(batch.logits_indices), vocab_size)."""
        assert self._run is not None, "forward before finish_loading"
        assert self._cache is not None, "forward before allocate_cache"
        return self._run(batch, self._cache)

    def close(self) -> None:
        """Free weights and cache."""
        self._run = None
        self._cache = None
        for store in self._stores:
            store.free()
