"""Checkpoints as they go wrong in the field: the right tensors or a message that says what to do, nothing between."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints_made import CONFIG, llama_tensors, write_folder, write_llama, write_shards
from torch import Tensor

from infinilm import LLM
from infinilm.checkpoints.safetensors import SafetensorsCheckpoint
from infinilm.loading import execute
from infinilm.loading.execute import load
from infinilm.loading.messages import group_messages
from infinilm.loading.plan import LoadPlan, plan_load
from infinilm.loading.ranks import find_indivisible
from infinilm.loading.stages import Stage
from infinilm.loading.values import evaluate, restore
from infinilm.models import llama, mixtral
from infinilm_hookspecs import (
    DROP,
    CheckpointError,
    ParameterSpec,
    PlanError,
    Shard,
    StoredTensor,
    Weight,
    WeightRule,
    hookimpl,
    parameters,
)
from infinilm_hookspecs.dtypes import dtype_name

Tensors = Mapping[str, Tensor]
NO_PARAMETER = "is no parameter of this model; rename it in a weight rule, or return DROP for it"
MIXTRAL: Mapping[str, Any] = {
    "model_type": "mixtral",
    **{k: v for k, v in CONFIG.items() if k != "model_type"},
    "num_local_experts": 4,
}
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Loader:
    """Buffers by name: the part of a backend that is loaded."""

    def __init__(self, specs: Mapping[str, ParameterSpec]) -> None:
        self.specs = specs
        self.buffers = {name: torch.full(s.shape, 77, dtype=getattr(torch, s.dtype)) for name, s in specs.items()}
        self.is_finished = False

    def destination(self, name: str) -> Tensor:
        return self.buffers[name]

    def loaded(self, name: str) -> None:
        pass

    def finish_loading(self) -> None:
        self.is_finished = True


def fill(loader: Loader, plan: LoadPlan, checkpoint: SafetensorsCheckpoint, **options: Any) -> None:
    load(plan, checkpoint, loader, **options)  # type: ignore[arg-type]  # nothing here asks a backend to run


def headers(stored: Tensors) -> dict[str, StoredTensor]:
    return {name: StoredTensor(tuple(t.shape), dtype_name(t.dtype), None) for name, t in stored.items()}


def specs_of(wanted: Tensors, shards: Mapping[str, Shard] | None = None) -> dict[str, ParameterSpec]:
    shards = shards or {}
    return {n: ParameterSpec(tuple(t.shape), dtype_name(t.dtype), shards.get(n)) for n, t in wanted.items()}


def plan_of(stored: Tensors, specs: Mapping[str, ParameterSpec], **rules: WeightRule) -> LoadPlan:
    """Plan through the rules of plugins by name."""
    return plan_load(headers(stored), [Stage(rule, plugin) for plugin, rule in rules.items()], specs)


def specs_of_family(family: ModuleType, config: Mapping[str, Any]) -> Mapping[str, ParameterSpec]:
    return parameters(family.adapt_config(config))


def rule_of(family: ModuleType, config: Mapping[str, Any]) -> WeightRule:
    rule: WeightRule = family.remap_weight(config)
    return rule


def misfits(family: ModuleType, config: Mapping[str, Any], stored: Tensors) -> list[str]:
    """Return what is wrong with a checkpoint of a family, as it is told."""
    plan = plan_of(stored, specs_of_family(family, config), family=rule_of(family, config))
    return group_messages(plan.errors)


def mixtral_tensors(*experts: int) -> dict[str, Tensor]:
    """Return a mixtral under the hub's names, with these experts in every layer."""
    tensors = {name: t for name, t in llama_tensors().items() if ".mlp." not in name}
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = torch.randn(4, 16)
        for expert in experts:
            for part in PARTS:
                shape = (16, 24) if part == "w2" else (24, 16)
                tensors[f"{moe}.experts.{expert}.{part}.weight"] = torch.randn(shape)
    return tensors


def read_from(stored: Tensors) -> Callable[[str, tuple[slice, ...]], Tensor]:
    return lambda name, region: stored[name][region].contiguous()


