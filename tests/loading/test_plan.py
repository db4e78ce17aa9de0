"""The load plan: what is read into which parameter, and everything that can be wrong with it, told at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import pytest
from torch import Tensor

from infinilm.loading.plan import LoadPlan, plan_load
from infinilm.loading.stages import RuleNote, Stage
from infinilm_hookspecs import DROP, Mapped, ParameterSpec, PlanError, StoredTensor, Weight, WeightError, WeightRule

Shapes = Mapping[str, tuple[int, ...]]


def plan_of(stored: Shapes, wanted: Shapes, *rules: WeightRule, ties: Mapping[str, str] | None = None) -> LoadPlan:
    """Plan float32 tensors through rules of plugins named "first", "second", ..."""
    tensors = {name: StoredTensor(shape, "float32", None) for name, shape in stored.items()}
    ties = ties or {}
    specs = {name: ParameterSpec(shape, "float32", tied_to=ties.get(name)) for name, shape in wanted.items()}
    stages = [Stage(rule, name) for rule, name in zip(rules, ("first", "second", "third"), strict=False)]
    return plan_load(tensors, stages, specs)


def sources(plan: LoadPlan) -> dict[str, tuple[str, ...]]:
    return {parameter.name: parameter.weight.stored_names() for parameter in plan.parameters}


def split_qkv(weight: Weight) -> Mapped:
    if weight.name != "qkv":
        return None
    return [part.rename(name) for name, part in zip("qkv", weight.split([8, 4, 4]), strict=True)]


QKV: Shapes = {"q": (8, 6), "k": (4, 6), "v": (4, 6)}

# ---------------------------------------------------------------- plans that fit


def test_names_that_are_already_right_need_no_stage() -> None:
    plan = plan_of(QKV, QKV)
    assert plan.errors == ()
    plan.check()
    assert sources(plan) == {"q": ("q",), "k": ("k",), "v": ("v",)}
    assert plan.num_bytes == 16 * 6 * 4


def test_fused_tensor_is_split_and_every_part_knows_where_it_comes_from() -> None:
    plan = plan_of({"qkv": (16, 6)}, QKV, split_qkv)
    assert plan.errors == ()
    assert [(p.name, p.weight.shape, p.weight.trail) for p in plan.parameters] == [
        ("q", (8, 6), ("first",)),
        ("k", (4, 6), ("first",)),
        ("v", (4, 6), ("first",)),
    ]
    assert set(sources(plan).values()) == {("qkv",)}


def test_parts_of_one_name_are_joined_and_split_again_by_the_next_stage() -> None:
    """The next stage cuts one weight of the full shape, across the seam between the stored tensors."""
    join_rule: WeightRule = {
        "a": lambda w: w.part(0, 0, 16).rename("qkv"),
        "b": lambda w: w.part(0, 6, 16).rename("qkv"),
    }
    plan = plan_of({"a": (6, 6), "b": (10, 6)}, QKV, join_rule, split_qkv)
    assert plan.errors == ()
    assert sources(plan) == {"q": ("a", "b"), "k": ("b",), "v": ("b",)}
    assert plan.parameters[0].weight.trail == ("first", "second")


def test_swap_within_a_stage() -> None:
    plan = plan_of({"a": (2,), "b": (2,)}, {"a": (2,), "b": (2,)}, {"a": "b", "b": "a"})
    assert plan.errors == ()
    assert sources(plan) == {"a": ("b",), "b": ("a",)}


def test_swap_across_two_stages_is_undone() -> None:
    swap: WeightRule = {"a": "b", "b": "a"}
    plan = plan_of({"a": (2,), "b": (2,)}, {"a": (2,), "b": (2,)}, swap, swap)
    assert plan.errors == ()
    assert sources(plan) == {"a": ("a",), "b": ("b",)}


def test_stages_of_a_swap_see_only_the_names_the_stage_before_made() -> None:
    plan = plan_of({"a": (2,), "b": (2,)}, {"c": (2,), "a": (2,)}, {"a": "b", "b": "a"}, {"b": "c"})
    assert plan.errors == ()
    assert sources(plan) == {"c": ("a",), "a": ("b",)}


def test_layers_keep_their_numbers_past_nine() -> None:
    stored = {f"h.{i}.w": (2,) for i in (1, 10, 2, 0)}
    plan = plan_of(stored, {f"layers.{i}.w": (2,) for i in (0, 1, 2, 10)}, {"h.{i}.w": "layers.{i}.w"})
    assert plan.errors == ()
    assert sources(plan) == {f"layers.{i}.w": (f"h.{i}.w",) for i in (0, 1, 2, 10)}


# ---------------------------------------------------------------- errors, all of them at once


def test_every_kind_of_misfit_is_told_at_once() -> None:
    def rule(weight: Weight) -> Mapped:
        if weight.name == "fused":
            return [weight[:4].rename("cut")]
        if weight.name == "broken":
            return weight.reshape(7)
        return None

    plan = plan_of(
        {"misshapen": (4, 2), "unexpected": (3,), "one": (5,), "two": (5,), "fused": (6, 2), "broken": (8,)},
        {"misshapen": (2, 4), "missing": (3,), "both": (5,), "cut": (4, 2), "elsewhere": (8,)},
        {"one": "both", "two": "both"},
        rule,
    )
    assert plan.errors == (
        "both is written twice at [0:5], from one, two [plugin first]",
        "broken [plugin second]: Weight('broken', [8], float32): cannot reshape to [7]",
        "misshapen is [4, 2] from misshapen, and the model needs [2, 4]",
        "missing is missing",
        "elsewhere is missing",
        "unexpected [3] is no parameter of this model; rename it in a weight rule, or return DROP for it",
        "4 of 12 elements of fused go nowhere (used: cut); return DROP beside the weights if that is meant",
    )
    with pytest.raises(PlanError) as caught:
        plan.check()
    assert str(caught.value) == "the checkpoint does not fit the model, 7 problems:\n  " + "\n  ".join(plan.errors)


def test_one_problem_is_a_problem() -> None:
    with pytest.raises(PlanError, match=r"^the checkpoint does not fit the model, 1 problem:\n  a is missing$"):
        plan_of({}, {"a": (1,)}).check()


def test_layers_with_the_same_problem_are_one_line() -> None:
    stored = {f"h.{i}.w": (4, 2) for i in range(32)}
    plan = plan_of(stored, {f"layers.{i}.w": (2, 4) for i in range(40)}, {"h.{i}.w": "layers.{i}.w"})
    assert len(plan.errors) == 40
    with pytest.raises(PlanError) as caught:
        plan.check()
    assert str(caught.value).splitlines()[1:] == [
        "  layers.{0-31}.w is [4, 2] from h.{0-31}.w [plugin first], and the model needs [2, 4]",
        "  layers.{32-39}.w is missing",
    ]


def test_missing_name_is_held_against_what_a_rule_made_layer_by_layer() -> None:
    stored = {f"h.{i}.{n}": (2,) for i in range(12) for n in "qk"}
    wanted = {f"model.layers.{i}.self_attn.{n}_proj.weight": (2,) for i in range(12) for n in "qk"}
    rule = {f"h.{{i}}.{n}": f"model.layer.{{i}}.self_attn.{n}_proj.weight" for n in "qk"}
    with pytest.raises(PlanError) as caught:
        plan_of(stored, wanted, rule).check()
    assert str(caught.value).splitlines()[1:] == [
        f"  model.layers.{{0-11}}.self_attn.{n}_proj.weight is missing; did a rule mean it by "
        f"model.layer.{{0-11}}.self_attn.{n}_proj.weight?"
        for n in "qk"
    ] + [
        f"  model.layer.{{0-11}}.self_attn.{n}_proj.weight [2] from h.{{0-11}}.{n} [plugin first] is no parameter of "
        "this model; rename it in a weight rule, or return DROP for it"
        for n in "qk"
    ]


def test_hints_compare_each_kind_of_name_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    close_matches = difflib.get_close_matches

    def counting(*arguments: Any, **options: Any) -> list[str]:
        nonlocal calls
        calls += 1
        return close_matches(*arguments, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counting)
    stored = {f"h.{i}.{n}.x": (1,) for i in range(200) for n in ("gate", "up")}
    plan = plan_of(stored, {f"h.{i}.{n}.y": (1,) for i in range(200) for n in ("gate", "up")})
    assert len(plan.errors) == 800
    assert calls == 2


# ---------------------------------------------------------------- elements: holes, doubles, leftovers


def test_q_q_v_instead_of_q_k_v() -> None:
    def rule(weight: Weight) -> Mapped:
        q = weight[:4]
        return [q.rename("q"), q.rename("k"), weight[4:8].rename("v")]

    plan = plan_of({"qkv": (12, 6)}, {"q": (4, 6), "k": (4, 6), "v": (4, 6)}, rule)
    assert plan.errors == (
        "24 of 72 elements of qkv go nowhere (used: q, k, v); return DROP beside the weights if that is meant",
        "24 elements of qkv are used more than once, in q, k, v",
    )


def flip(tensor: Tensor) -> Tensor:
    return tensor.flip(0)


@pytest.mark.parametrize("inverse", [flip, None], ids=["with an inverse", "without"])
def test_q_q_v_of_a_computed_tensor(inverse: Callable[[Tensor], Tensor] | None) -> None:
    """What an inverse leads back to a stored element must be used; what else is computed may be left."""

    def rule(weight: Weight) -> Mapped:
        whole = weight.apply(flip, inverse=inverse)
        return [whole[:4].rename("q"), whole[:4].rename("k"), whole[4:8].rename("v")]

    plan = plan_of({"qkv": (12, 6)}, {"q": (4, 6), "k": (4, 6), "v": (4, 6)}, rule)
    unused = (
        "24 of 72 elements of what flip makes of qkv go nowhere (used: q, k, v); "
        "return DROP beside the weights if that is meant"
    )
    doubled = "24 elements of what flip makes of qkv are used more than once, in q, k, v"
    assert plan.errors == ((unused, doubled) if inverse else (doubled,))


def test_computing_with_a_tensor_twice_is_no_double_use() -> None:
    def rule(weight: Weight) -> Mapped:
        return weight.apply(lambda t: t.exp()) * 2.0 if weight.name == "v" else None

    def halves(weight: Weight) -> Mapped:
        return [weight.apply(itemgetter(slice(i, None, 2)), shape=(2, 3)).rename(f"{i}") for i in range(2)]

    assert plan_of({"v": (4,)}, {"v": (4,)}, rule).errors == ()
    assert plan_of({"x": (4, 3)}, {"0": (2, 3), "1": (2, 3)}, halves).errors == ()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(0, 4)], "x is filled only in part: 8 of 20 elements, from a [plugin first]"),
        ([(0, 4), (5, 9)], "x is filled only in part: 16 of 20 elements, from a, b [plugin first]"),
        ([(0, 4), (3, 7)], "x is written twice at [3:7, 0:2], from a, b [plugin first]"),
        ([(0, 4), (0, 4)], "x is written twice at [0:4, 0:2], from a, b [plugin first]"),
    ],
)
def test_holes_and_overlaps_of_parts(parts: Sequence[tuple[int, int]], message: str) -> None:
    stored = {name: (stop - start, 2) for name, (start, stop) in zip("ab", parts, strict=False)}
    rule = {
        name: lambda w, start=start: w.part(0, start, 10).rename("x")
        for name, (start, _) in zip("ab", parts, strict=False)
    }
    assert plan_of(stored, {"x": (10, 2)}, rule).errors == (message,)


def test_hole_that_the_next_stage_cuts_out_is_still_told() -> None:
    """Half of a fused matrix is there, and the other half would otherwise be a parameter that nobody writes."""
    plan = plan_of(
        {"gate": (4, 2)},
        {"g": (4, 2), "u": (4, 2)},
        {"gate": lambda w: w.part(0, 0, 8).rename("gate_up")},
        {"gate_up": lambda w: [half.rename(name) for name, half in zip("gu", w.chunk(2), strict=True)]},
    )
    assert plan.errors == (
        "gate_up is filled only in part: 8 of 16 elements, from gate [plugin first]",
        "u is filled only in part: 0 of 8 elements",
    )


def test_hole_of_a_part_that_was_reshaped_is_told() -> None:
    rule: WeightRule = {"a": lambda w: w.part(0, 0, 8).reshape(4, 8).rename("x")}
    assert plan_of({"a": (3, 4)}, {"x": (4, 8)}, rule).errors == (
        "x is filled only in part: 12 of 32 elements, from a [plugin first]",
    )


def test_part_of_no_elements_fills_and_overlaps_nothing() -> None:
    rule: WeightRule = {
        "a": lambda w: w.part(0, 0, 4).rename("x"),
        "empty": lambda w: w.part(0, 2, 4).rename("x"),
    }
    assert plan_of({"a": (4, 2), "empty": (0, 2)}, {"x": (4, 2)}, rule).errors == ()
    assert plan_of({"a": (2, 0)}, {"x": (4, 0)}, {"a": lambda w: w.part(0, 0, 4).rename("x")}).errors == ()


def test_parts_that_disagree_on_the_whole_are_told_once() -> None:
    rule: WeightRule = {
        "a": lambda w: w.part(0, 0, 8).rename("x"),
        "b": lambda w: w.part(0, 4, 9).rename("x"),
    }
    assert plan_of({"a": (4,), "b": (4,)}, {"x": (8,)}, rule).errors == ("'x' is [8] from a and [9] from b",)


def test_tensor_of_which_nothing_is_used_is_told() -> None:
    rule: WeightRule = {"lost": lambda w: w[4:].part(0, 0, 4).rename("x"), "a": lambda w: w.part(0, 0, 4).rename("x")}
    plan = plan_of({"lost": (4,), "a": (4,), "empty": (0,)}, {"x": (4,), "empty": (0,)}, rule)
    assert plan.errors == ("4 of 4 elements of lost go nowhere; return DROP for it if that is meant",)


# ---------------------------------------------------------------- DROP


def test_dropped_tensors_are_listed_with_who_dropped_them() -> None:
    plan = plan_of(
        {"a": (2,), "rotary": (4,), "late": (3,)}, {"a": (2,)}, {"rotary": DROP, "late": "later"}, {"later": DROP}
    )
    assert plan.errors == ()
    assert plan.dropped == {"rotary": "first", "late": "second"}


def test_drop_beside_weights_drops_the_rest() -> None:
    rule: WeightRule = {"a": lambda w: [w[:4].rename("x"), DROP]}
    plan = plan_of({"a": (10,)}, {"x": (4,)}, rule)
    assert plan.errors == ()
    assert plan.dropped == {"a": "first"}


def test_drop_alone_in_a_sequence_drops_all() -> None:
    plan = plan_of({"a": (10,), "x": (4,)}, {"x": (4,)}, {"a": lambda w: [DROP]})
    assert plan.errors == ()
    assert plan.dropped == {"a": "first"}


def test_one_half_dropped_by_the_next_stage() -> None:
    halves: WeightRule = {"a": lambda w: [half.rename(name) for name, half in zip("xy", w.chunk(2), strict=True)]}
    plan = plan_of({"a": (10,)}, {"x": (5,)}, halves, {"y": DROP})
    assert plan.errors == ()
    assert plan.dropped == {"a": "second"}


def test_two_drops_of_one_name_in_two_stages() -> None:
    plan = plan_of({"x": (2,), "a": (3,)}, {}, {"x": DROP, "a": "x"}, {"x": DROP})
    assert plan.errors == ()
    assert plan.dropped == {"x": "first", "a": "second"}


# ---------------------------------------------------------------- rules that go wrong


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("x", "'x'"),
        ([], r"\[\]"),
        (5, "5"),
        (True, "True"),
        ([None], r"\[None\]"),
        ({"x": 1}, r"\{'x': 1\}"),
        (iter(()), "<tuple_iterator"),
    ],
)
def test_rule_that_returns_something_else(answer: Any, shown: str) -> None:
    plan = plan_of({"a": (2,)}, {"a": (2,)}, lambda w: answer)
    message, *others = plan.errors
    assert others == ["a is missing"]
    with pytest.raises(PlanError, match=rf"a \[plugin first\]: the rule returned {shown}.*; return weights, DROP, or"):
        plan.check()
    assert message.endswith("return weights, DROP, or None for unchanged")


def test_rule_that_raises_keeps_its_exception_and_gains_a_note() -> None:
    def rule(weight: Weight) -> Mapped:
        raise KeyError("heads")

    with pytest.raises(KeyError, match="heads") as caught:
        plan_of({"h.0.w": (2,)}, {}, rule)
    (note,) = caught.value.__notes__
    assert isinstance(note, RuleNote)
    assert note == "in the weight rule of plugin 'first', for Weight('h.0.w', [2], float32)"


def test_malformed_table_is_an_error_that_names_its_plugin() -> None:
    with pytest.raises(WeightError, match=r"key 'h\.\{layer' of a weight table") as caught:
        plan_of({"a": (2,)}, {}, {}, {"h.{layer": "x"})
    assert caught.value.__notes__ == ["in the weight rule of plugin 'second'"]


# ---------------------------------------------------------------- dtypes


def test_narrowing_is_listed_and_widening_is_not() -> None:
    tensors = {
        "same": StoredTensor((2,), "bfloat16", None),
        "narrow": StoredTensor((2,), "float32", None),
        "wide": StoredTensor((2,), "float8_e4m3fn", None),
        "scaled": StoredTensor((2,), "bfloat16", None),
    }
    rule: WeightRule = {"scaled": lambda w: w.to("float16") * 2.0}
    plan = plan_load(tensors, [Stage(rule, "p")], {name: ParameterSpec((2,), "bfloat16") for name in tensors})
    assert plan.errors == ()
    assert {p.name: p.losses() for p in plan.parameters} == {
        "same": (),
        "narrow": ("float32 to bfloat16",),
        "wide": (),
        "scaled": ("bfloat16 to float16", "mul 2.0", "float16 to bfloat16"),
    }
    assert plan.num_bytes == 4 * 2 * 2


# ---------------------------------------------------------------- tied parameters

TIED: Shapes = {"embed": (8, 2), "head": (8, 2)}
TIES = {"head": "embed"}


@pytest.mark.parametrize("stored", ["embed", "head"])
def test_tied_parameter_stored_once_under_either_name(stored: str) -> None:
    plan = plan_of({stored: (8, 2)}, TIED, ties=TIES)
    assert plan.errors == ()
    assert sources(plan) == {"embed": (stored,)}
    assert plan.parameters[0].twins == ()
    assert plan.num_bytes == 8 * 2 * 4


def test_tied_parameter_stored_twice_has_a_twin_to_compare() -> None:
    plan = plan_of(TIED, TIED, ties=TIES)
    assert plan.errors == ()
    assert sources(plan) == {"embed": ("embed",)}
    assert [twin.name for twin in plan.parameters[0].twins] == ["head"]


def test_one_tensor_given_to_both_names_is_no_double_use() -> None:
    rule: WeightRule = {"wte": lambda w: [w.rename("embed"), w.rename("head")]}
    assert plan_of({"wte": (8, 2)}, TIED, rule, ties=TIES).errors == ()
    assert plan_of({"wte": (8, 2)}, TIED, rule).errors == (
        "16 elements of wte are used more than once, in embed, head",
    )


def test_twin_of_another_shape_is_told() -> None:
    plan = plan_of({"embed": (8, 2), "head": (2, 8)}, TIED, ties=TIES)
    assert plan.errors == ("head is [2, 8] from head, and the model needs [8, 2]",)


def test_tied_parameter_that_is_nowhere_is_missing_once() -> None:
    assert plan_of({}, TIED, ties=TIES).errors == ("embed is missing",)


# ---------------------------------------------------------------- cost


class CountingSpecs(dict[str, ParameterSpec]):
    """Counts how often all parameters are gone through."""

    num_passes = 0

    def items(self) -> Any:
        self.num_passes += 1
        return super().items()

    def __iter__(self) -> Any:
        self.num_passes += 1
        return super().__iter__()


def test_parameters_are_gone_through_a_fixed_number_of_times() -> None:
    names = [f"h.{i}.w" for i in range(2_000)]
    specs = CountingSpecs({name: ParameterSpec((2,), "float32") for name in names})
    plan = plan_load({name: StoredTensor((2,), "float32", None) for name in names}, [], specs)
    assert plan.errors == ()
    assert len(plan.parameters) == 2_000
    assert specs.num_passes < 10


def test_rule_is_called_once_for_every_weight_and_stage() -> None:
    seen: list[str] = []

    def rule(weight: Weight) -> Mapped:
        seen.append(weight.name)
        return [half.rename(f"{weight.name}{i}") for i, half in enumerate(weight.chunk(2))]

    def made(names: Iterable[str]) -> list[str]:
        return [f"{name}{i}" for name in names for i in range(2)]

    plan_of({"a": (8,), "b": (8,)}, {}, rule, rule)
    assert seen == ["a", "b", *made("ab")]
