"""The weight algebra against torch: forward, any slice of the result as ranks ask for it, and the inverse."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infinilm.loading.values import evaluate, restore
from infinilm_hookspecs import Weight, WeightError
from infinilm_hookspecs.strided import join

Tensors = dict[str, Tensor]


class CountingReader:
    """Reads regions of tensors in memory and counts the elements it was asked for."""

    def __init__(self, stored: Tensors) -> None:
        self.stored = stored
        self.num_elements = 0

    def __call__(self, name: str, region: tuple[slice, ...]) -> Tensor:
        found = self.stored[name][region]
        self.num_elements += found.numel()
        return found.contiguous()


def weights_of(stored: Tensors) -> dict[str, Weight]:
    return {n: Weight.stored(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in stored.items()}


def check(
    stored: Tensors,
    rule: Callable[[dict[str, Weight]], dict[str, Weight]],
    expected: Tensors,
    *,
    shard_dims: dict[str, int] | None = None,
    ranks: tuple[int, ...] = (1, 2, 4, 8),
    amplification: float = 1.0,
    invertible: bool = True,
) -> None:
    """Hold `rule` run on headers against `expected`: whole, cut for every rank, and written back."""
    mapped = rule(weights_of(stored))
    assert mapped.keys() == expected.keys()
    for num_ranks in ranks:
        reader, wanted = CountingReader(stored), 0
        for name, whole in expected.items():
            dim = (shard_dims or {}).get(name)
            for rank in range(num_ranks):
                mine, part = whole, mapped[name]
                if dim is not None:
                    rows = whole.shape[dim] // num_ranks
                    mine, part = whole.narrow(dim, rank * rows, rows), part.narrow(dim, rank * rows, rows)
                assert part.shape == tuple(mine.shape)
                assert torch.equal(evaluate(part, reader), mine), f"{name}, rank {rank} of {num_ranks}"
                wanted += mine.numel()
        assert reader.num_elements <= amplification * wanted
    if invertible:
        back = {name: torch.full_like(tensor, float("nan")) for name, tensor in stored.items()}
        for name, weight in mapped.items():
            restore(weight, expected[name], lambda source: back[source.name])
        for name, tensor in stored.items():
            assert torch.equal(back[name], tensor), f"{name} written back"


HEADS, KV_HEADS, HEAD_DIM, HIDDEN, EXPERTS, INTERMEDIATE = 16, 8, 8, 48, 4, 32
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM


def test_grouped_query_qkv_of_unequal_sizes() -> None:
    q, k, v = torch.randn(Q, HIDDEN), torch.randn(KV, HIDDEN), torch.randn(KV, HIDDEN)
    check(
        {"qkv": torch.cat([q, k, v])},
        lambda w: dict(zip("qkv", w["qkv"].split([Q, KV, KV]), strict=True)),
        {"q": q, "k": k, "v": v},
        shard_dims={"q": 0, "k": 0, "v": 0},
    )


@pytest.mark.parametrize("tail", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_per_head_interleaved_qkv(tail: tuple[int, ...]) -> None:
    fused = torch.randn(HEADS * 3 * HEAD_DIM, *tail)
    by_head = fused.view(HEADS, 3, HEAD_DIM, *tail)

    def rule(w: dict[str, Weight]) -> dict[str, Weight]:
        grouped = w["qkv"].view(HEADS, 3, HEAD_DIM, *tail)
        return {name: grouped[:, i].reshape(Q, *tail) for i, name in enumerate("qkv")}

    expected = {name: by_head[:, i].reshape(Q, *tail) for i, name in enumerate("qkv")}
    # q, k and v of a head lie between each other, and one region is read for each of them.
    check({"qkv": fused}, rule, expected, shard_dims={"q": 0, "k": 0, "v": 0}, amplification=3.0)


def mistral_to_halves(w: Weight) -> Weight:
    return w.view(HEADS, HEAD_DIM // 2, 2, HIDDEN).transpose(1, 2).reshape(Q, HIDDEN)


def halves_to_mistral(w: Weight) -> Weight:
    return w.view(HEADS, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(Q, HIDDEN)


@pytest.mark.parametrize("ranks", [(1, 2, 4, 8), (32,)], ids=["whole heads", "cut inside a head"])
def test_rotary_row_order_of_mistral_and_back(ranks: tuple[int, ...]) -> None:
    interleaved = torch.randn(Q, HIDDEN)
    halves = interleaved.view(HEADS, HEAD_DIM // 2, 2, HIDDEN).transpose(1, 2).reshape(Q, HIDDEN)
    # A rank that holds half a head needs every second row of it, and reads the rows between them too.
    factor = 2.0 if ranks == (32,) else 1.0
    check(
        {"wq": interleaved},
        lambda w: {"q": mistral_to_halves(w["wq"])},
        {"q": halves},
        shard_dims={"q": 0},
        ranks=ranks,
        amplification=factor,
    )
    check(
        {"q": halves},
        lambda w: {"wq": halves_to_mistral(w["q"])},
        {"wq": interleaved},
        shard_dims={"wq": 0},
        ranks=ranks,
        amplification=4.0 if ranks == (32,) else 1.0,
    )


def test_conv1d_transpose_and_split_of_gpt2() -> None:
    fused = torch.randn(HIDDEN, 3 * Q)

    def rule(w: dict[str, Weight]) -> dict[str, Weight]:
        return {name: part.t() for name, part in zip("qkv", w["c_attn"].split(Q, dim=1), strict=True)}

    expected = {name: part.t().contiguous() for name, part in zip("qkv", fused.split(Q, dim=1), strict=True)}
    check({"c_attn": fused}, rule, expected, shard_dims={"q": 0, "k": 0, "v": 0})


def test_experts_stacked_and_fused_by_part() -> None:
    stored = {f"{e}.{n}": torch.randn(INTERMEDIATE, HIDDEN) for e in range(EXPERTS) for n in ("gate", "up")}
    stacked = torch.stack([torch.cat([stored[f"{e}.gate"], stored[f"{e}.up"]]) for e in range(EXPERTS)])

    def rule(w: dict[str, Weight]) -> dict[str, Weight]:
        parts = [
            w[f"{e}.{n}"].unsqueeze(0).part(0, e, EXPERTS).part(1, at, 2 * INTERMEDIATE).rename("gate_up")
            for e in range(EXPERTS)
            for n, at in (("gate", 0), ("up", INTERMEDIATE))
        ]
        return {"gate_up": join(parts)}

    check(stored, rule, {"gate_up": stacked}, shard_dims={"gate_up": 0}, ranks=(1, 2, 4))


def test_interleaved_gate_and_up_of_stacked_experts() -> None:
    fused = torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE)

    def take(tensor: Weight | Tensor, expert: int, at: int) -> Weight | Tensor:
        return tensor[expert, :, at::2].t()

    names = {f"{e}.{n}": (e, at) for e in range(EXPERTS) for n, at in (("gate", 0), ("up", 1))}
    check(
        {"gate_up": fused},
        lambda w: {name: take(w["gate_up"], *at) for name, at in names.items()},  # type: ignore[misc]
        {name: take(fused, *at).contiguous() for name, at in names.items()},  # type: ignore[union-attr]
        shard_dims=dict.fromkeys(names, 0),
        amplification=2.0,  # gate and up lie between each other
    )


def test_tied_embedding_is_one_tensor_under_two_names() -> None:
    table = torch.randn(64, HIDDEN)
    check(
        {"wte": table},
        lambda w: {"embed": w["wte"].rename("embed"), "head": w["wte"].rename("head")},
        {"embed": table, "head": table},
        shard_dims={"embed": 0, "head": 0},
    )


def test_columns_of_merged_rows_are_read_alone() -> None:
    stacked = torch.randn(EXPERTS, INTERMEDIATE, HIDDEN)
    flat = stacked.reshape(EXPERTS * INTERMEDIATE, HIDDEN)
    check({"x": stacked}, lambda w: {"y": w["x"].flatten(0, 1)}, {"y": flat}, shard_dims={"y": 1}, ranks=(8,))


def test_reshape_across_joined_pieces() -> None:
    """The next stage sees one weight: a reshape that cuts every piece differently still finds each element."""
    stored = {"a": torch.randn(3, 4), "b": torch.randn(5, 4)}
    both = torch.cat([stored["a"], stored["b"]])

    def rule(w: dict[str, Weight]) -> dict[str, Weight]:
        whole = join([w["a"].part(0, 0, 8).rename("ab"), w["b"].part(0, 3, 8).rename("ab")])
        return {"ab": whole.reshape(2, 16).t().reshape(4, 4, 2)[1:, ::2]}

    expected = both.reshape(2, 16).t().reshape(4, 4, 2)[1:, ::2].contiguous()
    check(stored, rule, {"ab": expected}, ranks=(1,), amplification=4.0, invertible=False)


def test_what_no_layout_expresses_is_deferred_and_still_inverts() -> None:
    stored = {"a": torch.randn(4, 6)}
    weight = weights_of(stored)["a"].t().reshape(4, 6)
    assert weight.pieces[0].source.deferred is not None
    assert weight.losses() == ()
    check(stored, lambda w: {"a": weight}, {"a": stored["a"].t().reshape(4, 6)}, ranks=(1,))


def test_apply_is_read_whole_and_then_cut() -> None:
    stored = {"a": torch.randn(8, 6)}

    def flip(t: Tensor) -> Tensor:
        return t.flip(0)

    check(
        stored,
        lambda w: {"b": w["a"].apply(flip, inverse=flip)},
        {"b": stored["a"].flip(0)},
        shard_dims={"b": 0},
        amplification=8.0,
    )


def test_apply_is_held_to_what_it_declared() -> None:
    stored = {"a": torch.randn(8, 6)}
    weight = weights_of(stored)["a"].apply(lambda t: t[:4])
    with pytest.raises(WeightError, match=r"returned \[4, 6\] float32, and its rule declared \[8, 6\] float32"):
        evaluate(weight, CountingReader(stored))


def test_pointwise_operations_round_where_torch_rounds() -> None:
    stored = {"n": (torch.randn(256) * 0.1).to(torch.bfloat16)}
    weight = ((weights_of(stored)["n"] + 1.0) * 3).to("float32") - 0.5
    assert torch.equal(evaluate(weight, CountingReader(stored)), ((stored["n"] + 1.0) * 3).float() - 0.5)
    assert weight.losses() == ("add 1.0", "mul 3", "add -0.5")
    assert weights_of(stored)["n"].to(torch.float16).losses() == ("bfloat16 to float16",)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda w: w.split([3, 4]), r"split into \[3, 4\] along dimension 0 of 8"),
        (lambda w: w.reshape(7, -1), r"cannot reshape to \[7, -1\]"),
        (lambda w: w.permute(0, 0), r"does not name every dimension once"),
        (lambda w: w.part(0, 4, 10), r"part 4 to 12 of dimension 0 of 10"),
        (lambda w: w.narrow(1, 5, 4), r"rows 5 to 9 of dimension 1"),
        (lambda w: w[9], r"row 9 of dimension 0, which has 8"),
        (lambda w: w[::-1], r"steps are positive"),
        (lambda w: w.transpose(0, 2), r"dimension 2 of 2"),
        (lambda w: w.to("float33"), r"unknown dtype 'float33'"),
        (lambda w: w.item(), r"item of Weight\('a', \[8, 6\], float32\) cannot be planned.*wrap what needs values in"),
        (lambda w: bool(w), r"bool\(\) needs the tensor's values"),
        (lambda w: w.add_(1), r"never changes; use add for add_"),
        (lambda w: w.part(0, 0, 16).apply(torch.neg), r"needs the whole tensor, and 'a' fill only part of it"),
        (lambda w: join([w, w.t()]), r"'a' is \[8, 6\] from a and \[6, 8\] from a"),
    ],
)
def test_mistakes_are_named(mistake: Callable[[Weight], object], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        mistake(Weight.stored("a", (8, 6), "float32"))


@st.composite
def programs(draw: st.DrawFn) -> tuple[Tensors, list[tuple[str, object]]]:
    """A few stored tensors of one shape, and a chain of operations drawn with the shape they meet."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    count = draw(st.integers(1, 3))
    stored = {f"t{i}": torch.arange(i * 1000, i * 1000 + prod(shape)).view(shape).float() for i in range(count)}
    state = torch.cat(list(stored.values()))
    steps: list[tuple[str, object]] = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["slice", "permute", "reshape", "merge", "index"]))
        argument: object
        if kind == "slice":
            dim = draw(st.integers(0, state.ndim - 1))
            start = draw(st.integers(0, state.shape[dim] - 1))
            stop = draw(st.integers(start + 1, state.shape[dim]))
            index = (slice(None),) * dim + (slice(start, stop, draw(st.integers(1, 3))),)
            steps.append(("__getitem__", index))
            state = state[index]
        elif kind == "index" and state.ndim > 1:
            steps.append(("__getitem__", draw(st.integers(0, state.shape[0] - 1))))
            state = state[steps[-1][1]]
        elif kind == "permute":
            argument = draw(st.permutations(range(state.ndim)))
            steps.append(("permute", argument))
            state = state.permute(argument)
        elif kind in ("reshape", "merge"):
            argument = draw(st.sampled_from(shapes_of(state.numel()))) if kind == "reshape" else [-1]
            steps.append(("reshape", argument))
            state = state.reshape(argument)
    return stored, steps


