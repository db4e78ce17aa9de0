"""GPTQ and AWQ checkpoints on the cpu backend, run as they are stored: against torch on their dequantized copies.

The packers are those of `int4_made`. Levels of 15 bits lose less of activations than bfloat16 does, so in float32
hardly anything is left of a difference: dequantizing to fp16, as the copy is, rounds, and the kernels do not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_made import write_folder
from cpu_library import CpuBackend, NativeError, isa, isas
from int4_made import AWQ, GPTQ, Int4, rounded
from safetensors.torch import load_file, save_file
from torch import Tensor

from infinilm import LLM, SamplingParams
from infinilm.checkpoints.safetensors import SafetensorsCheckpoint
from infinilm.cli import main
from infinilm.loading import dequantize
from infinilm.models import llama
from infinilm.native.backend import NativeBackend
from infinilm.testing import Context, make_batch
from infinilm.testing.driver import advance
from infinilm.testing.parity import edit_config, edit_tensors
from infinilm_hookspecs import PlanError

SAFETENSORS = "model.safetensors"
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, EXPERTS = 256, 160, 6, 2, 24, 2, 101, 3
CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 128,
    "dtype": "float32",
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": CONFIG,
    "tied": {**CONFIG, "tie_word_embeddings": True},
    "qwen2": {**CONFIG, "model_type": "qwen2"},
    "mixtral": {
        **CONFIG,
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}


def plain_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a model under Hugging Face's names, all of them random."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (size, HIDDEN) for part, size in rows.items()}
        shapes[f"{name}.self_attn.o_proj.weight"] = (HIDDEN, rows["q"])
        if config["model_type"] == "qwen2":
            shapes |= {f"{name}.self_attn.{part}_proj.bias": (size,) for part, size in rows.items()}
        if config["model_type"] == "mixtral":
            shapes[f"{name}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
            mlps = {f"{name}.block_sparse_moe.experts.{expert}": ("w1", "w3", "w2") for expert in range(EXPERTS)}
        else:
            mlps = {f"{name}.mlp": ("gate_proj", "up_proj", "down_proj")}
        for mlp, (gate, up, down) in mlps.items():
            shapes |= {f"{mlp}.{part}.weight": (INTERMEDIATE, HIDDEN) for part in (gate, up)}
            shapes[f"{mlp}.{down}.weight"] = (HIDDEN, INTERMEDIATE)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.08 for name, shape in shapes.items()}


def is_quantized(name: str) -> bool:
    return name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight"))


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized: its quantization_config, and how its matrices are rounded and packed."""

    stated: Mapping[str, Any]
    symmetric: bool = False
    is_shuffled: bool = False  # act-order: the inputs of a group lie anywhere, for q, k and v in the same places
    with_groups: bool = True

    def round(self, name: str, weight: Tensor) -> Int4:
        order = None
        if self.is_shuffled:
            seed = hash_of(name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up", "gate"))
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
        return rounded(weight, self.stated["group_size"], symmetric=self.symmetric, order=order)

    def pack(self, name: str, matrix: Int4) -> dict[str, Tensor]:
        base = name.removesuffix("weight")
        if self.stated["quant_method"] == "awq":
            return matrix.awq(base)
        version = 2 if self.stated.get("checkpoint_format") == "gptq_v2" else 1
        return matrix.gptq(base, version=version, with_groups=self.with_groups)


def hash_of(name: str) -> int:
    return sum(ord(letter) * (at + 1) for at, letter in enumerate(name.replace("w3", "w1")))


def scheme(stated: Mapping[str, Any], group_size: int, **options: Any) -> Scheme:
    return Scheme({**stated, "group_size": group_size}, **options)


V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
SCHEMES: Mapping[str, Scheme] = {
    "gptq 32": scheme(GPTQ, 32),
    "gptq 128": scheme(GPTQ, 128),
    "gptq 128 symmetric": scheme(GPTQ, 128, symmetric=True),
    "gptq 32 act-order": scheme({**GPTQ, "desc_act": True}, 32, is_shuffled=True),
    "gptq 128 act-order": scheme({**GPTQ, "desc_act": True}, 128, is_shuffled=True),
    "gptq 64 without g_idx": scheme(GPTQ, 64, with_groups=False),
    "gptq whole rows": scheme(GPTQ, -1),
    "gptq v2 32": scheme(V2, 32),
    "awq 32": scheme(AWQ, 32),
    "awq 128": scheme(AWQ, 128),
    "awq 128 symmetric": scheme(AWQ, 128, symmetric=True),
}


def write_both(folder: Path, model: str, quantized: Scheme) -> tuple[Path, Path]:
    """Write a quantized checkpoint and its dequantized copy."""
    config, plain = MODELS[model], plain_tensors(MODELS[model])
    matrices = {name: quantized.round(name, tensor) for name, tensor in plain.items() if is_quantized(name)}
    stored = {name: tensor for name, tensor in plain.items() if name not in matrices}
    for name, matrix in matrices.items():
        stored |= quantized.pack(name, matrix)
        plain[name] = matrix.value.float()
    return (
        write_folder(folder / "int4", stored, config={**config, "quantization_config": dict(quantized.stated)}),
        write_folder(folder / "copy", plain, config=config),
    )


def logits_of(folder: Path, **options: Any) -> Tensor:
    """Return the logits of every token of a prompt, computed in pieces of many rows and of few."""
    bounds = (0, 21, 22, 24, 27, 33, 40)
    with LLM(folder, max_num_seqs=1, kv_cache_memory=1 << 22, **options) as llm:
        tokens = torch.randint(0, VOCAB, (bounds[-1],), generator=torch.Generator().manual_seed(1)).tolist()
        block_size = llm.backend.cache_spec().block_size
        context = Context(tokens, list(range(-(-len(tokens) // block_size))))
        pieces = []
        for begin, end in pairwise(bounds):
            work = [(context, end - begin)]
            pieces.append(llm.backend.forward(make_batch(work, block_size)))
            advance(work)
    return torch.cat(pieces)


def difference(logits: Tensor, wanted: Tensor) -> float:
    return float((logits - wanted).abs().max() / wanted.abs().max())


def kept_and_dequantized(llm: LLM) -> tuple[set[str], set[str]]:
    """Return the weights that are run as they are stored, and those that were dequantized."""
    names = {parameter.name for parameter in llm.plan.parameters}
    lossy = {parameter.name for parameter in llm.plan.parameters if parameter.losses()}
    return {name.removesuffix(":weight") for name in names if name.endswith(":weight")}, lossy


# ---------------------------------------------------------------- whole models


CASES = [
    *(("llama", name) for name in SCHEMES),
    *(("tied", name) for name in ("gptq 128", "awq 32")),
    *(("qwen2", name) for name in ("gptq 32", "gptq 128 act-order", "awq 128")),
    *(("mixtral", name) for name in ("gptq 128", "gptq 32 act-order", "awq 32")),
]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_logits_are_those_of_the_dequantized_copy_on_torch(model, name, tmp_path):
    stored, copy = write_both(tmp_path, model, SCHEMES[name])
    wanted = logits_of(copy, backend="torch", dtype="float32")
    assert difference(logits_of(stored, backend="cpu", dtype="float32"), wanted) <= 5e-4
    half = logits_of(copy, backend="torch", dtype="bfloat16")
    logits = logits_of(stored, backend="cpu", dtype="bfloat16")
    assert difference(logits, half) <= 2e-2
    assert difference(logits, wanted) <= difference(half, wanted)


@pytest.mark.parametrize("name", ["gptq 128", "awq 32"])
def test_every_level_of_instructions(name, tmp_path):
    stored, copy = write_both(tmp_path, "llama", SCHEMES[name])
    wanted = logits_of(copy, backend="torch", dtype="float32")
    for level in isas():
        with isa(level):
            assert difference(logits_of(stored, backend="cpu", dtype="float32"), wanted) <= 5e-4, level


def test_a_model_answers_as_its_copy(tmp_path):
    """Through `generate`: no step of the engine asks for anything else."""
    stored, copy = write_both(tmp_path, "qwen2", SCHEMES["gptq 128"])
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=1)
    answers = []
    for folder, backend in ((stored, "cpu"), (copy, "torch")):
        with LLM(folder, backend=backend, dtype="float32") as llm:
            results = llm.generate([{"prompt_token_ids": [3, 1, 4, 1, 5]}, {"prompt_token_ids": [9]}], params)
        answers.append([result.outputs[0].token_ids for result in results])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["gptq 128", "awq 32"])
def test_a_checkpoint_that_says_float16_is_run_in_float32(name, tmp_path):
    """As most of these do: nobody has to say a dtype, and what is not quantized loses nothing."""
    stored, copy = write_both(tmp_path, "llama", SCHEMES[name])
    edit_config(stored, lambda config: {**config, "dtype": "float16"})
    edit_tensors(stored, lambda tensors: {n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()})
    edit_tensors(copy, lambda tensors: {n: t if is_quantized(n) else t.half().float() for n, t in tensors.items()})
    with LLM(stored, backend="cpu", kv_cache_memory=1 << 22) as llm:
        assert kept_and_dequantized(llm) == (LINEARS, set())
    wanted = logits_of(copy, backend="torch", dtype="float32")
    assert difference(logits_of(stored, backend="cpu"), wanted) <= 5e-4


# ---------------------------------------------------------------- what is run as it is stored


LINEARS = {name for name in plain_tensors(CONFIG) if is_quantized(name)}


@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - {"gptq whole rows"}))  # which a test below has
def test_nothing_is_dequantized(name, tmp_path, monkeypatch):
    """Neither here, where every dequantizer is a trap, nor there: buffers have the stored bytes."""
    stored, _ = write_both(tmp_path, "llama", SCHEMES[name])

    def trap(*values: Tensor, **options: object) -> Tensor:
        raise AssertionError("dequantized")

    monkeypatch.setattr(dequantize, "gptq", trap)
    monkeypatch.setattr(dequantize, "awq", trap)
    opened: dict[str, int] = {}
    destination = NativeBackend.destination

    def counted(backend: NativeBackend, parameter: str) -> Tensor:
        buffer = destination(backend, parameter)
        opened[parameter] = buffer.numel() * buffer.element_size()
        return buffer

    monkeypatch.setattr(NativeBackend, "destination", counted)
    with LLM(stored, backend="cpu", dtype="float32", kv_cache_memory=1 << 22) as llm:
        assert kept_and_dequantized(llm) == (LINEARS, set())
    assert sum(opened.values()) == sum(t.numel() * t.element_size() for t in load_file(stored / SAFETENSORS).values())


def test_a_mixtral_keeps_its_experts(tmp_path):
    stored, _ = write_both(tmp_path, "mixtral", SCHEMES["gptq 128"])
    with LLM(stored, backend="cpu", dtype="float32", kv_cache_memory=1 << 22) as llm:
        kept, lossy = kept_and_dequantized(llm)
    experts = {f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(LAYERS) for expert in range(EXPERTS)}
    assert {name for name in kept if "experts" in name} == {
        f"{expert}.{part}_proj.weight" for expert in experts for part in ("gate", "up", "down")
    }
    assert len(kept) == 4 * LAYERS + 3 * len(experts)
    assert not lossy


def without(schemed: Scheme, *left_plain: str) -> Any:
    """Return a function that writes a llama of which matrices with such names are not quantized."""

    def write(folder: Path) -> tuple[Path, Path]:
        stored, copy = write_both(folder, "llama", schemed)
        tensors, plain = load_file(stored / SAFETENSORS), load_file(copy / SAFETENSORS)
        for name in LINEARS:
            if any(word in name for word in left_plain):
                for role in ("qweight", "qzeros", "scales", "g_idx"):
                    tensors.pop(name.removesuffix("weight") + role, None)
                tensors[name] = plain[name]
        save_file(tensors, stored / SAFETENSORS)
        return stored, copy

    return write


def with_scales_in(dtype: torch.dtype) -> Any:
    def write(folder: Path) -> tuple[Path, Path]:
        stored, copy = write_both(folder, "llama", SCHEMES["awq 32"])
        tensors = load_file(stored / SAFETENSORS)
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items() if name.endswith("scales")}
        save_file(tensors, stored / SAFETENSORS)
        return stored, copy

    return write


