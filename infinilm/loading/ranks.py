"""What each tensor-parallel rank would read: its slice of every parameter, pushed back to the stored regions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from infinilm.loading.chunks import cut_chunks, read_volume
from infinilm.loading.execute import BYTE_BUDGET
from infinilm.loading.plan import LoadPlan, PlannedParameter
from infinilm_hookspecs import Shard
from infinilm_hookspecs.dtypes import ITEM_SIZES
from infinilm_hookspecs.strided import StridedTensor


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank, in bytes: what it keeps, what of the stored tensors it needs and reads, and its peak while loading."""

    rank: int
    num_bytes: int
    needed_bytes: int
    read_bytes: int
    peak_bytes: int

    @property
    def amplification(self) -> float:
        """Bytes read for every byte needed."""
        return self.read_bytes / self.needed_bytes if self.needed_bytes else 1.0


def find_indivisible(plan: LoadPlan, world_size: int) -> list[str]:
    """Return a message for every parameter that cannot be cut for `world_size` ranks."""
    messages = []
    for parameter in plan.parameters:
        shard = parameter.spec.shard
        if shard is None:
            continue
        for size in shard.segments or (parameter.spec.shape[shard.dim],):
            if size % (world_size * shard.multiple):
                unit = f"multiples of {shard.multiple}" if shard.multiple > 1 else "equal parts"
                messages.append(
                    f"{parameter.name}: {size} rows of dimension {shard.dim} cannot be cut for {world_size} ranks "
                    f"at {unit}"
                )
    return messages


def report_rank(plan: LoadPlan, rank: int, world_size: int) -> RankReport:
    """Return what rank `rank` of `world_size` reads. Every parameter must be divisible."""
    num_bytes = needed = read = 0
    for parameter in plan.parameters:
        for part in _slices(parameter, rank, world_size):
            num_bytes += part.num_elements * ITEM_SIZES[parameter.spec.dtype]
            for used, needed_here in _reads(part):
                read += used
                needed += needed_here
    return RankReport(rank, num_bytes, needed, read, num_bytes + 2 * BYTE_BUDGET)


def _slices(parameter: PlannedParameter, rank: int, world_size: int) -> Iterator[StridedTensor]:
    """Yield a rank's rows of a parameter: of each segment of a fused dimension by itself."""
    weight, shard = parameter.weight, parameter.spec.shard
    if shard is None or world_size == 1:
        yield weight
        return
    start = 0
    for size in shard.segments or (weight.shape[shard.dim],):
        rows = size // world_size
        yield _rows(weight, shard, start + rank * rows, rows)
        start += size


def _rows(weight: StridedTensor, shard: Shard, start: int, extent: int) -> StridedTensor:
    return weight[(slice(None),) * shard.dim + (slice(start, start + extent),)]


def _reads(weight: StridedTensor) -> Iterator[tuple[int, int]]:
    """Yield (bytes read, bytes needed) for every chunk of a weight; what is behind a deferred step is read whole."""
    for piece in weight.pieces:
        if piece.source.deferred is not None:
            for tensor in piece.source.deferred.inputs:
                yield from _reads(tensor)
    stored = tuple(piece for piece in weight.pieces if piece.source.deferred is None)
    alone = StridedTensor(weight.name, weight.shape, weight.dtype_name, stored)
    for part, _ in cut_chunks(alone, torch.empty(weight.shape, device="meta"), BYTE_BUDGET):
        item = ITEM_SIZES[part.pieces[0].source.dtype]
        yield read_volume(part.pieces[0]) * item, part.num_elements * item
