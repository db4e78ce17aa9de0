"""Planning every tensor-parallel rank: what it reads, counted against what reading really asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from infinilm.cli import main
from infinilm.loading import ranks
from infinilm.loading.chunks import cut_chunks
from infinilm.loading.execute import BYTE_BUDGET, CHUNK_BYTES
from infinilm.loading.plan import LoadPlan, plan_load
from infinilm.loading.ranks import find_indivisible, report_rank
from infinilm.loading.stages import Stage
from infinilm.loading.values import fill
from infinilm_hookspecs import ParameterSpec, Quantization, Shard, StoredTensor, Weight
from infinilm_hookspecs.dtypes import dtype_name

MODEL = Path(__file__).parent.parent.parent / "example_plugins" / "minimal" / "model"
STORED = {
    "qkv": torch.randn(64 + 32 + 32, 48),
    "out": torch.randn(48, 64),
    "neox": torch.randn(8 * 3 * 8, 4096),  # q, k and v of a head lie between each other, 128 KB apart
    "norm": torch.randn(48),
}


def split(weight: Weight) -> list[Weight]:
    return [part.rename(name) for name, part in zip("qkv", weight.split([64, 32, 32]), strict=True)]


def by_head(weight: Weight) -> list[Weight]:
    heads = weight.view(8, 3, 8, 4096)
    return [heads[:, i].reshape(64, 4096).rename(f"neox_{name}") for i, name in enumerate("qkv")]


def plan_of(stored: Mapping[str, torch.Tensor], quantization: Quantization | None = None) -> LoadPlan:
    parameters = {
        "q": ParameterSpec((64, 48), "bfloat16", Shard(0, multiple=8)),
        "k": ParameterSpec((32, 48), "bfloat16", Shard(0, multiple=8)),
        "v": ParameterSpec((32, 48), "bfloat16", Shard(0, multiple=8)),
        "out": ParameterSpec((48, 64), "bfloat16", Shard(1, multiple=8)),
        **{f"neox_{name}": ParameterSpec((64, 4096), "bfloat16", Shard(0, multiple=8)) for name in "qkv"},
        "norm": ParameterSpec((48,), "bfloat16"),
    }
    tensors = {name: StoredTensor(tuple(t.shape), dtype_name(t.dtype), None) for name, t in stored.items()}
    plan = plan_load(tensors, [Stage({"qkv": split, "neox": by_head}, "test")], parameters, quantization)
    plan.check()
    return plan


@pytest.fixture
def plan() -> LoadPlan:
    return plan_of(STORED)


def read_by_rank(
    plan: LoadPlan, stored: Mapping[str, torch.Tensor], rank: int, world_size: int, max_bytes: int = CHUNK_BYTES
) -> tuple[int, int]:
    """Return the bytes that a rank keeps, and those that filling its parameters asks for."""
    num_read = num_kept = 0

    def read(name: str, region: tuple[slice, ...]) -> torch.Tensor:
        nonlocal num_read
        found = stored[name][region].contiguous()
        num_read += found.nbytes
        return found

    for parameter in plan.parameters:
        weight, shard = parameter.weight, parameter.spec.shard
        if shard is not None:
            rows = weight.shape[shard.dim] // world_size
            weight = weight.narrow(shard.dim, rank * rows, rows)
        buffer = torch.empty(weight.shape, dtype=torch.bfloat16)
        num_kept += buffer.nbytes
        for part, target in cut_chunks(weight, buffer, max_bytes):
            fill(part, target, read)
    return num_kept, num_read


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_report_is_what_reading_asks_for(plan: LoadPlan, world_size: int) -> None:
    for rank in range(world_size):
        num_kept, num_read = read_by_rank(plan, STORED, rank, world_size)
        report = report_rank(plan, rank, world_size)
        assert (report.num_bytes, report.read_bytes) == (num_kept, num_read)
        assert report.needed_bytes == 2 * num_kept
        assert report.amplification == 1.0
        assert report.peak_bytes == num_kept + 2 * BYTE_BUDGET


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_report_of_a_quantized_plan_counts_blocks_and_scales(
    world_size: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 40 rows end inside heads of 24: what two chunks, or two ranks, need of a block is read twice."""
    stored: dict[str, torch.Tensor] = {"norm": STORED["norm"]}
    for name in ("qkv", "out", "neox"):
        rows, columns = STORED[name].shape
        stored[name] = STORED[name].to(torch.float8_e4m3fn)
        stored[f"{name}_scale"] = torch.ones(-(-rows // 40), -(-columns // 16))
    groups = {name: {"weight": name, "scale": f"{name}_scale"} for name in ("qkv", "out", "neox")}
    plan = plan_of(stored, Quantization("fp8_block", (40, 16), groups))
    monkeypatch.setattr(ranks, "CHUNK_BYTES", chunk_bytes)
    for rank in range(world_size):
        num_kept, num_read = read_by_rank(plan, stored, rank, world_size, chunk_bytes)
        report = report_rank(plan, rank, world_size)
        assert (report.num_bytes, report.read_bytes) == (num_kept, num_read)
        assert report.needed_bytes <= report.read_bytes


@pytest.mark.parametrize("dims", [(0, 1), (1, 0)])
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 40_000, 6_000, 1_000])
def test_chunks_of_a_quantized_tensor_read_no_block_twice(dims: tuple[int, int], chunk_bytes: int) -> None:
    """Blocks of 40 rows in chunks of 26, 97 and more rows: chunks end where blocks do, also through a transpose."""
    stored = {"x": torch.randn(400, 192).to(torch.float8_e4m3fn), "x_scale": torch.rand(10, 12)}
    tensors = {name: StoredTensor(tuple(t.shape), dtype_name(t.dtype), None) for name, t in stored.items()}
    quantization = Quantization("fp8_block", (40, 16), {"x": {"weight": "x", "scale": "x_scale"}})
    shape = (stored["x"].shape[dims[0]], stored["x"].shape[dims[1]])
    turn = Stage(lambda weight: weight.permute(*dims), "test")
    plan = plan_load(tensors, [turn], {"x": ParameterSpec(shape, "bfloat16", Shard(0))}, quantization)
    plan.check()
    _, num_read = read_by_rank(plan, stored, 0, 1, chunk_bytes)
    assert num_read == sum(tensor.nbytes for tensor in stored.values())


