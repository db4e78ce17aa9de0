"""Coverage against brute force: boxes as a partition, and how often strided runs use the elements of a tensor."""

from __future__ import annotations

from math import prod

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinilm.loading import coverage
from infinilm.loading.coverage import Run, Usage, find_hole_or_overlap
from infinilm_hookspecs import Weight
from infinilm_hookspecs.layout import Span

Boxes = list[tuple[Span, ...]]

# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    ("boxes", "shape", "expected"),
    [
        ([((0, 4), (0, 2))], (4, 2), None),
        ([((0, 2), (0, 2)), ((2, 2), (0, 2))], (4, 2), None),
        ([((2, 2), (0, 2)), ((0, 2), (0, 2))], (4, 2), None),
        ([((0, 4), (0, 1)), ((0, 4), (1, 1))], (4, 2), None),
        ([((0, 2), (0, 2))], (4, 2), "is filled only in part: 4 of 8 elements"),
        ([], (4, 2), "is filled only in part: 0 of 8 elements"),
        ([((0, 3), (0, 2)), ((2, 2), (0, 2))], (4, 2), "is written twice at [2:4, 0:2]"),
        ([((0, 4), (0, 2))] * 2, (4, 2), "is written twice at [0:4, 0:2]"),
        ([()], (), None),
        ([(), ()], (), "is written twice at []"),
        ([], (), "is filled only in part: 0 of 1 elements"),
        ([], (0, 2), None),
        ([((0, 0), (0, 2))], (0, 2), None),
        ([((0, 4),), ((2, 0),)], (4,), None),
    ],
)
def test_hole_or_overlap(boxes: Boxes, shape: tuple[int, ...], expected: str | None) -> None:
    assert find_hole_or_overlap(boxes, shape) == expected


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Boxes]:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    boxes: Boxes = []
    for _ in range(draw(st.integers(0, 4))):
        starts = [draw(st.integers(0, size)) for size in shape]
        spans = [(start, draw(st.integers(0, size - start))) for start, size in zip(starts, shape, strict=True)]
        boxes.append(tuple(spans))
    return shape, boxes


def cut_up(shape: tuple[int, ...], data: st.DataObject) -> Boxes:
    """Return a partition of `shape`: boxes cut in two again and again."""
    boxes: Boxes = [tuple((0, size) for size in shape)]
    for _ in range(data.draw(st.integers(0, 4))):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        dim = data.draw(st.integers(0, len(shape) - 1))
        start, extent = box[dim]
        at = data.draw(st.integers(0, extent))
        boxes += [(*box[:dim], span, *box[dim + 1 :]) for span in ((start, at), (start + at, extent - at))]
    return list(data.draw(st.permutations(boxes)))


def count_boxes(shape: tuple[int, ...], boxes: Boxes) -> numpy.ndarray:
    counts = numpy.zeros(shape, dtype=int)
    for box in boxes:
        counts[tuple(slice(start, start + extent) for start, extent in box)] += 1
    return counts


def check_verdict(shape: tuple[int, ...], boxes: Boxes) -> None:
    counts = count_boxes(shape, boxes)
    verdict = find_hole_or_overlap(boxes, shape)
    if (counts > 1).any():
        assert verdict is not None
        assert verdict.startswith("is written twice at [")
    elif (counts == 0).any():
        assert verdict == f"is filled only in part: {(counts == 1).sum()} of {counts.size} elements"
    else:
        assert verdict is None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(shapes_and_boxes())
def test_random_boxes_against_a_mask(drawn: tuple[tuple[int, ...], Boxes]) -> None:
    check_verdict(*drawn)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), st.data())