def check_ranks(plan: LoadPlan, stored: Tensors, wanted: Tensors, *rank_counts: int) -> None:
    """Hold every rank's rows against those of `wanted`, and what was stored against what is written back."""
    plan.check()
    for num_ranks in rank_counts:
        assert find_indivisible(plan, num_ranks) == []
        for parameter in plan.parameters:
            assert parameter.spec.shard is not None
            dim = parameter.spec.shard.dim
            mine = zip(
                parameter.weight.chunk(num_ranks, dim), wanted[parameter.name].chunk(num_ranks, dim), strict=True
            )
            assert all(torch.equal(evaluate(part, read_from(stored)), expected) for part, expected in mine)
    back = {name: torch.full_like(tensor, float("nan")) for name, tensor in stored.items()}
    for parameter in plan.parameters:
        restore(parameter.weight, wanted[parameter.name], lambda source: back[source.name])
    assert all(torch.equal(back[name], stored[name]) for name in stored)


def threads_of_loading() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("infinilm-load")]


def files_open_in(folder: Path) -> list[str]:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [target for link in links if (target := os.readlink(link)).startswith(str(folder))]


# ---------------------------------------------------------------- files


def test_file_replaced_between_plan_and_read_gives_what_was_planned(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"a": torch.ones(4)})
    with closing(SafetensorsCheckpoint(folder)) as checkpoint:
        loader = Loader(specs_of({"a": torch.ones(4)}))
        plan = plan_load(checkpoint.tensors, [], loader.specs)
        other = write_folder(tmp_path / "other", {"b": torch.zeros(9), "a": torch.zeros(4)})
        (other / "model.safetensors").rename(folder / "model.safetensors")
        fill(loader, plan, checkpoint)
        assert torch.equal(loader.buffers["a"], torch.ones(4))


def test_disk_that_fails_in_the_middle_of_a_load_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    preadv = os.preadv
    with closing(SafetensorsCheckpoint(write_folder(tmp_path, tensors))) as checkpoint:
        stored = checkpoint.tensors["b"].extent
        assert stored is not None

        def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if offset >= stored[1]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(descriptor, buffers, offset)

        loader = Loader(specs_of(tensors))
        plan = plan_load(checkpoint.tensors, [], loader.specs)
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(CheckpointError) as caught:
            fill(loader, plan, checkpoint)
    assert str(caught.value) == (
        f"'{tmp_path}/model.safetensors', tensor 'b' at offset {stored[1]}: Input/output error, 0 of 16 bytes read"
    )
    assert threads_of_loading() == []
    assert not loader.is_finished


def test_config_that_disagrees_with_the_shapes_is_told_of_every_layer(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, config={"intermediate_size": 32})
    with pytest.raises(PlanError) as caught:
        LLM(folder)
    name = "model.layers.{0-1}.mlp"
    assert str(caught.value).splitlines()[1:] == [
        f"  {name}.gate_proj.weight is [24, 16] from {name}.gate_proj.weight, and the model needs [32, 16]",
        f"  {name}.up_proj.weight is [24, 16] from {name}.up_proj.weight, and the model needs [32, 16]",
        f"  {name}.down_proj.weight is [16, 24] from {name}.down_proj.weight, and the model needs [16, 32]",
    ]
    assert files_open_in(tmp_path) == []


# ---------------------------------------------------------------- names


def test_two_sources_for_one_target_are_both_named() -> None:
    """One that a rule renamed, and one that has had the name all along."""
    stored = {"old": torch.ones(5, 2), "new": torch.ones(5, 2)}
    plan = plan_of(stored, specs_of({"new": torch.ones(5, 2)}), acme={"old": "new"})
    assert plan.errors == ("new is written twice at [0:5, 0:2], from old, new [plugin acme]",)


def test_two_sources_of_different_shapes_for_one_target() -> None:
    stored = {"old": torch.ones(5, 2), "new": torch.ones(2, 5)}
    plan = plan_of(stored, specs_of({"new": torch.ones(2, 5)}), acme={"old": "new"})
    assert plan.errors[0] == "'new' is [5, 2] from old and [2, 5] from new"


def test_fused_and_unfused_both_present() -> None:
    tensors = mixtral_tensors(0, 1, 2, 3)
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.ones(4, 16, 24)
    assert misfits(mixtral, MIXTRAL, tensors) == [
        "model.layers.1.mlp.experts.{0-3}.down_proj.weight is written twice at [0:16, 0:24], from "
        "model.layers.1.block_sparse_moe.experts.{0-3}.w2.weight, model.layers.1.mlp.experts.down_proj [plugin family]"
    ]


