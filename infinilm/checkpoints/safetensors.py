"""Hugging Face folders of safetensors, in one file or sharded.

Format: https://huggingface.co/docs/safetensors. Headers are read here rather than by the `safetensors` package because
the plan needs extents and must refuse what that package accepts: names given twice, holes, trailing bytes. Bytes are
read with `preadv` from descriptors opened with the headers: a file that shrinks is a short read, not a SIGBUS.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infinilm.checkpoints._files import OpenFiles
from infinilm.checkpoints._folder import file_inside, json_kind, read_json_object, read_shard_index
from infinilm.checkpoints._quantization import find_quantization
from infinilm.checkpoints._shards import read_shards
from infinilm_hookspecs import CheckpointError, Config, Quantization, StoredTensor, hookimpl
from infinilm_hookspecs.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 64  # NumPy's limit
_INTEGERS = frozenset([int])  # and not bool, which is one of Python's
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@hookimpl
def open_checkpoint(source: str) -> SafetensorsCheckpoint | None:
    folder = Path(source)
    if not any((folder / name).is_file() for name in (_SINGLE, _INDEX)):
        return None
    return SafetensorsCheckpoint(folder)


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors files. Opening reads headers only."""

    trust: Literal["data", "restricted"] = "data"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Config = read_json_object(folder / "config.json")
        self.tensors: Mapping[str, StoredTensor] = {}
        self._files = OpenFiles()
        try:
            if (folder / _SINGLE).is_file():
                self.tensors = self._open_file(folder / _SINGLE)
            else:
                self.tensors = read_shards(folder, _INDEX, read_shard_index(folder / _INDEX), self._open_file)
        except BaseException:
            self.close()
            raise
        self.quantization: Quantization | None = find_quantization(self.config, self.tensors)

    def __repr__(self) -> str:
        return f"SafetensorsCheckpoint({str(self.folder)!r})"

    def read(self, name: str, region: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with `region` of the tensor `name`; see `infinilm_hookspecs.Checkpoint.read`."""
        self._files.read_region(self.tensors[name], region, out, name)

    def file(self, name: str) -> Path | None:
        """Return the path of a file of the folder, or `None` when it has none of this name."""
        path = file_inside(self.folder, name)
        return path if path.is_file() else None

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def _open_file(self, path: Path) -> dict[str, StoredTensor]:
        self._files.open(path)
        return read_header(path, self._files.descriptor(path))


def read_header(path: Path, descriptor: int) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file. Raises `CheckpointError` for a header that lies in any way."""

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{str(path)!r} is not a sound safetensors file: {what}")

    file_size = os.fstat(descriptor).st_size
    head = _read(path, descriptor, 8, 0)
    if _read(path, descriptor, 20, 0).startswith(b"version https://git-"):
        raise wrong("it is a git-lfs pointer; fetch the file itself with 'git lfs pull'")
    length = int.from_bytes(head, "little")
    if len(head) < 8:
        raise wrong(f"it has {file_size} bytes, and the length of the header takes 8")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, file_size - 8):
        raise wrong(f"its header claims {length} bytes, in a file of {file_size}")
    data = _read(path, descriptor, length, 8)
    try:
        header = _parse(data)
    except CheckpointError as err:
        raise wrong(f"its header {err}") from err
    except (ValueError, RecursionError) as err:
        raise wrong(f"its header is no JSON: {err}") from err
    if not isinstance(header, dict):
        raise wrong(f"its header is a JSON {json_kind(header)}, and an object is wanted")
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    start, at, is_in_order = 8 + length, 0, True
    known: _KnownKinds = {}
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = _read_known_entry(entry, known) or _read_entry(entry, known)
        except CheckpointError as err:
            raise wrong(f"tensor {name!r:.200} {err}") from err
        tensors[name] = StoredTensor(shape, dtype, (path, start + begin, end - begin))
        is_in_order = is_in_order and begin == at
        at = end
    if not is_in_order:
        try:
            at = _check_order(tensors, start)
        except CheckpointError as err:
            raise wrong(str(err)) from err
    at += start
    if file_size < at:
        raise wrong(f"its tensors end at byte {at}, and the file at {file_size}: it is truncated; download it again")
    if file_size > at:
        raise wrong(f"{file_size - at} bytes follow its last tensor")
    return tensors


