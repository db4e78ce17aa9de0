"""GGUF files that `gguf`'s own writer and quantizer made of a transformers model: its answers, and every refusal."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from infinilm import LLM
from infinilm.plugins import create_plugin_manager, trace_lineage
from infinilm_gguf_format.checkpoint import GgufCheckpoint
from infinilm_hookspecs import CheckpointError, ConfigError

README = Path(__file__).parent.parent / "README.md"
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
Metadata = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_file_is_left_open(tmp_path: Path) -> Iterator[None]:
    yield
    links = [os.path.join("/proc/self/fd", descriptor) for descriptor in os.listdir("/proc/self/fd")]
    assert not [os.readlink(link) for link in links if os.path.exists(link) and str(tmp_path) in os.readlink(link)]


# ---------------------------------------------------------------- writing files


def metadata_of(config: PreTrainedConfig) -> Metadata:
    """Return what llama.cpp's converter says of a model, without the architecture's name in front."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
    }


def write_model(
    path: Path, model: PreTrainedModel, kind: Kind = Kind.F32, metadata: Metadata | None = None, **tensors: Any
) -> Path:
    """Write a model as llama.cpp's converter does, and put in its place what dequantizing gives back.

    Matrices are of `kind`, the rest F32. `metadata` and `tensors` come on top.
    """
    family = model.config.model_type
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], model.config.num_hidden_layers)
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]]
    writer = gguf.GGUFWriter(path, architecture)
    stated = {f"{architecture}.{key}": value for key, value in metadata_of(model.config).items()}
    add_metadata(writer, {**stated, **(metadata or {})})
    state = dict(model.named_parameters())  # a tied one is named once
    for name, parameter in state.items():
        packed, values = quantize(parameter.detach().numpy(), kind if parameter.ndim > 1 else Kind.F32)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
        if architecture == "llama":
            packed = paired(packed, name, model.config)
        for theirs, array in renamed(name, packed, names):
            writer.add_tensor(theirs, array, raw_dtype=kind if parameter.ndim > 1 else Kind.F32)
    for name, array in tensors.items():
        writer.add_tensor(name.replace("__", "."), array)
    finish(writer)
    return path


def renamed(name: str, array: np.ndarray, names: gguf.TensorNameMap) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a tensor under GGUF's name; transformers keeps gate and up projections of experts as one."""
    if name.endswith("experts.gate_up_proj"):
        layer = name.split(".")[2]
        half = array.shape[1] // 2
        yield f"blk.{layer}.ffn_gate_exps.weight", np.ascontiguousarray(array[:, :half])
        yield f"blk.{layer}.ffn_up_exps.weight", np.ascontiguousarray(array[:, half:])
    elif name.endswith("experts.down_proj"):
        yield f"blk.{name.split('.')[2]}.ffn_down_exps.weight", array
    elif name.endswith("mlp.gate.weight"):
        yield f"blk.{name.split('.')[2]}.ffn_gate_inp.weight", array
    else:
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        yield theirs, array


def paired(array: np.ndarray, name: str, config: PreTrainedConfig) -> np.ndarray:
    """Return rows of q and k as `LlamaModel.permute` of convert_hf_to_gguf.py orders them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, count in heads.items():
        if projection in name:
            halves = array.reshape(count, 2, len(array) // count // 2, *array.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    return array


def quantize(values: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Return rows in `kind`, and what they are worth."""
    packed = gguf.quantize(values, kind)
    return packed, gguf.dequantize(packed.reshape(-1, packed.shape[-1]), kind).reshape(values.shape)