def named(*words: str) -> set[str]:
    return {name for name in LINEARS if any(word in name for word in words)}


@pytest.mark.parametrize(
    ("write", "plain", "lossy", "bound"),
    [
        # modules that a checkpoint leaves out: the rest is kept, but for what is multiplied together with them
        (without(SCHEMES["gptq 32"], "o_proj"), {"o_proj"}, set(), 5e-4),
        (without(SCHEMES["awq 32"], "v_proj"), {"q_proj", "k_proj", "v_proj"}, {"q_proj", "k_proj"}, 5e-4),
        (without(SCHEMES["awq 32"], "0.mlp.up_proj"), {"0.mlp.gate_proj", "0.mlp.up_proj"}, {"0.mlp.gate"}, 5e-4),
        # rows of 144 inputs are no whole number of groups of 32 activations
        (lambda folder: write_both(folder, "llama", SCHEMES["gptq whole rows"]), {"o_proj"}, {"o_proj"}, 5e-4),
        # nothing is kept
        (lambda folder: write_both(folder, "llama", scheme(GPTQ, 16)), {"proj"}, {"proj"}, 1e-4),
        (with_scales_in(torch.float32), {"proj"}, {"proj"}, 5e-4),
        (with_scales_in(torch.bfloat16), {"proj"}, {"proj"}, 2e-2),  # the copy's scales are fp16
    ],
)
def test_what_cannot_be_run_as_it_is_stored_is_dequantized(write, plain, lossy, bound, tmp_path):
    stored, copy = write(tmp_path)
    with LLM(stored, backend="cpu", dtype="float32", kv_cache_memory=1 << 22) as llm:
        assert kept_and_dequantized(llm) == (LINEARS - named(*plain), named(*lossy))
    wanted = logits_of(copy, backend="torch", dtype="float32")
    assert difference(logits_of(stored, backend="cpu", dtype="float32"), wanted) <= bound