def _read(path: Path, descriptor: int, length: int, offset: int) -> bytes:
    """Return `length` bytes of a file, or as many as there are."""
    try:
        return os.pread(descriptor, length, offset)
    except OSError as err:
        raise CheckpointError(f"{str(path)!r} cannot be read: {err.strerror}") from err


def _parse(data: bytes) -> Any:
    """Return the JSON value `data`. Raises `CheckpointError` for a name given twice in one object.

    Without escapes every quote begins or ends a string. Where there are as many as sound entries for the names that
    were found take, no name was given twice; else the header is parsed again, slowly, to look at every object.
    """
    text = data.decode("utf-8")
    header = json.loads(text)
    if isinstance(header, dict) and "\\" not in text:
        num_strings = 5 * len(header)  # the name, "dtype" and its value, "shape", "data_offsets"
        metadata = header.get("__metadata__")
        if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
            num_strings += 2 * len(metadata) - 4
        if text.count('"') == 2 * num_strings:
            return header
    return json.loads(text, object_pairs_hook=_reject_duplicates)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise CheckpointError(f"has the name {name!r:.200} twice")
    return found


_KnownKinds = dict[tuple[Any, ...], tuple[str, tuple[int, ...], int]]
"""(dtype, *sizes) as stored, of what was found right -> dtype, shape, bytes."""


def _read_known_entry(entry: Any, known: _KnownKinds) -> tuple[str, tuple[int, ...], int, int] | None:
    """Return what `_read_entry` would, for an entry like one before it; `None` for any other, be it right or wrong."""
    try:
        sizes, (begin, end) = entry["shape"], entry["data_offsets"]
        dtype, shape, num_bytes = known[entry["dtype"], *sizes]
    except (KeyError, TypeError, ValueError):
        return None
    # Equal keys are not enough: True is 1, and so is 1.0.
    if end - begin != num_bytes or begin < 0 or not _INTEGERS.issuperset(map(type, (*sizes, begin, end))):
        return None
    return dtype, shape, begin, end


def _read_entry(entry: object, known: _KnownKinds) -> tuple[str, tuple[int, ...], int, int]:
    """Return (dtype, shape, begin, end) of one tensor's entry. Raises `CheckpointError` saying what is wrong."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"is described by {entry!r:.80}, and dtype, shape and data_offsets are wanted")
    stored, sizes, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(stored, str) or stored not in _DTYPES:
        raise CheckpointError(f"has the dtype {stored!r:.80}; known: {', '.join(_DTYPES)}")
    if not _are_sizes(sizes) or len(sizes) > _MAX_DIMENSIONS:
        raise CheckpointError(f"has the shape {sizes!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"has the data_offsets {offsets!r:.80}")
    begin, end = offsets
    dtype, shape, num_bytes = _DTYPES[stored], tuple(sizes), prod(sizes) * ITEM_SIZES[_DTYPES[stored]]
    if end - begin != num_bytes:
        raise CheckpointError(f"takes {end - begin} bytes, and {sizes} of {stored} needs {num_bytes}")
    known[stored, *sizes] = dtype, shape, num_bytes
    return dtype, shape, begin, end


def _check_order(tensors: Mapping[str, StoredTensor], start: int) -> int:
    """Return where the last tensor ends, counted from `start`. Raises `CheckpointError` for a hole or an overlap."""
    at = 0
    for begin, num_bytes, name in sorted(
        (its.extent[1] - start, its.extent[2], name) for name, its in tensors.items() if its.extent
    ):
        if begin != at:
            raise CheckpointError(f"tensor {name!r:.200} begins at {begin}, and the one before ends at {at}")
        at += num_bytes
    return at


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
