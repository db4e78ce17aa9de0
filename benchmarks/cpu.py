"""The cpu backend against its peers, in alternation: llama.cpp, torch, and the memory bandwidth of the same moment.

    python benchmarks/cpu.py [--llama PYTHON] [--torch] [--models NAME ...] [--weights KIND ...] [--rounds N] ...

`--llama` is a Python that has `llama-cpp-python`, built from its sdist on this machine, and `gguf`: a benchmark-only
extra that needs no place in infinilm's own environment. Every engine is a process of its own with as many threads as it
may use, all have the same random weights, and they take turns, round by round: figures are medians, and ratios those of
one round, because a machine that others use is as fast as they let it be. An engine that waits sleeps.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

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
LLAMA_WEIGHTS = {"bf16": None, "int8": 7, "int4": 2}  # llama_ftype: MOSTLY_Q8_0, MOSTLY_Q4_0
PROMPT, DEEP, STEPS = 512, 2048, 12
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

    def step(self, lengths: list[tuple[int, int]]) -> None:
        """Run new tokens of sequences: so many are there, so many are new. Only the last one's logits are wanted."""
        from infinilm_hookspecs import ForwardBatch

        int32 = np.int32
        each = -(-max(there + new for there, new in lengths) // self._block)
        if len(lengths) > 1:
            each = -(-(REQUEST_PROMPT + REQUEST_TOKENS) // self._block)
        tables = np.arange(len(lengths) * each, dtype=int32).reshape(len(lengths), each)
        positions = np.concatenate([np.arange(there, there + new, dtype=int32) for there, new in lengths])
        rows = np.repeat(np.arange(len(lengths)), [new for _, new in lengths])
        starts = np.cumsum([0, *(new for _, new in lengths)], dtype=int32)
        self._backend.forward(
            ForwardBatch(
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
        )

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

        return TorchBackend(config, dtype="bfloat16", device="cpu")

    from infinilm.native.libraries import open_library
    from infinilm.native.paths import library_path
    from infinilm.platforms.cpu import CpuPlatform
    from infinilm_hookspecs import BackendRequest

    request = BackendRequest(
        lineage=(config,),
        checkpoint=SimpleNamespace(config={}, tensors={}, quantization=None, trust="data"),  # type: ignore[arg-type]
        platform=CpuPlatform(),
        device="cpu",
        dtype="bfloat16",
        quantization=None if weights == "bf16" else weights,
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

    def step(self, lengths: list[tuple[int, int]]) -> None:
        batch, row = self._batch, 0
        for sequence, (there, new) in enumerate(lengths):
            for position in range(there, there + new):
                batch.token[row], batch.pos[row] = token(position), position
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = position == there + new - 1
                row += 1
        batch.n_tokens = row
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
    kind = LLAMA_WEIGHTS[weights]
    if kind is None:
        return plain
    path = folder / f"{weights}.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = kind, num_threads()
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
    """Return tokens per second: of a prompt, of decoding behind a prompt, of what 16 requests generate."""
    engine.forget()
    started = time.perf_counter()
    if task == "prompt":
        engine.step([(0, PROMPT)])
        return PROMPT / (time.perf_counter() - started)
    if task == "batch":
        engine.step([(0, REQUEST_PROMPT)] * REQUESTS)
        for index in range(1, REQUEST_TOKENS):
            engine.step([(REQUEST_PROMPT + index - 1, 1)] * REQUESTS)
        return REQUESTS * REQUEST_TOKENS / (time.perf_counter() - started)
    depth = DEEP if task == "deep" else 32
    for start in range(0, depth, PROMPT):
        engine.step([(start, min(PROMPT, depth - start))])
    seconds = []
    for index in range(STEPS):
        started = time.perf_counter()
        engine.step([(depth + index, 1)])
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds)


def work(arguments: argparse.Namespace) -> None:
    shape = SHAPES[arguments.models[0]]
    engine: Any
    if arguments.worker == "llama":
        engine = LlamaCpp(shape, arguments.weights[0], Path(arguments.folder), is_plain=arguments.llama_plain)
    else:
        engine = Infinilm(arguments.worker, shape, arguments.weights[0], arguments.library)
    print("ready", flush=True)
    for line in sys.stdin:
        print(measure(engine, line.strip()), flush=True)


# ---------------------------------------------------------------- taking turns


@contextlib.contextmanager
def worker(engine: str, model: str, weights: str, arguments: argparse.Namespace, folder: Path) -> Iterator[Any]:
    python = arguments.llama if engine == "llama" else sys.executable
    command = [python, __file__, "--worker", engine, "--models", model, "--weights", weights, "--folder", str(folder)]
    if arguments.library:
        command += ["--library", arguments.library]
    if arguments.llama_plain:
        command.append("--llama-plain")
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if arguments.verbose else subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(task: str | None) -> float:
        if task is not None:
            process.stdin.write(f"{task}\n")
            process.stdin.flush()
        answer = process.stdout.readline().strip()
        if not answer:
            sys.exit(f"the {engine} worker ended; see what it says with --verbose")
        return 0.0 if answer == "ready" else float(answer)

    ask(None)
    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait()


def bandwidth(arguments: argparse.Namespace) -> float:
    """Return the GB/s that as many threads read from memory now; 0 where the tool was not built."""
    tool = Path(arguments.tools) / "kernel_benchmark"
    if not tool.exists():
        return 0.0
    done = subprocess.run([tool, "read", str(num_threads()), "512"], capture_output=True, text=True, check=True)
    return float(done.stdout)


def compare(model: str, weights: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    engines = [
        "cpu",
        *(["llama"] if arguments.llama else []),
        *(["torch"] if weights == "bf16" and arguments.torch else []),
    ]
    results: dict[str, dict[str, list[float]]] = {task: {engine: [] for engine in engines} for task in arguments.tasks}
    reads = []
    with contextlib.ExitStack() as stack:
        asks = {engine: stack.enter_context(worker(engine, model, weights, arguments, folder)) for engine in engines}
        for _ in range(arguments.rounds):
            for task in arguments.tasks:
                for engine, ask in asks.items():
                    if engine == "torch" and task in ("deep", "batch"):
                        continue
                    results[task][engine].append(ask(task))
                    print(
                        f"{model} {weights} {task} {engine} {results[task][engine][-1]:.1f}",
                        file=sys.stderr,
                        flush=True,
                    )
                if task in ("decode", "deep"):
                    reads.append(bandwidth(arguments))
    return {"model": model, "weights": weights, "tokens_per_second": results, "read_gb_per_second": reads}


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}, {result['weights']}: median tokens/s, and of each round's ratio cpu / peer the median")
    for task, by_engine in result["tokens_per_second"].items():
        parts = []
        for engine, values in by_engine.items():
            if not values:
                continue
            part = f"{engine} {statistics.median(values):.1f} (best {max(values):.1f})"
            if engine != "cpu":
                ratios = [mine / theirs for mine, theirs in zip(by_engine["cpu"], values, strict=True)]
                part += f" x{statistics.median(ratios):.2f}"
            parts.append(part)
        print(f"  {task:7} {', '.join(parts)}")
    reads = [read for read in result["read_gb_per_second"] if read]
    if reads and "decode" in result["tokens_per_second"]:
        speed = result["tokens_per_second"]["decode"]["cpu"]
        size = parameter_bytes(result["model"], result["weights"])
        print(
            f"  decode reads {size / 1e9:.3f} GB a token: {statistics.median(speed) * size / 1e9:.1f} GB/s (best "
            f"{max(speed) * size / 1e9:.1f}), and plain reading {statistics.median(reads):.1f} (best {max(reads):.1f})"
        )


def parameter_bytes(model: str, weights: str) -> float:
    """Return the bytes of weights that one token needs: all but an embedding that is not tied."""
    shape = SHAPES[model]
    head_dim = shape["hidden"] // shape["heads"]
    attention = shape["hidden"] * head_dim * 2 * (shape["heads"] + shape["kv_heads"])
    layers = shape["layers"] * (attention + 3 * shape["hidden"] * shape["intermediate"])
    bits = {"bf16": 16, "int8": 8.5, "int4": 4.5}
    head_bits = 16 if weights == "bf16" else 8.5
    return float(layers * bits[weights] / 8 + shape["vocab"] * shape["hidden"] * head_bits / 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="a Python with llama-cpp-python and gguf; without it llama.cpp is left out")
    parser.add_argument("--llama-plain", action="store_true", help="without its repacked weights and AMX")
    parser.add_argument("--torch", action="store_true", help="measure infinilm's torch backend as well, in bf16")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen2-0.5b", "llama-1.1b"])
    parser.add_argument("--weights", nargs="+", choices=LLAMA_WEIGHTS, default=list(LLAMA_WEIGHTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--library", help="another build of the cpu backend than the installed one")
    parser.add_argument("--tools", default="build/cpu/tests", help="where kernel_benchmark was built")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--verbose", action="store_true", help="show what workers say")
    parser.add_argument("--worker", choices=["cpu", "torch", "llama"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    results = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            for weights in arguments.weights:
                results.append(compare(model, weights, arguments, Path(arguments.folder or folder)))
                show(results[-1])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