def test_who_asks_for_a_quantization_gets_that_one(tmp_path):
    stored, copy = write_both(tmp_path, "llama", SCHEMES["gptq 32"])
    options = {"backend": "cpu", "dtype": "float32", "quantization": "int8"}
    with LLM(stored, kv_cache_memory=1 << 22, **options) as llm:
        assert kept_and_dequantized(llm) == (set(), LINEARS)
    assert torch.equal(logits_of(stored, **options), logits_of(copy, **options))


def test_an_output_projection_may_be_quantized(tmp_path):
    stored, copy = write_both(tmp_path, "llama", SCHEMES["gptq 128"])
    tensors, plain = load_file(stored / SAFETENSORS), load_file(copy / SAFETENSORS)
    more = torch.nn.functional.pad  # to 104 tokens: words have eight
    matrix = rounded(more(tensors.pop("lm_head.weight"), (0, 0, 0, 3)), 128)
    for some in (tensors, plain):
        some["model.embed_tokens.weight"] = more(some["model.embed_tokens.weight"], (0, 0, 0, 3))
    save_file(tensors | matrix.gptq("lm_head."), stored / SAFETENSORS)
    save_file(plain | {"lm_head.weight": matrix.value.float()}, copy / SAFETENSORS)
    for folder in (stored, copy):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB + 3}))
    with LLM(stored, backend="cpu", dtype="float32", kv_cache_memory=1 << 22) as llm:
        assert kept_and_dequantized(llm) == (LINEARS | {"lm_head.weight"}, set())
    wanted = logits_of(copy, backend="torch", dtype="float32")
    assert difference(logits_of(stored, backend="cpu", dtype="float32"), wanted) <= 5e-4


