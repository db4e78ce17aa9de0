"""Random rules of several stages, planned and filled for every rank, against torch run on whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from infinilm.loading.plan import LoadPlan, plan_load
from infinilm.loading.ranks import find_indivisible
from infinilm.loading.stages import Stage
from infinilm.loading.values import fill, restore
from infinilm_hookspecs import Mapped, ParameterSpec, Shard, StoredTensor, Weight

Tensors = Mapping[str, Tensor]
RANKS = (1, 2, 8)


@dataclass(frozen=True)
class Step:
    """What a stage does to some of the names: `rule` to weights one by one, `torch_of` to the tensors themselves."""

    names: tuple[str, ...]
    rule: Callable[[Weight], Mapped]
    torch_of: Callable[[Tensors], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """Stored tensors, stages of steps, what torch makes of it all, and the dimension each result is cut along."""

    stored: Tensors
    stages: tuple[tuple[Step, ...], ...]
    expected: Tensors
    shards: Mapping[str, Shard | None]

    def plan(self) -> LoadPlan:
        tensors = {name: StoredTensor(tuple(t.shape), "float32", None) for name, t in self.stored.items()}
        specs = {n: ParameterSpec(tuple(t.shape), "float32", self.shards[n]) for n, t in self.expected.items()}
        stages = [Stage(table_of(steps), f"stage_{i}") for i, steps in enumerate(self.stages)]
        return plan_load(tensors, stages, specs)


def table_of(steps: tuple[Step, ...]) -> dict[str, Callable[[Weight], Mapped]]:
    return {name: step.rule for step in steps for name in step.names}


def changed(name: str, new: str, change: Callable[[Any], Any]) -> Step:
    """Return the step that renames one tensor and applies `change`, which is torch for tensors and weights alike."""
    return Step((name,), lambda w: change(w).rename(new), lambda t: {new: change(t[name])})


def split(name: str, new: str, sizes: list[int], dim: int) -> Step:
    news = [f"{new}_{i}" for i in range(len(sizes))]
    return Step(
        (name,),
        lambda w: [part.rename(to) for to, part in zip(news, w.split(sizes, dim), strict=True)],
        lambda t: dict(zip(news, t[name].split(sizes, dim), strict=True)),
    )


def joined(names: tuple[str, ...], new: str, starts: Mapping[str, int], total: int, dim: int) -> Step:
    """Return the step that makes one of several tensors by `part`: torch's `cat`."""
    return Step(
        names,
        lambda w: w.part(dim, starts[w.name], total).rename(new),
        lambda t: {new: torch.cat([t[name] for name in sorted(names, key=starts.__getitem__)], dim)},
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(2, 4))
    stored: dict[str, Tensor] = {}
    for i in range(count):
        shape = draw(st.sampled_from([(8,), (24,), (8, 4), (16, 4), (24, 4), (4, 8, 2), (2, 8, 2)]))
        stored[f"t.{i}"] = torch.arange(prod(shape)).view(shape) + 1000.0 * i
    state: dict[str, Tensor] = dict(stored)
    stages = []
    for number in range(draw(st.integers(1, 4))):
        steps = draw(steps_of(state, number))
        taken = {name for step in steps for name in step.names}
        made = {name: tensor for name, tensor in state.items() if name not in taken}
        for step in steps:
            made |= step.torch_of(state)
        state = made
        stages.append(steps)
    return Case(stored, tuple(stages), state, {name: draw(shards_of(tensor)) for name, tensor in state.items()})


@st.composite
def steps_of(draw: st.DrawFn, state: Tensors, number: int) -> tuple[Step, ...]:
    """Draw what one stage does: one step for some of the tensors, two at a time where they can be joined."""
    left = draw(st.permutations(list(state)))
    steps = []
    while left:
        name, new = left.pop(), f"s{number}.{len(left)}"
        kind = draw(st.sampled_from(["keep", "rename", "split", "join", "join", "permute", "reshape", "transpose"]))
        shape, dim = state[name].shape, draw(st.integers(0, state[name].ndim - 1))
        if kind == "rename":
            steps.append(changed(name, new, lambda x: x))
        elif kind == "split" and shape[dim] > 1:
            at = draw(st.integers(1, shape[dim] - 1))
            steps.append(split(name, new, [at, shape[dim] - at], dim))
        elif kind == "join":
            others = [n for n in left if fits(state[n], state[name], dim)]
            names = (name, *others[:2])
            left = [n for n in left if n not in names]
            steps.append(join_of(state, draw(st.permutations(names)), new, dim))
        elif kind == "permute":
            order = draw(st.permutations(range(len(shape))))
            steps.append(changed(name, new, lambda x, order=order: x.permute(order)))
        elif kind == "reshape":
            sizes = draw(st.sampled_from(shapes_of(prod(shape))))
            steps.append(changed(name, new, lambda x, sizes=sizes: x.reshape(sizes)))
        elif kind == "transpose":
            other = draw(st.integers(0, len(shape) - 1))
            steps.append(changed(name, new, lambda x, dims=(dim, other): x.transpose(*dims)))
    return tuple(steps)


def fits(one: Tensor, other: Tensor, dim: int) -> bool:
    """Return whether two tensors differ in nothing but `dim`."""
    return one.ndim == other.ndim and all(
        a == b for at, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if at != dim
    )


def join_of(state: Tensors, names: list[str], new: str, dim: int) -> Step:
    starts, total = {}, 0
    for name in names:
        starts[name] = total
        total += state[name].shape[dim]
    return joined(tuple(names), new, starts, total, dim)


def shapes_of(volume: int) -> list[tuple[int, ...]]:
    pairs = [(a, volume // a) for a in range(1, volume + 1) if volume % a == 0]
    return [(volume,), *pairs, *((2, a // 2, b) for a, b in pairs if a % 2 == 0)]


@st.composite
def shards_of(draw: st.DrawFn, tensor: Tensor) -> Shard | None:
    """Draw a dimension that divides for every number of ranks, with a unit; `None` where there is none."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size % RANKS[-1] == 0]
    if not dims:
        return None
    dim = draw(st.sampled_from(dims))
    rows = tensor.shape[dim] // RANKS[-1]
    return Shard(dim, multiple=draw(st.sampled_from([unit for unit in (1, 2, 3) if rows % unit == 0])))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases())
def test_every_rank_gets_what_torch_makes_of_the_whole(case: Case) -> None:
    plan = case.plan()
    plan.check()
    for num_ranks in RANKS:
        assert find_indivisible(plan, num_ranks) == []
        for parameter in plan.parameters:
            whole, shard = case.expected[parameter.name], parameter.spec.shard
            for rank in range(num_ranks if shard else 1):
                weight, mine = parameter.weight, whole
                if shard is not None:
                    rows = whole.shape[shard.dim] // num_ranks
                    weight = weight.narrow(shard.dim, rank * rows, rows)
                    mine = whole.narrow(shard.dim, rank * rows, rows)
                found = torch.full(weight.shape, -1.0)
                fill(weight, found, lambda name, region: case.stored[name][region].contiguous())
                assert torch.equal(found, mine), f"{parameter.name}, rank {rank} of {num_ranks}"


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases())
def test_what_was_stored_is_restored_bit_for_bit(case: Case) -> None:
    plan = case.plan()
    plan.check()
    back = {name: torch.full_like(tensor, -1.0) for name, tensor in case.stored.items()}
    for parameter in plan.parameters:
        restore(parameter.weight, case.expected[parameter.name], lambda source: back[source.name])
    assert all(torch.equal(back[name], case.stored[name]) for name in case.stored)
