"""The loader of backend libraries: `csrc/bindings/module.cpp`."""

from typing import Any

import numpy

_Int32 = numpy.ndarray[Any, numpy.dtype[numpy.int32]]

ABI_VERSION: tuple[int, int]
INVALID: int
UNSUPPORTED: int
UNAVAILABLE: int
OUT_OF_MEMORY: int
CANCELLED: int

class CallError(RuntimeError):
    """A call into a library failed; `args` are (message, code)."""

class RefusedError(ImportError):
    """A library is not used; `args` are (message, path, stage, reason, abi_found, abi_wanted)."""

class Request:
    """What is asked of a library: `infinilm_model_request`."""

    def __init__(
        self,
        *,
        config: str,
        dtype: str,
        device: str,
        quantization: str | None,
        stored_quantization: str | None,
        max_model_len: int,
        max_num_seqs: int,
    ) -> None: ...
    @property
    def device(self) -> str: ...

class Parameter:
    """`infinilm_parameter`; `tied_to` is "" where there is none."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def tied_to(self) -> str: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def shard_dim(self) -> int: ...
    @property
    def shard_multiple(self) -> int: ...
    @property
    def shard_segments(self) -> list[int]: ...

class CacheSpec:
    """`infinilm_cache_spec`."""

    @property
    def block_size(self) -> int: ...
    @property
    def bytes_per_block(self) -> int: ...
    @property
    def bytes_per_slot(self) -> int: ...
    @property
    def shareable(self) -> int: ...

class Library:
    """A library that was taken."""

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def build(self) -> str: ...
    @property
    def abi(self) -> str: ...
    def query(self, name: str) -> int: ...
    def memory(self) -> dict[str, int]: ...
    def require_support(self, request: Request) -> None: ...
    def create_model(self, request: Request) -> Model: ...

class Model:
    """A model of a library. Calls wait for each other, except for `cancel`."""

    def parameters(self) -> list[Parameter]: ...
    def open(self, index: int) -> object:
        """Return a DLPack capsule."""

    def close(self, index: int) -> None: ...
    def loading_done(self) -> None: ...
    def cache_spec(self) -> CacheSpec: ...
    def create_cache(self, num_blocks: int, num_slots: int) -> None: ...
    def copy_blocks(self, pairs: _Int32) -> None: ...
    def release_slots(self, slots: _Int32) -> None: ...
    def forward(
        self,
        token_ids: _Int32,
        positions: _Int32,
        query_starts: _Int32,
        context_lengths: _Int32,
        block_tables: _Int32,
        slot_mapping: _Int32,
        slots: _Int32,
        logits_indices: _Int32,
        prompt_lengths: _Int32,
        logits_address: int,
        vocab_size: int,
    ) -> None: ...
    def cancel(self) -> None: ...
    def destroy(self) -> None: ...

def load_library(path: bytes) -> Library: ...
def loaded_libraries() -> list[Library]: ...
def refusals() -> list[tuple[str, str, str, str, str]]: ...
def shut_down(timeout_ms: int) -> None: ...
