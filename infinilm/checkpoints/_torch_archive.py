"""Files of `torch.save`, read as data: which tensors they hold, and where in the file the elements lie.

The format is a zip archive, nothing compressed, of a pickle (`data.pkl`) that refers to storages (`data/0`, ...) and
those: https://docs.pytorch.org/docs/stable/notes/serialization.html. torch itself is not needed to read headers.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinilm.checkpoints._files import OpenFiles
from infinilm.checkpoints._restricted_pickle import DamagedPickleError, Names, brief, load_restricted
from infinilm_hookspecs import CheckpointError, StoredTensor
from infinilm_hookspecs.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    from torch import Tensor

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field
_MAX_DIMENSIONS = 64
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor in a file of `torch.save`: element (0, ...) is at byte `start`, and `strides` are in elements."""

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    path: Path
    start: int

    def stored(self) -> StoredTensor:
        """Return the tensor as a checkpoint lists it, with an extent where it is row-major."""
        extent = (self.path, self.start, prod(self.shape) * ITEM_SIZES[self.dtype])
        return StoredTensor(self.shape, self.dtype, extent if self._is_row_major else None)

    @property
    def _is_row_major(self) -> bool:
        wanted = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != wanted:
                return 0 in self.shape
            wanted *= size
        return True

    def read(self, files: OpenFiles, region: tuple[slice, ...], out: Tensor, name: str) -> None:
        """Fill `out` with `region`; see `infinilm_hookspecs.Checkpoint.read`."""
        if self._is_row_major:
            files.read_region(self.stored(), region, out, name)
            return
        import torch

        extents = [s.stop - s.start for s in region]
        if prod(extents) == 0:
            return
        item = ITEM_SIZES[self.dtype]
        first = sum(s.start * stride for s, stride in zip(region, self.strides, strict=True))
        length = _span(extents, self.strides) * item
        data = files.read(self.path, self.start + first * item, length, f"tensor {name!r}")
        out.copy_(torch.frombuffer(data, dtype=out.dtype).as_strided(extents, self.strides))


def read_archive(files: OpenFiles, path: Path, start: int = 0, length: int | None = None) -> Any:
    """Return what was saved into a file, or into `length` bytes of it: `ArchivedTensor`s in dicts, lists and tuples.

    Raises `CheckpointError` for what is no such archive, contradicts itself, or asks for anything but tensors.
    """
    size = files.open(path)
    where = f"{str(path)!r}" if length is None else f"{str(path)!r} from byte {start}"
    section = _Section(files, path, start, size - start if length is None else length)
    _check_kind(bytes(section.read_at(0, min(20, section.length))), where)
    try:
        archive = _Archive(section, zipfile.ZipFile(io.BufferedReader(section)), where)
        data = archive.read("data.pkl")
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, struct.error, ValueError, LookupError, RuntimeError, OverflowError, EOFError) as err:
        raise CheckpointError(
            f"{where} is not a sound file of torch.save: {err}; is it truncated? Download it again"
        ) from err
    return load_restricted(
        data,
        _NAMES,
        where=where,
        way_out="it may run code. Get the model as safetensors, or from somebody you trust",
        persistent_load=archive.storage,
    )


def _check_kind(head: bytes, where: str) -> None:
    if head.startswith(b"version https://git-"):
        raise CheckpointError(f"{where} is a git-lfs pointer; fetch the file itself with 'git lfs pull'")
    if head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"):  # torch.serialization.MAGIC_NUMBER, pickled
        raise CheckpointError(
            f"{where} was saved before torch 1.6, in a format that cannot be read in parts; save it anew: "
            "torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    if not head.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{where} is not a file of torch.save: it begins with {head[:8]!r}")