def test_partitions_against_a_mask_whole_and_with_a_box_too_few_or_too_many(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    boxes = cut_up(shape, data)
    assert find_hole_or_overlap(boxes, shape) is None
    at = data.draw(st.integers(0, len(boxes) - 1))
    check_verdict(shape, [*boxes[:at], *boxes[at + 1 :]])
    check_verdict(shape, [*boxes, boxes[at]])


# ---------------------------------------------------------------- runs


def runs_of(weight: Weight) -> list[Run]:
    return [(p.offset, tuple(atom for axis in p.layout() for atom in axis)) for p in weight.pieces]


def count_runs(num_elements: int, runs: list[Run]) -> tuple[int, int]:
    """Return (unused, repeated) element by element."""
    uses = numpy.zeros(num_elements, dtype=int)
    for offset, atoms in runs:
        for index in numpy.ndindex(*(size for size, _ in atoms)):
            uses[offset + sum(i * stride for i, (_, stride) in zip(index, atoms, strict=True))] += 1
    return int((uses == 0).sum()), int((uses > 1).sum())


@st.composite
def tensors_and_runs(draw: st.DrawFn) -> tuple[int, list[Run]]:
    """Runs as rules make them: slices with steps, permuted and reshaped, of one tensor."""
    shape = draw(st.lists(st.sampled_from([2, 3, 4, 5, 6, 1]), min_size=1, max_size=3))
    runs: list[Run] = []
    for _ in range(draw(st.integers(1, 4))):
        weight = Weight.stored("x", tuple(shape), "float32")
        for _ in range(draw(st.integers(0, 4))):
            kind = draw(st.sampled_from(["slice", "permute", "slice", "halve"]))
            dim = draw(st.integers(0, weight.ndim - 1))
            size = weight.shape[dim]
            if kind == "slice":
                start = draw(st.integers(0, size - 1))
                index = slice(start, draw(st.integers(start + 1, size)), draw(st.integers(1, 3)))
                weight = weight[(slice(None),) * dim + (index,)]
            elif kind == "permute":
                weight = weight.permute(draw(st.permutations(range(weight.ndim))))
            elif size % 2 == 0:
                weight = weight.unflatten(dim, (2, -1))
        runs += runs_of(weight)
    return prod(shape), runs


@settings(max_examples=700, deadline=None, derandomize=True)
@given(tensors_and_runs())
def test_random_runs_against_counting_each_element(drawn: tuple[int, list[Run]]) -> None:
    num_elements, runs = drawn
    assert Usage().count(num_elements, runs) == count_runs(num_elements, runs)


@pytest.mark.parametrize(
    ("num_elements", "runs", "expected"),
    [
        (12, [], (12, 0)),
        (3, [(0, ((2, 2),))], (1, 0)),
        (12, [(0, ((4, 2), (2, 1)))], (4, 0)),
        (0, [], (0, 0)),
        (12, [(0, ((12, 1),))], (0, 0)),
        (12, [(0, ((12, 1),))] * 300, (0, 12)),  # more often than a byte counts to
        (1, [(0, ())], (0, 0)),
        (6, [(2, ())], (5, 0)),
        (0, [(0, ((4, 1), (0, 4)))], (0, 0)),
        (4, [(0, ((4, 1),)), (0, ((0, 1),))], (0, 0)),
    ],
)
def test_runs_at_the_edges(num_elements: int, runs: list[Run], expected: tuple[int, int]) -> None:
    assert Usage().count(num_elements, runs) == expected


def test_equal_layers_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    count = coverage._count

    def counting(num_elements: int, runs: tuple[Run, ...]) -> tuple[int, int]:
        nonlocal calls
        calls += 1
        return count(num_elements, runs)

    monkeypatch.setattr(coverage, "_count", counting)
    usage = Usage()
    halves: list[Run] = [(0, ((6, 1),)), (6, ((6, 1),))]
    for runs in (halves, halves[::-1]) * 50:
        assert usage.count(12, runs) == (0, 0)
    assert calls == 1


def largest_array(monkeypatch: pytest.MonkeyPatch, num_elements: int, runs: list[Run]) -> int:
    """Return how many counters were needed at most."""
    sizes = [0]
    zeros = numpy.zeros

    def counting(size: int, dtype: type) -> numpy.ndarray:
        sizes.append(size)
        return zeros(size, dtype=dtype)

    monkeypatch.setattr(numpy, "zeros", counting)
    assert Usage().count(num_elements, runs) == (0, 0)
    return max(sizes)


def test_rows_that_stay_together_are_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Weight.stored("qkv", (4096 * 3, 4096), "float32")
    runs = [run for part in weight.split(4096) for run in runs_of(part)]
    assert largest_array(monkeypatch, weight.numel(), runs) <= 3


def test_interleaved_experts_are_counted_without_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss: gate and up alternate in the columns of 128 stacked experts, two thousand million elements in all."""
    weight = Weight.stored("gate_up", (128, 2880, 5760), "bfloat16")
    runs = [run for expert in range(128) for at in (0, 1) for run in runs_of(weight[expert, :, at::2].t())]
    assert largest_array(monkeypatch, weight.numel(), runs) <= 128 * 2
