"""The algebra behind `Weight`: what may be done to a tensor that has not been read.

A tensor is made of *pieces*. Each is a strided layout over one stored tensor, plus pointwise operations, plus the box
of the tensor that it fills; most have one piece that fills all. Every method returns a new tensor at once, whatever the
size, and raises `WeightError` where it cannot be made so. What no layout expresses becomes a *deferred* step over
whole tensors, computed at load. Reading, coverage and export work on the pieces; nothing here knows files, parameters
or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Self, TypeVar

from infinilm_hookspecs.dtypes import dtype_name, is_lossless
from infinilm_hookspecs.errors import WeightError
from infinilm_hookspecs.layout import Axis, Misfit, Span, cut, reshape_axes, row_major

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T", bound="StridedTensor")

Operation = tuple[str, Any]  # ("to", dtype name) | ("add", number) | ("mul", number)
Region = tuple[slice, ...]  # one slice of step 1 per dimension, with start and stop
Parts = Callable[[Region], tuple[Region, tuple[Region, ...]]]


class Deferred:
    """A step that only the values can tell: `function` of the whole tensors `inputs`, and its inverse if it has one.

    `constant` is the number that the result is everywhere, where it is known to be one. With `parts` the step works
    block by block: given a region of the result, it returns the region of whole blocks around it, and the region of
    every input that `function` makes those blocks of. `loss` says in words what cannot be undone.
    """

    __slots__ = ("constant", "function", "inputs", "inverse", "label", "loss", "parts")

    def __init__(
        self,
        inputs: tuple[StridedTensor, ...],
        function: Callable[..., Tensor],
        inverse: Callable[[Tensor], Tensor] | None,
        label: str,
        *,
        constant: float | None = None,
        parts: Parts | None = None,
        loss: str | None = None,
    ) -> None:
        self.inputs = inputs
        self.function = function
        self.inverse = inverse
        self.label = label
        self.constant = constant
        self.parts = parts
        self.loss = loss or (f"{label} without an inverse" if inverse is None else None)


class Source:
    """Where a piece's elements come from: a stored tensor, or the result of a deferred step."""

    __slots__ = ("deferred", "dtype", "name", "shape")

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, deferred: Deferred | None = None) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.deferred = deferred


class Piece:
    """Elements of one source, and the box of the weight they fill. `axes` and `place` are `None` for "all of it"."""

    __slots__ = ("axes", "offset", "operations", "place", "source")

    def __init__(
        self,
        source: Source,
        offset: int = 0,
        axes: tuple[Axis, ...] | None = None,
        operations: tuple[Operation, ...] = (),
        place: tuple[Span, ...] | None = None,
    ) -> None:
        self.source = source
        self.offset = offset
        self.axes = axes
        self.operations = operations
        self.place = place

    def layout(self) -> tuple[Axis, ...]:
        """Return the axes, spelled out."""
        return row_major(self.source.shape) if self.axes is None else self.axes

    def box(self, shape: tuple[int, ...]) -> tuple[Span, ...]:
        """Return (start, extent) of every dimension of a weight of `shape` that this piece fills."""
        return tuple((0, size) for size in shape) if self.place is None else self.place


