"""Prompts cut in every way, on both caches: the answers are those to the whole prompt, and the accounts are true."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import oracle
import pytest
import walk
from overrides import OVERRIDES
from tiny import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from infinilm import LLM, SamplingParams
from infinilm.backends.transformers.sequences import Cut, state_bytes

OPTIONS: dict[str, Any] = {"backend": "transformers", "platform": "cpu", "dtype": "float32", "max_model_len": 64}
PARAMS = SamplingParams(temperature=0, max_tokens=8, logprobs=0, prompt_logprobs=0, ignore_eos=True)
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write(folder: Path, model_type: str) -> Path:
    oracle.write_checkpoint(folder, tiny_config(model_type, OVERRIDES.get(model_type, {})))
    return folder


def answers(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], list[float], list[float]]]:
    """Return for every prompt what follows, and the log-probabilities of that and of the prompt."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], PARAMS, use_tqdm=False)
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        after = oracle._chosen(token_ids, completion.logprobs)
        found.append((token_ids, after, oracle._chosen(prompt[1:], output.prompt_logprobs[1:])))
    return found


CUTS = {
    "mamba2": Cut.ANYWHERE,
    "qwen3_next": Cut.ANYWHERE,
    "xlstm": Cut.ANYWHERE,
    "falcon_mamba": Cut.ONE_BY_ONE,
    "jamba": Cut.ONE_BY_ONE,
    "recurrent_gemma": Cut.ONE_BY_ONE,
    "glm_moe_dsa": Cut.NOWHERE,
    "deepseek_v4": Cut.NOWHERE,
    "openai-gpt": Cut.ANYWHERE,
}


@pytest.mark.parametrize("model_type", CUTS)
def test_chunks_of_a_prompt_say_what_the_whole_says(model_type: str, tmp_path: Path) -> None:
    folder = write(tmp_path, model_type)
    prompts, _ = walk._ask(AutoModelForCausalLM.from_pretrained(folder).eval())
    whole = LLM(folder, max_num_seqs=1, max_num_batched_tokens=64, **OPTIONS)
    assert whole.backend.findings.cut is CUTS[model_type]  # type: ignore[attr-defined]
    chunked = LLM(folder, max_num_seqs=6, max_num_batched_tokens=7, **OPTIONS)
    for one, other in zip(answers(whole, prompts), answers(chunked, prompts), strict=True):
        assert one[0] == other[0]
        assert oracle._worst(one[1], other[1]) < 1e-3
        # Where a prompt cannot be cut, what is said of its first tokens before the last are there is about those alone.
        assert CUTS[model_type] is Cut.NOWHERE or oracle._worst(one[2], other[2]) < 1e-3


# ---------------------------------------------------------------- rotary frequencies that depend on the length


def stretched(kind: str) -> Any:
    """Return a model whose frequencies change where a sequence becomes longer than sixteen tokens."""
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
        return LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=rope)
    factors = {"short_factor": [1.0] * 6, "long_factor": [1.0 + 2 * i for i in range(6)]}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 16, **factors}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Phi3Config(**SIZES, **tokens, max_position_embeddings=64, rope_parameters=rope)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_every_sequence_has_frequencies_of_its_own(kind: str, tmp_path: Path) -> None:
    oracle.write_checkpoint(tmp_path, stretched(kind))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts, expected = walk._ask(model)
    llm = LLM(tmp_path, max_num_seqs=6, max_num_batched_tokens=16, **OPTIONS)
    assert llm.backend.findings.cut is Cut.NOWHERE  # type: ignore[attr-defined]
    for (token_ids, logprobs, _), wanted in zip(answers(llm, prompts), expected, strict=True):
        assert token_ids == wanted.token_ids
        assert oracle._worst(logprobs, wanted.logprobs) < 1e-4


# ---------------------------------------------------------------- what caches cost


@pytest.mark.parametrize("model_type", ["cohere2", "deepseek_v3", "mamba2", "jamba", "olmo_hybrid"])
def test_a_sequence_takes_no_more_than_the_spec_says(model_type: str, tmp_path: Path) -> None:
    llm = LLM(write(tmp_path, model_type), max_num_seqs=1, **OPTIONS)
    spec = llm.backend.cache_spec()
    largest = 0
    forward = llm.backend.forward

    def measured(batch: Any) -> Any:
        nonlocal largest
        logits = forward(batch)
        for sequence in llm.backend._sequences._slots.values() if llm.backend._sequences else ():  # type: ignore[attr-defined]
            largest = max(largest, state_bytes(sequence))
            blocks = -(-len(sequence.token_ids) // spec.block_size)
            assert state_bytes(sequence) <= spec.bytes_per_slot + blocks * spec.bytes_per_block
        return logits

    llm.backend.forward = measured  # type: ignore[method-assign]
    llm.generate([{"prompt_token_ids": list(range(3, 40))}], PARAMS, use_tqdm=False)
    assert (largest > 0) is not spec.shareable


def test_paged_cache_costs_what_is_allocated(tmp_path: Path) -> None:
    llm = LLM(write(tmp_path, "cohere2"), max_num_seqs=1, **OPTIONS)
    pages = llm.backend._pages  # type: ignore[attr-defined]
    tensors = [*pages._keys.values(), *pages._values.values()]
    per_slot = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
    assert llm.backend.cache_spec().bytes_per_block == 16 * per_slot


def test_released_sequences_leave_nothing(tmp_path: Path) -> None:
    llm = LLM(write(tmp_path, "mamba2"), max_num_seqs=2, **OPTIONS)
    llm.generate([{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [8]}], PARAMS, use_tqdm=False)
    assert llm.backend._sequences._slots == {}  # type: ignore[attr-defined]


# ---------------------------------------------------------------- two of them at once


def test_two_backends_in_two_threads_do_not_mix(tmp_path: Path) -> None:
    prompts = [list(range(3, 30)), [4, 5], [6]]
    llms = [LLM(write(tmp_path / name, name), max_num_seqs=3, **OPTIONS) for name in ("cohere2", "gpt_oss")]
    alone = [[one[0] for one in answers(llm, prompts)] for llm in llms]
    together: list[list[list[list[int]]]] = [[], []]

    def run(number: int) -> None:
        for _ in range(3):
            together[number].append([one[0] for one in answers(llms[number], prompts)])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [[alone[0]] * 3, [alone[1]] * 3]
