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
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu_engines import SHAPES, TASKS, WEIGHTS, num_threads, work

# ---------------------------------------------------------------- taking turns


@contextlib.contextmanager
def worker(engine: str, model: str, weights: str, arguments: argparse.Namespace, folder: Path) -> Iterator[Any]:
    python = arguments.llama if engine == "llama" else sys.executable
    command = [python, __file__, "--worker", engine, "--models", model, "--weights", weights, "--folder", str(folder)]
    if arguments.library:
        command += ["--library", arguments.library]
    if arguments.llama_plain:
        command.append("--llama-plain")
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if arguments.verbose else subprocess.DEVNULL,
        text=True,
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
        *(["torch"] if not weights.startswith("int") and arguments.torch else []),
    ]
    results: dict[str, dict[str, list[float]]] = {task: {engine: [] for engine in engines} for task in arguments.tasks}
    reads = []
    with contextlib.ExitStack() as stack:
        asks = {engine: stack.enter_context(worker(engine, model, weights, arguments, folder)) for engine in engines}
        for _ in range(arguments.rounds):
            for task in arguments.tasks:
                for engine, ask in asks.items():
                    if engine == "torch" and task == "deep":
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
    bits = {"f32": 32, "bf16": 16, "int8": 8.5, "int4": 4.5}
    head_bits = 8.5 if weights == "int4" else bits[weights]
    return float(layers * bits[weights] / 8 + shape["vocab"] * shape["hidden"] * head_bits / 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="a Python with llama-cpp-python and gguf; without it llama.cpp is left out")
    parser.add_argument("--llama-plain", action="store_true", help="without its repacked weights and AMX")
    parser.add_argument(
        "--torch", action="store_true", help="measure the torch backend as well, where it has such weights"
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen2-0.5b", "llama-1.1b"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS[1:])
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
        work(
            arguments.worker,
            arguments.models[0],
            arguments.weights[0],
            Path(arguments.folder),
            library=arguments.library,
            is_plain=arguments.llama_plain,
        )
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
