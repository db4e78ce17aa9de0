"""`ModuleBackend`: anybody's torch module as a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from infinilm.backends.torch.attention import index_tensor, plan_windows
from infinilm.backends.torch.attention_layer import BoundLayers
from infinilm.backends.torch.cache import Memory, PagedCache
from infinilm.backends.torch.module_parameters import ModuleParameters, build_module
from infinilm.backends.torch.paged_backend import PagedBackend, Run
from infinilm.backends.torch.support import why_not_request
from infinilm_hookspecs import BackendRequest, Config, DecoderConfig, ForwardBatch, PluginError, Shard, WeightRule


class ModuleBackend(PagedBackend):
    """Runs `module`, a whole model, in `dtype` on `device`.

    `module` is called with `config`, one of the lineage's, and returns a `torch.nn.Module`, or is one. It is built on
    torch's meta device, so that nothing is allocated before it is loaded. It has

    - `forward(token_ids, positions)`: from int64 (num_tokens,) each, the new tokens of several sequences end to end, to
      hidden states (num_tokens, hidden_size). What a token may know of others comes through `Attention` layers alone,
      each called once.
    - `compute_logits(hidden)`: from the rows whose logits are wanted, (num_rows, hidden_size), to (num_rows,
      vocab_size).
    - `init_buffers()`, on any module in it that has buffers no checkpoint stores: called after every load, on the
      device.

    Parameters are called as the module calls them; `weight_rule` maps the stored names and shapes to those. `shards`
    say how tensor parallelism cuts them, by templates of whole names, as does `shards` of any module in it, relative to
    that module; so `dtypes` say which are not kept in `dtype`. `memory` is `Platform.memory`.

    Raises `PluginError` for a module that lacks one of these, a declaration that fits no parameter, and a buffer that
    nothing computes.
    """

    name = "torch_module"

    def __init__(
        self,
        module: Callable[[Any], nn.Module] | nn.Module,
        config: Config | DecoderConfig,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        memory: Memory | None = None,
        shards: Mapping[str, Shard] | None = None,
        weight_rule: WeightRule | None = None,
    ) -> None:
        self.config = config
        self.weight_rule = weight_rule
        self._vocab_size = config.vocab_size if isinstance(config, DecoderConfig) else config.get("vocab_size")
        self._module = _build(module, config)
        modules = {"": self._module}
        self._attention = BoundLayers(modules)
        with self._attention.released_on_error():
            self._store = store = ModuleParameters(modules, dtype, torch.device(device), shards)
        super().__init__([(store.specs, store)], self._attention.configs, dtype=dtype, device=device, memory=memory)

    @classmethod
    def for_request(
        cls,
        request: BackendRequest,
        module: Callable[[Any], nn.Module] | nn.Module,
        *,
        shards: Mapping[str, Shard] | None = None,
        weight_rule: WeightRule | None = None,
    ) -> ModuleBackend | None:
        """Return what `provide_backend` answers to `request`: the backend for the last config of its lineage.

        Declines, with the reason, where more is asked for than a module can do: several processes, quantization.
        """
        reason = why_not_request(request)
        if reason is not None:
            request.decline(reason)
            return None
        return cls(
            module,
            request.lineage[-1],
            dtype=request.dtype,
            device=request.device,
            memory=request.platform.memory,
            shards=shards,
            weight_rule=weight_rule,
        )

    def close(self) -> None:
        """Free weights and cache, and let go of the module."""
        super().close()
        self._attention.release()

    def _assemble(self) -> Run:
        self._store.compute_buffers()
        return self._step

    def _step(self, batch: ForwardBatch, cache: PagedCache) -> Tensor:
        token_ids, positions, wanted = (
            index_tensor(indices, self._device) for indices in (batch.token_ids, batch.positions, batch.logits_indices)
        )
        plans = plan_windows(batch, self._attention.windows, cache.zero_slot, self._device)
        with self._attention.running(cache, plans):
            hidden: Tensor = self._module(token_ids, positions)
        self._check("forward", hidden, len(token_ids), None)
        logits: Tensor = self._module.compute_logits(hidden.index_select(0, wanted))  # type: ignore[operator]  # checked
        self._check("compute_logits", logits, len(wanted), self._vocab_size)
        return logits.float()

    def _check(self, method: str, result: object, num_rows: int, num_columns: int | None) -> None:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        if len(found) == 2 and found[0] == num_rows and num_columns in (None, found[1]):
            return
        wanted = f"({num_rows}, {'hidden_size' if num_columns is None else num_columns})"
        raise PluginError(f"{method} of {type(self._module).__name__} returned {found}, and {wanted} is wanted")


def _build(module: Callable[[Any], nn.Module] | nn.Module, config: Config | DecoderConfig) -> nn.Module:
    if not isinstance(module, nn.Module):
        factory = module
        module = build_module(lambda: factory(config), getattr(factory, "__name__", repr(factory)))
    if not callable(getattr(module, "compute_logits", None)):
        raise PluginError(
            f"{type(module).__name__} has no compute_logits(hidden); a model is forward(token_ids, positions), which "
            "returns hidden states, and compute_logits(hidden), which is called with the rows whose logits are wanted"
        )
    return module