# ---------------------------------------------------------------- parts, one by one

ROLES = ("weight", "zero", "scale", "group")


def native(folder: Path, **options: Any) -> CpuBackend:
    """Return a backend for a llama's folder, as the host would ask for it."""
    with closing(SafetensorsCheckpoint(folder)) as checkpoint:
        config = llama.adapt_config(CONFIG)
        assert config is not None
        quantization = checkpoint.quantization
        assert quantization is not None
        groups = {
            name: {
                role: {"name": part, "shape": checkpoint.tensors[part].shape, "dtype": checkpoint.tensors[part].dtype}
                for role, part in group.items()
            }
            for name, group in quantization.groups.items()
        }
    described = {"scheme": quantization.scheme, "block_shape": quantization.block_shape, "groups": groups}
    return CpuBackend(config, stored_quantization=json.dumps(described), **options)


def fill(backend: CpuBackend, folder: Path, roles: Sequence[str] = ROLES, changes: Any = None) -> None:
    """Fill every parameter, the parts of stored matrices by role."""
    suffixes = {"weight": "qweight", "zero": "qzeros", "scale": "scales", "group": "g_idx"}
    tensors = load_file(folder / SAFETENSORS) | (changes or {})
    for name in sorted(backend.parameters(), key=lambda name: (roles.index(name.partition(":")[2] or roles[0]), name)):
        matrix, _, role = name.partition(":")
        stored = tensors[matrix.removesuffix("weight") + suffixes[role] if role else matrix]
        backend.destination(name).copy_(stored)
        backend.loaded(name)
    backend.finish_loading()