def add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tensors(path: Path, tensors: Mapping[str, tuple[np.ndarray, Kind]], **metadata: Any) -> Path:
    """Write a file of a few tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, metadata)
    for name, (packed, kind) in tensors.items():
        writer.add_tensor(name, packed, raw_dtype=kind)
    finish(writer)
    return path


def random_model(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    return oracle.write_checkpoint(folder, config)


def check_answers(path: Path, model: PreTrainedModel) -> LLM:
    subject = oracle.Subject(path, *oracle.examine(model, (1, 15, 45, 75)))
    llm = subject.load()
    assert llm.checkpoint.plugin == "gguf_format"
    oracle.check_parity(llm, subject.prompts, subject.expected)
    return llm


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
def test_answers_are_those_of_the_dequantized_weights(tmp_path: Path, kind: Kind) -> None:
    model = random_model(tmp_path / "hf", LlamaConfig(**SIZES))
    llm = check_answers(write_model(tmp_path / "model.gguf", model, kind), model)
    assert llm.lineage.plugins == ("gguf_format", "llama")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
THETA = {"rope_theta": 10000.0}
CASES: dict[str, tuple[PreTrainedConfig, Metadata]] = {
    "biases": (LlamaConfig(**SIZES, attention_bias=True), {}),
    "tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), {}),
    "wide_heads": (LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, head_dim=32), {}),
    "theta": (LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {}),
    "linear": (
        LlamaConfig(**SIZES, rope_parameters={**THETA, "rope_type": "linear", "factor": 4.0}),
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "yarn": (
        LlamaConfig(
            **SIZES,
            rope_parameters={**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 32,
            "llama.rope.scaling.finetuned": True,
        },
    ),
    "experts": (
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        {"llama.expert_count": 4, "llama.expert_used_count": 2},
    ),
    "qwen2": (Qwen2Config(**SIZES), {}),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_variants(tmp_path: Path, name: str) -> None:
    config, metadata = CASES[name]
    model = random_model(tmp_path / "hf", config)
    llm = check_answers(write_model(tmp_path / "model.gguf", model, metadata=metadata), model)
    assert llm.lineage.plugins == ("gguf_format", config.model_type)


def llama3_factors(head_dim: int) -> np.ndarray:
    """Return the factors of `CONFIG` from transformers' own frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3)), "cpu")
    plain = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return (plain / scaled).float().numpy()


def test_scaling_of_llama_3_follows_from_its_factors(tmp_path: Path) -> None:
    """The file has the factors alone; they are dropped as a tensor, and their scaling is in the config."""
    model = random_model(tmp_path / "hf", LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3)))
    path = write_model(tmp_path / "model.gguf", model, rope_freqs__weight=llama3_factors(16))
    llm = check_answers(path, model)
    assert set(llm.plan.dropped) == {"rope_freqs.weight"}


def test_other_factors_are_no_scaling_that_is_known(tmp_path: Path) -> None:
    model = random_model(tmp_path / "hf", LlamaConfig(**SIZES))
    path = write_model(tmp_path / "model.gguf", model, rope_freqs__weight=np.linspace(1, 8, 8, dtype=np.float32))
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight, 8 numbers up to 8, does not follow from the scaling"):
        LLM(path)


# ---------------------------------------------------------------- reading


def read(checkpoint: GgufCheckpoint, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
    stored = checkpoint.tensors[name]
    region = region if region is not None else tuple(slice(0, size) for size in stored.shape)
    out = torch.empty([s.stop - s.start for s in region], dtype=getattr(torch, stored.dtype))
    checkpoint.read(name, region, out)
    return out


# Types that `gguf` dequantizes; it quantizes few of them, so blocks of the others are random bytes.
QUANTIZED = [kind for kind in Kind if hasattr(gguf.quants, kind.name) and kind is not Kind.BF16]


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    tensors: dict[str, tuple[np.ndarray, Kind]] = {}
    for kind in QUANTIZED:
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (3, 4, 2 * block_bytes), dtype=np.uint8)
        tensors[kind.name] = (blocks, kind)
    return write_tensors(tmp_path_factory.mktemp("types") / "types.gguf", tensors)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_any_region_of_any_type(every_type: Path, kind: Kind, data: st.DataObject) -> None:
    whole = {tensor.name: tensor for tensor in gguf.GGUFReader(every_type).tensors}[kind.name]
    with np.errstate(all="ignore"), closing(GgufCheckpoint(every_type)) as checkpoint:
        expected = torch.from_numpy(gguf.dequantize(np.array(whole.data), kind))
        assert checkpoint.tensors[kind.name].shape == tuple(expected.shape)
        region = []
        for size in expected.shape:
            start = data.draw(st.integers(0, size))
            region.append(slice(start, data.draw(st.integers(start, size))))
        found = read(checkpoint, kind.name, tuple(region))
        assert torch.equal(found.view(torch.int32), expected[tuple(region)].contiguous().view(torch.int32))