def test_fused_that_no_rule_knows_beside_the_unfused() -> None:
    tensors = {**llama_tensors(), "model.layers.0.self_attn.qkv_proj.weight": torch.ones(32, 16)}
    assert misfits(llama, CONFIG, tensors) == [f"model.layers.0.self_attn.qkv_proj.weight [32, 16] {NO_PARAMETER}"]


def test_gap_in_the_experts() -> None:
    layers, stored = "model.layers.{0-1}.mlp.experts", "model.layers.{0-1}.block_sparse_moe.experts"
    assert misfits(mixtral, MIXTRAL, mixtral_tensors(0, 1, 2, 7)) == [
        *(f"{layers}.3.{part}.weight is missing" for part in ("gate_proj", "up_proj", "down_proj")),
        *(
            f"{layers}.7.{to}.weight {[16, 24] if part == 'w2' else [24, 16]} from {stored}.7.{part}.weight "
            f"[plugin family] {NO_PARAMETER}"
            for part, to in PARTS.items()
        ),
    ]


def test_gap_in_the_experts_of_a_model_of_eight() -> None:
    found = misfits(mixtral, {**MIXTRAL, "num_local_experts": 8}, mixtral_tensors(0, 1, 2, 7))
    assert found == [
        "model.layers.{0-1}.mlp.gate.weight is [4, 16] from model.layers.{0-1}.block_sparse_moe.gate.weight "
        "[plugin family], and the model needs [8, 16]",
        *(f"model.layers.{{0-1}}.mlp.experts.{{3-6}}.{part}_proj.weight is missing" for part in ("gate", "up", "down")),
    ]


def test_gap_in_experts_that_a_rule_stacks() -> None:
    stored = {f"e.{i}": torch.ones(3, 2) for i in (0, 1, 2, 7)}
    rule: WeightRule = {"e.{i}": lambda w, i: w.unsqueeze(0).part(0, i, 8).rename("stacked")}
    plan = plan_of(stored, specs_of({"stacked": torch.ones(8, 3, 2)}), acme=rule)
    assert plan.errors == (
        "stacked is filled only in part: 24 of 48 elements, from e.0, e.1, e.2 and 1 more [plugin acme]",
    )


def test_only_up_proj_is_missing() -> None:
    tensors = {name: t for name, t in llama_tensors().items() if not name.endswith("up_proj.weight")}
    assert misfits(llama, CONFIG, tensors) == ["model.layers.{0-1}.mlp.up_proj.weight is missing"]


def test_rotary_leftovers_are_dropped_and_listed() -> None:
    leftovers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    specs = specs_of_family(llama, CONFIG)
    plan = plan_of({**llama_tensors(), **leftovers}, specs, llama=rule_of(llama, CONFIG))
    plan.check()
    assert plan.dropped == dict.fromkeys(leftovers, "llama")


def test_rotary_leftovers_that_no_rule_drops() -> None:
    leftovers = {"model.rotary_emb.inv_freq": torch.ones(2)}
    assert misfits(llama, CONFIG, {**llama_tensors(), **leftovers}) == [f"model.rotary_emb.inv_freq [2] {NO_PARAMETER}"]


def test_leftovers_of_multi_token_prediction() -> None:
    """A layer more than the model has: told, and dropped by whoever means it."""
    leftovers = {"model.layers.2.eh_proj.weight": torch.ones(16, 32), "model.layers.2.enorm.weight": torch.ones(16)}
    tensors = {**llama_tensors(), **leftovers}
    assert misfits(llama, CONFIG, tensors) == [
        f"model.layers.2.eh_proj.weight [16, 32] {NO_PARAMETER}",
        f"model.layers.2.enorm.weight [16] {NO_PARAMETER}",
    ]
    specs = specs_of_family(llama, CONFIG)
    plan = plan_of(tensors, specs, acme=lambda w: DROP if w.name.startswith("model.layers.2.") else None)
    plan.check()
    assert plan.dropped == dict.fromkeys(leftovers, "acme")