class _Section(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, files: OpenFiles, path: Path, start: int, length: int) -> None:
        super().__init__()
        self.files, self.path, self.start, self.length = files, path, start, length
        self._at = 0

    def read_at(self, offset: int, length: int) -> bytearray:
        """Return bytes of the section. Raises `ValueError` where it has not as many."""
        if not 0 <= offset <= offset + length <= self.length:
            raise ValueError(f"{length} bytes are wanted at {offset}, and it has {self.length}")
        return self.files.read(self.path, self.start + offset, length, "the archive's directory")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self.length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.length - self._at))
        self.files.read_into(memoryview(buffer)[:count], self.path, self.start + self._at, "the archive's directory")
        self._at += count
        return count


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of elements: the dtype it was saved as, the bytes in the file."""

    dtype: str
    path: Path
    start: int
    num_bytes: int


class _Archive:
    """The records of an archive by their name below its one folder."""

    def __init__(self, section: _Section, archive: zipfile.ZipFile, where: str) -> None:
        self._section = section
        entries = archive.infolist()
        roots = [entry.filename.removesuffix("data.pkl") for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"{len(roots)} of its records are called data.pkl, and one is wanted")
        self._entries = {entry.filename.removeprefix(roots[0]): entry for entry in entries}
        if len(self._entries) != len(entries):
            raise ValueError("two of its records have one name")
        if "constants.pkl" in self._entries:
            raise CheckpointError(f"{where} is a TorchScript program, and a state dict is wanted")
        if "byteorder" in self._entries and (order := self.read("byteorder")) != b"little":
            raise CheckpointError(f"{where} has its bytes in the order {order!r}, and b'little' is wanted")

    def read(self, name: str) -> bytes:
        """Return the bytes of a record."""
        start, length = self._locate(name)
        return bytes(self._section.read_at(start, length))

    def storage(self, reference: object) -> _Storage:
        """Return what the pickle refers to as ("storage", type, key, location, number of elements)."""
        match reference:
            case ("storage", _Dtype(dtype), str(key), _, int(size)) if size >= 0:
                start, length = self._locate(f"data/{key}") if size else (0, 0)
                if size * ITEM_SIZES[dtype] > length:
                    raise DamagedPickleError(
                        f"storage {key!r:.80} has {length} bytes, and {size} of {dtype} are wanted"
                    )
                return _Storage(dtype, self._section.path, self._section.start + start, length)
        raise DamagedPickleError(f"it refers to {brief(reference)}")

    def _locate(self, name: str) -> tuple[int, int]:
        """Return (offset in the section, length) of a record's bytes."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"it has no record {name!r:.80}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"its record {name!r:.80} is compressed or encrypted")
        signature, *lengths = _LOCAL_HEADER.unpack(self._section.read_at(entry.header_offset, _LOCAL_HEADER.size))
        start = entry.header_offset + _LOCAL_HEADER.size + sum(lengths)
        if signature != b"PK\x03\x04" or start + entry.file_size > self._section.length:
            raise ValueError(f"its record {name!r:.80} is not where its directory says")
        return start, entry.file_size


# ---------------------------------------------------------------- what a pickle may name


@dataclass(frozen=True, slots=True)
class _Dtype:
    """Stands for a type of storage, or for a dtype."""

    name: str


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
    *,
    dtype: object = None,
) -> ArchivedTensor:
    """`torch._utils._rebuild_tensor_v2`: `offset` and `strides` are in elements of `dtype`, or of the storage's."""
    kind = dtype.name if isinstance(dtype, _Dtype) else None if dtype is not None else getattr(storage, "dtype", None)
    if not isinstance(storage, _Storage) or kind is None:
        raise DamagedPickleError(f"a tensor is made of {brief(storage)} as {brief(dtype)}")
    if metadata:
        raise DamagedPickleError(f"a tensor is a view with {brief(metadata)}; save it after resolve_conj()")
    sizes, steps = _sizes(shape), _sizes(strides)
    (first,) = _sizes((offset,))
    end = (first + _span(sizes, steps)) * ITEM_SIZES[kind]
    if len(sizes) != len(steps) or (0 not in sizes and end > storage.num_bytes):
        raise DamagedPickleError(f"a tensor of {list(sizes)} lies outside its storage of {storage.num_bytes} bytes")
    return ArchivedTensor(sizes, kind, steps, storage.path, storage.start + first * ITEM_SIZES[kind])


def _tensor_of_dtype(*arguments: Any) -> ArchivedTensor:
    """`torch._utils._rebuild_tensor_v3`: of an untyped storage, for dtypes that have no storage type."""
    storage, offset, shape, strides, requires_grad, hooks, dtype, *metadata = arguments
    return _tensor(storage, offset, shape, strides, requires_grad, hooks, *metadata, dtype=dtype)


def _first(value: object, *others: object) -> object:
    """`torch._utils._rebuild_parameter`: a parameter is its data."""
    return value


def _with_attributes(function: object, kind: object, arguments: object, state: object) -> object:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes is the tensor."""
    if function not in (_tensor, _tensor_of_dtype, _first) or not isinstance(arguments, tuple):
        raise DamagedPickleError(f"a tensor is made with {brief(function)}")
    made: Callable[..., object] = function
    return made(*arguments)


def _empty_dict() -> OrderedDict[Any, Any]:
    """`OrderedDict`, of which a pickle sets the items one by one."""
    return OrderedDict()


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > _MAX_DIMENSIONS:
        raise DamagedPickleError(f"a tensor has the sizes {brief(value)}")
    if not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise DamagedPickleError(f"a tensor has the sizes {brief(value)}")
    return tuple(value)


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements lie between the first one used and the last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False))


_NAMES: Names = {
    ("collections", "OrderedDict"): _empty_dict,
    ("torch", "Size"): _sizes,
    ("torch", "Tensor"): None,
    ("torch.nn.parameter", "Parameter"): None,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    ("torch.storage", "UntypedStorage"): _Dtype("uint8"),
    **{("torch", name): _Dtype(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", dtype): _Dtype(dtype) for dtype in ITEM_SIZES},
}
