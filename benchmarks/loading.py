"""Loading against its peers, in alternation: `preadv` of the same file by as many threads, safetensors, transformers.

    python benchmarks/loading.py [--runs N] [--gigabytes X] [--json PATH]

Every measurement is a process of its own, so that peak memory is its own too; files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SETUP = '''
import os, subprocess, sys, time
from pathlib import Path
folder, num_threads = Path(sys.argv[1]), len(os.sched_getaffinity(0))
path = folder / "model.safetensors"

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

owned_bytes = 0

def start():
    """Return the memory held, and the time. With `owned_bytes`, have the system free as many in large pages before."""
    if owned_bytes:
        subprocess.run([sys.executable, "-c", OWN, str(owned_bytes)], check=True)
    return rss(), time.perf_counter()

OWN = """
import mmap, sys
with mmap.mmap(-1, int(sys.argv[1]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
    pages.madvise(mmap.MADV_HUGEPAGE)
    for page in range(0, len(pages), mmap.PAGESIZE):
        pages[page] = 1
"""

def report(seconds, before):
    # Not ru_maxrss: a new process begins with that of the one that started it.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(seconds, int(status["VmHWM"].split()[0]) * 1024 - before)
'''

PREADV = """
import torch
from concurrent.futures import ThreadPoolExecutor
before, started = rss(), time.perf_counter()
size, step = path.stat().st_size, 16 << 20
descriptor, buffer = os.open(path, os.O_RDONLY), torch.empty(path.stat().st_size, dtype=torch.uint8).numpy().data

def read(offset):
    done, wanted = 0, min(step, size - offset)
    while done < wanted:
        done += os.preadv(descriptor, [buffer[offset + done : offset + wanted]], offset + done)

with ThreadPoolExecutor(num_threads) as pool:
    list(pool.map(read, range(0, size, step)))
report(time.perf_counter() - started, before)
"""

SAFETENSORS = """
import torch
from safetensors.torch import load_file
before, started = rss(), time.perf_counter()
tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
report(time.perf_counter() - started, before)
"""

TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM
before, started = rss(), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
report(time.perf_counter() - started, before)
"""

INFINILM = """
import torch
from infinilm import pipeline
from infinilm.backends.torch.backend import TorchBackend
from infinilm.loading.execute import load
from infinilm.plugins import create_plugin_manager, trace_lineage
from infinilm_hookspecs import hookimpl

class Idle:
    @hookimpl
    def adapt_config(self, config): ...
    @hookimpl
    def remap_weight(self, config): ...

pm = create_plugin_manager(autoload=False)
for index in range(NUM_PLUGINS):
    pm.register(Idle(), f"idle{index}")
before, started = start()
checkpoint = pipeline.open_checkpoint(pm, str(folder)).value
lineage = trace_lineage(pm, checkpoint.config)
platform = pipeline.select_platform(pm).value
request = pipeline.make_request(
    lineage, checkpoint, platform, device="auto", dtype=DTYPE, max_model_len=None, max_num_seqs=1,
    quantization=QUANTIZATION,
)
choice = pipeline.choose_backend(pm, request, BACKEND)
plan = pipeline.make_plan(pm, checkpoint, lineage, choice)
load(plan, checkpoint, choice.backend)
report(time.perf_counter() - started, before)
"""


RANK = """
import torch
from infinilm import pipeline
from infinilm.loading.chunks import cut_chunks
from infinilm.loading.execute import CHUNK_BYTES
from infinilm.loading.ranks import rank_slices
from infinilm.loading.values import fill, torch_dtype
from infinilm.plugins import create_plugin_manager, trace_lineage

pm = create_plugin_manager(autoload=False)
checkpoint = pipeline.open_checkpoint(pm, str(folder)).value
lineage = trace_lineage(pm, checkpoint.config)
platform = pipeline.select_platform(pm).value
request = pipeline.make_request(
    lineage, checkpoint, platform, device="auto", dtype="auto", max_model_len=None, max_num_seqs=1
)
plan = pipeline.make_plan(pm, checkpoint, lineage, pipeline.choose_backend(pm, request, "torch"))
plan.check()
num_read = num_kept = 0
preadv = os.preadv

def counting(descriptor, buffers, offset):
    global num_read
    count = preadv(descriptor, buffers, offset)
    num_read += count
    return count

def read(name, region):
    out = torch.empty([s.stop - s.start for s in region], dtype=torch_dtype(checkpoint.tensors[name].dtype))
    checkpoint.read(name, region, out)
    return out

os.preadv = counting
for parameter in plan.parameters:
    if parameter.spec.shard is not None and parameter.spec.shard.dim == 0:
        for part in rank_slices(parameter, 3, 8):
            buffer = torch.empty(part.shape, dtype=torch_dtype(parameter.spec.dtype))
            num_kept += buffer.nbytes
            for chunk, target in cut_chunks(part, buffer, CHUNK_BYTES):
                fill(chunk, target, read)
print(num_read / num_kept, num_kept)
"""

PLAN_TRANSFORMERS = """
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
config = AutoConfig.from_pretrained(folder / "family")
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
tensors = {}
for file in sorted(folder.glob("*.safetensors")):
    tensors |= load_file(file)
before, started = rss(), time.perf_counter()
mapping = get_model_conversion_mapping(model, key_mapping={"^m[.]": "model.", "^head": "lm_head"})
info, _ = convert_and_load_state_dict_in_model(model, tensors, LoadStateDictConfig(weight_mapping=mapping))
assert not info.unexpected_keys, sorted(info.unexpected_keys)[:3]
report(time.perf_counter() - started, before)
"""

PLAN_INFINILM = """
from infinilm import pipeline
from infinilm.backends.torch.backend import TorchBackend
from infinilm.plugins import create_plugin_manager, trace_lineage
from infinilm_hookspecs import hookimpl

class Idle:
    @hookimpl
    def adapt_config(self, config): ...
    @hookimpl
    def remap_weight(self, config): ...

class Foreign:
    @hookimpl
    def adapt_config(self, config):
        return {**config, "model_type": "mixtral"} if config["model_type"] == "foreign" else None
    @hookimpl
    def remap_weight(self, config):
        def rename(weight):
            name = weight.name
            return weight.rename("model." + name[2:] if name.startswith("m.") else "lm_head.weight")
        return rename if config["model_type"] == "foreign" else None

pm = create_plugin_manager(autoload=False)
for index in range(9):
    pm.register(Idle(), f"idle{index}")
pm.register(Foreign(), "foreign")
num_tensor_bytes = 0
preadv = os.preadv

def counting(descriptor, buffers, offset):
    global num_tensor_bytes
    num_tensor_bytes += sum(len(buffer) for buffer in buffers)
    return preadv(descriptor, buffers, offset)

os.preadv = counting
before, started = rss(), time.perf_counter()
checkpoint = pipeline.open_checkpoint(pm, str(folder)).value
lineage = trace_lineage(pm, checkpoint.config)
platform = pipeline.select_platform(pm).value
request = pipeline.make_request(
    lineage, checkpoint, platform, device="auto", dtype="auto", max_model_len=None, max_num_seqs=1
)
choice = pipeline.choose_backend(pm, request, "torch")
plan = pipeline.make_plan(pm, checkpoint, lineage, choice)
seconds = time.perf_counter() - started
plan.check()
assert len(checkpoint.tensors) == 100_836 and num_tensor_bytes == 0, num_tensor_bytes
report(seconds, before)
"""


def make_many_tensors(folder: Path) -> None:
    """Write 100,836 tiny tensors of a mixtral of 87 layers and 384 experts, by foreign names, in 64 files."""
    import torch
    from safetensors.torch import save_file

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    config = {"vocab_size": 8, "num_hidden_layers": 87, "num_local_experts": 384, "dtype": "bfloat16", **sizes}
    square, norm = torch.zeros(8, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    tensors = {"m.embed_tokens.weight": square, "m.norm.weight": norm, "head.weight": square}
    for layer in range(87):
        prefix = f"m.layers.{layer}"
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": square for name in "qkvo"}
        tensors |= {f"{prefix}.{name}.weight": norm for name in ("input_layernorm", "post_attention_layernorm")}
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = torch.zeros(384, 8, dtype=torch.bfloat16)
        for expert in range(384):
            for name in ("w1", "w2", "w3"):
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = square
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for number in range(64):
        file, mine = f"model-{number + 1:05}-of-00064.safetensors", names[number::64]
        save_file({name: tensors[name].clone() for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", **config}))
    (folder / "family").mkdir()
    (folder / "family" / "config.json").write_text(json.dumps({"model_type": "mixtral", **config}))


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write a random llama of about `gigabytes` in bfloat16, and return its bytes."""
    import torch
    from safetensors.torch import save_file

    hidden, intermediate, vocab = 2048, 5632, 32000
    per_layer = 2 * (2 * hidden * hidden + 2 * 1024 * hidden + 3 * hidden * intermediate)
    num_layers = max(1, round((gigabytes * 1e9 - 4 * vocab * hidden) / per_layer))
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    for layer in range(num_layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (1024, hidden),
                "self_attn.v_proj": (1024, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        }
    tensors = {f"{name}.weight": torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


def measure(code: str, folder: Path, **names: Any) -> tuple[float, int]:
    """Run one measurement in a process of its own and return its two numbers: seconds, and bytes above the start."""
    seconds, memory = words_of(code, folder, **names)[-2:]
    return float(seconds), int(memory)


def words_of(code: str, folder: Path, **names: Any) -> list[str]:
    """Run code behind `SETUP` in a process of its own, with `names` set, and return the words it printed."""
    given = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    command = [sys.executable, "-c", f"{SETUP}\n{given}\n{code}", str(folder)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.split()


PLAIN: dict[str, Any] = {"BACKEND": "torch", "QUANTIZATION": None, "DTYPE": "bfloat16", "NUM_PLUGINS": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "preadv": (PREADV, {}),
    "safetensors": (SAFETENSORS, {}),
    "transformers": (TRANSFORMERS, {"DTYPE": "bfloat16"}),
    "infinilm": (INFINILM, PLAIN),
    "infinilm, 20 plugins": (INFINILM, {**PLAIN, "NUM_PLUGINS": 20}),
    "transformers, to float32": (TRANSFORMERS, {"DTYPE": "float32"}),
    "infinilm, to float32": (INFINILM, {**PLAIN, "DTYPE": "float32"}),
}


def main() -> None:
    """Measure, print a table, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        num_bytes = make_checkpoint(Path(name), arguments.gigabytes)
        found: dict[str, list[tuple[float, int]]] = {case: [] for case in CASES}
        cases = list(CASES.items())
        for round_number in range(arguments.runs):
            # Every round begins with another case: what ran before leaves its mark on the page cache.
            for at in range(len(cases)):
                case, (code, names) = cases[(at + round_number) % len(cases)]
                found[case].append(measure(code, Path(name), **names))
        amplification, num_kept = measure(RANK, Path(name))
    with tempfile.TemporaryDirectory() as name:
        make_many_tensors(Path(name))
        plans: dict[str, list[tuple[float, int]]] = {"infinilm": [], "transformers": []}
        for _ in range(arguments.runs):
            plans["infinilm"].append(measure(PLAN_INFINILM, Path(name)))
            plans["transformers"].append(measure(PLAN_TRANSFORMERS, Path(name)))
    planning = {case: statistics.median(run[0] for run in runs) for case, runs in plans.items()}
    print("100,836 tensors in 64 files, each renamed twice: seconds to plan, headers included, no tensor byte read")
    print(
        f"infinilm {planning['infinilm']:.2f}, transformers' renaming and conversion {planning['transformers']:.2f}\n"
    )
    print(
        f"one rank of 8, its {num_kept / 1e6:.0f} MB that are cut along the leading dimension: "
        f"bytes read over bytes kept {amplification:.3f}\n"
    )
    print(f"{num_bytes / 1e9:.2f} GB of bfloat16, medians of {arguments.runs}\n")
    print(f"{'':<26}{'seconds':>9}{'GB/s':>8}{'memory / parameters':>22}")
    seconds = {case: statistics.median(run[0] for run in runs) for case, runs in found.items()}
    memory = {case: statistics.median(run[1] for run in runs) for case, runs in found.items()}
    for case in CASES:
        kept = num_bytes * (2 if case.endswith("float32") else 1)
        print(f"{case:<26}{seconds[case]:>9.2f}{num_bytes / seconds[case] / 1e9:>8.2f}{memory[case] / kept:>22.2f}")
    if arguments.json:
        read = row("bytes read for one rank of 8 over its parameters", amplification, "ratio", 1.0, "what it keeps")
        figures = [*rows(found, memory, num_bytes), *plan_rows(plans, planning), read]
        arguments.json.write_text(json.dumps(figures, indent=2))


def row(name: str, value: float, unit: str, target: float, peer: str, peer_value: float = 1.0) -> dict[str, Any]:
    """Return one judged figure."""
    better = "higher" if "speed" in name else "lower"
    figures = {"value": value, "unit": unit, "better": better, "target": target}
    return {"name": name, **figures, "peer": peer, "peer_value": peer_value}


def plan_rows(plans: dict[str, list[tuple[float, int]]], planning: dict[str, float]) -> list[dict[str, Any]]:
    """Return the judged figures of planning."""
    pairs = zip(plans["infinilm"], plans["transformers"], strict=True)
    ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
    name = "time to plan 100,836 tensors"
    return [
        row(name, planning["infinilm"], "s", 1.0, "transformers", planning["transformers"]),
        row(f"{name} over transformers", ratio, "ratio", 0.125, "transformers"),
    ]


def rows(found: dict[str, list[tuple[float, int]]], memory: dict[str, float], num_bytes: int) -> list[dict[str, Any]]:
    """Return the judged figures of loading; ratios are medians of pairs from the same round."""

    def ratio(one: str, other: str) -> float:
        return statistics.median(a[0] / b[0] for a, b in zip(found[one], found[other], strict=True))

    above = {case: memory[case] - num_bytes * (2 if case.endswith("float32") else 1) for case in memory}
    return [
        row("load speed over preadv", 1 / ratio("infinilm", "preadv"), "ratio", 0.9, "preadv"),
        row("load time over transformers", ratio("infinilm", "transformers"), "ratio", 0.5, "transformers"),
        row("load time with 20 plugins", ratio("infinilm, 20 plugins", "infinilm"), "ratio", 1.05, "no plugin"),
        *(
            row(f"peak above parameters, {case}", above[case] / 2**20, "MiB", 256.0, peer, above[peer] / 2**20)
            for case, peer in (("infinilm", "transformers"), ("infinilm, to float32", "transformers, to float32"))
        ),
    ]


if __name__ == "__main__":
    main()
