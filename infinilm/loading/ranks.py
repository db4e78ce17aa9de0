"""What each tensor-parallel rank would read: its slice of every parameter, pushed back to the stored regions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from infinilm.loading.chunks import cut_chunks, read_volume
from infinilm.loading.execute import BYTE_BUDGET, CHUNK_BYTES
from infinilm.loading.plan import LoadPlan, PlannedParameter
from infinilm_hookspecs import Shard
from infinilm_hookspecs.dtypes import ITEM_SIZES
from infinilm_hookspecs.layout import bounds
from infinilm_hookspecs.strided import Deferred, Piece, StridedTensor


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
    computed: set[int] = set()
    for parameter in plan.parameters:
        for part in rank_slices(parameter, rank, world_size):
            num_bytes += part.num_elements * ITEM_SIZES[parameter.spec.dtype]
            for used, needed_here in _reads(part, computed):
                read += used
                needed += needed_here
    return RankReport(rank, num_bytes, needed, read, num_bytes + 2 * BYTE_BUDGET)


def rank_slices(parameter: PlannedParameter, rank: int, world_size: int) -> Iterator[StridedTensor]:
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


def _reads(weight: StridedTensor, computed: set[int]) -> Iterator[tuple[int, int]]:
    """Yield (bytes read, bytes needed) for every piece of a weight.

    Behind a step, what the step reads is needed: once, though chunks may read the blocks they share again. A step for
    whole tensors is carried out once, whoever takes from its result: `computed` are the sources it made so far.
    """
    for piece in weight.pieces:
        step = piece.source.deferred
        if step is not None and step.parts is None:
            if id(piece.source) in computed:
                continue
            computed.add(id(piece.source))
            read = _read_at_once(piece)
            yield read, read
            continue
        alone = StridedTensor(weight.name, weight.shape, weight.dtype_name, (piece,))
        chunks = [part for part, _ in cut_chunks(alone, torch.empty(weight.shape, device="meta"), CHUNK_BYTES)]
        read = sum(_read_at_once(part.pieces[0]) for part in chunks)
        if step is None:
            yield read, sum(part.num_elements for part in chunks) * ITEM_SIZES[piece.source.dtype]
        elif chunks:
            yield read, min(read, _read_at_once(piece))


def _read_at_once(piece: Piece) -> int:
    """Return the bytes that are read to get at a piece, through the steps it comes from."""
    step = piece.source.deferred
    if step is None:
        return read_volume(piece) * ITEM_SIZES[piece.source.dtype]
    return sum(_read_at_once(inner) for tensor in _inputs(piece, step) for inner in tensor.pieces)


def _inputs(piece: Piece, step: Deferred) -> Iterator[StridedTensor]:
    """Yield what a step reads for a piece: whole tensors, or the blocks that the piece touches."""
    if step.parts is None:
        yield from step.inputs
        return
    atoms = [atom for axis in piece.layout() for atom in axis]
    _, cuts = step.parts(bounds(piece.source.shape, piece.offset, atoms).region)
    for tensor, cut in zip(step.inputs, cuts, strict=True):
        yield tensor[cut]
