"""`NativeBackend`: the `Backend` protocol over a model of a backend library.

Parameters are filled in the library's own memory, through DLPack. One call on it at a time, except for `cancel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from infinilm import _native
from infinilm_hookspecs import (
    CacheSpec,
    Config,
    DecoderConfig,
    ForwardBatch,
    InfinilmError,
    ParameterSpec,
    PlanError,
    RequestError,
    Shard,
    UnavailableError,
    WeightRule,
)

Memory = Callable[[str], tuple[int, int]]
"""`Platform.memory`: free and total bytes of a device."""

_Int32 = numpy.ndarray[Any, numpy.dtype[numpy.int32]]


class NativeBackend:
    """Runs `config` in `library`. Nothing is allocated before it is asked for."""

    config: Config | DecoderConfig
    weight_rule: WeightRule | None = None

    def __init__(
        self, name: str, library: _native.Library, config: DecoderConfig, request: _native.Request, *, memory: Memory
    ) -> None:
        self.name = name
        self.config = config
        self._vocab_size = config.vocab_size
        self._device = request.device
        self._memory = memory
        self._cache_bytes = 0
        with self._calling("model_create"):
            self._model = library.create_model(request)
            self.keeps_parameters = bool(library.query("keeps_parameters"))
            listed = self._model.parameters()
        self._specs = {parameter.name: _spec(parameter) for parameter in listed}
        self._indices = {parameter.name: index for index, parameter in enumerate(listed)}
        if len(self._specs) != len(listed):
            raise InfinilmError(f"backend {name!r} lists a parameter twice: {_repeated(listed)!r}")
        self._open: dict[str, Tensor] = {}
        self._waiting = {name for name, spec in self._specs.items() if spec.tied_to is None}

    def parameters(self) -> Mapping[str, ParameterSpec]:
        """Return what the library asks for."""
        return self._specs

    def destination(self, name: str) -> Tensor:
        """Return the library's buffer of a parameter, the same until it is loaded. A tied parameter has none."""
        spec = self._specs[name]
        if spec.tied_to is not None:
            raise KeyError(name)
        if name not in self._open:
            with self._calling(f"open_parameter of {name}"):
                self._open[name] = _as_tensor(self._model.open(self._indices[name]), spec.dtype)
        return self._open[name]

    def loaded(self, name: str) -> None:
        """Tell the library that the buffer of `name` is full. It may pack it, and free it once nobody holds it."""
        with self._calling(f"close_parameter of {name}"):
            self._model.close(self._indices[name])
        self._open.pop(name, None)
        self._waiting.discard(name)

    def finish_loading(self) -> None:
        """Tell the library that all is loaded. Raises `PlanError` where parameters were never loaded."""
        if self._waiting:
            names = ", ".join(sorted(self._waiting)[:5])
            raise PlanError(f"{len(self._waiting)} of {len(self._specs)} parameters were not loaded: {names}, ...")
        self._open.clear()
        with self._calling("loading_done"):
            self._model.loading_done()

    def cache_spec(self) -> CacheSpec:
        """Return what the library says that its cache costs."""
        with self._calling("cache_spec"):
            spec = self._model.cache_spec()
        return CacheSpec(spec.block_size, spec.bytes_per_block, spec.bytes_per_slot, bool(spec.shareable))

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        """Allocate an empty cache in place of the one before. Raises `UnavailableError` where there is no room."""
        spec = self.cache_spec()
        wanted = num_blocks * spec.bytes_per_block + num_slots * spec.bytes_per_slot
        free = self._memory(self._device)[0] + self._cache_bytes
        if wanted > free:
            raise UnavailableError(
                f"a cache of {num_blocks} blocks and {num_slots} slots takes {wanted} bytes, and {self._device!r} has "
                f"{free} left; lower max_model_len, max_num_seqs or kv_cache_memory"
            )
        self._cache_bytes = 0
        with self._calling("cache_create"):
            self._model.create_cache(num_blocks, num_slots)
        self._cache_bytes = wanted

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy cache blocks: (from, to) pairs, as if all were read before any is written."""
        if pairs:
            with self._calling("cache_copy_blocks"):
                self._model.copy_blocks(_int32(pairs))

    def release(self, slots: Sequence[int]) -> None:
        """Tell the library that sequences ended."""
        if len(slots):
            with self._calling("cache_release_slots"):
                self._model.release_slots(_int32(slots))

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one step and return float32 logits (len(batch.logits_indices), vocab_size), on the CPU."""
        if any(batch.extras):
            brought = f"{batch.extras!r:.80}"
            raise RequestError(f"backend {self.name!r} takes tokens alone, and a request brings more: {brought}")
        logits = torch.empty((len(batch.logits_indices), self._vocab_size), dtype=torch.float32)
        prompt_lengths = batch.context_lengths if batch.prompt_lengths is None else batch.prompt_lengths
        with self._calling("forward"):
            self._model.forward(
                _int32(batch.token_ids),
                _int32(batch.positions),
                _int32(batch.query_starts),
                _int32(batch.context_lengths),
                _int32(batch.block_tables),
                _int32(batch.slot_mapping),
                _int32(batch.slots),
                _int32(batch.logits_indices),
                _int32(prompt_lengths),
                logits.data_ptr(),
                self._vocab_size,
            )
        return logits

    def cancel(self) -> None:
        """Have the call that runs now end soon, with an `InfinilmError`. Any thread may call it."""
        self._model.cancel()

    def close(self) -> None:
        """Free everything, once the call that runs is over. Safe to call twice."""
        self._open.clear()
        self._model.destroy()

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """Turn what the library says into the error of the house that it is."""
        try:
            yield
        except _native.CallError as err:
            message, code = err.args
            kind = _ERRORS.get(code, InfinilmError)
            raise kind(f"backend {self.name!r} failed in {what}: {message}") from err


_ERRORS: Mapping[int, type[InfinilmError]] = {
    _native.INVALID: PlanError,
    _native.UNSUPPORTED: UnavailableError,
    _native.UNAVAILABLE: UnavailableError,
    _native.OUT_OF_MEMORY: UnavailableError,
}


def _spec(parameter: _native.Parameter) -> ParameterSpec:
    shard = None
    if parameter.shard_dim >= 0:
        segments = tuple(parameter.shard_segments) or None
        shard = Shard(parameter.shard_dim, parameter.shard_multiple, segments)
    return ParameterSpec(tuple(parameter.shape), parameter.dtype, shard, parameter.tied_to or None)


def _repeated(listed: Sequence[_native.Parameter]) -> str:
    names = [parameter.name for parameter in listed]
    return next(name for name in names if names.count(name) > 1)


def _as_tensor(capsule: object, dtype: str) -> Tensor:
    """Return a view of a library's buffer. Eight-bit floats come as bytes, which every torch takes."""
    tensor: Tensor = from_dlpack(capsule)
    wanted: torch.dtype = getattr(torch, dtype)
    return tensor.view(wanted) if tensor.dtype is torch.uint8 and wanted is not torch.uint8 else tensor


def _int32(numbers: object) -> _Int32:
    return numpy.ascontiguousarray(numbers, dtype=numpy.int32)
