"""The cpu backend's library, built for tests and driven through its C table alone, with ctypes and no loader."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char, c_char_p, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infinilm_hookspecs import CacheSpec, DecoderConfig, ForwardBatch, ParameterSpec, Shard

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cpu"
BUILD = ROOT / "build" / "cpu"


@cache
def build(target: str = "all") -> Path:
    """Build the library and its C++ tests where that has not been done, and return the folder. Processes take turns."""
    import fcntl

    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "CMakeCache.txt").exists():
            options = ["-DCMAKE_BUILD_TYPE=Release", "-DINFINILM_CPU_TESTS=ON"]
            _run("cmake", "-S", str(SOURCE), "-B", str(BUILD), *options)
        _run("cmake", "--build", str(BUILD), "--target", target, "--parallel", str(len(os.sched_getaffinity(0))))
    return BUILD


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


# ---------------------------------------------------------------- the structs of backend.h


_HEAD = [("struct_size", c_uint64), ("extension", c_void_p)]


def _struct(name: str, *fields: tuple[str, Any]) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": [*_HEAD, *fields]})


Error = _struct("Error", ("message", c_char * 1024))
Host = _struct(
    "Host",
    ("abi_major", c_uint32),
    ("abi_minor", c_uint32),
    *((name, c_void_p) for name in ("name", "version", "context", "log", "allocate", "deallocate", "parallel_for")),
    ("is_aborted", ctypes.CFUNCTYPE(c_int32, c_void_p)),
    ("rank", c_int32),
    ("world_size", c_int32),
    ("all_reduce", c_void_p),
    ("all_gather", c_void_p),
)
ModelRequest = _struct(
    "ModelRequest",
    *((name, c_char_p) for name in ("config", "dtype", "device", "quantization", "stored_quantization")),
    ("max_model_len", c_int64),
    ("max_num_seqs", c_int64),
)
Parameter = _struct(
    "Parameter",
    *((name, c_char_p) for name in ("name", "dtype", "tied_to")),
    ("shape", POINTER(c_int64)),
    ("num_dims", c_int64),
    ("shard_dim", c_int64),
    ("shard_multiple", c_int64),
    ("shard_segments", POINTER(c_int64)),
    ("num_shard_segments", c_int64),
)
CacheSpecStruct = _struct(
    "CacheSpecStruct", *((name, c_int64) for name in ("block_size", "bytes_per_block", "bytes_per_slot", "shareable"))
)
Batch = _struct(
    "Batch",
    *((name, c_int64) for name in ("num_tokens", "num_sequences", "max_blocks", "num_rows")),
    *(
        (name, POINTER(c_int32))
        for name in (
            "token_ids",
            "positions",
            "query_starts",
            "context_lengths",
            "block_tables",
            "slot_mapping",
            "slots",
            "logits_indices",
            "prompt_lengths",
        )
    ),
)
Memory = _struct(
    "Memory",
    *((name, c_int64) for name in ("device_free", "device_total", "parameters", "buffers", "caches", "scratch")),
)


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


class ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, c_void_p)),
        ("flags", c_uint64),
        ("tensor", DLTensor),
    )


_ERROR = POINTER(Error)
_OUT = POINTER(c_void_p)
_SLOTS: dict[str, tuple[Any, ...]] = {
    "probe": (c_int32, POINTER(Host), _ERROR),
    "query": (c_int32, c_void_p, c_char_p, POINTER(c_int64), _ERROR),
    "create": (c_int32, POINTER(Host), c_char_p, _OUT, _ERROR),
    "destroy": (None, c_void_p),
    "supports_model": (c_int32, c_void_p, POINTER(ModelRequest), _ERROR),
    "model_create": (c_int32, c_void_p, POINTER(ModelRequest), _OUT, _ERROR),
    "model_destroy": (None, c_void_p),
    "num_parameters": (c_int64, c_void_p),
    "parameter": (c_int32, c_void_p, c_int64, POINTER(Parameter), _ERROR),
    "open_parameter": (c_int32, c_void_p, c_int64, POINTER(POINTER(ManagedTensor)), _ERROR),
    "close_parameter": (c_int32, c_void_p, c_int64, _ERROR),
    "loading_done": (c_int32, c_void_p, _ERROR),
    "cache_spec": (c_int32, c_void_p, POINTER(CacheSpecStruct), _ERROR),
    "cache_create": (c_int32, c_void_p, c_int64, c_int64, _OUT, _ERROR),
    "cache_copy_blocks": (c_int32, c_void_p, POINTER(c_int32), c_int64, _ERROR),
    "cache_release_slots": (c_int32, c_void_p, POINTER(c_int32), c_int64, _ERROR),
    "cache_destroy": (None, c_void_p),
    "forward": (c_int32, c_void_p, c_void_p, POINTER(Batch), POINTER(DLTensor), _ERROR),
    "cancel": (None, c_void_p),
    "memory": (c_int32, c_void_p, POINTER(Memory), _ERROR),
}
_Table = type(
    "_Table",
    (ctypes.Structure,),
    {
        "_fields_": [
            ("magic", c_uint64),
            ("abi_major", c_uint32),
            ("abi_minor", c_uint32),
            ("struct_size", c_uint64),
            ("extension", c_void_p),
            ("name", c_char_p),
            ("version", c_char_p),
            ("build", c_char_p),
            *((slot, ctypes.CFUNCTYPE(*signature)) for slot, signature in _SLOTS.items()),
        ]
    },
)


class NativeError(Exception):
    """A function of the table returned `code`."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@cache