def test_names_swapped_by_one_plugin_and_back_by_another() -> None:
    stored = {"a": torch.randn(3), "b": torch.randn(3)}
    there, back = {"a": "b", "b": "a"}, {"b": "a", "a": "b"}
    for rules, expected in [({"one": there}, "ba"), ({"one": there, "two": back}, "ab")]:
        plan = plan_of(stored, specs_of(stored), **rules)
        plan.check()
        for parameter, source in zip(plan.parameters, expected, strict=True):
            assert torch.equal(evaluate(parameter.weight, read_from(stored)), stored[source])


def test_rename_onto_a_name_that_another_plugin_renames_away() -> None:
    """The stages run one after another: what the first brings under a name, the second takes along."""
    stored = {"a": torch.ones(3), "b": torch.ones(3)}
    plan = plan_of(stored, specs_of({"a": torch.ones(3), "b": torch.ones(3)}), one={"a": "b"}, two={"b": "a"})
    assert plan.errors == (
        "b is written twice at [0:3], from a, b [plugin one]",
        "a is written twice at [0:3], from a, b [plugin one, two]",
        "b is missing",
    )


def test_already_converted_checkpoint_is_left_as_it_is() -> None:
    """Canonical names, where the rule of the family would give them to others."""
    short = re.compile(rf"(?<=\.)({'|'.join(PARTS)})(?=\.)")
    converted = {
        short.sub(lambda found: PARTS[found[0]], name.replace("block_sparse_moe", "mlp")): tensor
        for name, tensor in mixtral_tensors(0, 1, 2, 3).items()
    }
    specs = specs_of_family(mixtral, MIXTRAL)
    plan = plan_of(converted, specs, mixtral=rule_of(mixtral, MIXTRAL))
    plan.check()
    assert {(p.name, *p.weight.stored_names(), *p.weight.trail) for p in plan.parameters} == {(n, n) for n in specs}


def test_layers_that_are_stored_as_1_10_2_keep_their_numbers(tmp_path: Path) -> None:
    numbers = (1, 10, 2, 0, *range(3, 10))
    shards = {f"{i:02}.safetensors": {f"h.{n}.w": torch.full((4,), float(n))} for i, n in enumerate(numbers)}
    with closing(SafetensorsCheckpoint(write_shards(tmp_path, shards))) as checkpoint:
        loader = Loader({f"layers.{n}.w": ParameterSpec((4,), "float32") for n in range(11)})
        plan = plan_load(checkpoint.tensors, [Stage({"h.{i}.w": "layers.{i}.w"}, "acme")], loader.specs)
        fill(loader, plan, checkpoint)
    assert all((loader.buffers[f"layers.{n}.w"] == n).all() for n in range(11))


# ---------------------------------------------------------------- tensors

