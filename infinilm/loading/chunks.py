"""Cutting a load into chunks: pieces of one stored tensor each, of a few megabytes, that threads read independently.

A chunk is a weight again, one more cut of the same layout, with the part of the buffer that it fills.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import Tensor

from infinilm_hookspecs.dtypes import ITEM_SIZES
from infinilm_hookspecs.layout import Axis, bounds
from infinilm_hookspecs.strided import Piece, Region, StridedTensor

# Rows that lie at least so many bytes apart are read one by one rather than with all that is between them.
_WORTH_A_READ = 32 * 1024
_AMPLIFICATION = 1.1


def cut_chunks(weight: StridedTensor, buffer: Tensor, max_bytes: int) -> Iterator[tuple[StridedTensor, Tensor]]:
    """Yield `weight` and `buffer` in parts that read at most about `max_bytes` each.

    Every source is a stored tensor, or a step that works on blocks of some; blocks stay whole where rows can be cut
    between them.
    """
    for piece in weight.pieces:
        box = piece.box(weight.shape)
        shape = tuple(extent for _, extent in box)
        if prod(shape) == 0:
            continue
        alone = Piece(piece.source, piece.offset, piece.layout(), piece.operations)
        part = StridedTensor(weight.name, shape, weight.dtype_name, (alone,))
        yield from _cut(part, buffer[tuple(slice(start, start + extent) for start, extent in box)], max_bytes)


def _cut(weight: StridedTensor, buffer: Tensor, max_bytes: int) -> Iterator[tuple[StridedTensor, Tensor]]:
    for dim in _outermost_first(weight.pieces[0].layout()):
        rows = _rows_at_once(weight, dim, max_bytes)
        if rows is None:
            break
        spans = list(_spans(weight, dim, rows))
        if len(spans) == 1:  # all of it is one row of blocks
            continue
        for start, stop in spans:
            part = _rows(weight, dim, start, stop)
            cut_buffer = buffer.narrow(dim, start, stop - start)
            if len(part.pieces) > 1:  # the cut falls inside a row of the stored tensor
                yield from cut_chunks(part, cut_buffer, max_bytes)
            else:
                yield from _cut(part, cut_buffer, max_bytes)
        return
    yield weight, buffer


def _rows(weight: StridedTensor, dim: int, start: int, stop: int) -> StridedTensor:
    return weight[(slice(None),) * dim + (slice(start, stop),)]


def _spans(weight: StridedTensor, dim: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of about `rows` rows of `dim` each, cut where a block of a step begins, if it can be."""
    start, size = 0, weight.shape[dim]
    while start < size:
        stop = min(start + rows, size)
        if stop < size and weight.pieces[0].source.deferred is not None:
            before, after = _block_around(weight, dim, stop)
            stop = before if before > start else min(after, size)
        yield start, stop
        start = stop


def _block_around(weight: StridedTensor, dim: int, row: int) -> tuple[int, int]:
    """Return the first row of the block that `row` of `dim` lies in, and the first behind it.

    Where rows of the weight are not rows of the step's result, every row passes for a block.
    """
    piece = weight.pieces[0]
    step = piece.source.deferred
    assert step is not None
    assert step.parts is not None
    last, this = (_region(_rows(weight, dim, at, at + 1).pieces[0]) for at in (row - 1, row))
    moved = [d for d in range(len(this)) if this[d] != last[d]]
    if len(moved) != 1 or this[moved[0]].start - last[moved[0]].start != 1:
        return row, row + 1
    whole, _ = step.parts(this)
    block, at = whole[moved[0]], this[moved[0]].start
    return row - (at - block.start), row + (block.stop - at)


def _region(piece: Piece) -> Region:
    """Return the region of its source that a piece lies in."""
    atoms = [atom for axis in piece.layout() for atom in axis]
    return bounds(piece.source.shape, piece.offset, atoms).region


def _outermost_first(axes: tuple[Axis, ...]) -> list[int]:
    """Return the dimensions that can be cut, the one whose steps are the longest in the stored tensor first."""
    longest = [max((stride for size, stride in axis if size > 1), default=0) for axis in axes]
    return sorted((dim for dim, stride in enumerate(longest) if stride), key=lambda dim: -longest[dim])


def _rows_at_once(weight: StridedTensor, dim: int, max_bytes: int) -> int | None:
    """Return how many rows of `dim` to take at once, or `None` to take all."""
    piece = weight.pieces[0]
    item = ITEM_SIZES[piece.source.dtype]
    (size, stride), *inner = (atom for atom in piece.layout()[dim] if atom[0] > 1)
    num_read = read_volume(piece)
    if num_read > _AMPLIFICATION * weight.num_elements and stride * item >= _WORTH_A_READ:
        return weight.shape[dim] // size if inner else 1
    if num_read * item <= max_bytes:
        return None
    return max(1, weight.shape[dim] * max_bytes // (num_read * item))


def read_volume(piece: Piece) -> int:
    """Return how many elements are read to get at a piece of a stored tensor."""
    return prod(s.stop - s.start for s in _region(piece))


def in_place_region(weight: StridedTensor, buffer: Tensor) -> tuple[slice, ...] | None:
    """Return the region of the stored tensor whose bytes, in order, are those of `buffer`, or `None` if none is."""
    piece = weight.pieces[0]
    if piece.operations or piece.source.deferred is not None:
        return None
    if not buffer.is_contiguous() or buffer.device.type != "cpu":
        return None
    if str(buffer.dtype) != f"torch.{piece.source.dtype}":
        return None
    atoms = [atom for axis in piece.layout() for atom in axis]
    region, offset, strides = bounds(piece.source.shape, piece.offset, atoms)
    expected = 1
    for (size, _), stride in zip(reversed(atoms), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return None
        expected *= size
    is_exact = offset == 0 and prod(s.stop - s.start for s in region) == weight.num_elements
    return region if is_exact else None