def table() -> Any:
    """Return the library's table."""
    library = ctypes.CDLL(str(build() / "libinfinilm_cpu.so"), mode=ctypes.RTLD_LOCAL | os.RTLD_NOW)
    library.infinilm_backend_entry.restype = POINTER(_Table)
    return library.infinilm_backend_entry(1, 0).contents


def call(slot: str, *arguments: Any) -> None:
    """Call a function of the table. Raises `NativeError` where it fails."""
    error = Error(struct_size=ctypes.sizeof(Error))
    code = getattr(table(), slot)(*arguments, ctypes.byref(error))
    if code:
        raise NativeError(code, error.message.decode())


@contextmanager
def isa(name: str | None) -> Iterator[None]:
    """Have backends made inside use this level."""
    before = os.environ.get("INFINILM_CPU_ISA")
    if name is not None:
        os.environ["INFINILM_CPU_ISA"] = name
    try:
        yield
    finally:
        os.environ.pop("INFINILM_CPU_ISA", None)
        if before is not None:
            os.environ["INFINILM_CPU_ISA"] = before


@cache
def isas() -> tuple[str, ...]:
    """Return every level this machine has."""
    try:
        with isa("nothing"):
            call("probe", ctypes.byref(_host()))
    except NativeError as err:
        return tuple(str(err).rpartition(" has ")[2].split(", "))
    raise AssertionError("a level that does not exist was accepted")


@cache
def _host() -> Any:
    return Host(struct_size=ctypes.sizeof(Host), abi_major=1, world_size=1)


_DTYPES = {(0, 32): torch.int32, (2, 16): torch.float16, (2, 32): torch.float32, (4, 16): torch.bfloat16}  # DLPack's


