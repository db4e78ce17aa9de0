"""Loading into the cpu backend, packing included, against the plain load of `loading.py`, in alternation.

    python benchmarks/cpu_loading.py [--models NAME ...] [--weights KIND ...] [--runs N]
        [--checkpoint FOLDER] [--memory owned|as-found] [--json PATH]

Every measurement is a process of its own, files are in the page cache, and every round begins with another case.
Memory is what the process held at most, over what it held before the load. A virtual machine may have given free memory
back to its host, which takes longer to return it than any load takes: so another process takes and frees twice the
checkpoint's bytes right before each measurement, the plain one as well. `--memory as-found` leaves that out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from cpu_engines import SHAPES
from loading import INFINILM, PLAIN, row, words_of

PACKED = """
from infinilm.native.libraries import open_library
from infinilm.native.paths import library_path
print(open_library(library_path("infinilm_cpu")).native.memory()["parameters"])
"""
WEIGHTS = {"bf16": None, "int8": "int8", "int4": "int4", "int4-g128": "int4-g128"}
MAX_TIME, MAX_MEMORY, SPARE_BYTES = 1.3, 1.15, 256e6


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> int:
    """Write a model of random weights in bfloat16 where that was not done, and return the bytes of its file."""
    path = folder / "model.safetensors"
    if path.exists():
        return path.stat().st_size
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    head_dim = shape["hidden"] // shape["heads"]
    queries, keys = shape["hidden"], shape["kv_heads"] * head_dim
    layer = {
        "self_attn.q_proj": (queries, shape["hidden"]),
        "self_attn.k_proj": (keys, shape["hidden"]),
        "self_attn.v_proj": (keys, shape["hidden"]),
        "self_attn.o_proj": (shape["hidden"], queries),
        "mlp.gate_proj": (shape["intermediate"], shape["hidden"]),
        "mlp.up_proj": (shape["intermediate"], shape["hidden"]),
        "mlp.down_proj": (shape["hidden"], shape["intermediate"]),
        "input_layernorm": (shape["hidden"],),
        "post_attention_layernorm": (shape["hidden"],),
    }
    shapes = {"model.embed_tokens.weight": (shape["vocab"], shape["hidden"]), "model.norm.weight": (shape["hidden"],)}
    if not shape["tied"]:
        shapes["lm_head.weight"] = (shape["vocab"], shape["hidden"])
    for index in range(shape["layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
        if shape["arch"] == "qwen2":
            sizes = {"q": queries, "k": keys, "v": keys}
            shapes |= {f"model.layers.{index}.self_attn.{n}_proj.bias": (size,) for n, size in sizes.items()}
    tensors = {name: (torch.randn(size) * 0.02).bfloat16() for name, size in shapes.items()}
    config = {
        "model_type": shape["arch"],
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "rope_theta": shape["theta"],
        "tie_word_embeddings": shape["tied"],
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, path, metadata={"format": "pt"})
    return path.stat().st_size


def compare(folder: Path, kinds: list[str], num_runs: int, owned_bytes: int) -> dict[str, list[tuple[float, ...]]]:
    """Return (seconds, peak bytes, packed bytes) of every run of every case."""
    cases = {kind: {**PLAIN, "BACKEND": "cpu", "QUANTIZATION": WEIGHTS[kind]} for kind in kinds}
    order = [("plain", PLAIN), *cases.items()]
    found: dict[str, list[tuple[float, ...]]] = {case: [] for case, _ in order}
    code = f"owned_bytes = {owned_bytes}\n{INFINILM}{PACKED}"
    for round_number in range(num_runs):
        for at in range(len(order)):
            case, names = order[(at + round_number) % len(order)]
            found[case].append(tuple(map(float, words_of(code, folder, **names)[-3:])))
    return found


def report(model: str, num_bytes: int, found: dict[str, list[tuple[float, ...]]]) -> list[dict[str, Any]]:
    """Print a table of one model, and return judged figures; ratios are medians of pairs from the same round."""
    print(f"{model}, {num_bytes / 1e9:.2f} GB of bfloat16, medians of {len(found['plain'])}\n")
    print(f"{'':<12}{'seconds':>9}{'over plain':>12}{'packed, MB':>12}{'peak, MB':>10}{'allowed, MB':>13}")
    figures = []
    for case, runs in found.items():
        seconds, peak, packed = (statistics.median(run[i] for run in runs) for i in range(3))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(runs, found["plain"], strict=True))
        if case == "plain":
            print(f"{case:<12}{seconds:>9.2f}{'':>24}{peak / 1e6:>10.0f}")
            continue
        allowed = MAX_MEMORY * packed + SPARE_BYTES
        print(f"{case:<12}{seconds:>9.2f}{ratio:>12.2f}{packed / 1e6:>12.0f}{peak / 1e6:>10.0f}{allowed / 1e6:>13.0f}")
        what = f"{model}, {case}"
        figures.append(row(f"load time over the plain load, {what}", ratio, "ratio", MAX_TIME, "torch backend"))
        figures.append(row(f"peak of the load over what is allowed, {what}", peak / allowed, "ratio", 1.0, "packed"))
    print()
    return figures


def main() -> None:
    """Measure, print tables, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen2-0.5b"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, help="a folder that keeps checkpoints from one run to the next")
    parser.add_argument("--memory", choices=("owned", "as-found"), default="owned")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as name:
        for model in arguments.models:
            folder = (arguments.checkpoint or Path(name)) / model
            num_bytes = write_checkpoint(folder, SHAPES[model])
            owned_bytes = 2 * num_bytes if arguments.memory == "owned" else 0
            figures += report(model, num_bytes, compare(folder, arguments.weights, arguments.runs, owned_bytes))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
