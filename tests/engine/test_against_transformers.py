"""Greedy tokens are transformers', however little cache there is and whatever was in it before."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from infinilm import LLM, SamplingParams

VOCAB_SIZE, MAX_TOKENS, MAX_MODEL_LEN = 300, 24, 200
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BYTES_PER_TOKEN = 2 * 2 * (2 * 8) * 4  # layers, keys and values, two heads of 8, float32


@pytest.fixture(scope="module", params=["plain", "dynamic"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama that sees far; "dynamic": one whose keys depend on the length of the prompt."""
    folder = tmp_path_factory.mktemp(request.param)
    rope = {"rope_type": "dynamic", "factor": 4.0} if request.param == "dynamic" else {"rope_type": "default"}
    length = 32 if request.param == "dynamic" else 256
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=2,
        max_position_embeddings=length,
        rope_parameters={"rope_theta": 10000.0, **rope},
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.5,
        **SIZES,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ragged_prompts() -> list[list[int]]:
    """Return 64 prompts of 1 to 150 tokens, half of which begin alike."""
    rng = random.Random(0)
    common = [rng.randrange(VOCAB_SIZE) for _ in range(120)]
    own = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 150))] for _ in range(32)]
    return own + [common[: rng.choice([16, 48, 50, 120])] + its[: rng.randint(0, 30)] for its in own]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    results = []
    for prompt in ragged_prompts():
        ids = torch.tensor([prompt])
        fresh = copy.deepcopy(model)  # dynamic frequencies remember the longest sequence they have seen
        answer = fresh.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=0
        )
        results.append(answer[0, len(prompt) :].tolist())
    return results


def cache_for_one(folder: Path, backend: str) -> tuple[int, int]:
    """Return how many of the backend's blocks one sequence may take, and the bytes of them all."""
    with LLM(folder, backend=backend, max_model_len=MAX_MODEL_LEN, max_num_seqs=1) as llm:
        spec = llm.backend.cache_spec()
    assert spec.bytes_per_block >= spec.block_size * BYTES_PER_TOKEN
    num_blocks = -(-MAX_MODEL_LEN // spec.block_size)
    return num_blocks, num_blocks * spec.bytes_per_block


@pytest.mark.parametrize("backend", oracle.BACKENDS)
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_sixty_four_ragged_prompts_in_a_cache_for_one(
    folder: Path, expected: list[list[int]], enable_prefix_caching: bool, backend: str
) -> None:
    num_blocks, num_bytes = cache_for_one(folder, backend)
    prompts = [{"prompt_token_ids": prompt} for prompt in ragged_prompts()]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    with LLM(
        folder,
        backend=backend,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=64,
        kv_cache_memory=num_bytes,
        enable_prefix_caching=enable_prefix_caching,
    ) as llm:
        assert llm.engine.stats().num_blocks == num_blocks
        for _ in range(2):  # the second time with what the first left in the cache
            results = llm.generate(prompts, params, use_tqdm=False)
            assert [its.outputs[0].token_ids for its in results] == expected
        stats = llm.engine.stats()
        assert stats.num_preemptions > 0
        assert stats.num_free_blocks == num_blocks
        is_found = enable_prefix_caching and "dynamic" not in folder.name
        assert (stats.prefix_cache_hits > 0) == is_found
        llm.engine._pool.check([])
