"""The engines that benchmarks/cpu.py compares, each a worker process: the same random weights, tasks and batches."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from infinilm_hookspecs import ForwardBatch

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "arch": "qwen2",
        "layers": 24,
        "hidden": 896,
        "heads": 14,
        "kv_heads": 2,
        "intermediate": 4864,
        "vocab": 151936,
        "tied": True,
        "theta": 1e6,
    },
    "llama-1.1b": {
        "arch": "llama",
        "layers": 16,
        "hidden": 2048,
        "heads": 32,
        "kv_heads": 8,
        "intermediate": 8192,
        "vocab": 32000,
        "tied": False,
        "theta": 1e4,
    },
    "tiny": {
        "arch": "qwen2",
        "layers": 2,
        "hidden": 256,
        "heads": 4,
        "kv_heads": 2,
        "intermediate": 512,
        "vocab": 1024,
        "tied": True,
        "theta": 1e6,
    },
}
WEIGHTS = ("f32", "bf16", "int8", "int4")
LLAMA_TYPES = {"f32": 0, "int8": 7, "int4": 2}  # llama_ftype: ALL_F32, MOSTLY_Q8_0, MOSTLY_Q4_0
PROMPT, DEEP, STEPS = 512, 2048, 24
REQUESTS, REQUEST_PROMPT, REQUEST_TOKENS = 16, 128, 64
TASKS = ("prompt", "decode", "deep", "batch")


def num_threads() -> int:
    return len(os.sched_getaffinity(0))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return the weights that both engines have under a canonical name, float32."""
    if "norm" in name:
        return np.ones(shape, np.float32)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.standard_normal(shape, np.float32) * np.float32(0.02)


def token(index: int) -> int:
    return (index * 7919 + 13) % 1000


# ---------------------------------------------------------------- infinilm