def test_a_step_that_several_parameters_share_reads_once() -> None:
    def halves(weight: Weight) -> list[Weight]:
        both = weight.apply(torch.neg)
        return [both[:4].rename("upper"), both[4:].rename("lower")]

    spec = ParameterSpec((4, 4), "float32", Shard(0))
    tensors = {"x": StoredTensor((8, 4), "float32", None)}
    plan = plan_load(tensors, [Stage(halves, "test")], {"upper": spec, "lower": spec})
    plan.check()
    report = report_rank(plan, 0, 2)
    assert (report.num_bytes, report.read_bytes, report.needed_bytes) == (64, 128, 128)


def test_what_cannot_be_cut_is_named_with_the_unit(plan: LoadPlan) -> None:
    assert find_indivisible(plan, 4) == []
    assert find_indivisible(plan, 8) == [
        f"{name}: 32 rows of dimension 0 cannot be cut for 8 ranks at multiples of 8" for name in "kv"
    ]


def test_fused_dimension_is_cut_in_each_segment() -> None:
    spec = ParameterSpec((12, 4), "float32", Shard(0, segments=(8, 4)))
    plan = plan_load({"fused": StoredTensor((12, 4), "float32", None)}, [], {"fused": spec})
    assert find_indivisible(plan, 4) == []
    assert find_indivisible(plan, 8) == ["fused: 4 rows of dimension 0 cannot be cut for 8 ranks at equal parts"]
    assert report_rank(plan, 3, 4).needed_bytes == (2 + 1) * 4 * 4


def test_inspect_prints_every_rank_and_refuses_what_cannot_be_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(MODEL), "--tensor-parallel-size", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert all(rank["read_bytes"] == rank["needed_bytes"] for rank in report["ranks"])
    assert main(["inspect", str(MODEL), "--tensor-parallel-size", "4", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["ranks"] == []
    assert report["errors"][0].endswith("358 rows of dimension 0 cannot be cut for 4 ranks at equal parts")
    assert main(["inspect", str(MODEL), "--tensor-parallel-size", "2"]) == 0
    assert "rank 1 keeps " in capsys.readouterr().out
