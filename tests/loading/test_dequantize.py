"""Dequantizing at load: the values of every format, blocks read and no more, and a whole model through `LLM`.

fp8 and MXFP4 are held against transformers, int4 against the packers of `int4_made`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints_made import CONFIG, llama_tensors, write_folder
from int4_made import AWQ, GPTQ, Int4, int4, pack_columns
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from infinilm import LLM, SamplingParams
from infinilm.checkpoints._quantization import find_quantization
from infinilm.checkpoints.safetensors import SafetensorsCheckpoint
from infinilm.loading import dequantize
from infinilm.loading.dequantize import start_walk
from infinilm.loading.plan import LoadPlan, plan_load
from infinilm.loading.stages import Stage
from infinilm.loading.values import evaluate
from infinilm.pipeline import choose_dtype
from infinilm.plugins import Lineage
from infinilm_hookspecs import DROP, ParameterSpec, PlanError, Quantization, StoredTensor, Weight, hookimpl
from infinilm_hookspecs.dtypes import dtype_name

Tensors = dict[str, Tensor]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- random ones


def fp8(shape: tuple[int, ...], block: tuple[int, int], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = random(seed)
    weight = (torch.randn(shape, generator=generator) * 20).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return weight, torch.rand(grid, generator=generator) * 0.01 + 0.001


def mxfp4(experts: int, rows: int, columns: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = random(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


# ---------------------------------------------------------------- stored tensors, as a checkpoint has them


@dataclass
class Stored:
    """Tensors in memory with a config that says how they are packed. Counts the bytes that are read of each."""

    tensors: Tensors
    config: Mapping[str, Any]
    num_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, StoredTensor]:
        return {n: StoredTensor(tuple(t.shape), dtype_name(t.dtype), None) for n, t in self.tensors.items()}

    @property
    def quantization(self) -> Quantization:
        found = find_quantization({"quantization_config": self.config}, self.headers)
        assert found is not None
        return found

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        found = self.tensors[name][region]
        self.num_bytes[name] = self.num_bytes.get(name, 0) + found.numel() * found.element_size()
        return found.contiguous()

    def weight(self, name: str = "x.weight") -> Weight:
        walk = start_walk(self.headers, self.quantization)
        assert not walk.errors
        assert list(walk.weights) == [name]
        return walk.weights[name]

    def plan(self, shapes: Mapping[str, tuple[int, ...]], rule: Any = None) -> LoadPlan:
        specs = {name: ParameterSpec(shape, "float32") for name, shape in shapes.items()}
        return plan_load(self.headers, [Stage(rule, "p")] if rule else [], specs, self.quantization)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4"}


def stored_fp8(shape: tuple[int, ...], block: tuple[int, int] = (128, 128)) -> tuple[Stored, Tensor]:
    weight, scale = fp8(shape, block)
    stored = Stored({"x.weight": weight, "x.weight_scale_inv": scale}, {**FP8, "weight_block_size": list(block)})
    return stored, _dequantize_fp8_weight(weight, scale, list(block), torch.float32).to(torch.bfloat16)


def stored_mxfp4() -> tuple[Stored, Tensor]:
    blocks, scales = mxfp4(4, 48, 160)
    return Stored({"x_blocks": blocks, "x_scales": scales}, MXFP4), convert_moe_packed_tensors(blocks, scales)


def stored_gptq(*, shuffled: bool = False) -> tuple[Stored, Tensor]:
    packed = int4(136, 64, 32, shuffled=shuffled)
    return Stored(packed.gptq("x.", with_groups=shuffled), GPTQ), packed.value


def stored_awq() -> tuple[Stored, Tensor]:
    packed = int4(136, 64, 32)
    return Stored(packed.awq("x."), AWQ), packed.value


EVERY_SCHEME = [
    pytest.param(lambda: stored_fp8((272, 304)), "x.weight", id="fp8"),
    pytest.param(lambda: stored_fp8((4, 48, 56), (16, 32)), "x.weight", id="fp8 stacked"),
    pytest.param(stored_mxfp4, "x", id="mxfp4"),
    pytest.param(stored_gptq, "x.weight", id="gptq"),
    pytest.param(lambda: stored_gptq(shuffled=True), "x.weight", id="gptq desc_act"),
    pytest.param(stored_awq, "x.weight", id="awq"),
]
Make = Callable[[], tuple[Stored, Tensor]]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_is_what_transformers_makes_of_it(shape, scale_dtype):
    weight, scale = fp8(shape, (128, 128))
    scale = scale.to(scale_dtype)
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert torch.equal(dequantize.fp8_block(weight, scale, block=(128, 128)), wanted)


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 5), (300, 128), (257, 513)])
def test_fp8_blocks_may_be_cut_short(shape):
    stored, wanted = stored_fp8(shape)
    assert torch.equal(evaluate(stored.weight(), stored.read), wanted)


@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_fp8_may_have_one_scale_a_tensor(scale_shape):
    weight, _ = fp8((24, 40), (128, 128))
    scale = torch.full(scale_shape, 0.0123)
    stored = Stored({"x.weight": weight, "x.weight_scale": scale}, {**FP8, "weight_block_size": None})
    wanted = (weight.float() * 0.0123).to(torch.bfloat16)
    assert torch.equal(evaluate(stored.weight(), stored.read), wanted)


def test_mxfp4_is_what_transformers_makes_of_it():
    stored, wanted = stored_mxfp4()
    assert stored.weight("x").shape == tuple(wanted.shape) == (4, 160, 48)
    assert torch.equal(evaluate(stored.weight("x"), stored.read), wanted)


def test_every_byte_and_scale_of_mxfp4():
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).reshape(1, 255, 1).repeat(1, 1, 16)
    assert torch.equal(dequantize.mxfp4(blocks, scales).transpose(1, 2), convert_moe_packed_tensors(blocks, scales))
    nothing = dequantize.mxfp4(blocks[:, :1], torch.full((1, 1, 16), 255, dtype=torch.uint8))
    assert nothing.isnan().all()


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("num_inputs", [256, 8, 136, 328])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("groups", ["none", "in order", "shuffled"])
def test_gptq(group_size, num_inputs, version, groups):
    packed = int4(num_inputs, 24, group_size, shuffled=groups == "shuffled")
    config = {**GPTQ, "group_size": group_size, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    stored = Stored(packed.gptq("x.", version=version, with_groups=groups != "none"), config)
    weight = stored.weight()
    assert (weight.shape, weight.dtype) == ((24, num_inputs), "float16")
    assert torch.equal(evaluate(weight, stored.read), packed.value)


def test_gptq_outputs_need_not_fill_their_words():
    packed = int4(64, 16, 32)
    narrow = Int4(packed.numbers[:, :13], packed.zeros[:, :13], packed.scales[:, :13].contiguous(), packed.group)
    stored = packed.gptq("x.") | {
        "x.qweight": pack_columns(narrow.numbers.t()).t().contiguous(),
        "x.scales": narrow.scales,
    }
    found = Stored(stored, GPTQ)
    assert torch.equal(evaluate(found.weight(), found.read), narrow.value)


def test_a_zero_of_gptq_that_borrows_from_its_neighbours():
    packed = int4(32, 16, 32)
    packed.zeros[:] = torch.randint(0, 8, packed.zeros.shape, generator=random())
    packed.zeros[0, :4] = torch.tensor([0, 0, 5, 0])
    stored = packed.gptq("x.", version=2)
    stored["x.qzeros"] -= 0x11111111  # GPTQModel's way from version 2 to 1, over whole words
    found = Stored(stored, GPTQ)
    assert torch.equal(evaluate(found.weight(), found.read), packed.value)


def test_a_group_that_is_not_there_is_an_error():
    packed = int4(64, 8, 32)
    for wrong in (2, -1):
        stored = packed.gptq("x.")
        stored["x.g_idx"][5] = wrong
        found = Stored(stored, GPTQ)
        with pytest.raises(ValueError, match=r"g_idx names groups .*, and there are 2"):
            evaluate(found.weight(), found.read)


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("num_inputs", [256, 8, 136, 133])
def test_awq(group_size, num_inputs):
    packed = int4(num_inputs, 24, group_size)
    stored = Stored(packed.awq("x."), {**AWQ, "group_size": group_size})
    weight = stored.weight()
    assert (weight.shape, weight.dtype) == ((24, num_inputs), "float16")
    assert torch.equal(evaluate(weight, stored.read), packed.value)


# ---------------------------------------------------------------- parts of a weight


@pytest.mark.parametrize(("make", "name"), EVERY_SCHEME)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_ranks_slice_is_the_slice_of_the_whole(make: Make, name, world_size):
    stored, whole = make()
    weight = stored.weight(name)
    for dim, size in enumerate(weight.shape):
        if size % world_size:
            continue
        for part, wanted in zip(weight.chunk(world_size, dim), whole.chunk(world_size, dim), strict=True):
            assert torch.equal(evaluate(part, stored.read), wanted)


@pytest.mark.parametrize(("make", "name"), EVERY_SCHEME)
def test_any_piece_is_that_of_the_whole(make: Make, name):
    stored, whole = make()
    weight = stored.weight(name)
    last = (..., slice(3, 41, 7), slice(1, 38, 3))
    for given, wanted in [
        (weight[last], whole[last]),
        (weight.transpose(-1, -2)[last], whole.transpose(-1, -2)[last]),
        (weight.unflatten(-1, (2, -1)).transpose(-1, -2), whole.unflatten(-1, (2, -1)).transpose(-1, -2)),
        (weight.flatten(), whole.flatten()),
        (weight.to("float32").apply(lambda t: t + 1), whole.float() + 1),
    ]:
        assert torch.equal(evaluate(given, stored.read), wanted)


@pytest.mark.parametrize(
    ("make", "name", "index", "read"),
    [
        # rows 130 to 139 of fp8 lie in the second of three blocks of rows, columns 0 to 4 in the first of columns
        (lambda: stored_fp8((272, 304)), "x.weight", (slice(130, 140), slice(0, 5)), (128 * 128, 4)),
        (lambda: stored_fp8((272, 304)), "x.weight", (slice(127, 129),), (256 * 304, 2 * 3 * 4)),
        (lambda: stored_fp8((272, 304)), "x.weight", (slice(None),), (272 * 304, 3 * 3 * 4)),
        # (experts, columns, rows): one expert, one block of 32 columns, 3 rows
        (stored_mxfp4, "x", (2, slice(33, 60), slice(5, 8)), (3 * 16, 3)),
        # (outputs, inputs): one word of eight outputs is 8 columns of qweight, a word of zeros and 8 scales a group
        (stored_gptq, "x.weight", (slice(8, 16),), (17 * 8 * 4, 5 * 4, 5 * 8 * 2)),
        (stored_gptq, "x.weight", (slice(9, 11), slice(32, 64)), (4 * 8 * 4, 4, 8 * 2)),
        (lambda: stored_gptq(shuffled=True), "x.weight", (slice(8, 16), slice(0, 8)), (32, 5 * 4, 5 * 8 * 2, 8 * 4)),
        (stored_awq, "x.weight", (slice(8, 16),), (136 * 4, 5 * 4, 5 * 8 * 2)),
        (stored_awq, "x.weight", (slice(0, 1), slice(130, 136)), (8 * 4, 4, 8 * 2)),
    ],
)
def test_only_the_blocks_of_a_piece_are_read(make: Make, name, index, read):
    stored, whole = make()
    assert torch.equal(evaluate(stored.weight(name)[index], stored.read), whole[index])
    assert tuple(stored.num_bytes.values()) == read


# ---------------------------------------------------------------- plans


def split_qkv(weight: Weight) -> tuple[Weight, ...] | None:
    if weight.name != "x.weight":
        return None
    return tuple(w.rename(f"{n}.weight") for n, w in zip("qkv", weight.split((40, 12, 12)), strict=True))


@pytest.mark.parametrize("make", [lambda: stored_fp8((64, 136), (16, 32)), stored_gptq, stored_awq])
def test_rows_are_split_after_dequantizing(make: Make):
    stored, whole = make()
    plan = stored.plan({"q.weight": (40, 136), "k.weight": (12, 136), "v.weight": (12, 136)}, split_qkv)
    plan.check()
    for parameter, wanted in zip(plan.parameters, whole.split((40, 12, 12)), strict=True):
        assert torch.equal(evaluate(parameter.weight, stored.read), wanted)
        assert set(parameter.weight.stored_names()) == set(stored.tensors)
        assert parameter.losses() == (f"dequantized from {stored.quantization.scheme}",)


def test_what_a_rule_leaves_out_of_a_dequantized_weight_is_missed():
    stored, _ = stored_gptq()
    shapes = {"x.weight": (60, 136)}
    plan = stored.plan(shapes, lambda weight: weight[:60])
    assert plan.errors == (
        "544 of 8704 elements of what gptq dequantization makes of x.qweight, x.qzeros, x.scales go nowhere "
        "(used: x.weight); return DROP beside the weights if that is meant",
    )
    plan = stored.plan(shapes, lambda weight: [weight[:60], DROP])
    plan.check()
    assert set(plan.dropped) == {"x.qweight", "x.qzeros", "x.scales"}


def test_rows_that_are_used_twice_are_noticed():
    stored, _ = stored_awq()
    plan = stored.plan({"a": (64, 136), "b": (64, 136)}, lambda weight: [weight.rename("a"), weight.rename("b")])
    assert plan.errors == (
        "8704 elements of what awq dequantization makes of x.qweight, x.qzeros, x.scales are used more than once, "
        "in a, b",
    )


def test_a_dropped_weight_takes_all_its_tensors_along():
    stored, _ = stored_fp8((128, 128))
    plan = stored.plan({}, {"x.weight": DROP})
    plan.check()
    assert plan.dropped == {"x.weight": "p", "x.weight_scale_inv": "p"}


def misfit(make: Make, shape: tuple[int, ...] = (64, 136), **changes: Tensor | None) -> tuple[str, ...]:
    stored, _ = make()
    for role, tensor in changes.items():
        if tensor is None:
            del stored.tensors[f"x.{role}"]
        else:
            stored.tensors[f"x.{role}"] = tensor
    return tuple(error for error in stored.plan({"x.weight": shape}).errors if error != "x.weight is missing")


def test_what_does_not_fit_together_is_named():
    assert misfit(stored_awq, scales=None) == (
        "x.weight: quantized as 'awq', and beside x.qweight, x.qzeros there is no scale",
    )
    assert misfit(stored_awq, qzeros=None, scales=None) == (
        "x.weight: quantized as 'awq', and beside x.qweight there is no zero and no scale",
    )
    assert misfit(stored_gptq, qzeros=torch.zeros(5, 7, dtype=torch.int32)) == (
        "x.weight: x.qzeros is [5, 7] int32, and [5, 8] int32 would fit",
    )
    assert misfit(lambda: stored_gptq(shuffled=True), g_idx=torch.zeros(128, dtype=torch.int32)) == (
        "x.weight: x.g_idx is [128] int32, and [136] int32 or int64 would fit",
    )
    assert misfit(stored_awq, qweight=torch.zeros(8, dtype=torch.int32)) == (
        "x.weight: Weight('x.qweight', [8], int32) is wanted as a matrix",
    )
    assert misfit(lambda: stored_fp8((256, 128)), weight_scale_inv=torch.ones(1, 1)) == (
        "x.weight: x.weight_scale_inv is [1, 1] float32, and [2, 1] float16 or bfloat16 or float32 or "
        "float8_e8m0fnu would fit",
    )
    assert misfit(lambda: stored_fp8((256, 128)), weight_scale_inv=None) == (
        "x.weight: quantized as 'fp8_block', and beside x.weight there is no scale",
    )
    assert misfit(lambda: stored_fp8((256, 128)), weight=torch.ones(8).to(torch.float8_e4m3fn)) == (
        "x.weight: Weight('x.weight', [8], float8_e4m3fn) has no rows and columns to divide into blocks",
    )
    assert misfit(stored_awq, weight=torch.zeros(64, 136)) == (
        "x.weight: x.weight is stored both as it is and quantized",
    )


def test_a_scheme_nobody_dequantizes_is_named():
    quantization = Quantization("acme", (1,), {"a": {"weight": "a.packed"}})
    plan = plan_load({"a.packed": StoredTensor((2,), "uint8", None)}, [], {}, quantization)
    assert plan.errors == (
        "a: nothing dequantizes weights quantized as 'acme'; known: fp8_block, mxfp4, gptq, gptq_v2, awq",
    )


# ---------------------------------------------------------------- whole models

LLAMA_LINEARS = tuple(name for name in llama_tensors() if name.endswith("_proj.weight"))


def quantized_llama(scheme: str) -> tuple[Mapping[str, Any], Tensors, Tensors]:
    """Return the quantization_config, the stored tensors, and the plain tensors they stand for."""
    plain = llama_tensors()
    stored = {name: tensor for name, tensor in plain.items() if name not in LLAMA_LINEARS}
    for seed, name in enumerate(LLAMA_LINEARS):
        rows, columns = plain[name].shape
        base = name.removesuffix("weight")
        if scheme == "fp8":
            weight, scale = fp8((rows, columns), (16, 16), seed=seed)
            stored |= {name: weight, f"{name}_scale_inv": scale}
            plain[name] = _dequantize_fp8_weight(weight, scale, [16, 16], torch.float32).to(torch.bfloat16)
        else:
            packed = int4(columns, rows, 16, seed=seed, shuffled=scheme == "gptq")
            stored |= packed.awq(base) if scheme == "awq" else packed.gptq(base)
            plain[name] = packed.value
    configs = {
        "fp8": {**FP8, "weight_block_size": [16, 16]},
        "gptq": {**GPTQ, "group_size": 16},
        "awq": {**AWQ, "group_size": 16},
    }
    return configs[scheme], stored, plain


def answers(folder: Path, **options: Any) -> list[Any]:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=5, prompt_logprobs=5)
    with LLM(folder, dtype="float32", **options) as llm:
        results = llm.generate([{"prompt_token_ids": [3, 1, 4, 1, 5]}, {"prompt_token_ids": [9]}], params)
    return [(r.prompt_logprobs, r.outputs[0].token_ids, r.outputs[0].logprobs) for r in results]


@pytest.mark.parametrize("scheme", ["fp8", "gptq", "awq"])
def test_a_quantized_llama_says_what_its_dequantized_copy_says(scheme, tmp_path):
    config, stored, plain = quantized_llama(scheme)
    quantized = write_folder(tmp_path / "quantized", stored, config={**CONFIG, "quantization_config": config})
    assert answers(quantized) == answers(write_folder(tmp_path / "plain", plain))
    assert answers(quantized) != answers(write_folder(tmp_path / "other", llama_tensors(seed=1)))


class TransposedMoe:
    """A mixtral whose experts are stacked, and transposed as in gpt-oss."""

    @hookimpl
    def adapt_config(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return {**config, "model_type": "mixtral"} if config["model_type"] == "acme_moe" else None

    @hookimpl
    def remap_weight(self, config: Mapping[str, Any]) -> Any:
        if config["model_type"] != "acme_moe":
            return None
        experts = "model.layers.{layer}.mlp.experts"
        return {f"{experts}.{n}_proj": lambda weight, layer: weight.transpose(1, 2) for n in ("gate_up", "down")}


def test_a_model_with_mxfp4_experts_says_what_its_dequantized_copy_says(tmp_path):
    config = {
        **CONFIG,
        "model_type": "acme_moe",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    shapes = {"model.embed_tokens": (32, 32), "lm_head": (32, 32), "model.norm": (32,)}
    shapes |= {f"model.layers.{i}.self_attn.{n}_proj": ((16 if n in "kv" else 32), 32) for i in (0, 1) for n in "qkvo"}
    for layer in (0, 1):
        shapes |= {f"model.layers.{layer}.{n}_layernorm": (32,) for n in ("input", "post_attention")}
        shapes |= {f"model.layers.{layer}.mlp.gate": (3, 32)}
    stored = {f"{name}.weight": torch.randn(shape, generator=random(5)) * 0.25 for name, shape in shapes.items()}
    plain = dict(stored)
    for layer in (0, 1):
        for name, rows, columns in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
            blocks, scales = mxfp4(3, rows, columns, seed=layer)
            whole = f"model.layers.{layer}.mlp.experts.{name}"
            stored |= {f"{whole}_blocks": blocks, f"{whole}_scales": scales}
            plain[whole] = convert_moe_packed_tensors(blocks, scales)
    quantized = write_folder(tmp_path / "quantized", stored, config={**config, "quantization_config": MXFP4})
    copy = write_folder(tmp_path / "plain", plain, config=config)
    assert answers(quantized, plugins=[TransposedMoe()]) == answers(copy, plugins=[TransposedMoe()])


def test_a_quantized_model_is_not_exported_as_it_came_but_as_what_it_stands_for(tmp_path):
    config, stored, plain = quantized_llama("gptq")
    folder = write_folder(tmp_path / "quantized", stored, config={**CONFIG, "quantization_config": config})
    with LLM(folder, dtype="float32") as llm:
        with pytest.raises(PlanError, match=r"self_attn.q_proj.weight is not what was stored: dequantized from gptq"):
            llm.export(tmp_path / "original", original=True)
        llm.export(tmp_path / "standard")
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "standard" / "model.safetensors")
    assert exported.keys() == plain.keys()
    assert all(torch.equal(exported[name], plain[name]) for name in plain)


def test_a_layout_that_is_not_understood_is_declined_by_name(tmp_path):
    _, stored, _ = quantized_llama("gptq")
    config = {**CONFIG, "quantization_config": {**GPTQ, "bits": 3}}
    folder = write_folder(tmp_path / "model", stored, config=config)
    with pytest.raises(Exception, match=r"quantized as 'gptq'.*bits 3, group_size 32"):
        LLM(folder, backend="torch")


def test_the_dtype_of_a_quantized_checkpoint_is_that_of_its_weights(tmp_path):
    config, stored, _ = quantized_llama("gptq")
    without = {key: value for key, value in CONFIG.items() if key != "dtype"}
    halves = {name: t.half() if t.dtype == torch.float32 else t for name, t in stored.items()}
    folder = write_folder(tmp_path / "model", halves, config={**without, "quantization_config": config})
    lineage = Lineage(({**without, "quantization_config": config},), ())
    with closing(SafetensorsCheckpoint(folder)) as checkpoint:
        anything: Any = SimpleNamespace(supports=lambda dtype: True)
        assert choose_dtype("auto", lineage, checkpoint, anything) == "float16"
