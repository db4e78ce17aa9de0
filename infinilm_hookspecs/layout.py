"""Strided layouts: which elements of a row-major tensor a weight consists of, in closed form.

An *axis* of a layout is a tuple of atoms (size, stride), outermost first; its length is the product of their sizes. A
plain row-major axis has one atom. Cutting, permuting and reshaping map layouts to layouts, so a chain of them costs
nothing until the bytes are read, and running it backwards is the same layout. All numbers count elements, not bytes.
Knows nothing of names, dtypes, files or parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

Atom = tuple[int, int]
Axis = tuple[Atom, ...]
Span = tuple[int, int]  # (start, extent) along one dimension


class Misfit(Exception):  # noqa: N818  # never seen by a user: the caller defers instead
    """A reshape that no strided layout expresses."""


class Cut(NamedTuple):
    """Rows of an axis: they lie `offset` elements further on, and are rows [row, row + len(axis)) of the result."""

    offset: int
    axis: Axis
    row: int


def row_major(shape: Sequence[int]) -> tuple[Axis, ...]:
    """Return the layout of a whole tensor of `shape`."""
    axes: list[Axis] = []
    stride = 1
    for size in reversed(shape):
        axes.append(((size, stride),))
        stride *= size
    return tuple(reversed(axes))


def length(axis: Axis) -> int:
    """Return the number of rows of `axis`."""
    return prod(size for size, _ in axis)


def cut(axis: Axis, start: int, count: int, step: int = 1) -> list[Cut]:
    """Return rows start, start + step, ... (`count` of them) of `axis` as few strided runs, in order of rows."""
    if count <= 0:
        return []
    if (start, count, step) == (0, length(axis), 1):
        return [Cut(0, axis, 0)]
    (_, stride), inner = axis[0], axis[1:]
    if not inner:
        return [Cut(start * stride, ((count, stride * step),), 0)]
    rows = length(inner)
    if step == 1:
        return _cut_range(axis, start, start + count, rows)
    first, last = start // rows, (start + (count - 1) * step) // rows
    if rows % step == 0 and last > first:
        regular = _cut_regular(axis, start, count, step, rows)
        if regular is not None:
            return regular
    found: list[Cut] = []
    done = 0
    for outer in range(first, last + 1):
        begin = start + done * step - outer * rows
        here = min(count - done, -(-(rows - begin) // step))
        found += [Cut(outer * stride + c.offset, c.axis, done + c.row) for c in cut(inner, begin, here, step)]
        done += here
    return found


def _cut_range(axis: Axis, start: int, stop: int, rows: int) -> list[Cut]:
    """Cut [start, stop) of an axis whose outer atom strides over `rows` inner rows: a head, whole rows, a tail."""
    (_, stride), inner = axis[0], axis[1:]
    low, high = -(-start // rows), stop // rows
    found: list[Cut] = []
    if start % rows:
        outer, begin = divmod(start, rows)
        head = cut(inner, begin, min(rows, stop - outer * rows) - begin)
        found += [Cut(outer * stride + c.offset, c.axis, c.row) for c in head]
    if low < high:
        found.append(Cut(low * stride, ((high - low, stride), *inner), low * rows - start))
    if stop % rows and high >= low:
        tail = cut(inner, 0, stop % rows)
        found += [Cut(high * stride + c.offset, c.axis, high * rows - start + c.row) for c in tail]
    return found


def _cut_regular(axis: Axis, start: int, count: int, step: int, rows: int) -> list[Cut] | None:
    """Cut with a step that divides the inner rows, where every outer row is cut alike; `None` where they are not."""
    (_, stride), inner = axis[0], axis[1:]
    per_outer = rows // step
    outer, begin = divmod(start, rows)
    if begin >= step or count % per_outer:
        return None
    once = cut(inner, begin, per_outer, step)
    if len(once) != 1:
        return None
    return [Cut(outer * stride + once[0].offset, ((count // per_outer, stride), *once[0].axis), 0)]


def deal(atoms: Sequence[Atom], shape: Sequence[int]) -> tuple[Axis, ...]:
    """Deal `atoms`, outermost first, out to dimensions of `shape`. Raises `Misfit` where a boundary falls inside one.

    Neighbours that form one run are merged first. The product of `shape` is that of the atoms.
    """
    runs: list[Atom] = []
    for size, stride in atoms:
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    runs.reverse()
    axes: list[Axis] = []
    for need in shape:
        axis: list[Atom] = []
        while need > 1:
            size, stride = runs.pop()
            if need % size == 0:
                axis.append((size, stride))
                need //= size
            elif size % need == 0:
                axis.append((need, stride * (size // need)))
                runs.append((size // need, stride))
                need = 1
            else:
                raise Misfit(f"a run of {size} elements does not divide into {need}")
        axes.append(tuple(axis) or ((1, 0),))
    return tuple(axes)


def match_dimensions(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Pair the dimensions of two shapes of equal volume into the smallest groups of equal volume, in order."""
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        volume_i = volume_j = 1
        if i < len(old):
            volume_i, i = old[i], i + 1
        if j < len(new):
            volume_j, j = new[j], j + 1
        while volume_i != volume_j:
            if volume_i < volume_j:
                volume_i, i = volume_i * old[i], i + 1
            else:
                volume_j, j = volume_j * new[j], j + 1
        yield range(first_i, i), range(first_j, j)