class Infinilm:
    """A backend of infinilm's, driven as the engine drives it: blocks, slots, and one step at a time."""

    def __init__(self, backend_name: str, shape: dict[str, Any], weights: str, library: str | None) -> None:
        import torch

        self._torch = torch
        torch.set_num_threads(num_threads())
        config = _config(shape)
        self._backend = _backend(backend_name, config, weights, library)
        for name, spec in self._backend.parameters().items():
            if spec.tied_to is None:
                self._backend.destination(name).copy_(torch.from_numpy(weight(name, spec.shape)))
                self._backend.loaded(name)
        self._backend.finish_loading()
        self._block = self._backend.cache_spec().block_size
        self._blocks_each = -(-(DEEP + 2 * STEPS + 8) // self._block)
        few = -(-(REQUEST_PROMPT + REQUEST_TOKENS) // self._block)
        self._backend.allocate_cache(max(self._blocks_each, REQUESTS * few), REQUESTS)

    def prepare(self, lengths: list[tuple[int, int]]) -> ForwardBatch:
        """Return a step: of each sequence so many tokens are there, so many new. The last one's logits are wanted."""
        from infinilm_hookspecs import ForwardBatch

        int32 = np.int32
        each = -(-max(there + new for there, new in lengths) // self._block)
        if len(lengths) > 1:
            each = -(-(REQUEST_PROMPT + REQUEST_TOKENS) // self._block)
        tables = np.arange(len(lengths) * each, dtype=int32).reshape(len(lengths), each)
        positions = np.concatenate([np.arange(there, there + new, dtype=int32) for there, new in lengths])
        rows = np.repeat(np.arange(len(lengths)), [new for _, new in lengths])
        starts = np.cumsum([0, *(new for _, new in lengths)], dtype=int32)
        return ForwardBatch(
            token_ids=np.array([token(int(position)) for position in positions], int32),
            positions=positions,
            query_starts=starts,
            context_lengths=np.array([there + new for there, new in lengths], int32),
            block_tables=tables,
            slot_mapping=tables[rows, positions // self._block] * self._block + positions % self._block,
            slots=np.arange(len(lengths), dtype=int32),
            logits_indices=(starts[1:] - 1).astype(int32),
            extras=[None] * len(lengths),
            prompt_lengths=np.array([there + new for there, new in lengths], int32),
        )

    def run(self, batch: ForwardBatch) -> None:
        self._backend.forward(batch)

    def forget(self) -> None:
        """Nothing to do: blocks are written over."""


def _config(shape: dict[str, Any]) -> Any:
    from infinilm_hookspecs import (
        AttentionConfig,
        DecoderConfig,
        EmbeddingConfig,
        LayerConfig,
        LayerNorms,
        LogitsConfig,
        MlpConfig,
        NormConfig,
        RopeConfig,
    )

    head_dim = shape["hidden"] // shape["heads"]
    mixer = AttentionConfig(
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_dim=head_dim,
        rope=RopeConfig(theta=shape["theta"]),
        qkv_bias=shape["arch"] == "qwen2",
    )
    norms = LayerNorms(before_mixer=NormConfig(), before_mlp=NormConfig())
    layer = LayerConfig(mixer=mixer, mlp=MlpConfig(shape["intermediate"]), norms=norms)
    return DecoderConfig(
        model_type=shape["arch"],
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        layers=(layer,) * shape["layers"],
        embedding=EmbeddingConfig(tied=shape["tied"]),
        final_norm=NormConfig(),
        logits=LogitsConfig(),
        max_position_embeddings=32768,
    )


def _backend(name: str, config: Any, weights: str, library: str | None) -> Any:
    if name == "torch":
        from infinilm.backends.torch.backend import TorchBackend

        return TorchBackend(config, dtype="float32" if weights == "f32" else "bfloat16", device="cpu")

    from infinilm.native.libraries import open_library
    from infinilm.native.paths import library_path
    from infinilm.platforms.cpu import CpuPlatform
    from infinilm_hookspecs import BackendRequest

    request = BackendRequest(
        lineage=(config,),
        checkpoint=SimpleNamespace(config={}, tensors={}, quantization=None, trust="data"),  # type: ignore[arg-type]
        platform=CpuPlatform(),
        device="cpu",
        dtype="float32" if weights == "f32" else "bfloat16",
        quantization=weights if weights.startswith("int") else None,
        trust_remote_code=False,
        rank=0,
        world_size=1,
        max_model_len=DEEP + 64,
        max_num_seqs=REQUESTS,
        on_decline=sys.exit,
    )
    return open_library(library or library_path("infinilm_cpu")).provide_backend(request)


# ---------------------------------------------------------------- llama.cpp


class LlamaCpp:
    """llama.cpp through its C functions: the same batches, without sampling."""

    def __init__(self, shape: dict[str, Any], weights: str, folder: Path, *, is_plain: bool) -> None:
        import llama_cpp

        self._lib = llama_cpp
        path = _gguf(shape, weights, folder)
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False
        options.use_extra_bufts = not is_plain
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = max(DEEP + 64, REQUESTS * (REQUEST_PROMPT + REQUEST_TOKENS))
        context.n_batch = context.n_ctx
        context.n_ubatch = 512
        context.n_seq_max = REQUESTS
        context.kv_unified = True
        context.n_threads = context.n_threads_batch = num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._batch = llama_cpp.llama_batch_init(context.n_ctx, 0, REQUESTS)

    def prepare(self, lengths: list[tuple[int, int]]) -> Any:
        batch, row = self._batch, 0
        for sequence, (there, new) in enumerate(lengths):
            for position in range(there, there + new):
                batch.token[row], batch.pos[row] = token(position), position
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = position == there + new - 1
                row += 1
        batch.n_tokens = row
        return batch

    def run(self, batch: Any) -> None:
        if self._lib.llama_decode(self._context, batch):
            sys.exit("llama_decode failed")
        self._lib.llama_get_logits(self._context)  # waits for what is not done

    def forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)


def _gguf(shape: dict[str, Any], weights: str, folder: Path) -> Path:
    """Write the model as bf16, and let llama.cpp quantize it as its users do."""
    import llama_cpp

    plain = folder / "bf16.gguf"
    if not plain.exists():
        _write_gguf(shape, plain)
    if weights == "bf16":
        return plain
    path = folder / f"{weights}.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = LLAMA_TYPES[weights], num_threads()
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(options)):
        sys.exit("llama_model_quantize failed")
    return path


def _write_gguf(shape: dict[str, Any], path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, shape["arch"])
    writer.add_context_length(32768)
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["intermediate"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_rope_freq_base(shape["theta"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(32)
    writer.add_vocab_size(shape["vocab"])
    writer.add_tokenizer_model("no_vocab")
    head_dim = shape["hidden"] // shape["heads"]
    queries, keys = shape["heads"] * head_dim, shape["kv_heads"] * head_dim
    hidden, wide = shape["hidden"], shape["intermediate"]

    def put(theirs: str, ours: str, *size: int) -> None:
        values = weight(ours, size)
        if len(size) == 1:
            writer.add_tensor(theirs, values)
        else:
            raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(theirs, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    put("token_embd.weight", "model.embed_tokens.weight", shape["vocab"], hidden)
    put("output_norm.weight", "model.norm.weight", hidden)
    if not shape["tied"]:
        put("output.weight", "lm_head.weight", shape["vocab"], hidden)
    for index in range(shape["layers"]):
        theirs, ours = f"blk.{index}", f"model.layers.{index}"
        put(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight", hidden)
        put(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", hidden)
        for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
            put(f"{theirs}.attn_{letter}.weight", f"{ours}.self_attn.{letter}_proj.weight", rows, hidden)
            if shape["arch"] == "qwen2":
                put(f"{theirs}.attn_{letter}.bias", f"{ours}.self_attn.{letter}_proj.bias", rows)
        put(f"{theirs}.attn_output.weight", f"{ours}.self_attn.o_proj.weight", hidden, queries)
        for part in ("gate", "up"):
            put(f"{theirs}.ffn_{part}.weight", f"{ours}.mlp.{part}_proj.weight", wide, hidden)
        put(f"{theirs}.ffn_down.weight", f"{ours}.mlp.down_proj.weight", hidden, wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------- tasks, in a worker


def measure(engine: Any, task: str) -> float:
    """Return tokens per second of steps: of a prompt, of decoding behind a prompt, of what 16 requests generate."""

    def seconds(lengths: list[tuple[int, int]]) -> float:
        batch = engine.prepare(lengths)
        started = time.perf_counter()
        engine.run(batch)
        return time.perf_counter() - started

    engine.forget()
    if task == "prompt":
        return PROMPT / seconds([(0, PROMPT)])
    if task == "batch":
        spent = seconds([(0, REQUEST_PROMPT)] * REQUESTS)
        spent += sum(seconds([(REQUEST_PROMPT + index - 1, 1)] * REQUESTS) for index in range(1, REQUEST_TOKENS))
        return REQUESTS * REQUEST_TOKENS / spent
    depth = DEEP if task == "deep" else 32
    for start in range(0, depth, PROMPT):
        seconds([(start, min(PROMPT, depth - start))])
    return 1 / statistics.median(seconds([(depth + index, 1)]) for index in range(STEPS))


def work(name: str, model: str, weights: str, folder: Path, *, library: str | None, is_plain: bool) -> None:
    """Build an engine, and answer each task named on standard input with its tokens per second."""
    engine: Any
    if name == "llama":
        engine = LlamaCpp(SHAPES[model], weights, folder, is_plain=is_plain)
    else:
        engine = Infinilm(name, SHAPES[model], weights, library)
    print("ready", flush=True)
    for line in sys.stdin:
        print(measure(engine, line.strip()), flush=True)
