"""`TorchBackend`: a `DecoderConfig` over its weights, the modules that plugins supply to it, and the paged cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from infinilm.backends.torch.attention_layer import BoundLayers
from infinilm.backends.torch.cache import Memory, attention_layers
from infinilm.backends.torch.decoder import Decoder
from infinilm.backends.torch.module_parameters import ModuleParameters, build_module
from infinilm.backends.torch.paged_backend import PagedBackend, Run
from infinilm.backends.torch.weights import Weights
from infinilm_hookspecs import DecoderConfig, parameters

Factories = Mapping[str, Callable[[], nn.Module]]
"""What makes the module of each part that is `Named`, by the path its parameters' names begin with."""


class TorchBackend(PagedBackend):
    """Runs `config` in `dtype` on `device`. Nothing is allocated before it is asked for.

    `factories` make the modules of its `Named` parts. `memory` is `Platform.memory`; without it, a cache that is too
    big is noticed by the device alone.
    """

    name = "torch"

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: str,
        device: str,
        memory: Memory | None = None,
        factories: Factories = MappingProxyType({}),
    ) -> None:
        self.config = config
        canonical = parameters(config, dtype)
        self._weights = Weights(canonical, torch.device(device))
        self._modules = {path: build_module(factory, path) for path, factory in factories.items()}
        layers = attention_layers(config)
        self._attention = BoundLayers(self._modules, first=len(layers))
        with self._attention.released_on_error():
            self._supplied = ModuleParameters(self._modules, dtype, torch.device(device))
        super().__init__(
            [(canonical, self._weights), (self._supplied.specs, self._supplied)],
            [*layers, *self._attention.configs],
            dtype=dtype,
            device=device,
            memory=memory,
        )

    def _assemble(self) -> Run:
        self._supplied.compute_buffers()
        return Decoder(self.config, self._weights, self._modules, self._attention)

    def close(self) -> None:
        """Free weights and cache, and let go of the modules."""
        super().close()
        self._attention.release()