def reshape_axes(
    axes: Sequence[Axis], place: Sequence[Span], old: Sequence[int], new: Sequence[int]
) -> list[tuple[int, tuple[Axis, ...], tuple[Span, ...]]]:
    """Reshape the box `place`, laid out as `axes`, of a tensor from shape `old` to `new`.

    Return (offset, axes, place) of every box it becomes. Raises `Misfit` where the order of the elements is no layout.
    """
    groups = []
    for from_dims, to_dims in match_dimensions(old, new):
        i, j = slice(from_dims.start, from_dims.stop), slice(to_dims.start, to_dims.stop)
        if len(from_dims) == len(to_dims) == 1:
            groups.append([(0, tuple(axes[i]), tuple(place[i]))])
        else:
            groups.append(_reshape_group(axes[i], place[i], old[i], new[j]))
        if prod(len(group) for group in groups) > 65_536:
            raise Misfit(f"the result would be more than 65536 pieces of {tuple(new)}")
    return [
        (sum(c[0] for c in combined), sum((c[1] for c in combined), ()), sum((c[2] for c in combined), ()))
        for combined in product(*groups)
    ]


def _reshape_group(
    axes: Sequence[Axis], place: Sequence[Span], old: Sequence[int], new: Sequence[int]
) -> list[tuple[int, tuple[Axis, ...], tuple[Span, ...]]]:
    # Outer dimensions vary one row at a time down to the innermost one that is not whole; what is inside is one run.
    split = next((d for d in reversed(range(len(old))) if place[d] != (0, old[d])), 0)
    inner = prod(old[split + 1 :])
    run = sum(axes[split:], ())
    found = []
    for index in product(*(range(extent) for _, extent in place[:split])):
        offset = start = 0
        for d, row in enumerate(index):
            offset += cut(axes[d], row, 1)[0].offset
            start = start * old[d] + place[d][0] + row
        if split < len(old):
            start = (start * old[split] + place[split][0]) * inner
        found += _place_run(offset, run, start, new)
    return found


def _place_run(
    offset: int, run: Axis, start: int, shape: Sequence[int]
) -> list[tuple[int, tuple[Axis, ...], tuple[Span, ...]]]:
    """Lay a run out as rows [start, start + length) of a flattened tensor of `shape`."""
    found = []
    for at, box in boxes_of_range(start, length(run), shape):
        extents = [extent for _, extent in box]
        pieces = cut(run, at, prod(extents))
        if len(pieces) == 1:
            found.append((offset + pieces[0].offset, deal(pieces[0].axis, extents), box))
        else:
            for piece in pieces:
                found += _place_run(offset + piece.offset, piece.axis, start + at + piece.row, shape)
    return found


