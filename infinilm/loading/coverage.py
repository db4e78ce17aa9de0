"""Exact coverage: is every element of a target written once, and every element of a stored tensor used?

Layouts repeat from layer to layer, so each distinct question is answered once and remembered for the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

from infinilm_hookspecs.layout import Atom, Span

Run = tuple[int, tuple[Atom, ...]]  # (offset, atoms) of strided elements of a stored tensor


def find_hole_or_overlap(boxes: Sequence[tuple[Span, ...]], shape: Sequence[int]) -> str | None:
    """Return what is wrong with `boxes` as a partition of a tensor of `shape`, in words, or `None`."""
    live: list[tuple[Span, ...]] = []
    for box in sorted(box for box in boxes if prod(extent for _, extent in box)):
        live = [other for other in live if not box or other[0][0] + other[0][1] > box[0][0]]
        if any(_overlap(box, other) for other in live):
            return f"is written twice at {_describe(box)}"
        live.append(box)
    filled = sum(prod(extent for _, extent in box) for box in boxes)
    if filled != prod(shape):
        return f"is filled only in part: {filled} of {prod(shape)} elements"
    return None


def _overlap(one: tuple[Span, ...], other: tuple[Span, ...]) -> bool:
    return all(a < b + m and b < a + n for (a, n), (b, m) in zip(one, other, strict=True))


def _describe(box: tuple[Span, ...]) -> str:
    return "[" + ", ".join(f"{start}:{start + extent}" for start, extent in box) + "]"


class Usage:
    """Counts how often the elements of stored tensors are used."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[Run, ...]], tuple[int, int]] = {}

    def count(self, num_elements: int, runs: Sequence[Run]) -> tuple[int, int]:
        """Return (elements never used, elements used more than once) of a tensor that `runs` take elements from."""
        question = (num_elements, tuple(sorted(runs)))
        if question not in self._known:
            self._known[question] = _count(*question)
        return self._known[question]


def _count(num_elements: int, runs: Sequence[Run]) -> tuple[int, int]:
    import numpy  # most plans have no question for it, and listing plugins wants none

    runs = [run for run in runs if all(size for size, _ in run[1])]
    together = 1  # elements that always come together are counted as one: whole rows, most of the time
    while (smaller := _without_common_atom(num_elements, runs)) is not None:
        size, runs = smaller
        num_elements //= size
        together *= size
    unit = num_elements
    for offset, atoms in runs:
        unit = gcd(unit, offset, _contiguous(atoms), *(stride for size, stride in atoms if size > 1 and stride != 1))
    unit = max(unit, 1)
    uses = numpy.zeros(num_elements // unit, dtype=numpy.uint8)
    for offset, atoms in runs:
        sizes, strides = [], []
        for size, stride in atoms:
            if size > 1:
                sizes.append(size // unit if stride == 1 else size)
                strides.append(1 if stride == 1 else stride // unit)
        view = numpy.lib.stride_tricks.as_strided(uses[offset // unit :], sizes, strides)
        view += view < 2
    together *= unit
    return int((uses == 0).sum()) * together, int((uses > 1).sum()) * together


def _without_common_atom(num_elements: int, runs: Sequence[Run]) -> tuple[int, list[Run]] | None:
    """Return (size, runs without it) of an atom through which all runs go alike, or `None` where there is none."""
    for atom in runs[0][1] if runs else ():
        if atom[0] > 1 and num_elements % prod(atom) == 0:
            without = [_without(run, atom) for run in runs]
            if None not in without:
                return atom[0], [run for run in without if run is not None]
    return None


def _without(run: Run, atom: Atom) -> Run | None:
    """Return `run` as if the tensor had only the first of `size` slices at every `stride`; `None` if it uses others."""
    offset, atoms = run
    size, stride = atom
    period = size * stride
    others = list(atoms)
    if atom not in others:
        return None
    others.remove(atom)
    inside = offset % period + sum((n - 1) * step for n, step in others if step % period)
    if inside >= stride:
        return None
    return offset // period * stride + offset % period, tuple(
        (n, step if step % period else step // size) for n, step in others
    )


def _contiguous(atoms: Sequence[Atom]) -> int:
    """Return the length of the run of neighbours at the end of `atoms`."""
    return next((size for size, stride in atoms if stride == 1 and size > 1), 1)