def test_large_tensors_are_read_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infinilm_gguf_format.checkpoint._BLOCKS_AT_ONCE", 5)
    values = np.random.default_rng(0).standard_normal((37, 64), dtype=np.float32)
    packed, expected = quantize(values, Kind.Q8_0)
    with closing(GgufCheckpoint(write_tensors(tmp_path / "a.gguf", {"a": (packed, Kind.Q8_0)}))) as checkpoint:
        assert torch.equal(read(checkpoint, "a"), torch.from_numpy(expected))
        assert torch.equal(read(checkpoint, "a", (slice(1, 36), slice(5, 40))), torch.from_numpy(expected[1:36, 5:40]))


def test_extents_of_plain_types_are_where_the_bytes_lie(tmp_path: Path) -> None:
    tensors = {
        "f32": (np.random.default_rng(0).standard_normal((3, 5), dtype=np.float32), Kind.F32),
        "f16": (np.arange(6, dtype=np.float16).reshape(2, 3), Kind.F16),
        "bf16": (gguf.quantize(np.arange(6, dtype=np.float32).reshape(2, 3), Kind.BF16), Kind.BF16),
        "i32": (np.arange(4, dtype=np.int32), Kind.I32),
    }
    path = write_tensors(tmp_path / "plain.gguf", tensors)
    with closing(GgufCheckpoint(path)) as checkpoint:
        found = {name: (stored.shape, stored.dtype) for name, stored in checkpoint.tensors.items()}
        assert found == {
            "f32": ((3, 5), "float32"),
            "f16": ((2, 3), "float16"),
            "bf16": ((2, 3), "bfloat16"),
            "i32": ((4,), "int32"),
        }
        for name, (array, _) in tensors.items():
            extent = checkpoint.tensors[name].extent
            assert extent is not None
            assert path.read_bytes()[extent[1] : extent[1] + extent[2]] == array.tobytes()
            assert read(checkpoint, name).reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    packed, _ = quantize(np.ones((64, 64), dtype=np.float32), Kind.Q4_0)
    path = write_tensors(tmp_path / "a.gguf", {"a": (packed, Kind.Q4_0)})
    with closing(GgufCheckpoint(path)) as checkpoint:
        os.truncate(path, 300)
        with pytest.raises(CheckpointError, match=r"a\.gguf', tensor 'a' at offset \d+: the file is too short"):
            read(checkpoint, "a")


# ---------------------------------------------------------------- what it claims


def opened(source: Path) -> str | None:
    answer = create_plugin_manager().ask_one("open_checkpoint", source=str(source))
    if answer is not None:
        answer.value.close()
    return None if answer is None else answer.plugin


def test_claims_files_by_what_is_in_them(tmp_path: Path) -> None:
    assert opened(tmp_path) is None
    path = write_tensors(tmp_path / "a.gguf", {"a": (np.ones(4, dtype=np.float32), Kind.F32)})
    assert opened(tmp_path) == "gguf_format"
    assert opened(path) == "gguf_format"
    assert opened(path.rename(tmp_path / "no_suffix")) == "gguf_format"
    (tmp_path / "text.gguf").write_text("no")
    assert opened(tmp_path / "text.gguf") is None


def test_folder_with_several_files_says_to_choose(tmp_path: Path) -> None:
    for name in ("Q4_0.gguf", "Q8_0.gguf"):
        write_tensors(tmp_path / name, {"a": (np.ones(4, dtype=np.float32), Kind.F32)})
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path)
    assert str(caught.value) == f"'{tmp_path}' holds Q4_0.gguf, Q8_0.gguf; give one of them"
    random_model(tmp_path, LlamaConfig(**SIZES))
    assert opened(tmp_path) == "safetensors"


# ---------------------------------------------------------------- files that lie