def boxes_of_range(start: int, count: int, shape: Sequence[int]) -> list[tuple[int, tuple[Span, ...]]]:
    """Cover the flat range [start, start + count) of a tensor of `shape` with boxes, each with its offset in the range.

    At most two boxes a dimension and one more: heads, a body, tails.
    """
    if not shape:
        return [(0, ())]
    inner = prod(shape[1:])
    if count == inner * shape[0]:
        return [(0, tuple((0, size) for size in shape))]
    whole = tuple((0, size) for size in shape[1:])
    stop = start + count
    low, high = -(-start // inner), stop // inner
    found: list[tuple[int, tuple[Span, ...]]] = []
    if start % inner:
        row, begin = divmod(start, inner)
        for at, box in boxes_of_range(begin, min(inner, stop - row * inner) - begin, shape[1:]):
            found.append((at, ((row, 1), *box)))
    if low < high:
        found.append((low * inner - start, ((low, high - low), *whole)))
    if stop % inner and high >= low:
        for at, box in boxes_of_range(0, stop % inner, shape[1:]):
            found.append((high * inner - start + at, ((high, 1), *box)))
    return found


class Bounds(NamedTuple):
    """The smallest region of a tensor that holds a strided run, and where the run lies inside that region."""

    region: tuple[slice, ...]
    offset: int
    strides: tuple[int, ...]


def bounds(shape: Sequence[int], offset: int, atoms: Sequence[Atom]) -> Bounds:
    """Return the region of a row-major tensor of `shape` that has to be read to get at a strided run.

    Exact per dimension as long as no atom carries into the next dimension; from the outermost dimension that one
    carries into, all inner dimensions are read whole.
    """
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    first = [offset // strides[d] % shape[d] for d in range(len(shape))]
    spans = [0] * len(shape)  # how far the run reaches along each dimension
    owners: list[int] = []  # the dimension in which each atom takes its smallest step
    for size, stride in atoms:
        owner = next((d for d, s in enumerate(strides) if s <= stride), -1) if size > 1 else -1
        owners.append(owner)
        while size > 1 and stride == strides[owner] and owner and not first[owner] and size % shape[owner] == 0:
            spans[owner] += shape[owner] - 1  # the atom runs through all of this dimension: go on in the next
            size, stride, owner = size // shape[owner], stride * shape[owner], owner - 1
        if size > 1:
            if stride % strides[owner]:
                return _solid_bounds(shape, strides, offset, atoms)
            spans[owner] += (size - 1) * (stride // strides[owner])
    if any(begin + span >= size for begin, span, size in zip(first, spans, shape, strict=True)):
        return _solid_bounds(shape, strides, offset, atoms)
    region = tuple(slice(begin, begin + span + 1) for begin, span in zip(first, spans, strict=True))
    packed = [prod(span + 1 for span in spans[d + 1 :]) for d in range(len(shape))]
    moved = (
        stride // strides[owner] * packed[owner] if size > 1 else 0
        for (size, stride), owner in zip(atoms, owners, strict=True)
    )
    return Bounds(region, 0, tuple(moved))


def _solid_bounds(shape: Sequence[int], strides: Sequence[int], first: int, atoms: Sequence[Atom]) -> Bounds:
    """Read rows of the outermost dimension in which the two ends of the run differ, all inside them whole."""
    last = first + sum((size - 1) * stride for size, stride in atoms)
    region: list[slice] = []
    offset = first
    for d, stride in enumerate(strides):
        low, high = first // stride % shape[d], last // stride % shape[d]
        region.append(slice(low, high + 1))
        offset -= low * stride
        if low != high:
            region += [slice(0, size) for size in shape[d + 1 :]]
            break
    return Bounds(tuple(region), offset, tuple(stride for _, stride in atoms))
