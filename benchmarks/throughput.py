"""Generation against transformers' static batch, in alternation: 16 requests on a random Qwen2 of 0.5B parameters.

    python benchmarks/throughput.py [--runs N] [--requests N] [--input-len N] [--output-len N] [--json PATH]

Both run in one process, on the same weights in bfloat16, with the same prompts and answers of full length. The step
loop is what passes between two calls of the backend's `forward` while all requests decode.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any


def make_checkpoint(folder: Path, num_layers: int) -> None:
    """Write a random model of the shape of Qwen2-0.5B, without a tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=896,
        num_hidden_layers=num_layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def with_transformers(folder: Path, prompts: list[list[int]], output_len: int) -> Callable[[], None]:
    """Return what generates everything once, as one static batch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    input_ids = torch.tensor(prompts)  # (num_requests, input_len)
    options = {"min_new_tokens": output_len, "max_new_tokens": output_len, "do_sample": False, "pad_token_id": 0}

    def generate() -> None:
        with torch.inference_mode():
            found = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
        assert found.shape == (len(prompts), len(prompts[0]) + output_len)

    return generate


def with_infinilm(
    folder: Path, prompts: list[list[int]], output_len: int
) -> tuple[Callable[[], None], list[tuple[float, float, int]]]:
    """Return what generates everything once, and the list where it notes (start, end, tokens) of every step."""
    from infinilm import LLM, SamplingParams

    llm = LLM(folder, dtype="bfloat16", backend="torch", enable_prefix_caching=False, max_num_seqs=len(prompts))
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_len)
    steps: list[tuple[float, float, int]] = []
    forward = llm.backend.forward

    def timed(batch: Any) -> Any:
        started = time.perf_counter()
        logits = forward(batch)
        steps.append((started, time.perf_counter(), len(batch.token_ids)))
        return logits

    llm.backend.forward = timed  # type: ignore[method-assign]

    def generate() -> None:
        steps.clear()
        results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert {len(result.outputs[0].token_ids) for result in results} == {output_len}

    return generate, steps


def seconds_of(generate: Callable[[], None]) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    generate()
    return time.perf_counter() - started


def seconds_between(steps: list[tuple[float, float, int]], num_requests: int) -> list[float]:
    """Return the time between each two steps in which all requests decode one token."""
    decoding = [it for it in steps if it[2] == num_requests]
    return [after[0] - before[1] for before, after in pairwise(decoding)]


def rows(ours: list[float], theirs: list[float], between: list[float], num_tokens: int) -> list[dict[str, Any]]:
    """Return the judged figures; the ratio is the median of pairs of one round."""
    rate, peer_rate = (num_tokens / statistics.median(seconds) for seconds in (ours, theirs))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    loop = 1000 * statistics.median(between)
    peer = "transformers, static batch"
    return [
        _row("output throughput", rate, "tokens/s", "higher", peer_rate, peer, peer_rate),
        _row("output throughput over transformers", ratio, "ratio", "higher", 1.0, peer, 1.0),
        _row("step loop outside forward", loop, "ms", "lower", 1.0, "none", 0.0),
    ]


def _row(
    name: str, value: float, unit: str, better: str, target: float, peer: str, peer_value: float
) -> dict[str, Any]:
    figures = {"value": value, "unit": unit, "better": better, "target": target}
    return {"name": name, **figures, "peer": peer, "peer_value": peer_value}


def main() -> None:
    """Measure, print a table, and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(arguments.threads)
    chance = torch.Generator().manual_seed(0)
    shape = (arguments.requests, arguments.input_len)
    prompts = torch.randint(0, 151936, shape, generator=chance).tolist()
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(Path(name), arguments.layers)
        theirs = with_transformers(Path(name), prompts, arguments.output_len)
        ours, steps = with_infinilm(Path(name), prompts, arguments.output_len)
        times: dict[str, list[float]] = {"infinilm": [], "transformers": []}
        between: list[float] = []
        ours(), theirs()  # memory is there, and what is compiled is compiled
        for round_number in range(arguments.runs):
            pair = [("infinilm", ours), ("transformers", theirs)]
            for who, generate in pair if round_number % 2 == 0 else reversed(pair):
                times[who].append(seconds_of(generate))
            between += seconds_between(steps, arguments.requests)
    num_tokens = arguments.requests * arguments.output_len
    figures = rows(times["infinilm"], times["transformers"], between, num_tokens)
    print(
        f"{arguments.requests} requests of {arguments.input_len} + {arguments.output_len} tokens, {arguments.layers} "
        f"layers, bfloat16, {arguments.threads} threads, {arguments.runs} rounds\n"
    )
    print(f"{'':<16}{'output tokens/s, median':>25}{'all rounds':>30}")
    for who, seconds in times.items():
        each = ", ".join(f"{num_tokens / it:.1f}" for it in seconds)
        print(f"{who:<16}{num_tokens / statistics.median(seconds):>25.1f}{each:>30}")
    print(f"\nratio, median of pairs       {figures[1]['value']:.2f}")
    print(f"step loop outside forward    {figures[2]['value']:.2f} ms a step, median of {len(between)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