class CpuBackend:
    """The `Backend` protocol over the table, for one model."""

    name = "cpu"
    weight_rule = None
    keeps_parameters = False

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: str = "float32",
        quantization: str | None = None,
        stored_quantization: str | None = None,
        isa_name: str | None = None,
        num_threads: int = 2,
        max_model_len: int = 0,
    ) -> None:
        self.config = config
        self._backend, self._model, self._cache = c_void_p(), c_void_p(), c_void_p()
        with isa(isa_name):
            options = b'{"num_threads": %d}' % num_threads
            call("create", ctypes.byref(_host()), options, ctypes.byref(self._backend))
        self._request = ModelRequest(
            struct_size=ctypes.sizeof(ModelRequest),
            config=config.to_json().encode() if isinstance(config, DecoderConfig) else config,
            dtype=dtype.encode(),
            device=b"cpu",
            quantization=quantization and quantization.encode(),
            stored_quantization=stored_quantization and stored_quantization.encode(),
            max_model_len=max_model_len,
        )
        try:
            call("supports_model", self._backend, ctypes.byref(self._request))
            call("model_create", self._backend, ctypes.byref(self._request), ctypes.byref(self._model))
        except NativeError:
            self.close()
            raise
        self._open: dict[str, Any] = {}
        self._indices: dict[str, int] = {}

    def parameters(self) -> dict[str, ParameterSpec]:
        specs = {}
        for index in range(table().num_parameters(self._model)):
            out = Parameter(struct_size=ctypes.sizeof(Parameter))
            call("parameter", self._model, index, ctypes.byref(out))
            name = out.name.decode()
            self._indices[name] = index
            specs[name] = ParameterSpec(
                tuple(out.shape[: out.num_dims]),
                out.dtype.decode(),
                None if out.shard_dim < 0 else Shard(out.shard_dim, out.shard_multiple),
                out.tied_to and out.tied_to.decode(),
            )
        return specs

    def destination(self, name: str) -> torch.Tensor:
        if not self._indices:
            self.parameters()
        lent = POINTER(ManagedTensor)()
        call("open_parameter", self._model, self._indices[name], ctypes.byref(lent))
        self._open[name] = lent
        tensor = lent.contents.tensor
        shape = tensor.shape[: tensor.ndim]
        dtype = _DTYPES[tensor.code, tensor.bits]
        num_bytes = int(np.prod(shape)) * tensor.bits // 8
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(tensor.data))
        return torch.from_numpy(raw).view(dtype).view(*shape)

    def loaded(self, name: str) -> None:
        call("close_parameter", self._model, self._indices[name])
        self.give_up(name)

    def give_up(self, name: str) -> None:
        lent = self._open.pop(name)
        lent.contents.deleter(ctypes.cast(lent, c_void_p))

    def finish_loading(self) -> None:
        call("loading_done", self._model)

    def cache_spec(self) -> CacheSpec:
        out = CacheSpecStruct(struct_size=ctypes.sizeof(CacheSpecStruct))
        call("cache_spec", self._model, ctypes.byref(out))
        return CacheSpec(out.block_size, out.bytes_per_block, out.bytes_per_slot, bool(out.shareable))

    def allocate_cache(self, num_blocks: int, num_slots: int) -> None:
        if self._cache:
            table().cache_destroy(self._cache)
            self._cache = c_void_p()
        call("cache_create", self._model, num_blocks, num_slots, ctypes.byref(self._cache))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        flat = np.array(pairs, np.int32).reshape(-1)
        call("cache_copy_blocks", self._cache, flat.ctypes.data_as(POINTER(c_int32)), len(pairs))

    def release(self, slots: Sequence[int]) -> None:
        """Do nothing, as the table's missing slot says."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        arrays: dict[str, Any] = {
            name: np.ascontiguousarray(getattr(batch, name), np.int32)
            for name, _ in Batch._fields_[6:]
            if getattr(batch, name) is not None
        }
        logits = torch.full((len(batch.logits_indices), self.config.vocab_size), float("nan"))
        shape = (c_int64 * 2)(*logits.shape)
        strides = (c_int64 * 2)(self.config.vocab_size, 1)
        out = DLTensor(logits.data_ptr(), 1, 0, 2, 2, 32, 1, shape, strides, 0)
        native = Batch(
            struct_size=ctypes.sizeof(Batch),
            num_tokens=len(batch.token_ids),
            num_sequences=len(batch.context_lengths),
            max_blocks=batch.block_tables.shape[1],
            num_rows=len(batch.logits_indices),
            **{name: array.ctypes.data_as(POINTER(c_int32)) for name, array in arrays.items()},
        )
        call("forward", self._model, self._cache, ctypes.byref(native), ctypes.byref(out))
        return logits

    def cancel(self) -> None:
        table().cancel(self._model)

    def memory(self) -> dict[str, int]:
        out = Memory(struct_size=ctypes.sizeof(Memory))
        call("memory", self._backend, ctypes.byref(out))
        return {name: getattr(out, name) for name, _ in Memory._fields_[2:]}

    def close(self) -> None:
        for name in list(getattr(self, "_open", {})):
            self.give_up(name)
        for handle, free in (
            (self._cache, "cache_destroy"),
            (self._model, "model_destroy"),
            (self._backend, "destroy"),
        ):
            if handle:
                getattr(table(), free)(handle)
                handle.value = None

    def __del__(self) -> None:
        self.close()