def step(backend: CpuBackend) -> Tensor:
    backend.allocate_cache(4, num_slots=1)
    tokens = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    return backend.forward(make_batch([(Context(tokens, [0, 1]), 30)], 16))


def test_parts_come_in_any_order_and_again_at_an_update(tmp_path):
    """The order of input features may be another one then: what was packed before is put into it."""
    first, _ = write_both(tmp_path / "first", "llama", SCHEMES["gptq 32 act-order"])
    second, _ = write_both(tmp_path / "second", "llama", SCHEMES["gptq 32"])
    wanted = []
    for folder in (first, second):
        wanted.append(native(folder))
        fill(wanted[-1], folder)
    assert difference(step(wanted[0]), step(wanted[1])) > 0.01
    for roles in permutations(ROLES):
        backend = native(first)
        for folder, same in zip((first, second, first), (*wanted, wanted[0]), strict=True):
            fill(backend, folder, roles)
            assert torch.equal(step(backend), step(same)), roles


def test_parameters_are_the_stored_parts(tmp_path):
    stored, _ = write_both(tmp_path, "llama", SCHEMES["gptq 32"])
    specs = native(stored, dtype="bfloat16").parameters()
    name = "model.layers.1.mlp.up_proj.weight"
    found = {role: (specs[f"{name}:{role}"].shape, specs[f"{name}:{role}"].dtype) for role in ROLES}
    assert found == {
        "group": ((HIDDEN,), "int32"),
        "scale": ((HIDDEN // 32, INTERMEDIATE), "float16"),
        "zero": ((HIDDEN // 32, INTERMEDIATE // 8), "int32"),
        "weight": ((HIDDEN // 8, INTERMEDIATE), "int32"),
    }
    assert specs["lm_head.weight"].dtype == "bfloat16"
    assert name not in specs


def test_orders_that_contradict_each_other_are_named(tmp_path):
    stored, _ = write_both(tmp_path, "llama", SCHEMES["gptq 32 act-order"])
    k_proj = "model.layers.1.self_attn.k_proj"
    changes = {f"{k_proj}.g_idx": (torch.arange(HIDDEN) // 32).to(torch.int32)}
    message = rf"g_idx of {k_proj}.weight has input features in another order than that of .*q_proj.weight"
    with pytest.raises(NativeError, match=message):
        fill(native(stored), stored, changes=changes)
    save_file(load_file(stored / SAFETENSORS) | changes, stored / SAFETENSORS)
    with pytest.raises(PlanError, match=message + ".*run the model on another backend"):
        LLM(stored, backend="cpu", dtype="float32")


@pytest.mark.parametrize("wrong", [-1, HIDDEN // 32, 0])
def test_groups_that_cannot_be_are_named(wrong, tmp_path):
    stored, _ = write_both(tmp_path, "llama", SCHEMES["gptq 32"])
    groups = (torch.arange(HIDDEN) // 32).to(torch.int32)
    groups[70] = wrong  # 0: a group of 33
    changes = {"model.layers.0.self_attn.o_proj.g_idx": groups[: HEADS * HEAD_DIM]}
    with pytest.raises(NativeError, match=rf"o_proj.weight puts input feature 70 into group {wrong}, and there are"):
        fill(native(stored), stored, changes=changes)


# ---------------------------------------------------------------- memory

MEASURE = """
import sys
from infinilm import LLM
from infinilm.loading import execute

execute.BYTE_BUDGET = 8 << 20  # of buffers on their way


def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def load(folder):
    return LLM(folder, backend="cpu", dtype="bfloat16", max_num_seqs=1, kv_cache_memory=1 << 22)


load(sys.argv[1]).close()  # what is imported and started once
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
with load(sys.argv[2]) as llm:
    print(status("VmHWM") - before, llm.plan.num_bytes)
"""


def write_large(folder: Path, stated: Mapping[str, Any], num_layers: int) -> int:
    """Write a llama with random words for weights, and return how many bytes of bfloat16 they stand for."""
    hidden, intermediate, group = 2048, 5632, stated["group_size"]
    config = {
        **CONFIG,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "num_hidden_layers": num_layers,
        "quantization_config": dict(stated),
    }
    tensors = {f"{name}.weight": torch.ones(VOCAB, hidden) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = torch.ones(hidden)
    sizes = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
    sizes |= {f"mlp.{part}_proj": (hidden, intermediate) for part in ("gate", "up")}
    sizes["mlp.down_proj"] = (intermediate, hidden)
    words = torch.randint(-(2**31), 2**31, (hidden * intermediate // 8,), dtype=torch.int64).to(torch.int32)
    for layer in range(num_layers):
        base = f"model.layers.{layer}"
        tensors |= {f"{base}.{norm}_layernorm.weight": torch.ones(hidden) for norm in ("input", "post_attention")}
        for name, (inputs, outputs) in sizes.items():
            count = inputs * outputs // 8
            shape = (inputs, outputs // 8) if stated["quant_method"] == "awq" else (inputs // 8, outputs)
            tensors[f"{base}.{name}.qweight"] = words[:count].view(shape).clone()
            tensors[f"{base}.{name}.qzeros"] = words[: inputs // group * outputs // 8].view(-1, outputs // 8).clone()
            tensors[f"{base}.{name}.scales"] = torch.full((inputs // group, outputs), 1e-3, dtype=torch.float16)
    write_folder(folder, tensors, config=config)
    return num_layers * sum(inputs * outputs for inputs, outputs in sizes.values()) * 2


@pytest.mark.parametrize("stated", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_no_dequantized_buffer_is_allocated(stated, tmp_path):
    """The peak of a load is the packed weights and little more: no layer's worth of them in bfloat16 would fit."""
    stated = {**stated, "group_size": 128}
    write_large(tmp_path / "one", stated, 1)
    dequantized = write_large(tmp_path / "large", stated, 5)
    command = [sys.executable, "-c", MEASURE, tmp_path / "one", tmp_path / "large"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, stored = (int(number) for number in printed.split())
    assert dequantized > stored + (300 << 20)
    assert peak < stored + (48 << 20), f"{peak >> 20} MiB for {stored >> 20} MiB of stored weights"


# ---------------------------------------------------------------- what inspect says


def test_inspect_says_what_stays_as_it_is_stored(tmp_path, capsys):
    stored, _ = without(SCHEMES["awq 32"], "v_proj")(tmp_path)
    assert main(["inspect", str(stored), "--backend", "cpu", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert f"; {4 * LAYERS} weights stay awq, {2 * LAYERS} are dequantized" in printed
    assert "model.layers.{0-1}.mlp.up_proj.weight:weight [256, 20] int32" in printed
