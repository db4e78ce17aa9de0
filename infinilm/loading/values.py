"""From `Weight`s to tensors and back: the only place where the weight algebra meets values.

A `Reader` gives a region of a stored tensor as a contiguous CPU tensor; nothing here knows files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from infinilm_hookspecs import WeightError
from infinilm_hookspecs.layout import Atom, Span, bounds
from infinilm_hookspecs.strided import Deferred, Operation, Piece, Region, Source, StridedTensor

Reader = Callable[[str, tuple[slice, ...]], Tensor]


class Steps:
    """The results of deferred steps: each is computed once, and freed after its last use.

    `weights` are those that are going to be filled, each of them once.
    """

    def __init__(self, weights: Iterable[StridedTensor]) -> None:
        self._uses = Counter[int]()  # by the identity of the result's source: pieces that are still to be read
        self._results: dict[int, Tensor] = {}
        for weight in weights:
            self._expect(weight)

    def result(self, source: Source, deferred: Deferred, read: Reader) -> Tensor:
        """Return the result of a step. Raises `WeightError` where it is not what the rule declared."""
        key = id(source)
        result = self._results.get(key)
        if result is None:
            result = self._results[key] = run_deferred(source, deferred, read, self).contiguous()
        self._uses[key] -= 1
        if self._uses[key] <= 0:
            del self._results[key]
        return result

    def _expect(self, weight: StridedTensor) -> None:
        for piece, _ in _pieces_to_fill(weight):
            source = piece.source
            if source.deferred is None:
                continue
            if id(source) not in self._uses or source.deferred.parts is not None:
                for tensor in source.deferred.inputs:
                    self._expect(tensor)
            self._uses[id(source)] += 1


def evaluate(weight: StridedTensor, read: Reader, steps: Steps | None = None) -> Tensor:
    """Return the whole tensor `weight` stands for, on the CPU."""
    result = torch.empty(weight.shape, dtype=torch_dtype(weight.dtype_name))
    fill(weight, result, read, steps)
    return result


def fill(weight: StridedTensor, destination: Tensor, read: Reader, steps: Steps | None = None) -> None:
    """Write `weight` into `destination`, which has its shape; the last conversion is to the destination's dtype.

    `steps` are shared with other weights that come from the same deferred steps.
    """
    steps = steps or Steps([weight])
    for piece, box in _pieces_to_fill(weight):
        extents = [extent for _, extent in box]
        values = apply_operations(read_piece(piece, read, steps).reshape(extents), piece.operations)
        destination[tuple(slice(start, start + extent) for start, extent in box)].copy_(values)


def _pieces_to_fill(weight: StridedTensor) -> Iterator[tuple[Piece, tuple[Span, ...]]]:
    """Yield every piece that has elements, with its box."""
    for piece in weight.pieces:
        box = piece.box(weight.shape)
        if all(extent for _, extent in box):
            yield piece, box


def read_piece(piece: Piece, read: Reader, steps: Steps) -> Tensor:
    """Return the elements of `piece` as one strided view, a dimension per atom, before its operations."""
    atoms = [atom for axis in piece.layout() for atom in axis]
    sizes = [size for size, _ in atoms]
    source = piece.source
    if source.deferred is not None and source.deferred.parts is None:
        whole = steps.result(source, source.deferred, read)
        return _strided(whole, sizes, [stride for _, stride in atoms], piece.offset)
    region, offset, strides = bounds(source.shape, piece.offset, atoms)
    if source.deferred is None:
        values = read(source.name, region)
    else:
        values = run_blocks(source, source.deferred, region, read, steps)
    return _strided(values, sizes, strides, offset)


def run_deferred(source: Source, deferred: Deferred, read: Reader, steps: Steps) -> Tensor:
    """Return the result of a deferred step. Raises `WeightError` where it is not what the rule declared."""
    return _call(source, deferred, deferred.inputs, source.shape, read, steps)


def run_blocks(source: Source, deferred: Deferred, region: Region, read: Reader, steps: Steps) -> Tensor:
    """Return `region` of the result of a step that works block by block, contiguous; only its blocks are read."""
    assert deferred.parts is not None
    whole, cuts = deferred.parts(region)
    inputs = [tensor[cut] for tensor, cut in zip(deferred.inputs, cuts, strict=True)]
    result = _call(source, deferred, inputs, tuple(s.stop - s.start for s in whole), read, steps)
    inside = tuple(slice(r.start - w.start, r.stop - w.start) for r, w in zip(region, whole, strict=True))
    return result[inside].contiguous()


def _call(
    source: Source,
    deferred: Deferred,
    inputs: Sequence[StridedTensor],
    shape: tuple[int, ...],
    read: Reader,
    steps: Steps,
) -> Tensor:
    result = deferred.function(*(evaluate(tensor, read, steps) for tensor in inputs))
    found = tuple(result.shape), str(result.dtype).removeprefix("torch.")
    if found != (shape, source.dtype):
        raise WeightError(
            f"{deferred.label} of {source.name!r} returned {list(found[0])} {found[1]}, "
            f"and its rule declared {list(shape)} {source.dtype}"
        )
    return result


def restore(weight: StridedTensor, value: Tensor, stored: Callable[[Source], Tensor]) -> None:
    """Run `weight` backwards: write `value`, which has its shape, back into the stored tensors it came from.

    Layouts are undone exactly, pointwise operations as floating point allows. Raises `WeightError` for a deferred step
    without an inverse.
    """
    for piece in weight.pieces:
        box = piece.box(weight.shape)
        values = value[tuple(slice(start, start + extent) for start, extent in box)]
        values = undo_operations(values, piece)
        atoms = [atom for axis in piece.layout() for atom in axis]
        if piece.source.deferred is None:
            _scatter(values, stored(piece.source), atoms, piece.offset)
            continue
        _check_invertible(piece.source.deferred, piece, weight)
        whole = torch.empty(piece.source.shape, dtype=torch_dtype(piece.source.dtype))
        _scatter(values, whole, atoms, piece.offset)
        inverse = piece.source.deferred.inverse
        assert inverse is not None
        restore(piece.source.deferred.inputs[0], inverse(whole), stored)


def _check_invertible(deferred: Deferred, piece: Piece, weight: StridedTensor) -> None:
    if deferred.inverse is None or len(deferred.inputs) != 1:
        raise WeightError(f"{deferred.label} has no inverse: {weight!r} cannot be written back")
    if prod(extent for _, extent in piece.box(weight.shape)) != prod(piece.source.shape):
        raise WeightError(f"{weight!r} is only part of what {deferred.label} made: it cannot be written back alone")


def _scatter(values: Tensor, whole: Tensor, atoms: list[Atom], offset: int) -> None:
    view = _strided(whole, [size for size, _ in atoms], [stride for _, stride in atoms], offset)
    view.copy_(values.reshape(view.shape))


def _strided(whole: Tensor, sizes: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
    # as_strided counts from the start of the storage, which a view does not begin at
    return whole.as_strided(sizes, strides, whole.storage_offset() + offset)


def apply_operations(values: Tensor, operations: tuple[Operation, ...]) -> Tensor:
    """Return `values` after pointwise operations, each rounded in the dtype it is carried out in."""
    for kind, operand in operations:
        if kind == "to":
            values = values.to(torch_dtype(operand))
        else:
            values = (values + operand if kind == "add" else values * operand).to(values.dtype)
    return values


def undo_operations(values: Tensor, piece: Piece) -> Tensor:
    """Return what `apply_operations` was given, as exactly as floating point allows."""
    dtypes = [piece.source.dtype]
    for kind, operand in piece.operations:
        dtypes.append(operand if kind == "to" else dtypes[-1])
    for (kind, operand), before in zip(reversed(piece.operations), reversed(dtypes[:-1]), strict=True):
        if kind == "to":
            values = values.to(torch_dtype(before))
        else:
            values = values - operand if kind == "add" else values / operand
    return values


def torch_dtype(name: str) -> torch.dtype:
    """Return the `torch.dtype` called `name`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
