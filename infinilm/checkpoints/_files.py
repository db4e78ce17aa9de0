"""The files of a checkpoint: opened once, with the headers, and read in ranges.

`preadv` on a descriptor: a file that shrinks is a short read, not a SIGBUS, and threads need no lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from infinilm_hookspecs import CheckpointError, StoredTensor
from infinilm_hookspecs.dtypes import ITEM_SIZES

if TYPE_CHECKING:
    from torch import Tensor


class OpenFiles:
    """Descriptors by path. Every error names the file, what was to be read and where."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._modified: dict[int, int] = {}  # by descriptor: when the file was last written to, in nanoseconds

    def open(self, path: Path) -> int:
        """Open a file, once, and return its size in bytes."""
        try:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._descriptors[path])
            self._modified.setdefault(self._descriptors[path], status.st_mtime_ns)
            return status.st_size
        except OSError as err:
            raise CheckpointError(f"{str(path)!r} cannot be read: {err.strerror}") from err

    def descriptor(self, path: Path) -> int:
        """Return the descriptor of an open file."""
        return self._descriptors[path]

    def read_into(self, buffer: memoryview, path: Path, offset: int, what: str) -> None:
        """Fill `buffer` from `offset` on. Raises `CheckpointError` when the bytes are not there."""

        def failed(why: str) -> CheckpointError:
            return CheckpointError(f"{str(path)!r}, {what} at offset {offset}: {why}")

        descriptor = self._descriptors.get(path)
        if descriptor is None:
            raise failed("the checkpoint is closed")
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as err:
                raise failed(f"{err.strerror}, {done} of {len(buffer)} bytes read") from err
            if count == 0:
                raise failed(
                    f"the file is too short, wanted {len(buffer)} bytes, got {done}; was it changed while it was read?"
                )
            done += count
        if os.fstat(descriptor).st_mtime_ns != self._modified[descriptor]:
            raise failed("the file was written to after its header was read; load it again once nobody writes to it")

    def read(self, path: Path, offset: int, length: int, what: str) -> bytearray:
        """Return `length` bytes from `offset` on."""
        data = bytearray(length)
        self.read_into(memoryview(data), path, offset, what)
        return data

    def read_region(self, stored: StoredTensor, region: tuple[slice, ...], out: Tensor, name: str) -> None:
        """Fill `out` with `region` of a tensor that has an extent; see `infinilm_hookspecs.Checkpoint.read`."""
        assert stored.extent is not None
        path, start, _ = stored.extent
        item = ITEM_SIZES[stored.dtype]
        buffer = bytes_of(out, stored.dtype, region)
        done = 0
        for offset, length in contiguous_runs(stored.shape, region):
            chunk = buffer[done : done + length * item]
            self.read_into(chunk, path, start + offset * item, f"tensor {name!r}")
            done += len(chunk)

    def close(self) -> None:
        """Close every file. Safe to call twice."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._modified.clear()


def bytes_of(out: Tensor, dtype: str, region: Sequence[slice]) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU that is to be filled with `region` of a tensor of `dtype`."""
    import torch

    assert out.dtype == getattr(torch, dtype)
    assert tuple(out.shape) == tuple(s.stop - s.start for s in region)
    buffer: memoryview = out.view(-1).view(torch.uint8).numpy().data
    return buffer


def contiguous_runs(shape: tuple[int, ...], region: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) in elements of the runs that `region` of a row-major tensor consists of, in order."""
    extents = [s.stop - s.start for s in region]
    if prod(extents) == 0:
        return
    split = next((d for d in reversed(range(len(shape))) if extents[d] != shape[d]), 0)
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    length = prod(extents[split:])
    inside = sum(region[d].start * strides[d] for d in range(split, len(shape)))
    for index in product(*(range(s.start, s.stop) for s in region[:split])):
        yield inside + sum(i * stride for i, stride in zip(index, strides, strict=False)), length
