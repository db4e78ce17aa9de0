"""`bench latency` and `bench throughput`: one `LLM` in this process, random prompts, answers of full length."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from infinilm import pipeline
from infinilm.cli.bench_report import Report, distribution

if TYPE_CHECKING:
    from infinilm.llm import LLM
    from infinilm.outputs import RequestOutput


def latency(llm: LLM, arguments: Any) -> Report:
    """Measure one batch as often as wanted, after a first time that does not count."""
    seconds: list[float] = []
    outputs: list[RequestOutput] = []
    _generate(llm, arguments, arguments.batch_size, seed=0)
    for number in range(arguments.num_iters):
        started = time.perf_counter()
        outputs += _generate(llm, arguments, arguments.batch_size, seed=number + 1)
        seconds.append(time.perf_counter() - started)
    tokens = arguments.batch_size * arguments.output_len
    rate = tokens * len(seconds) / sum(seconds)
    distributions = {"batch": distribution(seconds), **_token_times(outputs)}
    return Report("bench latency", _settings(arguments), {"output tokens/s": rate}, distributions)


def throughput(llm: LLM, arguments: Any) -> Report:
    """Measure many prompts at once, after one that does not count."""
    _generate(llm, arguments, 1, seed=0)
    started = time.perf_counter()
    outputs = _generate(llm, arguments, arguments.num_prompts, seed=1)
    seconds = time.perf_counter() - started
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    figures = {
        "seconds": seconds,
        "requests/s": len(outputs) / seconds,
        "output tokens/s": num_output_tokens / seconds,
        "total tokens/s": (num_prompt_tokens + num_output_tokens) / seconds,
    }
    return Report("bench throughput", _settings(arguments), figures, _token_times(outputs))


def _generate(llm: LLM, arguments: Any, num_prompts: int, *, seed: int) -> list[RequestOutput]:
    from infinilm.sampling_params import SamplingParams

    chance = random.Random(seed)
    vocab_size = pipeline.vocabulary_size(llm.lineage)
    prompts = [
        {"prompt_token_ids": [chance.randrange(vocab_size) for _ in range(arguments.input_len)]}
        for _ in range(num_prompts)
    ]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=arguments.output_len)
    return llm.generate(prompts, params, use_tqdm=False)


def _token_times(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    first: list[float] = []
    between: list[float] = []
    for output in outputs:
        seen, num_tokens = output.metrics, len(output.outputs[0].token_ids)
        if seen is None or seen.first_token_time is None or seen.finished_time is None:
            continue
        first.append(seen.first_token_time - seen.arrival_time)
        if num_tokens > 1:
            between.append((seen.finished_time - seen.first_token_time) / (num_tokens - 1))
    found = {"time to first token": first, "inter-token latency": between}
    return {name: distribution(seconds) for name, seconds in found.items() if seconds}


def _settings(arguments: Any) -> dict[str, Any]:
    left_out = ("run", "command", "plugins", "action", "json")
    return {name: value for name, value in vars(arguments).items() if name not in left_out}