HEADS, HEAD_DIM, HIDDEN = 8, 6, 10


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("tail", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_rotary_row_order_of_every_rank(tail: tuple[int, ...], num_ranks: int) -> None:
    """Row h * 6 + 2 * i + j of the pairs is row h * 6 + 3 * j + i of the halves."""
    stored = {"wq": torch.randn(HEADS * HEAD_DIM, *tail)}
    order = [h * HEAD_DIM + 2 * i + j for h in range(HEADS) for j in range(2) for i in range(HEAD_DIM // 2)]
    wanted = {"q": stored["wq"][order]}

    def rule(weight: Weight) -> Weight:
        pairs = weight.view(HEADS, HEAD_DIM // 2, 2, *tail)
        return pairs.transpose(1, 2).reshape(HEADS * HEAD_DIM, *tail).rename("q")

    plan = plan_of(stored, specs_of(wanted, {"q": Shard(0, multiple=HEAD_DIM)}), mistral=rule)
    check_ranks(plan, stored, wanted, num_ranks)


@pytest.mark.parametrize("dim", [0, 1])
def test_transpose_on_the_sharded_dimension(dim: int) -> None:
    stored = {"c_fc": torch.randn(8, 16)}
    wanted = {"up": stored["c_fc"].t().contiguous()}
    plan = plan_of(stored, specs_of(wanted, {"up": Shard(dim)}), gpt2={"c_fc": lambda w: w.t().rename("up")})
    check_ranks(plan, stored, wanted, 1, 2, 4, 8)


def test_uneven_tensor_parallelism_is_refused_with_the_unit() -> None:
    stored = {"k": torch.ones(6 * 8, 4), "up": torch.ones(10, 4)}
    plan = plan_of(stored, specs_of(stored, {"k": Shard(0, multiple=8), "up": Shard(0)}))
    assert find_indivisible(plan, 2) == []
    assert find_indivisible(plan, 4) == [
        "k: 48 rows of dimension 0 cannot be cut for 4 ranks at multiples of 8",
        "up: 10 rows of dimension 0 cannot be cut for 4 ranks at equal parts",
    ]


def test_stacked_experts_and_experts_one_by_one_are_the_same_model() -> None:
    apart = mixtral_tensors(0, 1, 2, 3)
    stacked = {name: tensor for name, tensor in apart.items() if ".experts." not in name}
    stacked = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in stacked.items()}
    for layer in range(2):
        w1, w2, w3 = (
            torch.stack([apart[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{p}.weight"] for e in range(4)])
            for p in PARTS
        )
        stacked[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], 1)
        stacked[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    specs = specs_of_family(mixtral, MIXTRAL)
    found = []
    for stored in (apart, stacked):
        plan = plan_of(stored, specs, mixtral=rule_of(mixtral, MIXTRAL))
        plan.check()
        found.append({p.name: evaluate(p.weight, read_from(stored)) for p in plan.parameters})
    assert found[0].keys() == found[1].keys() == specs.keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in specs)


@pytest.mark.parametrize("by_step", [False, True], ids=["as stored", "through a step"])
def test_one_tensor_that_is_larger_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_step: bool
) -> None:
    tensors = {"a": torch.randn(8), "large": torch.randn(300, 7), "z": torch.randn(8)}
    rule: WeightRule = {"large": lambda w: w.t().apply(lambda t: t.neg()) if by_step else w.t() * -1.0}
    wanted = {**tensors, "large": -tensors["large"].t()}
    monkeypatch.setattr(execute, "BYTE_BUDGET", 256)
    with closing(SafetensorsCheckpoint(write_folder(tmp_path, tensors))) as checkpoint:
        loader = Loader(specs_of(wanted))
        fill(loader, plan_load(checkpoint.tensors, [Stage(rule, "acme")], loader.specs), checkpoint)
    assert all(torch.equal(loader.buffers[name], wanted[name]) for name in wanted)


def test_exception_inside_apply_leaves_no_thread_and_no_file(tmp_path: Path) -> None:
    class Exploding:
        plugin_name = "exploding"

        @hookimpl
        def remap_weight(self, config: Mapping[str, Any]) -> WeightRule | None:
            return {"model.norm.weight": lambda w: w.apply(self.explode)}

        def explode(self, tensor: Tensor) -> Tensor:
            raise ZeroDivisionError("no scale")

    with pytest.raises(ZeroDivisionError, match="no scale") as caught:
        LLM(write_llama(tmp_path), plugins=[Exploding()])
    assert "while loading model.norm.weight from model.norm.weight [plugin exploding]" in caught.value.__notes__
    assert threads_of_loading() == []
    assert files_open_in(tmp_path) == []


@pytest.fixture
def listening_to_ctrl_c() -> Iterator[None]:
    """Python's handler of SIGINT, which a process that a shell starts in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening_to_ctrl_c")
def test_ctrl_c_in_the_middle_leaves_nothing_behind_and_the_next_load_is_right(tmp_path: Path) -> None:
    """SIGINT as a terminal sends it, while threads are reading."""
    tensors = {f"t{i}": torch.randn(8, 4) for i in range(40)}
    with closing(SafetensorsCheckpoint(write_folder(tmp_path, tensors))) as checkpoint:
        loader = Loader(specs_of(tensors))
        plan = plan_load(checkpoint.tensors, [], loader.specs)
        with pytest.raises(KeyboardInterrupt):
            fill(loader, plan, checkpoint, progress=lambda num_bytes: signal.raise_signal(signal.SIGINT))
        assert threads_of_loading() == []
        assert not loader.is_finished
        fill(loader, plan, checkpoint)
    assert all(torch.equal(loader.buffers[name], tensors[name]) for name in tensors)
    assert files_open_in(tmp_path) == []