class StridedTensor:
    """A tensor that has not been read, as pieces of others. Methods return new ones and compute shapes at once.

    `trail` holds the plugins whose rules it went through, oldest first.
    """

    __slots__ = ("dtype_name", "name", "pieces", "shape", "trail")

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: str, pieces: tuple[Piece, ...], trail: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype_name = dtype
        self.pieces = pieces
        self.trail = trail

    @classmethod
    def stored(cls, name: str, shape: tuple[int, ...], dtype: str) -> Self:
        """Return the stored tensor `name`, whole and unchanged."""
        return cls(name, shape, dtype, (Piece(Source(name, shape, dtype)),))

    def __repr__(self) -> str:
        return f"Weight({self.name!r}, {list(self.shape)}, {self.dtype_name})"

    # ------------------------------------------------------------ names and numbers

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype by name, such as "bfloat16"."""
        return self.dtype_name

    def like(self, other: T) -> T:
        """Return this tensor as the kind that `other` is."""
        return type(other)(self.name, self.shape, self.dtype_name, self.pieces, self.trail)

    def rename(self, name: str) -> Self:
        """Return the same tensor under another name."""
        return type(self)(name, self.shape, self.dtype_name, self.pieces, self.trail)

    # ------------------------------------------------------------ cutting

    def __getitem__(self, index: Any) -> Self:
        """Return a slice: ints, slices with any positive step, `...` and `None`, as in torch."""
        indices = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in indices:
            at = indices.index(Ellipsis)
            missing = self.ndim - sum(i is not None for i in indices) + 1
            indices[at : at + 1] = [slice(None)] * missing
        result, shape, dim = self, list[int](), 0
        for item in indices:
            if item is None:
                shape.append(1)
                continue
            if dim >= self.ndim:
                raise WeightError(f"{self!r}: {len(indices)} indices for {self.ndim} dimensions")
            if isinstance(item, slice):
                result = result._slice(dim, item)
                shape.append(result.shape[dim])
            elif isinstance(item, int) and not isinstance(item, bool):
                row = self._row(dim, item)
                result = result._slice(dim, slice(row, row + 1))
            else:
                raise WeightError(f"{self!r}: index {item!r} is neither an int nor a slice")
            dim += 1
        shape += result.shape[dim:]
        return result if tuple(shape) == result.shape else result.reshape(shape)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Self, ...]:
        """Return consecutive slices along `dim`, of `sizes` each or of the sizes given, which add up to all of it."""
        dim = self._dimension(dim)
        total = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, total - at) for at in range(0, max(total, 1), sizes)] if sizes > 0 else [sizes]
        if sum(sizes) != total or min(sizes, default=0) < 0:
            raise WeightError(f"{self!r}: split into {list(sizes)} along dimension {dim} of {total}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self._slice(dim, slice(a, a + n)) for a, n in zip(starts, sizes, strict=True))

    def _slice(self, dim: int, index: slice) -> Self:
        start, stop, step = index.indices(self.shape[dim])
        if step < 1:
            raise WeightError(f"{self!r}: step {step} of {index}; steps are positive, as in torch")
        count = len(range(start, stop, step))
        if (start, count, step) == (0, self.shape[dim], 1):
            return self
        shape = (*self.shape[:dim], count, *self.shape[dim + 1 :])
        pieces: list[Piece] = []
        for piece in self.pieces:
            box = piece.box(self.shape)
            begin, extent = box[dim]
            first = max(0, -(-(begin - start) // step))
            last = min(count, -(-(begin + extent - start) // step))
            axes = piece.layout()
            for run in cut(axes[dim], start + first * step - begin, last - first, step):
                place = (first + run.row, prod(size for size, _ in run.axis))
                pieces.append(
                    Piece(
                        piece.source,
                        piece.offset + run.offset,
                        (*axes[:dim], run.axis, *axes[dim + 1 :]),
                        piece.operations,
                        _whole_or((*box[:dim], place, *box[dim + 1 :]), shape),
                    )
                )
        return type(self)(self.name, shape, self.dtype_name, tuple(pieces), self.trail)

    # ------------------------------------------------------------ moving dimensions

    def permute(self, *dims: int | Sequence[int]) -> Self:
        """Return the tensor with its dimensions in the order given."""
        order = [self._dimension(d) for d in _flatten(dims)]
        if sorted(order) != list(range(self.ndim)):
            raise WeightError(f"{self!r}: permute{tuple(dims)} does not name every dimension once")
        pieces = tuple(
            Piece(
                piece.source,
                piece.offset,
                tuple(axes[d] for d in order),
                piece.operations,
                piece.place and tuple(piece.place[d] for d in order),
            )
            for piece in self.pieces
            for axes in [piece.layout()]
        )
        return type(self)(self.name, tuple(self.shape[d] for d in order), self.dtype_name, pieces, self.trail)

    def transpose(self, dim0: int, dim1: int) -> Self:
        """Return the tensor with two dimensions exchanged."""
        order = list(range(self.ndim))
        a, b = self._dimension(dim0), self._dimension(dim1)
        order[a], order[b] = order[b], order[a]
        return self.permute(order)

    def reshape(self, *shape: int | Sequence[int]) -> Self:
        """Return the same elements, row-major, in another shape; one size may be -1."""
        new = self._infer(_flatten(shape))
        if new == self.shape:
            return self
        if prod(new) == 0:
            return type(self)(self.name, new, self.dtype_name, (), self.trail)
        pieces: list[Piece] = []
        try:
            for p in self.pieces:
                boxes = reshape_axes(p.layout(), p.box(self.shape), self.shape, new)
                pieces += [
                    Piece(p.source, p.offset + offset, axes, p.operations, _whole_or(place, new))
                    for offset, axes, place in boxes
                ]
        except Misfit:
            return self._defer(
                lambda t: t.reshape(new), new, self.dtype_name, lambda t: t.reshape(self.shape), "reshape"
            )
        return type(self)(self.name, new, self.dtype_name, tuple(pieces), self.trail)

    # ------------------------------------------------------------ putting together

    def part(self, dim: int, start: int, total: int) -> Self:
        """Return this tensor as rows [start, start + shape[dim]) of a target that is `total` long in `dim`.

        Parts of one name, from any number of stored tensors, are joined after the stage; together they must fill it.
        """
        dim = self._dimension(dim)
        if not 0 <= start <= start + self.shape[dim] <= total:
            raise WeightError(f"{self!r}: part {start} to {start + self.shape[dim]} of dimension {dim} of {total}")
        shape = (*self.shape[:dim], total, *self.shape[dim + 1 :])
        pieces = []
        for piece in self.pieces:
            box = piece.box(self.shape)
            moved = (*box[:dim], (box[dim][0] + start, box[dim][1]), *box[dim + 1 :])
            pieces.append(Piece(piece.source, piece.offset, piece.axes, piece.operations, _whole_or(moved, shape)))
        return type(self)(self.name, shape, self.dtype_name, tuple(pieces), self.trail)

    # ------------------------------------------------------------ values

    def to(self, dtype: str | torch.dtype) -> Self:
        """Return the tensor converted to `dtype`; lossy if it narrows."""
        name = self._known(dtype)
        return self if name == self.dtype_name else self._pointwise(("to", name), name)

    def plus(self, value: float) -> Self:
        """Return the tensor plus a number, rounded in its own dtype; lossy."""
        return self._pointwise(("add", value), self.dtype_name)

    def times(self, value: float) -> Self:
        """Return the tensor times a number, rounded in its own dtype; lossy."""
        return self._pointwise(("mul", value), self.dtype_name)

    def apply(
        self,
        fn: Callable[[Tensor], Tensor],
        *,
        shape: Sequence[int] | None = None,
        dtype: str | torch.dtype | None = None,
        inverse: Callable[[Tensor], Tensor] | None = None,
    ) -> Self:
        """Return `fn` of the whole tensor, called once at load.

        `shape` and `dtype` are those of the result, where they change. Without an `inverse` it is lossy, and
        tensor-parallel ranks each read the whole tensor.
        """
        new_shape = self.shape if shape is None else tuple(shape)
        if min(new_shape, default=0) < 0:
            raise WeightError(f"{self!r}: apply cannot have the shape {list(new_shape)}")
        new_dtype = self.dtype_name if dtype is None else self._known(dtype)
        return self._defer(fn, new_shape, new_dtype, inverse, getattr(fn, "__name__", "apply"))

    def losses(self) -> tuple[str, ...]:
        """Return what happens to the values on the way that cannot be undone exactly, in words."""
        found: dict[str, None] = {}
        for piece in self.pieces:
            dtype = piece.source.dtype
            for kind, value in piece.operations:
                if kind == "to":
                    if not is_lossless(dtype, value):
                        found[f"{dtype} to {value}"] = None
                    dtype = value
                else:
                    found[f"{kind} {value}"] = None
            if piece.source.deferred is not None:
                found |= dict.fromkeys(loss for w in piece.source.deferred.inputs for loss in w.losses())
                if piece.source.deferred.loss is not None:
                    found[piece.source.deferred.loss] = None
        return tuple(found)

    def stored_sources(self) -> Iterator[Source]:
        """Yield the stored tensor behind every piece, those behind deferred steps too; some several times."""
        for piece in self.pieces:
            deferred = piece.source.deferred
            if deferred is None:
                yield piece.source
            else:
                for tensor in deferred.inputs:
                    yield from tensor.stored_sources()

    def stored_names(self) -> tuple[str, ...]:
        """Return the names of the stored tensors this one is made of, each once, in order."""
        return tuple(dict.fromkeys(source.name for source in self.stored_sources()))

    def origin(self) -> str:
        """Return which stored tensors, through which plugins, this one comes from, for messages."""
        names = self.stored_names()
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{shown} [plugin {', '.join(self.trail)}]" if self.trail else shown

    def require_whole(self, label: str) -> None:
        """Raise `WeightError` naming the stored tensors when they fill only part of this weight."""
        filled = sum(prod(extent for _, extent in piece.box(self.shape)) for piece in self.pieces)
        if filled != self.num_elements:
            names = ", ".join(repr(name) for name in self.stored_names())
            raise WeightError(f"{self!r}: {label} needs the whole tensor, and {names} fill only part of it")

    # ------------------------------------------------------------ helpers

    def _pointwise(self, operation: Operation, dtype: str) -> Self:
        pieces = tuple(Piece(p.source, p.offset, p.axes, (*p.operations, operation), p.place) for p in self.pieces)
        return type(self)(self.name, self.shape, dtype, pieces, self.trail)

    def _defer(
        self,
        function: Callable[..., Tensor],
        shape: tuple[int, ...],
        dtype: str,
        inverse: Callable[[Tensor], Tensor] | None,
        label: str,
    ) -> Self:
        self.require_whole(label)
        source = Source(self.name, shape, dtype, Deferred((self,), function, inverse, label))
        return type(self)(self.name, shape, dtype, (Piece(source),), self.trail)

    def _known(self, dtype: str | torch.dtype) -> str:
        try:
            return dtype_name(dtype)
        except ValueError as err:
            raise WeightError(f"{self!r}: {err}") from err

    def _dimension(self, dim: int) -> int:
        if not -self.ndim <= dim < self.ndim:
            raise WeightError(f"{self!r}: dimension {dim} of {self.ndim}")
        return dim % self.ndim

    def _row(self, dim: int, row: int) -> int:
        size = self.shape[dim]
        if not -size <= row < size:
            raise WeightError(f"{self!r}: row {row} of dimension {dim}, which has {size}")
        return row % size

    def _infer(self, shape: Sequence[int]) -> tuple[int, ...]:
        return infer_size(self.num_elements, shape, repr(self))


def join(weights: Iterable[T]) -> T:
    """Return one weight with the pieces of several of the same name and shape.

    Raises `WeightError` naming the stored tensors where shapes differ. Holes and overlaps are the plan's to find.
    """
    weights = list(weights)
    first = weights[0]
    for other in weights[1:]:
        if other.shape != first.shape:
            raise WeightError(
                f"{first.name!r} is {list(first.shape)} from {', '.join(first.stored_names())} "
                f"and {list(other.shape)} from {', '.join(other.stored_names())}"
            )
    dtypes = {weight.dtype_name for weight in weights}
    widest = next((d for d in dtypes if all(is_lossless(o, d) for o in dtypes)), "float32")
    pieces = tuple(piece for weight in weights for piece in weight.to(widest).pieces)
    trail = tuple(dict.fromkeys(plugin for weight in weights for plugin in weight.trail))
    return type(first)(first.name, first.shape, widest, pieces, trail)


def _whole_or(place: tuple[Span, ...], shape: tuple[int, ...]) -> tuple[Span, ...] | None:
    whole = all(start == 0 and extent == size for (start, extent), size in zip(place, shape, strict=True))
    return None if whole else place


def _flatten(sizes: Sequence[int | Sequence[int]]) -> list[int]:
    flat: list[int] = []
    for size in sizes:
        flat += [size] if isinstance(size, int) else size
    return flat


def infer_size(volume: int, shape: Sequence[int], of: str) -> tuple[int, ...]:
    known = prod(size for size in shape if size != -1)
    if list(shape).count(-1) > 1 or min(shape, default=0) < -1 or (-1 in shape and (known == 0 or volume % known)):
        raise WeightError(f"{of}: cannot reshape to {list(shape)}")
    found = tuple(volume // known if size == -1 else size for size in shape)
    if prod(found) != volume:
        raise WeightError(f"{of}: cannot reshape to {list(shape)}")
    return found