def header(num_tensors: int = 0, num_keys: int = 0, rest: bytes = b"", *, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 2**60
LIES: list[tuple[str, bytes, str]] = [
    ("version 1", header(version=1), "it is of version 1, and one of (2, 3) is wanted"),
    ("big-endian", header(version=3 << 24), "it is big-endian"),
    ("nothing", b"GGUF", "4 bytes are wanted at byte 4, and it has 4"),
    ("tensors", header(HUGE), f"it claims {HUGE} tensors, and 8 bytes are left"),
    ("keys", header(0, HUGE), f"it claims {HUGE} keys of metadata, and 0 bytes are left"),
    ("a name", header(0, 1, struct.pack("<Q", HUGE) + bytes(20)), "bytes of the name of a key, and 20 bytes are left"),
    ("a string", header(0, 1, text(b"k") + struct.pack("<IQ", 8, HUGE)), f"it claims {HUGE} bytes of k"),
    ("an array", header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 0, HUGE)), f"it claims {HUGE} values of k"),
    ("strings", header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), f"it claims {HUGE} strings of k"),
    ("arrays of arrays", header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "'k' is an array of the type 9"),
    ("a type", header(0, 1, text(b"k") + struct.pack("<IQ", 77, 0)), "'k' is of the type 77"),
    ("twice", header(0, 2, 2 * (text(b"k") + struct.pack("<IB", 0, 1))), "it has the key 'k' twice"),
    ("no text", header(0, 1, text(b"\xff\xfe") + bytes(20)), "the name of a key is not UTF-8"),
    ("dimensions", header(1, 0, tensor(b"t", *(1,) * 9)), "tensor 't' has 9 dimensions"),
    ("a tensor type", header(1, 0, tensor(b"t", 4, kind=99)), "tensor 't' is of the type 99, which the gguf package"),
    (
        "half a block",
        header(1, 0, tensor(b"t", 33, kind=8)),
        "tensor 't' has rows of 33, and Q8_0 comes in blocks of 32",
    ),
    ("too large", header(1, 0, tensor(b"t", HUGE, HUGE)), "tensor 't' ends at byte"),
    ("far away", header(1, 0, tensor(b"t", 1, offset=HUGE)), "is it truncated?"),
    ("askew", header(1, 0, tensor(b"t", 1, offset=4) + bytes(99)), "begins at 4, which is no multiple of 32"),
    ("overlap", header(2, 0, tensor(b"a", 99) + tensor(b"b", 1, offset=32) + bytes(999)), "and tensor 'a' ends at"),
    ("two of a name", header(2, 0, tensor(b"a", 1) + tensor(b"a", 1, offset=32) + bytes(99)), "the tensor 'a' twice"),
    (
        "alignment",
        header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0)),
        "general.alignment is 0, and a power of two is wanted",
    ),
    (
        "alignment of text",
        header(0, 1, text(b"general.alignment") + struct.pack("<I", 8) + text(b"32")),
        "general.alignment is '32', and a power of two is wanted",
    ),
]


