"""The header of a GGUF file: metadata, and where every tensor lies.

Read here rather than by `gguf.GGUFReader`, which maps the file into memory (one that shrinks ends the process), takes
counts at their word (an array of 2^60 bytes never ends) and makes a NumPy array of every token. Every count and size is
held against what is left of the file before anything is allocated for it (CVE-2026-27940).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinilm.checkpoints import OpenFiles
from infinilm_hookspecs import CheckpointError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_DEFAULT_ALIGNMENT = 32
_WINDOW = 1 << 20

# Value types of GGUF, as struct's formats.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: its shape with the dimension that is contiguous last, its type, and its bytes in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors' data."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(files: OpenFiles, path: Path) -> Header:
    """Return the header of a file. Raises `CheckpointError` for one that lies in any way."""
    cursor = _Cursor(files, path)
    try:
        return _read(cursor)
    except _LieError as err:
        raise CheckpointError(f"{str(path)!r} is not a sound GGUF file: {err}") from err


class _LieError(ValueError):
    """The header contradicts itself, or the file."""


def _read(cursor: _Cursor) -> Header:
    if cursor.take(4) != MAGIC:
        raise _LieError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        order = "; it is big-endian" if version & 0xFFFF == 0 else ""
        raise _LieError(f"it is of version {version}, and one of {_VERSIONS} is wanted{order}")
    num_tensors = cursor.count(8 + 4 + 4 + 8, "tensors")  # a name, dimensions, a type, an offset
    num_keys = cursor.count(8 + 4 + 1, "keys of metadata")  # a name, a type, a value
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("the name of a key")
        if key in metadata:
            raise _LieError(f"it has the key {key!r:.80} twice")
        metadata[key] = cursor.value(cursor.number("I"), key)
    infos = [_read_info(cursor) for _ in range(num_tensors)]
    return Header(metadata, _place(infos, cursor, metadata.get("general.alignment", _DEFAULT_ALIGNMENT)))


_Info = tuple[str, tuple[int, ...], "GGMLQuantizationType", int, int]  # name, shape, type, bytes, offset


def _read_info(cursor: _Cursor) -> _Info:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string("the name of a tensor")
    num_dimensions = cursor.number("I")
    if num_dimensions > _MAX_DIMENSIONS:
        raise _LieError(f"tensor {name!r:.80} has {num_dimensions} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(num_dimensions)]))
    number = cursor.number("I")
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as err:
        raise _LieError(f"tensor {name!r:.80} is of the type {number}, which the gguf package does not know") from err
    if shape and shape[-1] % block:
        raise _LieError(f"tensor {name!r:.80} has rows of {shape[-1]}, and {kind.name} comes in blocks of {block}")
    return name, shape, kind, prod(shape) // block * block_bytes, cursor.number("Q")


def _place(infos: list[_Info], cursor: _Cursor, alignment: object) -> dict[str, TensorInfo]:
    """Return the tensors with their places in the file, none of which overlap."""
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise _LieError(f"general.alignment is {alignment!r:.80}, and a power of two is wanted")
    data = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    end_before, before = data, "the header"
    for name, shape, kind, num_bytes, offset in sorted(infos, key=lambda info: info[4]):
        start = data + offset
        if name in tensors:
            raise _LieError(f"it has the tensor {name!r:.80} twice")
        if offset % alignment:
            raise _LieError(f"tensor {name!r:.80} begins at {offset}, which is no multiple of {alignment}")
        if start < end_before:
            raise _LieError(f"tensor {name!r:.80} begins at byte {start}, and {before} ends at {end_before}")
        if start + num_bytes > cursor.size:
            raise _LieError(
                f"tensor {name!r:.80} ends at byte {start + num_bytes}, and the file at {cursor.size}; is it truncated?"
            )
        tensors[name] = TensorInfo(shape, kind, start, num_bytes)
        if num_bytes:
            end_before, before = start + num_bytes, f"tensor {name!r:.80}"
    return {name: tensors[name] for name, *_ in infos}


class _Cursor:
    """Reads a file from its start on, a window at a time."""

    def __init__(self, files: OpenFiles, path: Path) -> None:
        self.size = files.open(path)
        self.at = 0
        self._files, self._path = files, path
        self._window, self._window_start = bytearray(), 0

    def take(self, length: int) -> bytes:
        """Return the next bytes."""
        if length > self.size - self.at:
            raise _LieError(f"{length} bytes are wanted at byte {self.at}, and it has {self.size}")
        start = self.at - self._window_start
        if start + length > len(self._window):
            ahead = min(max(length, _WINDOW), self.size - self.at)
            self._window = self._files.read(self._path, self.at, ahead, "the header")
            self._window_start, start = self.at, 0
        self.at += length
        return bytes(self._window[start : start + length])

    def number(self, kind: str) -> int:
        """Return the next number."""
        size = struct.calcsize(f"<{kind}")
        value: int = struct.unpack(f"<{kind}", self.take(size))[0]
        return value

    def count(self, size_of_one: int, what: str) -> int:
        """Return the next number, of things that take so many bytes each, at least."""
        value = self.number("Q")
        if value * size_of_one > self.size - self.at:
            raise _LieError(f"it claims {value} {what}, and {self.size - self.at} bytes are left")
        return value

    def string(self, what: str) -> str:
        """Return the next string."""
        try:
            return self.take(self.count(1, f"bytes of {what}")).decode("utf-8")
        except UnicodeDecodeError as err:
            raise _LieError(f"{what:.80} is not UTF-8: {err}") from err

    def value(self, kind: int, key: str) -> Any:
        """Return the next value of metadata."""
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise _LieError(f"{key!r:.80} is of the type {kind}")
        return self.number(_SCALARS[kind])

    def _array(self, key: str) -> list[Any]:
        kind = self.number("I")
        if kind == _STRING:
            return [self.string(key) for _ in range(self.count(8, f"strings of {key:.80}"))]
        if kind not in _SCALARS:
            raise _LieError(f"{key!r:.80} is an array of the type {kind}")
        size = struct.calcsize(f"<{_SCALARS[kind]}")
        count = self.count(size, f"values of {key:.80}")
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * size)))