def shapes_of(volume: int) -> list[list[int]]:
    pairs = [[a, volume // a] for a in range(1, volume + 1) if volume % a == 0]
    triples = [[a, b, n // b] for a, n in pairs for b in range(1, n + 1) if n % b == 0]
    return [[volume], *pairs, *triples]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(programs(), st.data())
def test_random_programs_equal_torch(program: tuple[Tensors, list[tuple[str, object]]], data: st.DataObject) -> None:
    stored, steps = program
    expected = torch.cat(list(stored.values()))
    parts = weights_of(stored)
    rows = next(iter(parts.values())).shape[0]
    weight = join([w.part(0, i * rows, len(parts) * rows) for i, w in enumerate(parts.values())])
    for name, argument in steps:
        expected, weight = getattr(expected, name)(argument), getattr(weight, name)(argument)
    reader = CountingReader(stored)
    assert torch.equal(evaluate(weight, reader), expected)
    dim = data.draw(st.integers(0, expected.ndim - 1))
    start = data.draw(st.integers(0, expected.shape[dim]))
    extent = data.draw(st.integers(0, expected.shape[dim] - start))
    assert torch.equal(evaluate(weight.narrow(dim, start, extent), reader), expected.narrow(dim, start, extent))
    back = {name: torch.full_like(tensor, -1.0) for name, tensor in stored.items()}
    if all(piece.source.deferred is None for piece in weight.pieces):
        restore(weight, expected, lambda source: back[source.name])
        kept = set(expected.flatten().tolist())
        for name, tensor in stored.items():
            wanted = torch.tensor([x if x in kept else -1.0 for x in tensor.flatten().tolist()]).view_as(tensor)
            assert torch.equal(back[name], wanted)