@pytest.mark.parametrize(("content", "message"), [pytest.param(c, m, id=name) for name, c, m in LIES])
def test_header_that_lies(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    assert str(caught.value).startswith(f"'{path}' is not a sound GGUF file: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_type_that_nobody_dequantizes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(header(1, 0, tensor(b"t", 32, kind=Kind.Q8_1)) + bytes(200))
    with pytest.raises(CheckpointError, match="gguf cannot dequantize 't', which is Q8_1"):
        opened(path)


def test_part_of_a_split_file_says_how_to_merge(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.gguf", {"a": (np.ones(4, dtype=np.float32), Kind.F32)}, **{"split.count": 3})
    with pytest.raises(CheckpointError, match="is one of 3 parts; make one file of them: llama-gguf-split --merge"):
        opened(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    packed, _ = quantize(np.ones((3, 32), dtype=np.float32), Kind.Q8_0)
    tensors = {"a": (packed, Kind.Q8_0), "rope_freqs.weight": (np.ones(4, dtype=np.float32), Kind.F32)}
    metadata = {"llama.block_count": 2, "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.0, 1.0]}
    return write_tensors(tmp_path_factory.mktemp("sound") / "a.gguf", tensors, **metadata).read_bytes()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_file_is_refused_or_as_long_as_it_says(
    tmp_path_factory: pytest.TempPathFactory, sound: bytes, data: st.DataObject
) -> None:
    content = bytearray(sound)
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with suppress(CheckpointError), np.errstate(all="ignore"), closing(GgufCheckpoint(path)) as checkpoint:
        for name, stored in checkpoint.tensors.items():
            assert read(checkpoint, name).shape == stored.shape


# ---------------------------------------------------------------- configs

SOUND = {
    "model_type": "gguf",
    "general.architecture": "llama",
    "vocab_size": 96,
    "tensors": {"output": True, "biases": False, "rope_freqs": None},
    **{f"llama.{key}": value for key, value in metadata_of(LlamaConfig(**SIZES)).items()},
}
PROBLEMS: list[tuple[Metadata, str]] = [
    ({"general.architecture": "gemma2"}, "general.architecture is 'gemma2'; known: llama, qwen2, qwen3"),
    ({"llama.block_count": None}, "llama.block_count is None, and a number is wanted"),
    ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count is (4, 4), and a number is wanted"),
    ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, and 16 is what is known"),
    ({"llama.attention.value_length": 8}, "llama.attention.value_length is 8, and 16 is what is known"),
    ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window is 64, and 0 is what is known"),
    ({"llama.logit_scale": 0.5}, "the file has llama.logit_scale, which this plugin does not know"),
    ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling is of the type 'longrope'"),
    ({"llama.rope.scaling.type": "linear"}, "known: linear with a factor"),
    (
        {
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.attn_factor": 0.5,
        },
        "with attn_factor, factor; known: linear",
    ),
    (
        {"general.architecture": "qwen3", **{k.replace("llama", "qwen3"): v for k, v in SOUND.items()}}
        | {"general.architecture": "qwen3", "qwen3.expert_count": 8},
        "qwen3.expert_count is 8, and experts are known of llama alone",
    ),
]


@pytest.mark.parametrize(("edit", "message"), PROBLEMS)
def test_metadata_that_would_change_what_is_computed(edit: Metadata, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trace_lineage(create_plugin_manager(), {**SOUND, **edit})
    assert message in str(caught.value)


def test_ends_of_texts_and_of_turns_both_end_a_sequence() -> None:
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7}
    adapted = trace_lineage(create_plugin_manager(), {**SOUND, **ids}).configs[1]
    assert (adapted["bos_token_id"], adapted["eos_token_id"]) == (1, (2, 7))  # type: ignore[index]  # a raw config


# ---------------------------------------------------------------- tokenizers

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Grüße aus Köln — ça va? 日本語",
    "12 345  x\n\ny don't IT'S",
] * 4
TEXTS = [
    *CORPUS[:3],
    "",
    " ",
    "  the",
    "the  ",
    "12345 678\n\n\n  the",
    "e\u0301 \u212b",
    "👩‍👩‍👧‍👦",
    "\x00\x7f\xa0",
    "<|user|>fox<|end|> the",
]
CHAT_TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"


def byte_level_metadata(pre: str) -> Metadata:
    """Train a byte-level BPE, and say of it what llama.cpp's converter says."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "<|begin|>", "<|end|>", "<|user|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_tokenizer(path: Path, metadata: Metadata) -> Path:
    model = random_model(path.parent / "hf", LlamaConfig(**SIZES))
    return write_model(path, model, metadata={**metadata, "general.name": "tiny"})


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_byte_level_tokens_are_those_that_transformers_makes_of_the_file(tmp_path: Path, pre: str) -> None:
    path = write_tokenizer(tmp_path / "model.gguf", byte_level_metadata(pre))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    with LLM(path) as llm:
        assert llm.processor is not None
        processor = llm.processor.value
    for given_text in TEXTS:
        if pre == "qwen2" and given_text == "e\u0301 \u212b":
            continue  # composed first, as Qwen2's own tokenizer does
        ids = theirs.encode(given_text, add_special_tokens=False)
        assert processor.encode(given_text, add_special_tokens=False) == ids, given_text
        assert processor.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    begins = processor.encode("fox") != processor.encode("fox", add_special_tokens=False)
    assert begins is (pre in ("llama-bpe", "tekken"))
    end = theirs.convert_tokens_to_ids("<|end|>")
    assert processor.eos_token_ids == {end}
    assert processor.render_chat([{"role": "user", "content": "hi"}]) == "<|user|>hi<|end|>"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_word_that_is_a_token_as_a_whole(tmp_path: Path, pre: str) -> None:
    """Of llama 3 and tekken it is that token, though no merges lead there (`ignore_merges` in llama.cpp)."""
    metadata = byte_level_metadata(pre)
    metadata["tokenizer.ggml.tokens"].append("\u0120zxqv")
    metadata["tokenizer.ggml.token_type"].append(1)
    path = write_tensors(tmp_path / "a.gguf", {"a": (np.ones(4, dtype=np.float32), Kind.F32)}, **metadata)
    with closing(GgufCheckpoint(path)) as checkpoint:
        tokens = Tokenizer.from_file(str(checkpoint.file("tokenizer.json"))).encode(" zxqv", add_special_tokens=False)
    assert (len(tokens.ids) == 1) is (pre in ("llama-bpe", "tekken"))


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentencepiece_tokens_are_sentencepieces(tmp_path: Path, has_prefix: bool) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "pieces"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=has_prefix,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "pieces.model"))
    ids = range(pieces.get_piece_size())
    kinds = {2: pieces.is_unknown, 3: pieces.is_control, 6: pieces.is_byte}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [next((k for k, is_it in kinds.items() if is_it(i)), 1) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": has_prefix,
    }
    with LLM(write_tokenizer(tmp_path / "model.gguf", metadata)) as llm:
        assert llm.processor is not None
        processor = llm.processor.value
    for given_text in TEXTS:
        expected = pieces.encode(given_text)
        assert processor.encode(given_text, add_special_tokens=False) == expected, given_text
        assert processor.encode(given_text) == [1, *expected]
        assert processor.decode(expected) == pieces.decode(expected)


def test_tokenizer_of_hugging_face_that_the_file_has_is_taken_as_it_is(tmp_path: Path) -> None:
    trained = Tokenizer(models.WordLevel({"<unk>": 0, "fox": 1}, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    with LLM(write_tokenizer(tmp_path / "model.gguf", {"tokenizer.huggingface.json": trained.to_str()})) as llm:
        assert llm.processor is not None
        assert llm.processor.value.encode("fox dog") == [1, 0]


def test_file_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    with LLM(write_tokenizer(tmp_path / "model.gguf", {})) as llm:
        assert llm.processor is None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'; known: gpt2, llama"),
        ({"tokenizer.ggml.pre": "odd"}, "tokenizer.ggml.pre is 'odd'; how words are cut is known of gpt-2, llama-bpe"),
        ({"tokenizer.ggml.merges": ["a a a"]}, "its tokens are no tokenizer: "),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "it lists 2 tokens, 1 of them different"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens is no list of strings"),
        ({"tokenizer.ggml.model": "llama"}, "it lists 0 scores for"),
    ],
)
def test_tokenizer_that_cannot_be_made(tmp_path: Path, edit: Metadata, message: str) -> None:
    metadata = {**byte_level_metadata("gpt-2"), **edit}
    path = write_tensors(tmp_path / "a.gguf", {"a": (np.ones(4, dtype=np.float32), Kind.F32)}, **metadata)
    with closing(GgufCheckpoint(path)) as checkpoint, pytest.raises(CheckpointError) as caught:
        checkpoint.file("tokenizer.json")
    assert str(caught.value).startswith(f"'{path}': {message}")
    assert str(caught.value).endswith("; take another tokenizer with --tokenizer")


def test_files_that_were_made_go_with_the_checkpoint(tmp_path: Path) -> None:
    path = write_tensors(
        tmp_path / "a.gguf", {"a": (np.ones(4, dtype=np.float32), Kind.F32)}, **byte_level_metadata("gpt-2")
    )
    checkpoint = GgufCheckpoint(path)
    made = checkpoint.file("tokenizer.json")
    assert made is not None
    assert made == checkpoint.file("tokenizer.json")
    assert checkpoint.file("config.json") is None
    checkpoint.close()
    assert not made.parent.exists()


# ---------------------------------------------------------------- the rest


def test_export_is_what_transformers_reads(tmp_path: Path) -> None:
    model = random_model(tmp_path / "hf", LlamaConfig(**SIZES))
    path = write_model(tmp_path / "model.gguf", model, Kind.Q8_0, byte_level_metadata("llama-bpe"))
    with LLM(path) as llm:
        llm.export(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = dict(exported.named_parameters())
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|end|>")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|user|>hi<|end|>"


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, infinilm_gguf_format as plugin\nplugin.open_checkpoint('.')\n"
        "print({'torch', 'transformers', 'numpy', 'gguf', 'tokenizers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_command_of_the_readme_inspects_a_file(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "model.gguf", byte_level_metadata("gpt-2"))
    (line,) = [line for line in README.read_text().splitlines() if line.startswith("$ infinilm inspect")]
    words = line.removeprefix("$ infinilm ").replace("MODEL.gguf", str(path)).split()
    done = subprocess.run([sys.executable, "-m", "infinilm", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gguf_format" in done.stdout
